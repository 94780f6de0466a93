"""TrainingDoctor: says what was wrong with one run, with the figures, and what to change."""

import keras
import numpy as np

from . import contract
from .record import Losses, signs_of_activations, signs_of_gradients, signs_of_losses
from .rules import FAULT, RULES, THRESHOLDS, judge

try:
    from ..activation_statistics import ActivationStatistics
    from ..gradient_norms import GradientNorms
    from ..learning_rate_logger import LearningRateLogger
except ImportError:
    # Copied without its neighbours, this folder judges by the losses and the probe alone.
    ActivationStatistics = GradientNorms = LearningRateLogger = None


class TrainingDoctor(keras.callbacks.Callback):
    """Says what was wrong with one run, with the figures, and what to change: before the first step, and at the end.

    Example:

        >>> doctor = TrainingDoctor(probe=(x[:64], y[:64]))
        >>> fitted = model.fit(x, y, validation_split=0.2, epochs=2, verbose=0, callbacks=[doctor])
        >>> faults = [finding.name for finding in doctor.findings if finding.level == "fault"]

    When training begins, it prints what is certain already: that output, loss and targets do not fit together, values
    that are not finite, a model without trainable weights. When training ends, it prints all findings, faults first; a
    healthy run has none but advice. It uses `GradientNorms`, `ActivationStatistics` and `LearningRateLogger`, so do not
    list these beside it: they are its attributes `gradient_norms`, `activation_statistics` and `learning_rates`, and
    what the first and the last measure is in the `logs`. In the list it comes after callbacks that set the rate, and
    before those that write logs. Copied without their files, it judges by the losses and the probe alone, and says what
    it did not examine.

    A finding has a level. A `fault` is wrong in itself: what follows from it is not told beside it. A `symptom` has a
    cause that is not known. `advice` is no reproach: so is told, of a run that learned, what would be a fault in one
    that did not. "Learned" is meant against the best constant prediction, whose loss is known from the probe's targets;
    without them it is that of equal probabilities, or not known. The rules are the table `RULES`, each sign with a
    threshold in `THRESHOLDS`; a loss is said to have risen or fallen only beyond its noise.

    Weights of classes and of examples are not seen: with them losses are another measure than the probe's.

    Attributes, begun anew by each `fit`:
        findings: list of `Finding`, with `name`, `level`, `message`, `change` and `recipes`; also before the end, and
            after an interruption, of what was seen.
        signs: dict from the name of each figure that findings rest on to its value; what was not measured is missing.

    Cost: that of `GradientNorms` and `LearningRateLogger`, and a pass of the probe before training, after the epochs 1,
    2, 4, 8, … and at the end; so `activation_statistics.history` has an item for each of these, and not for each epoch.

    Args:
        probe: some 32 to 256 examples, with all classes among them, as `(inputs, targets)`, a tuple whose parts have
            the forms that they have in `fit`; or inputs alone, which leaves the targets unexamined. For a model of two
            inputs `(a, b)` are these; with targets write `((a, b), targets)`.
        constant_loss: loss of the best constant prediction, a positive number, if it is known better.
        every: recorded steps of `GradientNorms`.
        verbose: 1 to print the findings, 0 not to.
        **thresholds: other values for those in `THRESHOLDS`, by name.

    Raises:
        ValueError: there is no threshold of a name, or one is not a positive number; or as the three callbacks do. From
            `fit`: it cannot be told which part of the probe is what; or inputs and targets differ in number.

    Source: Karpathy, notes of Stanford's course CS231n, "Neural Networks Part 3"; Zhang et al., "AutoTrainer", and Cao
        et al., "DeepFD", for kinds of faulty programs; the thresholds by measurement, see `evidence/README.md`.
    """

    # Has Keras read each step's loss in a thread of its own, while training goes on, where the backend allows it: this
    # it does in any case. Not documented, and tried on Keras 3.15.
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
        self.learning_rates = LearningRateLogger and LearningRateLogger()
        self._given = probe
        # Refuses at once what is no probe, whichever of its parts are inputs.
        parts = tuple(part for part in probe if part is not None) if isinstance(probe, tuple) else probe
        self.activation_statistics = ActivationStatistics(parts) if ActivationStatistics and probe is not None else None
        self._monitors = []

    def set_params(self, params):
        super().set_params(params)
        for monitor in (self.gradient_norms, self.learning_rates):
            if monitor is not None:
                monitor.set_params(params)

    def set_model(self, model):
        super().set_model(model)
        for monitor in (self.gradient_norms, self.learning_rates):
            if monitor is not None:
                monitor.set_model(model)

    def on_train_begin(self, logs=None):
        model = self.model
        self._losses = Losses()
        self._signs = contract.signs_of_model(model)
        self._start_losses = self._end_losses = self._constant = None
        self._epochs = self._measured_at = 0
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        self._clipping = optimizer.clipnorm, optimizer.global_clipnorm
        self._inputs, self._targets = _split(self._given, model)
        self._began = []
        self._examine_probe()
        self._monitors = [
            monitor
            for monitor in (self.gradient_norms, self.learning_rates)
            if monitor is not None and self._begins(monitor, logs)
        ]
        certain = [rule.name for rule in RULES if rule.certain]
        faults = [each for each in self.findings if each.level == FAULT and each.name in certain]
        if self.verbose and faults:
            print("\n".join(["TrainingDoctor, before the first step:", *map(_line, faults)]))

    def _begins(self, monitor, logs):
        """Begin a monitor, and return whether there is something for it to see."""
        if monitor is self.gradient_norms and not self.model.trainable_variables:
            return False
        try:
            monitor.on_train_begin(logs)
        except ValueError:
            if monitor is self.gradient_norms:
                raise
            # A rate that is a function cannot be seen.
            return False
        self._began.append(monitor)
        return True

    def on_epoch_begin(self, epoch, logs=None):
        self._losses.begin_epoch()
        for monitor in self._monitors:
            monitor.on_epoch_begin(epoch, logs)

    def on_train_batch_begin(self, batch, logs=None):
        for monitor in self._monitors:
            monitor.on_train_batch_begin(batch, logs)

    def on_train_batch_end(self, batch, logs=None):
        self._losses.end_step(batch, logs)
        if self.learning_rates in self._monitors:
            self.learning_rates.on_train_batch_end(batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        if not self._losses.end_epoch(epoch + 1, logs):
            # The data had run out.
            return
        for monitor in self._monitors:
            monitor.on_epoch_end(epoch, logs)
        self._epochs += 1
        if self._epochs & (self._epochs - 1) == 0:
            self._measure()

    def on_train_end(self, logs=None):
        for monitor in self._monitors:
            monitor.on_train_end(logs)
        if self._measured_at != self._epochs:
            self._measure()
        self._signs |= _not_finite("weights", self.model.weights)
        if self._targets is not None and self._measured_at:
            self._compare_modes()
        if self.verbose:
            print(self.report())

    def report(self):
        """Return the findings as text, one line each, and what was not examined."""
        signs = self.signs
        targets = any("targets" in facts for facts in signs.get("outputs", {}).values())
        examined = {
            "inputs, dead and saturated units": self.activation_statistics,
            "targets": targets,
            "gradients and clipping": self.gradient_norms and self.gradient_norms in self._began,
            "the rate": self.learning_rates and self.learning_rates in self._began,
            "chance": "constant" in signs,
            "overfitting": "validation_epochs" in signs,
        }
        findings = self.findings
        found = f"{len(findings)} finding{'s' * (len(findings) > 1)}" if findings else "nothing found"
        missing = ", ".join(name for name, measured in examined.items() if not measured)
        return "\n".join(
            [f"TrainingDoctor: {found}.{f' Not examined: {missing}.' * bool(missing)}", *map(_line, findings)]
        )

    @property
    def findings(self):
        return judge(self.signs, self.thresholds)

    @property
    def signs(self):
        signs = dict(self._signs)
        # Like the losses in the logs, with the penalties of the weights as they are now.
        constant = None if self._constant is None else self._constant + signs.get("penalty", 0.0)
        signs |= signs_of_losses(self._losses, self._start_losses, self._end_losses, constant)
        signs["logged"] = sorted(self._losses.names)
        if self.gradient_norms and self.gradient_norms in self._began:
            signs |= signs_of_gradients(self.gradient_norms, self._clipping)
        if self.activation_statistics and self._inputs is not None:
            signs |= signs_of_activations(self.activation_statistics)
        if self.learning_rates and self.learning_rates in self._began and (rates := self.learning_rates.history):
            signs |= {"rate": rates[-1], "rate_fell": rates[-1] < 0.999 * max(rates)}
            signs["rate_at_end"] = rates[-1] / max(rates) if max(rates) > 0 else 1.0
            if self._losses.lost:
                signs["rate_when_lost"] = rates[min(self._losses.lost[0], len(rates) - 1)]
        return {name: value for name, value in signs.items() if value is not None}

    def _examine_probe(self):
        """Read model, loss and probe before the first step."""
        model = self.model
        self._statistics = self.activation_statistics = None
        outputs = None
        if self._inputs is not None:
            self._signs |= _not_finite("inputs", keras.tree.flatten(self._inputs))
            first = np.asarray(keras.ops.convert_to_numpy(keras.tree.flatten(self._inputs)[0]))
            self._signs["distinct"] = len(np.unique(first.reshape(len(first), -1), axis=0))
            if ActivationStatistics:
                self.activation_statistics = ActivationStatistics(self._inputs)
                self._watched = _Watched(model)
                self.activation_statistics.set_model(self._watched)
                try:
                    self.activation_statistics.on_train_begin()
                except ValueError:
                    if self._watched.outputs is None:
                        raise
                    # The model runs, and has no layers that can be measured.
                    self.activation_statistics = None
                outputs = self._watched.outputs
            else:
                outputs = self._run(training=False)
        self._signs["outputs"] = contract.outputs_of(model, outputs, self._targets)
        self._is_single = len(self._signs["outputs"]) == 1
        if self._is_single:
            (facts,) = self._signs["outputs"].values()
            (self._loss,) = contract.by_output(model.loss, list(self._signs["outputs"]))
            units = facts.get("units")
            self._target = None if self._targets is None else keras.tree.flatten(self._targets)[0]
            if outputs is not None and self._target is not None:
                self._start_losses = self._losses_of(outputs)
                if self._start_losses is not None:
                    self._constant = contract.constant_loss(self._loss, self._target, units)
                    self._signs["constant_is"] = "probe"
            if self._constant is None and units:
                self._constant = contract.loss_of_equal_probabilities(self._loss, units)
                self._signs["constant_is"] = "equal"
            self._signs["penalty_before"] = self._signs["penalty"] = self._penalty()
        if self.constant_loss is not None:
            self._constant = self.constant_loss
            self._signs["constant_is"] = "given"
            self._signs.pop("penalty", None)

    def _measure(self):
        """Run the probe as the model is now."""
        self._measured_at = self._epochs
        if self._inputs is None:
            return
        if self.activation_statistics:
            # Its `logs` are those of an epoch, which all have the same names.
            self.activation_statistics.on_epoch_end(self._epochs, {})
            outputs = self._watched.outputs
        else:
            outputs = self._run(training=False)
        self._signs |= _not_finite("outputs", keras.tree.flatten(outputs))
        if self._is_single:
            self._signs["penalty"] = self._penalty()
            (facts,) = self._signs["outputs"].values()
            self._signs |= contract.signs_of_predictions(outputs, self._target, facts)
            if self._target is not None:
                self._end_losses = self._losses_of(outputs)

    def _compare_modes(self):
        """At the end, run the probe in training mode too, if there are layers that make a difference."""
        signs = self._signs
        if self._start_losses is None or self._end_losses is None:
            return
        if signs.get("batch_normalization") or signs.get("dropout", (None, 0))[1] > self.thresholds["dropout"]:
            losses = self._losses_of(self._run(training=True))
            signs["mode_training"], signs["mode_inference"] = float(losses.mean()), float(self._end_losses.mean())

    def _run(self, training):
        # In this scope no variable changes: neither seeds nor statistics.
        with keras.StatelessScope():
            return self.model(self._inputs, training=training)

    def _losses_of(self, outputs):
        losses = contract.per_example(self._loss, self._target, keras.tree.flatten(outputs)[0])
        return None if losses is None else losses + self._penalty()

    def _penalty(self):
        return float(sum(float(keras.ops.convert_to_numpy(loss)) for loss in self.model.losses))


class _Watched:
    """A model for `ActivationStatistics`, which keeps what it returns: so the probe has to pass only once."""

    def __init__(self, model):
        self.model = model
        self.outputs = None

    def __call__(self, inputs, training):
        self.outputs = self.model(inputs, training=training)
        return self.outputs

    def __getattr__(self, name):
        if name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)


