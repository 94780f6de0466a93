"""OneCycle: the learning rate rises once and falls far below its start, and momentum goes the other way."""

import warnings

import keras
import numpy as np


class OneCycle(keras.callbacks.Callback):
    """Sets the learning rate before each step of one cycle, and momentum, or `beta_1`, opposite to it.

    Example:

        >>> epochs, batch_size = 10, 32
        >>> cycle = OneCycle(peak=0.01, steps=epochs * -(-len(x) // batch_size))
        >>> fitted = model.fit(x, y, batch_size, epochs, verbose=0, callbacks=[cycle])
        >>> rates, momenta = fitted.history["learning_rate"], fitted.history["momentum"]

    The rate changes linearly, in three phases:

    - over the share `rise` of the steps it rises from `peak / divisor` to `peak`, while momentum falls;
    - over as many steps it falls back, while momentum rises;
    - over the rest it falls to `peak / divisor / final_divisor`, which the last step uses; momentum stays high.

    If training goes on, the rate stays there, with a warning. Each `fit` begins a new cycle, also one that
    `BackupAndRestore` resumes. When `fit` ends the optimizer has the rate and the momentum from before; if it raises,
    it keeps those of the cycle until the next `fit` with a `OneCycle`, or `detach()`.

    Momentum is the optimizer's `momentum` (of SGD, RMSprop, Muon), or else its `beta_1` (of Adam and its relatives,
    Lion); Adam's bias correction uses the present one. With `gradient_accumulation_steps` the steps are batches.

    The `logs` of each epoch receive `learning_rate` and `momentum`, those of the epoch's last step. Callbacks that
    write logs come after this one in the list, and so does `LearningRateLogger`.

    Cost: one assignment a step, 0.1 ms on TensorFlow. On JAX the variables must be brought up to date for it: 0.2 ms
    with Adam and 18 weight arrays, more with more.

    Args:
        peak: highest learning rate, positive; `LearningRateRangeTest` finds it.
        steps: number of training steps of the cycle, epochs times batches, at least 4.
        rise: share of the steps in which the rate rises, between 0 and 0.5. (Smith 2018 gives 41 of 95 epochs.)
        divisor: `peak` over the rate of the first step, above 1. ("A factor of 10 or 20 less", Smith 2018.)
        final_divisor: rate of the first step over that of the last, at least 1. ("Several orders of magnitude", both
            papers.)
        momentum: its lowest and its highest value, between 0 and 1 (0.95 to 0.85 and back in Smith 2018); None leaves
            momentum as it is.

    Raises:
        ValueError: an argument is outside its range. From `fit`: the learning rate is not a float but a schedule;
            `steps_per_execution` is above 1; the optimizer has no momentum, or is `ScheduleFreeAdamW`.

    Source: Smith 2018, "A disciplined approach to neural network hyper-parameters: Part 1", arXiv:1803.09820; Smith and
    Topin 2017, "Super-Convergence", arXiv:1708.07120.
    """

    def __init__(self, peak, steps, rise=0.43, divisor=10.0, final_divisor=1000.0, momentum=(0.85, 0.95)):
        super().__init__()
        if not 0 < peak < np.inf:
            raise ValueError(f"peak must be a positive number, not {peak!r}.")
        if not isinstance(steps, int) or steps < 4:
            raise ValueError(f"steps must be an integer of at least 4, not {steps!r}.")
        if not 0 < rise < 0.5:
            raise ValueError(f"rise must be between 0 and 0.5, not {rise!r}.")
        if not 1 < divisor < np.inf:
            raise ValueError(f"divisor must be above 1, not {divisor!r}.")
        if not 1 <= final_divisor < np.inf:
            raise ValueError(f"final_divisor must be at least 1, not {final_divisor!r}.")
        if momentum is not None and not (np.shape(momentum) == (2,) and 0 < momentum[0] <= momentum[1] < 1):
            raise ValueError(f"momentum must be None or (lowest, highest), both between 0 and 1, not {momentum!r}.")
        self.peak = peak
        self.steps = steps
        self.rise = rise
        self.divisor = divisor
        self.final_divisor = final_divisor
        self.momentum = momentum
        self._optimizer = None

    def learning_rate_at(self, step):
        """Return the learning rate of a step, or of an array of steps, counted from 0."""
        start = self.peak / self.divisor
        top = max(1, int(self.rise * (self.steps - 1)))
        return np.interp(step, [0, top, 2 * top, self.steps - 1], [start, self.peak, start, start / self.final_divisor])

    def momentum_at(self, step):
        """Return the momentum of a step, or of an array of steps, counted from 0; None if it is left as it is."""
        if self.momentum is None:
            return None
        return np.interp(self.learning_rate_at(step), [self.peak / self.divisor, self.peak], self.momentum[::-1])

    def on_train_begin(self, logs=None):
        self.detach()
        if self.model.steps_per_execution > 1:
            raise ValueError("OneCycle sets the rate before each step: compile the model with steps_per_execution=1.")
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        if not isinstance(optimizer.learning_rate, keras.Variable):
            raise ValueError(
                "OneCycle cannot set a learning rate that is a schedule or a function. "
                f"Give {optimizer.__class__.__name__} a float."
            )
        if left := vars(optimizer).get("_one_cycle"):
            left.detach()
        self._step = -1
        self._attach(optimizer)

    def on_train_batch_begin(self, batch, logs=None):
        self._step += 1
        if self._step == self.steps:
            warnings.warn(
                f"Training goes on after the {self.steps} steps of OneCycle: the rate stays at "
                f"{self.learning_rate_at(self.steps):g}. Let steps be epochs times batches.",
                stacklevel=2,
            )
        self._set_rate(float(self.learning_rate_at(self._step)))

    def on_epoch_end(self, epoch, logs=None):
        logs["learning_rate"] = float(self.learning_rate_at(self._step))
        if self.momentum is not None:
            logs["momentum"] = float(self.momentum_at(self._step))

    def on_train_end(self, logs=None):
        self.detach()

    def detach(self):
        """Leave the optimizer as it was before `fit`."""
        if self._optimizer is None:
            return
        del vars(self._optimizer)["_one_cycle"]
        self._optimizer.learning_rate = self._rate_before
        if self.momentum is not None:
            vars(self._optimizer)[self._name] = self._momentum_before
            vars(self._optimizer).pop("get_config")
            # The compiled training function has the cycle's momentum: have it made anew, as `compile` does.
            self._attached_model.train_function = None
        self._optimizer = self._attached_model = None

    def _attach(self, optimizer):
        if self.momentum is not None:
            names = [name for name in ("momentum", "beta_1") if getattr(optimizer, name, 0)]
            if not names or isinstance(optimizer, keras.optimizers.ScheduleFreeAdamW):
                raise ValueError(
                    f"OneCycle has no momentum to change in {optimizer.__class__.__name__}. Give the optimizer "
                    "momentum, as in SGD(momentum=0.9), choose another, or pass momentum=None to OneCycle."
                )
            self._name = name = names[0]
            self._momentum_before = before = getattr(optimizer, name)
            get_config = optimizer.get_config
            vars(optimizer)["get_config"] = lambda: get_config() | {name: before}
            if keras.backend.backend() != "torch":
                # Not by `setattr`, with which the optimizer would count it among its variables, and save it.
                vars(optimizer)[name] = _Momentum(optimizer.learning_rate, self)
        # `fit` has made its training function already: one from an earlier `fit` has the float in it, and `detach` may
        # just have removed it.
        self.model.make_train_function(force=self.momentum is not None)
        self._attached_model = self.model
        self._rate_before = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
        # For the next OneCycle, in case `fit` raises. Not by `setattr`, with which the optimizer would track it.
        vars(optimizer)["_one_cycle"] = self
        self._optimizer = optimizer

    def _set_rate(self, rate):
        # On JAX a new value takes effect only in variables that asking for `self.model` has brought up to date.
        self.model.optimizer.learning_rate = rate
        if self.momentum is not None and keras.backend.backend() == "torch":
            # PyTorch does not compile the attribute into its training step as a constant.
            vars(self._optimizer)[self._name] = float(self.momentum_at(self._step))


class _Momentum(keras.Variable):
    """Momentum computed from the learning rate wherever a training step reads it.

    A float would become a constant of the compiled training function. The rate is a variable of the optimizer already,
    so nothing has to be added to the optimizer's state.
    """

    def __init__(self, learning_rate, cycle):
        self._learning_rate = learning_rate
        self._lowest_rate, self._highest_rate = cycle.peak / cycle.divisor, cycle.peak
        self._lowest, self._highest = cycle.momentum
        super().__init__(self._highest, dtype=learning_rate.dtype, trainable=False)

    @property
    def value(self):
        share = (self._learning_rate - self._lowest_rate) / (self._highest_rate - self._lowest_rate)
        return self._highest - keras.ops.clip(share, 0, 1) * (self._highest - self._lowest)

    # SGD and RMSprop ask in Python whether there is momentum at all.
    def __ne__(self, other):
        return True

    def __gt__(self, other):
        return True
