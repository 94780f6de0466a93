import json

import numpy as np
import pytest
from keras import layers

from callbacks.training_doctor import RULES
from evidence import tables, training_doctor
from evidence.faulty_programs import PROGRAMS

ENVIRONMENT = {"keras": "3.15.1", "backend": "tensorflow 2.21.0", "python": "3.11.7", "processor": "AMD EPYC, 2 cores"}
ADVICE, FAULT, SYMPTOM = "advice", "fault", "symptom"


def run(group, kind, *findings, seed=100, fit=None):
    named = [[name, level, "so it is."] for name, level in findings]
    return {"group": group, "kind": kind, "seed": seed, "fit": fit, "findings": named, "signs": {}}


RUNS = [
    run("healthy", "dense, binary, 8", fit="first fit"),
    run("healthy", "dense, binary, 8", ("overfitting", SYMPTOM), ("layers frozen", ADVICE), fit="fine-tuning"),
    run("sick", "dead units", ("dead units", FAULT), ("overfitting", SYMPTOM)),
    run("sick", "layers frozen", ("layers frozen", ADVICE), ("plateau at a constant rate", ADVICE)),
    run("program", "reviews, faulty", ("overfitting", SYMPTOM)),
    run("program", "reviews, faulty", seed=101),
    run("program", "reviews, repaired", ("rate too high", FAULT)),
    run("program", "prices, faulty", ("stuck at chance", SYMPTOM)),
    run("program", "prices, repaired", ("stopped while improving", ADVICE)),
    run("program", "game_of_life, faulty", ("stopped while improving", ADVICE)),
    run("program", "game_of_life, repaired"),
]
RESULT = {"environment": ENVIRONMENT, "programs": training_doctor.facts_of_programs(), "runs": RUNS}


def test_every_finding_has_sick_runs_or_a_program():
    of_programs = {name for program in PROGRAMS.values() for name in (*program.exact, *program.symptoms)}
    unseen = {rule.name for rule in RULES} - of_programs - set(training_doctor.SICK)
    # Told of the probe, or, as symptoms, of what no other rule explains: these have their tests alone.
    assert unseen == {
        "labels all the same",
        "layer does not change",
        "loss oscillates",
        "targets out of the output's range",
    }
    assert {name for program in PROGRAMS.values() for name in (*program.exact, *program.symptoms)} <= {
        rule.name for rule in RULES
    }


def test_runs_are_counted_by_what_was_named():
    assert tables.doctor_table(RESULT) == {
        "what is wrong": [
            "nothing: first fit",
            "nothing: second fit",
            "nothing: fine-tuning",
            "dead units",
            "layers frozen",
        ],
        "runs": ["1", "0", "1", "1", "1"],
        "named": ["–", "–", "–", "1", "1"],
        "also named": ["–", "–", "overfitting 1", "overfitting 1", "–"],
    }


def test_programs_are_judged_by_the_worse_of_their_runs():
    table = tables.program_table(RESULT)
    assert [name.partition(":")[0] for name in table["program"]] == ["game_of_life", "reviews", "prices"]
    assert table["verdict"] == ["exact", "miss", "symptom"]
    assert table["said of it"] == ["(advice: stopped while improving 1)", "overfitting 1", "stuck at chance 1"]
    assert table["said of the repaired one"] == ["–", "rate too high 1", "–"]
    note = tables.doctor_note(RESULT)
    assert note.startswith("Of 3 programs 1 are named exactly, of 1 a symptom is, and 1 are missed")
    assert "1 of the repaired ones are" in note
    assert "Of 2 healthy runs 1 are." in note


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_can_be_built_and_its_probe_taken(name):
    for repaired in (False, True):
        built = PROGRAMS[name].build(repaired)
        assert len(built.inputs[built.probe]) == len(built.targets[built.probe]) >= 4
        assert built.model.optimizer is not None


def test_healthy_runs_are_of_three_architectures_tasks_batch_sizes_and_fits():
    kinds = [kind for group, kind, _ in training_doctor.units(training_doctor.SEEDS) if group == "healthy"]
    assert len(kinds) == 20 * len(set(kinds)) == 20 * 27
    made = [build() for build in training_doctor.ARCHITECTURES.values()]
    for kind, stack in zip((layers.Dropout, layers.Conv2D, layers.GRU), made, strict=True):
        assert any(isinstance(layer, kind) for layer in stack)


def test_units_go_seed_by_seed_so_that_an_unfinished_measurement_has_all_kinds():
    units = training_doctor.units({"healthy": 2, "sick": 1, "program": 1})
    assert len(units) == len(set(units))
    assert [seed for _, _, seed in units] == sorted(seed for _, _, seed in units)


def test_interrupted_measurement_goes_on_and_its_result_is_shown(tmp_path, monkeypatch, capsys):
    few = {kind: training_doctor.SICK[kind] for kind in ("inputs out of range", "loss not finite")}
    monkeypatch.setattr(training_doctor, "SICK", few)
    monkeypatch.setattr(training_doctor, "PROGRAMS", {"exclusive_or": PROGRAMS["exclusive_or"]})
    monkeypatch.setattr(training_doctor, "TASKS", {})
    images, labels = (part[:64] for part in training_doctor.load()[0])
    monkeypatch.setattr(training_doctor, "load", lambda: [(images, labels)] * 2)
    measured = []
    measure = training_doctor.measure

    def measure_two(*unit):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(unit[:3])
        if unit[0] == "program":
            return [run(*unit[:2], seed=unit[2])]
        return measure(*unit)

    monkeypatch.setattr(training_doctor, "measure", measure_two)
    save = tmp_path / "doctor.json"
    with pytest.raises(KeyboardInterrupt):
        training_doctor.main(seeds=1, save=save)
    assert not save.exists()
    measured.pop(0)
    with pytest.raises(KeyboardInterrupt):
        training_doctor.main(seeds=1, save=save)
    measured.clear()
    training_doctor.main(seeds=1, save=save)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    result = json.loads(save.read_text(), parse_constant=refuse)
    kinds = [run["kind"] for run in result["runs"]]
    assert kinds == [*few, "exclusive_or, faulty", "exclusive_or, repaired"]
    by_kind = {run["kind"]: run for run in result["runs"]}
    assert "inputs out of range" in tables.told(by_kind["inputs out of range"])
    assert by_kind["inputs out of range"]["signs"]["input_deviation"] == pytest.approx(np.std(images[:64]), rel=0.2)
    assert "What TrainingDoctor found" in capsys.readouterr().out
