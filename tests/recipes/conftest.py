import numpy as np
import pytest
import tensorflow_datasets as tfds

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


@pytest.fixture(scope="session")
def colour_images(tmp_path_factory):
    """A folder with the data sets `colour` and `unlabelled`."""
    folder = tmp_path_factory.mktemp("tfds")
    for builder in (Colour, Unlabelled):
        builder(data_dir=folder).download_and_prepare()
    return folder


@pytest.fixture(scope="session")
def interpreter(tmp_path_factory):
    """An interpreter that all tests of one process share, to run recipes as scripts."""
    interpreter = Interpreter(tmp_path_factory.mktemp("interpreter"))
    yield interpreter
    interpreter.close()
