"""What several signs ask of a run: whether it learned, whether its loss was lost, where it is spoken of."""

import math

FAULT, SYMPTOM, ADVICE = LEVELS = ("fault", "symptom", "advice")


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
    if signs.get("output_deviation", 1.0) <= limits["constant_output"] and not is_all_the_same(signs):
        return True
    left = remaining(signs)
    if left is None:
        start, last = signs.get("untrained", signs.get("first_batch")), signs.get("last")
        return start is None or last is None or start <= 0 or not last <= limits["poor"] * start
    return left > limits["poor"]


def is_all_the_same(signs):
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
