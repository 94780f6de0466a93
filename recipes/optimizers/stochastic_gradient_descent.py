"""Stochastic gradient descent: steps along the gradient of a small random batch, in place of all training data.

Symptom: each pass over the data lowers the loss by a little only. Or the data set does not fit in one step at all.

Technique: w ← w - η g, where g is the mean gradient over a batch of B random training examples. Over all batches of
an epoch of N examples the mean of g is the full gradient, and its deviation falls as 1 / √B only. A step costs B
gradients, so that an epoch has N / B steps: a batch 64 times smaller gives 64 times as many steps, each 8 times as
noisy. Keras: `keras.optimizers.SGD`, and `batch_size` in `fit`, which shuffles at each epoch.

Change: one argument of `fit` (its default is 32), and the learning rate that goes with it:

    model.compile(optimizer=keras.optimizers.SGD(0.1), ...)
    model.fit(images, labels, batch_size=128)

Look for: accuracy for the same number of images seen, each batch size at its own best learning rate. A small batch's
gradient is a rough guide, but there are many more of them: see how far that carries. Then look at the curve by the
clock, and find the size below which the additional steps no longer pay for their time.

Cost: an epoch takes longer the smaller its batches are, because each step has a cost of its own: compare the times.
Search for the learning rate anew at each size; as a rule, small batches want a small one. Memory for activations is
proportional to the size of the batch. At a constant rate the noise keeps the weights moving about the minimum: let the
rate fall to zero, as here.

Source: Robbins and Monro, "A Stochastic Approximation Method", Annals of Mathematical Statistics 22, 1951; Bottou and
Bousquet, "The Tradeoffs of Large Scale Learning", NIPS 2007.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from keras import layers

from callbacks import Comparison

# The number of images in a step (None: all of them), and the best learning rate of GRID (--search).
VARIANTS = {
    "full batch": (None, 0.1),
    "batch 1024": (1024, 0.3),
    "batch 128": (128, 0.3),
    "batch 16": (16, 0.03),
}

# The variant that answers the recipe's question.
HEADLINE = "batch 128"

# Learning rates.
GRID = (0.01, 0.03, 0.1, 0.3, 1.0)

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
        x = layers.Dense(100, activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def ends_of_epochs(epoch_seconds):
    """Return the seconds of training at the end of each epoch; the first one, which compiles, counts as the median."""
    return np.cumsum([np.median(epoch_seconds[1:] or epoch_seconds), *epoch_seconds[1:]])


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    target: PositiveFloat = 0.8,
    search: bool = False,
):
    """Train one network by gradient descent on batches of four sizes, for the same number of epochs, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        target: validation accuracy; the seconds of training until it is reached are counted.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={
            "steps": "updates of the weights in the whole training",
            f"seconds to {target}": f"of training until validation accuracy first was {target}; inf if it never was",
        },
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (batch_size, learning_rate), run in loop:
            batch_size = batch_size or len(train[0])
            steps = -(-len(train[0]) // batch_size)
            model = build_model(train[0].shape[1:], classes)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            accuracies = model.fit(
                *train,
                batch_size=batch_size,  # the technique
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            ).history["val_accuracy"]
            seconds = ends_of_epochs(comparison.result.runs[-1]["epoch_seconds"])
            reached = seconds[np.array(accuracies) >= target]
            comparison.add_figure(variant, run.seed, "steps", int(model.optimizer.iterations))
            comparison.add_figure(variant, run.seed, f"seconds to {target}", reached[0] if len(reached) else np.inf)
            # At places that are the same for all seeds.
            places = np.arange(1, np.ceil(10 * seconds[-1]) + 1) / 10
            by_time = np.interp(places, seconds, accuracies, left=np.nan)
            comparison.add_signal(variant, run.seed, "validation accuracy", by_time, by="second of training", at=places)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
