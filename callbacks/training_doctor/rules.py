"""The rules of TrainingDoctor: a table of small functions, each from the signs of a run to what is said of it."""

import dataclasses
import math
from collections.abc import Callable

from .contract import CLASSES, NUMBERS

FAULT, SYMPTOM, ADVICE = LEVELS = ("fault", "symptom", "advice")

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


# What several rules ask


def remaining(signs):
    """Return the share of the best constant's loss that is left at the end, or None if that loss is not known."""
    constant = signs.get("constant")
    if not constant or constant <= 0 or is_imbalanced(signs):
        return None
    ends = [signs[name] for name in ("probe", "last") if math.isfinite(signs.get(name, math.nan))]
    return min(ends) / constant if ends else None


def is_imbalanced(signs):
    """Return whether one class is so frequent that weights of classes are likely, which make another loss of it."""
    return any(facts.get("most_frequent", 0) >= 0.9 for facts in signs.get("outputs", {}).values())


def is_poor(signs, limits):
    """Return whether the run learned little: a thing that does not hinder learning is no fault."""
    if signs.get("output_deviation", 1.0) <= limits["constant_output"] and not _is_all_the_same(signs):
        return True
    left = remaining(signs)
    if left is None:
        start, last = signs.get("untrained", signs.get("first_batch")), signs.get("last")
        return start is None or last is None or start <= 0 or not last <= limits["poor"] * start
    return left > limits["poor"]


def _is_all_the_same(signs):
    """Return whether the probe's targets are all the same, so that an output may be."""
    return any(facts.get("target_values") == 1 for facts in signs.get("outputs", {}).values())


def is_lost(signs):
    """Return whether the loss of the run was not finite."""
    return "lost" in signs


def grew(signs):
    """Return whether the loss or the gradients grew before the loss was lost, or a step was larger than the weights."""
    start = abs(signs.get("untrained", signs.get("first_batch", math.nan)))
    height = abs(signs.get("highest", 0.0))
    return height > 10 * max(start, 1e-6) or signs.get("first_update_ratio", 0.0) > 1 or not math.isfinite(start)


def at_rate(signs):
    return f" (the rate is {signs['rate']:.2g})" if "rate" in signs else ""


def each_output(judge_one):
    """Have a rule for one output speak of the first of a model's outputs of which it holds."""

    def judge_all(signs, limits):
        outputs = signs.get("outputs", {})
        for name, facts in outputs.items():
            said = judge_one(facts, signs, limits)
            if said is not None and len(outputs) > 1:
                level, message = said if isinstance(said, tuple) else (None, said)
                said = f"of the output {name!r}: {message}"
                said = (level, said) if level else said
            if said is not None:
                return said
        return None

    return judge_all


def where(facts):
    return f"the last layer, {facts['layer']!r}," if facts.get("layer") else "the last layer"


# Before the first step


def nothing_to_train(signs, limits):
    if signs.get("trainable") == 0:
        return f"none of the model's {signs['weights']:,} weights is trainable."
    return None


def values_not_finite(signs, limits):
    if share := signs.get("inputs_not_finite"):
        return f"{share:.2%} of the probe's inputs are not finite."
    for facts in signs.get("outputs", {}).values():
        if share := facts.get("not_finite"):
            return f"{share:.2%} of the probe's targets are not finite."
    if is_lost(signs):
        if grew(signs):
            return None
        first, last = signs["lost"]
        batch = f"step {first}" if first == last else f"one of the steps {first} to {last}"
        before = (
            f" after losses of at most {signs['highest']:.3g},"
            if math.isfinite(signs.get("highest", -math.inf))
            else ""
        )
        return (
            f"the loss was lost at once, in {batch},{before} and had not grown: the inputs or targets of that batch "
            "hold a value that is not finite, or a function is used where it has no value or derivative."
        )
    if signs.get("norms_not_finite"):
        layer = signs["spoiled_layer"]
        return (
            f"{signs['norms_not_finite']} of the {signs['recorded']} recorded gradients are not finite, although the "
            f"loss is: the first at step {signs['first_norm_not_finite']}, in layer {layer!r}."
        )
    for what in ("weights", "outputs"):
        if share := signs.get(f"{what}_not_finite"):
            return f"{share:.2%} of the {what} are not finite, although the loss is."
    return None


@each_output
def softmax_over_one_unit(facts, signs, limits):
    if facts.get("activation") == "softmax" and facts.get("units") == 1:
        return f"{where(facts)} applies softmax to a single unit: its output is always 1, and its gradient 0."
    return None


