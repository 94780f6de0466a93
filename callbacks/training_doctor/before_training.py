"""Signs that model, loss and probe show: most of them are certain before the first step.

Each function takes the signs of a run and the thresholds, and returns None, or what is to be said, in a sentence with
its figures: a message, or (level, message) where it is another level than the rule's.
"""

import math

from .contract import CLASSES, NUMBERS
from .questions import ADVICE, FAULT, each_output, grew, is_lost, is_poor, remaining, where


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
    if grew(signs) and signs.get("last", 0.0) > limits["peak"] * signs.get("first_batch", math.inf):
        # A loss that grew, and stayed, makes them so.
        return None
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
            return level, "the targets are 0 or 1, and the mean absolute error draws outputs to the more frequent."
        return ADVICE, "the targets are 0 or 1, and the loss is a squared error: cross-entropy learns classes faster."
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
