"""Measure what each callback costs: `python -m evidence.overhead` (TensorFlow, about ten minutes on a quiet machine).

For each network and way of compiling it, one model a callback is trained in its own thread, and the threads take turns
at every step, so that all of them see the same machine. An epoch's time is that of its steps, and of everything between
the last step of the epoch before and its own first one. A cost is the ratio of an epoch's time to that of the model
without a callback, the median over epochs; the null control is a second model without a callback. The part of it that
is spent when an epoch ends is also given in milliseconds.
"""

import json
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

import callbacks
from callbacks.comparison import environment, write_whole
from evidence.recipes import ROOT
from evidence.tables import BASELINE, overhead_note, overhead_table, rich_table

RESULT = ROOT / "evidence" / "overhead.json"

BATCH_SIZE = 128
STEPS = 63  # of an epoch of the 8,000 embedded training images


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
    """Return {name: (kind, list of callbacks)} with each callback at its default."""
    batch = inputs[:BATCH_SIZE], targets[:BATCH_SIZE]
    probe, probe_targets = inputs[:64], targets[:64]
    return {
        BASELINE: ("control", []),
        "null control": ("control", []),
        "GradientNorms": ("monitor", [callbacks.GradientNorms()]),
        "ActivationStatistics": ("monitor", [callbacks.ActivationStatistics(probe)]),
        "LearningRateLogger": ("monitor", [callbacks.LearningRateLogger()]),
        "TrainingDoctor": ("monitor", [callbacks.TrainingDoctor((probe, probe_targets), verbose=0)]),
        "OneCycle": ("changes training", [callbacks.OneCycle(peak=0.01, steps=epochs * STEPS)]),
        "StochasticWeightAveraging": ("changes training", [callbacks.StochasticWeightAveraging(epochs // 2)]),
        "second gradient computation": ("for comparison", [SecondGradientComputation(*batch)]),
    }


class _TakeTurn(keras.callbacks.Callback):
    """Takes the machine, and starts the clock, when training or a step begins, or an epoch ends."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def on_train_begin(self, logs=None):
        self.clock.take()

    def on_train_batch_begin(self, batch, logs=None):
        self.clock.take()

    def on_epoch_end(self, epoch, logs=None):
        self.clock.end_epoch()
        # Until the end of the next step, because Keras makes a new iterator before it, which would disturb the others.
        self.clock.take()


class _GiveTurn(keras.callbacks.Callback):
    """Gives the machine to the next thread when a step or training ends."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def on_train_batch_end(self, batch, logs=None):
        self.clock.give()

    def on_epoch_end(self, epoch, logs=None):
        self.clock.note_callbacks()

    def on_train_end(self, logs=None):
        self.clock.give()


class _Clock:
    """Adds up the time during which one of the threads has its turn."""

    def __init__(self, own_turn, next_turn):
        self.own_turn, self.next_turn = own_turn, next_turn
        self.start = None
        self.seconds = 0.0
        self.epochs = []
        self.epoch_ends = []

    def take(self):
        if self.start is None:
            self.own_turn.acquire()
            self.start = time.perf_counter()

    def give(self):
        self.seconds += time.perf_counter() - self.start
        self.start = None
        self.next_turn.release()

    def note_callbacks(self):
        """Note what the callbacks took since the turn was taken at the end of the epoch."""
        self.epoch_ends.append(round(time.perf_counter() - self.start, 6))

    def end_epoch(self):
        self.epochs.append(round(self.seconds, 6))
        self.seconds = 0.0


def measure(network, jit_compile, epochs):
    """Return {name of a contender: its kind}, and twice {name: seconds of each epoch but the first, which compiles}.

    The first seconds are those of whole epochs, the second those of it that the callbacks took when the epoch ended.
    """
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(STEPS, BATCH_SIZE, 28, 28, 1)).astype("float32")
    targets = generator.integers(0, 10, (STEPS, BATCH_SIZE))
    # Slices, taken in the thread of the training: other threads would run in the turns of the others.
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.inject_prefetch = False
    data = tf.data.Dataset.from_tensor_slices((inputs, targets)).with_options(options)
    contending = contenders(inputs[0], targets[0], epochs + 1)
    turns = [threading.Semaphore(int(index == 0)) for index in range(len(contending))]
    clocks = {name: _Clock(turns[index], turns[(index + 1) % len(turns)]) for index, name in enumerate(contending)}

    def train(name):
        model = NETWORKS[network]()
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=jit_compile)
        around = [_TakeTurn(clocks[name]), *contending[name][1], _GiveTurn(clocks[name])]
        model.fit(data, epochs=epochs + 1, verbose=0, callbacks=around)

    threads = [threading.Thread(target=train, args=(name,)) for name in contending]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kinds = {name: kind for name, (kind, _) in contending.items()}
    epochs = {name: clock.epochs[1:] for name, clock in clocks.items()}
    return kinds, epochs, {name: clock.epoch_ends[1:] for name, clock in clocks.items()}


def main(*, epochs: PositiveInt = 30, save: Path = RESULT):
    """Measure the cost of every callback at its default. `python -m evidence` puts the result into evidence/README.md.

    Args:
        epochs: epochs of 63 steps to measure, after one that compiles.
        save: JSON file that receives the result.
    """
    console = Console()
    result = {"environment": environment(), "batch_size": BATCH_SIZE, "steps": STEPS, "seconds": []}
    for network in NETWORKS:
        for jit_compile in (False, True):
            with console.status(f"{network} network, jit_compile={jit_compile}"):
                result["kinds"], seconds, ends = measure(network, jit_compile, epochs)
            result["seconds"].append(
                {"network": network, "jit_compile": jit_compile, "epochs": seconds, "epoch_ends": ends}
            )
    console.print(rich_table("Time relative to no callback: median (quartiles)", overhead_table(result)))
    console.print(overhead_note(result), style="dim", highlight=False)
    write_whole(save, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    cyclopts.run(main)
