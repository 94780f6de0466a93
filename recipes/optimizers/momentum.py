"""Momentum: steps along a decaying sum of all gradients so far, in place of the last one alone.

Symptom: gradient descent zigzags across a narrow valley of the loss. Along the valley it creeps.

Technique: v ← γ v - η g, then w ← w + v, with the gradient g and the learning rate η. Where g stays the same, steps
grow to η g / (1 - γ): ten times as long with γ = 0.9. Where g changes its sign at every step, the sum cancels. γ = 0 is
plain gradient descent. Nesterov's form takes the gradient at w + γ v, the point to which the momentum leads. Keras:
`momentum` and `nesterov` of `keras.optimizers.SGD`.

Change: two arguments of the optimizer, for the learning rate must be smaller:

    optimizer = keras.optimizers.SGD(0.03, momentum=0.9)

Look for: test accuracy after the same number of steps, each variant at its own best learning rate, and the epochs that
it takes to a target. At one rate for all you would see the gain of longer steps, which a larger rate gives as well. The
batches here are large: then the shape of the loss limits the steps. In small batches noise does, and momentum is known
to matter less. With γ = 0.99 the sum reaches back a hundred steps: see whether that still helps, or overshoots.

Cost: one more number for each weight, little time, and one hyper-parameter, for which 0.9 is usual. Search for the
learning rate anew: the best one falls as γ rises. Some formulas have η outside of v, as in v ← γ v + g: that is the
same as long as η is constant.

Source: Polyak, "Some methods of speeding up the convergence of iteration methods", USSR Computational Mathematics and
Mathematical Physics 4, 1964; Sutskever et al., "On the importance of initialization and momentum in deep learning",
ICML 2013, whose form of Nesterov's method this is; on batch sizes, Shallue et al., JMLR 20, 2019.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from keras import layers

from callbacks import Comparison

# γ, whether it is Nesterov's form, and the best learning rate of GRID (--search).
VARIANTS = {
    "no momentum": (0.0, False, 0.3),
    "momentum 0.5": (0.5, False, 0.1),
    "momentum 0.9": (0.9, False, 0.03),
    "momentum 0.99": (0.99, False, 0.01),
    "Nesterov 0.9": (0.9, True, 0.03),
}

# The variant that answers the recipe's question.
HEADLINE = "momentum 0.9"

# Learning rates.
GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

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


def epochs_to(target, accuracies):
    """Return the number of epochs after which the accuracy first reached `target`: infinite if it never did."""
    return next((epoch for epoch, accuracy in enumerate(accuracies, start=1) if accuracy >= target), float("inf"))


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
    """Train one network by gradient descent without momentum, with three amounts of it, and with Nesterov's form.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        target: validation accuracy; the epochs until it is reached are counted.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 512  # large, so that gradients have little noise
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "batch size": batch_size},
        columns={f"epochs to {target}": f"epochs until validation accuracy first was {target}; inf if it never was"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (momentum, nesterov, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes)
            # Ends at a rate of zero, which leaves little noise between seeds.
            rate = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
            model.compile(
                optimizer=keras.optimizers.SGD(rate, momentum=momentum, nesterov=nesterov),  # the technique
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            history = model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            ).history
            comparison.add_figure(variant, run.seed, f"epochs to {target}", epochs_to(target, history["val_accuracy"]))
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
