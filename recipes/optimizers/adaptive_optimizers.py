"""Adaptive optimizers: give every weight a step size of its own, made from the gradients that it has had.

Symptom: plain gradient descent is slow at every learning rate. Where some weights move, others begin to swing.

Technique: with gradient g, learning rate η and the number t of the step, all operations element by element, and small
constants left out that keep divisors above 0:

    Adagrad   a ← a + g²; w ← w - η g / √a: a only grows, so that steps only shrink
    RMSprop   the same with a ← 0.9 a + 0.1 g², which forgets
    Adam      m ← 0.9 m + 0.1 g; v ← 0.999 v + 0.001 g²; w ← w - η m̂ / √v̂, with m̂ = m / (1 - 0.9ᵗ) and
              v̂ = v / (1 - 0.999ᵗ) because both start at 0
    Adamax    Adam with u ← max(0.999 u, |g|) in place of √v̂
    AdamW     Adam, after w ← w - η λ w: a decay that is not divided by √v̂
    Nadam     Adam with m̂ one step ahead, as in Nesterov's momentum
    Lion      w ← w - η sign(0.9 m + 0.1 g), then m ← 0.99 m + 0.01 g: each step is η or -η
    Muon      for a matrix m ← 0.95 m + g; w ← w - 0.2 η √max(rows, columns) O, where O is g + 0.95 m with all its
              singular values made about 1: no step size of its own for each weight

Change: one argument of `compile`, and the learning rate that goes with it. Muon leaves biases to AdamW by itself; the
output layer, which belongs there too, must be named to it:

    model.compile(optimizer=keras.optimizers.Adam(0.001), ...)
    model.compile(optimizer=keras.optimizers.Muon(0.001, exclude_layers=["output"]), ...)

Look for: the search first (`--search`): how far the best rates lie apart. One rate for all would compare rates, not
optimizers. See, too, what each loses at the rates beside its best. Then compare accuracies, and what they cost.

Cost: numbers kept for each weight (the table counts them), and time: Muon multiplies matrices, which do not shrink with
the batch. You still need to find a learning rate. L2 in the loss is divided by √v̂, as all of the gradient is: use
AdamW's decay.

Source: Duchi et al. 2011 (Adagrad); Tieleman and Hinton 2012 (RMSprop); Kingma and Ba, ICLR 2015 (Adam, Adamax);
Loshchilov and Hutter, ICLR 2019 (AdamW); Dozat 2016 (Nadam); Chen et al., NeurIPS 2023 (Lion); Jordan et al. 2024 and
Liu et al., "Muon is Scalable for LLM Training", 2025 (Muon).
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers, optimizers

from callbacks import Comparison

# What makes the optimizer from a learning rate, and the best rate of GRID (--search).
VARIANTS = {
    "SGD": (optimizers.SGD, 0.3),
    "momentum": (lambda rate: optimizers.SGD(rate, momentum=0.9), 0.1),
    "Adagrad": (optimizers.Adagrad, 0.1),
    "RMSprop": (optimizers.RMSprop, 0.001),
    "Adam": (optimizers.Adam, 0.003),
    "Adamax": (optimizers.Adamax, 0.01),
    "AdamW": (optimizers.AdamW, 0.003),
    "Nadam": (optimizers.Nadam, 0.003),
    "Lion": (optimizers.Lion, 0.001),
    "Muon": (lambda rate: optimizers.Muon(rate, exclude_layers=["output"]), 0.01),
}

# The variant that answers the recipe's question.
HEADLINE = "Adam"

# Learning rates, from those that suit Lion to those that suit SGD.
GRID = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

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
    return keras.Model(inputs, layers.Dense(classes, name="output")(x))


def numbers_kept_per_weight(model):
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
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={"kept per weight": "numbers that the optimizer keeps for each weight of the network"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (new_optimizer, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes)
            # Ends at a rate of zero, which leaves little noise between seeds.
            rate = optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
            model.compile(
                optimizer=new_optimizer(rate),  # the technique
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
            comparison.add_figure(variant, run.seed, "kept per weight", numbers_kept_per_weight(model))
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
