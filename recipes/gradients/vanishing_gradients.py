"""Vanishing gradients: measures how the gradient fades or grows on its way back, layer by layer, and what keeps it.

Symptom: the loss stays near that of guessing, at any learning rate. The network is deep or recurrent, and the gradients
of its first layers are orders of magnitude smaller, or larger, than those of the last.

Technique: on its way back through a layer the gradient g is multiplied by the derivative of the activation function and
by the weights: g ← Wᵀ(f'(z) · g). The derivative of sigmoid is 1/4 at most, that of tanh 1 at zero, and that of ReLU 0
or 1; with weights that fit the function (Glorot's for tanh, He's for ReLU) the size stays. Batch normalisation before a
sigmoid divides the gradient by the deviation of what it normalises, which makes up for the small derivative. Keras:
`activation`, `kernel_initializer`, `layers.BatchNormalization`; `GradientNorms` of this collection measures.

Change: the activation function with the start that fits it,

    x = layers.Dense(128, activation="relu", kernel_initializer="he_normal")(x)

or, where it is to be sigmoid, batch normalisation before it:

    x = layers.Dense(128, use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.Activation("sigmoid")(x)

Look for: the norm of the gradient at the first step, by layer, on a logarithmic axis. Where it falls by a constant
factor from layer to layer, the first layers get next to nothing. Does Adam make up for it, which divides each gradient
by its own size? Compare the accuracies. `--network recurrent` shows the same for the rows that a recurrent network has
read: it multiplies by the same weights at each, so their scale counts to the power of the number of rows. See whether
the most even gradient is also the best network there.

Cost: another activation function or start costs nothing; batch normalisation takes time, and an example's output then
depends on its batch. Clipping limits gradients that explode, and does nothing for those that vanish.

Source: Hochreiter, "The Vanishing Gradient Problem During Learning Recurrent Neural Nets and Problem Solutions", 1998;
Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", ICML 2013.
"""

from pathlib import Path
from typing import Literal

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison, GradientNorms

# The activation function, the start, whether batch normalisation comes before, and the best rate of GRID (--search).
VARIANTS = {
    "sigmoid": ("sigmoid", "glorot_uniform", False, 0.003),
    "tanh, Glorot": ("tanh", "glorot_uniform", False, 0.001),
    "ReLU, He": ("relu", "he_normal", False, 0.001),
    "sigmoid, batch norm": ("sigmoid", "glorot_uniform", True, 0.001),
}

# With --network recurrent: orthogonal recurrent weights, times a number, which is then their every singular value.
RECURRENT_VARIANTS = {
    "orthogonal × 1": (1.0, 0.001),
    "orthogonal × 0.5": (0.5, 0.001),
    "orthogonal × 1.5": (1.5, 0.001),
    "orthogonal × 3": (3.0, 0.001),
}

# The variant that answers the recipe's question.
HEADLINE = "ReLU, He"

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


def build_model(image_shape, classes, activation, initializer, normalise):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Flatten()(inputs)
    for number in range(1, 11):
        x = layers.Dense(128, kernel_initializer=initializer, use_bias=not normalise, name=f"layer_{number}")(x)
        if normalise:
            # Keras's default momentum of 0.99 is slow where an epoch has few steps.
            x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.Activation(activation)(x)  # the technique, with the two before it
    return keras.Model(inputs, layers.Dense(classes)(x))


def build_recurrent_model(image_shape, classes, gain):
    """Return a classifier that reads an image row by row.

    The input weights of each row are its own, so that the gradient that reaches a row can be told from the others'.
    """
    inputs = keras.Input(image_shape)
    x = layers.Reshape((image_shape[0], -1))(inputs)
    initializer = keras.initializers.Orthogonal(gain)  # the technique
    recurrent = layers.Dense(128, use_bias=False, kernel_initializer=initializer, name="recurrent")
    state = layers.Activation("tanh")(layers.Dense(128, name="row_1")(x[:, 0]))
    for row in range(1, image_shape[0]):
        row_inputs = layers.Dense(128, name=f"row_{row + 1}")(x[:, row])
        state = layers.Activation("tanh")(layers.Add()([row_inputs, recurrent(state)]))
    return keras.Model(inputs, layers.Dense(classes)(state))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    network: Literal["dense", "recurrent"] = "dense",
    search: bool = False,
):
    """Train a deep network in four forms, and compare the gradients that reach its layers, and test accuracy.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        network: ten dense layers, or a recurrent network over an image's rows, from four scales of its recurrent
            weights.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    if network == "dense":
        variants, build, place = VARIANTS, build_model, "layer"
    else:
        variants, build, place = RECURRENT_VARIANTS, build_recurrent_model, "row"
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # batch norm adds weights, and the scale of the start is part of the subject
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "network": network},
        columns={"first / last": f"norm of the gradient of the first {place} over that of the last, at the first step"},
        save=save,
    ) as comparison:
        loop = comparison.search(variants, GRID, seeds) if search else comparison.runs(variants, seeds)
        for variant, (*options, learning_rate), run in loop:
            model = build(train[0].shape[1:], classes, *options)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            norms = GradientNorms(every=epochs * steps, log=False)  # at the first step, before any weight has changed
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[norms, run],
            )
            by_place = [norms.history[name][0] for name in norms.layers if name.startswith(f"{place}_")]
            comparison.add_figure(variant, run.seed, "first / last", by_place[0] / by_place[-1])
            comparison.add_signal(variant, run.seed, "norm of gradient", by_place, by=place, scale="log")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
