"""LearningRateLogger: the learning rate that each step of `fit` used, and each epoch's last one in `logs`."""

import keras
import numpy as np


class LearningRateLogger(keras.callbacks.Callback):
    """Records the learning rate that each training step used, and puts that of the epoch's last step into `logs`.

    Example:

        >>> rates = LearningRateLogger()
        >>> fitted = model.fit(x, y, epochs=2, verbose=0, callbacks=[rates])
        >>> by_step, by_epoch = rates.history, fitted.history["learning_rate"]

    In the list of callbacks it comes after those that set the rate before each step (else it sees their rates one step
    late), and before those that write logs.

    `logs["learning_rate"]` is the rate in effect during the epoch's last step. `ReduceLROnPlateau` may have lowered it
    for the next epoch already. With a schedule object Keras's own entries (of `ReduceLROnPlateau`, and TensorBoard's
    curve, which this callback does not change) are those of the step after.

    With `gradient_accumulation_steps=n` a schedule advances with each batch, and so does `history`, though only each
    n-th batch changes the weights, with the rate of that batch. Batches that mixed precision skips because a gradient
    is not finite advance neither. With `steps_per_execution` there is still an entry for each batch.

    Attributes, begun anew by each `fit`:
        history: list of the learning rates, one for each step of the optimizer, complete up to the last finished epoch.
            With a schedule object they are computed on first reading: a schedule has to depend on the step alone.

    Cost: 1 µs a step. Within an epoch nothing is read from the device, except in mixed precision, where the step
    counter is, whenever a callback assigns the rate. If `fit` raises, what is left on the rate's variable does nothing;
    the next `fit` or `detach()` removes it.

    Raises:
        ValueError: from `fit`: the learning rate is a function without arguments, which a compiled training function
            calls only once, at a time that cannot be seen.
    """

    def __init__(self):
        super().__init__()
        self._rates = []
        self._pending_steps = []
        self._variable = None

    @property
    def history(self):
        if self._pending_steps:
            steps = keras.ops.convert_to_tensor(self._pending_steps, dtype=self._step_dtype)
            if self._one_by_one:
                # A schedule that runs eagerly may branch in Python.
                rates = [keras.ops.convert_to_numpy(self._schedule(step)) for step in steps]
            else:
                rates = keras.ops.convert_to_numpy(keras.ops.vectorized_map(self._schedule, steps))
            self._rates += np.asarray(rates, "float64").tolist()
            self._pending_steps = []
        return self._rates

    def on_train_begin(self, logs=None):
        self.detach()
        self._rates, self._pending_steps = [], []
        # PyTorch's `vectorized_map` knows no conditions, which some schedules of Keras have.
        self._one_by_one = self.model.run_eagerly or keras.backend.backend() == "torch"
        optimizer = self._optimizer()
        self._may_skip = optimizer is not self.model.optimizer
        # Private: the public `learning_rate` is a schedule's present value, not the schedule. Tried on Keras 3.15.
        source = optimizer._learning_rate
        self._schedule = source if isinstance(source, keras.optimizers.schedules.LearningRateSchedule) else None
        if isinstance(source, keras.Variable):
            self._watch(source)
        elif self._schedule is None:
            raise ValueError(
                "LearningRateLogger cannot see the rate of a learning_rate that is a function without arguments. "
                "Give the optimizer a float or a LearningRateSchedule."
            )

    def on_epoch_begin(self, epoch, logs=None):
        self._start = self._steps_taken()
        self._changes = []
        self._changed, self._new_rate = self._variable is not None, None

    def on_train_batch_begin(self, batch, logs=None):
        if self._changed:
            rate = self._new_rate
            if rate is None:
                # `_optimizer` asks for `self.model`, which on JAX brings the variables up to date.
                rate = float(keras.ops.convert_to_numpy(self._optimizer().learning_rate))
            self._changes.append((self._steps_taken() if self._may_skip else self._start + batch, rate))
            self._changed = False

    def on_epoch_end(self, epoch, logs=None):
        end = self._steps_taken()
        if self._schedule is None:
            starts, rates = zip(*self._changes, strict=True)
            # As the variable rounds them.
            rates = keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(rates, dtype=self._variable.dtype))
            rates = np.asarray(rates, "float64")
            self._rates += np.repeat(rates, np.diff([*starts, end])).tolist()
            logs["learning_rate"] = float(rates[-1])
        else:
            self._pending_steps += range(self._start, end)
            # Mixed precision may have skipped every step.
            last = keras.ops.convert_to_tensor(max(end - 1, self._start), dtype=self._step_dtype)
            logs["learning_rate"] = float(keras.ops.convert_to_numpy(self._schedule(last)))

    def on_train_end(self, logs=None):
        self.detach()

    def detach(self):
        """Stop watching the rate's variable."""
        if self._variable is not None:
            vars(self._variable).pop("assign", None)
        self._variable = None

    def _optimizer(self):
        return getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)

    def _steps_taken(self):
        # Private: the public `iterations` leaves out accumulated batches, with which schedules advance. Tried on 3.15.
        counter = self._optimizer()._iterations
        self._step_dtype = counter.dtype
        return int(keras.ops.convert_to_numpy(counter))

    def _watch(self, variable):
        """Have every assignment to the rate's variable noted, so that it need not be read from the device."""
        assign = variable.assign

        def note_and_assign(value):
            self._changed = True
            # Other values are those that Keras assigns on JAX, some while it traces the training step.
            self._new_rate = value if isinstance(value, (int, float)) else None
            return assign(value)

        variable.assign = note_and_assign
        self._variable = variable
