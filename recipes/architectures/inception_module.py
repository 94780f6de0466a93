"""Inception module: runs convolutions of several kernel sizes side by side, and lets training weigh them.

Symptom: you do not know which kernel size suits the images. A network of large kernels alone has too many weights.

Technique: y = [f₁(x), f₃(r₃(x)), f₅(r₅(x)), p(max₃(x))], side by side as channels: f₁, f₃ and f₅ are convolutions of
1×1, 3×3 and 5×5 pixels, max₃ is the maximum over 3×3 pixels, r₃, r₅ and p are 1×1 convolutions. r₃ and r₅ reduce the
channels: a k×k convolution has k²·n_in·n_out weights, after a reduction to m channels only n_in·m + k²·m·n_out. What
comes next weighs the branches, so that the mix of kernel sizes is learned. Keras: `layers.Concatenate`.

Change: each convolution of the network becomes a module:

    one = layers.Conv2D(16, 1, activation="relu")(x)
    three = layers.Conv2D(24, 1, activation="relu")(x)
    three = layers.Conv2D(32, 3, padding="same", activation="relu")(three)
    five = layers.Conv2D(4, 1, activation="relu")(x)
    five = layers.Conv2D(8, 5, padding="same", activation="relu")(five)
    pooled = layers.MaxPooling2D(3, strides=1, padding="same")(x)
    pooled = layers.Conv2D(8, 1, activation="relu")(pooled)
    x = layers.Concatenate()([one, three, five, pooled])

Look for: test accuracy at an equal number of parameters, and the time that an epoch takes. Then each branch's share of
what the last layer receives and makes of it, before and after training (the picture): it tells which kernel size these
images ask for, and whether a network of that size alone would do as well. The shares say where the signal comes from,
not what would be lost without a branch.

Cost: many small convolutions use a processor less well than one large one: more time at equal parameters. Six widths
for each module in the place of one.

Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015 (22 layers, 6.67 % top-5 error on ImageNet).
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The kernel sizes of the layers in each module's place, one after another, and the best of GRID (--search). Networks
# other than that of modules get as many filters as it takes to have its number of parameters.
VARIANTS = {
    "3×3": ((3,), 0.01),
    "5×5": ((5,), 0.01),
    "1×1, 3×3": ((1, 3), 0.01),  # as deep as a module
    "inception": ("inception", 0.01),
}

# The variant that answers the recipe's question.
HEADLINE = "inception"

# Learning rates of Adam.
GRID = (0.001, 0.003, 0.01, 0.03, 0.1)

BRANCHES = ("1×1", "3×3", "5×5", "pooling")

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


def inception(x):
    """Return four branches side by side, 64 channels in all: a quarter of the widths of the paper's module 3a."""
    one = layers.Conv2D(16, 1, activation="relu")(x)
    three = layers.Conv2D(24, 1, activation="relu")(x)
    three = layers.Conv2D(32, 3, padding="same", activation="relu")(three)
    five = layers.Conv2D(4, 1, activation="relu")(x)
    five = layers.Conv2D(8, 5, padding="same", activation="relu")(five)
    pooled = layers.MaxPooling2D(3, strides=1, padding="same")(x)
    pooled = layers.Conv2D(8, 1, activation="relu")(pooled)
    return layers.Concatenate()([one, three, five, pooled])


def build_model(image_shape, classes, kernel_sizes="inception", filters=None):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Conv2D(16, 3, strides=2, padding="same", activation="relu")(inputs)
    x = layers.MaxPooling2D(padding="same")(x)
    for _ in range(2):
        if kernel_sizes == "inception":
            x = inception(x)  # the technique
        else:
            for kernel_size in kernel_sizes:
                x = layers.Conv2D(filters, kernel_size, padding="same", activation="relu")(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def equal_filters(image_shape, classes, kernel_sizes):
    """Return the number of filters that brings a network nearest to the inception network's number of parameters."""
    # The first convolution, which all networks share, is left out.
    target = sum(layer.count_params() for layer in build_model(image_shape, classes).layers[2:])

    def parameters(filters):
        sizes = 2 * kernel_sizes
        inputs = [16] + [filters] * (len(sizes) - 1)
        convolutions = [(size**2 * channels + 1) * filters for size, channels in zip(sizes, inputs, strict=True)]
        return sum(convolutions) + (filters + 1) * classes

    return min(range(1, 1024), key=lambda filters: abs(parameters(filters) - target))


def branch_shares(model, images):
    """Return the shares of the last module's four branches in what the last layer makes of them; their sum is 1.

    A channel counts by the standard deviation over the images of its mean over the pixels, times the norm of its
    weights in the last layer; a branch by the sum of its channels.
    """
    last = model.layers[-1]
    means = keras.ops.convert_to_numpy(keras.Model(model.input, last.input)(images))
    sizes = means.std(axis=0) * np.linalg.norm(keras.ops.convert_to_numpy(last.kernel), axis=1)
    *_, module = [layer for layer in model.layers if isinstance(layer, layers.Concatenate)]
    ends = np.cumsum([branch.shape[-1] for branch in module.input])
    return [branch.sum() / sizes.sum() for branch in np.split(sizes, ends[:-1])]


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train networks of one kernel size and one of two inception modules, all with equally many parameters.

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
    image_shape = train[0].shape[1:]
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # the variants differ in shape
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={"parameters": "of the whole network"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (kernel_sizes, learning_rate), run in loop:
            has_modules = kernel_sizes == "inception"
            filters = None if has_modules else equal_filters(image_shape, classes, kernel_sizes)
            model = build_model(image_shape, classes, kernel_sizes, filters)
            # Ends at a rate of zero, which leaves little noise between seeds.
            schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
            model.compile(
                optimizer=keras.optimizers.Adam(schedule),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            comparison.add_figure(variant, run.seed, "parameters", model.count_params())
            shares = {"share before training": branch_shares(model, validation[0])} if has_modules else {}
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            )
            if has_modules:
                shares["share after training"] = branch_shares(model, validation[0])
            for name, values in shares.items():
                comparison.add_signal(variant, run.seed, name, values, by="branch", at=BRANCHES)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
