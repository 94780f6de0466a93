"""Paired differences judged by one rule: interval, verdict, and the number of seeds that would give one."""

import dataclasses

import numpy as np

# Not scipy.stats, which takes half a second to import.
from scipy import special

LEVEL = 0.05
# With fewer, a t-interval is so wide that the range of the differences says more.
FEWEST_SEEDS = 5
MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What paired differences say.

    Attributes:
        pairs: number of differences.
        difference: their mean, None if there are none.
        half_width: half the width of its t-interval, None for fewer than two.
        range: (lowest, highest) difference, None if there are none.
        verdict: "better", "slightly better", "the same", "slightly worse", "worse" or "undecided"; None for fewer than
            `FEWEST_SEEDS` seeds.
        by_divergence: whether the verdict is that of the numbers of diverged runs.
        seeds_needed: for "undecided", the number of seeds that would decide if these were typical; None if it is above
            `MOST_SEEDS`.
    """

    pairs: int
    difference: float | None = None
    half_width: float | None = None
    range: tuple[float, float] | None = None
    verdict: str | None = None
    by_divergence: bool = False
    seeds_needed: int | None = None


def half_width(values, level=LEVEL):
    """Return half the width of the mean's t-interval with confidence 1 - `level`, or None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(_half_width(np.std(values, ddof=1), len(values), level))


def judge(differences, *, margin=None, differences_in_table=1, lower_is_better=False, diverged=(0, 0), both_diverged=0):
    """Return the `Judgement` of a variant against the baseline.

    The t-interval has 95 % confidence, Bonferroni-adjusted for the number of differences in the table. All of it on one
    side of 0 is better or worse (slightly, if it is within the margin as well); across 0 and within the margin, the
    same; otherwise undecided. Where runs diverged, an exact McNemar test of the seeds in which only one of the two did
    comes first, at the same level.

    Args:
        differences: the variant's figure minus the baseline's for each seed in which both are finite.
        margin: the smallest difference that matters, not negative; None if none was declared, and then nothing but
            differences of exactly 0 is called the same.
        differences_in_table: number of differences that are judged together, at least 1.
        lower_is_better: whether a negative difference is the better one.
        diverged: the numbers of seeds in which only the variant, and in which only the baseline, diverged.
        both_diverged: the number of seeds in which both did.
    """
    differences = np.asarray(differences, "float64")
    level = LEVEL / differences_in_table
    pairs, seeds = len(differences), len(differences) + sum(diverged) + both_diverged
    if pairs:
        mean, width = float(np.mean(differences)), half_width(differences, level)
        judged = Judgement(pairs, mean, width, (float(differences.min()), float(differences.max())))
    else:
        judged = Judgement(pairs)
    if seeds < FEWEST_SEEDS:
        return judged
    only_variant, only_baseline = diverged
    if _mcnemar(only_variant, only_baseline) < level:
        verdict = "worse" if only_variant > only_baseline else "better"
        return dataclasses.replace(judged, verdict=verdict, by_divergence=True)
    margin = margin or 0.0
    if pairs >= FEWEST_SEEDS:
        gain = -mean if lower_is_better else mean
        if _is_decided(mean, width, margin):
            return dataclasses.replace(judged, verdict=_verdict(gain, width, margin))
    needed = [_seeds_for_divergence(only_variant, only_baseline, seeds, level)]
    if pairs >= 2:
        deviation = float(np.std(differences, ddof=1))
        # The share of the seeds that diverge is needed on top.
        needed.append(seeds_needed(mean, deviation, margin, level, above=max(pairs, FEWEST_SEEDS - 1)) * seeds / pairs)
    fewest = np.ceil(min(needed))
    return dataclasses.replace(judged, verdict="undecided", seeds_needed=int(fewest) if fewest <= MOST_SEEDS else None)


def seeds_needed(mean, deviation, margin, level=LEVEL, above=FEWEST_SEEDS - 1):
    """Return the smallest number of seeds, above `above`, at which one experiment in two would be decided.

    The mean and the deviation of the differences are taken for the true ones. It is infinite if `MOST_SEEDS` would not
    be enough.
    """
    counts = np.arange(above + 1, MOST_SEEDS + 1)
    error = deviation / np.sqrt(counts)
    # Half of all experiments have a deviation below this one, which for few seeds lies below the true one.
    median_deviation = deviation * np.sqrt(special.chdtri(counts - 1, 0.5) / (counts - 1))
    width = _half_width(median_deviation, counts, level)
    low, high = np.clip(margin - width, 0, width), width

    def below(bound):
        return special.ndtr((bound - mean) / error)

    undecided = below(high) - below(low) + below(-low) - below(-high)
    decided = undecided <= 0.5
    return float(counts[np.argmax(decided)]) if decided.any() else np.inf


def _half_width(deviation, count, level):
    return special.stdtrit(count - 1, 1 - level / 2) * deviation / np.sqrt(count)


def _is_decided(mean, width, margin):
    return (abs(mean) > width) | (abs(mean) + width <= margin)


def _verdict(gain, width, margin):
    if abs(gain) <= width:
        return "the same"
    word = "better" if gain > 0 else "worse"
    return f"slightly {word}" if abs(gain) + width <= margin else word


def _mcnemar(first, second):
    """Return the two-sided p-value of the exact test that the two numbers differ by chance only."""
    return min(1.0, 2 * float(special.bdtr(min(first, second), first + second, 0.5)))


def _seeds_for_divergence(first, second, seeds, level):
    """Return the smallest number of seeds at which these shares of diverged runs would decide; it may be infinite."""
    if first == second:
        return np.inf
    for count in range(seeds + 1, MOST_SEEDS + 1):
        if _mcnemar(round(first * count / seeds), round(second * count / seeds)) < level:
            return count
    return np.inf
