"""What every callback must do; callbacks are found in `callbacks.__all__`."""

import csv
import doctest
import json
import os
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest

import callbacks
from evidence.recipes import ROOT

CALLBACKS = [getattr(callbacks, name) for name in callbacks.__all__]
INPUTS = np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
TARGETS = (INPUTS.sum(axis=1) > 0).astype("float32")


def new_model(optimizer="adam"):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1, activation="sigmoid")]
    )
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"])
    return model


def activations(statistics):
    return {
        f"activation_{statistic}/{layer}": [entry[statistic] for entry in entries[1:]]
        for layer, entries in statistics.history.items()
        for statistic, value in entries[0].items()
        if value is not None
    }


def gradients(norms):
    measured = {"update_to_weight_ratio": norms.update_to_weight_ratios["all"]}
    for prefix, name in (("", "all"), ("first_layer_", norms.layers[0]), ("last_layer_", norms.layers[-1])):
        epochs = np.split(np.array(norms.history[name]), 2)
        measured[f"{prefix}gradient_norm_mean"] = [epoch.mean() for epoch in epochs]
        measured[f"{prefix}gradient_norm_max"] = [epoch.max() for epoch in epochs]
    return measured


def rates(logger):
    return {"learning_rate": [epoch[-1] for epoch in np.split(np.array(logger.history), 2)]}


# How each callback is made for two epochs of twelve steps, and how its attributes then tell {name in `logs`: the value
# of each epoch}.
MEASURED = {
    "ActivationStatistics": (lambda: callbacks.ActivationStatistics(INPUTS), activations),
    "GradientNorms": (lambda: callbacks.GradientNorms(every=1), gradients),
    "LearningRateLogger": (callbacks.LearningRateLogger, rates),
    "LearningRateRangeTest": (
        lambda: callbacks.LearningRateRangeTest(1e-5, 1e-3, steps=24),
        lambda finder: {"learning_rate": finder.learning_rates[11::12]},
    ),
    "OneCycle": (
        lambda: callbacks.OneCycle(0.01, steps=24),
        lambda cycle: {
            "learning_rate": cycle.learning_rate_at([11, 23]).tolist(),
            "momentum": cycle.momentum_at([11, 23]).tolist(),
        },
    ),
    "StochasticWeightAveraging": (
        lambda: callbacks.StochasticWeightAveraging(start_epoch=1),
        lambda averaging: {"averaged_models": [0, 1]},
    ),
    # It measures nothing.
    "SwapScheduleFreeWeights": (lambda: callbacks.SwapScheduleFreeWeights(), lambda swapping: {}),
    "TrainingDoctor": (
        lambda: callbacks.TrainingDoctor(INPUTS, every=1),
        lambda doctor: gradients(doctor.gradient_norms) | rates(doctor.learning_rates),
    ),
}


def read_tensorboard(folder):
    """Return {tag: the value of each epoch} of the scalars that `keras.callbacks.TensorBoard` has written."""
    import tensorflow as tf

    scalars = {}
    for path in sorted(folder.glob("events.*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                scalars.setdefault(value.tag, []).append(float(tf.make_ndarray(value.tensor)))
    return scalars


def test_every_file_is_exported():
    files = {path.stem for path in (ROOT / "callbacks").glob("*") if path.stem[0] != "_"} - {"README"}
    assert files == {callback.__module__.split(".")[1] for callback in CALLBACKS}


@pytest.mark.parametrize("callback", CALLBACKS)
def test_example_in_the_docstring_runs(callback):
    names = {"keras": keras, "layers": keras.layers, "np": np, "model": new_model(), "x": INPUTS, "y": TARGETS}
    names |= {each.__name__: each for each in CALLBACKS}
    # Not as doctests, because figures that an example prints are not to be compared.
    examples = doctest.DocTestParser().get_examples(callback.__doc__)
    assert examples
    for example in examples:
        exec(example.source, names)


# Imports each callback from the folder that holds its copy alone, one after another, for Keras is imported slowly.
IMPORT_COPIES = """
import json, sys
import keras

unwanted = {"seaborn", "matplotlib", "pandas", "rich", "tensorflow_datasets", "callbacks"} - set(sys.modules)
found = {}
for folder, module in map(str.split, sys.argv[1:]):
    sys.path.insert(0, folder)
    names = {}
    exec(f"from {module} import *", names)
    sys.path.remove(folder)
    modules = {name: getattr(value, "__module__", None) for name, value in names.items()}
    found[module] = modules, sorted(unwanted & set(sys.modules))
    for name in list(sys.modules):
        if name.partition(".")[0] in {module, *unwanted}:
            del sys.modules[name]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imported_copies(tmp_path_factory):
    """What importing a copy of each callback's file or folder gives: {file or folder: ({name: module}, unwanted)}."""
    copies = []
    for module in {callback.__module__.split(".")[1] for callback in CALLBACKS}:
        copy = tmp_path_factory.mktemp("copy")
        if (folder := ROOT / "callbacks" / module).is_dir():
            shutil.copytree(folder, copy / module, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(folder.with_suffix(".py"), copy)
        copies.append(f"{copy} {module}")
    process = subprocess.run(
        [sys.executable, "-P", "-c", IMPORT_COPIES, *copies],
        env=os.environ | {"PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_file_or_folder_copied_alone_is_imported_with_nothing_but_keras(callback, imported_copies):
    module = callback.__module__.split(".")[1]
    names, unwanted = imported_copies[module]
    assert names[callback.__name__] == callback.__module__.partition(".")[2]
    assert unwanted == []


@pytest.mark.parametrize("callback", [each for each in CALLBACKS if issubclass(each, keras.callbacks.Callback)])
def test_what_it_measures_reaches_history_the_csv_file_and_tensorboard(callback, tmp_path):
    callback_name = callback.__name__
    make, measured = MEASURED[callback_name]
    callback = make()
    loggers = [
        keras.callbacks.CSVLogger(tmp_path / "log.csv"),
        keras.callbacks.TensorBoard(tmp_path, write_graph=False),
    ]
    optimizer = "schedulefreeadamw" if callback_name == "SwapScheduleFreeWeights" else "adam"
    history = new_model(optimizer).fit(INPUTS, TARGETS, 8, epochs=2, verbose=0, callbacks=[callback, *loggers]).history
    with (tmp_path / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    scalars = read_tensorboard(tmp_path / "train")
    expected = measured(callback)
    assert expected.keys() == history.keys() - {"loss", "accuracy"}
    for name, values in expected.items():
        for written in (history[name], [float(row[name]) for row in rows], scalars[f"epoch_{name}"]):
            assert written == pytest.approx(values, rel=1e-6)
