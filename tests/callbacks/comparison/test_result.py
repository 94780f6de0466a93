import json
import math
import os
import statistics
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

from callbacks.comparison import Result
from evidence.recipes import ROOT

GENERATOR = np.random.default_rng(0)


def new_result(figures=None, **arguments):
    """Return a result of {variant: [figure of seed 0, …]}; a figure may be a dict of several."""
    result = Result(**{"baseline": "a", "metric": "accuracy", "mode": "max", "margin": 0.01} | arguments)
    for variant, values in (figures or {}).items():
        for seed, value in enumerate(values):
            metrics = value if isinstance(value, dict) else {result.metric: float(value)}
            result.add_run(variant, seed, {result.split: metrics})
    return result


def test_reading_summing_up_and_judging_need_no_keras():
    path = ROOT / "evidence" / "regularization" / "dropout.json"
    code = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in ("keras", "tensorflow", "jax", "torch", "matplotlib", "seaborn", "pandas", "rich"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
from callbacks.comparison.result import Result
import callbacks.comparison.result
print([row["verdict"] for row in Result.load({str(path)!r}).summary()])
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.stdout.startswith("['baseline', "), process.stderr


def interval_of(differences, level):
    interval = stats.ttest_1samp(differences, 0).confidence_interval(1 - level)
    return pytest.approx((np.mean(differences), (interval.high - interval.low) / 2))


COMPARISONS = [path for path in sorted((ROOT / "evidence").glob("*/*.json")) if not path.stem.endswith(".search")]


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_stored_result_loads_with_the_intervals_of_the_paired_t_test(path):
    content = json.loads(path.read_text())
    result = Result.load(path)
    figures = {}
    for run in content["runs"]:
        value = float(run["metrics"][content["split"]][content["metric"]])
        has_diverged = not all(
            math.isfinite(float(each))
            for each in [*run["metrics"][content["split"]].values(), *run["curve"].get("loss", [])[-1:]]
        )
        figures.setdefault(run["variant"], {})[run["seed"]] = math.nan if has_diverged else value
    rows = {row["variant"]: row for row in result.summary()}
    assert list(rows)[0] == content["baseline"]
    assert rows.keys() == figures.keys()
    for variant, by_seed in figures.items():
        finite = [value for value in by_seed.values() if math.isfinite(value)]
        if len(finite) > 1:
            assert (rows[variant]["mean"], rows[variant]["half_width"]) == interval_of(finite, 0.05)
        if variant == content["baseline"]:
            continue
        differences = [value - figures[content["baseline"]][seed] for seed, value in by_seed.items()]
        differences = [value for value in differences if math.isfinite(value)]
        if len(differences) > 1:
            found = rows[variant]["difference"], rows[variant]["difference_half_width"]
            assert found == interval_of(differences, 0.05 / (len(rows) - 1))


def test_result_of_the_first_version_has_the_usual_margin(tmp_path):
    for metric, margin in {"accuracy": 0.01, "loss": None}.items():
        content = json.loads(new_result(metric=metric).to_json())
        del content["margin"]
        for name in ("pretrained", "data", "unequal_starts"):
            content.pop(name, None)
        (tmp_path / "old.json").write_text(json.dumps(content))
        assert Result.load(tmp_path / "old.json").margin == margin


def test_saved_result_is_strict_json_and_comes_back_as_it_was(tmp_path):
    result = new_result({"a": [0.5, np.nan], "NaN": [np.inf, -np.inf]}, settings={"Infinity": "NaN"})
    result.figures.append({"variant": "NaN", "seed": 0, "name": "Infinity", "value": math.inf})
    result.save(tmp_path / "name.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    json.loads((tmp_path / "name.json").read_text(), parse_constant=refuse)
    loaded = Result.load(tmp_path / "name.json")
    np.testing.assert_equal(vars(loaded), vars(result))


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"runs": []}', "not JSON", '"text"'])
def test_file_that_holds_no_result_is_refused_in_words(text, tmp_path):
    (tmp_path / "name.json").write_text(text)
    with pytest.raises(ValueError, match="name.json' holds no result of a comparison"):
        Result.load(tmp_path / "name.json")


def test_merged_units_give_what_one_comparison_gives():
    figures = {"a": [0.5, 0.6, 0.7], "b": [0.7, 0.9, 0.8]}
    whole = new_result(figures)
    units = []
    for seed in (2, 0, 1):
        unit = new_result()
        for variant, values in figures.items():
            unit.add_run(variant, seed, {"test": {"accuracy": values[seed]}})
        unit.figures.append({"variant": "b", "seed": seed, "name": "epochs", "value": 10.0 * seed})
        unit.environment = {"keras": "3.15", "processor": "abacus" if seed else "slide rule"}
        units.append(unit)
    merged = Result.merge(*units)
    assert merged.summary()[1].pop("figures") == {"epochs": 10.0}
    assert [(run["variant"], run["seed"]) for run in merged.runs] == [(v, s) for s in range(3) for v in "ab"]
    assert merged.environment["processor"] == "abacus; slide rule"
    for row, expected in zip(merged.summary(), whole.summary(), strict=True):
        assert row | {"figures": {}} == expected
    assert len(units[0].runs) == 2, "merging changes what it is given"


@pytest.mark.parametrize(
    "difference, words",
    [
        ({"settings": {"epochs": 3}}, "settings: epochs 2 and 3"),
        ({"settings": {"epochs": 2, "rate": 0.1}}, "settings: rate None and 0.1"),
        ({"digest": "other"}, "digest"),
        ({"code": "other"}, "code"),
        ({"metric": "loss"}, "metric"),
        ({"margin": 0.02}, "margin"),
        ({"baseline": "b"}, "baseline"),
        ({"same_start": False}, "same_start"),
        ({"data": {"test": {"examples": 10}}}, "data: test"),
        ({"environment": {"keras": "3.16"}}, "keras"),
        ({"environment": {"keras": "3.15", "backend": "jax 0.10"}}, "backend"),
    ],
)
def test_other_experiments_are_not_merged(difference, words):
    common = {"settings": {"epochs": 2}, "digest": "one", "environment": {"keras": "3.15"}}
    first, second = new_result(**common), new_result(**common | difference)
    with pytest.raises(ValueError, match=f"not of one experiment.*{words}"):
        first.merge(second)


def test_seed_twice_is_not_merged():
    first, second = new_result({"a": [0.5, 0.6]}), new_result({"a": [0.5]})
    with pytest.raises(ValueError, match="hold seed 0, which would count twice"):
        first.merge(second)


def test_verdicts_are_in_words():
    noise = np.random.default_rng(1).normal(0, 0.001, 10)
    base = 0.8 + np.random.default_rng(2).normal(0, 0.01, 10)
    wide = np.random.default_rng(3).normal(0.004, 0.02, 10)
    shifts = {"up": 0.05 + noise, "a little": 0.005 + noise, "none": noise, "down": noise - 0.05, "wide": wide}
    figures = {"a": base} | {name: base + shift for name, shift in shifts.items()}
    verdicts = {row["variant"]: row["verdict"] for row in new_result(figures).summary()}
    count = int(verdicts["wide"].split()[2])
    assert verdicts == {
        "a": "baseline",
        "up": "better",
        "a little": "slightly better",
        "none": "the same",
        "down": "worse",
        "wide": f"undecided: about {count} seeds would decide",
    }
    assert count > 10
    lower = {row["variant"]: row["verdict"] for row in new_result(figures, mode="min").summary()}
    assert (lower["up"], lower["a little"], lower["down"]) == ("worse", "slightly worse", "better")


def test_diverged_baseline_takes_no_verdict_away():
    generator = np.random.default_rng(0)
    base = generator.normal(0.8, 0.01, 10)
    figures = {"a": base.copy(), "b": base + generator.normal(0.05, 0.01, 10), "c": base - 0.05}
    figures["a"][3] = figures["c"][7] = np.nan
    rows = {row["variant"]: row for row in new_result(figures).summary()}
    assert (rows["a"]["diverged"], rows["b"]["diverged"], rows["c"]["diverged"]) == (1, 0, 1)
    assert (rows["b"]["verdict"], rows["b"]["pairs"]) == ("better", 9)
    assert (rows["c"]["verdict"], rows["c"]["pairs"]) == ("worse", 8)
    assert rows["a"]["mean"] == pytest.approx(np.nanmean(figures["a"]))


def test_divergence_that_decides_says_so():
    base = GENERATOR.normal(0.8, 0.01, 10)
    figures = {"a": base.copy(), "b": base.copy(), "c": base.copy()}
    figures["a"][:7] = np.inf
    figures["c"][:] = np.nan
    rows = {row["variant"]: row for row in new_result(figures).summary()}
    assert rows["b"]["verdict"] == "better: the baseline diverged in 7 of 10"
    assert rows["c"]["verdict"].startswith("undecided")
    rows = {row["variant"]: row for row in new_result(figures, baseline="b").summary()}
    assert rows["a"]["verdict"] == "worse: it diverged in 7 of 10"
    assert rows["c"]["verdict"] == "worse: it diverged in 10 of 10"
    assert rows["c"]["mean"] is rows["c"]["difference"] is None


def test_loss_that_is_not_finite_is_divergence_though_the_accuracy_is_finite():
    result = new_result()
    result.add_run("a", 0, {"test": {"accuracy": 0.1, "loss": math.nan}})
    result.add_run("b", 0, {"test": {"accuracy": 0.1, "loss": 1.0}}, curve={"loss": [1.0, math.inf]})
    assert [row["diverged"] for row in result.summary()] == [1, 1]


def test_seeds_that_repeat_each_other_get_no_verdict():
    same = {"accuracy": 0.5, "loss": 0.7}
    figures = {"a": [{"accuracy": 0.5 + 0.01 * seed, "loss": 0.7} for seed in range(5)], "b": [same] * 5}
    row = new_result(figures).summary()[1]
    assert row["repeats"] == [0, 1, 2, 3, 4]
    assert row["verdict"] == "no verdict: seeds repeat each other"
    # One accuracy alone may be equal by chance.
    rows = new_result({"a": [0.5, 0.6, 0.7, 0.8, 0.9], "b": [0.5, 0.5, 0.7, 0.8, 0.6]}).summary()
    assert [row["repeats"] for row in rows] == [[], []]
    # Diverged runs are equal in nothing but that.
    lost = {"accuracy": 0.1, "loss": math.nan}
    assert new_result({"a": [lost] * 5}).summary()[0]["repeats"] == []


def test_time_is_the_median_ratio_without_the_first_epoch():
    result = new_result({"a": [0.5, 0.5, 0.5], "b": [0.5, 0.5, 0.5]})
    times = {"a": [9, 1, 2, 3], "b": [1, 3, 3, 3]}
    for run in result.runs:
        run["epoch_seconds"] = [
            seconds * (1 + run["seed"] * (run["variant"] == "b")) for seconds in times[run["variant"]]
        ]
    # Medians after the first epoch: 2 for a; 3, 6 and 9 for b.
    row = result.summary()[1]
    ratios = [3 / 2, 6 / 2, 9 / 2]
    assert row["time"] == pytest.approx(np.median(ratios))
    assert row["time_quartiles"] == pytest.approx(np.percentile(ratios, [25, 75]))


def test_gap_is_the_training_figure_minus_the_test_figure():
    result = new_result({"a": [0.5, 0.7]})
    for run in result.runs:
        run["metrics"]["train"] = {"accuracy": 0.9}
    assert result.summary()[0]["gap"] == pytest.approx(0.9 - 0.6)


def with_epochs(figures, epochs):
    """Return a result with the figure "epochs to 0.8" beside the accuracies."""
    result = new_result(figures)
    for variant, values in epochs.items():
        result.figures += [
            {"variant": variant, "seed": seed, "name": "epochs to 0.8", "value": value}
            for seed, value in enumerate(values)
        ]
    return result


def test_headline_of_the_metric_is_the_row_of_the_table():
    figures = {name: GENERATOR.normal(mean, 0.01, 8) for name, mean in (("a", 0.5), ("b", 0.52), ("c", 0.6))}
    result = new_result(figures)
    for variant, given in (("b", "b"), ("c", "c"), ("c", None)):
        headline = result.headline(given)
        (row,) = [row for row in result.summary() if row["variant"] == variant]
        assert headline.pop("figure") is None
        assert headline == {key: row[key] for key in headline}
        level = 0.05 / 2
        assert (headline["difference"], headline["difference_half_width"]) == interval_of(
            figures[variant] - figures["a"], level
        )


def test_headline_of_a_figure_is_the_paired_t_test_of_that_figure_with_fewer_being_better():
    figures = {name: GENERATOR.normal(0.5, 0.01, 6) for name in "abc"}
    epochs = {"a": [13, 12, 15, 11, 14, 13], "b": [5, 6, 5, 4, 6, 5], "c": [13, 12, 14, 12, 14, 13]}
    result = with_epochs(figures, epochs)
    expected = interval_of(np.subtract(epochs["b"], epochs["a"]), 0.05 / 2)
    headline = result.headline("b", "epochs to 0.8")
    assert (headline["difference"], headline["difference_half_width"]) == expected
    assert headline["range"] == (-10.0, -6.0)
    assert (headline["figure"], headline["verdict"]) == ("epochs to 0.8", "better")
    # Twice the epochs, in place of fewer.
    worse = with_epochs(figures, epochs | {"b": [2 * value for value in epochs["a"]]})
    assert worse.headline("b", "epochs to 0.8")["verdict"] == "worse"
    assert result.headline(figure="epochs to 0.8")["verdict"] == "undecided: more than 1000 seeds would be needed"


def test_headline_counts_a_figure_that_was_never_reached_as_divergence():
    figures = {name: GENERATOR.normal(0.5, 0.01, 8) for name in "ab"}
    never = math.inf
    result = with_epochs(figures, {"a": [never] * 7 + [9], "b": [5, 6, 5, 4, 6, 5, 5, never]})
    headline = result.headline("b", "epochs to 0.8")
    assert headline["pairs"] == 0
    assert stats.binomtest(1, 8).pvalue > 0.05
    assert headline["verdict"].startswith("undecided")
    result = with_epochs(figures, {"a": [never] * 7 + [9], "b": [5, 6, 5, 4, 6, 5, 5, 6]})
    headline = result.headline("b", "epochs to 0.8")
    assert stats.binomtest(0, 7).pvalue < 0.05
    assert headline["by_divergence"]
    assert headline["verdict"] == "better: the baseline has no epochs to 0.8 in 7 of 8"


def test_headline_of_what_is_not_there_is_refused_by_name():
    result = with_epochs({"a": [0.5] * 2, "b": [0.6] * 2}, {"a": [3, 4], "b": [3, 4]})
    with pytest.raises(ValueError, match=r"no variant 'c' beside the baseline: choose from \['b'\]"):
        result.headline("c")
    with pytest.raises(ValueError, match="no variant 'a'"):
        result.headline("a")
    with pytest.raises(ValueError, match=r"no figure 'steps': choose from \['epochs to 0.8'\]"):
        result.headline("b", "steps")
    assert result.headline("b")["verdict"] == "no verdict"


def test_variants_must_see_the_same_seeds_and_the_baseline_be_run():
    with pytest.raises(ValueError, match="different seeds"):
        new_result({"a": [0.5, 0.6], "b": [0.5]}).summary()
    with pytest.raises(ValueError, match="baseline 'a' is not among"):
        new_result({"b": [0.5]}).summary()


def test_interrupted_result_shows_the_seeds_that_every_variant_finished():
    rows = new_result({"a": [0.5, 0.6, 0.7], "b": [0.7, 0.8]}, interrupted=True).summary()
    assert [(row["variant"], row["seeds"]) for row in rows] == [("a", 2), ("b", 2)]
    (row,) = new_result({"b": [0.7]}, interrupted=True).summary()
    assert (row["mean"], row["difference"]) == (0.7, None)


def test_search_finds_the_best_mean_and_marks_the_edge():
    result = new_result(split="validation", grid=[0.01, 0.1, 1.0])
    accuracies = {
        "a": {0.01: [0.5, 0.6], 0.1: [0.8, 0.7], 1.0: [0.9, np.nan]},
        "b": {0.01: [0.8, 0.9], 0.1: [0.9, 0.7], 1.0: [np.nan, np.nan]},
    }
    for variant, by_rate in accuracies.items():
        for rate, values in by_rate.items():
            for seed, value in enumerate(values):
                result.add_run(variant, seed, {"validation": {"accuracy": value}}, rate=rate)
    first, second = result.search_summary()
    assert first["means"] == {0.01: pytest.approx(0.55), 0.1: pytest.approx(0.75), 1.0: None}
    assert (first["best"], first["at_edge"]) == (0.1, False)
    assert (second["best"], second["at_edge"]) == (0.01, True)
    result.mode = "min"
    assert [row["best"] for row in result.search_summary()] == [0.01, 0.1]
    assert statistics.fmean([0.8, 0.7]) == first["means"][0.1]
    with pytest.raises(ValueError, match="search_summary"):
        result.summary()


def test_search_gives_the_middle_one_of_rates_that_are_equally_good():
    result = new_result(split="validation", grid=[1.0, 0.01, 0.1, 10.0])
    for rate in result.grid:
        result.add_run("stuck", 0, {"validation": {"accuracy": 0.1}}, rate=rate)
        result.add_run("flat", 0, {"validation": {"accuracy": 0.2 if rate < 1 else 0.1}}, rate=rate)
    stuck, flat = result.search_summary()
    assert (stuck["best"], stuck["at_edge"]) == (1.0, False)
    assert (flat["best"], flat["at_edge"]) == (0.1, False)


@pytest.mark.parametrize(
    "margin, top, alike", [(0.01, 0.109, True), (0.01, 0.111, False), (0.02, 0.111, True), (None, 0.109, False)]
)
def test_search_in_which_all_rates_are_within_the_margin_has_no_edge(margin, top, alike):
    result = new_result(split="validation", grid=[0.01, 0.1, 1.0, 10.0], margin=margin)
    for rate, value in zip(result.grid, [0.1, 0.1, top, math.nan], strict=True):
        result.add_run("a", 0, {"validation": {"accuracy": value}}, rate=rate)
    result.add_run("b", 0, {"validation": {"accuracy": 0.1}}, rate=10.0)
    first, second = result.search_summary()
    assert (first["best"], first["alike"], first["at_edge"]) == (1.0, alike, False)
    assert (second["best"], second["alike"], second["at_edge"]) == (10.0, False, True)
    result.grid = [0.01, 0.1, 1.0]
    assert result.search_summary()[0]["at_edge"] == (not alike)
