"""Measure what TrainingDoctor finds in healthy and in sick runs: `python -m evidence.training_doctor` (15 minutes).

Every kind of run is trained with seeds 40 to 59; the healthy ones take turns at three architectures. The thresholds of
TrainingDoctor were fixed on seeds 0 to 19 (`--first-seed 0`), and two of its rules were corrected after seeds 20 to 39.
A third was corrected after seeds 40 to 59: that a plateau is told beside overfitting. Before, 17 of these 20 plateaus
were named; the findings in the result are told by the corrected rule from the figures measured before.
"""

import json
from collections import Counter
from pathlib import Path

import cyclopts
import keras
import tensorflow_datasets as tfds
from cyclopts.types import NonNegativeInt, PositiveInt
from keras import layers
from rich.console import Console
from rich.progress import track

from callbacks import TrainingDoctor
from callbacks.comparison import environment, write_whole
from evidence.recipes import ROOT
from evidence.tables import rich_table

RESULT = ROOT / "evidence" / "training_doctor.json"

HEALTHY = "healthy"


def load():
    """Return (images, labels) of the embedded training and validation images."""
    splits = tfds.load(
        "fashion_mnist_10k",
        split=["train[:80%]", "train[80%:]"],
        data_dir=ROOT / "data",
        as_supervised=True,
        batch_size=-1,
        download=False,
    )
    return [tuple(array.numpy() for array in split) for split in splits]


def dense(width=128, depth=2, activation="relu", scale=1 / 255, rate=0.0, **arguments):
    """Return a classifier with `depth` dense layers of `width` units."""
    model = keras.Sequential([keras.Input((28, 28, 1)), layers.Rescaling(scale), layers.Flatten()])
    for _ in range(depth):
        model.add(layers.Dense(width, activation=activation, **arguments))
        model.add(layers.Dropout(rate))
    model.add(layers.Dense(10, **arguments))
    return model


def convolutional():
    """Return a classifier with two convolutions."""
    model = keras.Sequential([keras.Input((28, 28, 1)), layers.Rescaling(1 / 255)])
    for filters in (16, 32):
        model.add(layers.Conv2D(filters, 3, activation="relu"))
        model.add(layers.MaxPooling2D())
    model.add(layers.Flatten())
    model.add(layers.Dense(10))
    return model


def recurrent():
    """Return a classifier that reads the rows of an image one after the other."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Rescaling(1 / 255),
            layers.Reshape((28, 28)),
            layers.GRU(64),
            layers.Dense(10),
        ]
    )


def healthy(seed):
    """Return a run of one of three architectures, each with a usual optimizer."""
    schedule = keras.optimizers.schedules.CosineDecay(0.02, 8 * 125)
    return [
        (dense(rate=0.2), {"optimizer": keras.optimizers.Adam(0.001), "epochs": 8, "examples": 8000}),
        (convolutional(), {"optimizer": keras.optimizers.SGD(schedule, momentum=0.9), "epochs": 8, "examples": 8000}),
        (recurrent(), {"optimizer": keras.optimizers.RMSprop(0.001), "epochs": 8, "examples": 8000}),
    ][seed % 3]


def adam(rate=0.001, **arguments):
    return keras.optimizers.Adam(rate, **arguments)


# What is wrong: (model, settings) of a run in which it is.
SICK = {
    "inputs out of range": lambda: (dense(scale=1.0), {}),
    "loss not finite": lambda: (
        dense(activation="tanh"),
        {"optimizer": keras.optimizers.SGD(10.0), "loss": "mean_squared_error"},
    ),
    "exploding gradients": lambda: (dense(), {"corrupt": 100}),
    "vanishing gradients": lambda: (dense(width=64, depth=10, activation="sigmoid"), {}),
    "stuck at chance": lambda: (dense(kernel_initializer="zeros"), {}),
    "dead units": lambda: (dense(bias_initializer=keras.initializers.Constant(-2.0)), {}),
    "saturated units": lambda: (dense(activation="tanh", kernel_initializer=keras.initializers.RandomNormal(0, 1)), {}),
    "rate too high": lambda: (dense(), {"optimizer": adam(0.3)}),
    "rate too low": lambda: (dense(), {"optimizer": adam(1e-6)}),
    "overfitting": lambda: (dense(width=512), {"epochs": 30, "examples": 1000}),
    "underfitting": lambda: (dense(width=1, depth=1, activation="linear"), {"optimizer": adam(0.01), "epochs": 30}),
    "plateau at a constant rate": lambda: (
        dense(width=32, activation="tanh"),
        {"optimizer": adam(0.03), "epochs": 20, "examples": 8000},
    ),
    "clipping most of the time": lambda: (dense(), {"optimizer": adam(0.001, global_clipnorm=0.05)}),
}


def train(kind, seed, train_data, validation_data):
    """Train one run, and return its doctor."""
    keras.utils.set_random_seed(seed)
    keras.utils.clear_session()
    model, settings = healthy(seed) if kind == HEALTHY else SICK[kind]()
    (images, labels), (probe, _) = train_data, validation_data
    examples = settings.get("examples", 2000)
    loss = settings.get("loss", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    if loss == "mean_squared_error":
        labels, validation_data = keras.ops.one_hot(labels, 10), (probe, keras.ops.one_hot(validation_data[1], 10))
    if step := settings.get("corrupt"):
        images = images.astype("float32")
        images[::step] *= 1000
    model.compile(settings.get("optimizer", adam()), loss)
    doctor = TrainingDoctor(probe[:64], verbose=0)
    model.fit(
        images[:examples],
        labels[:examples],
        batch_size=64 if examples == 8000 else 32,
        epochs=settings.get("epochs", 8),
        validation_data=validation_data,
        verbose=0,
        callbacks=[doctor],
    )
    return doctor


def table(result):
    """Return a saved result as a dict from a column's title to its cells."""
    columns = {"what is wrong": [], "runs": [], "named": [], "also named": []}
    for kind in dict.fromkeys(run["kind"] for run in result["runs"]):
        runs = [run for run in result["runs"] if run["kind"] == kind]
        counts = Counter(name for run in runs for name in run["findings"])
        named = counts.pop(kind, 0)
        columns["what is wrong"].append("nothing" if kind == HEALTHY else kind)
        columns["runs"].append(str(len(runs)))
        columns["named"].append("–" if kind == HEALTHY else str(named))
        columns["also named"].append(", ".join(f"{name} {count}" for name, count in counts.most_common()) or "–")
    return columns


def main(*, first_seed: NonNegativeInt = 40, seeds: PositiveInt = 20, save: Path = RESULT):
    """Train healthy and sick runs, and count what TrainingDoctor finds.

    Args:
        first_seed: seed of the first run of each kind.
        seeds: number of runs of each kind.
        save: JSON file that receives every run's findings and figures.
    """
    data = load()
    chosen = [(kind, seed) for kind in (HEALTHY, *SICK) for seed in range(first_seed, first_seed + seeds)]
    result = {"environment": environment(), "runs": []}
    for kind, seed in track(chosen, "training", console=Console(stderr=True)):
        doctor = train(kind, seed, *data)
        found = [finding.name for finding in doctor.findings]
        result["runs"].append({"kind": kind, "seed": seed, "findings": found, "signs": doctor.signs})
    Console().print(rich_table("What TrainingDoctor found", table(result)))
    write_whole(save, json.dumps(json.loads(json.dumps(result), parse_constant=str), indent=1) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
