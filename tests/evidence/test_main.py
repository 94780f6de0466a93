"""The command `python -m evidence`, in a copy of the project with a recipe that needs no training."""

import concurrent.futures
import json
import shutil
import subprocess
import sys

import cyclopts
import pytest

from callbacks.comparison import Result
from evidence import __main__, recipes, units
from evidence.recipes import ROOT

RECIPE = '''"""Quick: it adds figures without training.

Symptom: a | b.

Technique: b.

Change: c.

Look for: d.

Cost: e.

Source: f.
"""

from pathlib import Path

import cyclopts

from callbacks import Comparison


def main(*, dataset: str = "none", seeds: int = 1, save: Path | None = None, gain: float = 0.125):
    """Add figures."""
    with Comparison(baseline="off", metric="accuracy", margin=0.01, save=save, settings={"epochs": 3}) as comparison:
        for seed in range(seeds) if isinstance(seeds, int) else seeds:
            comparison.add("off", seed, {"accuracy": 0.5 + 0.01 * seed})
            comparison.add("on", seed, {"accuracy": 0.5 + gain + 0.011 * seed})
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
'''


@pytest.fixture
def project(tmp_path):
    """A copy of the project whose only recipe is `numerics/quick`."""
    for folder in ("callbacks", "evidence"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.json", "*.svg", "__pycache__")
        )
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "recipes" / "numerics").mkdir(parents=True)
    (tmp_path / "recipes" / "numerics" / "quick.py").write_text(RECIPE)
    return tmp_path


class Here(concurrent.futures.Executor):
    """Runs what it is given at once."""

    def __init__(self, count):
        pass

    def submit(self, function, unit):
        future = concurrent.futures.Future()
        try:
            future.set_result(function(unit))
        except BaseException as error:
            future.set_exception(error)
        return future


@pytest.fixture
def evidence(project, monkeypatch, capfd):
    """Return a function that runs the command in the project, and gives its exit code and what it printed."""
    monkeypatch.setattr(__main__, "ROOT", project)
    # In this process, which saves the time of starting others.
    monkeypatch.setattr(__main__, "ThreadPoolExecutor", Here)
    monkeypatch.setattr(units, "run_in_new_process", lambda unit, threads=1: units.run_unit(unit, project))

    def run(*arguments):
        try:
            code = cyclopts.App(default_command=__main__.main, result_action="return_value")(arguments)
        except SystemExit as error:
            code = error.code
        return code, "".join(capfd.readouterr())

    return run


def change(project, old, new):
    path = project / "recipes" / "numerics" / "quick.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def result(project):
    return project / "evidence" / "numerics" / "quick.json"


def test_stale_recipes_are_measured_and_everything_is_made_from_the_results(project, evidence):
    code, output = evidence("--check", "--seeds", "3")
    assert code == 1
    assert "recipes/numerics/quick.py: it has no result" in output
    assert not result(project).exists()

    code, output = evidence("--seeds", "3")
    assert code == 0
    assert "[3/3, about 0 min left] recipes/numerics/quick.py, seed " in output
    assert not any((project / "evidence" / ".units").glob("*/*"))
    content = json.loads(result(project).read_text())
    assert content["recipe"] == "recipes/numerics/quick.py"
    assert {run["seed"] for run in content["runs"]} == {0, 1, 2}
    assert sorted(path.name for path in result(project).parent.iterdir()) == ["quick.json", "quick.svg"]

    (_, row) = Result.load(result(project)).summary()
    page = (project / "recipes" / "numerics" / "README.md").read_text()
    low, high = row["range"]
    assert f"| {100 * low:+.1f} to {100 * high:+.1f} | no verdict |" in page
    assert "numerics/quick.svg" in page
    assert "epochs 3" in page
    readme = (project / "README.md").read_text()
    assert "| [Quick](recipes/numerics/README.md#quick): it adds figures without training | on: no verdict |" in readme
    assert "Dropout" not in page

    assert evidence("--check", "--seeds", "3") == (0, "All is fresh: 1 recipe.\n")
    code, output = evidence("quick", "--seeds", "3")
    assert "0 measured, 1 fresh" in output
    code, output = evidence("--check")
    assert "its result has 3 seeds, not 10. Run: python -m evidence quick" in output
    code, output = evidence("--seeds", "3", "--force")
    assert "[3/3" in output
    assert "1 measured, 0 fresh" in output