@each_output
def output_does_not_fit(facts, signs, limits):
    loss, activation, units = facts["loss"], facts.get("activation"), facts.get("units", 0)
    low, high = facts.get("lowest", 0.0), facts.get("highest", 1.0)
    sums = facts.get("lowest_sum", 1.0), facts.get("highest_sum", 1.0)
    spans = f"its outputs run from {low:.3g} to {high:.3g} on the probe" if "lowest" in facts else ""
    if activation == "softmax" and facts.get("twice"):
        return f"{where(facts)} applies softmax to what is a probability already."
    if activation == "softmax" and facts.get("several_at_once", 0) > 0:
        share = facts["several_at_once"]
        return f"softmax lets one class hold at a time, and {share:.0%} of the probe's examples have several."
    if loss in CLASSES:
        one = loss in ("categorical", "sparse") and units == 1
        if one and activation != "softmax":
            return f"{loss} cross-entropy compares classes, and the output has a single unit: the loss is always 0."
        if facts["from_logits"]:
            if activation in ("softmax", "sigmoid"):
                return (
                    f"the loss has from_logits=True, and {where(facts)} has made probabilities by {activation} already."
                )
            if activation is None and "lowest" in facts and _is_distribution(low, high, sums, units):
                return "the loss has from_logits=True, and the outputs on the probe are probabilities already."
            return None
        if activation == "linear":
            return (
                f"the loss takes probabilities (from_logits=False), and {where(facts)} has no activation{_and(spans)}."
            )
        if activation not in (None, "softmax", "sigmoid", "hard_sigmoid", "sparsemax"):
            return f"the loss takes probabilities, and {where(facts)} ends in {activation}{_and(spans)}."
        if activation is None and (low < -1e-3 or high > 1 + 1e-3):
            return f"the loss takes probabilities (no from_logits){_and(spans)}."
        if loss != "binary" and activation == "sigmoid":
            return (
                f"{loss} cross-entropy takes one probability for each of {units} classes that exclude one another, "
                f"adding up to 1, and {where(facts)} ends in a sigmoid for each."
            )
        exclusive = facts.get("one_of_units", "targets" not in facts)
        if loss == "binary" and activation == "softmax" and units > 2 and exclusive:
            return (
                f"binary cross-entropy asks {units} questions of yes or no, and softmax over {units} units answers "
                "one: the loss, and an accuracy of single answers, look better than the classifier is."
            )
    if facts.get("target_values", 0) == 2 and _are_classes(facts) and loss in ("absolute", "squared"):
        if loss == "absolute":
            level = FAULT if is_poor(signs, limits) and "last" in signs else ADVICE
            return level, "the targets are two classes, and the mean absolute error draws outputs to the more frequent."
        return ADVICE, "the targets are two classes, and the loss is a squared error: cross-entropy learns them faster."
    return None


def _and(spans):
    return f": {spans}" if spans else ""


def _is_distribution(low, high, sums, units):
    return low >= 0 and high <= 1 and units > 1 and abs(sums[0] - 1) < 1e-3 and abs(sums[1] - 1) < 1e-3


def _are_classes(facts):
    return facts["target_lowest"] == 0 and facts["target_highest"] == 1


@each_output
def targets_do_not_fit(facts, signs, limits):
    loss, units = facts["loss"], facts.get("units", 0)
    if "per_example" in facts:
        given, expected = facts["per_example"]
        if loss is not None and given != expected:
            sparse = ", the numbers of the classes" if loss == "sparse" else ""
            return f"each example has {given} target values, and the loss takes {expected}{sparse}."
    if loss in CLASSES and signs.get("best", 0.0) < -1e-3 and len(signs["outputs"]) == 1:
        return f"the loss fell to {signs['best']:.3g}: a cross-entropy is below 0 only for targets outside 0 to 1."
    if "target_lowest" not in facts:
        return None
    low, high = facts["target_lowest"], facts["target_highest"]
    runs = f"the targets of the probe run from {low:.4g} to {high:.4g}"
    if loss == "sparse":
        if facts["target_not_whole"] > 0:
            return f"{facts['target_not_whole']:.0%} of the targets are not whole numbers, and are cut: {runs}."
        if low < 0 or high > units - 1:
            return f"{runs}, and {units} units know the classes 0 to {units - 1}."
    several = facts.get("activation") == "softmax" and facts.get("several_at_once", 0) > 0
    if (
        loss == "categorical"
        and not several
        and (low < 0 or abs(facts.get("row_lowest", 1) - 1) + abs(facts.get("row_highest", 1) - 1) > 1e-2)
    ):
        sums = f"{facts.get('row_lowest', low):.4g} to {facts.get('row_highest', high):.4g}"
        return f"the targets of an example are no distribution over classes: they add up to {sums}."
    if loss == "binary" and (low < 0 or high > 1):
        many = f" and {facts['target_values']} values" if units == 1 and facts["target_values"] > 2 else ""
        return f"binary cross-entropy takes targets from 0 to 1, and {runs}{many}: the loss can fall below 0."
    if loss == "percentage" and facts["target_zeros"] > 0:
        return f"the loss divides by the targets, {facts['target_zeros']:.1%} of which are 0."
    if (loss == "counts" and low < 0) or (loss == "logarithmic" and low <= -1):
        return f"the loss takes no negative targets, and {runs}."
    whole = facts["target_not_whole"] == 0 and low in (0, 1) and high - low + 1 == facts["target_values"]
    if loss in NUMBERS and units == 1 and whole and 3 <= facts["target_values"] <= 20 and facts["target_rarest"] > 1:
        message = (
            f"the targets look like the numbers of {facts['target_values']} classes, and the loss takes them for sizes."
        )
        judged = any("acc" in name for name in signs.get("logged", ()))
        return (FAULT if judged else ADVICE), message
    return None


