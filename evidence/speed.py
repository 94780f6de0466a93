"""Measure how fast our `fit` trains: `python -m evidence.speed` (TensorFlow, some seven minutes on a quiet machine).

For a dense and a convolutional network, four ways of training take turns in one process: `fit` with as many steps an
execution as an epoch has, on batches that `tf.data` makes without its automatic tuning, for whose thread the end of an
epoch waits, up to as long as the epoch took; `fit` with one step an execution on the same batches; a loop written by
hand around a `tf.function` on the same batches; and `fit` on arrays with Keras's default settings. All have the images
in memory and shuffle them anew in each epoch, with the same optimizer and the same metrics. A turn is a training of
some epochs by a model that has been trained, and so compiled, before. A ratio is that of two speeds of one round; shown
is the median over rounds.
"""

import json
import time
from pathlib import Path
from typing import Annotated

import cyclopts
import keras
import numpy as np
import tensorflow as tf
from keras import layers
from rich.console import Console
from rich.progress import track

from callbacks.comparison import environment, write_whole
from evidence.recipes import ROOT
from evidence.tables import OURS, rich_table, speed_note, speed_table

RESULT = ROOT / "evidence" / "speed.json"

BATCH_SIZE = 128
STEPS = 63  # of an epoch of the 8,000 embedded training images
EPOCHS = 5  # of a turn


def dense_network():
    """Return three dense layers of 100 units, as in the recipe adaptive_optimizers, and the head."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Rescaling(1 / 255),
            layers.Flatten(),
            *(layers.Dense(100, activation="relu", kernel_initializer="he_normal") for _ in range(3)),
            layers.Dense(10),
        ]
    )


def convolutional_network():
    """Return the network of two convolutions that tutorials teach."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Rescaling(1 / 255),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(10),
        ]
    )


NETWORKS = {"dense": dense_network, "convolutional": convolutional_network}


def batches(images, labels):
    """Return shuffled batches that make no iterator wait: their tuning, which does, is off."""
    options = tf.data.Options()
    options.autotune.enabled = False
    data = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images)).batch(BATCH_SIZE)
    return data.prefetch(2).with_options(options)


def by_fit(model, data, **settings):
    """Return a function that trains the model for some epochs by `fit`, with more settings for `compile`.

    Args:
        model: the model, not compiled.
        data: dict with the arguments of `fit` that hold the data.
        settings: for `compile`.
    """
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer="adam", loss=loss, metrics=["accuracy"], **settings)
    return lambda epochs: model.fit(**data, epochs=epochs, verbose=0)


def by_hand(model, data):
    """Return a function that trains the model for some epochs by a loop around a `tf.function`."""
    optimizer = keras.optimizers.Adam()
    optimizer.build(model.trainable_variables)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    metrics = [keras.metrics.Mean(), keras.metrics.SparseCategoricalAccuracy()]

    @tf.function
    def step(inputs, targets):
        with tf.GradientTape() as tape:
            logits = model(inputs, training=True)
            value = loss(targets, logits)
        optimizer.apply(tape.gradient(value, model.trainable_variables), model.trainable_variables)
        metrics[0].update_state(value)
        metrics[1].update_state(targets, logits)

    def train(epochs):
        for _ in range(epochs):
            for metric in metrics:
                metric.reset_state()
            for batch in data:
                step(*batch)

    return train


def contenders(network, images, labels):
    """Return {name: function that trains its own model of the network for some epochs}."""
    make = NETWORKS[network]
    data = batches(images, labels)
    shuffled, arrays = {"x": data, "shuffle": False}, {"x": images, "y": labels, "batch_size": BATCH_SIZE}
    return {
        OURS: by_fit(make(), shuffled, steps_per_execution=STEPS),
        "one step an execution": by_fit(make(), shuffled),
        "loop by hand": by_hand(make(), data),
        "fit on arrays, default settings": by_fit(make(), arrays),
    }


def measure(network, rounds):
    """Return {name: images per second in each round}, after a turn of each that compiles."""
    generator = np.random.default_rng(0)
    count = STEPS * BATCH_SIZE
    images = generator.integers(0, 256, (count, 28, 28, 1), dtype=np.uint8)
    labels = generator.integers(0, 10, count)
    contending = contenders(network, images, labels)
    for train in contending.values():
        train(1)
    speeds = {name: [] for name in contending}
    for _ in track(range(rounds), network, console=Console(stderr=True), transient=True):
        for name, train in contending.items():
            start = time.perf_counter()
            train(EPOCHS)
            speeds[name].append(round(EPOCHS * count / (time.perf_counter() - start)))
    return speeds


AtLeastTwo = Annotated[int, cyclopts.Parameter(validator=cyclopts.validators.Number(gte=2))]


def main(*, rounds: AtLeastTwo = 15, save: Path = RESULT):
    """Measure how fast three ways of training are. `python -m evidence` puts the result into evidence/README.md.

    Args:
        rounds: turns of each way; quartiles need two.
        save: JSON file that receives the result.
    """
    result = {"environment": environment(), "batch_size": BATCH_SIZE, "steps": STEPS, "epochs": EPOCHS}
    result["speeds"] = {network: measure(network, rounds) for network in NETWORKS}
    console = Console()
    console.print(
        rich_table("Images per second of our fit, and how many times as fast as others it is", speed_table(result))
    )
    console.print(speed_note(result), style="dim", highlight=False)
    write_whole(save, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
