import json
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pytest
from keras import layers
from scipy import stats

from callbacks import Comparison

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(96, 4)).astype("float32")
TARGETS = (INPUTS.sum(axis=1) > 0).astype("float32")
TRAIN, VALIDATION, TEST = [(INPUTS[part], TARGETS[part]) for part in (slice(48), slice(48, 64), slice(64, 96))]


def build_model(seed=0, units=3, rate=0.0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(units, activation="tanh"), layers.Dropout(rate), layers.Dense(1, "sigmoid")]
    )
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    return model


def new_comparison(**arguments):
    return Comparison(**{"baseline": "a", "metric": "accuracy", "test": TEST} | arguments)


def fit(model, *callbacks, epochs=1, **arguments):
    return model.fit(*TRAIN, epochs=epochs, batch_size=16, verbose=0, callbacks=list(callbacks), **arguments)


def with_figures(figures, **arguments):
    """Return a comparison of {variant: [figure of seed 0, figure of seed 1, …]}."""
    result = new_comparison(**arguments)
    for variant, values in figures.items():
        for seed, value in enumerate(values):
            result.add(variant, seed, {result.metric: value})
    return result


# Statistics and verdict


def test_intervals_are_those_of_scipy():
    figures = {name: GENERATOR.normal(size=6).tolist() for name in "abc"}
    rows = {row["variant"]: row for row in with_figures(figures).summary()}
    for name in "abc":
        interval = stats.ttest_1samp(figures[name], 0).confidence_interval(0.95)
        assert rows[name]["mean"] == pytest.approx(np.mean(figures[name]))
        assert rows[name]["half_width"] == pytest.approx((interval.high - interval.low) / 2)
    for name in "bc":
        interval = stats.ttest_rel(figures[name], figures["a"]).confidence_interval(1 - 0.05 / 2)
        assert rows[name]["difference"] == pytest.approx((interval.high + interval.low) / 2)
        assert rows[name]["difference_half_width"] == pytest.approx((interval.high - interval.low) / 2)


def test_verdict_agrees_with_the_paired_t_test_adjusted_for_the_number_of_differences():
    verdicts = set()
    for shift in np.linspace(-0.03, 0.03, 13):
        noise = np.random.default_rng(1).normal(scale=0.01, size=(4, 5))
        figures = {"a": noise[0], "b": noise[1] + shift, "c": noise[2], "d": noise[3]}
        row = with_figures({name: values.tolist() for name, values in figures.items()}).summary()[1]
        test = stats.ttest_rel(figures["b"], figures["a"])
        if test.pvalue >= 0.05 / 3:
            expected = "no measurable difference at 5 seeds"
        else:
            expected = "better" if test.statistic > 0 else "worse"
        assert row["verdict"] == expected
        verdicts.add(expected)
    assert len(verdicts) == 3


def test_verdict_knows_when_lower_is_better():
    figures = {"a": [0.5, 0.6, 0.7], "b": [0.4, 0.5, 0.6]}
    assert with_figures(figures, metric="loss").summary()[1]["verdict"] == "better"
    assert with_figures(figures, metric="accuracy").summary()[1]["verdict"] == "worse"
    assert with_figures(figures, metric="speed", mode="min").summary()[1]["verdict"] == "better"


def test_equal_figures_show_no_difference():
    row = with_figures({"a": [0.5, 0.5, 0.5], "b": [0.5, 0.5, 0.5]}).summary()[1]
    assert row["difference"] == row["difference_half_width"] == 0
    assert row["verdict"].startswith("no measurable difference")


def test_one_seed_gives_no_verdict():
    row = with_figures({"a": [0.5], "b": [0.9]}).summary()[1]
    assert row["difference"] == pytest.approx(0.4)
    assert row["difference_half_width"] is None
    assert row["verdict"] == "no verdict"