@each_output
def targets_out_of_range(facts, signs, limits):
    if "target_lowest" not in facts or facts["loss"] in (*CLASSES, "counts"):
        return None
    activation = facts.get("activation")
    ends, share = {
        "sigmoid": ("0 and 1", facts["out_of_sigmoid"]),
        "hard_sigmoid": ("0 and 1", facts["out_of_sigmoid"]),
        "softmax": ("0 and 1", facts["out_of_sigmoid"]),
        "tanh": ("-1 and 1", facts["out_of_tanh"]),
        "relu": ("0 and infinity", facts["below_0"]),
        "softplus": ("0 and infinity", facts["below_0"]),
        "exponential": ("0 and infinity", facts["below_0"]),
    }.get(activation, ("", 0.0))
    if share > limits["out_of_reach"]:
        return (
            f"{activation} returns values between {ends}, and {share:.0%} of the targets lie outside: they run from "
            f"{facts['target_lowest']:.4g} to {facts['target_highest']:.4g}."
        )
    return None


@each_output
def targets_out_of_scale(facts, signs, limits):
    if facts["loss"] not in ("squared", "absolute") or facts.get("target_values", 0) < 3:
        return None
    mean, deviation = facts["target_mean"], facts["target_deviation"]
    largest = max(abs(mean), deviation)
    if largest <= limits["target_scale"] and deviation >= limits["target_deviation_low"]:
        return None
    message = f"the targets have mean {mean:.4g} and deviation {deviation:.3g}, not of order 1."
    return _where_it_hurts(signs, limits), message


def inputs_out_of_range(signs, limits):
    mean, deviation = signs.get("input_mean", 0.0), signs.get("input_deviation", 1.0)
    in_range = limits["input_deviation_low"] <= deviation <= limits["input_deviation_high"]
    if (in_range and abs(mean) <= limits["input_mean"]) or signs.get("normalizes_inputs"):
        return None
    message = (
        f"the first trainable layer receives values of mean {mean:.3g} and deviation {deviation:.3g}, not of order 1."
    )
    return _where_it_hurts(signs, limits), message


def _where_it_hurts(signs, limits):
    """Return the level of a wrong scale: advice, if the loss neither began far above a constant's nor ended poor."""
    if "last" not in signs or is_lost(signs) or is_poor(signs, limits):
        return FAULT
    constant = signs.get("constant")
    start = max(signs.get("untrained", 0.0), signs.get("first_batch", 0.0))
    return FAULT if constant and start > limits["untrained"] * constant else ADVICE


def labels_all_the_same(signs, limits):
    for facts in signs.get("outputs", {}).values():
        if facts.get("classes") == 1 and facts.get("targets", 0) > 1:
            level = FAULT if signs.get("one_prediction") and abs(signs.get("last", math.inf)) < 1e-3 else ADVICE
            return level, f"the {facts['targets']} examples of the probe are all of one class."
    return None


def classes_imbalanced(signs, limits):
    for facts in signs.get("outputs", {}).values():
        share = facts.get("most_frequent", 0.0)
        if limits["most_frequent"] <= share < 1:
            message = f"{share:.1%} of the probe's examples are of one class"
            if signs.get("one_prediction"):
                return FAULT, f"{message}, and after training the model gives this class to all of them."
            return ADVICE, f"{message}: compare with that share what an accuracy says."
    return None


def layers_frozen(signs, limits):
    if signs.get("frozen", 0.0) > limits["frozen"] and signs.get("trainable"):
        count = f"{signs['weights'] - signs['trainable']:,} of {signs['weights']:,}"
        return f"{count} weights are not trained."
    return None


