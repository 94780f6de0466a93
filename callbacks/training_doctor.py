"""TrainingDoctor: watches one run and says what was wrong with it, with the figures, and which recipe to try."""

import dataclasses
import math
import statistics

import keras
import numpy as np

try:
    from .activation_statistics import ActivationStatistics
    from .gradient_norms import GradientNorms
    from .learning_rate_logger import LearningRateLogger
except ImportError:
    # Copied without its neighbours, this file judges by the losses alone.
    ActivationStatistics = GradientNorms = LearningRateLogger = None

# Name of a threshold: (its default, why it is there). Those "fixed on runs" were fixed on seeds 0 to 19 of
# `python -m evidence.training_doctor`, between the healthy runs and the sick ones.
THRESHOLDS = {
    "input_mean": (10.0, "largest |mean| of the inputs: ten times the order of 1 that they should have"),
    "input_deviation_low": (0.01, "smallest deviation of the inputs: a hundredth of 1"),
    "input_deviation_high": (10.0, "largest deviation of the inputs: ten times 1; pixels of 0 to 255 have about 90"),
    "norm_jump": (20.0, "gradient norm over the median of up to 50 recorded before it, at least 5; fixed on runs"),
    "norm_ratio": (1e-3, "first layer's gradient norm over the last layer's: three orders of magnitude"),
    "chance": (0.95, "lowest loss over that of a constant prediction; fixed on runs"),
    "dead": (0.5, "share of dead units in a layer: half of what it could do"),
    "saturated": (0.5, "share of saturated values in a layer: half of the gradients are nearly lost"),
    "first_epoch": (1.1, "mean loss of the first epoch over that before training, which it should be below"),
    "update_ratio_high": (0.1, "update-to-weight ratio of a step: a hundred times the usual 1e-3 (CS231n)"),
    "update_ratio_low": (1e-4, "update-to-weight ratio of a step: a tenth of the usual 1e-3 (CS231n)"),
    "slow": (0.7, "last epoch's loss over that before training, which a slow run stays above; fixed on runs"),
    "validation_rise": (1.15, "last validation loss over its minimum; fixed on runs"),
    "training_fall": (0.05, "share by which the training loss fell since that minimum, beyond its noise"),
    "flat": (
        0.015,
        "share by which the loss falls per epoch, last third of the epochs to the third before; fixed on runs",
    ),
    "high": (0.4, "loss over that of a constant prediction: above it, more than a third is still to be learned"),
    "epochs": (9, "fewest epochs in which a loss is called flat: three in each third"),
    "clipped": (0.5, "share of clipped steps: over one half, the rate is too high or the limit too low"),
}

