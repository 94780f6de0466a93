"""Measure what each callback costs: `python -m evidence.overhead` (TensorFlow, about five minutes).

For each network and way of compiling it, one model a callback is trained in its own thread, and the threads take turns
at every step, so that all of them see the same machine. An epoch's time is that of its steps, from begin to end, and of
what the callbacks do at its end. A cost is the ratio of an epoch's time to that of the model without a callback, the
median over epochs; the null control is a second model without a callback.
"""

import json
import statistics
import threading
import time
from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow as tf
from cyclopts.types import PositiveInt
from keras import layers
from rich.console import Console
from rich.table import Table

import callbacks
from callbacks.comparison import environment, replacing
from evidence.recipes import ROOT

RESULT = ROOT / "evidence" / "overhead.json"

BATCH_SIZE = 128
STEPS = 63  # of an epoch of the 8,000 embedded training images
BASELINE = "no callback"


class SecondGradientComputation(keras.callbacks.Callback):
    """The usual way to gradient norms: after each step, compute the gradients of a batch once more."""

    def __init__(self, inputs, targets):
        super().__init__()
        self.batch = tf.constant(inputs), tf.constant(targets)

    def on_train_begin(self, logs=None):
        model = self.model

        @tf.function(jit_compile=model.jit_compile)
        def norm(inputs, targets):
            with tf.GradientTape() as tape:
                loss = model.compute_loss(inputs, targets, model(inputs, training=True))
            return tf.linalg.global_norm(tape.gradient(loss, model.trainable_variables))

        self._norm = norm

    def on_train_batch_end(self, batch, logs=None):
        self._norm(*self.batch)


def dense_network():
    """Return the network 784-256-256-10."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Flatten(),
            layers.Dense(256, activation="relu"),
            layers.Dense(256, activation="relu"),
            layers.Dense(10),
        ]
    )


def convolutional_network():
    """Return a network of two small convolutions and a dense layer."""
    return keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


NETWORKS = {"dense": dense_network, "convolutional": convolutional_network}


def contenders(inputs, targets, epochs):
    """Return {name: list of callbacks} with each callback at its default."""
    batch = inputs[:BATCH_SIZE], targets[:BATCH_SIZE]
    return {
        BASELINE: [],
        "null control": [],
        "GradientNorms": [callbacks.GradientNorms()],
        "second gradient computation": [SecondGradientComputation(*batch)],
    }


class _Turn(keras.callbacks.Callback):
    """Holds the machine, and its clock, from the begin of each step or epoch's end to the end of it."""

    def __init__(self, begins, clock):
        super().__init__()
        self.begins = begins
        self.clock = clock

    def on_train_batch_begin(self, batch, logs=None):
        if self.begins:
            self.clock.take()

    def on_train_batch_end(self, batch, logs=None):
        if not self.begins:
            self.clock.give()

    def on_epoch_end(self, epoch, logs=None):
        if self.begins:
            self.clock.take()
        else:
            self.clock.give()
            self.clock.epochs.append(self.clock.seconds)
            self.clock.seconds = 0.0


class _Clock:
    """Adds up the time during which one of the threads has its turn."""

    def __init__(self, own_turn, next_turn):
        self.own_turn, self.next_turn = own_turn, next_turn
        self.seconds = 0.0
        self.epochs = []

    def take(self):
        self.own_turn.acquire()
        self._start = time.perf_counter()

    def give(self):
        self.seconds += time.perf_counter() - self._start
        self.next_turn.release()


def measure(network, jit_compile, epochs):
    """Return {name of a contender: seconds of each epoch}, the first epoch, which compiles, left out."""
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(BATCH_SIZE * STEPS, 28, 28, 1)).astype("float32")
    targets = generator.integers(0, 10, len(inputs))
    contending = contenders(inputs, targets, epochs)
    turns = [threading.Semaphore(int(index == 0)) for index in range(len(contending))]
    clocks = {name: _Clock(turns[index], turns[(index + 1) % len(turns)]) for index, name in enumerate(contending)}

    def train(name):
        model = NETWORKS[network]()
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=jit_compile)
        around = [_Turn(True, clocks[name]), *contending[name], _Turn(False, clocks[name])]
        model.fit(inputs, targets, batch_size=BATCH_SIZE, epochs=epochs + 1, verbose=0, callbacks=around)

    threads = [threading.Thread(target=train, args=(name,)) for name in contending]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {name: clock.epochs[1:] for name, clock in clocks.items()}


def summarise(seconds):
    """Return {name: (median, lower and upper quartile) of the ratios to the baseline's epochs}."""
    ratios = {
        name: [own / base for own, base in zip(times, seconds[BASELINE], strict=True)]
        for name, times in seconds.items()
    }
    return {
        name: (statistics.median(values), *statistics.quantiles(values, n=4)[::2])
        for name, values in ratios.items()
        if name != BASELINE
    }


def table(result):
    """Return a saved result as a dict from a column's title to its cells."""
    first = summarise(result["seconds"][0]["epochs"])
    columns = {"callback": list(first)}
    for measured in result["seconds"]:
        title = f"{measured['network']}, {'XLA' if measured['jit_compile'] else 'default'}"
        columns[title] = [
            f"{median:.3f} ({lower:.3f}–{upper:.3f})" for median, lower, upper in summarise(measured["epochs"]).values()
        ]
    return columns


def main(*, epochs: PositiveInt = 30, save: Path = RESULT):
    """Measure the cost of every callback at its default.

    Args:
        epochs: epochs of 63 steps to measure, after one that compiles.
        save: JSON file that receives the result.
    """
    console = Console()
    result = {"environment": environment(), "batch_size": BATCH_SIZE, "steps": STEPS, "seconds": []}
    for network in NETWORKS:
        for jit_compile in (False, True):
            with console.status(f"{network} network, jit_compile={jit_compile}"):
                seconds = measure(network, jit_compile, epochs)
            result["seconds"].append({"network": network, "jit_compile": jit_compile, "epochs": seconds})
    columns = table(result)
    shown = Table(*columns, title="Time of a step relative to no callback: median (quartiles)")
    for cells in zip(*columns.values(), strict=True):
        shown.add_row(*cells)
    console.print(shown)
    with replacing(save) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    cyclopts.run(main)
