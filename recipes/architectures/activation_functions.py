"""Activation functions: eight of them in one plain deep network, each with the start and the rate that suit it.

Symptom: you wonder whether GELU or SiLU would do better than ReLU. In a deep network the choice may decide whether it
learns at all.

Technique: with the sum z of a unit, ReLU is max(z, 0); leaky ReLU max(z, 0.2 z); ELU z above 0, exp(z) - 1 below; SELU
λ times such a function with α (exp(z) - 1) below, its λ and α chosen so that mean 0 and variance 1 reproduce themselves
from layer to layer; GELU z Φ(z), with the normal distribution function Φ; SiLU (Swish) z σ(z); σ the sigmoid,
1 / (1 + exp(-z)); tanh = 2 σ(2 z) - 1. Below 0 a ReLU passes no gradient, and for large |z| sigmoid and tanh pass next
to none; at most a quarter passes a sigmoid at all. Keras: `activation` of a layer.

Change: one argument, and the initializer that goes with it (He's for all that are like ReLU, LeCun's for SELU, Glorot's
for tanh and sigmoid):

    x = layers.Dense(100, activation="gelu", kernel_initializer="he_normal")(x)

Look for: whether a difference from ReLU is larger than what a search for its rate is worth, and the time of an epoch
beside it. Then the functions that fail: the picture shows how the deviation of the activations changes from layer to
layer before training. Dead units are zero for every image, and have no gradient to come back by.

Cost: the exponential functions take some time in small layers. SELU has conditions: inputs of mean 0 and variance 1,
`lecun_normal`, no sums or gates between layers, and `AlphaDropout` for dropout (`--dropout 0.1` has each function use
its own). Names differ in their defaults (Keras 3.15): `"leaky_relu"` has a slope of 0.2, the layer `LeakyReLU` 0.3, the
paper 0.01; `"gelu"` is exact, `keras.ops.gelu` an approximation.

Source: Maas et al., ICML 2013 workshop (leaky ReLU); Clevert et al., ICLR 2016 (ELU); Klambauer et al.,
"Self-Normalizing Neural Networks", NIPS 2017 (SELU); Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016;
Ramachandran et al., "Searching for Activation Functions", 2017: on ImageNet, Swish in the place of ReLU was worth 0.6
to 0.9 % of accuracy.
"""

from pathlib import Path
from typing import Annotated

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from cyclopts.validators import Number
from keras import layers

from callbacks import ActivationStatistics, Comparison

# The function, the initializer that goes with it, and the best rate of GRID (--search).
VARIANTS = {
    "ReLU": ("relu", "he_normal", 0.001),
    "leaky ReLU": ("leaky_relu", "he_normal", 0.003),
    "ELU": ("elu", "he_normal", 0.001),
    "SELU": ("selu", "lecun_normal", 0.001),
    "GELU": ("gelu", "he_normal", 0.001),
    "SiLU": ("silu", "he_normal", 0.003),
    "tanh": ("tanh", "glorot_normal", 0.001),
    "sigmoid": ("sigmoid", "glorot_normal", 0.003),
}

# The variant that answers the recipe's question.
HEADLINE = "GELU"

# Learning rates of Adam.
GRID = (0.0003, 0.001, 0.003, 0.01)

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


def build_model(image_shape, classes, activation, initializer, dropout=0.0, depth=10, width=100):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    x = layers.Flatten()(x)
    for _ in range(depth):
        x = layers.Dense(width, activation, kernel_initializer=initializer)(x)  # the technique
        # AlphaDropout sets units to the lowest value of SELU, and makes up for the change of mean and variance.
        x = (layers.AlphaDropout if activation == "selu" else layers.Dropout)(dropout)(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    dropout: Annotated[float, cyclopts.Parameter(validator=Number(gte=0, lt=1))] = 0.0,
    search: bool = False,
):
    """Train a network of ten hidden layers with eight activation functions, and compare their test accuracy.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        dropout: share of the hidden units that are dropped, after SELU by AlphaDropout.
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
        same_start=False,  # the start suits the function
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "dropout": dropout},
        columns={"dead units": "share of the hidden units that are zero for each of 256 validation images at the end"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (activation, initializer, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes, activation, initializer, dropout)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            statistics = ActivationStatistics(validation[0][:256], log=False)
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[statistics, run],
            )
            *hidden, _ = statistics.history.values()
            comparison.add_figure(variant, run.seed, "dead units", np.mean([each[-1]["dead"] for each in hidden]))
            deviations = [each[0]["std"] for each in hidden]
            comparison.add_signal(variant, run.seed, "deviation before training", deviations, scale="log")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
