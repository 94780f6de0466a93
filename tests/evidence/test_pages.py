"""The pages made from cards, docstrings and results. That the command writes them is tested in `test_main.py`."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

import callbacks
from callbacks.comparison import Result
from evidence import pages, recipes
from evidence.pages import generated_files
from evidence.recipes import ROOT, find_recipes, read_card

ENVIRONMENT = {"python": "3.11.0", "keras": "3.15.0", "backend": "tensorflow 2.21.0", "processor": "abacus"}

OVERHEAD = {
    "environment": ENVIRONMENT,
    "batch_size": 128,
    "steps": 63,
    "kinds": {"no callback": "control", "GradientNorms": "monitor"},
    "seconds": [
        {
            "network": "dense",
            "jit_compile": jit,
            "epochs": {"no callback": [1.0, 2.0, 4.0], "GradientNorms": times},
            "epoch_ends": {"no callback": [0.0, 0.0, 0.0], "GradientNorms": [0.001, 0.00125, 0.5]},
        }
        for jit, times in ((False, [1.01, 2.04, 4.12]), (True, [1.25, 3.0, 5.0]))
    ],
}

SPEED = {
    "environment": ENVIRONMENT,
    "batch_size": 128,
    "steps": 63,
    "epochs": 5,
    "speeds": {"dense": {"our fit": [2000, 3000, 4000], "loop by hand": [1000, 2000, 4000]}},
}

RECIPE = '''"""Quick start: it starts, at once, so that nothing waits.

Symptom: nothing | begins. It is slow.

Technique: t_1 * t_2.

Change: one line:

    x = layers.ReLU()(x)

    y = x

and no more.

Look for: it begins.

Cost: none.

Source: f.
"""

HEADLINE = {headline}
'''


@pytest.fixture
def root(tmp_path):
    """A project with the README, the callbacks and no recipe."""
    for name in ("README.md", "evidence/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "callbacks", tmp_path / "callbacks", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def add_recipe(root, name="quick_start", theme="schedules", headline='"on"'):
    path = root / "recipes" / theme / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECIPE.replace("{headline}", headline))
    return path


def add_result(root, figures, theme="schedules", name="quick_start", seconds=None, more=(), **arguments):
    """Save a result of {variant: figures by seed}; `more` holds (variant, seed, name, value)."""
    given = {"metric": "accuracy", "mode": "max", "margin": 0.01, "settings": {"data_set": "large"}} | arguments
    result = Result(baseline=next(iter(figures)), environment=ENVIRONMENT, **given)
    for variant, values in figures.items():
        for seed, value in enumerate(values):
            metrics = {"train": {result.metric: value + 0.05}, "test": {result.metric: value}}
            result.add_run(variant, seed, metrics, epoch_seconds=(seconds or {}).get(variant, ()))
    result.figures = [dict(zip(("variant", "seed", "name", "value"), entry, strict=True)) for entry in more]
    path = root / "evidence" / theme / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result.save(path)
    return result


def page(root, name):
    return generated_files(root)[root / name].replace("\N{NO-BREAK SPACE}", " ")


def row(text, start):
    """Return the cells of the only row of a table that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


GENERATOR = np.random.default_rng(0)
OFF = GENERATOR.normal(0.80, 0.002, 10)
ON = OFF + GENERATOR.normal(0.03, 0.002, 10)


def interval_in_points(differences, comparisons=1):
    """Return the mean and half the width of the t-interval, computed by scipy, as the pages show them."""
    interval = stats.ttest_1samp(differences, 0).confidence_interval(1 - 0.05 / comparisons)
    return f"{100 * np.mean(differences):+.1f} ± {50 * (interval.high - interval.low):.1f}".replace("-", "−")