def no_activation(signs, limits):
    if pair := signs.get("linear_pair"):
        message = f"the layers {pair[0]!r} and {pair[1]!r} follow one another without a function between: they are one."
        return (FAULT if "last" in signs and is_poor(signs, limits) else ADVICE), message
    return None


def penalty_too_strong(signs, limits):
    before, after = signs.get("penalty_before", 0.0), signs.get("penalty", 0.0)
    left = remaining(signs)
    if left is None or left <= 0.9 or before <= signs["constant"] - after:
        return None
    return (
        f"the penalties of the weights, {before:.3g} before training and {after:.3g} at the end, outweigh what is "
        f"to be learned: a constant prediction's loss is {signs['constant'] - after:.3g} without them."
    )


def unbounded_recurrence(signs, limits):
    if "recurrent" not in signs:
        return None
    layer, activation = signs["recurrent"]
    message = f"the recurrent layer {layer!r} has the activation {activation}: its state can grow from step to step."
    hurt = is_lost(signs) or signs.get("norm_jump", 0) > limits["norm_jump"] or is_poor(signs, limits)
    return (FAULT if hurt and "first_batch" in signs else ADVICE), message


# During training, and after it


def rate_too_high(signs, limits):
    rate = at_rate(signs)
    if is_lost(signs):
        if not grew(signs) or values_not_finite(signs, limits):
            return None
        if signs.get("first_update_ratio", 0.0) > 1:
            return f"the first step changed the weights by {signs['first_update_ratio']:.3g} times their size{rate}."
        if "highest" in signs and math.isfinite(signs["highest"]):
            start = signs.get("untrained", signs["first_batch"])
            return f"the loss rose from {start:.3g} to {signs['highest']:.3g} before it was lost{rate}."
        return None
    if "last" not in signs:
        return None
    last, start = signs["last"], signs.get("untrained", signs.get("first_batch"))
    update = signs.get("update_ratio", 0.0)
    steps = f", and a step changes the weights by {update:.1e} of their size" if update else ""
    if start is not None and _ended_above(signs, limits):
        return f"the loss was {start:.3g} before training and {signs.get('probe', last):.3g} at the end{steps}{rate}."
    left = remaining(signs)
    # Batches that are hard come again in each epoch.
    usual = max(start or 0.0, signs.get("constant", 0.0), signs.get("highest_of_last", 0.0))
    if left is not None and left > 0.9 and signs.get("highest", 0.0) > limits["peak"] * usual:
        return (
            f"the loss rose from {start:.3g} to {signs['highest']:.3g} at step {signs['highest_step']}, and ended at "
            f"{last:.3g}, no better than a constant prediction{rate}."
        )
    died = signs.get("dead", 0.0) > limits["dead"] > 2 * (signs.get("dead_before") or 0.0)
    large = (
        signs.get("first_update_ratio", 0.0) > limits["update_ratio_high"] / 2 or signs.get("highest", 0.0) > 2 * usual
    )
    if died and large and is_poor(signs, limits):
        return (
            f"{signs['dead']:.0%} of the units of layer {signs['dead_layer']!r} died in training, whose first step "
            f"changed the weights by {signs.get('first_update_ratio', math.nan):.1e} of their size{rate}."
        )
    if update > limits["update_ratio_high"] and is_poor(signs, limits):
        return f"a step changes the weights by {update:.1e} of their size, and the loss is still {last:.3g}{rate}."
    return None


def _ended_above(signs, limits):
    """Return whether the loss ended above where it began, beyond its noise; of the same examples, where known."""
    scale = limits["rise"] - 1
    last, first = signs["last"], signs["first"]
    if "probe_rise" in signs:
        start = signs["untrained"]
        rose = signs["probe_rise"] > max(scale * abs(start), limits["noise"] * signs["probe_rise_error"])
        # What a model forgets of a probe that it is not trained on is overfitting.
        return rose and last > first - max(0.05 * abs(first), limits["noise"] * signs["noise"])
    if signs["epochs"] > 1 and last - first > max(scale * abs(first), limits["noise"] * signs["noise"]):
        return True
    # The first batch is the only one whose loss is that of the untrained model, and may be an easy one: it counts only
    # if in the last epoch no batch comes near it.
    start = signs["first_batch"]
    left = remaining(signs)
    above = last > limits["peak"] * start > 0 and signs.get("lowest_of_last", 0.0) > 2 * start and signs["epochs"] > 1
    return above and (last > 0.95 * first if left is None else left > limits["poor"])


