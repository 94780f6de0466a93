"""The rules of TrainingDoctor: a table from a sign to what is said of it. To add a rule, add a row and its sign."""

import dataclasses
from collections.abc import Callable

from . import after_training, before_training
from .questions import ADVICE, FAULT, LEVELS, SYMPTOM

# Name of a threshold: (its default, why it is there). Those "fixed on runs" were fixed between healthy and sick runs.
THRESHOLDS = {
    "input_mean": (10.0, "largest |mean| of the inputs: ten times the order of 1 that they should have"),
    "input_deviation_low": (0.01, "smallest deviation of the inputs: a hundredth of 1"),
    "input_deviation_high": (10.0, "largest deviation of the inputs: ten times 1; pixels of 0 to 255 have about 90"),
    "target_scale": (10.0, "largest |mean| or deviation of a regression's targets: ten times the order of 1"),
    "target_deviation_low": (0.01, "smallest deviation of a regression's targets: a hundredth of 1"),
    "out_of_reach": (0.01, "share of the targets that the output cannot reach: more than a stray value"),
    "most_frequent": (0.9, "share of the most frequent class: with it, nine of ten are right without looking"),
    "frozen": (0.5, "share of the weights that are not trained: most of them"),
    "untrained": (3.0, "loss before training over the best constant's: how much a wrong scale may cost at the start"),
    "poor": (0.7, "loss over the best constant's: above it, less than a third has been learned"),
    "norm_jump": (20.0, "gradient norm over the median of up to 50 before it and of the first five; fixed on runs"),
    "norm_ratio": (1e-3, "first layer's gradient norm over the last layer's: three orders of magnitude"),
    "steps": (30, "fewest steps after which a loss that has not moved is called stuck"),
    "chance": (0.95, "lowest loss over that of a constant prediction; fixed on runs"),
    "dead": (0.5, "share of dead units in a layer: half of what it could do"),
    "distinct": (16, "fewest different examples of a probe that can tell whether a unit is dead"),
    "saturated": (0.5, "share of saturated values in a layer: half of the gradients are nearly lost"),
    "dropout": (0.75, "rate of a dropout layer: three of four units are silent; 0.5 is the usual most"),
    "mode": (1.5, "loss in one mode over that in the other, of the same examples: beyond the noise of a small batch"),
    "constant_output": (1e-3, "deviation of the outputs over their size, or over the targets' deviation"),
    "rise": (1.1, "loss at the end over that before training, which it should be below"),
    "peak": (5.0, "largest loss of a step over the larger of that before training and the best constant's"),
    "noise": (4.0, "standard errors by which a difference of losses must exceed 0: chance does so once in 30,000"),
    "update_ratio_high": (0.1, "update-to-weight ratio of a step: a hundred times the usual 1e-3 (CS231n)"),
    "update_ratio_low": (1e-4, "update-to-weight ratio of a step: a tenth of the usual 1e-3 (CS231n)"),
    "validation_rise": (1.15, "last validation loss over its minimum; fixed on runs"),
    "validation_lost": (0.1, "that rise over the best constant's loss: a tenth of what there was to learn"),
    "training_fall": (0.05, "share by which the training loss fell since that minimum, beyond its noise"),
    "validation_apart": (1.5, "lowest validation loss over the best constant's, while training is below it"),
    "flat": (0.03, "share by which the loss falls over a third of the epochs: less is flat; fixed on runs"),
    "improving": (0.03, "share by which the loss falls over a third of the epochs: more is still improving"),
    "high": (0.4, "loss over that of a constant prediction: above it, more than a third is still to be learned"),
    "epochs": (9, "fewest epochs in which a loss is called flat: three in each third"),
    "rises": (0.3, "share of the epochs, of the second half, in which the loss rose; fixed on runs"),
    "rise_size": (0.05, "typical rise over the loss before training: smaller ones do not matter"),
    "clipped": (0.5, "share of clipped steps: over one half, the rate is too high or the limit too low"),
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was wrong, in a sentence with its figures, and what to do about it.

    Attributes:
        level: "fault", a thing that is wrong in itself; "symptom", one whose cause is not known; or "advice".
        change: what to change, in a sentence.
        recipes: names of the recipes that treat it; may be empty.
    """

    name: str
    level: str
    message: str
    change: str
    recipes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row of the table.

    Attributes:
        sign: function of the signs and the thresholds, which returns None, a message, or (another level, message).
        silences: names of what follows from this finding, and is not told beside it unless it is advice.
        certain: whether it can be told before the first step.
    """

    name: str
    level: str
    sign: Callable
    change: str
    recipes: tuple[str, ...] = ()
    silences: tuple[str, ...] = ()
    certain: bool = False


def judge(signs, limits):
    """Return the findings: the faults first, then symptoms, then advice, without what follows from another."""
    found, silenced = [], set()
    for rule in RULES:
        said = rule.sign(signs, limits)
        if said is None or rule.name in silenced:
            continue
        level, message = (rule.level, said) if isinstance(said, str) else said
        found.append(Finding(rule.name, level, message, rule.change, rule.recipes))
        if level != ADVICE:
            silenced |= set(rule.silences)
    return sorted(
        (finding for finding in found if finding.name not in silenced), key=lambda finding: LEVELS.index(finding.level)
    )


# What follows from losses that mean nothing, or from nothing being learned.
STANDING_STILL = (
    "stuck at chance",
    "constant output",
    "layer does not change",
    "underfitting",
    "plateau at a constant rate",
    "stopped while improving",
    "loss oscillates",
    "rate too low",
    "vanishing gradients",
)
OF_LOSSES = (
    *STANDING_STILL,
    "no gradient",
    "rate too high",
    "validation unlike training",
    "overfitting",
    "classes imbalanced",
    "labels all the same",
    "targets out of scale",
    "exploding gradients",
)
RATE = "schedules/learning_rate_range_test"

# In the order in which things are told, and silence one another.
RULES = (
    Rule(
        "nothing to train",
        FAULT,
        before_training.nothing_to_train,
        "Set `trainable = True` before `compile`.",
        silences=(*OF_LOSSES, "layers frozen", "inputs out of range", "dead units", "saturated units"),
        certain=True,
    ),
    Rule(
        "values not finite",
        FAULT,
        before_training.values_not_finite,
        "Look for missing values and divisions by 0 in the data; keep roots and logarithms away from 0.",
        silences=(*OF_LOSSES, "inputs out of range", "exploding gradients", "dead units", "saturated units"),
        certain=True,
    ),
    Rule(
        "softmax over one unit",
        FAULT,
        before_training.softmax_over_one_unit,
        "Use a sigmoid and binary cross-entropy, or a unit for each class.",
        silences=(*OF_LOSSES, "output does not fit the loss", "targets do not fit the loss", "dead units"),
        certain=True,
    ),
    Rule(
        "output does not fit the loss",
        FAULT,
        before_training.output_does_not_fit,
        "Classes that exclude one another: softmax and (sparse) categorical cross-entropy. Yes or no, or several at "
        "once: sigmoid and binary cross-entropy. No activation: `from_logits=True`.",
        silences=OF_LOSSES,
        certain=True,
    ),
    Rule(
        "targets do not fit the loss",
        FAULT,
        before_training.targets_do_not_fit,
        "Whole numbers from 0: sparse categorical cross-entropy, with a unit for each class. One-hot: categorical. "
        "0 or 1: binary.",
        silences=OF_LOSSES,
        certain=True,
    ),
    Rule(
        "targets out of the output's range",
        FAULT,
        before_training.targets_out_of_range,
        "Leave the last layer without an activation, or scale the targets into its range.",
        silences=(*STANDING_STILL, "targets out of scale", "saturated units", "no gradient"),
        certain=True,
    ),
    Rule(
        "inputs out of range",
        FAULT,
        before_training.inputs_out_of_range,
        "Divide images by 255; standardise columns.",
        ("numerics/input_scaling",),
        silences=(
            *STANDING_STILL,
            "saturated units",
            "dead units",
            "exploding gradients",
            "validation unlike training",
        ),
    ),
    Rule(
        "targets out of scale",
        FAULT,
        before_training.targets_out_of_scale,
        "Train on (targets - mean) / deviation, and undo it in predictions.",
        silences=(*STANDING_STILL, "exploding gradients"),
    ),
    Rule(
        "labels all the same",
        FAULT,
        before_training.labels_all_the_same,
        "Give a probe with examples of all classes; if there are none, look at how the labels are made.",
        silences=STANDING_STILL,
    ),
    Rule(
        "classes imbalanced",
        FAULT,
        before_training.classes_imbalanced,
        "Give `fit` a `class_weight`, and look at precision and recall.",
        silences=(*STANDING_STILL, "overfitting"),
    ),
    Rule(
        "no activation between layers",
        FAULT,
        before_training.no_activation,
        "Give all but the last layer an activation.",
        silences=STANDING_STILL,
    ),
    Rule(
        "penalty too strong",
        FAULT,
        before_training.penalty_too_strong,
        "Divide the factor of the weight penalty by 10.",
        ("regularization/weight_penalty",),
        silences=STANDING_STILL,
    ),
    Rule(
        "unbounded recurrence",
        FAULT,
        before_training.unbounded_recurrence,
        "Keep tanh in recurrent layers.",
        ("gradients/gradient_clipping",),
        silences=(*STANDING_STILL, "exploding gradients", "rate too high", "dead units"),
    ),
    Rule(
        "dropout too high",
        FAULT,
        after_training.dropout_too_high,
        "Begin with 0.5 in wide dense layers, and with 0.1 to 0.3 elsewhere.",
        ("regularization/dropout",),
        silences=(*STANDING_STILL, "dead units", "saturated units", "rate too high"),
    ),
    Rule(
        "rate too high",
        FAULT,
        after_training.rate_too_high,
        "Divide the rate by 10.",
        (RATE, "schedules/warmup_cosine"),
        silences=(
            *STANDING_STILL,
            "exploding gradients",
            "dead units",
            "saturated units",
            "no gradient",
            "validation unlike training",
        ),
    ),
    Rule(
        "loss not finite",
        FAULT,
        after_training.loss_not_finite,
        "Look at the data of that step; lower the rate, or clip gradients.",
        ("gradients/gradient_clipping", RATE),
        silences=(*STANDING_STILL, "dead units", "saturated units", "clipping most of the time"),
    ),
    Rule(
        "no gradient",
        FAULT,
        after_training.no_gradient,
        "Look for what cuts the way from the loss to the weights: an activation that is flat, units that are all dead.",
        ("gradients/vanishing_gradients", "initialization/weight_initialization"),
        silences=(*STANDING_STILL, "dead units"),
    ),
    Rule(
        "exploding gradients",
        SYMPTOM,
        after_training.exploding_gradients,
        "Clip them.",
        ("gradients/gradient_clipping",),
    ),
    Rule(
        "dead units",
        FAULT,
        after_training.dead_units,
        "Lower the rate if they died in training, else change the initialization.",
        ("initialization/weight_initialization", RATE),
        silences=(
            "vanishing gradients",
            "rate too low",
            "constant output",
            "layer does not change",
            "underfitting",
            "plateau at a constant rate",
        ),
    ),
    Rule(
        "vanishing gradients",
        FAULT,
        after_training.vanishing_gradients,
        "Use relu and a suitable initialization, normalization or residual connections.",
        ("gradients/vanishing_gradients", "architectures/residual_connections"),
        silences=(
            "constant output",
            "layer does not change",
            "rate too low",
            "underfitting",
            "plateau at a constant rate",
        ),
    ),
    Rule(
        "saturated units",
        FAULT,
        after_training.saturated_units,
        "Make the inputs or the initial weights smaller, or normalize.",
        ("initialization/weight_initialization", "normalization/batch_normalization"),
        silences=("rate too low", "underfitting", "plateau at a constant rate"),
    ),
    Rule(
        "rate too low",
        FAULT,
        after_training.rate_too_low,
        "Multiply the rate by 10.",
        (RATE, "schedules/one_cycle"),
        silences=("stuck at chance", "underfitting", "plateau at a constant rate", "stopped while improving"),
    ),
    Rule(
        "batch normalization differs in inference",
        FAULT,
        after_training.batch_normalization_differs,
        "Train longer or with a lower `momentum`, with larger batches, and on data like the probe's.",
        ("normalization/batch_normalization",),
        silences=("validation unlike training", "overfitting"),
    ),
    Rule(
        "stuck at chance",
        SYMPTOM,
        after_training.stuck_at_chance,
        "Look whether targets belong to their inputs; try other initial weights and rates.",
        ("initialization/weight_initialization", RATE),
        silences=("underfitting", "plateau at a constant rate"),
    ),
    Rule("constant output", SYMPTOM, after_training.constant_output, "Look at dead and saturated units.", (RATE,)),
    Rule(
        "layer does not change", SYMPTOM, after_training.layer_does_not_change, "Look whether the loss depends on it."
    ),
    Rule(
        "validation unlike training",
        FAULT,
        after_training.validation_unlike_training,
        "Scale validation data as training data, shuffle before splitting, and look whether labels belong to inputs.",
        silences=("overfitting", "underfitting", "plateau at a constant rate"),
    ),
    Rule(
        "overfitting",
        SYMPTOM,
        after_training.overfitting,
        "Stop earlier, regularise, or take more data.",
        ("regularization/dropout", "regularization/early_stopping", "regularization/weight_penalty"),
    ),
    Rule(
        "loss oscillates", SYMPTOM, after_training.loss_oscillates, "Lower the rate, or take larger batches.", (RATE,)
    ),
    Rule(
        "underfitting",
        ADVICE,
        after_training.underfitting,
        "If the data have more to tell, take a larger network or another optimizer.",
        ("architectures/model_capacity", "optimizers/adaptive_optimizers"),
    ),
    Rule(
        "plateau at a constant rate",
        ADVICE,
        after_training.plateau,
        "Lower the rate when the loss no longer falls.",
        ("schedules/reduce_on_plateau", "schedules/warmup_cosine"),
    ),
    Rule(
        "stopped while improving",
        ADVICE,
        after_training.stopped_while_improving,
        "Train for more epochs.",
        ("schedules/one_cycle",),
    ),
    Rule(
        "clipping most of the time",
        ADVICE,
        after_training.clipping_most_of_the_time,
        "Raise the limit, or lower the rate.",
        ("gradients/gradient_clipping", RATE),
    ),
    Rule("layers frozen", ADVICE, before_training.layers_frozen, "If that is meant, nothing."),
)
