"""The command `python -m evidence`, in a copy of the project with a recipe that needs no training."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from callbacks import Comparison
from evidence.recipes import ROOT

RECIPE = '''"""Quick: it adds figures without training.

Symptom: a | b.

Technique: b.

Change: c.

Look for: d.

Cost: e.

Source: f.
"""

import argparse

from callbacks import Comparison

parser = argparse.ArgumentParser()
parser.add_argument("--seeds", type=int)
parser.add_argument("--save")
arguments = parser.parse_args()

with Comparison(baseline="off", metric="accuracy", save=arguments.save, settings={"epochs": 3}) as comparison:
    for seed in range(arguments.seeds):
        comparison.add("off", seed, {"accuracy": 0.5 + 0.01 * seed})
        comparison.add("on", seed, {"accuracy": 0.625 + 0.011 * seed})
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


def evidence(project, *arguments):
    environment = os.environ | {"PYTHONPATH": str(project)}
    return subprocess.run(
        [sys.executable, "-m", "evidence", *arguments], cwd=project, env=environment, capture_output=True, text=True
    )


def change(project, old, new):
    path = project / "recipes" / "numerics" / "quick.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def result(project):
    return project / "evidence" / "numerics" / "quick.json"


def test_stale_recipes_are_measured_and_everything_is_made_from_the_results(project):
    before = evidence(project, "--check", "--seeds", "3")
    assert before.returncode == 1
    assert "recipes/numerics/quick.py: it has no result" in before.stdout
    assert not result(project).exists()

    run = evidence(project, "--seeds", "3")
    assert run.returncode == 0, run.stderr
    assert "[1/1] recipes/numerics/quick.py" in run.stdout
    content = json.loads(result(project).read_text())
    assert content["recipe"] == "recipes/numerics/quick.py"
    assert {run["seed"] for run in content["runs"]} == {0, 1, 2}
    assert sorted(path.name for path in result(project).parent.iterdir()) == ["quick.json", "quick.svg"]

    (_, row) = Comparison.load(result(project)).summary()
    gallery = (project / "evidence" / "README.md").read_text()
    readme = (project / "README.md").read_text()
    for text in (gallery, readme):
        assert "| on |" in text
        assert f"+{row['difference']:.4f} ± {row['difference_half_width']:.4f}" in text
        assert "numerics/quick.svg" in text
    assert "epochs 3" in gallery
    assert r"| a \| b. | [Quick](recipes/numerics/quick.py) |" in readme
    assert "Dropout" not in gallery

    assert evidence(project, "--check", "--seeds", "3").returncode == 0
    again = evidence(project, "--seeds", "3")
    assert "0 measured, 1 fresh" in again.stdout
    assert "1 measured, 0 fresh" in evidence(project, "--seeds", "3", "--force").stdout
    assert "its result has 3 seeds, not 5" in evidence(project, "--check").stdout


def test_check_names_a_recipe_whose_code_has_changed_but_not_one_whose_docstring_has(project):
    assert evidence(project).returncode == 0
    change(project, "0.625", "0.725")
    check = evidence(project, "--check")
    assert check.returncode == 1
    assert "recipes/numerics/quick.py: its code has changed" in check.stdout
    change(project, "0.725", "0.625")
    change(project, "Look for: d.", "Look for: something else.")
    check = evidence(project, "--check")
    assert check.returncode == 0
    assert "quick.py" not in check.stdout


def test_check_notices_text_that_was_typed_by_hand(project):
    assert evidence(project).returncode == 0
    readme = project / "README.md"
    readme.write_text(readme.read_text().replace("| better |", "| much better |"))
    check = evidence(project, "--check")
    assert check.returncode == 1
    assert "README.md: its generated text differs" in check.stdout
    assert "quick.py" not in check.stdout


def test_failed_recipe_leaves_the_old_result(project):
    assert evidence(project).returncode == 0
    old = result(project).read_bytes(), result(project).with_suffix(".svg").read_bytes()
    change(project, '        comparison.add("on"', '        raise SystemExit(3)\n        comparison.add("on"')
    run = evidence(project)
    assert run.returncode == 3
    assert "its old result stays as it was" in run.stderr
    assert (result(project).read_bytes(), result(project).with_suffix(".svg").read_bytes()) == old
    assert sorted(path.name for path in result(project).parent.iterdir()) == ["quick.json", "quick.svg"]


def test_unknown_recipe_is_one_clear_line(project):
    run = evidence(project, "quicker")
    assert run.returncode == 2
    assert "quicker" in run.stderr
    assert "choose from quick" in run.stderr


def test_readme_without_markers_is_refused(project):
    readme = project / "README.md"
    readme.write_text(readme.read_text().replace("<!-- end of symptoms -->", ""))
    run = evidence(project)
    assert run.returncode == 1
    assert "end of symptoms" in run.stderr.splitlines()[-1]
