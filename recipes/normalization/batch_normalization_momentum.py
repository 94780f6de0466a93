"""Batch normalization momentum: says how soon the moving statistics follow training, which only inference uses.

Symptom: `evaluate` is much worse than `fit` was, on the very same data. The network has batch normalisation, and was
trained for some dozens or hundreds of steps.

Technique: training normalises by the mean and the variance of the batch, inference by moving statistics. These begin at
0 and 1, and each training step moves them: moving ← m · moving + (1 - m) · batch. After n steps a share of mⁿ is still
what they began with; the rest looks back over some 1 / (1 - m) steps, in which the weights were others. Keras:
`momentum` of `keras.layers.BatchNormalization`. Its default, 0.99, is meant for thousands of steps.

Change: one argument. Take 0.9 where a training has only hundreds of steps:

    x = layers.BatchNormalization(momentum=0.9)(x)

For a network that is trained already, copy the callback `RecomputeStatistics` or its loop: calls with `training=True`
on training batches move the statistics and no weights. To set a new `layer.momentum` does nothing in a `fit` that has
been compiled already, so the loop calls the model itself.

Look for: the loss of the same weights on the same training images, in training mode and in inference mode (the
picture). The first is one figure for all variants: momentum does not enter training. The second should be near it; what
is missing is due to the statistics alone. Do not compare with the loss that `fit` prints: that is a mean over the
epoch, of weights that were still changing. Too small a momentum errs the other way: it leaves the statistics of the
last few batches. With `--epochs 20` see whether the default has caught up.

Cost: none; it is one argument. Computing anew costs one forward pass over the training data.

Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift", ICML 2015; Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, on computing the statistics anew; Keras
issues 7265 and 10666, which ask the question.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from keras import layers, ops

from callbacks import Comparison

# The momentum of batch normalisation, and whether the statistics are computed anew when training has ended. There is
# one learning rate for all: momentum does not enter training, so that all variants train the very same weights.
VARIANTS = {
    "momentum 0.99": (0.99, False),
    "momentum 0.9": (0.9, False),
    "momentum 0.5": (0.5, False),
    "0.99, recomputed": (0.99, True),
}

# The variant that answers the recipe's question.
HEADLINE = "momentum 0.9"

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


def build_model(image_shape, classes, momentum):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    x = layers.Flatten()(x)
    for _ in range(6):
        x = layers.Dense(128, use_bias=False, kernel_initializer="he_normal")(x)
        x = layers.BatchNormalization(momentum=momentum)(x)  # the technique
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def in_batches(images, batch_size):
    """Return the images in their order, cut into batches, of which the last may be smaller."""
    return [images[start : start + batch_size] for start in range(0, len(images), batch_size)]


class RecomputeStatistics(keras.callbacks.Callback):
    """Makes the moving statistics the equal average of all batches' when training has ended."""

    def __init__(self, images, batch_size):
        super().__init__()
        self.batches = in_batches(images, batch_size)

    def on_train_end(self, logs=None):
        normalizations = [layer for layer in self.model.layers if isinstance(layer, layers.BatchNormalization)]
        momenta = [layer.momentum for layer in normalizations]
        for number, batch in enumerate(self.batches):
            for layer in normalizations:
                layer.momentum = number / (number + 1)  # 0, 1/2, 2/3, …: the batches weigh the same
            self.model(batch, training=True)
        for layer, momentum in zip(normalizations, momenta, strict=True):
            layer.momentum = momentum


def losses(model, images, labels, batch_size):
    """Return the loss in training mode and the loss in inference mode, and leave the model as it is."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found = []
    for training in (True, False):
        with keras.StatelessScope():  # without it, calls in training mode would move the statistics
            logits = [model(batch, training=training) for batch in in_batches(images, batch_size)]
        found.append(float(loss(labels, ops.concatenate(logits))))
    return found


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 5,  # short, which is when it matters
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    learning_rate: PositiveFloat = 0.3,  # found by the search of batch_normalization.py
):
    """Train one network with three momenta of its moving statistics, and with statistics that are computed anew.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        learning_rate: first step size of gradient descent.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 256
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "learning rate": learning_rate},
        columns={
            "loss, training mode": "on the training images, normalised by their own batch",
            "loss, inference": "on the training images, normalised by the moving statistics",
        },
        save=save,
    ) as comparison:
        for variant, (momentum, recomputes), run in comparison.runs(VARIANTS, seeds):
            model = build_model(train[0].shape[1:], classes, momentum)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            recompute = [RecomputeStatistics(train[0], batch_size)] if recomputes else []
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[*recompute, run],
            )
            both = losses(model, *train, batch_size)
            comparison.add_figure(variant, run.seed, "loss, training mode", both[0])
            comparison.add_figure(variant, run.seed, "loss, inference", both[1])
            name, modes = "loss on the training images", ["training", "inference"]
            comparison.add_signal(variant, run.seed, name, both, by="mode", at=modes)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