def test_command_line_and_pages_need_neither_keras_nor_a_backend():
    code = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in ("keras", "tensorflow", "tensorflow_datasets", "jax", "torch", "matplotlib", "seaborn", "pandas"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import evidence.__main__
from evidence.pages import generated_files
print(len(generated_files()))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    themes = {recipe.parent for recipe in find_recipes()}
    assert process.stdout == f"{3 + len(themes)}\n", process.stderr


def test_readme_has_a_line_for_each_recipe_with_its_answer_and_its_times(root):
    add_recipe(root)
    seconds = {"off": [9.0, 1.0, 1.0], "on": [9.0, 1.3, 1.3], "half": [9.0, 1.0, 1.0]}
    add_result(root, {"off": OFF, "on": ON, "half": OFF + 0.0001 * np.arange(10)}, seconds=seconds)
    text = page(root, "README.md")
    recipe, answer, time = row(text, "[Quick start]")
    assert recipe == "[Quick start](recipes/schedules/README.md#quick-start): it starts, at once"
    assert answer == f"on: {interval_in_points(ON - OFF, comparisons=2)} points"
    assert time == "1.30 ×, 34 s"
    (line,) = [line for line in text.splitlines() if line.startswith("- **[Schedules](recipes/schedules/README.md)**")]
    assert line.endswith("<br>[nothing | begins](recipes/schedules/README.md#quick-start)")


@pytest.mark.parametrize(
    "figures, arguments, words",
    [
        ({"off": OFF, "on": OFF + 0.001 * np.tile([1, -1], 5)}, {}, "the same"),
        ({"off": OFF, "on": OFF + 0.03 * np.tile([1, -1], 5)}, {}, "undecided, needs about "),
        ({"off": OFF, "on": [float("nan")] * 10}, {}, "worse: it diverged in 10 of 10"),
        ({"off": OFF[:3], "on": ON[:3]}, {}, "no verdict"),
        ({"off": OFF, "on": ON}, {"metric": "loss", "mode": "min", "margin": None}, "worse, loss +0.0"),
    ],
)
def test_answers_say_what_is_decided(figures, arguments, words, root):
    add_recipe(root)
    add_result(root, figures, **arguments)
    assert row(page(root, "README.md"), "[Quick start]")[1].startswith(f"on: {words}")


def test_figure_of_the_few_seeds_that_are_left_is_not_shown_where_divergence_decides(root):
    add_recipe(root)
    add_result(root, {"off": OFF, "on": [*[float("nan")] * 9, 0.9]})
    assert "| on | – | – | worse |" in page(root, "recipes/schedules/README.md")


@pytest.mark.parametrize(
    "name, sign, words", [("epochs to 0.8", -1, "earlier"), ("epochs spent", 1, "more"), ("error", -1, "lower")]
)
def test_headline_may_be_a_figure(name, sign, words, root):
    add_recipe(root, headline=f'("on", "{name}")')
    steps = GENERATOR.normal(8, 1, 10)
    more = [("off", seed, name, 20.0) for seed in range(10)]
    more += [("on", seed, name, 20.0 + sign * step) for seed, step in enumerate(steps)]
    add_result(root, {"off": OFF, "on": ON}, more=more)
    interval = stats.ttest_1samp(steps, 0).confidence_interval(0.95)
    size = f"{np.mean(steps):.1f} ± {(interval.high - interval.low) / 2:.1f}"
    answer = row(page(root, "README.md"), "[Quick start]")[1]
    assert answer == f"on: {f'error {size}' if name == 'error' else f'{size} epochs'} {words}"
    text = page(root, "recipes/schedules/README.md")
    place = " at 0.8" if name == "epochs to 0.8" else ""
    assert f"{words}{place}, which is {'worse' if sign > 0 else 'better'}. In test accuracy, **on** is better." in text


def test_section_shows_the_lines_the_tables_and_what_they_mean(root):
    add_recipe(root)
    figures = {"off": OFF, "on": ON, "half": OFF + 0.0001 * np.tile([1, -1], 5), "bad": OFF - 0.1 + (ON - OFF)}
    seconds = {variant: [9.0, 1.0] for variant in figures} | {"half": [9.0, 2.5]}
    add_result(root, figures, seconds=seconds)
    text = page(root, "recipes/schedules/README.md")
    assert "## Quick start\n\n[`quick_start.py`](quick_start.py): it starts, at once, so that nothing waits.\n" in text
    assert "**Change:** one line:\n\n```python\nx = layers.ReLU()(x)\n\ny = x\n```\n\nand no more.\n" in text
    assert "![Quick start: " in text and "](../../evidence/schedules/quick_start.svg)" in text
    assert "| variant | test, % | difference, points | verdict |" in text
    assert "| variant | gap, points | time |\n| --- | --- | --- |\n| off | +5.0 | 1 |" in text
    decisive, rest = [[line for line in text.splitlines() if line.startswith("| half |")][place] for place in (0, 1)]
    assert decisive == f"| half | {100 * np.mean(OFF):.1f} | +0.00 ± 0.01 | the same |"
    assert rest == "| half | +5.0 | 2.50 (2.50–2.50) |"
    difference = interval_in_points(ON - OFF, comparisons=3)
    assert f"| on | {100 * np.mean(ON):.1f} | {difference} | better |" in text
    assert (
        f"**on** against **off**: test accuracy is {difference[1:]} points higher, which is better. "
        "**half** is the same within 1 point; **bad** is worse." in text
    )
    assert "10 seeds; data\\_set large. Keras 3.15.0 on tensorflow 2.21.0, Python 3.11.0; abacus." in text
    assert "```sh\npython recipes/schedules/quick_start.py --seeds 10\n```" in text
    for words in ("**Cost:** none.", "**Look for:** it begins.", "**Source:** f.", "**How it works:** t_1 * t_2."):
        assert words in text


def test_further_result_of_a_recipe_has_its_flags_and_every_verdict(root, monkeypatch):
    monkeypatch.setattr(recipes, "FURTHER", {"quick_start": {"large": ["--gain", "2"]}})
    add_recipe(root)
    add_result(root, {"off": OFF, "on": ON})
    text = page(root, "recipes/schedules/README.md")
    assert "### Quick start --gain 2\n\nNot measured yet: `python -m evidence quick_start` does it." in text
    add_result(root, {"off": OFF, "on": ON, "bad": OFF - 0.1 + (ON - OFF)}, name="quick_start.large")
    text = page(root, "recipes/schedules/README.md").partition("### Quick start --gain 2")[2]
    assert "](../../evidence/schedules/quick_start.large.svg)" in text
    assert "\n\nAgainst **off**, **on** is better; **bad** is worse.\n\n" in text
    assert "python recipes/schedules/quick_start.py --gain 2 --seeds 10" in text


def test_search_shows_each_best_rate_and_what_the_rates_beside_it_lose(root, monkeypatch):
    monkeypatch.setattr(recipes, "FURTHER", {"quick_start": {"search": ["--search"]}})
    add_recipe(root)
    add_result(root, {"off": OFF, "on": ON})
    grid = [1.0, 0.1, 0.01]
    result = Result("off", "accuracy", "max", split="validation", grid=grid, environment=ENVIRONMENT)
    for variant, accuracies in {"off": [0.5, 0.7, 0.6], "on": [np.nan, 0.7, 0.8]}.items():
        for rate, accuracy in zip(grid, accuracies, strict=True):
            result.add_run(variant, 0, {"validation": {"accuracy": accuracy}}, rate=rate)
    result.save(root / "evidence" / "schedules" / "quick_start.search.json")
    text = page(root, "recipes/schedules/README.md").partition("### Quick start --search")[2]
    assert "| variant | best rate | validation accuracy | next lower rate | next higher rate |" in text
    assert "| off | 0.1 | 0.700 | 0.600 | 0.500 |" in text
    assert "| on | 0.01 (edge) | 0.800 | – | 0.700 |" in text
    assert "A better rate may lie beyond the grid for **on**." in text


def test_columns_of_ones_own_are_explained_below_their_tables(root):
    add_recipe(root)
    more = [(variant, seed, "spread", 0.5) for variant in ("off", "on") for seed in range(10)]
    add_result(root, {"off": OFF, "on": ON}, more=more, columns={"spread": "how far *it* goes"})
    text = page(root, "recipes/schedules/README.md")
    assert text.index("| spread |") < text.index("\n\nspread: how far \\*it\\* goes.\n\n")


def test_what_a_card_says_to_look_for_is_left_out_as_long_as_it_holds_measured_figures(root):
    path = add_recipe(root)
    path.write_text(path.read_text().replace("Look for: it begins.", "Look for: it gains 1.4 ± 0.9 points."))
    text = page(root, "recipes/schedules/README.md")
    assert "Look for" not in text
    assert "**Cost:** none." in text


def test_missing_result_says_which_command_makes_it(root):
    add_recipe(root)
    words = "Not measured yet: `python -m evidence quick_start` does it."
    assert row(page(root, "README.md"), "[Quick start]")[1] == words
    assert words in page(root, "recipes/schedules/README.md")
    assert "Not measured yet: `python -m evidence.overhead` does it." in page(root, "evidence/README.md")


@pytest.mark.parametrize("headline", ['"renamed"', '("on", "a figure of its own")'])
def test_result_of_before_the_headline_was_another_is_as_good_as_none(root, headline):
    add_recipe(root, headline=headline)
    add_result(root, {"off": OFF, "on": ON})
    words = "Not measured yet: `python -m evidence quick_start` does it."
    assert row(page(root, "README.md"), "[Quick start]")[1] == words
    assert words in page(root, "recipes/schedules/README.md")


def test_every_recipe_of_the_project_has_its_section_and_its_line():
    texts = generated_files()
    readme = texts[ROOT / "README.md"]
    for recipe in find_recipes():
        card, text = read_card(recipe), texts[recipe.parent / "README.md"]
        section = text.partition(f"\n## {card['Name']}\n")[2].partition("\n## ")[0]
        assert f"../../evidence/{recipe.parent.name}/{recipe.stem}.svg" in section
        assert f"[{card['Name']}](recipes/{recipe.parent.name}/README.md#" in readme
        assert len(pages.first_sentence(card["Symptom"])) <= 75, "it is the phrase of the README's index"


def test_index_of_half_as_many_recipes_more_has_room():
    """Next year's README is to have 200 lines, too."""
    readme = generated_files()[ROOT / "README.md"].splitlines()
    recipes, themes = len(find_recipes()), len({recipe.parent for recipe in find_recipes()})
    # The table has a line for each recipe and each theme, the list of symptoms one for each theme.
    assert sum(line.startswith("| ") for line in readme) == recipes + themes + 2
    assert sum(line.startswith("- **") for line in readme) == themes
    assert len(readme) + recipes / 2 + 2 * (15 - themes) <= 200


def test_mistakes_of_the_rule_are_counted_in_tables_of_ten_seeds(root):
    accuracies = {name: GENERATOR.normal(0.8, 0.003, 25) for name in ("A", "A again", "B", "C")}
    accuracies["A again"] = accuracies["A"]
    # One table is wrong twice.
    for name in ("B", "C"):
        accuracies[name][10:20] = accuracies["A"][10:20] + 0.02 + GENERATOR.normal(0, 0.001, 10)
    lasting = {name: GENERATOR.normal(0, 0.002, 25) for name in accuracies}
    halves = [
        (name, seed, half, 0.8 + lasting[name][seed] + GENERATOR.normal(0, 0.004))
        for name in accuracies
        for seed in range(25)
        for half in ("even images", "odd images")
    ]
    columns = {"even images": "of the one half", "odd images": "of the other"}
    add_result(root, accuracies, "reproducibility", "noise_floor", more=halves, columns=columns)
    text = page(root, "evidence/README.md")
    assert "one training under 3 names" in text
    assert "In 1 of 2 tables of 10 seeds it said better or worse, of 2 of 4 differences" in text
    assert "a difference in 1 of 2 tables" in page(root, "README.md")
    even, odd = ([each[-1] for each in halves if each[2] == name and each[0] != "A again"] for name in columns)
    deviation = np.std(np.concatenate([accuracies[name] for name in "ABC"]), ddof=1)
    assert f"deviation of {100 * deviation:.2f} points" in text
    assert f"it would be {100 * np.sqrt(np.cov(even, odd)[0, 1]):.2f}." in text


@pytest.mark.parametrize("is_about_time", [False, True])
def test_time_on_a_gpu_stands_beside_that_on_the_processor(root, monkeypatch, is_about_time):
    add_recipe(root)
    add_result(root, {"off": OFF, "on": ON}, seconds={"off": (9.0, 2.0, 4.0), "on": (9.0, 1.0, 1.0)})
    assert "On a GPU" not in page(root, "recipes/schedules/README.md")
    environment = ENVIRONMENT | {"processor": "Fast Device", "backend": "jax 1.2"}
    on_gpu = add_result(root, {"off": OFF[:1], "on": ON[:1]}, name="gpu", seconds={"off": (7.0, 0.5, 0.1)})
    on_gpu.environment = environment
    on_gpu.figures = [{"variant": "on", "seed": 0, "name": "ms a step", "value": 12.5}]
    on_gpu.save(root / "evidence" / "schedules" / "quick_start.gpu.json")
    monkeypatch.setattr("evidence.pages.EXCLUSIVE", {"quick_start"} if is_about_time else set())
    text = page(root, "recipes/schedules/README.md")
    assert "**On a GPU**, Fast Device with jax 1.2, an epoch of **off** takes 0.3 s, and 3 s on the processor" in text
    assert ("12.5" in text) == is_about_time


@pytest.mark.parametrize(
    "half_width, words", [(0.0079, "+0.82 ± 0.79"), (0.0082, "+0.8 ± 0.8"), (0.0074, "+0.8 ± 0.7")]
)
def test_interval_that_leaves_zero_out_is_seen_to_do_so(half_width, words):
    row = {"difference": 0.0082, "difference_half_width": half_width, "seeds": 10, "pairs": 10}
    assert pages.difference_in_words(row, Result(baseline="a", metric="accuracy", mode="max")) == words


@pytest.mark.parametrize(
    "ratio, quartiles, words",
    [
        (None, None, "–"),
        (1.04, (0.9, 1.2), "same"),
        (0.951, (0.9, 0.99), "same"),
        (1.06, (1.01, 1.2), "1.06 ×"),
        (0.9, (0.8, 0.95), "0.90 ×"),
        (2.64, (2.5, 2.8), "2.6 ×"),
        (1.25, (0.96, 1.61), "0.96–1.61 ×"),
    ],
)
def test_times_that_are_not_known_to_differ_are_not_said_to(ratio, quartiles, words):
    assert pages.time_in_words({"time": ratio, "time_quartiles": quartiles}) == words


def test_seconds_of_a_run_are_those_of_all_variants_the_median_over_seeds():
    result = Result(baseline="a", metric="loss", mode="min")
    seconds = {0: (1.0, 2.0), 1: (10.0, 20.0), 2: (4.0, 5.0)}
    for seed, of_variants in seconds.items():
        for variant, each in zip("ab", of_variants, strict=True):
            result.add_run(variant, seed, {"test": {"loss": 1.0}}, epoch_seconds=[each / 2, each / 2])
    assert pages.seconds_of_a_run(result) == f"{statistics.median(map(sum, seconds.values())):.0f} s"


@pytest.mark.parametrize(
    "summary, clause",
    [
        ("batch, layer, group and RMS, with batches of 4.", "batch, layer, group and RMS"),
        ("keeps weights small, by a term.", "keeps weights small"),
        ("scales the weights.", "scales the weights"),
        ("one, two.", "one, two"),
    ],
)
def test_first_clause_has_three_words_or_more(summary, clause):
    assert pages.first_clause(summary) == clause


def test_costs_are_those_of_the_saved_measurement(root):
    path = root / "evidence" / "overhead.json"
    path.write_text(json.dumps(OVERHEAD))
    text = page(root, "evidence/README.md")
    assert "| callback | kind | dense, default | dense, XLA | ms when an epoch ends |" in text
    assert "| GradientNorms | monitor | 1.020 (1.010–1.030) | 1.250 (1.250–1.500) | 1.25 |" in text
    assert "3 epochs of 63 steps of 128 images; Keras 3.15.0 on tensorflow 2.21.0, Python 3.11.0; abacus." in text
    assert "**Cost:** an epoch's time changes by +2.0 % with the dense network." in page(root, "callbacks/README.md")
    (root / "evidence" / "README.md").write_text(text)
    assert page(root, "evidence/README.md") == text
    path.write_text(json.dumps(OVERHEAD).replace("4.12", "4.16"))
    assert page(root, "evidence/README.md") != text


def test_speeds_are_those_of_the_saved_measurement(root):
    (root / "evidence" / "speed.json").write_text(json.dumps(SPEED))
    text = page(root, "evidence/README.md")
    assert "| network | our fit, images/s | relative to loop by hand |" in text
    assert "| dense | 3,000 | 1.50 (1.00–2.00) |" in text
    assert "Medians (quartiles) of 3 rounds of 5 epochs of 63 steps of 128 images; Keras 3.15.0" in text


def test_findings_of_training_doctor_are_counted_from_the_saved_runs(root):
    runs = [("healthy", "dense", 20, []), ("sick", "dead units", 21, ["dead units", "stuck at chance"])]
    runs += [("sick", "dead units", 22, []), ("program", "reviews, faulty", 20, ["overfitting"])]
    result = {
        "environment": ENVIRONMENT,
        "programs": {
            "reviews": {"source": "words of reviews", "fault": "by heart", "exact": ["overfitting"], "symptoms": []}
        },
        "runs": [
            {
                "group": group,
                "kind": kind,
                "seed": seed,
                "fit": "first fit" if group == "healthy" else None,
                "findings": [[name, "fault", "so it is."] for name in found],
            }
            for group, kind, seed, found in runs
        ],
    }
    (root / "evidence" / "training_doctor.json").write_text(json.dumps(result))
    text = page(root, "evidence/README.md")
    assert "| nothing: first fit | 1 | – | – |" in text
    assert "| dead units | 2 | 1 | stuck at chance 1 |" in text
    assert "| reviews: words of reviews | by heart | overfitting 1 | exact | – |" in text
    assert "Seeds from 20 on;" in text


def test_every_callback_has_its_sentence_its_example_and_its_picture():
    text = generated_files()[ROOT / "callbacks" / "README.md"]
    read = pages.read_callbacks()
    assert list(read) == callbacks.__all__
    for name in callbacks.__all__:
        callback = getattr(callbacks, name)
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        assert callback.__doc__.splitlines()[0] in section
        assert f"```python\nfrom callbacks import {name}\n\n" in section
        if hasattr(callback, "plot") and name != "Comparison":
            assert f"../evidence/callbacks/{name}.svg" in section


def test_example_of_a_docstring_loses_its_prompts_and_its_output():
    docstring = "It is.\n\nExample:\n\n    >>> for x in y:\n    ...     print(x)\n    1\n\n    >>> z = 1\n\nMore.\n"
    assert pages.example_of(docstring) == "for x in y:\n    print(x)\nz = 1"
    assert pages.example_of("It is.\n") is None


def test_page_without_markers_is_refused(root):
    path = root / "evidence" / "README.md"
    path.write_text(path.read_text().replace("<!-- end of speed -->", ""))
    with pytest.raises(ValueError, match="end of speed"):
        generated_files(root)
