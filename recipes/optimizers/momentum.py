"""Momentum: steps along a decaying sum of all gradients so far, in place of the last one alone.

Symptom: gradient descent zigzags across a narrow valley of the loss. Along the valley it creeps.

Technique: v ← γ v - η g, then w ← w + v. Along a direction in which g stays the same, v grows to -η g / (1 - γ): ten
times the plain step with γ = 0.9, so that the best learning rate falls as γ rises. Where g changes its sign at every
step the sum cancels. γ = 0 is plain gradient descent; with γ = 1 nothing ever slows down. Nesterov's form takes the
gradient at w + γ v, the point to which the momentum leads. Keras keeps that point as w, and so has v ← γ v - η g, then
w ← w + γ v - η g. (Elsewhere η stands outside of v, as in v ← γ v + g: the same as long as η is constant.)

Change: two arguments of the optimizer, for the learning rate must be smaller:

    optimizer = keras.optimizers.SGD(0.03, momentum=0.9)

Look for: the start. Each at its best learning rate, γ = 0.9 and Nesterov's form need 3 epochs (the median) until
validation accuracy is 0.8, plain gradient descent and γ = 0.5 need 4, and γ = 0.99 needs 5, for v grows over about 100
steps, here 1.6 epochs; inf would say that a run did not get there. After ten epochs no difference in test accuracy is
measurable at five seeds: plain 0.824, the others 0.820 to 0.831. At one rate for all, momentum would seem to gain much
more: at 0.01 validation accuracy is 0.784 without it and 0.834 with γ = 0.9, which is the gain of longer steps.

Cost: one more number for each weight, v, and little time; one hyper-parameter, for which 0.9 is usual, and a learning
rate found anew. With γ near 1 the weights overshoot, and swing long after the gradient has turned.

Source: Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Computational Mathematics and
Mathematical Physics 4, 1964; Sutskever et al., "On the importance of initialization and momentum in deep learning",
ICML 2013, whose form of Nesterov's method this is.
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

# The arguments of the optimizer, and the best rate of GRID. Validation accuracy over three seeds (over one, where it is
# more than 0.03 below the row's best):
#                  0.00003  0.0001  0.0003   0.001   0.003    0.01    0.03     0.1     0.3     1.0
#   no momentum      0.102   0.170   0.375   0.620   0.708   0.784   0.819   0.826   0.815   0.098
#   momentum 0.5     0.129   0.296   0.508   0.680   0.761   0.809   0.826   0.824   0.812   0.103
#   momentum 0.9     0.369   0.608   0.696   0.799   0.827   0.834   0.836   0.825   0.103   0.106
#   momentum 0.99    0.676   0.767   0.802   0.832   0.832   0.821   0.719   0.100   0.103   0.098
#   Nesterov 0.9     0.370   0.607   0.695   0.800   0.831   0.841   0.838   0.836   0.103   0.106
VARIANTS = {
    "no momentum": ({}, 0.1),
    "momentum 0.5": ({"momentum": 0.5}, 0.03),
    "momentum 0.9": ({"momentum": 0.9}, 0.03),
    "momentum 0.99": ({"momentum": 0.99}, 0.003),
    "Nesterov 0.9": ({"momentum": 0.9, "nesterov": True}, 0.01),
}

# The variant that answers the recipe's question.
HEADLINE = ("momentum 0.9", "epochs to 0.8")

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
    options, _ = VARIANTS[variant]
    keras.utils.set_random_seed(seed)
    model = build_model(train[0].shape[1:], classes)
    model.compile(
        optimizer=keras.optimizers.SGD(rate, **options),  # the technique
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model.fit(
        *train,
        batch_size=128,
        epochs=epochs,
        validation_data=validation,
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


def epochs_to(target, accuracies):
    """Return the number of epochs after which the accuracy first reached `target`: infinite if it never did."""
    return next((epoch for epoch, accuracy in enumerate(accuracies, start=1) if accuracy >= target), float("inf"))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    target: PositiveFloat = 0.8,
    search: bool = False,
):
    """Train one network by gradient descent without momentum, with three amounts of it, and with Nesterov's form.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        target: validation accuracy; the epochs until it is reached are counted.
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
            comparison.add_figure(variant, run.seed, "learning rate", rate)
            reached = epochs_to(target, history.history["val_accuracy"])
            comparison.add_figure(variant, run.seed, f"epochs to {target}", reached)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