def loss_not_finite(signs, limits):
    if not is_lost(signs):
        return None
    first, last = signs["lost"]
    which = f"step {first}" if first == last else f"one of the steps {first} to {last}"
    sentence = f"the first loss that was not finite is that of {which}"
    if "rate_when_lost" in signs:
        sentence += f", at rate {signs['rate_when_lost']:.2g}"
    if "last_finite_norm" in signs:
        sentence += (
            f"; the last finite gradient norm was {signs['last_finite_norm']:.3g}, at step {signs['last_finite_step']}"
        )
    if signs.get("spoiled_layers", 0) and signs["spoiled_layers"] < signs["layers"]:
        sentence += f", and that of layer {signs['spoiled_layer']!r} was the first not to be finite"
    elif "grown_layer" in signs:
        sentence += f", having grown most in layer {signs['grown_layer']!r}"
    return f"{sentence}."


def no_gradient(signs, limits):
    if signs.get("zero") == 1.0:
        return f"all {signs['recorded']} recorded gradients are 0: nothing is learned."
    if signs.get("zero_since") is not None and signs["zero"] > 1 / 3 and is_poor(signs, limits):
        return f"from step {signs['zero_since']} on all recorded gradients are 0."
    return None


def exploding_gradients(signs, limits):
    if signs.get("norm_jump", 0.0) <= limits["norm_jump"]:
        return None
    left = remaining(signs)
    if left is not None and left < 0.1:
        # Where hardly anything is left to learn, gradients are small, and one hard batch has one that is not.
        return None
    message = (
        f"at step {signs['norm_jump_step']} the gradient norm was {signs['norm_jump']:.3g} times the median of those "
        "before, and of the first ones."
    )
    return (SYMPTOM if is_lost(signs) or is_poor(signs, limits) else ADVICE), message


def vanishing_gradients(signs, limits):
    if signs.get("norm_ratio", 1.0) >= limits["norm_ratio"]:
        return None
    message = f"the first layer's gradient norm is {signs['norm_ratio']:.1e} of the last layer's (median of steps)."
    return (FAULT if is_poor(signs, limits) else ADVICE), message


def stuck_at_chance(signs, limits):
    left = remaining(signs)
    if is_lost(signs) or left is None or left <= limits["chance"] or signs["best"] > 5 * signs["constant"]:
        return None
    if signs["steps"] < limits["steps"]:
        return None
    # One that still falls is slow. Of few epochs the whole is looked at.
    few = signs["epochs"] < limits["epochs"] or "fall" not in signs
    before, fall = (signs["first"], signs["first"] - signs["last"]) if few else (signs["fall_from"], signs["fall"])
    if fall > limits["flat"] * abs(before):
        return None
    what = {
        "probe": "the best constant prediction",
        "equal": "equal probabilities for all classes",
    }.get(signs.get("constant_is"), "a constant prediction")
    end = signs.get("probe", signs["last"])
    return f"the loss ended at {end:.3g}, {end / signs['constant']:.2f} of that of {what}, {signs['constant']:.3g}."


def dead_units(signs, limits):
    # Of a few inputs a unit may well be zero for all.
    if signs.get("distinct", math.inf) < limits["distinct"]:
        return None
    return _units(signs, limits, "dead", "units are zero for all examples")


def saturated_units(signs, limits):
    return _units(signs, limits, "saturated", "values are at an end of their range")


def _units(signs, limits, state, what):
    share, before = signs.get(state, 0.0), signs.get(f"{state}_before")
    if share <= limits[state]:
        return None
    start = f", and {before:.0%} before training" if before is not None else ""
    message = f"on the probe, {share:.0%} of the {what} in layer {signs[f'{state}_layer']!r}{start}."
    return (FAULT if is_poor(signs, limits) else ADVICE), message


def constant_output(signs, limits):
    if signs.get("output_deviation", 1.0) > limits["constant_output"] or is_lost(signs):
        return None
    if _is_all_the_same(signs):
        return None
    return f"after training the output deviates over the probe by {signs['output_deviation']:.1e} of its scale."


def layer_does_not_change(signs, limits):
    still = signs.get("still_layers", [])
    if not still or len(still) == signs["layers"]:
        return None
    names = ", ".join(repr(name) for name in still[:3]) + ", …" * (len(still) > 3)
    epochs, layers = signs["update_epochs"], signs["layers"]
    return f"the first steps of {epochs} epochs did not change {len(still)} of {layers} layers: {names}."


def rate_too_low(signs, limits):
    update = signs.get("update_ratio", math.nan)
    if not update < limits["update_ratio_low"] or "last" not in signs or not is_poor(signs, limits):
        return None
    start, constant = signs.get("untrained", signs.get("first_batch", 0.0)), signs.get("constant")
    # A model that has learned already, and is made finer, moves little.
    level = FAULT if constant is not None and start > 0.9 * constant else ADVICE
    message = (
        f"a step changes the weights by {update:.1e} of their size, and the loss, {start:.3g} before training, is "
        f"still {signs['last']:.3g}{at_rate(signs)}."
    )
    return level, message


