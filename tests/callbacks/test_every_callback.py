"""What every callback must do; callbacks are found in `callbacks.__all__`."""

import doctest
import inspect
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


def test_every_file_is_exported():
    files = {path.stem for path in (ROOT / "callbacks").glob("*.py")} - {"__init__"}
    assert files == {callback.__module__.partition(".")[2] for callback in CALLBACKS}


@pytest.mark.parametrize("callback", CALLBACKS)
def test_example_in_the_docstring_runs(callback):
    inputs = np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(8, activation="relu"), keras.layers.Dense(1, activation="sigmoid")]
    )
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    names = {"keras": keras, "layers": keras.layers, "np": np, "model": model, "x": inputs}
    names |= {"y": (inputs.sum(axis=1) > 0).astype("float32")} | {each.__name__: each for each in CALLBACKS}
    # Not as doctests, because figures that an example prints are not to be compared.
    examples = doctest.DocTestParser().get_examples(callback.__doc__)
    assert examples
    for example in examples:
        exec(example.source, names)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_file_copied_alone_is_imported_with_nothing_but_keras(callback, tmp_path):
    shutil.copy(inspect.getfile(callback), tmp_path)
    module = callback.__module__.partition(".")[2]
    code = f"""
import sys, keras
before = set(sys.modules)
from {module} import {callback.__name__}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(sorted(new & {{"scipy", "seaborn", "matplotlib", "pandas", "rich", "tensorflow_datasets", "callbacks"}}))
"""
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True
    )
    assert process.stdout.strip() == "[]", process.stderr
