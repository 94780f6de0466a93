"""Exponential moving average: keeps a running average of the weights, and evaluates that in their place.

Symptom: validation figures leap up and down from epoch to epoch. At a constant learning rate, training ends wherever
its last steps have led.

Technique: after every step, a ← m · a + (1 - m) · w. The average a looks back over some 1 / (1 - m) steps, so that the
noise of single steps cancels, while training goes on with w as before. Keras: `use_ema=True` in any optimizer. Its
average begins with the weights after the first step, which keep a share of mᵗ⁻¹ after t steps: training has to last
many times 1 / (1 - m) steps to forget them.

Change: two arguments of the optimizer, and one callback. Start with m = 0.99, or 0.999 for tens of thousands of steps:

    optimizer = keras.optimizers.Adam(0.001, use_ema=True, ema_momentum=0.99)
    model.fit(..., callbacks=[keras.callbacks.SwapEMAWeights()])

`fit` ends with the average in the model either way; the callback also puts it there for each validation.

Look for: whether the validation curve of the average is steadier than that of the weights, and how many epochs it takes
to be above it: with a large m the first weights linger. At the end, compare it with the learning rate that decays to
zero, which quiets the weights in another way. That rival has to know the last step beforehand; the average is there at
any time.

Cost: a copy of the weights, and one hyper-parameter, m. Batch normalisation's moving statistics are not averaged, for
they belong to the trained weights. Renew them first, by calling the model on training batches with `training=True`;
this network has none. (stochastic_weight_averaging.py shows what old ones do.) `ModelCheckpoint` and `EarlyStopping`,
later in the list, keep averages only with `SwapEMAWeights(swap_on_epoch=True)`; in Keras 3.15, a training stopped
before its last epoch then leaves the trained weights in the model, unless one of them restores what it has kept.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
Optimization 30, 1992, for the equal average; Keras API, optimizers, `use_ema`.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The optimizer's arguments for averaging, whether the learning rate decays to zero, and the best of GRID (--search).
VARIANTS = {
    "constant rate": ({}, False, 0.0003),
    "EMA 0.9": ({"use_ema": True, "ema_momentum": 0.9}, False, 0.001),
    "EMA 0.99": ({"use_ema": True, "ema_momentum": 0.99}, False, 0.001),
    "EMA 0.999": ({"use_ema": True, "ema_momentum": 0.999}, False, 0.003),
    "cosine decay": ({}, True, 0.003),
}

# The variant that answers the recipe's question.
HEADLINE = "EMA 0.99"

# Learning rates of Adam.
GRID = (0.0001, 0.0003, 0.001, 0.003, 0.01)

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


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    batch_size: PositiveInt = 32,
    search: bool = False,
):
    """Train one network at a constant rate, with averages of its weights, and at a decaying rate, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        batch_size: examples in a training step; the fewer, the noisier are the weights.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "batch size": batch_size},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for _, (averaging, decays, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes)
            # The constant rate is the baseline here: its noise is what is averaged.
            cosine = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
            model.compile(
                optimizer=keras.optimizers.Adam(cosine if decays else learning_rate, **averaging),  # the technique
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            # So that validation figures are those of the averaged weights, too.
            swap = [keras.callbacks.SwapEMAWeights()] if averaging else []
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[*swap, run],
            )
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
