import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.weightstats import ttost_paired

from callbacks.comparison.statistics import half_width, judge, seeds_needed


def draws(seed, count, mean=0.0, deviation=0.01):
    return np.random.default_rng(seed).normal(mean, deviation, count)


def test_half_width_is_that_of_scipy():
    values = draws(0, 7)
    interval = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert half_width(values) == pytest.approx((interval.high - interval.low) / 2)
    assert half_width(values[:1]) is half_width([]) is None


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_verdicts_are_those_of_the_paired_t_test_and_of_the_two_one_sided_tests(lower_is_better):
    margin, differences_in_table, found = 0.01, 3, set()
    level = 0.05 / differences_in_table
    for number, shift in enumerate(np.repeat(np.linspace(-0.03, 0.03, 41), 4)):
        deviation = (0.001, 0.004, 0.01, 0.02)[number % 4]
        first, second = draws(number, 10), draws(number, 10) + draws(1000 + number, 10, shift, deviation)
        judged = judge(
            second - first,
            margin=margin,
            differences_in_table=differences_in_table,
            lower_is_better=lower_is_better,
        )
        test = stats.ttest_rel(second, first)
        interval = test.confidence_interval(1 - level)
        assert judged.difference == pytest.approx((interval.low + interval.high) / 2)
        assert judged.half_width == pytest.approx((interval.high - interval.low) / 2)
        # Both one-sided tests at half the level are what an interval of this level shows.
        is_within = ttost_paired(second, first, -margin, margin)[0] < level / 2
        if test.pvalue < level:
            word = "better" if (test.statistic > 0) != lower_is_better else "worse"
            expected = f"slightly {word}" if is_within else word
        else:
            expected = "the same" if is_within else "undecided"
        assert judged.verdict == expected
        found.add(expected)
    assert len(found) == 6


def test_comparisons_of_equals_err_in_at_most_a_twentieth():
    errors = 0
    generator = np.random.default_rng(0)
    for _ in range(2000):
        baseline, *variants = generator.normal(0.8, 0.01, (4, 10))
        verdicts = {judge(variant - baseline, margin=0.01, differences_in_table=3).verdict for variant in variants}
        errors += bool(verdicts - {"the same", "undecided"})
    assert errors <= 100


@pytest.mark.parametrize("mean, deviation", [(0.0, 0.02), (0.004, 0.01), (0.013, 0.03), (0.02, 0.04), (0.008, 0.02)])
def test_seeds_needed_is_where_half_of_the_experiments_are_decided(mean, deviation):
    needed = seeds_needed(mean, deviation, margin=0.01)
    experiments = np.random.default_rng(0).normal(mean, deviation, (400, 4 * int(needed)))

    def share_decided(count):
        verdicts = [judge(differences[:count], margin=0.01).verdict for differences in experiments]
        return 1 - verdicts.count("undecided") / len(verdicts)

    assert share_decided(int(needed * 2 / 3)) < 0.5 < share_decided(int(np.ceil(needed * 4 / 3)))


def test_seeds_needed_of_a_judgement_are_those_of_its_mean_and_deviation():
    differences = draws(5, 10, mean=0.004)
    judged = judge(differences, margin=0.01, differences_in_table=2)
    assert judged.verdict == "undecided"
    assert judged.seeds_needed == seeds_needed(differences.mean(), differences.std(ddof=1), 0.01, 0.05 / 2, above=10)
    assert judged.seeds_needed > 10


def test_more_than_a_thousand_seeds_are_no_number():
    differences = draws(0, 10, deviation=10)
    assert judge(differences - differences.mean(), margin=0.001).seeds_needed is None


@pytest.mark.parametrize("count", range(5))
def test_fewer_than_five_seeds_give_a_range_and_no_verdict(count):
    differences = draws(0, count, mean=1.0, deviation=0.001)
    judged = judge(differences, margin=0.01)
    assert (judged.pairs, judged.verdict) == (count, None)
    assert judged.range == (None if count == 0 else (differences.min(), differences.max()))


def test_differences_of_nothing_are_the_same_without_a_margin_too():
    assert judge(np.zeros(5)).verdict == "the same"
    assert judge(draws(0, 10)).verdict == "undecided"


@pytest.mark.parametrize("variant", range(11))
@pytest.mark.parametrize("baseline", range(5))
def test_divergence_decides_where_the_exact_test_of_mcnemar_says_so(variant, baseline):
    seeds = 16
    differences = draws(0, seeds - variant - baseline, deviation=1)
    differences -= differences.mean()
    judged = judge(differences, margin=0.01, differences_in_table=2, diverged=(variant, baseline))
    total = variant + baseline
    p = min(1.0, 2 * stats.binom.cdf(min(variant, baseline), total, 0.5)) if total else 1.0
    expected = ("worse" if variant > baseline else "better") if p < 0.05 / 2 else "undecided"
    assert (judged.verdict, judged.by_divergence) == (expected, expected != "undecided")


def test_divergence_that_decides_nothing_leaves_the_difference_of_the_others():
    differences = draws(0, 9, mean=0.05)
    judged = judge(differences, margin=0.01, diverged=(0, 1))
    assert (judged.verdict, judged.pairs, judged.by_divergence) == ("better", 9, False)
    assert judged.difference == pytest.approx(differences.mean())


def test_where_all_runs_of_both_diverged_nothing_is_said():
    judged = judge([], both_diverged=10)
    assert (judged.verdict, judged.pairs, judged.difference, judged.seeds_needed) == ("undecided", 0, None, None)


def test_seeds_needed_for_divergence_scales_its_shares():
    # Four of five against none: two-sided p is 2 / 2 ** 8 with eight of ten, and 2 / 2 ** 7 with seven.
    judged = judge([0.1], margin=0.01, differences_in_table=4, diverged=(4, 0))
    assert judged.verdict == "undecided"
    assert judged.seeds_needed == 10


@pytest.mark.parametrize("mean, deviation, margin", [(0.0, 0.02, 0.01), (0.004, 0.01, 0.01), (0.02, 0.05, 0.01)])
def test_seeds_needed_are_those_of_the_distributions_of_scipy_stats(mean, deviation, margin):
    def share_undecided(count):
        median = deviation * np.sqrt(stats.chi2(count - 1).median() / (count - 1))
        width = stats.t(count - 1).ppf(0.975) * median / np.sqrt(count)
        below = stats.norm(mean, deviation / np.sqrt(count)).cdf
        low = min(max(margin - width, 0), width)
        return below(width) - below(low) + below(-low) - below(-width)

    expected = next(count for count in range(5, 1000) if share_undecided(count) <= 0.5)
    assert seeds_needed(mean, deviation, margin) == expected
