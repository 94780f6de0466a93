"""LearningRateLogger: the learning rate that each step of `fit` used, and each epoch's last one in `logs`."""

import warnings
from pathlib import Path

import keras
import numpy as np


class LearningRateLogger(keras.callbacks.Callback):
    """Records the learning rate that each training step used, and puts that of the epoch's last step into `logs`.

    Example:

        >>> rates = LearningRateLogger()
        >>> fitted = model.fit(x, y, epochs=2, verbose=0, callbacks=[rates])
        >>> by_step, by_epoch = rates.history, fitted.history["learning_rate"]
        >>> figure = rates.plot()

    In the list of callbacks it comes after those that set the rate before each step (else it sees their rates one step
    late), and before those that write logs.

    `logs["learning_rate"]` is the rate in effect during the epoch's last step; in an epoch without one, what that would
    have used. `ReduceLROnPlateau` may have lowered it
    for the next epoch already. With a schedule object Keras's own entries (of `ReduceLROnPlateau`, and TensorBoard's
    curve, which this callback does not change) are those of the step after.

    With `gradient_accumulation_steps=n` a schedule advances with each batch, and so does `history`, though only each
    n-th batch changes the weights, with the rate of that batch. Batches that mixed precision skips because a gradient
    is not finite advance neither. With `steps_per_execution` there is still an entry for each batch.

    Attributes, begun anew by each `fit`:
        history: list of the learning rates, one for each step of the optimizer, complete up to the last finished epoch.
            With a schedule object they are computed on first reading: a schedule has to depend on the step alone.

    Cost: 1 µs a step. Within an epoch nothing is read from the device, except, in mixed precision and with `optimizer`,
    the step counter, whenever a callback assigns the rate. If `fit` raises, what is left on the rate's variable does
    nothing; the next `fit` or `detach()` removes it. A copy or a pickle has the rates, without the model and the
    optimizer.

    Args:
        optimizer: the optimizer to watch, where a `train_step` of your own uses several, or one of those within a
            `MultiOptimizer`; None for the model's.
        log: whether the `logs` receive the rate.

    Raises:
        ValueError: from `fit`: the learning rate is a function without arguments, which a compiled training function
            calls only once, at a time that cannot be seen; or the optimizer is a `MultiOptimizer`, which has several.
    """

    # Has Keras call `on_train_batch_end` in a thread of its own, while training goes on, where the backend allows it.
    # Not documented, and tried on Keras 3.15.
    async_safe = True

    def __init__(self, *, optimizer=None, log=True):
        super().__init__()
        self.optimizer = optimizer
        self.log = log
        self._rates = []
        self._pending_steps = []
        self._variable = self._schedule = None

    def __getstate__(self):
        # First the rates of a schedule, which stays behind.
        _ = self.history
        return vars(self) | dict.fromkeys(("_model", "optimizer", "_variable", "_schedule"))

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
        if isinstance(optimizer, keras.optimizers.MultiOptimizer):
            raise ValueError(
                "LearningRateLogger watches one optimizer, and a MultiOptimizer has several: pass one of them, "
                "optimizer=model.optimizer.optimizers[0]."
            )
        # Mixed precision skips steps, and a training step of the user's own may make several of one batch.
        self._counts_steps = optimizer is not self.model.optimizer
        self._has_warned = self._sees_ends = False
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
        self._begun, self._ended = 0, 0
        self._changes = []
        self._changed, self._new_rate = self._variable is not None, None

    def on_train_batch_begin(self, batch, logs=None):
        self._begun = batch + 1
        if self._changed:
            rate = self._new_rate
            if rate is None:
                # `_optimizer` asks for `self.model`, which on JAX brings the variables up to date.
                rate = float(keras.ops.convert_to_numpy(self._optimizer().learning_rate))
            self._changes.append((self._steps_taken() if self._counts_steps else self._start + batch, rate))
            self._changed = False

    def on_train_batch_end(self, batch, logs=None):
        # The steps may come here in another order than they were made in.
        self._ended, self._sees_ends = max(self._ended, batch + 1), True

    def on_epoch_end(self, epoch, logs=None):
        end = self._steps_taken()
        if self._sees_ends and self._ended < self._begun and end - self._start == self._ended + 1:
            # TensorFlow counts a step for which the data had run out, too.
            end -= 1
        self._warn_if_not_used(end)
        if self._schedule is None:
            # The data may have run out when a step had begun.
            changes = [change for change in self._changes if change[0] < end] or self._changes[:1]
            # They may have been out before: no step has begun.
            changes = changes or [(end, float(keras.ops.convert_to_numpy(self._optimizer().learning_rate)))]
            starts, rates = zip(*changes, strict=True)
            # As the variable rounds them.
            rates = keras.ops.convert_to_numpy(keras.ops.convert_to_tensor(rates, dtype=self._variable.dtype))
            rates = np.asarray(rates, "float64")
            self._rates += np.repeat(rates, np.diff([*starts, end])).tolist()
            rate = rates[-1]
        else:
            self._pending_steps += range(self._start, end)
            # Mixed precision may have skipped every step.
            last = keras.ops.convert_to_tensor(max(end - 1, self._start), dtype=self._step_dtype)
            rate = keras.ops.convert_to_numpy(self._schedule(last))
        if self.log:
            logs["learning_rate"] = float(rate)

    def on_train_end(self, logs=None):
        self.detach()

    def detach(self):
        """Stop watching the rate's variable."""
        if self._variable is not None:
            vars(self._variable).pop("assign", None)
        self._variable = None

    def plot(self, path=None):
        """Draw the learning rate of each step; return the figure.

        Args:
            path: file to write; its suffix tells the format, and without one it is SVG. None for no file.
        """
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rates", "savefig.format": "svg"}):
            figure = Figure(figsize=(6, 2.4), layout="constrained")
            axes = figure.subplots()
            axes.plot(self.history, drawstyle="steps-mid")
            axes.set(xlabel="step", ylabel="learning rate")
            if path is not None:
                # Without a date the same rates give the same file.
                is_svg = Path(path).suffix in ("", ".svg")
                figure.savefig(path, metadata={"Date": None} if is_svg else None)
        return figure

    def _optimizer(self):
        model = self.model
        outer = model.optimizer if self.optimizer is None else self.optimizer
        return getattr(outer, "inner_optimizer", outer)

    def _warn_if_not_used(self, steps_taken):
        """After the first epoch, say if the optimizer has not made a step."""
        if not self._has_warned and steps_taken == self._start:
            warnings.warn(
                f"LearningRateLogger watches the optimizer {self._optimizer().name!r}, which has not made a step in "
                "the first epoch. If another one trains the model, pass that: optimizer=...",
                stacklevel=2,
            )
        self._has_warned = True

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
