"""Stochastic gradient descent: steps along the gradient of a small random batch, in place of all training data.

Symptom: each pass over the data lowers the loss by a little only. Or the data set does not fit in one step at all.

Technique: w ← w - η g, where g is the mean gradient over a batch of B random training examples. Over all batches of
an epoch of N examples the mean of g is the full gradient, and the variance of g falls as 1 / B, its deviation as 1 / √B
only. A step costs B gradients, so that an epoch has N / B steps: a batch 64 times smaller gives 64 times as many
steps, each 8 times as noisy. Keras: `keras.optimizers.SGD`, and `batch_size` in `fit`, which shuffles at each epoch.

Change: one argument of `fit` (its default is 32), and the learning rate that goes with it:

    model.compile(optimizer=keras.optimizers.SGD(0.1), ...)
    model.fit(images, labels, batch_size=128)

Look for: accuracy for the same number of images seen, each batch size at its best learning rate. In 20 epochs the full
batch makes 20 steps and reaches a test accuracy of 0.613; batches of 1024 make 160 (0.780), of 128 1260 (0.835), and of
16 10,000 (0.838). Small batches also lead by the clock, to a point: batches of 128 reach a validation accuracy of 0.8
after 1.2 seconds of training and those of 16 after 2.5 (medians); the two larger ones never do (inf). A batch's
gradient is a good enough guide, and what counts is the number of steps.

Cost: an epoch takes longer the smaller its batches are, because each step has a cost of its own: 1.2 times that of the
full batch with 1024, 1.8 times with 128, 6 times with 16, on two CPU cores. The learning rate has to be searched for
anew at each size: here the best are 0.1, 0.3, 0.1 and 0.01. Memory for activations is proportional to the size of the
batch. At a constant rate the noise keeps the weights moving about the minimum: see the schedules.

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
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from callbacks import Comparison

GRID = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

# The number of images in a step (None: all of them), and the best rate of GRID. Validation accuracy over three seeds
# (over one, where it is more than 0.03 below the row's best):
#                0.00003  0.0001  0.0003   0.001   0.003    0.01    0.03     0.1     0.3     1.0
#   full batch     0.090   0.092   0.092   0.102   0.164   0.384   0.583   0.593   0.459   0.098
#   batch 1024     0.092   0.100   0.142   0.346   0.569   0.689   0.756   0.771   0.783   0.098
#   batch 128      0.129   0.298   0.510   0.680   0.762   0.817   0.833   0.838   0.833   0.098
#   batch 16       0.445   0.666   0.744   0.817   0.836   0.843   0.837   0.821   0.741   0.098
VARIANTS = {
    "full batch": (None, 0.1),
    "batch 1024": (1024, 0.3),
    "batch 128": (128, 0.1),
    "batch 16": (16, 0.01),
}

# The variant that answers the recipe's question.
HEADLINE = "batch 128"

DATA_DIR = Path(__file__).resolve().parent.parent.parent / "data"


def load(dataset, data_dir, limit):
    """Return (images, labels) for training, validation and test, and the number of classes.

    Images are uint8 arrays of shape (examples, height, width, channels), values 0 to 255. Nothing is downloaded.
    """
    try:
        if not data_dir.is_dir():
            raise FileNotFoundError(f"there is no folder {data_dir}")
        split = ["train[:80%]", "train[80%:]", "test"]
        splits, info = tfds.load(
            dataset, split=split, data_dir=data_dir, as_supervised=True, with_info=True, download=False
        )
        arrays = [next(iter(tfds.as_numpy(split.take(limit or -1).batch(len(split))))) for split in splits]
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
    inputs = keras.Input(image_shape)
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Flatten()(x)
    for _ in range(3):
        x = layers.Dense(100, activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def train_model(variant, rate, seed, train, validation, classes, epochs, callbacks=()):
    """Train a new model as a variant at a learning rate, and return its history."""
    batch_size, _ = VARIANTS[variant]
    keras.utils.set_random_seed(seed)
    model = build_model(train[0].shape[1:], classes)
    model.compile(
        optimizer=keras.optimizers.SGD(rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model.fit(
        *train,
        batch_size=batch_size or len(train[0]),  # the technique
        epochs=epochs,
        validation_data=validation,
        validation_batch_size=256,  # as long for every variant
        verbose=0,
        callbacks=callbacks,
    )


def search_rates(seeds, *arguments):
    """Train every variant at every rate of GRID, print validation accuracies, and return the best rate of each variant.

    An accuracy is the mean over seeds, after the last epoch; `arguments` are those of `train_model` after the seed.
    """
    titles = ["variant", *map(str, GRID), "best"]
    table = Table(*titles, title="validation accuracy in % by learning rate", box=box.SIMPLE_HEAD, padding=0)
    seeds = seeds if np.iterable(seeds) else range(seeds)
    best = {}
    for variant in track(VARIANTS, "search", console=Console(stderr=True)):
        means = []
        for rate in GRID:
            histories = [train_model(variant, rate, seed, *arguments).history for seed in seeds]
            means.append(np.mean([history["val_accuracy"][-1] for history in histories]))
        best[variant] = GRID[np.argmax(means)]
        table.add_row(variant, *(f"{100 * mean:.1f}" for mean in means), str(best[variant]))
    Console().print(table)
    return best


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
        search: find the best learning rates anew, on validation data, before the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    rates = {variant: rate for variant, (_, rate) in VARIANTS.items()}
    if search:
        rates = search_rates(seeds, train, validation, classes, epochs)
    with Comparison(
        metric="accuracy",
        train=train,
        validation=validation,
        test=test,
        settings={
            "dataset": dataset,
            "limit": limit,
            "epochs": epochs,
            "learning rate": f"the best of {', '.join(map(str, GRID))} in validation",
        },
        save=save,
    ) as comparison:
        for variant, rate, run in comparison.runs(rates, seeds):
            history = train_model(variant, rate, run.seed, train, validation, classes, epochs, callbacks=[run])
            accuracies = np.array(history.history["val_accuracy"])
            seconds = ends_of_epochs(comparison.result.runs[-1]["epoch_seconds"])
            reached = seconds[accuracies >= target]
            comparison.add_figure(variant, run.seed, "learning rate", rate)
            comparison.add_figure(variant, run.seed, "steps", int(history.model.optimizer.iterations))
            comparison.add_figure(variant, run.seed, f"seconds to {target}", reached[0] if len(reached) else np.inf)
            tenths = np.arange(1, np.ceil(10 * seconds[-1]) + 1) / 10
            by_time = np.interp(tenths, seconds, accuracies, left=np.nan)
            comparison.add_signal(variant, run.seed, "validation accuracy", by_time, by="tenth of a second")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
