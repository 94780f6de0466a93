"""Draw what each callback shows, with its own `plot`: `python -m evidence.callback_pictures`, in half a minute.

A small network is trained on the embedded images, once with the monitors, once with `OneCycle`, and once by the range
test. The pictures are examples, and no measurements: they lie in `evidence/callbacks/`, from where `python -m evidence`
puts them on the callbacks' page.
"""

from pathlib import Path

import cyclopts
import keras
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

import callbacks
from evidence.recipes import ROOT

FOLDER = ROOT / "evidence" / "callbacks"

EPOCHS = 4
BATCH_SIZE = 64


def load(count):
    """Return (images, labels) of the first embedded training images: float32, 0 to 1."""
    data = tfds.load(
        "fashion_mnist_10k", split=f"train[:{count}]", data_dir=ROOT / "data", as_supervised=True, batch_size=-1
    )
    images, labels = (array.numpy() for array in data)
    return images.astype("float32") / 255, labels


def build_model(learning_rate):
    """Return a compiled network of four dense layers, the same each time."""
    keras.utils.set_random_seed(0)
    activations = {"hidden_1": "relu", "hidden_2": "relu", "hidden_3": "tanh"}
    hidden = [layers.Dense(64, activation=activation, name=name) for name, activation in activations.items()]
    model = keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), *hidden, layers.Dense(10, name="logits")])
    model.compile(
        keras.optimizers.SGD(learning_rate, momentum=0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def observe(images, labels):
    """Return {name: callback} of every callback with a picture, each after a training."""
    steps = EPOCHS * -(-len(images) // BATCH_SIZE)
    monitors = [
        callbacks.GradientNorms(every=1),
        callbacks.ActivationStatistics(images[:BATCH_SIZE]),
        callbacks.LearningRateLogger(),
    ]
    decay = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=steps - steps // 5, warmup_target=0.05, warmup_steps=steps // 5
    )
    trainings = [
        (decay, EPOCHS, monitors),
        (0.01, EPOCHS, [callbacks.OneCycle(peak=0.1)]),
        (0.01, 100, [callbacks.LearningRateRangeTest(1e-4, 10.0, steps=100)]),
    ]
    for learning_rate, epochs, used in trainings:
        model = build_model(learning_rate)
        model.fit(images, labels, batch_size=BATCH_SIZE, epochs=epochs, verbose=0, callbacks=used)
    return {type(callback).__name__: callback for *_, used in trainings for callback in used}


def main(*, count: PositiveInt = 2000, folder: Path = FOLDER):
    """Draw a picture of every callback that has a method `plot`.

    Args:
        count: number of images to train on.
        folder: where the pictures go, as NAME.svg.
    """
    folder.mkdir(exist_ok=True)
    for name, callback in observe(*load(count)).items():
        callback.plot(folder / f"{name}.svg")
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    cyclopts.run(main)