def test_diverged_runs_are_counted_and_have_no_interval():
    rows = with_figures({"a": [0.5, 0.6], "b": [np.nan, 0.7], "c": [0.7, 0.9]}).summary()
    assert (rows[1]["diverged"], rows[1]["seeds"], rows[1]["verdict"]) == (1, 2, "diverged")
    assert rows[1]["mean"] is rows[1]["half_width"] is rows[1]["difference"] is None
    assert rows[2]["difference"] == pytest.approx(0.25)


def test_nothing_is_compared_with_a_diverged_baseline():
    rows = with_figures({"a": [0.5, np.inf], "b": [0.6, 0.7]}).summary()
    assert rows[1]["mean"] == pytest.approx(0.65)
    assert rows[1]["difference"] is None
    assert rows[1]["verdict"] == "the baseline diverged"


def test_loss_that_is_not_finite_marks_a_run_as_diverged_though_its_accuracy_is_finite():
    result = new_comparison()
    result.add("a", 0, {"accuracy": 0.1, "loss": np.nan})
    result.add("b", 0, {"accuracy": 0.1, "loss": 1.0}, curve={"loss": [1.0, np.inf]})
    assert [row["diverged"] for row in result.summary()] == [1, 1]


@pytest.mark.parametrize("metric, mode", [("accuracy", "max"), ("loss", "min"), ("mean_absolute_error", "min")])
def test_direction_is_told_by_name(metric, mode):
    assert new_comparison(metric=metric).mode == mode


def test_direction_that_cannot_be_told_must_be_given():
    with pytest.raises(ValueError, match='mode="max" or mode="min"'):
        new_comparison(metric="speed")
    with pytest.raises(ValueError, match="mode must be"):
        new_comparison(mode="up")


# Fairness


def test_variants_of_a_seed_start_equal():
    starts = {}

    class Start(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            starts[name, seed] = [np.array(weight) for weight in self.model.get_weights()[:4]]

    result = new_comparison()
    for seed in range(2):
        for name, rate in {"a": 0.0, "b": 0.5}.items():
            # Built from unequal seeds, so that they would start unequal.
            fit(build_model(10 * seed + ord(name), rate=rate), result.run(name, seed), Start())
    for seed in range(2):
        for first, second in zip(starts["a", seed], starts["b", seed], strict=True):
            np.testing.assert_array_equal(first, second)
    assert not np.array_equal(starts["a", 0][0], starts["a", 1][0])


def test_variants_of_unequal_shape_must_be_declared():
    result = new_comparison()
    fit(build_model(units=3), result.run("a", 0))
    with pytest.raises(ValueError, match="same_start=False"):
        fit(build_model(units=5), result.run("b", 0))
    result = new_comparison(same_start=False)
    fit(build_model(units=3), result.run("a", 0))
    fit(build_model(units=5), result.run("b", 0))
    assert len(result.summary()) == 2


def test_model_of_an_earlier_run_is_refused():
    result = new_comparison()
    model = build_model()
    fit(model, result.run("a", 0))
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    with pytest.raises(ValueError, match="as 'a', seed 0.*Build and compile a new model for every run"):
        fit(model, result.run("b", 0))


@pytest.mark.parametrize("compiled_again", [False, True])
def test_model_trained_elsewhere_is_refused(compiled_again):
    model = build_model()
    fit(model)
    if compiled_again:
        model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    with pytest.raises(ValueError, match="trained already.*Build and compile a new model for every run"):
        fit(model, new_comparison().run("a", 0))


def test_recurrent_and_nested_models_that_were_trained_are_refused():
    def build():
        inner = keras.Sequential([keras.Input((4, 1)), layers.LSTM(3)])
        model = keras.Sequential([keras.Input((4,)), layers.Reshape((4, 1)), inner, layers.Dense(1, "sigmoid")])
        model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
        return model

    result = new_comparison()
    fit(build(), result.run("a", 0))
    model = build()
    fit(model)
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    with pytest.raises(ValueError, match="trained already"):
        fit(model, result.run("b", 0))


def test_trained_weights_on_purpose_are_accepted():
    trained = build_model()
    fit(trained, epochs=3)
    result = new_comparison(pretrained=True)
    for name in "ab":
        model = build_model()
        model.set_weights(trained.get_weights())
        fit(model, result.run(name, 0))
    assert len(result.runs) == 2


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="on JAX, fit builds the model before any callback sees it")
def test_unbuilt_model_is_refused():
    model = keras.Sequential([layers.Dense(1, "sigmoid")])
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    with pytest.raises(ValueError, match="not built.*keras.Input"):
        fit(model, new_comparison().run("a", 0))


