"""LearningRateRangeTest: a short run with a rising learning rate that suggests a rate, and is undone."""

import contextlib
import math
import numbers
import random
import warnings
from pathlib import Path

import keras
import numpy as np

NOT_BUILT = (
    "The model is not built, so that it has no weights to restore: call `model(x[:1])`, or begin it with "
    "keras.Input(shape)."
)


class LearningRateRangeTest(keras.callbacks.Callback):
    """Raises the learning rate from `low` to `high` in one short `fit`, suggests a rate, and undoes the training.

    Example:

        >>> finder = LearningRateRangeTest(1e-5, 10.0, steps=60)
        >>> fitted = model.fit(x, y, epochs=20, verbose=0, callbacks=[finder])
        >>> figure = finder.plot()
        >>> model.optimizer.learning_rate = finder.suggestion
        >>> fitted = model.fit(x, y, epochs=2, verbose=0)

    Step i of `steps`, counted from 0, is made at the rate low · (high/low)^(i / (steps - 1)). The test stops training
    after `steps` steps; when a loss is not finite; or when the smoothed loss exceeds `threshold` times its minimum so
    far. `epochs` is only an upper limit. Give `fit` the batch size of the training to come, and no validation data.

    The loss that Keras logs is a mean over the epoch so far, which hides the rise and so suggests rates that are too
    high. Here the metrics start again with each batch: each loss, its penalties included, and each logged metric is
    that of one batch. The `logs` of each batch and of each epoch receive `learning_rate`, that of the last step.

    The loss is smoothed by a centred moving average over a tenth of `steps` (an odd number, at least 5). Unlike a
    running average it does not lag behind, which again would make the suggested rate too high. The suggestion is
    halfway, on the logarithmic axis, between the rate of the smoothed loss's steepest descent and that of its minimum.
    The minimum is close to where training becomes unstable: too high. The steepest descent alone, the usual rule,
    depends on the length of the test, because the loss falls once the steps add up to enough: too low in long tests.

    When `fit` ends, everything is as it was when training began, bit by bit, whatever callbacks after this one in the
    list leave: all variables of the model, trained or not, such as batch-norm statistics, states of recurrent layers
    and of seed generators; the variables of the optimizers that it has as attributes, with their learning rates; and
    the generators of random numbers of Python, NumPy, Keras and PyTorch. If `fit` raises, `detach()` or the next `fit`
    with this callback restores. Not restored: data sets and Python generators with a state of their own, such as
    `tf.data.Dataset.shuffle`; operations of `tf.random` in eager mode; other callbacks, and the files they write. On
    JAX, a model that is compiled anew before the next `fit` shuffles the data once more than it would have without the
    test: set the learning rate as in the example, or the seed again.

    Attributes, begun anew by each `fit`:
        learning_rates: list of the rates, one for each step made.
        losses: list of the losses of these steps' batches, before the step is made.
        smoothed_losses: list of the means of `window` successive losses; the i-th belongs to the rate
            `learning_rates[i + window // 2]`.
        window: number of losses in such a mean.

    Measured on 8,000 images of Fashion-MNIST as multiples of the best rate of a grid, by validation loss after three
    epochs: with 100 steps the suggestion was 0.72 to 2.5 times the best rate, and the steepest descent 0.25 to 1.9
    times (six pairs of a network and an optimizer, two or three seeds); with 300 steps, 0.39 to 0.95 times and 0.07 to
    0.21 times (the four pairs on which the rule was chosen, one seed).

    Cost: `steps` training steps, with a little more to do between them; a copy of the model's and the optimizer's
    variables in the host's memory until they are restored.

    Args:
        low: learning rate of the first step, above 0; so low that the loss hardly changes.
        high: learning rate of the last step, above `low` and finite; so high that the loss rises.
        steps: number of steps, an integer of at least 20; about 100 for six powers of ten.
        threshold: multiple of its minimum at which the smoothed loss counts as diverged, above 1. At 4 the loss of a
            classifier that has begun to learn is about back at chance. `math.inf` for no limit.
            Where the minimum is negative, the loss may rise by `threshold - 1` times its absolute value.
        monitor: name of the loss in the logs of a batch, where a `train_step` of your own has none named "loss".
        optimizer: the optimizer whose rate is raised, where a `train_step` of your own uses several, or one of those
            within a `MultiOptimizer`; None for the model's.
        log: whether the logs receive the rate.

    Raises:
        ValueError: an argument is out of its range. From `fit`: the optimizer's learning rate is a schedule or a
            function; `steps_per_execution` is not 1; the model or an optimizer is not built; `epochs` is too small for
            `steps` steps; the logs do not have the loss.

    Source: Smith 2015, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186, with a linear rise;
    the exponential one is that of the library fastai.
    """

    def __init__(self, low=1e-6, high=1.0, steps=100, threshold=4.0, *, monitor="loss", optimizer=None, log=True):
        super().__init__()
        if not isinstance(low, numbers.Real) or not 0 < low < math.inf:
            raise ValueError(f"low must be a finite number above 0, not {low!r}.")
        if not isinstance(high, numbers.Real) or not low < high < math.inf:
            raise ValueError(f"high must be a finite number above low ({low!r}), not {high!r}.")
        if not isinstance(steps, numbers.Integral) or steps < 20:
            raise ValueError(f"steps must be an integer of at least 20, not {steps!r}.")
        if not isinstance(threshold, numbers.Real) or not threshold > 1:
            raise ValueError(f"threshold must be a number above 1, not {threshold!r}.")
        self.low = low
        self.high = high
        self.steps = int(steps)
        self.threshold = threshold
        self.monitor = monitor
        self.optimizer = optimizer
        self.log = log
        self.window = max(5, self.steps // 10 | 1)
        self.learning_rates, self.losses, self.smoothed_losses = [], [], []
        self._saved, self._last_callback = [], None

    def __getstate__(self):
        return vars(self) | dict.fromkeys(("_model", "optimizer", "_last_callback")) | {"_saved": []}

    @property
    def suggestion(self):
        """The suggested learning rate.

        Raises:
            ValueError: the losses tell no rate, and why.
        """
        rates = self._smoothed_rates()
        steepest, minimum = self._landmarks()
        return math.sqrt(rates[steepest] * rates[minimum])

    def plot(self, path=None):
        """Draw loss against learning rate, raw and smoothed, with the suggestion, if there is one; return the figure.

        Args:
            path: file to write; its suffix tells the format, and without one it is SVG. None for no file.
        """
        import matplotlib
        from matplotlib.figure import Figure

        style = {"svg.fonttype": "none", "svg.hashsalt": "learning rate", "savefig.format": "svg"}
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(6, 3.6), layout="constrained")
            axes = figure.subplots()
            rates = self._smoothed_rates()
            axes.plot(self.learning_rates[: len(self.losses)], self.losses, ".", color="0.7", label="one batch")
            axes.plot(rates, self.smoothed_losses, color="C0", label=f"mean of {self.window} batches")
            with contextlib.suppress(ValueError):
                for index, marker, name in zip(self._landmarks(), "ov", ("steepest descent", "minimum"), strict=True):
                    label = f"{name}: {rates[index]:.2g}"
                    axes.plot(rates[index], self.smoothed_losses[index], marker, color="C0", label=label)
                axes.axvline(self.suggestion, color="C3", label=f"suggestion: {self.suggestion:.2g}")
            axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
            self._limit(axes)
            axes.legend()
            if path is not None:
                # Without a date the same losses give the same file.
                is_svg = Path(path).suffix in ("", ".svg")
                figure.savefig(path, metadata={"Date": None} if is_svg else None)
        return figure

    def on_train_begin(self, logs=None):
        self.detach()
        self._check(self.model)
        self.learning_rates, self.losses, self.smoothed_losses = [], [], []
        self._saved = _state(self.model, self._optimizers())
        # Callbacks after this one may put weights into the model when training ends, as `EarlyStopping` does, and Keras
        # appends this one to the list of the callbacks.
        self._first_iteration = self._iterations()
        self._variables = len(self.model.variables)
        history = getattr(self.model, "history", None)
        # One that a `fit` before has left has other parameters.
        if history is not None and history.params is self.params:
            self._last_callback = history
            on_train_end = history.on_train_end

            def end_and_detach(logs=None):
                on_train_end(logs)
                self.detach()

            history.on_train_end = end_and_detach

    def on_train_batch_begin(self, batch, logs=None):
        # On JAX, `self.model` takes the variables out of the running training, which then continues with the new ones.
        model = self.model
        model.reset_metrics()
        if len(self.losses) == 1 and len(model.variables) > self._variables:
            # The first step has made layers.
            self.detach()
            raise ValueError(NOT_BUILT)
        self.learning_rates.append(self.low * (self.high / self.low) ** (len(self.losses) / (self.steps - 1)))
        self._optimizer().learning_rate = self.learning_rates[-1]

    def on_train_batch_end(self, batch, logs=None):
        if self.monitor not in logs:
            self.detach()
            raise ValueError(
                f"The logs have no {self.monitor!r}, but {', '.join(logs) or 'nothing'}: say which of them is the "
                "loss, monitor=..."
            )
        if self.log:
            logs["learning_rate"] = self.learning_rates[-1]
        self.losses.append(float(np.mean(keras.ops.convert_to_numpy(logs[self.monitor]))))
        is_finite = math.isfinite(self.losses[-1])
        if is_finite and len(self.losses) >= self.window:
            self.smoothed_losses.append(float(np.mean(self.losses[-self.window :])))
        if len(self.losses) == self.steps or not is_finite or self._has_diverged():
            self.model.stop_training = True

    def on_epoch_end(self, epoch, logs=None):
        # A step that was begun when the data had run out was not made.
        del self.learning_rates[len(self.losses) :]
        if self._first_iteration is not None and self._iterations() == self._first_iteration:
            warnings.warn(
                f"The range test raises the rate of the optimizer {self._optimizer().name!r}, which has not made a "
                "step in the first epoch. If another one trains the model, pass that: optimizer=...",
                stacklevel=2,
            )
        self._first_iteration = None
        if self.log:
            logs["learning_rate"] = self.learning_rates[-1] if self.learning_rates else math.nan

    def on_train_end(self, logs=None):
        # For callbacks after this one, such as those that evaluate. Once more after all of them.
        self._restore()
        if self._last_callback is None:
            self.detach()

    def detach(self):
        """Restore the model, the optimizer and the random numbers to what they were when the test began."""
        self._restore()
        self._saved = []
        if self._last_callback is not None:
            vars(self._last_callback).pop("on_train_end", None)
        self._last_callback = None

    def _restore(self):
        for restore, value in reversed(self._saved):
            restore(value)

    def _optimizers(self):
        """Return all optimizers, that of the model first."""
        values = [self.model.optimizer, self.optimizer, *vars(self.model).values()]
        values = [each for value in values for each in (value if isinstance(value, (list, tuple)) else [value])]
        found = {id(each): each for each in values if isinstance(each, keras.optimizers.Optimizer)}
        inner = {id(each.inner_optimizer) for each in found.values() if hasattr(each, "inner_optimizer")}
        return [each for key, each in found.items() if key not in inner]

    def _optimizer(self):
        # On JAX, asking for `self.model` brings the variables up to date.
        model = self.model
        outer = model.optimizer if self.optimizer is None else self.optimizer
        return getattr(outer, "inner_optimizer", outer)

    def _iterations(self):
        return int(keras.ops.convert_to_numpy(self._optimizer().iterations))

    def _check(self, model):
        optimizer = self._optimizer()
        if isinstance(optimizer, keras.optimizers.MultiOptimizer):
            raise ValueError(
                "The range test raises the rate of one optimizer, and a MultiOptimizer has several: pass one of them, "
                "optimizer=model.optimizer.optimizers[0]."
            )
        if not isinstance(optimizer.learning_rate, keras.Variable):
            raise ValueError(
                "The range test sets the learning rate, so the optimizer cannot have a schedule or a function for it: "
                "compile the model with a number, such as learning_rate=0.001."
            )
        if model.steps_per_execution != 1:
            raise ValueError(
                f"The range test needs every step by itself: compile with steps_per_execution=1, "
                f"not {model.steps_per_execution}."
            )
        # Private: there is no public way to walk nested layers. Tried on Keras 3.15.
        layers = model._flatten_layers(include_self=False)
        if not model.weights or not (model.built or all(layer.built for layer in layers)):
            raise ValueError(NOT_BUILT)
        for each in self._optimizers():
            if not each.built and each is model.optimizer:
                each.build(model.trainable_variables)
            if not each.built:
                raise ValueError(
                    f"The optimizer {each.name!r} is not built, so that there is nothing to restore it to: call its "
                    "build(variables) with the variables that it trains."
                )
        steps, epochs = self.params["steps"], self.params["epochs"]
        if steps is not None and steps * epochs < self.steps:
            raise ValueError(
                f"fit makes {steps} steps an epoch, so {self.steps} steps need "
                f"epochs={math.ceil(self.steps / steps)}, not {epochs}."
            )

    def _has_diverged(self):
        if not self.smoothed_losses:
            return False
        minimum = min(self.smoothed_losses)
        return self.smoothed_losses[-1] - minimum > (self.threshold - 1) * abs(minimum)

    def _smoothed_rates(self):
        """Return the learning rates that `smoothed_losses` belong to."""
        half = self.window // 2
        return self.learning_rates[half : half + len(self.smoothed_losses)]

    def _landmarks(self):
        """Return the positions, in the smoothed loss, of its steepest descent and of its minimum."""
        half = self.window // 2
        smoothed = np.array(self.smoothed_losses)
        if not smoothed.size:
            raise ValueError(f"There are fewer than {self.window} finite losses: run fit, or lower `low`.")
        minimum = int(smoothed.argmin())
        before = smoothed[: minimum + 1]
        # The rates of successive steps have one ratio, so slopes against the step are slopes against the log rate.
        offsets = np.arange(-half, half + 1)
        losses = np.array(self.losses[: len(smoothed) + 2 * half])
        slopes = np.correlate(losses, offsets / (offsets @ offsets), "valid")[: minimum + 1]
        error = np.std(losses[half : half + len(before)] - before) / math.sqrt(self.window)
        # In fewer than one of twenty tests do independent random losses fall by more than six standard errors.
        if before.max() - before.min() <= 6 * error:
            raise ValueError(
                f"The loss did not fall clearly between the rates {self.low:.2g} and {self.learning_rates[-1]:.2g}: "
                "lower `low`, raise `high`, or use larger batches."
            )
        if minimum == len(smoothed) - 1 and math.isfinite(self.losses[-1]):
            raise ValueError(
                f"The loss was still falling at the last rate, {self.learning_rates[-1]:.2g}: raise `high`."
            )
        return int(slopes.argmin()), minimum

    def _limit(self, axes):
        """Show the losses up to the smoothed minimum, and of the rise after it as much as comes into view."""
        shown = self.losses[: int(np.argmin(self.smoothed_losses)) + self.window] if self.smoothed_losses else []
        if shown:
            margin = 0.1 * (max(shown) - min(shown)) or 1.0
            axes.set_ylim(min(shown) - margin, max(shown) + margin)