def batch_normalization_differs(signs, limits):
    training, inference = signs.get("mode_training"), signs.get("mode_inference")
    if not signs.get("batch_normalization") or training is None:
        return None
    if inference - training > max((limits["mode"] - 1) * abs(training), 0.1 * signs.get("constant", 0.0)):
        return f"after training, the probe's loss is {training:.3g} in training mode and {inference:.3g} in inference."
    return None


def dropout_too_high(signs, limits):
    if signs.get("dropout", (None, 0.0))[1] <= limits["dropout"]:
        return None
    layer, rate = signs["dropout"]
    training, inference = signs.get("mode_training"), signs.get("mode_inference")
    message = f"layer {layer!r} silences {rate:.0%} of the units"
    if training is None:
        return (FAULT if "last" in signs and is_poor(signs, limits) else ADVICE), f"{message}."
    apart = training - inference > (limits["mode"] - 1) * abs(inference)
    level = FAULT if apart or is_poor(signs, limits) else ADVICE
    return level, f"{message}: after training, the probe's loss is {training:.3g} with it and {inference:.3g} without."


def validation_unlike_training(signs, limits):
    epochs = signs.get("validation_epochs", 0)
    if epochs and signs["validation_not_finite"] == epochs and not is_lost(signs):
        return f"the validation loss was not finite in any of {epochs} epochs, and the training loss was."
    constant, start = signs.get("constant"), signs.get("untrained", signs.get("first_batch", 0.0))
    if not constant or "validation_best" not in signs or is_lost(signs) or "training_at_last" not in signs:
        return None
    best, training = signs["validation_best"], signs["training_at_last"]
    # Else what was learned may have been lost before the validation began.
    if signs["first_validation_epoch"] > signs["first_epoch"] or start <= limits["poor"] * constant:
        return None
    if best > limits["validation_apart"] * constant and training < constant:
        return (
            f"the validation loss was {best:.3g} at best, far above a constant prediction's of {constant:.3g}, while "
            f"the training loss ended at {training:.3g}."
        )
    # Of regressions the probe tells the constant's loss less well than the first epoch does, which is hardly above it.
    sizes = any(facts["loss"] not in CLASSES for facts in signs.get("outputs", {}).values())
    floor = max(constant, signs["first"]) if sizes else limits["chance"] * constant
    apart = max(limits["training_fall"] * constant / 2, limits["noise"] * signs["noise"])
    first, last = signs["validation_first"], signs["validation_last"]
    # One that falls, however slowly, has something in common with the training.
    stays = last > best and last > 0.98 * first
    if epochs > 1 and best > floor and stays and training < min(last, constant) - apart:
        return (
            f"the validation loss was {best:.3g} at best, where a constant prediction's is {constant:.3g}, while the "
            f"training loss fell from {signs['first']:.3g} to {training:.3g}: of what was learned hardly anything "
            "holds for it."
        )
    return None


def overfitting(signs, limits):
    if "training_at_best" not in signs or is_lost(signs):
        return None
    best, last = signs["validation_best"], signs["validation_last"]
    at_best, at_last = signs["training_at_best"], signs["training_at_last"]
    scale = abs(signs.get("constant") or signs.get("untrained") or signs.get("first_batch") or best)
    rise, fall = last - best, at_best - at_last
    if rise <= (limits["validation_rise"] - 1) * abs(best) or rise <= 0.02 * scale:
        return None
    if fall <= max(limits["training_fall"] * abs(at_best), signs["noise"]):
        return None
    message = (
        f"the validation loss rose from its minimum of {best:.3g} in epoch {signs['best_validation_epoch']} to "
        f"{last:.3g}, while the training loss fell from {at_best:.3g} to {at_last:.3g}."
    )
    # Beside all that there was to learn, little may have been lost.
    return (SYMPTOM if rise > limits["validation_lost"] * scale else ADVICE), message


def loss_oscillates(signs, limits):
    if is_lost(signs) or signs.get("rises", 0.0) < limits["rises"] or not is_poor(signs, limits):
        return None
    scale = abs(signs.get("untrained", signs.get("first_batch", 0.0)))
    if signs["typical_rise"] <= max(limits["rise_size"] * scale, limits["noise"] * signs["noise"] * math.sqrt(2)):
        return None
    return (
        f"in {signs['rises']:.0%} of the epochs of the second half the loss rose, typically by "
        f"{signs['typical_rise']:.3g}, where the noise of an epoch is {signs['noise']:.2g}."
    )


