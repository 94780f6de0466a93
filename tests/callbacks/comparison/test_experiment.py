import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from callbacks import Comparison
from callbacks.comparison import Result
from callbacks.comparison.experiment import environment
from evidence.recipes import ROOT
from tests.callbacks.comparison.conftest import (
    TEST,
    TRAIN,
    VALIDATION,
    build_model,
    fit,
    new_comparison,
    with_figures,
)

DROPOUT = {"a": 0.0, "b": 0.5}


def run_all(comparison, variants=DROPOUT, seeds=2, epochs=1, stop_at=None, **arguments):
    """Run the loop of a recipe; raise KeyboardInterrupt before the run number `stop_at`, counted from 0."""
    made = []
    with comparison:
        for variant, rate, run in comparison.runs(variants, seeds):
            if len(made) == stop_at:
                raise KeyboardInterrupt
            made.append((variant, run.seed))
            fit(build_model(rate), run, epochs=epochs, **arguments)
    return made


def figures(result):
    """Return what of every run must repeat itself to the bit."""
    return {(run["variant"], run["seed"]): (run["metrics"], run["curve"]) for run in result.runs}


# The loop


def test_loop_gives_every_variant_of_every_seed_and_seeds_it(weights_at_start):
    comparison, expected = new_comparison(), []
    with comparison:
        for variant, rate, run in comparison.runs(DROPOUT, seeds=[3, 7]):
            model = build_model(rate)
            keras.utils.set_random_seed(run.seed)
            again = build_model(rate)
            for weight, other in zip(model.get_weights(), again.get_weights(), strict=True):
                np.testing.assert_array_equal(weight, other)
            assert rate == DROPOUT[variant]
            expected.append((variant, run.seed))
            fit(model, run, weights_at_start)
    assert expected == [("a", 3), ("b", 3), ("a", 7), ("b", 7)]
    assert [(run["variant"], run["seed"]) for run in comparison.result.runs] == expected
    assert comparison.baseline == "a"
    first, second, third, fourth = weights_at_start.starts
    for start, other in ((first, second), (third, fourth)):
        assert all(map(np.array_equal, start, other))
    assert not np.array_equal(first[0], third[0])


@pytest.mark.parametrize("seeds", [0, -1, 2.5, "3", [], [1, 1], [0.5], [-1], True, None, ["a"]])
def test_seeds_are_a_number_or_different_numbers(seeds):
    with pytest.raises(ValueError, match="seeds must be a positive integer, or different integers"):
        next(new_comparison().runs(DROPOUT, seeds))


def test_integers_of_numpy_are_integers():
    comparison = new_comparison()
    assert run_all(comparison, seeds=np.arange(2)) == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert json.loads(comparison.result.to_json())["runs"][0]["seed"] == 0


def test_body_that_makes_no_run_is_told_so():
    with pytest.raises(ValueError, match=r"made no run of 'a' with seed 0.*callbacks=\[run\]"):
        for _, rate, _ in new_comparison().runs(DROPOUT, 1):
            fit(build_model(rate))


def test_one_training_can_serve_several_variants():
    comparison, rounds = new_comparison(), []
    for variant, _, run in comparison.runs(DROPOUT, 2):
        rounds.append((variant, run.seed))
        for name in DROPOUT:
            comparison.add(name, run.seed, {"accuracy": 0.5})
    assert rounds == [("a", 0), ("a", 1)]
    assert len(comparison.result.runs) == 4


@pytest.mark.parametrize("variants", [{}, ["a", "b"], None])
def test_variants_are_a_dict(variants):
    with pytest.raises(ValueError, match="variants must be a dict"):
        next(new_comparison().runs(variants, 1))


def test_baseline_must_be_among_the_variants():
    with pytest.raises(ValueError, match="baseline 'plain' is not among the variants"):
        next(new_comparison(baseline="plain").runs(DROPOUT, 1))
    comparison = new_comparison(baseline="b")
    run_all(comparison)
    assert comparison.summary()[0]["variant"] == "b"


def test_names_that_are_no_strings_are_known_by_their_text(tmp_path):
    comparison = new_comparison(save=tmp_path / "name")
    run_all(comparison, variants={0: 0.0, 0.5: 0.5, ("tuple", 1): 0.1})
    assert comparison.table()["variant"] == ["0", "0.5", "('tuple', 1)"]
    assert Result.load(tmp_path / "name.json").summary() == comparison.summary()
    comparison.add_figure(0.5, 0, "rate", 0.5)
    assert comparison.summary()[1]["figures"] == {"rate": 0.5}


def test_names_that_would_be_shown_alike_are_refused():
    with pytest.raises(ValueError, match="1 and '1' would be shown alike"):
        next(new_comparison().runs({1: 0.0, "1": 0.5}, 1))
    comparison = new_comparison()
    comparison.add(1, 0, {"accuracy": 0.5})
    with pytest.raises(ValueError, match="1 and '1' would be shown alike"):
        comparison.add("1", 1, {"accuracy": 0.5})


# The search


def search(comparison, variants, grid, rates=None, **arguments):
    with comparison:
        for variant, value, run in comparison.search(variants, grid, **arguments):
            rate = value[-1] if isinstance(value, tuple) else value
            model = keras.Sequential([keras.Input((4,)), layers.Dense(1, "sigmoid")])
            model.compile(keras.optimizers.SGD(rate), "binary_crossentropy", metrics=["accuracy"], run_eagerly=True)
            fit(model, run)
            comparison.add_figure(variant, run.seed, "rate", rate)
            comparison.add_signal(variant, run.seed, "rate", [rate])
            if rates is not None:
                rates.append((variant, run.seed, value, float(model.optimizer.learning_rate)))
    return comparison