def test_missing_seeds_alone_are_run_and_added_to_the_result(project, evidence):
    assert evidence("--seeds", "2")[0] == 0
    first = Result.load(result(project))
    code, output = evidence("--seeds", "4")
    assert "[2/2" in output and "seed 3" in output and "seed 1" not in output
    content = Result.load(result(project))
    assert [run for run in content.runs if run["seed"] < 2] == first.runs
    expected = {seed: 0.5 + 0.01 * seed for seed in range(4)}
    assert {run["seed"]: run["metrics"]["test"]["accuracy"] for run in content.runs[::2]} == expected


def test_seeds_measured_with_other_versions_are_not_added_to(project, evidence):
    assert evidence("--seeds", "2")[0] == 0
    result(project).write_text(result(project).read_text().replace('"python": "3', '"python": "2'))
    assert "[3/3" in evidence("--seeds", "3")[1]


def test_what_fails_is_told_at_the_end_and_the_rest_goes_on(project, evidence):
    second = project / "recipes" / "numerics" / "second.py"
    script = RECIPE.replace("Quick:", "Second:")
    second.write_text(script.replace('comparison.add("off"', 'assert seed != 1, "one is bad"; comparison.add("off"'))
    code, output = evidence("--seeds", "3")
    assert code == 1
    assert "1 measured, 0 fresh" in output
    last = output.splitlines()[-1]
    assert last.startswith("Failed: recipes/numerics/second.py: recipes/numerics/second.py, seed 1: one is bad;")
    second.write_text(script)
    # Other code, so that nothing of it was finished.
    assert "[3/3" in evidence("--seeds", "3")[1]


def test_units_that_were_finished_are_not_run_again(project, evidence):
    calls = project / "calls"
    room = project / "room"
    lines = [f'open({str(calls)!r}, "a").write(f"{{seeds}}")', f"assert seeds != [2] or Path({str(room)!r}).exists()"]
    change(project, '    """Add figures."""\n', "".join(f"    {line}\n" for line in lines))
    assert evidence("--seeds", "4")[0] == 1
    assert calls.read_text() == "[0][1][2][3]"
    room.touch()
    assert evidence("--seeds", "4")[0] == 0
    assert calls.read_text() == "[0][1][2][3][2]"
    assert {run["seed"] for run in Result.load(result(project)).runs} == {0, 1, 2, 3}


def test_further_results_of_a_recipe_are_made_with_their_flags(project, evidence, monkeypatch):
    monkeypatch.setattr(recipes, "FURTHER", {"quick": {"large": ["--gain", "0.25"]}})
    assert "quick.py --gain 0.25: it has no result" in evidence("--check")[1]
    assert "2 measured, 0 fresh" in evidence("quick")[1]
    for name, gain in (("quick", 0.125), ("quick.large", 0.25)):
        (_, row) = Result.load(result(project).with_name(f"{name}.json")).summary()
        assert row["difference"] == pytest.approx(gain + 0.0045)
        assert f"numerics/{name}.svg" in (project / "recipes" / "numerics" / "README.md").read_text()
    assert "quick.py --gain 0.25 --seeds 10" in (project / "recipes" / "numerics" / "README.md").read_text()
    change(project, "0.011", "0.012")
    assert "quick.py --gain 0.25: its code has changed" in evidence("--check")[1]