def test_seed_counts_once_for_each_variant():
    result = new_comparison()
    callback = result.run("a", 0)
    fit(build_model(), callback)
    with pytest.raises(ValueError, match="'a' was run with seed 0 already"):
        result.run("a", 0)
    with pytest.raises(ValueError, match="'a' was run with seed 0 already"):
        result.add("a", 0, {"accuracy": 0.5})
    with pytest.raises(ValueError, match="'a' was run with seed 0 already"):
        fit(build_model(), callback)


def test_variants_must_see_the_same_seeds():
    result = with_figures({"a": [0.5, 0.6], "b": [0.5]})
    with pytest.raises(ValueError, match="different seeds"):
        result.report()


def test_baseline_must_be_run():
    with pytest.raises(ValueError, match="baseline 'a' is not among"):
        with_figures({"b": [0.5]}).report()


def test_metric_must_be_measured():
    with pytest.raises(ValueError, match=r"compile the model with metrics=\['auc'\]"):
        fit(build_model(), new_comparison(metric="auc").run("a", 0))
    with pytest.raises(ValueError, match="'accuracy' is not among"):
        new_comparison().add("a", 0, {"loss": 1.0})


def test_comparison_without_data_to_compare_on_is_refused():
    with pytest.raises(ValueError, match="pass test="):
        new_comparison(test=None).run("a", 0)


# What a run records


def test_run_records_logs_times_and_the_figures_of_evaluate():
    result = new_comparison(train=TRAIN, validation=VALIDATION)
    model = build_model(rate=0.5)
    history = fit(model, result.run("a", 0), epochs=3, validation_data=VALIDATION)
    (run,) = result.runs
    assert run["curve"] == history.history
    assert len(run["epoch_seconds"]) == 3
    assert min(run["epoch_seconds"]) > 0
    for split, data in {"train": TRAIN, "validation": VALIDATION, "test": TEST}.items():
        assert run["metrics"][split] == pytest.approx(model.evaluate(*data, verbose=0, return_dict=True))
    gap = run["metrics"]["train"]["accuracy"] - run["metrics"]["test"]["accuracy"]
    assert result.summary()[0]["gap"] == pytest.approx(gap)


