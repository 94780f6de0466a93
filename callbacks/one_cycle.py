"""OneCycle: the learning rate rises once and falls far below its start, and momentum goes the other way."""

import numbers
import warnings
from pathlib import Path

import keras
import numpy as np


class OneCycle(keras.callbacks.Callback):
    """Sets the learning rate before each step of one cycle, and momentum, or `beta_1`, opposite to it.

    Example:

        >>> cycle = OneCycle(peak=0.01)
        >>> fitted = model.fit(x, y, batch_size=32, epochs=10, verbose=0, callbacks=[cycle])
        >>> rates, momenta = fitted.history["learning_rate"], fitted.history["momentum"]
        >>> figure = cycle.plot()

    The rate changes linearly, in three phases:

    - over the share `rise` of the steps it rises from `peak / divisor` to `peak`, while momentum falls;
    - over as many steps it falls back, while momentum rises;
    - over the rest it falls to `peak / divisor / final_divisor`, which the last step uses; momentum stays high.

    The cycle is as long as the whole training, `epochs` of `fit` times its steps. A `fit` that begins at a later epoch,
    by `initial_epoch` or `BackupAndRestore`, goes on at that epoch's place in the cycle; one that begins at epoch 0
    begins a cycle. Where the data have no length, so that `steps` is given, a later epoch's place is the number of
    steps that the optimizer has made. If training goes on after the cycle, the rate stays where it is; then, and if
    training ends before the cycle does, a warning says so.

    When `fit` ends the optimizer has the rate and the momentum from before; if it raises, it keeps those of the cycle
    until the next `fit` with a `OneCycle`, or `detach()`. A copy or a pickle has neither the model nor the optimizer.

    Momentum is the optimizer's `momentum` (of SGD, RMSprop, Muon), or else its `beta_1` (of Adam and its relatives,
    Lion); Adam's bias correction uses the present one. With `gradient_accumulation_steps` the steps are batches.

    The `logs` of each epoch receive `learning_rate` and `momentum`, those of the epoch's last step. Callbacks that
    write logs come after this one in the list, and so does `LearningRateLogger`.

    Cost: one assignment a step, 0.1 ms on TensorFlow. On JAX the variables must be brought up to date for it: 0.2 ms
    with Adam and 18 weight arrays, more with more.

    Args:
        peak: highest learning rate, positive; `LearningRateRangeTest` finds it.
        steps: number of training steps of the cycle, an integer of at least 4; None for those of `fit`.
        rise: share of the steps in which the rate rises, between 0 and 0.5. (Smith 2018 gives 41 of 95 epochs.)
        divisor: `peak` over the rate of the first step, above 1. ("A factor of 10 or 20 less", Smith 2018.)
        final_divisor: rate of the first step over that of the last, at least 1. ("Several orders of magnitude", both
            papers.)
        momentum: its lowest and its highest value, between 0 and 1 (0.95 to 0.85 and back in Smith 2018); None leaves
            momentum as it is.
        optimizer: the optimizer to set, where a `train_step` of your own uses several, or one of those within a
            `MultiOptimizer`; None for the model's.
        log: whether the `logs` receive the rate and the momentum.

    Attributes:
        steps: number of steps of the cycle; None until `fit` tells it.

    Raises:
        ValueError: an argument is outside its range. From `fit`: it makes another number of steps than `steps`; the
            data have no length, and `steps` is None; the learning rate is not a float but a schedule;
            `steps_per_execution` is above 1; the optimizer has no momentum, or is `ScheduleFreeAdamW`.

    Source: Smith 2018, "A disciplined approach to neural network hyper-parameters: Part 1", arXiv:1803.09820; Smith and
    Topin 2017, "Super-Convergence", arXiv:1708.07120.
    """

    # Has Keras call `on_train_batch_end` in a thread of its own, while training goes on, where the backend allows it.
    # Not documented, and tried on Keras 3.15.
    async_safe = True

    def __init__(
        self,
        peak,
        steps=None,
        rise=0.43,
        divisor=10.0,
        final_divisor=1000.0,
        momentum=(0.85, 0.95),
        *,
        optimizer=None,
        log=True,
    ):
        super().__init__()
        if not 0 < peak < np.inf:
            raise ValueError(f"peak must be a positive number, not {peak!r}.")
        if steps is not None and (not isinstance(steps, numbers.Integral) or steps < 4):
            raise ValueError(f"steps must be None or an integer of at least 4, not {steps!r}.")
        if not 0 < rise < 0.5:
            raise ValueError(f"rise must be between 0 and 0.5, not {rise!r}.")
        if not 1 < divisor < np.inf:
            raise ValueError(f"divisor must be above 1, not {divisor!r}.")
        if not 1 <= final_divisor < np.inf:
            raise ValueError(f"final_divisor must be at least 1, not {final_divisor!r}.")
        if momentum is not None and not (np.shape(momentum) == (2,) and 0 < momentum[0] <= momentum[1] < 1):
            raise ValueError(f"momentum must be None or (lowest, highest), both between 0 and 1, not {momentum!r}.")
        self.peak = peak
        self.steps = self._given_steps = None if steps is None else int(steps)
        self.rise = rise
        self.divisor = divisor
        self.final_divisor = final_divisor
        self.momentum = momentum
        self.optimizer = optimizer
        self.log = log
        self._optimizer = self._rate_before = None

    def __getstate__(self):
        return vars(self) | dict.fromkeys(("_model", "_attached_model", "optimizer", "_optimizer", "_rate_before"))

    def learning_rate_at(self, step):
        """Return the learning rate of a step, or of an array of steps, counted from 0."""
        if self.steps is None:
            raise ValueError("The number of steps is not known before fit: pass steps=... to OneCycle.")
        start = self.peak / self.divisor
        top = max(1, int(self.rise * (self.steps - 1)))
        return np.interp(step, [0, top, 2 * top, self.steps - 1], [start, self.peak, start, start / self.final_divisor])

    def momentum_at(self, step):
        """Return the momentum of a step, or of an array of steps, counted from 0; None if it is left as it is."""
        if self.momentum is None:
            return None
        return np.interp(self.learning_rate_at(step), [self.peak / self.divisor, self.peak], self.momentum[::-1])

    def plot(self, path=None):
        """Draw the learning rate, and the momentum, of each step of the cycle; return the figure.

        Args:
            path: file to write; its suffix tells the format, and without one it is SVG. None for no file.
        """
        import matplotlib
        from matplotlib.figure import Figure

        curves = {"learning rate": self.learning_rate_at, "momentum": self.momentum_at}
        if self.momentum is None:
            del curves["momentum"]
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cycle", "savefig.format": "svg"}):
            figure = Figure(figsize=(6, 1.2 + 1.8 * len(curves)), layout="constrained")
            panels = figure.subplots(len(curves), sharex=True, squeeze=False)[:, 0]
            for axes, (name, curve) in zip(panels, curves.items(), strict=True):
                steps = np.arange(self.steps or 0)
                axes.plot(steps, curve(steps), color="C0")
                axes.set(ylabel=name)
            panels[-1].set(xlabel="step")
            if path is not None:
                # Without a date the same cycle gives the same file.
                is_svg = Path(path).suffix in ("", ".svg")
                figure.savefig(path, metadata={"Date": None} if is_svg else None)
        return figure

    def set_model(self, model):
        super().set_model(model)
        if self._optimizer is None:
            # Before training begins, because `BackupAndRestore` then brings a rate that is one of the cycle.
            self._rate_before = _rate_of(self._watched())

    def on_train_begin(self, logs=None):
        if self._optimizer is not None:
            self.detach()
            self._rate_before = _rate_of(self._watched())
        if self.model.steps_per_execution > 1:
            raise ValueError("OneCycle sets the rate before each step: compile the model with steps_per_execution=1.")
        optimizer = self._watched()
        if isinstance(optimizer, keras.optimizers.MultiOptimizer):
            raise ValueError(
                "OneCycle sets the rate of one optimizer, and a MultiOptimizer has several: pass one of them, "
                "optimizer=model.optimizer.optimizers[0]."
            )
        if not isinstance(getattr(optimizer, "learning_rate", None), keras.Variable):
            raise ValueError(
                "OneCycle cannot set a learning rate that is a schedule or a function. "
                f"Give {optimizer.__class__.__name__} a float."
            )
        self.steps = self._steps_of_fit()
        if left := vars(optimizer).get("_one_cycle"):
            left.detach()
            self._rate_before = _rate_of(optimizer)
        self._attach(optimizer)

    def on_epoch_begin(self, epoch, logs=None):
        iterations = self._iterations()
        # Not when training begins, because `BackupAndRestore` sets epoch and counter then.
        is_first_epoch = self._origin is None
        if is_first_epoch:
            self._origin = 0 if epoch else iterations
        self._first = iterations - self._origin if self._steps_of_epoch is None else epoch * self._steps_of_epoch
        if is_first_epoch and epoch and self._steps_of_epoch is None and not 0 < self._first < self.steps:
            raise ValueError(
                f"Training begins at epoch {epoch}, of data without a length, with an optimizer that has made "
                f"{iterations} steps: that tells no place in a cycle of {self.steps}. Load the optimizer's state with "
                "the weights, or pass steps_per_epoch to fit."
            )
        self._first_iteration, self._is_first_epoch = iterations, is_first_epoch
        self._step, self._begun, self._made = self._first, 0, 0

    def on_train_batch_begin(self, batch, logs=None):
        self._step, self._begun = self._first + batch, batch + 1
        self._set_rate(float(self.learning_rate_at(self._step)))

    def on_train_batch_end(self, batch, logs=None):
        # The steps may come here in another order than they were made in.
        self._made = max(self._made, batch + 1)

    def on_epoch_end(self, epoch, logs=None):
        iterations = self._iterations() - self._first_iteration
        if self._is_first_epoch and self._made and not iterations:
            warnings.warn(
                f"OneCycle sets the rate of the optimizer {self._optimizer.name!r}, which has not made a step in the "
                "first epoch. If another one trains the model, pass that: optimizer=...",
                stacklevel=2,
            )
        if self._made:
            # A step that was begun when the data had run out was not made.
            self._step = self._first + self._made - 1
            self._last_step = self._step
        if self._made and self._step >= self.steps and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"Training goes on after the {self.steps} steps of OneCycle: the rate stays at "
                f"{self.learning_rate_at(self.steps):g}. Let steps be epochs times batches.",
                stacklevel=2,
            )
        if self._made < self._begun and iterations == self._made + 1:
            # TensorFlow counts such a step all the same.
            self._origin += 1
        if self.log:
            logs["learning_rate"] = float(self.learning_rate_at(self._step))
            if self.momentum is not None:
                logs["momentum"] = float(self.momentum_at(self._step))

    def on_train_end(self, logs=None):
        if self._last_step is not None and self._last_step < self.steps - 1:
            warnings.warn(
                f"Training ended after {self._last_step + 1} of the {self.steps} steps of OneCycle, at the rate "
                f"{self.learning_rate_at(self._last_step):g}: the fall of the rate is not complete.",
                stacklevel=2,
            )
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

    def _steps_of_fit(self):
        """Return the number of steps of the whole training, or what was given if it cannot be known."""
        self._steps_of_epoch, epochs = self.params["steps"], self.params["epochs"]
        if self._steps_of_epoch is None:
            if self._given_steps is None:
                raise ValueError(
                    "OneCycle cannot tell the number of steps, because the data have no length: pass steps=..., or "
                    "steps_per_epoch to fit."
                )
            return self._given_steps
        # A shorter training is the beginning of the shortest cycle.
        steps = max(4, epochs * self._steps_of_epoch)
        if self._given_steps not in (None, steps):
            raise ValueError(
                f"OneCycle has steps={self._given_steps}, but fit makes {epochs} epochs of {self._steps_of_epoch} "
                f"steps, {steps} in all: leave steps out, and the cycle takes those of fit."
            )
        return steps

    def _watched(self):
        outer = self._model.optimizer if self.optimizer is None else self.optimizer
        return getattr(outer, "inner_optimizer", outer)

    def _iterations(self):
        # On JAX, asking for `self.model` brings the variables up to date.
        _ = self.model
        # Private: the public `iterations` leaves out accumulated batches. Tried on Keras 3.15.
        return int(keras.ops.convert_to_numpy(self._optimizer._iterations))

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
        # For the next OneCycle, in case `fit` raises. Not by `setattr`, with which the optimizer would track it.
        vars(optimizer)["_one_cycle"] = self
        self._optimizer = optimizer
        self._origin = self._last_step = None
        self._has_warned = False

    def _set_rate(self, rate):
        # On JAX a new value takes effect only in variables that asking for `self.model` has brought up to date.
        _ = self.model
        self._optimizer.learning_rate = rate
        if self.momentum is not None and keras.backend.backend() == "torch":
            # PyTorch does not compile the attribute into its training step as a constant.
            vars(self._optimizer)[self._name] = float(self.momentum_at(self._step))


def _rate_of(optimizer):
    """Return the learning rate, or None if it is not one that can be set."""
    # Private: a MultiOptimizer raises where its rate is asked for. Tried on Keras 3.15.
    rate = getattr(optimizer, "_learning_rate", None)
    return float(keras.ops.convert_to_numpy(rate)) if isinstance(rate, keras.Variable) else None


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
