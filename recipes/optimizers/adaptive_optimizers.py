"""Adaptive optimizers: give every weight a step size of its own, made from the gradients that it has had.

Symptom: plain gradient descent is slow at every learning rate. Where some weights move, others begin to swing.

Technique: with g the gradient, η the learning rate, t the number of the step, and all operations element by element:

    Adagrad   a ← a + g²; w ← w - η g / √(a + ε): a only grows, steps only shrink; a starts at 0.1 in Keras
    RMSprop   the same with a ← 0.9 a + 0.1 g², which forgets, and starts at 0
    Adam      m ← 0.9 m + 0.1 g; v ← 0.999 v + 0.001 g²; w ← w - η m̂ / (√v̂ + ε), with m̂ = m / (1 - 0.9ᵗ) and
              v̂ = v / (1 - 0.999ᵗ) because both start at 0 (Keras adds ε to √v, before this correction)
    Adamax    Adam with u ← max(0.999 u, |g|) in place of √v̂
    AdamW     Adam, after w ← w - η λ w: a decay that is not divided by √v̂; λ = 0.004 in Keras
    Nadam     Adam with m̂ one step ahead, as in Nesterov's momentum
    Lion      w ← w - η sign(0.9 m + 0.1 g), then m ← 0.99 m + 0.01 g: each step is η or -η
    Muon      for a matrix m ← 0.95 m + g; w ← w - 0.2 η √max(rows, columns) O, where O is g + 0.95 m with all its
              singular values made about 1, after a decay as in AdamW; no step size of its own for each weight

Change: one argument of `compile`, and the learning rate that goes with it. Muon leaves biases to AdamW by itself; the
output layer must be named to it, as the last line of `build_model` names it:

    model.compile(optimizer=keras.optimizers.Adam(0.001), ...)
    model.compile(optimizer=keras.optimizers.Muon(0.001, exclude_layers=["output"]), ...)

Look for: the learning rates first: the best of one grid is 0.03 for SGD and 0.00003 for Lion, a thousand times less. A
comparison at one rate for all would be one of rates. Each at its own best, nine of ten have between 0.826 (SGD) and
0.842 (Lion) in the test and Muon 0.854, with the largest gap. No difference from SGD is measurable at five seeds, as
SGD's own runs vary most: that of Muon is 2.8 ± 4.5 points. In the search, three times the best rate lost 0.2 to 1.5
points of validation accuracy, most with Muon and Adam, and a third of it 0.5 to 3.6, most with Lion and Muon.

Cost: one or two numbers kept for each weight (the table has them; SGD keeps none, Muon one, and two for what it leaves
to AdamW); up to half more time for an epoch here (Nadam), but 2.7 times as much with Muon, whose matrix products do
not shrink with the batch. A learning rate must still be found, and it is not that of SGD. L2 in the loss is divided by
√v̂ as all of the gradient is: with Adam, use AdamW's decay.

Source: Duchi et al., JMLR 12, 2011 (Adagrad); Tieleman and Hinton, lecture 6.5 of "Neural Networks for Machine
Learning", 2012 (RMSprop); Kingma and Ba, ICLR 2015 (Adam, Adamax); Loshchilov and Hutter, ICLR 2019 (AdamW); Dozat,
ICLR workshop 2016 (Nadam); Chen et al., NeurIPS 2023 (Lion); Jordan et al., "Muon: An optimizer for hidden layers in
neural networks", 2024; Liu et al., "Muon is Scalable for LLM Training", 2025.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from keras import layers, optimizers
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from callbacks import Comparison

GRID = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

# What makes the optimizer from a learning rate, and the best rate of GRID. Validation accuracy over three seeds (over
# one, where it is more than 0.03 below the row's best):
#            0.00003  0.0001  0.0003   0.001   0.003    0.01    0.03     0.1     0.3     1.0
#   SGD        0.196   0.417   0.635   0.726   0.797   0.829   0.835   0.832   0.819   0.107
#   momentum   0.634   0.722   0.800   0.832   0.838   0.836   0.821   0.097   0.107   0.098
#   Adagrad    0.267   0.561   0.686   0.778   0.825   0.841   0.838   0.833   0.084   0.103
#   RMSprop    0.810   0.839   0.844   0.835   0.790   0.807   0.569   0.107   0.099   0.102
#   Adam       0.806   0.835   0.849   0.836   0.832   0.811   0.741   0.103   0.084   0.100
#   Adamax     0.733   0.805   0.835   0.849   0.841   0.817   0.830   0.771   0.107   0.084
#   AdamW      0.806   0.835   0.850   0.846   0.840   0.784   0.742   0.103   0.084   0.099
#   Nadam      0.807   0.838   0.843   0.838   0.836   0.810   0.722   0.103   0.107   0.099
#   Lion       0.851   0.845   0.844   0.829   0.324   0.103   0.103   0.084   0.099   0.098
#   Muon       0.750   0.843   0.866   0.851   0.841   0.822   0.103   0.104   0.084   0.099
# At 0.00001 Lion has 0.815.
VARIANTS = {
    "SGD": (optimizers.SGD, 0.03),
    "momentum": (lambda rate: optimizers.SGD(rate, momentum=0.9), 0.003),
    "Adagrad": (optimizers.Adagrad, 0.01),
    "RMSprop": (optimizers.RMSprop, 0.0003),
    "Adam": (optimizers.Adam, 0.0003),
    "Adamax": (optimizers.Adamax, 0.001),
    "AdamW": (optimizers.AdamW, 0.0003),
    "Nadam": (optimizers.Nadam, 0.0003),
    "Lion": (optimizers.Lion, 0.00003),
    "Muon": (lambda rate: optimizers.Muon(rate, exclude_layers=["output"]), 0.0003),
}

# The variant that answers the recipe's question.
HEADLINE = "Adam"

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
    return keras.Model(inputs, layers.Dense(classes, name="output")(x))


def train_model(variant, rate, seed, train, validation, classes, epochs, batch_size, callbacks=()):
    """Train a new model as a variant at a learning rate, and return its history."""
    new_optimizer, _ = VARIANTS[variant]
    keras.utils.set_random_seed(seed)
    model = build_model(train[0].shape[1:], classes)
    model.compile(
        optimizer=new_optimizer(rate),  # the technique
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model.fit(
        *train,
        batch_size=batch_size,
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


def values_kept_per_weight(model):
    """Return how many numbers the optimizer keeps for each weight of the model, to two decimals."""
    kept = sum(np.prod(variable.shape) for variable in model.optimizer.variables)
    return round(kept / model.count_params(), 2)


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    batch_size: PositiveInt = 32,
    learning_rate: PositiveFloat | None = None,
    search: bool = False,
):
    """Train one network with ten optimizers, each at its best learning rate, and compare their test accuracy.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        batch_size: images in a training step.
        learning_rate: one rate for all optimizers, in place of the best of each.
        search: find the best learning rates anew, on validation data, before the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    rates = {variant: rate for variant, (_, rate) in VARIANTS.items()}
    if search:
        rates = search_rates(seeds, train, validation, classes, epochs, batch_size)
    if learning_rate:
        rates = dict.fromkeys(VARIANTS, learning_rate)
    with Comparison(
        metric="accuracy",
        train=train,
        validation=validation,
        test=test,
        settings={
            "dataset": dataset,
            "limit": limit,
            "epochs": epochs,
            "batch size": batch_size,
            "learning rate": learning_rate or f"the best of {', '.join(map(str, GRID))} in validation",
        },
        save=save,
    ) as comparison:
        for variant, rate, run in comparison.runs(rates, seeds):
            history = train_model(variant, rate, run.seed, train, validation, classes, epochs, batch_size, [run])
            comparison.add_figure(variant, run.seed, "learning rate", rate)
            comparison.add_figure(variant, run.seed, "values kept per weight", values_kept_per_weight(history.model))
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