def test_search_trains_every_rate_on_validation_data_only(monkeypatch):
    uses, rates = [], []
    evaluate = keras.Model.evaluate

    def spy(self, x=None, *arguments, **keywords):
        uses.append(x)
        return evaluate(self, x, *arguments, **keywords)

    monkeypatch.setattr(keras.Model, "evaluate", spy)
    comparison = new_comparison(train=TRAIN, validation=VALIDATION)
    search(comparison, {"a": 0.5, "b": ({"momentum": 0.9}, 0.5)}, [0.01, 1.0], rates, seeds=2)
    assert all(x is VALIDATION[0] for x in uses)
    assert [rate[:3] for rate in rates[:4]] == [
        ("a", 0, 0.01),
        ("a", 0, 1.0),
        ("b", 0, ({"momentum": 0.9}, 0.01)),
        ("b", 0, ({"momentum": 0.9}, 1.0)),
    ]
    assert len(rates) == 8
    assert comparison.result.split == "validation"
    assert comparison.result.figures == comparison.result.signals == []
    # Both variants train alike, so the first seed's accuracies are equal, rate by rate.
    by_key = {
        (run["variant"], run["seed"], run["rate"]): run["metrics"]["validation"]["accuracy"]
        for run in comparison.result.runs
    }
    means = comparison.result.search_summary()[1]["means"]
    for rate in (0.01, 1.0):
        assert by_key["a", 0, rate] == by_key["b", 0, rate]
        assert means[rate] == pytest.approx((by_key["b", 0, rate] + by_key["b", 1, rate]) / 2)


def test_search_needs_validation_data_and_a_grid():
    with pytest.raises(ValueError, match="pass validation="):
        next(new_comparison().search({"a": 0.1}, [0.1]))
    for grid in ([], [0.1, 0.1], [np.nan]):
        with pytest.raises(ValueError, match="grid must hold different numbers"):
            next(new_comparison(validation=VALIDATION).search({"a": 0.1}, grid))


def test_search_is_saved_and_goes_on(tmp_path):
    whole = search(new_comparison(validation=VALIDATION), {"a": 0.1}, [0.01, 1.0], seeds=2)
    first = new_comparison(validation=VALIDATION, save=tmp_path / "name")
    search(first, {"a": 0.1}, [0.01, 1.0], seeds=1)
    rates = []
    second = search(
        new_comparison(validation=VALIDATION, save=tmp_path / "name"), {"a": 0.1}, [0.01, 1.0], rates, seeds=2
    )
    assert [rate[1] for rate in rates] == [1, 1]
    assert second.result.search_summary() == whole.result.search_summary()
    # Nobody goes on from the start of a seed that is complete.
    assert Result.load(tmp_path / "name.json").start is None
    # The variant's own rate is none of the search's.
    search(new_comparison(validation=VALIDATION, save=tmp_path / "name"), {"a": 1.0}, [0.01, 1.0], rates, seeds=2)
    assert len(rates) == 2
    with pytest.raises(ValueError, match="grid: "):
        run_all(new_comparison(validation=VALIDATION, save=tmp_path / "name"))


# Fairness


def test_variants_of_a_seed_start_equal_in_loops_of_ones_own(weights_at_start):
    comparison = new_comparison()
    for seed in range(2):
        for variant, rate in DROPOUT.items():
            # Built from unequal seeds, so that they would start unequal.
            keras.utils.set_random_seed(10 * seed + ord(variant))
            fit(build_model(rate), comparison.run(variant, seed), weights_at_start)
    first, second, third, fourth = weights_at_start.starts
    assert all(map(np.array_equal, first, second)) and all(map(np.array_equal, third, fourth))
    assert not np.array_equal(first[0], third[0])


def test_variants_of_unequal_shape_must_be_declared():
    comparison = new_comparison()
    fit(build_model(units=3), comparison.run("a", 0))
    with pytest.raises(ValueError, match="same_start=False"):
        fit(build_model(units=5), comparison.run("b", 0))
    comparison = new_comparison(same_start=False)
    fit(build_model(units=3), comparison.run("a", 0))
    fit(build_model(units=5), comparison.run("b", 0))
    assert len(comparison.summary()) == 2


def test_model_of_an_earlier_run_is_refused():
    comparison = new_comparison(pretrained=True)
    model = build_model()
    fit(model, comparison.run("a", 0))
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    with pytest.raises(ValueError, match="as 'a', seed 0.*Build and compile a new model for every run"):
        fit(model, comparison.run("b", 0))


@pytest.mark.parametrize("compiled_again", [False, True])
def test_model_trained_elsewhere_is_refused(compiled_again):
    model = build_model()
    fit(model)
    if compiled_again:
        model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    with pytest.raises(ValueError, match="trained already.*Build and compile a new model for every run"):
        fit(model, new_comparison().run("a", 0))


def test_one_trained_layer_is_enough_to_be_refused():
    trained, model = build_model(), build_model()
    fit(trained)
    model.layers[1].set_weights(trained.layers[1].get_weights())
    with pytest.raises(ValueError, match="kernel' is not as its initializer makes it"):
        fit(model, new_comparison().run("a", 0))


def test_trained_weights_on_purpose_are_left_as_they_are(weights_at_start):
    trained = build_model()
    fit(trained, epochs=3)
    comparison = new_comparison(pretrained=True)
    for name in "ab":
        model = build_model()
        model.layers[1].set_weights(trained.layers[1].get_weights())
        fit(model, comparison.run(name, 0), weights_at_start)
    for start in weights_at_start.starts:
        np.testing.assert_array_equal(start[0], trained.layers[1].kernel)
    # The new head starts equal.
    np.testing.assert_array_equal(*[start[2] for start in weights_at_start.starts])


