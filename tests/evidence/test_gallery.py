"""The README's texts about the callbacks. Those about recipes are tested with the command, in `test_main.py`."""

import json
import shutil

import pytest

import callbacks
from evidence.gallery import generated_files
from evidence.recipes import ROOT

RESULT = {
    "environment": {"python": "3.11.0", "keras": "3.15.0", "backend": "tensorflow 2.21.0", "processor": "abacus"},
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
    "environment": RESULT["environment"],
    "batch_size": 128,
    "steps": 63,
    "epochs": 5,
    "speeds": {"dense": {"our fit": [2000, 3000, 4000], "loop by hand": [1000, 2000, 4000]}},
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "evidence").mkdir()
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def readme(root):
    return generated_files(root)[root / "README.md"]


def test_costs_are_those_of_the_saved_measurement(root):
    assert "Nothing has been measured yet." in readme(root)
    path = root / "evidence" / "overhead.json"
    path.write_text(json.dumps(RESULT))
    text = readme(root)
    assert "| callback | kind | dense, default | dense, XLA | ms when an epoch ends |" in text
    assert "| GradientNorms | monitor | 1.020 (1.010–1.030) | 1.250 (1.250–1.500) | 1.25 |" in text
    assert "3 epochs of 63 steps of 128 images; Keras 3.15.0 on tensorflow 2.21.0, Python 3.11.0; abacus." in text
    (root / "README.md").write_text(text)
    assert readme(root) == text
    path.write_text(json.dumps(RESULT).replace("4.12", "4.16"))
    assert readme(root) != text


def test_speeds_are_those_of_the_saved_measurement(root):
    (root / "evidence" / "speed.json").write_text(json.dumps(SPEED))
    text = readme(root)
    assert "| network | our fit, images/s | relative to loop by hand |" in text
    assert "| dense | 3,000 | 1.50 (1.00–2.00) |" in text
    assert "Medians (quartiles) of 3 rounds of 5 epochs of 63 steps of 128 images; Keras 3.15.0" in text


def test_every_callback_is_listed_with_the_first_line_of_its_docstring(root):
    lines = readme(root).splitlines()
    for name in callbacks.__all__:
        (line,) = [line for line in lines if line.startswith(f"- [`{name}`](callbacks/")]
        assert line.endswith(getattr(callbacks, name).__doc__.splitlines()[0])


def test_findings_of_training_doctor_are_counted_from_the_saved_runs(root):
    gallery = root / "evidence" / "README.md"
    assert "## What TrainingDoctor finds\n\nNot measured yet." in generated_files(root)[gallery]
    runs = [("healthy", "dense", 20, []), ("sick", "dead units", 21, ["dead units", "stuck at chance"])]
    runs += [("sick", "dead units", 22, []), ("program", "reviews, faulty", 20, ["overfitting"])]
    result = {
        "environment": RESULT["environment"],
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
    text = generated_files(root)[gallery]
    assert "| nothing: first fit | 1 | – | – |" in text
    assert "| dead units | 2 | 1 | stuck at chance 1 |" in text
    assert "| reviews: words of reviews | by heart | overfitting 1 | exact | – |" in text
    assert "Seeds from 20 on;" in text