def test_run_evaluates_what_the_callbacks_before_it_leave():
    class Restore(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            self.model.set_weights([np.zeros_like(weight) for weight in self.model.get_weights()])

    result = new_comparison(metric="loss")
    fit(build_model(), Restore(), result.run("a", 0))
    # All-zero weights give the probability one half to every example.
    assert result.runs[0]["metrics"]["test"]["loss"] == pytest.approx(np.log(2))


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
    result = new_comparison(validation=(*TEST, weights), test=Batches())
    model = build_model()
    fit(model, result.run("a", 0))
    figures = result.runs[0]["metrics"]
    assert figures["test"] == pytest.approx(model.evaluate(*TEST, verbose=0, return_dict=True))
    probabilities = np.asarray(model.predict(TEST[0], verbose=0))[:, 0]
    losses = -np.log(np.where(TEST[1] == 1, probabilities, 1 - probabilities))
    assert figures["validation"]["loss"] == pytest.approx((weights * losses).sum() / len(losses), rel=1e-4)


def test_without_test_data_the_validation_figure_decides():
    result = new_comparison(validation=VALIDATION, test=None)
    model = build_model()
    fit(model, result.run("a", 0))
    accuracy = model.evaluate(*VALIDATION, verbose=0, return_dict=True)["accuracy"]
    assert result.summary()[0]["mean"] == pytest.approx(accuracy)
    assert "validation accuracy" in result.table()


def test_time_is_the_median_ratio_without_the_first_epoch():
    result = with_figures({"a": [0.5, 0.5, 0.5], "b": [0.5, 0.5, 0.5]})
    times = {"a": [9, 1, 2, 3], "b": [1, 3, 3, 3]}
    for run in result.runs:
        run["epoch_seconds"] = [
            seconds * (1 + run["seed"] * (run["variant"] == "b")) for seconds in times[run["variant"]]
        ]
    # Medians after the first epoch: 2 for a; 3, 6 and 9 for b.
    assert result.summary()[1]["time"] == pytest.approx(3)


# Report, results, interruption


def test_report_fits_eighty_columns(capsys):
    figures = {name: GENERATOR.normal(0.8, 0.1, 5).tolist() for name in ("no dropout", "dropout 0.2", "dropout 0.8")}
    result = with_figures(figures, baseline="no dropout", settings={"dataset": "fashion_mnist_10k", "limit": None})
    for run in result.runs:
        run["epoch_seconds"] = [1.0]
        run["metrics"]["train"] = {"accuracy": 0.9}
    result.report()
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    for title, cells in result.table().items():
        assert title in output
        assert title == "verdict" or all(cell in output for cell in cells)
    assert "dataset fashion_mnist_10k" in output
    assert "limit" not in output


def test_result_survives_saving_and_loading(tmp_path):
    settings = {"epochs": 2, "folder": tmp_path}
    with new_comparison(train=TRAIN, save=tmp_path / "new" / "name.json", settings=settings) as result:
        for seed in range(2):
            for name in "ab":
                fit(build_model(seed), result.run(name, seed), epochs=2, validation_data=VALIDATION)
        for seed in range(2):
            result.add("c", seed, {"accuracy": np.nan})
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"name.json", "name.svg"}
    loaded = Comparison.load(tmp_path / "new" / "name.json")
    assert loaded.summary() == result.summary()
    assert loaded.table() == result.table()
    assert loaded.settings == {"epochs": 2, "folder": str(tmp_path)}
    assert loaded.environment["keras"] == keras.__version__


def test_saved_json_is_strict_and_the_picture_shows_every_variant(tmp_path):
    result = with_figures({"a": [0.5, 0.6], "b": [0.7, 0.9], "diverging": [np.nan, np.inf]})
    for run in result.runs:
        run["curve"] = {"accuracy": [0.1, 0.5], "val_accuracy": [np.nan, 0.4]}
    result.save(tmp_path / "name")

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    content = json.loads((tmp_path / "name.json").read_text(), parse_constant=refuse)
    assert content["runs"][-1]["metrics"]["test"]["accuracy"] == "Infinity"
    texts = {element.text for element in ElementTree.parse(tmp_path / "name.svg").iter() if element.text}
    assert {"a", "b", "diverging", "training accuracy, as logged", "validation accuracy", "epoch"} <= texts


def test_figures_beside_the_metric_are_columns_of_medians(tmp_path, capsys):
    result = with_figures({"a": [0.5, 0.6, 0.7], "b": [0.7, 0.8, 0.9]})
    for variant, values in {"a": [3, 1, np.inf], "b": [0.5, 0.25, 40]}.items():
        for seed, value in enumerate(values):
            result.add_figure(variant, seed, "epochs to 0.8", value)
    result.add_figure("b", 0, "share clipped", 0.125)
    assert [row["figures"] for row in result.summary()] == [
        {"epochs to 0.8": 3.0},
        {"epochs to 0.8": 0.5, "share clipped": 0.125},
    ]
    assert result.table()["epochs to 0.8"] == ["3", "0.5000"]
    assert result.table()["share clipped"] == ["–", "0.1250"]
    result.save(tmp_path / "name")
    assert Comparison.load(tmp_path / "name.json").figures == result.figures
    result.report()
    output = capsys.readouterr().out
    assert "share clipped" in output
    assert "epochs to 0.8, share clipped: median over seeds." in output
    with pytest.raises(ValueError, match="has a 'share clipped' already"):
        result.add_figure("b", 0, "share clipped", 0.5)