@pytest.mark.parametrize("same_start", [True, False])
def test_variants_that_start_from_other_trained_weights_must_be_declared(same_start):
    comparison = new_comparison(pretrained=True, same_start=same_start)
    fit(build_model(), comparison.run("scratch", 0))
    model = build_model()
    fit(model)
    before = model.layers[1].get_weights()
    if same_start:
        with pytest.raises(ValueError, match="starts from other trained weights.*same_start=False"):
            fit(model, comparison.run("pretrained", 0))
    else:
        model.optimizer.learning_rate = 0.0
        fit(model, comparison.run("pretrained", 0))
    for weight, expected in zip(model.layers[1].get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


@pytest.mark.parametrize("pretrained", [False, True])
@pytest.mark.parametrize("same_start", [False, True])
def test_weights_that_a_callback_restores_are_no_start(pretrained, same_start, tmp_path):
    class Crash(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise MemoryError

    def backup():
        return keras.callbacks.BackupAndRestore(tmp_path, delete_checkpoint=False)

    keras.utils.set_random_seed(0)
    with pytest.raises(MemoryError):
        fit(build_model(), backup(), Crash(), epochs=3)
    keras.utils.set_random_seed(0)
    comparison = new_comparison(pretrained=pretrained, same_start=same_start)
    with pytest.raises(ValueError, match="a callback gave the model other weights.*save=NAME goes on by itself"):
        fit(build_model(), backup(), comparison.run("a", 0), epochs=3)
    assert comparison.result.runs == []


def test_run_that_begins_late_is_refused():
    with pytest.raises(ValueError, match="would begin at epoch 2"):
        fit(build_model(), new_comparison().run("a", 0), epochs=3, initial_epoch=2)


def test_builder_with_a_seed_of_its_own_is_noticed():
    comparison = new_comparison()
    with pytest.raises(
        ValueError, match="'a' starts with seed 1 from the very weights that it started from with seed 0"
    ):
        for _, rate, run in comparison.runs(DROPOUT, 3):
            keras.utils.set_random_seed(42)
            fit(build_model(rate), run)


def test_one_variant_with_a_seed_of_its_own_is_noticed_though_it_gets_the_start_of_the_first():
    comparison = new_comparison()
    with pytest.raises(ValueError, match="'b' starts with seed 1"):
        for variant, rate, run in comparison.runs(DROPOUT, 3):
            if variant == "b":
                keras.utils.set_random_seed(42)
            fit(build_model(rate), run)


def test_training_that_no_seed_changes_gets_no_verdict():
    comparison = new_comparison(metric="loss", margin=0.1)
    for _, rate, run in comparison.runs({"a": 0.1, "b": 0.2}, 5):
        model = keras.Sequential([keras.Input((4,)), layers.Dense(1, "sigmoid", kernel_initializer="zeros")])
        model.compile(keras.optimizers.SGD(rate), "binary_crossentropy", metrics=["accuracy"], run_eagerly=True)
        model.fit(*TRAIN, batch_size=48, shuffle=False, epochs=2, verbose=0, callbacks=[run])
    assert comparison.summary()[1]["verdict"] == "no verdict: seeds repeat each other"
    assert any("gave equal figures to the bit" in note for note in comparison.notes())


def test_subclassed_model_without_weights_is_refused():
    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(1, "sigmoid")

        def call(self, x):
            return self.dense(x)

    model = Subclassed()
    model.build((None, 4))
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    if not model.weights and keras.backend.backend() == "tensorflow":
        with pytest.raises(ValueError, match=r"not built.*call model\(x\[:1\]\)"):
            fit(model, new_comparison().run("a", 0))
    model = Subclassed()
    model(TRAIN[0][:1])
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    fit(model, new_comparison().run("a", 0))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere fit builds the model before callbacks")
def test_unbuilt_model_is_refused():
    model = keras.Sequential([layers.Dense(1, "sigmoid")])
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    with pytest.raises(ValueError, match="not built.*keras.Input"):
        fit(model, new_comparison().run("a", 0))


def test_run_sees_what_the_callbacks_after_it_leave():
    class Restore(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            self.model.set_weights([np.zeros_like(weight) for weight in self.model.get_weights()])

    class Log(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            logs["epoch"] = epoch

    for wrap in (list, lambda callbacks: callbacks[::-1]):
        comparison = new_comparison(metric="loss")
        run = comparison.run("a", 0)
        model = build_model()
        model.fit(*TRAIN, epochs=2, verbose=0, callbacks=wrap([run, Restore(), Log()]))
        # All-zero weights give the probability one half to every example.
        assert comparison.result.runs[0]["metrics"]["test"]["loss"] == pytest.approx(np.log(2))
        assert comparison.result.runs[0]["curve"]["epoch"] == [0, 1]


def test_seed_counts_once_for_each_variant():
    comparison = new_comparison()
    callback = comparison.run("a", 0)
    fit(build_model(), callback)
    assert comparison.finished("a", 0) and not comparison.finished("a", 1)
    for repeat in (lambda: comparison.run("a", 0), lambda: comparison.add("a", 0, {"accuracy": 0.5})):
        with pytest.raises(ValueError, match="'a' was run with seed 0 already"):
            repeat()
    with pytest.raises(ValueError, match="'a' was run with seed 0 already"):
        fit(build_model(), callback)


# What can be known at the beginning


def test_metric_that_the_model_lacks_is_noticed_before_training():
    model = build_model()
    with pytest.raises(ValueError, match=r"'auc' is not among .*compile the model with metrics=\['auc'\]"):
        fit(model, new_comparison(metric="auc").run("a", 0))
    assert int(model.optimizer.iterations) == 0
    with pytest.raises(ValueError, match="'accuracy' is not among"):
        new_comparison().add("a", 0, {"loss": 1.0})


def model_with_f1_score():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, "softmax")])
    model.compile("adam", "categorical_crossentropy", metrics=[keras.metrics.F1Score()])
    return model


def test_metric_that_is_an_array_is_refused_and_one_element_of_it_is_taken():
    data = (TEST[0], np.eye(2)[TEST[1].astype(int)])
    train = (TRAIN[0], np.eye(2)[TRAIN[1].astype(int)])
    model = model_with_f1_score()
    with pytest.raises(ValueError, match=r"'f1_score' is an array.*f1_score\[0\]"):
        model.fit(*train, verbose=0, callbacks=[new_comparison(metric="f1_score", test=data).run("a", 0)])
    assert int(model.optimizer.iterations) == 0
    comparison = new_comparison(metric="f1_score[1]", mode="max", test=data)
    model = model_with_f1_score()
    model.fit(*train, verbose=0, callbacks=[comparison.run("a", 0)])
    expected = np.array(model.evaluate(*data, verbose=0, return_dict=True)["f1_score"])[1]
    assert comparison.result.runs[0]["metrics"]["test"]["f1_score[1]"] == pytest.approx(expected)


def test_metric_of_a_train_step_of_ones_own_is_looked_for_when_the_run_is_finished(tmp_path):
    class Own(keras.Model):
        def test_step(self, *arguments):
            return super().test_step(*arguments)

    inputs = keras.Input((4,))
    model = Own(inputs, layers.Dense(1, "sigmoid")(inputs))
    model.compile("adam", "binary_crossentropy")
    with pytest.raises(ValueError, match="'accuracy' is not among"):
        fit(model, new_comparison(save=tmp_path / "name").run("a", 0))
    assert len(Result.load(tmp_path / "name.json").runs) == 1


def test_metric_is_looked_for_before_training_with_data_set_objects_too():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return TEST

    model = build_model()
    with pytest.raises(ValueError, match="'binary_accuracy' is not among"):
        fit(model, new_comparison(metric="binary_accuracy", test=Batches()).run("a", 0))
    assert int(model.optimizer.iterations) == 0


def test_looking_for_the_metric_leaves_training_as_it_is():
    """Built before `fit`, ScheduleFreeAdamW begins elsewhere than in a graph of TensorFlow (Keras 3.15)."""

    def trained_weights(*callbacks):
        keras.utils.set_random_seed(0)
        model = build_model()
        model.compile(keras.optimizers.ScheduleFreeAdamW(0.01), "binary_crossentropy", metrics=["accuracy"])
        fit(model, *callbacks, shuffle=False)
        return model.get_weights()

    expected = trained_weights()
    with new_comparison() as comparison:
        for _, _, run in comparison.runs({"a": 0}, 1):
            for weight, expected_weight in zip(trained_weights(run), expected, strict=True):
                np.testing.assert_array_equal(weight, expected_weight)


def test_comparison_without_data_to_compare_on_is_refused():
    with pytest.raises(ValueError, match="pass test="):
        new_comparison(test=None).run("a", 0)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"margin": -0.1}, "margin must be a number of at least 0"),
        ({"margin": np.nan}, "margin must be a number of at least 0"),
        ({"evaluate_batch_size": 0}, "evaluate_batch_size must be a positive integer"),
        ({"metric": "speed"}, 'mode="max" or mode="min"'),
        ({"mode": "up"}, "mode must be"),
        ({"test": (TEST[0][:0], TEST[1][:0])}, "The test data hold no examples"),
        ({"train": iter([])}, "The train data are a generator"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        new_comparison(**arguments)


@pytest.mark.parametrize("metric, mode", [("accuracy", "max"), ("loss", "min"), ("mean_absolute_error", "min")])
def test_direction_is_told_by_name(metric, mode):
    assert new_comparison(metric=metric).result.mode == mode


@pytest.mark.parametrize("missing, is_needed", [("seaborn", False), ("pandas", False), ("rich", True), ("scipy", True)])
def test_packages_that_the_report_needs_are_looked_for_at_the_beginning(missing, is_needed, monkeypatch, tmp_path):
    from importlib import util

    find_spec = util.find_spec
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == missing else find_spec(name))
    with pytest.raises(ModuleNotFoundError, match=f"pip install {missing}"):
        new_comparison(save=tmp_path / "name")
    if is_needed:
        with pytest.raises(ModuleNotFoundError, match=f"pip install {missing}"):
            new_comparison()
    else:
        new_comparison()


