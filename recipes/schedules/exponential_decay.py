"""Exponential decay: multiplies the learning rate by one factor after every epoch.

Symptom: late epochs jump up and down, while training loss falls slowly. A lower learning rate calms them, but is too
slow at the start.

Technique: η = η₀ · factor^epoch, the first epoch being epoch 0. Keras: `keras.optimizers.schedules.ExponentialDecay`, a
function of the optimizer's step, or `keras.callbacks.LearningRateScheduler`, a function of the epoch: the same curve
two ways.

Change: the optimizer's learning rate, where `steps_per_epoch` is the number of batches, the last, smaller one included,

    rate = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=steps_per_epoch, decay_rate=0.8, staircase=True)
    optimizer = keras.optimizers.SGD(rate)

or, with a number as the optimizer's rate, a callback:

    model.fit(..., callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 * 0.8**epoch)])

Without `staircase` the rate falls at every step. `lambda epoch, rate: 0.8 * rate` lowers it in the first epoch, too.

Look for: whether the late epochs calm down, and whether test accuracy gains. A rate that falls may begin higher:
compare the best first rates (`--search`). Choose the factor by the length of the training. The rates of all epochs add
up to at most η₀ / (1 - factor), ten epochs at the first rate with 0.9 and five with 0.8, so that a factor near 1
changes little in a short training, and a small one ends it early. In the picture, the schedule's and the callback's
rate lie upon each other; so do their figures, but for rounding.

Cost: none in time; two hyper-parameters that go together: as a rule, a smaller factor wants a larger first rate. The
schedule counts the optimizer's steps, so its length in epochs changes with the batch size, and a second `fit` goes on
where the first ended; the callback begins anew unless `initial_epoch` is given. A rate that is a schedule cannot be
set: callbacks that set it (LearningRateScheduler, ReduceLROnPlateau) raise an error.

Source: Robbins and Monro, Annals of Mathematical Statistics 22, 1951, on why rates must fall; Senior et al., "An
Empirical Study of Learning Rates in Deep Neural Networks for Speech Recognition", ICASSP 2013, on exponential decay.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison, LearningRateLogger

# What applies the factor, the factor, and the first rate, the best of GRID (--search); schedule and callback have one.
VARIANTS = {
    "constant": (None, 1.0, 0.3),
    "factor 0.9": ("schedule", 0.9, 0.3),
    "factor 0.8": ("schedule", 0.8, 0.3),
    "factor 0.8, callback": ("callback", 0.8, 0.3),
}

# The variant that answers the recipe's question: its last rate is about a hundredth of its first.
HEADLINE = "factor 0.8"

# First learning rates.
GRID = (0.01, 0.03, 0.1, 0.3, 1.0)

# Many steps a call: equal weights, less time. On PyTorch, Keras knows single steps only.
STEPS_PER_CALL = 1 if keras.backend.backend() == "torch" else 32

DATA_DIR = Path(__file__).resolve().parent.parent.parent / "data"


def load(dataset, data_dir, limit):
    """Return (images, labels) for training, validation and test, and the number of classes.

    Images are float32 arrays of shape (examples, height, width, channels), values 0 to 1. Nothing is downloaded.
    """
    try:
        if not data_dir.is_dir():
            raise FileNotFoundError(f"there is no folder {data_dir}")
        split = ["train[:80%]", "train[80%:]", "test"]
        splits, info = tfds.load(
            dataset, split=split, data_dir=data_dir, batch_size=-1, as_supervised=True, with_info=True, download=False
        )
        arrays = []
        for images, labels in tfds.as_numpy(splits):
            largest = np.iinfo(images.dtype).max if images.dtype.kind == "u" else 1  # floats are taken as they are
            arrays.append((images[:limit].astype("float32") / largest, labels[:limit]))
        return *arrays, info.features[info.supervised_keys[1]].num_classes
    except Exception as error:
        cause = str(error).strip().partition("\n")[0].rstrip(".")
        error.add_note(
            f"{dataset!r} was not loaded from {data_dir}: {cause}. Use --data-dir to name a folder in which TensorFlow "
            "Datasets has prepared the set (`tfds build NAME --data_dir FOLDER` does so); the set must have labelled "
            "images of one size, a train and a test split. The recipes' own is in the folder data of their repository."
        )
        raise


def build_model(image_shape, classes):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(128, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def decaying_rate(way, factor, first_rate, steps_per_epoch):
    """Return a learning rate for the optimizer, and a list of callbacks, that follow first_rate · factor^epoch."""
    if way == "schedule":
        decay = keras.optimizers.schedules.ExponentialDecay(  # the technique
            first_rate, decay_steps=steps_per_epoch, decay_rate=factor, staircase=True
        )
        return decay, []
    if way == "callback":
        return first_rate, [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: first_rate * factor**epoch)  # the technique
        ]
    return first_rate, []


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one network at a constant learning rate and at rates that decay by two factors, one of them two ways.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best first rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 64
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (way, factor, first_rate), run in loop:
            model = build_model(train[0].shape[1:], classes)
            rate, callbacks = decaying_rate(way, factor, first_rate, steps)
            model.compile(
                optimizer=keras.optimizers.SGD(rate),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            history = model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[*callbacks, LearningRateLogger(), run],
            ).history
            comparison.add_signal(variant, run.seed, "learning rate", history["learning_rate"], by="epoch", scale="log")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
