import types
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds

from evidence.recipes import ROOT
from tests.recipes.scripts import Interpreter


class Colour(tfds.core.GeneratorBasedBuilder):
    """10 × 11 colour images of 3 classes."""

    VERSION = tfds.core.Version("1.0.0")
    SUPERVISED_KEYS = ("image", "label")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(10, 11, 3)), "label": tfds.features.ClassLabel(num_classes=3)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=self.SUPERVISED_KEYS
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(50), "test": self._generate_examples(20)}

    def _generate_examples(self, count):
        generator = np.random.default_rng(count)
        for index in range(count):
            yield index, {"image": generator.integers(0, 256, (10, 11, 3), dtype=np.uint8), "label": index % 3}


class Unlabelled(Colour):
    SUPERVISED_KEYS = None


class Table(Colour):
    """Rows of a number and a category, of 2 classes."""

    SUPERVISED_KEYS = ("row", "label")

    def _info(self):
        row = {"size": tfds.features.Scalar(np.float32), "kind": tfds.features.ClassLabel(num_classes=3)}
        features = {"row": row, "label": tfds.features.ClassLabel(num_classes=2)}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=self.SUPERVISED_KEYS
        )

    def _split_generators(self, dl_manager):
        counts = {"train": 50, "validation": 30, "test": 20}
        return {split: self._generate_examples(count) for split, count in counts.items()}

    def _generate_examples(self, count):
        generator = np.random.default_rng(count)
        for index in range(count):
            yield index, {"row": {"size": generator.normal(), "kind": index % 3}, "label": int(index % 5 == 0)}


class Letters(Table):
    """Texts of the letters a to z."""

    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _generate_examples(self, count):
        generator = np.random.default_rng(count)
        yield 0, {"text": "".join(generator.choice(list("abcdefghijklmnopqrstuvwxyz"), 100 * count))}


@pytest.fixture(autouse=True, scope="module")
def save_the_time_of_optimization():
    """Compile without most optimisations: tiny trainings take less time than to optimise them.

    With all that TensorFlow does, recipes run as scripts, in the test that they stand alone.
    """
    optimize(False)
    yield
    optimize(True)


def optimize(enabled):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": not enabled})
    elif keras.backend.backend() == "jax":
        import jax

        jax.config.update("jax_disable_most_optimizations", not enabled)


@pytest.fixture(autouse=True, scope="session")
def read_the_embedded_images_once():
    """Reading the embedded images takes longer than most tests: a process does so once for each split."""
    load, loaded = tfds.load, {}

    def load_once(name, **arguments):
        if Path(arguments.get("data_dir", "")) != ROOT / "data":
            return load(name, **arguments)
        key = name, repr(sorted(arguments.items()))
        if key not in loaded:
            loaded[key] = load(name, **arguments)
        return loaded[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfds, "load", load_once)
        yield


@pytest.fixture(scope="session")
def other_data(tmp_path_factory):
    """A folder with the data sets `colour`, `unlabelled`, `table` and `letters`."""
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (Colour, Unlabelled, Table, Letters):
        builder(data_dir=folder).download_and_prepare()
    return folder


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory):
    """An interpreter that all tests of one process share, to run recipes as scripts."""
    interpreter = Interpreter(tmp_path_factory.mktemp("interpreter"))
    yield interpreter
    interpreter.close()


@pytest.fixture
def planned(monkeypatch):
    """Return a function that calls a recipe's main, in which nothing is trained, and gives what it would train."""

    def planned(recipe, **flags):
        """Return a list of namespaces in the order of training: variant, model, x, and further arguments of `fit`."""
        found = []

        def fit(model, x, y, *, callbacks, **keywords):
            *_, run = callbacks
            found.append(types.SimpleNamespace(variant=run.variant, model=model, x=x, **keywords))
            metric = run.comparison.result.metric
            metrics = dict.fromkeys(["train", "test"], {metric: 0.5})
            run.comparison._finish_run(run.variant, run.seed, metrics, {}, [], rate=run.rate)
            return types.SimpleNamespace(history={f"val_{metric}": [0.5], "val_loss": [0.5]})

        monkeypatch.setattr(keras.Model, "fit", fit)
        recipe.main(**{"limit": 200} | flags)
        return found

    return planned
