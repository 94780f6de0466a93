"""Measure what TrainingDoctor says of healthy and of sick runs, and of programs that people asked about in public.

    python -m evidence.training_doctor

trains in one process, with one thread, for about two hours; each run is written as it ends, and an interrupted
measurement goes on when the command is given again. Seeds below 100 were used while the rules were made; those of the
result begin with 100.
"""

import json
from collections import Counter
from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import NonNegativeInt, PositiveInt
from keras import layers
from rich.console import Console
from rich.progress import track

from callbacks import TrainingDoctor
from callbacks.comparison import environment, write_whole
from evidence.faulty_programs import PROGRAMS
from evidence.recipes import ROOT
from evidence.tables import rich_table

RESULT = ROOT / "evidence" / "training_doctor.json"

# Seeds of each kind of healthy run, of sick run, and of each program.
SEEDS = {"healthy": 20, "sick": 10, "programs": 2}
PROBE = 64


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


# Healthy runs: each architecture, task, batch size and kind of fit.


def dense_network():
    return [layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dropout(0.2), layers.Dense(32, "relu")]


def convolutional_network():
    return [
        layers.Conv2D(16, 3, use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(32, activation="relu"),
    ]


def recurrent_network():
    return [layers.Reshape((14, 14)), layers.GRU(32)]


ARCHITECTURES = {"dense": dense_network, "convolutional": convolutional_network, "recurrent": recurrent_network}


def classification(images, labels):
    return labels, [layers.Dense(10)], keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def binary(images, labels):
    """Shoes against all else, 3 of the 10 classes."""
    return np.isin(labels, (5, 7, 9)).astype("float32"), [layers.Dense(1, "sigmoid")], "binary_crossentropy"


def skewed_regression(images, labels):
    """The exponential of the brightness, so that a few targets are many times the others."""
    brightness = images.mean(axis=(1, 2, 3))
    noise = np.random.default_rng(0).normal(0, 0.2, len(images))
    return np.exp(1.2 * (brightness - 0.29) / 0.15 + noise).astype("float32"), [layers.Dense(1)], "mean_squared_error"


TASKS = {"classification": classification, "binary": binary, "skewed regression": skewed_regression}

# Epochs of each batch size, of about as many steps as it takes.
EPOCHS = {8: 4, 32: 12, 128: 30}
FITS = ("first fit", "second fit", "fine-tuning")


def healthy(architecture, task, batch_size, seed, train_data, validation_data):
    """Yield (kind of fit, doctor) of one model: trained, trained on, and with its first layers frozen."""
    keras.utils.set_random_seed(seed)
    keras.utils.clear_session()
    parts = [(images[:count, ::2, ::2].astype("float32") / 255, labels[:count]) for (images, labels), count in
             zip((train_data, validation_data), (512, 256), strict=True)]
    (images, labels), (other_images, other_labels) = parts
    targets, head, loss = TASKS[task](images, labels)
    other_targets, _, _ = TASKS[task](other_images, other_labels)
    model = keras.Sequential([keras.Input(images.shape[1:]), *ARCHITECTURES[architecture](), *head])
    for fit in FITS:
        if fit == "fine-tuning":
            model.layers[1].trainable = False
        if fit != "second fit":
            model.compile(keras.optimizers.Adam(0.002 if fit == "first fit" else 0.0002), loss)
        doctor = TrainingDoctor((images[:PROBE], targets[:PROBE]), verbose=0)
        model.fit(
            images,
            targets,
            batch_size=batch_size,
            epochs=EPOCHS[batch_size],
            validation_data=(other_images, other_targets),
            verbose=0,
            callbacks=[doctor],
        )
        yield fit, doctor
