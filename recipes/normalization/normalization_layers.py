"""Normalization layers: layer, group and RMS normalisation, for batches too small for batch normalisation.

Symptom: batch normalisation costs accuracy, as only small batches fit into memory.

Technique: three compute γ · (x - μ) / √(σ² + ε) + β, and differ in where the mean μ and the variance σ² come from: for
each unit from the batch (`keras.layers.BatchNormalization`), for each example from all its units
(`LayerNormalization`), or for each example from groups of its units (`GroupNormalization`); ε = 0.001. RMS
normalisation (`RMSNormalization`) subtracts and adds nothing: γ · x / √(mean of x² + ε) over the units of an example,
with ε = 0.000001. In training, batch normalisation makes an example's output depend on the rest of its batch. The
others do not, and they do the same at inference as in training.

Change: one line between the weights and the activation, in place of batch normalisation:

    x = layers.GroupNormalization(groups=8)(x)

Look for: what each layer reaches in batches of 4 examples, whose mean and variance are noisy, at the learning rate that
suits it best. Batch normalisation in batches of 128 stands beside it, to show what the small batches cost. See too
whether the other layers differ among themselves, and from no normalisation at all.

Cost: time in every step; RMS normalisation has the least to compute. Group normalisation adds a hyper-parameter, the
number of groups, which must divide the number of units; batch normalisation the momentum of its moving statistics. In a
convolutional network batch normalisation averages over positions as well, so that 4 images hold more values for it.

Source: Wu & He, "Group Normalization", ECCV 2018 (ResNet-50 on ImageNet, 2 images a batch: 10.6 points less error than
with batch normalisation); Ba, Kiros & Hinton, "Layer Normalization", 2016; Zhang & Sennrich, "Root Mean Square Layer
Normalization", NeurIPS 2019.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The layer, the examples in a batch, and the best rate of GRID (--search).
VARIANTS = {
    "batch, size 4": ("batch", 4, 0.1),
    "none, size 4": ("none", 4, 0.03),
    "layer, size 4": ("layer", 4, 0.03),
    "group, size 4": ("group", 4, 0.03),
    "RMS, size 4": ("RMS", 4, 0.01),
    "batch, size 128": ("batch", 128, 1.0),
}

# The variant that answers the recipe's question.
HEADLINE = "group, size 4"

# Learning rates of gradient descent.
GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

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


def build_model(image_shape, classes, kind, batch_size):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Flatten()(inputs)
    for _ in range(4):
        x = layers.Dense(128, use_bias=kind != "batch", kernel_initializer="he_normal")(x)
        if kind == "batch":
            # Smaller batches come more often: this way the moving statistics average as many examples at every size.
            x = layers.BatchNormalization(momentum=0.9 ** (batch_size / 128))(x)
        elif kind == "layer":
            x = layers.LayerNormalization()(x)  # the technique
        elif kind == "group":
            x = layers.GroupNormalization(groups=8)(x)  # the technique
        elif kind == "RMS":
            x = layers.RMSNormalization()(x)  # the technique
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 3,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one network with each normalisation layer and without, in batches of 4 examples.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data, the same number for both batch sizes.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # the layers have weights of their own; the kernels start equal, for the seed makes them
        evaluate_batch_size=128,  # at inference no example depends on its batch
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for _, (kind, batch_size, learning_rate), run in loop:
            steps = -(-len(train[0]) // batch_size)
            model = build_model(train[0].shape[1:], classes, kind, batch_size)
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
                validation_batch_size=128,
                verbose=0,
                callbacks=[run],
            )
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