def test_interrupted_comparison_leaves_out_figures_and_signals_of_unfinished_seeds():
    result = with_figures({"a": [0.5, 0.6], "b": [0.7]})
    result.interrupted = True
    result.add_figure("a", 1, "share clipped", 0.5)
    result.add_signal("a", 1, "norm", [1.0, 2.0])
    assert "share clipped" not in result.table()
    assert len(result._figure().axes) == 1


def test_curves_of_the_metric_have_one_range_and_a_signal_by_epoch_its_own():
    result = with_figures({"a": [0.5, 0.6]})
    for run in result.runs:
        run["curve"] = {"accuracy": [0.1, 0.5], "val_accuracy": [0.2, 0.9]}
        result.add_signal("a", run["seed"], "learning rate", [0.001, 0.0001], by="epoch")
    signal, training, validation, _ = result._figure().axes
    low, high = training.get_ylim()
    assert (low, high) == validation.get_ylim()
    assert low < 0.1 and high > 0.9
    assert signal.get_ylim()[1] < 0.01


def test_signal_named_like_a_curve_has_a_panel_of_its_own():
    result = with_figures({"a": [0.5, 0.6]})
    for run in result.runs:
        run["curve"] = {"val_accuracy": [0.2, 0.9]}
        result.add_signal("a", run["seed"], "validation accuracy", [0.3, 0.4, 0.7], by="tenth of a second")
    signal, curve, _ = result._figure().axes
    assert (signal.get_title(), curve.get_title()) == (
        "validation accuracy by tenth of a second",
        "validation accuracy",
    )
    np.testing.assert_allclose(signal.lines[0].get_ydata(), [0.3, 0.4, 0.7])
    np.testing.assert_allclose(curve.lines[0].get_ydata(), [0.2, 0.9])


def test_curve_ends_where_most_of_its_runs_have():
    result = with_figures({"a": [0.5, 0.6, 0.7, 0.8]})
    for run, length in zip(result.runs, (5, 4, 3, 3), strict=True):
        run["curve"] = {"val_accuracy": [0.1 * run["seed"] + 0.01 * epoch for epoch in range(length)]}
    curve, _ = result._figure().axes
    np.testing.assert_allclose(curve.lines[0].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(curve.lines[0].get_ydata(), [0.15, 0.16, 0.17, 0.08])


def test_progress_counts_runs_that_no_fit_produces():
    with new_comparison(runs=2) as result:
        result.add("a", 0, {"accuracy": 0.5})
        (task,) = result._progress.tasks
        assert task.completed == 1
        assert task.description == "seed 0 · a"
        result.add("a", 1, {"accuracy": 0.6})


def test_signal_is_drawn_by_its_own_axis_as_the_geometric_mean_on_a_logarithmic_one(tmp_path):
    result = with_figures({"a": [0.5, 0.6], "b": [0.7, 0.8]})
    norms = {"a": [[1.0, 0.1, 1e-3], [4.0, 0.4, 1e-5]], "b": [[2.0, 2.0, np.inf], [8.0, 0.0, 2.0]]}
    for variant, of_seeds in norms.items():
        for seed, values in enumerate(of_seeds):
            result.add_signal(variant, seed, "gradient norm", values, by="layer", scale="log")
            result.add_signal(variant, seed, "loss", values[:2], by="step")
    result.save(tmp_path / "name")
    assert Comparison.load(tmp_path / "name.json").signals == result.signals
    logarithmic, linear, _ = result._figure().axes
    assert (logarithmic.get_title(), logarithmic.get_ylabel(), logarithmic.get_xlabel(), logarithmic.get_yscale()) == (
        "gradient norm by layer",
        "gradient norm",
        "layer",
        "log",
    )
    assert (linear.get_xlabel(), linear.get_yscale()) == ("step", "linear")
    for line, expected in zip(logarithmic.lines, [[2.0, 0.2, 1e-4], [4.0, 2.0, 2.0]], strict=False):
        np.testing.assert_allclose(line.get_xdata(), [1, 2, 3])
        np.testing.assert_allclose(line.get_ydata(), expected)
    np.testing.assert_allclose(linear.lines[0].get_ydata(), np.mean(norms["a"], axis=0)[:2])
    with pytest.raises(ValueError, match="has a 'loss' already"):
        result.add_signal("a", 0, "loss", [1.0])
    with pytest.raises(ValueError, match='"linear" or "log"'):
        result.add_signal("a", 0, "new", [1.0], scale="logarithmic")


def test_same_result_gives_the_same_picture(tmp_path):
    for name in ("first", "second"):
        with_figures({"a": [0.5, 0.6], "b": [0.7, 0.9]}).save(tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_place_that_cannot_be_written_is_noticed_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="Nothing can be saved in"):
        new_comparison(save=tmp_path / "file" / "name")
    with pytest.raises(OSError, match="is a folder"):
        new_comparison(save=tmp_path)


def test_failed_save_leaves_the_old_result(tmp_path, monkeypatch):
    with_figures({"a": [0.5, 0.6]}).save(tmp_path / "name")
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(*arguments, **keywords):
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="disk full"):
        with_figures({"a": [0.8, 0.9]}).save(tmp_path / "name")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