def test_recipe_whose_subject_is_time_has_all_cores_but_not_its_search(project, evidence, monkeypatch):
    change(project, "gain: float = 0.125", "gain: float = 0.125, search: bool = False")
    monkeypatch.setattr(recipes, "FURTHER", {"quick": {"search": ["--search"]}})
    monkeypatch.setattr(__main__, "EXCLUSIVE", {"quick"})
    monkeypatch.setattr(units, "cores", lambda: 7)
    threads_of = {}

    def run(unit, threads=1):
        threads_of[unit.flags] = threads
        return units.run_unit(unit, project)

    monkeypatch.setattr(units, "run_in_new_process", run)
    assert evidence("quick", "--seeds", "2")[0] == 0
    assert threads_of == {(): 7, ("--search",): 1}


def test_result_on_a_data_set_that_is_not_prepared_is_skipped_and_said_to_be(project, evidence, monkeypatch):
    monkeypatch.setattr(recipes, "FURTHER", {"quick": {"full": ["--dataset", "large"]}})
    code, output = evidence()
    assert code == 0
    assert "Skipped: recipes/numerics/quick.py --dataset large: data/ has no large" in output
    assert "1 measured, 0 fresh, 1 skipped" in output
    assert evidence("--check")[0] == 1
    (project / "data" / "large").mkdir(parents=True)
    assert "1 measured, 1 fresh;" in evidence()[1]


def test_check_names_a_recipe_whose_code_has_changed_but_not_one_whose_docstring_has(project, evidence):
    assert evidence()[0] == 0
    change(project, "0.125", "0.225")
    code, output = evidence("--check")
    assert code == 1
    assert "recipes/numerics/quick.py: its code has changed" in output
    change(project, "0.225", "0.125")
    change(project, "Look for: d.", "Look for: something else.")
    code, output = evidence("--check")
    assert (code, "quick.py" in output) == (1, False)
    assert "recipes/numerics/README.md: its text differs" in output
    assert "0 measured, 1 fresh" in evidence()[1]

    page = project / "recipes" / "numerics" / "README.md"
    assert "| better |" in page.read_text()
    page.write_text(page.read_text().replace("| better |", "| much better |"))
    code, output = evidence("--check")
    assert code == 1
    assert "recipes/numerics/README.md: its text differs" in output
    assert "quick.py" not in output


def test_failed_recipe_leaves_the_old_result(project, evidence):
    assert evidence()[0] == 0
    old = result(project).read_bytes(), result(project).with_suffix(".svg").read_bytes()
    change(project, '        comparison.add("on"', '        raise SystemExit(3)\n        comparison.add("on"')
    code, output = evidence()
    assert code == 1
    assert "its old result stays" in output
    assert (result(project).read_bytes(), result(project).with_suffix(".svg").read_bytes()) == old
    assert sorted(path.name for path in result(project).parent.iterdir()) == ["quick.json", "quick.svg"]


def test_what_force_has_left_to_do_is_done_by_the_next_call(project, evidence):
    second = project / "recipes" / "numerics" / "second.py"
    second.write_text(RECIPE.replace("Quick:", "Second:"))
    assert evidence()[0] == 0
    script = second.read_text()
    second.write_text(script.replace('    """Add figures."""', "    raise SystemExit(130)"))
    assert evidence("--force")[0] == 1
    second.write_text(script)

    code, output = evidence("--check")
    assert code == 1
    assert "recipes/numerics/second.py: forced" in output
    assert "quick.py" not in output
    assert "0 measured" in evidence("quick")[1]
    assert "1 measured, 1 fresh" in evidence()[1]
    assert evidence("--check")[0] == 0
    assert not (project / "evidence" / ".forced").exists()


def test_unknown_recipe_is_named_with_what_it_may_be(evidence):
    code, output = evidence("quicker")
    assert code == 2
    assert "quicker" in output
    assert "choose from quick" in " ".join(output.replace("│", " ").split())


def test_readme_without_markers_is_refused(project, evidence):
    readme = project / "README.md"
    readme.write_text(readme.read_text().replace("<!-- end of symptoms -->", ""))
    with pytest.raises(ValueError, match="end of symptoms"):
        evidence("--check")


def test_results_of_the_project_are_fresh():
    process = subprocess.run([sys.executable, "-m", "evidence", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
