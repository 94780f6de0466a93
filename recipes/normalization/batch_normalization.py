"""Batch normalization: gives every unit mean 0 and variance 1 over the batch, then a learned scale and shift.

Symptom: training is slow, and fails when you raise the learning rate. The network is deep.

Technique: for every unit, y = γ · (x - μ) / √(σ² + ε) + β, with γ and β learned. In training μ and σ² are the mean and
the variance over the batch; at inference they are moving averages, each updated at every training step as
moving ← momentum · moving + (1 - momentum) · batch. Keras: `keras.layers.BatchNormalization`, with ε = 0.001.

Change: one line between the weights and the activation. It subtracts the bias of the layer before: leave that out.

    x = layers.Dense(128, use_bias=False)(x)
    x = layers.BatchNormalization(momentum=0.9)(x)
    x = layers.ReLU()(x)

Keras's default momentum is 0.99, with which the moving averages need hundreds of steps to forget the 0 and 1 that they
begin with. Until then validation looks worse than the network is. Take 0.9 where an epoch has only dozens of steps.

Look for: test accuracy after a short training, for the promise is speed. Each variant has the learning rate that suits
it best, and this rate falls to zero within these few epochs. `--search` shows whether the network without it bears the
large rates that the others do. Then give it more time, `--epochs 15`: see whether the network without it catches up,
and what becomes of the gap, for to fit the training images sooner is not yet to predict others better.

Cost: γ, β and two moving averages for each unit, time in every step, and one hyper-parameter, the momentum. An
example's output in training depends on the rest of its batch, and small batches make it worse: normalization_layers.py
has the alternatives. Dropout before it makes the moving variance wrong for inference; averaged weights need the moving
averages computed anew.

Source: Ioffe & Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
ICML 2015, who put it before the activation, and needed 14 times fewer steps on ImageNet.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# Where the normalisation stands, seen from the activation, and the best rate of GRID (--search).
VARIANTS = {
    "none": ("none", 0.1),
    "before ReLU": ("before", 0.3),
    "after ReLU": ("after", 0.3),
}

# The variant that answers the recipe's question.
HEADLINE = "before ReLU"

# Learning rates of gradient descent.
GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

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


def build_model(image_shape, classes, place):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Flatten()(inputs)
    for _ in range(6):
        # Before the activation, the normalisation would subtract the bias again; its own β takes the bias's place.
        x = layers.Dense(128, use_bias=place != "before", kernel_initializer="he_normal")(x)
        if place == "before":
            x = layers.BatchNormalization(momentum=0.9)(x)  # the technique
        x = layers.ReLU()(x)
        if place == "after":
            x = layers.BatchNormalization(momentum=0.9)(x)  # the technique
    return keras.Model(inputs, layers.Dense(classes)(x))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 4,  # short: the promise is speed
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one network without batch normalisation, with it before the activations, and with it after them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # γ and β are weights of their own; the kernels start equal, for the seed makes them
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for _, (place, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes, place)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            )
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
