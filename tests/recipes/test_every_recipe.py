"""What every recipe must do; recipes are found by looking at the folder."""

import ast
import contextlib
import functools
import inspect
import json
import math
import runpy
import shutil
import sys
import traceback
import types
from pathlib import Path

import cyclopts
import keras
import numpy as np
import pytest

from callbacks import Comparison
from evidence.pages import generated_files
from evidence.recipes import ROOT, SEEDS, find_recipes, measurements, read_card, seeds_for, why_stale
from tests.conftest import ANOTHER, forget_programs, load_module

LIMIT = 64

# The rates that a search tries here.
SEARCHED = (0.01, 0.02)


# One group a recipe, so that its observed trainings are made by one of the processes that share the tests. The largest
# networks are in the last recipes, and begin, so that no process has to wait for them at the end.
pytestmark = pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, id=path.stem, marks=pytest.mark.xdist_group(path.stem)) for path in reversed(find_recipes())],
    scope="module",
)

is_tensorflow = keras.backend.backend() == "tensorflow"
same_on_all_backends = pytest.mark.skipif(
    not is_tensorflow, reason="it is the same on all backends, and tested on TensorFlow"
)

# Made once, not once a recipe.
generated = functools.cache(generated_files)


@contextlib.contextmanager
def skip_what_is_refused():
    """Skip the test of a recipe that says that it does not run on this backend."""
    try:
        yield
    except NotImplementedError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def observed_once(recipe):
    """A call of the recipe's main."""
    with run_eagerly(), skip_what_is_refused():
        call = observe(recipe, 7, list(load_module(recipe).VARIANTS))
    yield call
    forget_programs()


@pytest.fixture(scope="module")
def observed(recipe, observed_once):
    """That call, and another one.

    It has other test data, and after the baseline, which gives all the same start, the other variants in reversed
    order: it would show if a run depended on those before it. To save time, only the last of them on the other
    backends, for the order is the work of the same code there.
    """
    baseline, *others = load_module(recipe).VARIANTS
    again = others if is_tensorflow else others[-1:]
    with run_eagerly():
        return [observed_once, observe(recipe, 7, [baseline, *reversed(again)], replace_test_data=True)]


@pytest.fixture(scope="module")
def observed_with_another_seed(recipe):
    """A call of the recipe's main with the first and the last variant: a search, where it has one."""
    module = load_module(recipe)
    first, *_, last = module.VARIANTS
    with run_eagerly(), skip_what_is_refused():
        call = observe(recipe, 0, [first, last], **({"search": True} if has_search(module) else {}))
    forget_programs()
    return call


def has_search(module):
    return "search" in inspect.signature(module.main).parameters


@contextlib.contextmanager
def run_eagerly():
    """On TensorFlow, run models without compiling them, to save the time of that. Graphs remain in their data sets.

    Compiled by TensorFlow, a recipe runs as a script, in the test that it stands alone.
    """
    with pytest.MonkeyPatch.context() as patch:
        if is_tensorflow:
            patch.setattr(keras.Model, "compile", functools.partialmethod(keras.Model.compile, run_eagerly=True))
        yield