def test_versions_are_those_of_the_modules(monkeypatch):
    backend = keras.backend.backend()
    other = types.SimpleNamespace(__version__="9.9")
    # A package of another name, such as tensorflow-cpu, holds the module.
    monkeypatch.setitem(sys.modules, backend, other)
    assert environment()["backend"] == f"{backend} 9.9"


# What a run records


def test_run_records_logs_times_data_and_the_figures_of_evaluate():
    comparison = new_comparison(train=TRAIN, validation=VALIDATION)
    model = build_model(rate=0.5)
    history = fit(model, comparison.run("a", 0), epochs=3, validation_data=VALIDATION)
    (run,) = comparison.result.runs
    assert run["curve"] == history.history
    assert len(run["epoch_seconds"]) == 3
    assert min(run["epoch_seconds"]) > 0
    for split, data in {"train": TRAIN, "validation": VALIDATION, "test": TEST}.items():
        assert run["metrics"][split] == pytest.approx(model.evaluate(*data, verbose=0, return_dict=True))
    described = comparison.result.data["train"]
    assert (described["examples"], described["inputs"], described["classes"]) == (48, "4", None)
    assert "epochs" not in run


def test_time_of_an_epoch_is_that_of_its_steps_and_callbacks_without_validation_and_waits(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("callbacks.comparison.experiment.time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def spend(seconds):
        return lambda *_, **__: now.__setitem__(0, now[0] + seconds)

    class Data(keras.utils.PyDataset):
        """Two batches; it waits when an epoch has ended, as TensorFlow's iterators do."""

        on_epoch_end = spend(100)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return tuple(array[8 * index : 8 * index + 8] for array in TRAIN)

    class Spend(keras.callbacks.Callback):
        on_epoch_begin, on_train_batch_begin, on_train_batch_end = spend(1000), spend(1), spend(2)
        on_test_begin, on_epoch_end = spend(10), spend(2000)

    comparison = new_comparison()
    model = build_model()
    model.fit(
        Data(), epochs=2, validation_data=VALIDATION, verbose=0, callbacks=[comparison.run("a", 0), Spend(), Spend()]
    )
    assert comparison.result.runs[0]["epoch_seconds"] == [2 * (1000 + 2 * (1 + 2) + 2000)] * 2


def test_epochs_without_validation_are_known():
    comparison = new_comparison()
    fit(build_model(), comparison.run("a", 0), epochs=5, validation_data=VALIDATION, validation_freq=2)
    (run,) = comparison.result.runs
    assert run["epochs"] == {"val_accuracy": [2, 4], "val_loss": [2, 4]}
    assert len(run["curve"]["val_loss"]) == 2


def test_test_data_is_used_once_at_the_end(monkeypatch):
    uses = []
    evaluate = keras.Model.evaluate

    def spy(self, x=None, *arguments, **keywords):
        uses.append((x is TEST[0], int(self.optimizer.iterations)))
        return evaluate(self, x, *arguments, **keywords)

    monkeypatch.setattr(keras.Model, "evaluate", spy)
    fit(build_model(), new_comparison().run("a", 0), epochs=2, validation_data=VALIDATION)
    steps_of_two_epochs = 2 * 3
    assert [steps for is_test, steps in uses if is_test] == [steps_of_two_epochs]


def test_data_set_objects_and_sample_weights_are_evaluated():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return TEST[0][index::2], TEST[1][index::2]

    weights = np.linspace(0, 1, len(TEST[0]))
    comparison = new_comparison(validation=(*TEST, weights), test=Batches())
    model = build_model()
    fit(model, comparison.run("a", 0))
    found = comparison.result.runs[0]["metrics"]
    assert found["test"] == pytest.approx(model.evaluate(*TEST, verbose=0, return_dict=True))
    probabilities = keras.ops.convert_to_numpy(model(TEST[0]))[:, 0]
    losses = -np.log(np.where(TEST[1] == 1, probabilities, 1 - probabilities))
    assert found["validation"]["loss"] == pytest.approx((weights * losses).sum() / len(losses), rel=1e-4)


@pytest.mark.parametrize("given, expected", [(None, 16), (8, 8)])
def test_evaluation_takes_the_batch_size_of_fit_or_the_one_that_is_given(given, expected, monkeypatch):
    sizes = []
    evaluate = keras.Model.evaluate

    def spy(self, *arguments, batch_size=None, **keywords):
        sizes.append(batch_size)
        return evaluate(self, *arguments, batch_size=batch_size, **keywords)

    monkeypatch.setattr(keras.Model, "evaluate", spy)
    fit(build_model(), new_comparison(evaluate_batch_size=given).run("a", 0))
    assert sizes == [expected]


def test_network_with_a_fixed_batch_size_and_states_is_evaluated():
    comparison = new_comparison()
    # Keras 3.15 cannot train a stateful layer on PyTorch.
    is_stateful = keras.backend.backend() != "torch"
    model = keras.Sequential(
        [
            keras.Input(batch_shape=(16, 4)),
            layers.Reshape((4, 1)),
            layers.LSTM(2, stateful=is_stateful),
            layers.Dense(1, "sigmoid"),
        ]
    )
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    fit(model, comparison.run("a", 0))
    assert len(comparison.result.runs) == 1


def test_without_test_data_the_validation_figure_decides():
    comparison = new_comparison(validation=VALIDATION, test=None)
    model = build_model()
    fit(model, comparison.run("a", 0))
    accuracy = model.evaluate(*VALIDATION, verbose=0, return_dict=True)["accuracy"]
    assert comparison.summary()[0]["mean"] == pytest.approx(accuracy)
    assert "validation accuracy" in comparison.table()


def test_signals_have_one_scale_one_name_and_as_many_places_as_values():
    comparison = with_figures({"a": [0.5]})
    comparison.add_signal("a", 0, "loss", [1.0, np.inf], at=["first", 2])
    assert comparison.result.signals[0]["at"] == ["first", 2.0]
    with pytest.raises(ValueError, match="has a 'loss' already"):
        comparison.add_signal("a", 0, "loss", [1.0])
    with pytest.raises(ValueError, match='"linear" or "log"'):
        comparison.add_signal("a", 0, "new", [1.0], scale="logarithmic")
    with pytest.raises(ValueError, match='at_scale must be "linear" or "log"'):
        comparison.add_signal("a", 0, "new", [1.0], at=[1], at_scale="logarithmic")
    with pytest.raises(ValueError, match="a place for each of the 2 values, not 1"):
        comparison.add_signal("a", 0, "new", [1.0, 2.0], at=[1])
    comparison.add_figure("a", 0, "share clipped", 0.5)
    with pytest.raises(ValueError, match="has a 'share clipped' already"):
        comparison.add_figure("a", 0, "share clipped", 0.5)


# Nothing is lost


def test_every_finished_run_is_in_the_file_before_the_next_begins(tmp_path):
    seen = []
    with new_comparison(save=tmp_path / "new" / "name.json") as comparison:
        for variant, rate, run in comparison.runs(DROPOUT, 2):
            path = tmp_path / "new" / "name.json"
            seen.append(figures(Result.load(path)) if path.exists() else {})
            assert seen[-1] == figures(comparison.result)
            fit(build_model(rate), run)
            comparison.add_figure(variant, run.seed, "rate", rate)
    assert [len(each) for each in seen] == [0, 1, 2, 3]
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"name.json"}
    loaded = Result.load(tmp_path / "new" / "name.json")
    assert loaded.summary() == comparison.summary()
    assert not loaded.interrupted
    assert loaded.start is None


def test_comparison_that_is_interrupted_after_every_run_ends_as_if_it_had_not_been(tmp_path, capsys):
    variants = {"a": 0.0, "b": 0.5, "c": 0.2}
    whole = new_comparison()
    made = run_all(whole, variants)
    assert len(made) == 6
    for finished in range(1, 6):
        capsys.readouterr()
        with pytest.raises(KeyboardInterrupt):
            run_all(new_comparison(save=tmp_path / "name"), variants, stop_at=1)
        output = capsys.readouterr().out
        assert f"Interrupted. Finished runs: {finished}" in output
        assert (f"{finished - 1} finished runs taken from" in output) == (finished > 1)
        assert Result.load(tmp_path / "name.json").interrupted
        keras.utils.clear_session()
        if finished == 2:
            shutil.copytree(tmp_path, tmp_path / "copy")
    # Once it goes on to the end from the middle of the first seed, and once from before the last run.
    for folder, finished in ((tmp_path / "copy", 2), (tmp_path, 5)):
        capsys.readouterr()
        rest = new_comparison(save=folder / "name")
        assert run_all(rest, variants) == made[finished:]
        assert figures(rest.result) == figures(whole.result) == figures(Result.load(folder / "name.json"))
        assert f"{finished} finished runs taken from" in capsys.readouterr().out
    assert run_all(new_comparison(save=tmp_path / "name"), variants) == []
    assert run_all(new_comparison(save=tmp_path / "name"), variants, seeds=3) == [(name, 2) for name in "abc"]


def test_run_whose_round_of_the_loop_failed_is_kept_and_made_again(tmp_path):
    with pytest.raises(ZeroDivisionError), new_comparison(save=tmp_path / "name") as comparison:
        for variant, rate, run in comparison.runs(DROPOUT, 1):
            fit(build_model(rate), run)
            comparison.add(f"{variant}, two views", run.seed, {"accuracy": 0.5})
            comparison.add_figure(variant, run.seed, "share", 1 / (variant == "a"))
    loaded = Result.load(tmp_path / "name.json")
    assert [run["variant"] for run in loaded.runs] == ["a", "a, two views", "b", "b, two views"]
    made = []
    with new_comparison(save=tmp_path / "name") as comparison:
        for variant, rate, run in comparison.runs(DROPOUT, 1):
            made.append(variant)
            fit(build_model(rate), run)
            comparison.add(f"{variant}, two views", run.seed, {"accuracy": 0.5})
            comparison.add_figure(variant, run.seed, "share", 0.5)
    assert made == ["b"]
    assert len(comparison.result.runs) == 4


def test_loop_of_ones_own_skips_what_is_finished(tmp_path):
    with new_comparison(save=tmp_path / "name") as comparison:
        for variant in "ab":
            comparison.add(variant, 0, {"accuracy": 0.5})
    with new_comparison(save=tmp_path / "name", baseline="a") as comparison:
        with pytest.raises(ValueError, match=r"run with seed 0 already \(it is in '.*name.json'\).*finished"):
            comparison.add("a", 0, {"accuracy": 0.5})
        for seed in range(2):
            for variant in "ab":
                if not comparison.finished(variant, seed):
                    comparison.add(variant, seed, {"accuracy": 0.5})
    assert len(Result.load(tmp_path / "name.json").runs) == 4


def test_start_that_is_not_known_any_more_is_not_made_up(tmp_path):
    with new_comparison(save=tmp_path / "name") as comparison:
        fit(build_model(), comparison.run("a", 0))
    comparison = new_comparison(save=tmp_path / "name")
    with pytest.raises(ValueError, match="Seed 0 was begun in an earlier call"):
        fit(build_model(), comparison.run("b", 0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with a finished comparison under the name `name`."""
    folder = tmp_path_factory.mktemp("saved")
    run_all(new_comparison(settings={"epochs": 2}, save=folder / "name"))
    return folder


@pytest.mark.parametrize(
    "difference, words",
    [
        ({"settings": {"epochs": 3}}, "settings: epochs 2 and 3"),
        ({"metric": "loss"}, "metric: 'accuracy' and 'loss'"),
        ({"margin": 0.02}, "margin: 0.01 and 0.02"),
        ({"test": (TEST[0][:-1], TEST[1][:-1])}, "data: test"),
        ({"baseline": "b"}, "baseline: 'a' and 'b'"),
    ],
)
def test_other_experiment_under_a_name_in_use_is_refused_before_training(difference, words, saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    common = {"settings": {"epochs": 2}, "save": tmp_path / "name"}
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ValueError, match=f"holds another experiment, which differs in {words}.*Save under another name"
    ):
        new_comparison(**common | difference)
    with pytest.raises(ValueError, match=r"holds runs of \['a', 'b'\] too"):
        run_all(new_comparison(**common), {"c": 0.0, "d": 0.5})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_other_values_or_fewer_variants_are_another_experiment(tmp_path):
    run_all(new_comparison(save=tmp_path / "name"))
    with pytest.raises(ValueError, match="variants: b '0.5' and '0.9'"):
        run_all(new_comparison(save=tmp_path / "name"), {"a": 0.0, "b": 0.9})
    with pytest.raises(ValueError, match=r"holds runs of \['b'\] too"):
        run_all(new_comparison(save=tmp_path / "name"), {"a": 0.0})
    with pytest.raises(ValueError, match="weights that it started from are not known any more"):
        run_all(new_comparison(save=tmp_path / "name"), DROPOUT | {"c": 0.2})


def test_other_data_of_the_same_shape_are_another_experiment(tmp_path):
    run_all(new_comparison(save=tmp_path / "name"))
    with pytest.raises(ValueError, match="data: test"):
        new_comparison(save=tmp_path / "name", test=(50 * TEST[0], TEST[1]))


def test_settings_that_are_not_finite_can_be_gone_on_with(tmp_path):
    for seeds in (1, 2):
        run_all(new_comparison(save=tmp_path / "name", settings={"clip": np.inf}), seeds=seeds)
    assert len(Result.load(tmp_path / "name.json").runs) == 4


def test_fewer_seeds_than_the_file_has_are_reported(tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run_all(new_comparison(save=tmp_path / "name"), stop_at=3)
    comparison = new_comparison(save=tmp_path / "name")
    assert run_all(comparison, seeds=1) == []
    assert [row["seeds"] for row in comparison.summary()] == [1, 1]


def test_figures_of_a_run_that_was_not_finished_are_forgotten(tmp_path):
    for fails in (True, False):
        with (
            pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext(),
            new_comparison(save=tmp_path / "name") as comparison,
        ):
            for variant, rate, run in comparison.runs(DROPOUT, 1):
                comparison.add_figure(variant, run.seed, "rate", rate)
                1 / (not fails or variant == "a")
                fit(build_model(rate), run)
    assert len(Result.load(tmp_path / "name.json").figures) == 2


def test_search_that_failed_keeps_the_rates_that_were_finished(tmp_path):
    comparison = new_comparison(validation=VALIDATION, save=tmp_path / "name")
    with pytest.raises(ZeroDivisionError), comparison:
        for _, rate, run in comparison.search({"a": 0.1}, [0.01, 0.1, 1.0], seeds=1):
            model = keras.Sequential([keras.Input((4,)), layers.Dense(1, "sigmoid")])
            model.compile(keras.optimizers.SGD(rate), "binary_crossentropy", metrics=["accuracy"], run_eagerly=True)
            fit(model, run)
            1 / (rate < 1)
    rates = []
    search(new_comparison(validation=VALIDATION, save=tmp_path / "name"), {"a": 0.1}, [0.01, 0.1, 1.0], rates, seeds=1)
    assert [rate[2] for rate in rates] == [1.0]


def test_two_processes_under_one_name_do_not_overwrite_each_other(tmp_path):
    first, second = new_comparison(save=tmp_path / "name"), new_comparison(save=tmp_path / "name")
    first.add("a", 0, {"accuracy": 0.5})
    with pytest.raises(OSError, match="written by another process"):
        second.add("a", 1, {"accuracy": 0.5})
    first.add("a", 2, {"accuracy": 0.5})
    assert [run["seed"] for run in Result.load(tmp_path / "name.json").runs] == [0, 2]


def test_output_on_a_full_disk_stops_nothing(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    with Path("/dev/full").open("w") as full:
        subprocess.run(
            [sys.executable, tmp_path / "endless.py", tmp_path / "name"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert len(Result.load(tmp_path / "name.json").runs) == 6


def test_without_a_with_block_nothing_is_interrupted():
    comparison = new_comparison()
    for _, rate, run in comparison.runs(DROPOUT, 1):
        fit(build_model(rate), run)
    assert not any("Interrupted" in note for note in comparison.notes())


def test_changed_code_is_another_experiment(tmp_path):
    run_all(new_comparison(save=tmp_path / "name"))
    content = json.loads((tmp_path / "name.json").read_text())
    (tmp_path / "name.json").write_text(json.dumps(content | {"code": "other"}))
    with pytest.raises(ValueError, match="code .it was changed"):
        new_comparison(save=tmp_path / "name")


def test_file_that_is_no_result_is_not_overwritten(tmp_path):
    (tmp_path / "name.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no result of a comparison"):
        new_comparison(save=tmp_path / "name")


def test_runs_are_on_disk_whatever_happens_to_table_and_picture(tmp_path, monkeypatch):
    def fail(*arguments, **keywords):
        raise RuntimeError("no picture today")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(RuntimeError, match="no picture today") as caught:
        run_all(new_comparison(save=tmp_path / "name"))
    assert "The finished runs are in" in caught.value.__notes__[0]
    assert len(Result.load(tmp_path / "name.json").runs) == 4
    with pytest.raises(ValueError, match="different seeds"), new_comparison(save=tmp_path / "other") as comparison:
        comparison.add("a", 0, {"accuracy": 0.5})
        comparison.add("a", 1, {"accuracy": 0.5})
        comparison.add("b", 0, {"accuracy": 0.5})
    assert len(Result.load(tmp_path / "other.json").runs) == 3
    typo = new_comparison(save=tmp_path / "typo", baseline="typo")
    with pytest.raises(ValueError, match="baseline 'typo' is not among"), typo as comparison:
        comparison.add("a", 0, {"accuracy": 0.5})
    assert len(Result.load(tmp_path / "typo.json").runs) == 1


def test_place_that_cannot_be_written_is_noticed_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Nothing can be saved in"):
        new_comparison(save=tmp_path / "file" / "name")
    with pytest.raises(OSError, match="is a folder"):
        new_comparison(save=tmp_path)


def test_full_disk_keeps_what_was_there_and_says_what_to_do(tmp_path, monkeypatch):
    comparison = new_comparison(save=tmp_path / "name")
    comparison.add("a", 0, {"accuracy": 0.5})
    old = (tmp_path / "name.json").read_bytes()

    def fail(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", fail)
    with pytest.raises(OSError, match="No space left on device.*Make room, and run the same again"):
        comparison.add("a", 1, {"accuracy": 0.5})
    assert (tmp_path / "name.json").read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == ["name.json"]


@pytest.mark.parametrize("exception", [KeyboardInterrupt, MemoryError])
def test_interruption_reports_and_saves_what_was_finished(exception, tmp_path, capsys):
    with pytest.raises(exception), new_comparison(save=tmp_path / "name") as comparison:
        for seed in range(2):
            comparison.add("a", seed, {"accuracy": 0.5 + seed})
            if seed == 1:
                raise exception
            comparison.add("b", seed, {"accuracy": 0.75})
    output = capsys.readouterr().out
    assert "Interrupted. Finished runs: 3" in output
    assert "+0.2500" in output
    assert {path.name for path in tmp_path.iterdir()} == {"name.json", "name.svg"}
    assert Result.load(tmp_path / "name.json").summary() == comparison.summary()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_gets_lost_in_garbage_collection_is_raised_again(capsys):
    class Garbage:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        comparison = new_comparison()
        with pytest.raises(KeyboardInterrupt), comparison:
            comparison.add("a", 0, {"accuracy": 0.75})
            Garbage()
            comparison.add("b", 0, {"accuracy": 0.5})
            comparison.add("c", 0, {"accuracy": 0.25})
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert [run["variant"] for run in comparison.result.runs] == ["a", "b"]
    assert "-0.2500" in capsys.readouterr().out


def test_interruption_before_any_run_reports_nothing(capsys):
    with pytest.raises(KeyboardInterrupt), new_comparison():
        raise KeyboardInterrupt
    assert capsys.readouterr().out == ""


ENDLESS = """
import sys, time
from pathlib import Path
from callbacks import Comparison

with Comparison(metric="accuracy", save=sys.argv[1]) as comparison:
    for seed in range(3):
        for variant in "ab":
            if not comparison.finished(variant, seed):
                comparison.add(variant, seed, {"accuracy": 0.5 + seed})
                if sys.argv[2:] == [f"{variant}{seed}"]:
                    Path(sys.argv[1]).with_name("started").touch()
                    time.sleep(60)
"""


def test_killed_comparison_has_lost_nothing_and_goes_on(tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    path, started = tmp_path / "name", tmp_path / "started"
    command = [sys.executable, tmp_path / "endless.py", path]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for number, sleeps_after, finished in ((signal.SIGKILL, "a1", 3), (signal.SIGTERM, "b1", 4)):
        process = subprocess.Popen([*command, sleeps_after], env=environment)
        while not started.exists() and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait() == -number
        started.unlink()
        assert {file.name for file in tmp_path.iterdir()} == {"endless.py", "name.json"}
        result = Result.load(tmp_path / "name.json")
        assert (len(result.runs), result.interrupted) == (finished, True)
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert "4 finished runs taken from" in output
    result = Result.load(tmp_path / "name.json")
    assert (len(result.runs), result.interrupted) == (6, False)


# What is shown


def test_finished_runs_and_what_was_written_are_printed_where_the_table_goes(tmp_path, capsys):
    run_all(new_comparison(save=tmp_path / "name"))
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.partition(": test accuracy ")[0] for line in lines[:4]] == [
        "seed 0, a",
        "seed 0, b",
        "seed 1, a",
        "seed 1, b",
    ]
    assert "".join(lines).count("Saved: ") == 2
    assert "name.json" in captured.out.replace("\n", "") and "name.svg" in captured.out.replace("\n", "")
    assert max(map(len, lines)) <= 80
    assert "test accuracy" not in captured.err


def test_progress_knows_the_total_and_counts_runs_that_no_fit_produces():
    with new_comparison() as comparison:
        for variant, _, run in comparison.runs(DROPOUT, 2):
            comparison.add(variant, run.seed, {"accuracy": 0.5})
            (task,) = comparison._progress.tasks
            assert (task.completed, task.total) == (len(comparison.result.runs), 4)
            assert task.description == f"seed {run.seed}, {variant}"


def test_notebook_shows_table_notes_and_picture():
    comparison = with_figures({"a": [0.5, 0.6], "<b>": [0.7, 0.9]}, settings={"epochs": 7})
    page = comparison._repr_html_()
    assert "<table>" in page and "&lt;b&gt;" in page and "settings: epochs 7." in page and "<svg" in page
    new_comparison()._repr_html_()


def test_plot_returns_the_figure_and_saves_it(tmp_path):
    comparison = with_figures({"a": [0.5, 0.6], "b": [0.7, 0.9]})
    assert len(comparison.plot().axes) == 1
    comparison.plot(tmp_path / "name.png")
    assert (tmp_path / "name.png").read_bytes().startswith(b"\x89PNG")
    comparison.save(tmp_path / "other.svg")
    assert {path.name for path in tmp_path.iterdir()} == {"name.png", "other.json", "other.svg"}


def test_comparison_is_what_callbacks_exports():
    assert Comparison.__module__ == "callbacks.comparison.experiment"
