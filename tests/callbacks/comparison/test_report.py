import io
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from callbacks.comparison import Result
from callbacks.comparison.report import (
    as_html,
    display_name,
    markdown,
    new_console,
    notes,
    print_report,
    table,
)
from evidence.recipes import ROOT

LONGEST_NAME = max(
    (
        run["variant"]
        for path in (ROOT / "evidence").glob("*/*.json")
        if not path.stem.endswith(".search")
        for run in Result.load(path).runs
    ),
    key=len,
)


def new_result(figures, **arguments):
    result = Result(
        **{"baseline": next(iter(figures)), "metric": "accuracy", "mode": "max", "margin": 0.01} | arguments
    )
    for variant, values in figures.items():
        for seed, value in enumerate(values):
            result.add_run(variant, seed, {result.split: {result.metric: float(value)}})
    return result


def printed(result, width=80):
    file = io.StringIO()
    print_report(result, Console(file=file, width=width, markup=False, highlight=False))
    return file.getvalue()


def undecided_figures(seeds=10):
    base = 0.8 + np.random.default_rng(0).normal(0, 0.01, seeds)
    shifts = np.random.default_rng(1).normal(0, 0.03, (3, seeds))
    return {"a": base, LONGEST_NAME: base + shifts[0] - shifts[0].mean(), "c": base + 0.1, "d": base + 0.005}


@pytest.mark.parametrize("metric", ["accuracy", "sparse_categorical_accuracy"])
@pytest.mark.parametrize("seeds", [1, 3, 10])
@pytest.mark.parametrize("diverging", [False, True])
def test_every_row_is_one_line_of_eighty_columns(metric, seeds, diverging):
    result = new_result(undecided_figures(seeds), metric=metric, settings={"dataset": "fashion_mnist_10k"})
    for run in result.runs:
        run["epoch_seconds"] = [1.0 + 9.5 * (run["variant"] == LONGEST_NAME)]
        run["metrics"]["train"] = {metric: 0.9}
        if diverging and run["seed"] == 0 and run["variant"] == LONGEST_NAME:
            run["metrics"]["test"][metric] = np.nan
        for name in ("learning rate", "share of the units that are dead", "values kept per weight", "epochs to 0.8"):
            result.figures.append({"variant": run["variant"], "seed": run["seed"], "name": name, "value": 0.00012345})
    text = printed(result)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    columns = table(result)
    row = columns["variant"].index(LONGEST_NAME)
    line = next(line for line in lines if all(columns[title][row] in line for title in list(columns)[:3]))
    assert line.startswith(LONGEST_NAME)
    assert all(cell in text for cells in columns.values() for cell in cells)
    assert "dataset fashion_mnist_10k" in text


def test_ratio_of_times_near_one_is_the_same_and_others_have_quartiles():
    seconds = {"a": [1.0, 1.0, 1.0], "b": [1.04, 0.5, 1.06], "c": [1.2, 1.3, 1.6], "d": [0.8, 1.3, 1.4]}
    result = new_result({variant: [0.5, 0.6, 0.7] for variant in seconds})
    for run in result.runs:
        run["epoch_seconds"] = [seconds[run["variant"]][run["seed"]]]
    assert table(result)["time"] == ["1", "same", "1.30 (1.25–1.45)", "1.30 (1.05–1.35)"]
    assert "median (quartiles) over seeds; same: within 5 % of it" in " ".join(notes(result))


def test_ratio_of_times_whose_quartiles_lie_on_both_sides_of_one_is_not_given():
    seconds = {"a": [1.0, 1.0, 1.0], "b": [0.6, 1.3, 1.5], "c": [0.7, 0.8, 1.6]}
    result = new_result({variant: [0.5, 0.6, 0.7] for variant in seconds})
    for run in result.runs:
        run["epoch_seconds"] = [seconds[run["variant"]][run["seed"]]]
    assert table(result)["time"] == ["1", "0.95–1.40", "0.75–1.20"]
    assert "quartiles alone: on both sides of it" in " ".join(notes(result))


def test_few_seeds_show_the_range_of_the_differences_and_no_verdict():
    result = new_result({"a": [0.5, 0.6, 0.7], "b": [0.6, 0.9, 0.7]})
    columns = table(result)
    assert columns["difference"] == ["–", "+0.0000 to +0.3000"]
    assert columns["test accuracy"] == ["0.6000", "0.7333"]
    assert columns["verdict"] == ["–", "no verdict"]
    assert "a verdict takes 5 or more" in " ".join(notes(result))
    assert table(new_result({"a": [0.5], "b": [0.75]}))["difference"] == ["–", "+0.2500"]


def test_undecided_tells_the_number_of_seeds():
    result = new_result(undecided_figures())
    verdicts = dict(zip(table(result)["variant"], table(result)["verdict"], strict=True))
    needed = {row["variant"]: row["seeds_needed"] for row in result.summary()}
    assert verdicts == {
        "a": "–",
        LONGEST_NAME: f"undecided, ~{needed[LONGEST_NAME]}",
        "c": "better",
        "d": "slightly better",
    }
    assert "about N seeds would decide" in printed(result)


def test_divergence_is_counted_marked_and_explained():
    base = np.random.default_rng(0).normal(0.8, 0.01, 10)
    figures = {"a": base.copy(), "b": base + 0.05, "c": base.copy()}
    figures["a"][3] = np.nan
    figures["c"][:9] = np.inf
    columns = table(new_result(figures))
    assert columns["diverged"] == ["1 of 10", "0 of 10", "9 of 10"]
    assert columns["test accuracy"][0].endswith("*")
    assert columns["difference"][1] == "+0.0500 ± 0.0000*"
    assert columns["verdict"][1:] == ["better", "worse†"]
    text = " ".join(printed(new_result(figures)).split())
    assert "* over the seeds that did not diverge; of a difference, in neither run." in text
    assert "† c: worse: it diverged in 9 of 10." in text