def _line(finding):
    recipes = ", ".join(f"recipes/{recipe}.py" for recipe in finding.recipes)
    return f"- {finding.name} ({finding.level}): {finding.message} {finding.change}{f' See {recipes}.' * bool(recipes)}"


def _split(probe, model):
    """Return the probe's (inputs, targets), either of which may be None."""
    number = len(getattr(model, "inputs", None) or [])
    if not isinstance(probe, tuple):
        return probe, None
    if len(probe) != 2:
        if number == 1:
            raise ValueError(f"probe is inputs, or a tuple of two, (inputs, targets), not of {len(probe)}.")
        return probe, None
    first, second = probe
    if second is None or isinstance(first, (tuple, list, dict)):
        inputs, targets = first, second
    else:
        if number == 2:
            return probe, None
        inputs, targets = first, second
    numbers = [
        sorted({len(part) for part in keras.tree.flatten(parts)}) for parts in (inputs, targets) if parts is not None
    ]
    if targets is not None and numbers[0] != numbers[1]:
        raise ValueError(f"probe is (inputs, targets) of equal numbers of examples, not {numbers[0]} and {numbers[1]}.")
    return inputs, targets


def _not_finite(name, arrays):
    """Return {sign: share of the values that are not finite}, or {} if all are."""
    sizes, bad = 0, 0
    for array in arrays:
        array = np.asarray(keras.ops.convert_to_numpy(array))
        if np.issubdtype(array.dtype, np.floating):
            sizes += array.size
            bad += array.size - int(np.isfinite(array).sum())
    return {f"{name}_not_finite": bad / sizes} if bad else {}