def underfitting(signs, limits):
    left = remaining(signs)
    if not _is_flat(signs, limits) or left is None or left <= limits["high"]:
        return None
    return (
        f"the training loss is flat, at {signs['last']:.3g}, and {left:.2f} of a constant prediction's: {_fall(signs)}."
    )


def plateau(signs, limits):
    if not _is_flat(signs, limits) or signs.get("rate_fell") is not False:
        return None
    return f"{_fall(signs)}, while the rate stayed at {signs['rate']:.2g}."


def _is_flat(signs, limits):
    if is_lost(signs) or signs["epochs"] < limits["epochs"] or "fall" not in signs:
        return False
    return signs["fall"] < max(limits["flat"] * abs(signs["fall_from"]), 2 * signs["fall_error"])


def _fall(signs):
    fall, start = signs["fall"], signs["fall_from"]
    moved = f"fell by {fall:.2g}" if fall >= 0 else f"rose by {-fall:.2g}"
    return f"over the last third of the epochs it {moved} from {start:.3g}"


def stopped_while_improving(signs, limits):
    if is_lost(signs) or "fall" not in signs or is_past_its_best(signs):
        return None
    # What is left to gain has to matter beside the whole.
    whole = signs.get("constant") or signs.get("untrained") or signs.get("first_batch", 0.0)
    least = max(limits["improving"] * abs(signs["fall_from"]), limits["improving"] * abs(whole) / 2)
    if signs["fall"] <= max(least, limits["noise"] * signs["fall_error"]):
        return None
    if signs.get("rate_at_end", 1.0) < 0.05:
        return None
    if "validation_last" in signs and signs["validation_last"] > signs["validation_best"]:
        return None
    return f"{_fall(signs).replace(' it ', ' the loss ')}, and was at its best when training ended."


def is_past_its_best(signs):
    """Return whether the loss did not end at its lowest."""
    return signs["last"] > signs["best"]