def _state(model, optimizers):
    """Return [(function, value)]: called with the value, each function restores a part of the present state."""
    # Private: there is no public access to the generator of unseeded `keras.random` calls. Tried on Keras 3.15.
    global_state = keras.src.backend.common.global_state
    name = "global_seed_generator"
    generator = global_state.get_global_attribute(name)

    def restore_generator(previous):
        if global_state.get_global_attribute(name) is not previous:
            global_state.set_global_attribute(name, previous)
            # The compiled training function draws from the generator that it made: have it made anew.
            model.train_function = None

    variables = [*model.variables, *model.metrics_variables]
    variables += [variable for optimizer in optimizers for variable in optimizer.variables]
    # Some variables are not among a model's, such as the states of recurrent layers. Private as above.
    variables += [variable for layer in model._flatten_layers() for variable in _variables_in(vars(layer))]
    variables = {id(variable): variable for variable in [*variables, *([generator.state] if generator else [])]}
    # Copies, because a backend may train in the memory that convert_to_numpy shows.
    state = [(variable.assign, np.array(keras.ops.convert_to_numpy(variable))) for variable in variables.values()]
    state += [
        (restore_generator, generator),
        (random.setstate, random.getstate()),
        (np.random.set_state, np.random.get_state()),
    ]
    if keras.backend.backend() == "torch":
        import torch

        # Modules of PyTorch itself within the model hold tensors that Keras does not know of.
        tensors = {id(tensor): tensor for layer in model._flatten_layers() for tensor in layer.buffers()}
        state += [(tensor.data.copy_, tensor.detach().clone()) for tensor in tensors.values()]
        state += [
            (torch.set_rng_state, torch.get_rng_state()),
            (torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all()),
        ]
    return state


def _variables_in(value):
    """Return the variables, of Keras or of TensorFlow, in an attribute's lists, tuples and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [variable for each in value for variable in _variables_in(each)]
    is_of_tensorflow = keras.backend.backend() == "tensorflow" and hasattr(value, "assign") and hasattr(value, "numpy")
    return [value] if isinstance(value, keras.Variable) or is_of_tensorflow else []