def observe(path, seed, variants, replace_test_data=False, **flags):
    """Run some variants of a recipe for one epoch; return a namespace of its comparison and of what happened:

    events: ("start", model, trainable weights), ("end", model, None) and ("test", model, None), in order.
    rates: {variant whose turn it was: list of triples, one for each training: the highest rate, that of the last step,
        that after it}.
    """
    # The automatic names of layers, which some callbacks log, begin anew.
    keras.utils.clear_session()
    module = load_module(path)
    load, fit = module.load, keras.Model.fit
    events, rates, test_examples, current = [], {False: {}, True: {}}, set(), []

    def spy_on_loop(loop):
        def give(self, *arguments):
            for variant, value, run in loop(self, *arguments):
                current[:] = [variant]
                yield variant, value, run

        return give

    def spy_on_load(*arguments, **keywords):
        train, validation, (images, labels), classes = load(*arguments, **keywords)
        if replace_test_data:
            images, labels = images.max() - images, (labels + 1) % classes
        test_examples.update(image.tobytes() for image in images)
        return train, validation, (images, labels), classes

    class First(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            events.append(("end", self.model, None))

    class Last(keras.callbacks.Callback):
        def __init__(self, others):
            super().__init__()
            self.others = others

        def on_train_begin(self, logs=None):
            self.has_begun = False
            steps = self.params["epochs"] * self.params["steps"]
            is_run = any(hasattr(each, "comparison") for each in self.others)
            rates[is_run].setdefault(*current, []).append(rates_of(self.model.optimizer, steps, self.others))

        def on_train_batch_begin(self, batch, logs=None):
            if not self.has_begun:
                weights = [np.array(keras.ops.convert_to_numpy(weight)) for weight in self.model.trainable_variables]
                events.append(("start", self.model, weights))
                self.has_begun = True

    def spy_on_fit(self, *arguments, callbacks=(), **keywords):
        return fit(self, *arguments, callbacks=[First(), *callbacks, Last(callbacks)], **keywords)

    def spy_on_use(method):
        def use(self, x=None, *arguments, **keywords):
            # The recipe may have copied some of them.
            if isinstance(x, np.ndarray) and x[0].tobytes() in test_examples:
                events.append(("test", self, None))
            return method(self, x, *arguments, **keywords)

        return use

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load", spy_on_load)
        patch.setattr(module, "VARIANTS", {variant: module.VARIANTS[variant] for variant in variants})
        patch.setattr(keras.Model, "fit", spy_on_fit)
        for name in ("runs", "search"):
            patch.setattr(Comparison, name, spy_on_loop(getattr(Comparison, name)))
        for name in ("evaluate", "predict"):
            patch.setattr(keras.Model, name, spy_on_use(getattr(keras.Model, name)))
        if "search" in flags:
            patch.setattr(module, "GRID", SEARCHED)
        if hasattr(module, "peak_megabytes"):
            # It starts a process for each variant, for seconds; the recipe's own test does.
            patch.setattr(module, "peak_megabytes", lambda *arguments: 1.0)
        comparison = module.main(epochs=1, seeds=[seed], limit=LIMIT, **flags)
    # Where some trainings are runs, the others are what these begin with.
    return types.SimpleNamespace(comparison=comparison, events=events, rates=rates[True] or rates[False])


def rates_of(optimizer, steps, callbacks):
    """Return the highest learning rate of a training, that of its last step, and that after it."""
    for callback in callbacks:
        if hasattr(callback, "peak"):
            return callback.peak, callback.peak, 0.0
    # That which a loss scale, or the rates of layers, are wrapped around.
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    # Not the property, which makes a variable of a schedule.
    config = optimizer.get_config()
    if "optimizer_map" in config:
        # That of the layers without an optimizer of their own.
        config = config["optimizer_map"]["config"]["default_optimizer"]["config"]
    rate = config["learning_rate"]
    if not isinstance(rate, dict):
        return rate, rate, rate
    schedule = keras.optimizers.schedules.deserialize(rate)
    # Where gradients are accumulated, the schedule counts batches, and the first step is made at the last of several.
    first = (optimizer.gradient_accumulation_steps or 1) - 1
    values = [float(schedule(first + step)) for step in range(steps + 1)]
    return max(values), values[-2], values[-1]


@pytest.mark.smoke
def test_runs_and_gives_figures_that_are_finite_or_marked_as_diverged(recipe, observed_once):
    comparison = observed_once.comparison
    rows = comparison.summary()
    assert len(rows) >= 2
    assert all(row["diverged"] or math.isfinite(row["mean"]) for row in rows)
    assert rows[0]["variant"] == comparison.baseline == next(iter(load_module(recipe).VARIANTS))


def test_every_run_has_a_new_model(observed_once):
    started = [model for kind, model, _ in observed_once.events if kind == "start"]
    assert len({id(model) for model in started}) == len(started)


def test_variants_of_a_seed_start_equal(observed_once, observed_with_another_seed):
    if not observed_once.comparison.result.same_start:
        pytest.skip("the recipe's variants differ in shape, or their start is the subject")
    starts, others = [
        [weights for kind, _, weights in each.events if kind == "start"]
        for each in (observed_once, observed_with_another_seed)
    ]
    assert len(starts) == len(observed_once.comparison.result.runs)
    for start in starts[1:]:
        for weight, expected_weight in zip(start, starts[0], strict=True):
            np.testing.assert_array_equal(weight, expected_weight)
    assert not all(map(np.array_equal, starts[0], others[0])), "all seeds start equal"


def test_test_data_is_used_once_after_training(observed):
    for call in observed:
        in_training, used = set(), set()
        for kind, model, _ in call.events:
            if kind == "start":
                in_training.add(id(model))
            elif kind == "end":
                in_training.discard(id(model))
            else:
                assert not in_training, "test data was used while a model was in training"
                assert id(model) not in used, "a model used the test data twice"
                used.add(id(model))
        assert used, "test data was not used"


def test_test_data_changes_nothing_but_test_figures_and_a_seed_repeats(observed):
    runs = [{run["variant"]: run for run in call.comparison.result.runs} for call in observed]
    assert runs[0].keys() == runs[1].keys() if is_tensorflow else runs[0].keys() >= runs[1].keys()
    pairs = [(runs[0][variant], runs[1][variant]) for variant in runs[1]]
    for first, second in pairs:
        # Without the names, which may be those of layers: they are numbered on from seed to seed.
        np.testing.assert_equal(list(first["curve"].values()), list(second["curve"].values()))
        for split in set(first["metrics"]) - {"test"}:
            np.testing.assert_equal(first["metrics"][split], second["metrics"][split])
    assert any(first["metrics"]["test"] != second["metrics"]["test"] for first, second in pairs)


@same_on_all_backends
def test_headline_is_a_literal_that_names_a_variant_and_perhaps_a_figure_of_it(recipe, observed_once):
    statements = ast.parse(recipe.read_text(encoding="utf-8")).body
    (headline,) = [
        ast.literal_eval(node.value)
        for node in statements
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "HEADLINE"
    ]
    variant, *figures = [headline] if isinstance(headline, str) else headline
    names = list(load_module(recipe).VARIANTS)
    assert variant in names[1:], "the baseline answers nothing"
    added = {entry["name"] for entry in observed_once.comparison.result.figures if entry["variant"] == variant}
    assert len(figures) <= 1
    assert added.issuperset(figures)


def test_every_training_has_the_rate_of_its_variant_which_falls_to_zero(recipe, observed_once):
    module = load_module(recipe)
    if not hasattr(module, "GRID"):
        pytest.skip("the recipe's variants have no rates of their own")
    # The networks of an ensemble have their turn with the first variant.
    assert observed_once.rates.keys() >= module.VARIANTS.keys() or recipe.stem == "ensemble"
    for variant, value in module.VARIANTS.items():
        for highest, last, end in observed_once.rates.get(variant, []):
            # Where the rate of a batch size is made from that of another, the recipe's own test asks for it.
            if recipe.stem != "batch_size_scaling":
                assert highest == pytest.approx(value[-1] if isinstance(value, tuple) else value)
            assert last > 0
            assert end == pytest.approx(0, abs=1e-9) or may_end_at_a_constant_rate(recipe)


def test_search_tries_each_rate_on_validation_data(recipe, observed_with_another_seed):
    if not has_search(load_module(recipe)):
        pytest.skip("the recipe's variants have no rates of their own")
    call = observed_with_another_seed
    assert all(kind != "test" for kind, _, _ in call.events)
    assert all(run["metrics"].keys() == {"validation"} for run in call.comparison.result.runs)
    assert call.rates
    tried = [row["means"].keys() for row in call.comparison.result.search_summary()]
    assert tried == [set(SEARCHED)] * len(call.rates)
    for rates in call.rates.values():
        assert [highest for highest, *_ in rates] == pytest.approx(SEARCHED)
        assert [end for *_, end in rates] == pytest.approx([0, 0], abs=1e-9) or may_end_at_a_constant_rate(recipe)


def may_end_at_a_constant_rate(recipe):
    """Return whether the rate, its schedule, averaging or the end of training is what the recipe is about.

    So it is in part where techniques are combined, and left out in turn.
    """
    about_that = recipe.parent.name in ("schedules", "averaging", "combined")
    return about_that or recipe.stem in ("early_stopping", "noisy_labels")


@same_on_all_backends
def test_chosen_rates_are_of_one_grid_that_rises(recipe):
    module = load_module(recipe)
    if not hasattr(module, "GRID"):
        pytest.skip("the recipe's variants have no rates of their own")
    rates = {value[-1] if isinstance(value, tuple) else value for value in module.VARIANTS.values()}
    assert rates <= set(module.GRID)
    assert all(np.diff(module.GRID) > 0)


@same_on_all_backends
def test_flags_are_the_common_ones_first(recipe):
    parameters = inspect.signature(load_module(recipe).main).parameters.values()
    assert [parameter.name for parameter in parameters][:6] == [
        "dataset",
        "data_dir",
        "epochs",
        "seeds",
        "limit",
        "save",
    ]
    assert all(parameter.kind == parameter.KEYWORD_ONLY for parameter in parameters)


@same_on_all_backends
@pytest.mark.parametrize("flag, value", [("--seeds", "0"), ("--epochs", "-1"), ("--limit", "0"), ("--epoch", "3")])
def test_bad_flag_is_named_with_what_it_may_be(recipe, flag, value, capsys):
    app = cyclopts.App(default_command=load_module(recipe).main, result_action="return_value")
    with pytest.raises(SystemExit) as caught:
        app([flag, value])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert flag in captured.err
    assert ("--epochs" if flag == "--epoch" else "Must be > 0") in captured.err
    assert captured.out == ""


@same_on_all_backends
def test_help_explains_every_flag(recipe):
    module = load_module(recipe)
    for name in inspect.signature(module.main).parameters:
        assert f"    {name}: " in module.main.__doc__


@same_on_all_backends
def test_imports_nothing_else_of_this_project_and_no_backend(recipe):
    names = {
        name
        for node in ast.walk(ast.parse(recipe.read_text(encoding="utf-8")))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [f"{node.module}.{alias.name}" for alias in node.names]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    # Keras takes the data sets of tf.data on every backend, and TensorFlow Datasets brings it.
    imported = {name.partition(".")[0] for name in names - {"tensorflow.data"}}
    assert not imported & {"recipes", "evidence", "tests", "data", "tensorflow", "jax", "torch"}


@same_on_all_backends
def test_stands_alone_with_any_data_set(recipe, interpreter, other_data, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(recipe, home)
    shutil.copytree(ROOT / "callbacks", home / "callbacks", ignore=shutil.ignore_patterns("__pycache__"))
    dataset = ANOTHER[inspect.signature(load_module(recipe).main).parameters["dataset"].default]
    flags = ["--dataset", dataset, "--data-dir", other_data, "--epochs", "1", "--save", tmp_path / "result"]
    process = interpreter.run(home / recipe.name, *flags, folder=tmp_path)
    if "\nNotImplementedError: " in process["errors"]:
        pytest.skip(process["errors"].rpartition("NotImplementedError: ")[2])
    assert process["code"] == 0, process["errors"]
    assert "callbacks" in process["imported"]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["settings"]["dataset"] == dataset
    lines = process["output"].splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("verdict" in line and "variant" in line for line in lines) == 1, "the report is printed once"
    assert all(run["variant"].split()[0] in process["output"] for run in result["runs"])


@same_on_all_backends
def test_without_data_the_last_line_says_where_to_get_it(recipe, tmp_path, monkeypatch):
    copy = shutil.copy(recipe, tmp_path)
    monkeypatch.setattr(sys, "argv", [copy, "--seeds", "1"])
    with pytest.raises(FileNotFoundError) as caught:
        runpy.run_path(copy, run_name="__main__")
    last_line = "".join(traceback.format_exception(caught.value)).splitlines()[-1]
    assert "--data-dir" in last_line
    assert "tfds build" in last_line
    assert "there is no folder" in last_line


@same_on_all_backends
def test_place_that_cannot_be_written_is_noticed_before_training(recipe, tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise AssertionError("training began")

    monkeypatch.setattr(keras.Model, "fit", refuse)
    (tmp_path / "file").touch()
    with skip_what_is_refused(), pytest.raises(OSError, match="Nothing can be saved in"):
        load_module(recipe).main(epochs=1, limit=LIMIT, save=tmp_path / "file" / "name")


@same_on_all_backends
def test_card_is_complete(recipe):
    card = read_card(recipe)
    assert all(card.values())
    assert card["Name"].replace(" ", "_").replace("-", "_").lower() == recipe.stem


@same_on_all_backends
def test_result_is_fresh(recipe):
    for path, flags in measurements(recipe).items():
        reason = why_stale(recipe, path, flags, seeds=seeds_for(flags, SEEDS))
        assert reason is None, f"{reason}; `python -m evidence {recipe.stem}` measures it and makes the pages"


@same_on_all_backends
def test_readme_and_page_show_it_as_it_is(recipe):
    texts = generated()
    for path in (ROOT / "README.md", recipe.parent / "README.md"):
        assert path.read_text(encoding="utf-8") == texts[path], "`python -m evidence` makes the pages"
        assert read_card(recipe)["Name"] in texts[path]


@same_on_all_backends
def test_has_a_test_of_its_own(recipe):
    assert Path(ROOT / "tests" / "recipes" / recipe.parent.name / f"test_{recipe.stem}.py").exists()