@pytest.mark.parametrize("exception", [KeyboardInterrupt, MemoryError])
def test_interruption_reports_and_saves_what_was_finished(exception, tmp_path, capsys):
    with_figures({"a": [0.1], "b": [0.1]}).save(tmp_path / "name")
    with pytest.raises(exception), new_comparison(save=tmp_path / "name") as result:
        for seed in range(2):
            result.add("a", seed, {"accuracy": 0.5 + seed})
            if seed == 1:
                raise exception
            result.add("b", seed, {"accuracy": 0.75})
    output = capsys.readouterr().out
    assert "Interrupted. Finished runs: 3" in output
    assert "+0.2500" in output
    assert len(Comparison.load(tmp_path / "name.json").runs) == 2
    partial = Comparison.load(tmp_path / "name.partial.json")
    assert len(partial.runs) == 3
    assert partial.summary() == result.summary()


def test_interruption_in_the_first_seed_reports_the_variants_that_were_finished(capsys):
    with pytest.raises(KeyboardInterrupt), new_comparison(baseline="never run") as result:
        result.add("b", 0, {"accuracy": 0.75})
        result.add("c", 0, {"accuracy": 0.5})
        raise KeyboardInterrupt
    output = capsys.readouterr().out
    assert "0.7500" in output
    assert "0.5000" in output


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_that_gets_lost_in_garbage_collection_is_raised_again(capsys):
    class Garbage:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = new_comparison()
        with pytest.raises(KeyboardInterrupt), result:
            result.add("a", 0, {"accuracy": 0.75})
            Garbage()
            result.add("b", 0, {"accuracy": 0.5})
            result.add("c", 0, {"accuracy": 0.25})
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert [run["variant"] for run in result.runs] == ["a", "b"]
    assert "-0.2500" in capsys.readouterr().out


def test_interruption_before_any_run_reports_nothing(capsys):
    with pytest.raises(KeyboardInterrupt), new_comparison():
        raise KeyboardInterrupt
    assert capsys.readouterr().out == ""


SLOW_SAVE = """
import sys, time
from pathlib import Path
from callbacks import Comparison

result = Comparison(baseline="a", metric="accuracy", save=sys.argv[1])
with result:
    result.add("a", 0, {"accuracy": 0.9})
    Path(sys.argv[2]).touch()
    time.sleep(60)
"""


def test_killed_run_leaves_the_old_result(tmp_path):
    with_figures({"a": [0.5]}).save(tmp_path / "name")
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    process = subprocess.Popen([sys.executable, "-c", SLOW_SAVE, tmp_path / "name", tmp_path / "started"])
    while not (tmp_path / "started").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (tmp_path / "started").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