# What is looked for, in the order in which it is told, with the recipes that treat it.
RECIPES = {
    "inputs out of range": ("numerics/input_scaling",),
    "loss not finite": ("gradients/gradient_clipping", "schedules/learning_rate_range_test"),
    "exploding gradients": ("gradients/gradient_clipping",),
    "vanishing gradients": ("gradients/vanishing_gradients", "architectures/residual_connections"),
    "stuck at chance": ("initialization/weight_initialization", "schedules/learning_rate_range_test"),
    "dead units": ("initialization/weight_initialization", "schedules/learning_rate_range_test"),
    "saturated units": ("initialization/weight_initialization", "normalization/batch_normalization"),
    "rate too high": ("schedules/learning_rate_range_test", "schedules/warmup_cosine"),
    "rate too low": ("schedules/learning_rate_range_test", "schedules/one_cycle"),
    "overfitting": ("regularization/dropout", "regularization/early_stopping", "regularization/weight_penalty"),
    "underfitting": ("architectures/model_capacity", "optimizers/adaptive_optimizers"),
    "plateau at a constant rate": ("schedules/reduce_on_plateau", "schedules/warmup_cosine"),
    "clipping most of the time": ("gradients/gradient_clipping", "schedules/learning_rate_range_test"),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was wrong: its name, a sentence with the figures, and the recipes to try."""

    name: str
    message: str
    recipes: tuple[str, ...]


class TrainingDoctor(keras.callbacks.Callback):
    """Watches one run and says what was wrong with it, with the figures, and which recipe to try.

    Example:

        >>> doctor = TrainingDoctor(x[:64])
        >>> fitted = model.fit(x, y, validation_split=0.2, epochs=2, verbose=0, callbacks=[doctor])
        >>> names = [finding.name for finding in doctor.findings]

    When training ends, it prints its findings; a healthy run has none. It uses `GradientNorms`, `ActivationStatistics`
    and `LearningRateLogger`, so do not list these beside it: their figures are in the `logs`, and they are its
    attributes `gradient_norms`, `activation_statistics` and `learning_rates`. In the list it comes after callbacks that
    set the rate, and before those that write logs. Copied without their files, it judges by the losses alone, and says
    what it did not examine.

    What it finds, each sign with a threshold in `THRESHOLDS`:
        inputs out of range: mean or deviation of what the first trainable layer receives, on the probe.
        loss not finite: the step, its rate, the last finite gradient norm before it, and the layer whose gradient was
            the first not to be finite or, failing that, had grown most, at the steps that `GradientNorms` records.
        exploding gradients: a gradient norm far above the median of those before it.
        vanishing gradients: the first layer's gradient norm far below the last layer's.
        stuck at chance: the loss stays at that of equal probabilities for all classes, or at `constant_loss`.
        dead units, saturated units: their share in a hidden layer, on the probe, at the end.
        rate too high: the mean loss of the first epoch is above that of the untrained model, or the updates are large
            beside the weights.
        rate too low: the updates are small beside the weights, and the loss fell little.
        overfitting: the validation loss is past its minimum while the training loss went on falling.
        underfitting: the training loss is flat, and high.
        plateau at a constant rate: no progress for several epochs, while the rate never fell.
        clipping most of the time: over half of the recorded steps are above the optimizer's `clipnorm` (for which the
            norms of layers count) or `global_clipnorm`; `clipvalue` is not examined.

    Underfitting and plateau are not told of a run with vanishing gradients, at chance or at too low a rate, as they
    follow from these, nor underfitting beside overfitting; and of a run whose loss was not finite only the inputs,
    that, and exploding gradients.

    Attributes, begun anew by each `fit`:
        findings: list of `Finding`, with `name`, `message` and `recipes`; also after an interruption, of what was seen.
        signs: dict from the name of each figure that findings rest on to its value; what was not measured is missing.

    Cost: that of the three callbacks, and of reading the loss at each step.

    Args:
        probe: inputs as for `ActivationStatistics`, some 32 to 256 examples. Without it inputs, dead and saturated
            units are not examined.
        constant_loss: loss of the best constant prediction. By default log(classes) for categorical and log(2) for
            binary cross-entropy; for other losses, and models with penalties, chance is not examined.
        every: recorded steps of `GradientNorms`.
        verbose: 1 to print the findings, 0 not to.
        **thresholds: other values for those in `THRESHOLDS`, by name.

    Raises:
        ValueError: there is no threshold of a name, or one is not a positive number; or as the three callbacks do.

    Source: Karpathy, notes of Stanford's course CS231n, "Neural Networks Part 3"; the thresholds by measurement, see
        `evidence/README.md`.
    """

    # Has Keras read each step's loss in a thread of its own, while training goes on, where the backend allows it. Not
    # documented, and tried on Keras 3.15.
    async_safe = True

    def __init__(self, probe=None, *, constant_loss=None, every=10, verbose=1, **thresholds):
        super().__init__()
        for name, value in thresholds.items():
            if name not in THRESHOLDS:
                raise ValueError(f"There is no threshold {name!r}: choose from {', '.join(THRESHOLDS)}.")
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name} must be a positive number, not {value!r}.")
        if constant_loss is not None and not constant_loss > 0:
            raise ValueError(f"constant_loss must be a positive number or None, not {constant_loss!r}.")
        self.thresholds = {name: default for name, (default, _) in THRESHOLDS.items()} | thresholds
        self.constant_loss = constant_loss
        self.verbose = verbose
        self.gradient_norms = GradientNorms and GradientNorms(every)
        self.activation_statistics = ActivationStatistics(probe) if ActivationStatistics and probe is not None else None
        self.learning_rates = LearningRateLogger and LearningRateLogger()
        self._monitors = [
            monitor
            for monitor in (self.gradient_norms, self.activation_statistics, self.learning_rates)
            if monitor is not None
        ]

    def set_params(self, params):
        super().set_params(params)
        for monitor in self._monitors:
            monitor.set_params(params)

    def set_model(self, model):
        super().set_model(model)
        for monitor in self._monitors:
            monitor.set_model(model)

    def on_train_begin(self, logs=None):
        self._losses, self._validation_losses = [], []
        self._untrained_loss = None
        self._not_finite = None
        self._steps = 0
        self._constant_loss = self.constant_loss or _loss_of_equal_probabilities(self.model)
        optimizer = getattr(self.model.optimizer, "inner_optimizer", self.model.optimizer)
        self._clipping = optimizer.clipnorm, optimizer.global_clipnorm
        for monitor in self._monitors:
            monitor.on_train_begin(logs)

    def on_epoch_begin(self, epoch, logs=None):
        self._means = {}
        for monitor in self._monitors:
            monitor.on_epoch_begin(epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        for monitor in self._monitors:
            monitor.on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        # Keras gives the mean over the epoch so far. The steps may come here in another order than they were made in.
        self._means[batch] = logs["loss"]

    def on_epoch_end(self, epoch, logs=None):
        for monitor in self._monitors:
            monitor.on_epoch_end(epoch, logs)
        batches = sorted(self._means)
        if self._untrained_loss is None:
            self._untrained_loss = self._means[batches[0]]
        lost = [batch for batch in batches if not math.isfinite(self._means[batch])]
        if self._not_finite is None and lost:
            self._not_finite = self._steps + lost[0]
        self._steps += batches[-1] + 1
        self._losses.append(logs["loss"])
        if "val_loss" in logs:
            self._validation_losses.append(logs["val_loss"])

    def on_train_end(self, logs=None):
        for monitor in self._monitors:
            monitor.on_train_end(logs)
        if self.verbose:
            print(self.report())

    def report(self):
        """Return the findings as text, one line each, and what was not examined."""
        examined = {
            "inputs, dead and saturated units": self.activation_statistics,
            "gradients and clipping": self.gradient_norms,
            "the rate": self.learning_rates,
            "chance": self._constant_loss,
            "overfitting": self._validation_losses,
        }
        lines = [f"- {finding.name}: {finding.message} Try {_paths(finding.recipes)}." for finding in self.findings]
        found = f"{len(lines)} finding{'s' * (len(lines) > 1)}" if lines else "nothing found"
        missing = ", ".join(name for name, measured in examined.items() if not measured)
        return "\n".join([f"TrainingDoctor: {found}.{f' Not examined: {missing}.' * bool(missing)}", *lines])

    @property
    def findings(self):
        signs, limits = self.signs, self.thresholds
        messages = {}

        def above(sign):
            return signs.get(sign, -math.inf) > limits[sign]

        mean, deviation = signs.get("input_mean", 0.0), signs.get("input_deviation", 1.0)
        in_range = limits["input_deviation_low"] <= deviation <= limits["input_deviation_high"]
        if not (in_range and abs(mean) <= limits["input_mean"]):
            messages["inputs out of range"] = (
                f"the first trainable layer receives values of mean {mean:.3g} and deviation {deviation:.3g}, "
                "not of order 1."
            )
        if above("norm_jump"):
            messages["exploding gradients"] = (
                f"the gradient norm rose to {signs['norm_jump']:.3g} times the median of the steps before."
            )
        if self._not_finite is not None:
            messages["loss not finite"] = self._where_the_loss_was_lost()
            return self._in_order(messages)
        if signs.get("norm_ratio", 1.0) < limits["norm_ratio"]:
            messages["vanishing gradients"] = (
                f"the first layer's gradient norm is {signs['norm_ratio']:.1e} of the last layer's (median of steps)."
            )
        if above("chance") and signs["last_chance"] < 1.2:
            messages["stuck at chance"] = (
                f"the loss never fell below {signs['chance']:.2f} of that of a constant prediction, "
                f"{self._constant_loss:.3g}."
            )
        for state in ("dead", "saturated"):
            if above(state):
                what = "units are zero for all examples" if state == "dead" else "values are at an end of their range"
                messages[f"{state} units"] = (
                    f"on the probe, {signs[state]:.0%} of the {what} in layer {signs[f'{state}_layer']!r}."
                )
        rate = f" (the rate is {signs['rate']:.2g})" if "rate" in signs else ""
        update = signs.get("update_ratio", math.nan)
        if above("first_epoch") or update > limits["update_ratio_high"]:
            messages["rate too high"] = (
                f"in the first epoch the mean loss was {signs.get('first_epoch', math.nan):.3g} times that before "
                f"training, and a step changes the weights by {update:.1e} of their size{rate}."
            )
        no_gradient = {"vanishing gradients", "dead units"} & set(messages)
        if update < limits["update_ratio_low"] and above("slow") and not no_gradient:
            messages["rate too low"] = (
                f"a step changes the weights by {update:.1e} of their size, and the loss is still "
                f"{signs['slow']:.2f} of that before training{rate}."
            )
        if above("validation_rise") and above("training_fall"):
            messages["overfitting"] = (
                f"the validation loss ended at {signs['validation_rise']:.2f} times its minimum of epoch "
                f"{signs['best_validation_epoch']}, while the training loss fell by another "
                f"{signs['training_fall']:.0%}."
            )
        is_flat = signs.get("flat", math.inf) < limits["flat"] and signs["epochs"] >= limits["epochs"]
        if is_flat and not {"vanishing gradients", "stuck at chance", "rate too low"} & set(messages):
            if above("high") and "overfitting" not in messages:
                messages["underfitting"] = (
                    f"the training loss is flat, at {signs['high']:.2f} of that of a constant prediction: it fell by "
                    f"{max(signs['flat'], 0):.2%} per epoch of late."
                )
            if signs.get("rate_fell") is False:
                messages["plateau at a constant rate"] = (
                    f"the training loss fell by {max(signs['flat'], 0):.2%} per epoch of late, while the rate stayed "
                    f"at {signs['rate']:.2g}."
                )
        if above("clipped"):
            messages["clipping most of the time"] = f"{signs['clipped']:.0%} of the recorded steps were clipped."
        return self._in_order(messages)

    def _in_order(self, messages):
        return [Finding(name, messages[name], recipes) for name, recipes in RECIPES.items() if name in messages]

    def _where_the_loss_was_lost(self):
        """Return a sentence with the step, its rate, the last finite gradient norm, and the layer where it began."""
        step = self._not_finite
        sentence = f"the first loss that was not finite is that of step {step}"
        if self.learning_rates and self.learning_rates.history:
            rates = self.learning_rates.history
            sentence += f", at rate {rates[min(step, len(rates) - 1)]:.2g}"
        norms = self.gradient_norms
        if norms and norms.steps:
            by_layer = np.array([norms.history[name] for name in norms.layers])
            finite = np.isfinite(by_layer)
            good = finite.all(axis=0)
            if good.any():
                last = np.flatnonzero(good)[-1]
                everywhere = norms.history["all"][last]
                sentence += f"; the last finite gradient norm was {everywhere:.3g}, at step {norms.steps[last]}"
            partly = np.flatnonzero(finite.any(axis=0) & ~good)
            if len(partly):
                # Gradients come from the loss, so among the spoiled layers the last one was the first.
                layer = norms.layers[np.flatnonzero(~finite[:, partly[0]])[-1]]
                sentence += f", and that of layer {layer!r} was the first not to be finite"
            elif good.sum() > 1:
                growth = by_layer[:, good][:, -1] / np.maximum(np.median(by_layer[:, good], axis=1), 1e-30)
                sentence += f", having grown most in layer {norms.layers[int(growth.argmax())]!r}"
        return f"{sentence}."

    @property
    def signs(self):
        signs = {}
        if self._not_finite is not None:
            signs["step_of_loss_not_finite"] = self._not_finite
        if self._losses:
            signs |= self._signs_of_losses()
        if self.gradient_norms:
            signs |= self._signs_of_gradients()
        if self.activation_statistics:
            signs |= self._signs_of_activations()
        return {name: value for name, value in signs.items() if value is not None}

    def _signs_of_losses(self):
        losses, validation = self._losses, self._validation_losses
        untrained = self._untrained_loss
        constant = self._constant_loss
        third = len(losses) // 3
        signs = {
            "epochs": len(losses),
            "first_epoch": losses[0] / untrained,
            "slow": losses[-1] / untrained,
            "high": losses[-1] / (constant or untrained),
            "chance": min(losses) / constant if constant else None,
            "last_chance": losses[-1] / constant if constant else None,
        }
        if third:
            fall = 1 - statistics.fmean(losses[-third:]) / statistics.fmean(losses[-2 * third : -third])
            signs["flat"] = fall / third
        if validation:
            best = int(np.argmin(validation))
            signs["validation_rise"] = validation[-1] / validation[best]
            signs["best_validation_epoch"] = best + 1
            signs["training_fall"] = 1 - losses[-1] / losses[best]
        if self.learning_rates and (rates := self.learning_rates.history):
            signs["rate"] = rates[-1]
            signs["rate_fell"] = rates[-1] < 0.999 * max(rates)
        return signs

    def _signs_of_gradients(self):
        norms = self.gradient_norms
        everywhere, first, last = (np.array(norms.history[name]) for name in ("all", norms.layers[0], norms.layers[-1]))
        signs = {}
        # The first five have no norms before them that a median could be taken of: each is among its own five.
        finite = everywhere[np.isfinite(everywhere)]
        medians = [np.median(finite[max(0, place - 50) : max(5, place)]) for place in range(len(finite))]
        jumps = finite / np.maximum(medians, 1e-30)
        if len(jumps):
            signs["norm_jump"] = float(np.max(jumps))
        with np.errstate(all="ignore"):
            ratios = first / last
        if np.isfinite(ratios).any():
            signs["norm_ratio"] = float(np.median(ratios[np.isfinite(ratios)]))
        updates = [ratio for ratio in norms.update_to_weight_ratios["all"] if math.isfinite(ratio)]
        if updates:
            signs["update_ratio"] = statistics.median(updates)
        clipnorm, global_clipnorm = self._clipping
        if clipnorm is not None:
            largest = np.max([norms.history[name] for name in norms.layers], axis=0)
            signs["clipped"] = float(np.mean(largest > clipnorm)) if len(largest) else None
        elif global_clipnorm is not None and len(everywhere):
            signs["clipped"] = float(np.mean(everywhere > global_clipnorm))
        return signs

    def _signs_of_activations(self):
        measured = self.activation_statistics
        signs = {}
        if measured.first_input:
            signs |= {"input_mean": measured.first_input["mean"], "input_deviation": measured.first_input["std"]}
        # The output layer may well be saturated.
        for name in ("dead", "saturated"):
            shares = {
                layer: entries[-1][name]
                for layer, entries in list(measured.history.items())[:-1]
                if entries[-1][name] is not None
            }
            if shares:
                layer = max(shares, key=shares.get)
                signs |= {name: shares[layer], f"{name}_layer": layer}
        return signs


def _paths(recipes):
    return ", ".join(f"recipes/{recipe}.py" for recipe in recipes)


def _loss_of_equal_probabilities(model):
    """Return the loss of equal probabilities for all classes, or None if the model has no plain cross-entropy."""
    losses = keras.losses
    loss = losses.get(model.loss) if isinstance(model.loss, str) else model.loss
    if model.losses:
        return None
    if isinstance(loss, losses.BinaryCrossentropy) or loss is losses.binary_crossentropy:
        return math.log(2)
    categorical = (losses.CategoricalCrossentropy, losses.SparseCategoricalCrossentropy)
    functions = (losses.categorical_crossentropy, losses.sparse_categorical_crossentropy)
    if isinstance(loss, categorical) or loss in functions:
        return math.log(model.output_shape[-1])
    return None