def test_what_else_a_reader_must_know_is_noted():
    result = new_result(
        {"a": [0.5, 0.6], "b": [0.7, 0.8]},
        interrupted=True,
        settings={"epochs": 2, "limit": None},
        unequal_starts={"b": ["normalization/mean"]},
        data={
            "train": {"examples": 100, "inputs": "28 × 28 × 1", "classes": 10},
            "test": {"examples": 20, "inputs": "28 × 28 × 1", "classes": 9},
        },
    )
    result.figures.append({"variant": "b", "seed": 0, "name": "share clipped", "value": 0.125})
    text = " ".join(notes(result))
    assert "Interrupted. Finished runs: 4" in text
    assert "settings: epochs 2." in text
    assert "b does not start as the first variant in normalization/mean." in text
    assert "data: 100 train, 20 test examples, inputs of shape 28 × 28 × 1, 10 classes." in text
    assert "share clipped: median over seeds." in text


ODD_NAMES = ["[/relu]", "$x_1$", "_private", "a|b", "<b>bold</b>", "*star*", ":smile:", " a", "a", "a\nb", "", "1e3"]


def test_names_are_shown_as_they_are_and_those_that_differ_differently():
    result = new_result({name: [0.5 + 0.01 * place] for place, name in enumerate(ODD_NAMES)})
    shown = [display_name(name) for name in ODD_NAMES]
    assert len(set(shown)) == len(ODD_NAMES)
    text = printed(result)
    assert all(name in text for name in shown)
    page = as_html(result)
    assert "&lt;b&gt;bold" in page and "<b>" not in page
    text = markdown(result)
    assert r"a\|b" in text and r"\[/relu\]" in text and r"\*star\*" in text and r"\<b\>" in text
    assert len(text.splitlines()) == 2 + len(ODD_NAMES)


def test_figures_called_like_a_column_have_a_column_of_their_own():
    result = new_result({"a": [0.5], "b": [0.6]})
    result.figures += [{"variant": "b", "seed": 0, "name": name, "value": 7.0} for name in ("variant", "verdict")]
    columns = table(result)
    assert columns["variant"] == ["a", "b"]
    assert columns["variant (figure)"] == ["–", "7"]


def test_figures_are_whole_numbers_or_have_four_digits():
    result = new_result({variant: [0.5, 0.6, 0.7] for variant in "abcde"})
    figures = {"a": [3, 1, np.inf], "b": [0.5, 0.25, 40], "c": [17.63928] * 3, "d": [4.5] * 3, "e": [1100.53] * 3}
    for variant, values in figures.items():
        for seed, value in enumerate(values):
            result.figures.append({"variant": variant, "seed": seed, "name": "epochs to 0.8", "value": value})
    assert table(result)["epochs to 0.8"] == ["3", "0.5000", "17.64", "4.500", "1101"]
    assert notes(result)[-1] == "epochs to 0.8: median over seeds."


def test_columns_of_ones_own_are_explained_where_they_stand():
    explained = {"epochs to 0.8": "epochs until it was 0.8", "other": "another figure"}
    result = new_result({"a": [0.5, 0.6, 0.7], "b": [0.7, 0.8, 0.9]}, columns=explained)
    result.figures.append({"variant": "a", "seed": 0, "name": "epochs to 0.8", "value": 1})
    assert notes(result)[-2:] == ["epochs to 0.8: epochs until it was 0.8.", "epochs to 0.8: median over seeds."]
    assert Result(**vars(result)).columns == explained


def test_search_shows_every_rate_and_the_best_one():
    result = Result(
        baseline="a", metric="accuracy", mode="max", split="validation", grid=[3e-5 * 10 ** (n / 2) for n in range(12)]
    )
    for variant in ("a", LONGEST_NAME):
        for place, rate in enumerate(result.grid):
            result.add_run(variant, 0, {"validation": {"accuracy": np.nan if place == 3 else place / 20}}, rate=rate)
    text = printed(result)
    assert max(map(len, text.splitlines())) <= 80
    assert f"{result.grid[-1]:g} (edge)" in text
    assert "0.550" in text and "–" in text
    assert "Widen the grid." in " ".join(text.split())


PRINTING = """
import sys
from callbacks.comparison import Result
from callbacks.comparison.report import new_console, print_report
result = Result(baseline="a", metric="accuracy", mode="max")
for seed in range(5):
    for variant in ("a", "b"):
        result.add_run(variant, seed, {"test": {"accuracy": 0.5 + seed / 10}})
console = new_console()
for _ in range(300):
    print_report(result, console)
print("done", file=sys.stderr)
"""


@pytest.mark.parametrize("command", ["exec {} | head -1", "exec {} >&-", "PYTHONIOENCODING=ascii exec {} > /dev/null"])
def test_output_that_nobody_reads_or_that_knows_no_plus_minus_stops_nothing(command, tmp_path):
    (tmp_path / "printing.py").write_text(PRINTING)
    line = command.format(f"env PYTHONPATH={ROOT} {sys.executable} {tmp_path / 'printing.py'}")
    process = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert process.stderr == "done\n"


def test_console_of_a_closed_output_is_quiet(monkeypatch):
    closed = io.StringIO()
    closed.close()
    for output in (None, closed):
        monkeypatch.setattr(sys, "stdout", output)
        new_console().print("nothing")
