"""Normalized gradient: makes every step of gradient descent equally long, whatever the length of the gradient.

Symptom: gradients are tiny and the loss hardly moves. Or every change of the loss's scale asks for a new learning rate.

Technique: w ← w - η g / ‖g‖, with the norm of the gradients of all weights together: the direction is that of the
gradient, the length is always η. It is sometimes called Adagrad, which is another method: Adagrad keeps a sum of
squares for each weight, a ← a + g², and steps by -η g / √(a + ε). This changes the direction, and its steps shrink from
one to the next. Keras has it as `keras.optimizers.Adagrad`, where a starts at 0.1: much, where gradients are tiny.

Change: copy the class `NormalizedGradientDescent`, and pass it to `compile`:

    model.compile(optimizer=NormalizedGradientDescent(0.1), ...)

Look for: the variants with the loss divided by 100, each at the rate that is best for the loss as it is. The normalised
gradient learns as before (test accuracy 0.813 instead of 0.814, by rounding alone); SGD falls from 0.824 to 0.600, and
Adagrad from 0.825 to 0.594, for the squares of such gradients are lost beside the 0.1 at which a starts. With the loss
as it is nothing is gained: -1.0 ± 1.6 points for the normalised gradient and +0.1 ± 0.8 for Adagrad, both not
measurable. In the search the normalised gradient was the only one to learn at the rate 1.0, to 0.79.

Cost: the norm at every step, a pass over all gradients; no number kept for each weight (Adagrad keeps one). Steps do
not shrink near a minimum, where the weights go round it at a distance of about η: lower the rate towards the end. Where
gradients are small, the noise of a small batch is scaled up with them. Do not combine it with `loss_scale_factor`.

Source: Shor, "Minimization Methods for Non-Differentiable Functions", Springer 1985; Hazan, Levy and Shalev-Shwartz,
"Beyond Convexity: Stochastic Quasi-Convex Optimization", NIPS 2015; for Adagrad, Duchi, Hazan and Singer, "Adaptive
Subgradient Methods for Online Learning and Stochastic Optimization", JMLR 12, 2011.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers, ops, optimizers
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from callbacks import Comparison

GRID = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

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


@keras.saving.register_keras_serializable("normalized_gradient")
class NormalizedGradientDescent(optimizers.SGD):
    """Gradient descent along g / ‖g‖: every step has the length of the learning rate.

    The norm is that of all gradients together. Do not set `loss_scale_factor`, which would still divide the step.
    """

    def apply(self, grads, trainable_variables=None):
        squares = [ops.sum(ops.square(gradient)) for gradient in grads if gradient is not None]
        norm = ops.maximum(ops.sqrt(sum(squares)), 1e-12)  # a gradient of zero stays zero
        grads = [gradient if gradient is None else gradient / norm for gradient in grads]
        super().apply(grads, trainable_variables)


# What makes the optimizer from a learning rate, and the best rate of GRID. Validation accuracy over three seeds (over
# one, where it is more than 0.03 below the row's best):
#               0.00003  0.0001  0.0003   0.001   0.003    0.01    0.03     0.1     0.3     1.0
#   SGD           0.102   0.170   0.375   0.620   0.708   0.784   0.819   0.826   0.815   0.098
#   normalised    0.093   0.107   0.212   0.467   0.673   0.764   0.791   0.815   0.801   0.791
#   Adagrad       0.132   0.324   0.578   0.696   0.784   0.820   0.827   0.826   0.293   0.106
VARIANTS = {
    "SGD": (optimizers.SGD, 0.1),
    "normalised": (NormalizedGradientDescent, 0.1),
    "Adagrad": (optimizers.Adagrad, 0.03),
}

# The variant that answers the recipe's question.
HEADLINE = "normalised"

# What is added to the name of a variant, and what the loss is multiplied by.
LOSS_WEIGHTS = {"": 1.0, ", loss/100": 0.01}


def build_model(image_shape, classes):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Flatten()(x)
    for _ in range(3):
        x = layers.Dense(100, activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def train_model(variant, rate, seed, train, validation, classes, epochs, loss_weight=1.0, callbacks=()):
    """Train a new model as a variant at a learning rate, with the loss multiplied, and return its history."""
    new_optimizer, _ = VARIANTS[variant]
    keras.utils.set_random_seed(seed)
    model = build_model(train[0].shape[1:], classes)
    model.compile(
        optimizer=new_optimizer(rate),  # the technique
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        loss_weights=loss_weight,
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
    """Train one network by gradient descent, by the normalised gradient and by Adagrad, and with the loss scaled down.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rates anew, on validation data and with the loss as it is, before the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    rates = {variant: rate for variant, (_, rate) in VARIANTS.items()}
    if search:
        rates = search_rates(seeds, train, validation, classes, epochs)
    variants = {
        variant + suffix: (variant, rate, loss_weight)
        for suffix, loss_weight in LOSS_WEIGHTS.items()
        for variant, rate in rates.items()
    }
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
        for name, (variant, rate, loss_weight), run in comparison.runs(variants, seeds):
            train_model(variant, rate, run.seed, train, validation, classes, epochs, loss_weight, [run])
            comparison.add_figure(name, run.seed, "learning rate", rate)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
