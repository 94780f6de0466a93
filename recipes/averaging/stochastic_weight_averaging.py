"""Stochastic weight averaging: averages the weights of the last epochs, and computes their batch-norm statistics anew.

Symptom: validation accuracy leaps late in training, at a constant rate. Training accuracy still rises.

Technique: w = (1/n) Σ w_i, the equal average of the weights at the ends of the last n epochs, at a constant or cyclic
learning rate that keeps them moving. Training itself goes on from w_i, not from the average. No training step has ever
seen the average, so batch normalisation's moving statistics, which belong to the last weights, do not fit it. One pass
over the training data computes them anew, as the average over batches of each batch's mean and variance. Keras has no
such thing; `callbacks.StochasticWeightAveraging` does both when training ends.

Change: one callback, with the training data for the statistics. Average the second half of the epochs:

    averaging = StochasticWeightAveraging(start_epoch=10, data=train, batch_size=64)
    model.fit(*train, batch_size=64, epochs=20, callbacks=[averaging])

Look for: whether the average is better than the last weights at their own best rate, and how much of that is left with
old statistics, which is the usual mistake. The curves of these two are the same, for until its end training is as
without averaging: only the final figures differ. The rival is a rate that decays to zero. It quiets the weights as
well, but has to know the last step beforehand.

Cost: sums of the weights in float64 in the host's memory, and one forward pass over the training data at the end; one
hyper-parameter, the first epoch to average. Validation figures during training are those of the weights being trained:
`EarlyStopping` and `ModelCheckpoint` do not see the average.

Source: Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018. It reports 93.59
instead of 93.25 % (CIFAR-10, VGG-16, equal budget), with a schedule that decays first and is constant then.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison, StochasticWeightAveraging

# What becomes of the weights or of the rate, and the best rate of GRID (--search). With old statistics it is the rate
# of "SWA", for the weights are to be the same.
VARIANTS = {
    "constant rate": ("nothing", 0.001),
    "SWA": ("averaged", 0.03),
    "SWA, old statistics": ("averaged, old statistics", 0.03),
    "cosine decay": ("decayed", 0.03),
}

# The variant that answers the recipe's question.
HEADLINE = "SWA"

# Learning rates of gradient descent with momentum.
GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)

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
    for _ in range(3):
        x = layers.Dense(128, use_bias=False)(x)
        x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


class KeepOldStatistics(keras.callbacks.Callback):
    """Undoes the recomputation: gives the averaged weights the batch-norm statistics of the last weights."""

    def __init__(self, averaging):
        super().__init__()
        self.averaging = averaging

    def on_train_end(self, logs=None):
        for weight, last in zip(self.model.weights, self.averaging.other_weights, strict=True):
            if weight.name in ("moving_mean", "moving_variance"):
                weight.assign(last)


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    batch_size: PositiveInt = 64,
    search: bool = False,
):
    """Train one network at a constant rate, with its weights averaged, and at a decaying rate, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data; the second half of them is averaged.
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
        for _, (treatment, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes)
            # The constant rate is the baseline here: it keeps the weights moving, and their noise is what is averaged.
            cosine = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
            model.compile(
                optimizer=keras.optimizers.SGD(cosine if treatment == "decayed" else learning_rate, momentum=0.9),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            averaging = StochasticWeightAveraging(start_epoch=epochs // 2, data=train, batch_size=batch_size)
            callbacks = {
                "nothing": [],
                "averaged": [averaging],  # the technique
                "averaged, old statistics": [averaging, KeepOldStatistics(averaging)],
                "decayed": [],
            }[treatment]
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[*callbacks, run],
            )
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
