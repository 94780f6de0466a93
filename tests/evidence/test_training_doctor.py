import json

import pytest
from keras import layers

from callbacks.training_doctor import RECIPES
from evidence import training_doctor


def test_every_finding_has_sick_runs():
    assert list(training_doctor.SICK) == list(RECIPES)


def test_runs_are_counted_by_what_was_named():
    runs = [("healthy", []), ("healthy", ["overfitting"]), ("dead units", ["dead units", "overfitting"])]
    result = {"runs": [{"kind": kind, "findings": findings} for kind, findings in runs]}
    assert training_doctor.table(result) == {
        "what is wrong": ["nothing", "dead units"],
        "runs": ["2", "1"],
        "named": ["–", "1"],
        "also named": ["overfitting 1", "overfitting 1"],
    }


def test_healthy_runs_are_of_three_architectures():
    kinds = (layers.Conv2D, layers.GRU, layers.Dropout)
    found = [
        {kind for kind in kinds if any(isinstance(layer, kind) for layer in training_doctor.healthy(seed)[0].layers)}
        for seed in range(3)
    ]
    assert found == [{layers.Dropout}, {layers.Conv2D}, {layers.GRU}]


def test_result_is_saved_and_shown(tmp_path, monkeypatch, capsys):
    few = {kind: training_doctor.SICK[kind] for kind in ("inputs out of range", "loss not finite")}
    monkeypatch.setattr(training_doctor, "SICK", few)
    images, labels = (part[:64] for part in training_doctor.load()[0])
    monkeypatch.setattr(training_doctor, "load", lambda: [(images, labels)] * 2)
    training_doctor.main(first_seed=7, seeds=1, save=tmp_path / "doctor.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    result = json.loads((tmp_path / "doctor.json").read_text(), parse_constant=refuse)
    assert [(run["kind"], run["seed"]) for run in result["runs"]] == [("healthy", 7), *((kind, 7) for kind in few)]
    by_kind = {run["kind"]: run for run in result["runs"]}
    assert "inputs out of range" in by_kind["inputs out of range"]["findings"]
    assert by_kind["inputs out of range"]["signs"]["input_deviation"] == pytest.approx(images.std(), rel=0.2)
    assert "What TrainingDoctor found" in capsys.readouterr().out