def clipping_most_of_the_time(signs, limits):
    if signs.get("clipped", 0.0) > limits["clipped"]:
        return f"{signs['clipped']:.0%} of the recorded steps were clipped."
    return None


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
        nothing_to_train,
        "Set `trainable = True` before `compile`.",
        silences=(*OF_LOSSES, "layers frozen", "inputs out of range", "dead units", "saturated units"),
        certain=True,
    ),
    Rule(
        "values not finite",
        FAULT,
        values_not_finite,
        "Look for missing values and divisions by 0 in the data; keep roots and logarithms away from 0.",
        silences=(*OF_LOSSES, "inputs out of range", "exploding gradients", "dead units", "saturated units"),
        certain=True,
    ),
    Rule(
        "softmax over one unit",
        FAULT,
        softmax_over_one_unit,
        "Use a sigmoid and binary cross-entropy, or a unit for each class.",
        silences=(*OF_LOSSES, "output does not fit the loss", "targets do not fit the loss", "dead units"),
        certain=True,
    ),
    Rule(
        "output does not fit the loss",
        FAULT,
        output_does_not_fit,
        "Classes that exclude one another: softmax and (sparse) categorical cross-entropy. Yes or no, or several at "
        "once: sigmoid and binary cross-entropy. No activation: `from_logits=True`.",
        silences=OF_LOSSES,
        certain=True,
    ),
    Rule(
        "targets do not fit the loss",
        FAULT,
        targets_do_not_fit,
        "Whole numbers from 0: sparse categorical cross-entropy, with a unit for each class. One-hot: categorical. "
        "0 or 1: binary.",
        silences=OF_LOSSES,
        certain=True,
    ),
    Rule(
        "targets out of the output's range",
        FAULT,
        targets_out_of_range,
        "Leave the last layer without an activation, or scale the targets into its range.",
        silences=(*STANDING_STILL, "targets out of scale", "saturated units", "no gradient"),
        certain=True,
    ),
    Rule(
        "inputs out of range",
        FAULT,
        inputs_out_of_range,
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
        targets_out_of_scale,
        "Train on (targets - mean) / deviation, and undo it in predictions.",
        silences=(*STANDING_STILL, "exploding gradients"),
    ),
    Rule(
        "labels all the same",
        FAULT,
        labels_all_the_same,
        "Give a probe with examples of all classes; if there are none, look at how the labels are made.",
        silences=STANDING_STILL,
    ),
    Rule(
        "classes imbalanced",
        FAULT,
        classes_imbalanced,
        "Give `fit` a `class_weight`, and look at precision and recall.",
        silences=(*STANDING_STILL, "overfitting"),
    ),
    Rule(
        "no activation between layers",
        FAULT,
        no_activation,
        "Give all but the last layer an activation.",
        silences=STANDING_STILL,
    ),
    Rule(
        "penalty too strong",
        FAULT,
        penalty_too_strong,
        "Divide the factor of the weight penalty by 10.",
        ("regularization/weight_penalty",),
        silences=STANDING_STILL,
    ),
    Rule(
        "unbounded recurrence",
        FAULT,
        unbounded_recurrence,
        "Keep tanh in recurrent layers.",
        ("gradients/gradient_clipping",),
        silences=(*STANDING_STILL, "exploding gradients", "rate too high", "dead units"),
    ),
    Rule(
        "dropout too high",
        FAULT,
        dropout_too_high,
        "Begin with 0.5 in wide dense layers, and with 0.1 to 0.3 elsewhere.",
        ("regularization/dropout",),
        silences=(*STANDING_STILL, "dead units", "saturated units", "rate too high"),
    ),
    Rule(
        "rate too high",
        FAULT,
        rate_too_high,
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
        loss_not_finite,
        "Look at the data of that step; lower the rate, or clip gradients.",
        ("gradients/gradient_clipping", RATE),
        silences=(*STANDING_STILL, "dead units", "saturated units", "clipping most of the time"),
    ),
    Rule(
        "no gradient",
        FAULT,
        no_gradient,
        "Look for what cuts the way from the loss to the weights: an activation that is flat, units that are all dead.",
        ("gradients/vanishing_gradients", "initialization/weight_initialization"),
        silences=(*STANDING_STILL, "dead units"),
    ),
    Rule("exploding gradients", SYMPTOM, exploding_gradients, "Clip them.", ("gradients/gradient_clipping",)),
    Rule(
        "dead units",
        FAULT,
        dead_units,
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
        vanishing_gradients,
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
        saturated_units,
        "Make the inputs or the initial weights smaller, or normalize.",
        ("initialization/weight_initialization", "normalization/batch_normalization"),
        silences=("rate too low", "underfitting", "plateau at a constant rate"),
    ),
    Rule(
        "rate too low",
        FAULT,
        rate_too_low,
        "Multiply the rate by 10.",
        (RATE, "schedules/one_cycle"),
        silences=("stuck at chance", "underfitting", "plateau at a constant rate", "stopped while improving"),
    ),
    Rule(
        "batch normalization differs in inference",
        FAULT,
        batch_normalization_differs,
        "Train longer or with a lower `momentum`, with larger batches, and on data like the probe's.",
        ("normalization/batch_normalization",),
        silences=("validation unlike training", "overfitting"),
    ),
    Rule(
        "stuck at chance",
        SYMPTOM,
        stuck_at_chance,
        "Look whether targets belong to their inputs; try other initial weights and rates.",
        ("initialization/weight_initialization", RATE),
        silences=("underfitting", "plateau at a constant rate"),
    ),
    Rule("constant output", SYMPTOM, constant_output, "Look at dead and saturated units.", (RATE,)),
    Rule("layer does not change", SYMPTOM, layer_does_not_change, "Look whether the loss depends on it."),
    Rule(
        "validation unlike training",
        FAULT,
        validation_unlike_training,
        "Scale validation data as training data, shuffle before splitting, and look whether labels belong to inputs.",
        silences=("overfitting", "underfitting", "plateau at a constant rate"),
    ),
    Rule(
        "overfitting",
        SYMPTOM,
        overfitting,
        "Stop earlier, regularise, or take more data.",
        ("regularization/dropout", "regularization/early_stopping", "regularization/weight_penalty"),
    ),
    Rule("loss oscillates", SYMPTOM, loss_oscillates, "Lower the rate, or take larger batches.", (RATE,)),
    Rule(
        "underfitting",
        ADVICE,
        underfitting,
        "If the data have more to tell, take a larger network or another optimizer.",
        ("architectures/model_capacity", "optimizers/adaptive_optimizers"),
    ),
    Rule(
        "plateau at a constant rate",
        ADVICE,
        plateau,
        "Lower the rate when the loss no longer falls.",
        ("schedules/reduce_on_plateau", "schedules/warmup_cosine"),
    ),
    Rule(
        "stopped while improving", ADVICE, stopped_while_improving, "Train for more epochs.", ("schedules/one_cycle",)
    ),
    Rule(
        "clipping most of the time",
        ADVICE,
        clipping_most_of_the_time,
        "Raise the limit, or lower the rate.",
        ("gradients/gradient_clipping", RATE),
    ),
    Rule("layers frozen", ADVICE, layers_frozen, "If that is meant, nothing."),
)
