"""Residual connections: adds each block's input to its output, so that a deeper network is not a worse one.

Symptom: a deeper network is worse than a shallower one, in training, too. So it is not overfitting. It normalises its
activations, and you have searched for its learning rate.

Technique: y = x + F(x), where F is two layers of weights, each after a normalisation and an activation. With weights of
zero, F is zero and the block the identity: a deeper network can be what a shallower one is, and each block learns by
how much to differ from it. On the way back ∂ℒ/∂x = (1 + ∂F/∂x)ᵀ ∂ℒ/∂y: the 1 passes the gradient on undiminished. For
that nothing may stand between the sums, so the activation is part of F here (the first paper has a ReLU after each sum,
the second moves it). Where F changes the shape, x has to follow: here by leaving out pixels and adding empty channels,
which takes no weights; a 1×1 convolution is usual, too. Keras: `layers.Add`.

Change: one line for each block:

    x = layers.Add()([x, block(x)])

Look for: how accuracy changes with depth, without and with the sums. Where a plain network is bad, look at its gap: if
that is small, it does not even fit the training images, and depth is what hurts. Then the picture: how large each
block's contribution ‖F(x)‖ / ‖x‖ is in a short sum and in a long one, and how accuracy suffers if one block is left
out after training. A residual network can spare most of its blocks if each adds little; a plain one has no way around
any.

Cost: no weights; an addition for each block. Input and output of a block must have one shape. The size of x grows with
every sum: without normalisation, scale F down or start its last weights at zero.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, and "Identity Mappings in Deep Residual
Networks", ECCV 2016; Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow
Networks", NIPS 2016.
"""

from pathlib import Path
from typing import Literal

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The number of layers with weights, whether each block's input is added to its output, and the best of GRID (--search).
VARIANTS = {
    "plain 44": (44, False, 0.03),
    "residual 44": (44, True, 0.3),
    "plain 20": (20, False, 0.03),
    "residual 20": (20, True, 0.3),
    "plain 8": (8, False, 0.1),
    "residual 8": (8, True, 0.1),
}

# The variant that answers the recipe's question: does the sum mend a network that is too deep?
HEADLINE = "residual 44"

# Learning rates of gradient descent with momentum.
GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

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


def build_model(image_shape, classes, depth, residual, network="dense"):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class.

    Its `depth` layers with weights are one in the stem, two in each block, and one in the head.
    """

    def dense():
        return layers.Dense(64, use_bias=False, kernel_initializer="he_normal")

    def convolution(filters, strides=1):
        return layers.Conv2D(filters, 3, strides, "same", use_bias=False, kernel_initializer="he_normal")

    def activation():
        # Keras's default momentum of 0.99 is slow where an epoch has few steps.
        return [layers.BatchNormalization(momentum=0.9), layers.ReLU()]

    count = (depth - 2) // 2
    if network == "dense":
        stem, end = [layers.Flatten(), dense()], []
        pairs = [(dense(), dense()) for _ in range(count)]
    else:
        # Three stages, of 16, 32 and 64 filters; the second and the third begin with half the height and width.
        stem, end = [convolution(16)], [layers.GlobalAveragePooling2D()]
        filters = [16 * 2 ** (3 * number // count) for number in range(count)]
        strides = [after // before for before, after in zip([16, *filters], filters, strict=False)]
        pairs = [
            (convolution(*arguments), convolution(arguments[0])) for arguments in zip(filters, strides, strict=True)
        ]
    blocks = [
        keras.Sequential([*activation(), first, *activation(), second], name=f"block_{number}")
        for number, (first, second) in enumerate(pairs, start=1)
    ]
    inputs = keras.Input(image_shape)
    x = keras.Sequential(stem, name="stem")(inputs)
    x = connect(x, blocks, residual)
    return keras.Model(inputs, keras.Sequential([*activation(), *end, layers.Dense(classes)], name="head")(x))


def connect(x, blocks, residual, skipped=None):
    """Return what comes of x, an array or a symbolic tensor, after all blocks but the one that is skipped."""
    for block in blocks:
        shortcut, change = x, block(x)
        if shortcut.shape[1:] != change.shape[1:]:
            # A stage of the convolutional network begins: every second pixel, and zeros for the new channels.
            shortcut = shortcut[:, ::2, ::2]
            shortcut = keras.ops.concatenate([shortcut, keras.ops.zeros_like(shortcut)], axis=-1)
        if block is skipped:
            x = shortcut
        elif residual:
            x = layers.Add()([shortcut, change])  # the technique
        else:
            x = change
    return x


def contributions(model, images):
    """Return ‖F(x)‖ / ‖x‖ of each block of a residual model, each norm over all images together."""
    sums = [layer for layer in model.layers if isinstance(layer, layers.Add)]
    terms = keras.Model(model.input, [term for layer in sums for term in layer.input])(images)
    norms = [np.linalg.norm(keras.ops.convert_to_numpy(term)) for term in terms]
    return [change / shortcut for shortcut, change in zip(norms[::2], norms[1::2], strict=True)]


def accuracies_skipping(model, residual, images, labels):
    """Return the model's accuracy as it is, then with its first block skipped, then with its second, and so on."""
    blocks = [layer for layer in model.layers if layer.name.startswith("block_")]
    x = model.get_layer("stem")(images)
    logits = [model.get_layer("head")(connect(x, blocks, residual, skipped)) for skipped in [None, *blocks]]
    return [np.mean(keras.ops.convert_to_numpy(keras.ops.argmax(each, axis=-1)) == labels) for each in logits]


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    network: Literal["dense", "convolutional"] = "dense",
    search: bool = False,
):
    """Train plain and residual networks of three depths, compare them, and leave out their blocks one by one.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        network: blocks of two dense layers of 64 units, or the paper's of two convolutions, in three stages; that takes
            long on a processor, with the learning rates found for the dense blocks.
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
        same_start=False,  # the depths differ in shape; a depth's two networks start equal, for the seed makes them
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "network": network},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (depth, residual, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes, depth, residual, network)
            # Ends at a rate of zero, which leaves little noise between seeds.
            schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
            model.compile(
                optimizer=keras.optimizers.SGD(schedule, momentum=0.9),
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
            if search:
                continue
            # What is measured after training looks at validation images, for the test images are used once.
            accuracies = accuracies_skipping(model, residual, *validation)
            blocks = range(len(accuracies))
            by = "block left out, 0 for none"
            comparison.add_signal(variant, run.seed, "validation accuracy", accuracies, by=by, at=blocks)
            if residual:
                ratios = contributions(model, validation[0])
                comparison.add_signal(variant, run.seed, "‖F(x)‖ / ‖x‖", ratios, by="block", scale="log")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
