"""Signs that losses, gradients and activations show, during training and after it.

Each function takes the signs of a run and the thresholds, and returns None, or what is to be said, in a sentence with
its figures: a message, or (level, message) where it is another level than the rule's.
"""

import math

from .before_training import values_not_finite
from .contract import CLASSES
from .questions import ADVICE, FAULT, SYMPTOM, at_rate, grew, is_all_the_same, is_lost, is_poor, remaining


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
    # Batches that are hard come again in each epoch; so do large losses, where the first step outweighs the weights.
    hard = signs.get("highest_of_last", 0.0) if signs.get("first_update_ratio", 0.0) <= 1 else 0.0
    usual = max(start or 0.0, signs.get("constant", 0.0), hard)
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
        # Where nearly all has been learned, a rise of a tenth is nothing.
        start = max(abs(signs["untrained"]), 0.1 * signs.get("constant", 0.0))
        rose = signs["probe_rise"] > max(scale * start, limits["noise"] * signs["probe_rise_error"])
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
    if is_all_the_same(signs):
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
    if is_lost(signs) or "fall" not in signs or _is_past_its_best(signs):
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


def _is_past_its_best(signs):
    """Return whether the loss did not end at its lowest."""
    return signs["last"] > signs["best"]


def clipping_most_of_the_time(signs, limits):
    if signs.get("clipped", 0.0) > limits["clipped"]:
        return f"{signs['clipped']:.0%} of the recorded steps were clipped."
    return None
