"""Noise layers: disturb feature maps in training, pixel by pixel or map by map.

Symptom: dropout between your convolutions changes nothing. The network still overfits.

Technique: neighbouring pixels of a feature map tell nearly the same. Where one is dropped, the next convolution has its
neighbours, so that little is missing. `SpatialDropout2D(p)` drops a map of an example as a whole: h ← m · h / (1 - p),
with one m, 0 with probability p and else 1, for all its pixels. `Dropout(p)` draws m for each pixel.
`GaussianDropout(p)` multiplies each by a normal number of mean 1 and variance p / (1 - p), which are those of
m / (1 - p). `GaussianNoise(σ)` adds a normal number of deviation σ. In evaluation none of them does anything.

Change: one line after each convolution's activation, and after its pooling, if there is one:

    x = layers.SpatialDropout2D(0.2)(x)

Look for: whether the gap between training and test accuracy closes more with whole maps than with pixels, at the same
p, and whether test accuracy gains by it. `GaussianDropout` beside `Dropout` tells whether it matters that values are
zero, or only that they are disturbed. If nothing differs, the network may overfit in its dense layers, and dropout
belongs there.

Cost: random numbers for each pixel, or for each map, which is cheap; one hyper-parameter, 0.1 to 0.3. Before a pooling
layer it does something else: the maximum of disturbed values is not the disturbed maximum, and its mean differs between
training and evaluation. A network can escape added noise by making its activations large. At the input it cannot, so
`GaussianNoise` is usual there, with a σ that suits its scale; Keras 3.15 refuses one above 1.

Source: Tompson et al., "Efficient Object Localization Using Convolutional Networks", CVPR 2015, for whole maps;
Srivastava et al., "Dropout", JMLR 15, 2014, section 10, for Gaussian factors; Bishop, "Training with Noise is
Equivalent to Tikhonov Regularization", Neural Computation 7, 1995, for added noise.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# What makes the noise layer, and the best rate of GRID (--search). The first three have the same mean and variance, and
# the last adds to every value the noise that `GaussianDropout` adds to a value of 1.
VARIANTS = {
    "no noise": (None, 0.01),
    "Dropout": (lambda: layers.Dropout(0.2), 0.01),
    "SpatialDropout2D": (lambda: layers.SpatialDropout2D(0.2), 0.01),
    "GaussianDropout": (lambda: layers.GaussianDropout(0.2), 0.01),
    "GaussianNoise": (lambda: layers.GaussianNoise(0.5), 0.01),
}

# The variant that answers the recipe's question.
HEADLINE = "SpatialDropout2D"

# Learning rates of Adam.
GRID = (0.001, 0.003, 0.01, 0.03)

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


def build_model(image_shape, classes, noise):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    for filters in (12, 24):
        x = layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu")(x)
        if noise is not None:
            x = noise()(x)  # the technique
    x = layers.Flatten()(x)
    x = layers.Dense(64, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 15,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one convolutional network without noise and with four kinds of it, and compare their test accuracy.

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
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for _, (noise, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes, noise)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
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
