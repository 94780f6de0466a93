"""One cycle: one rise and one fall of the learning rate, far above and far below its constant best.

Symptom: training takes many epochs at the best constant rate. A larger one makes it unstable or worse.

Technique: the rate rises linearly from a tenth of its peak to the peak, falls back as fast, and in the last steps falls
to a thousandth of its start. Momentum goes the other way, 0.95 to 0.85 and back, as both large would be unstable: the
step grows to η / (1 - momentum) times the gradient. The peak may lie above the rates that suit a constant training,
because it is held only for a while, and what it unsettles, the fall settles. Keras has no one-cycle schedule; here it
is `callbacks.OneCycle`, to be copied.

Change: one callback; the cycle is as long as the training:

    model.fit(..., callbacks=[OneCycle(peak=0.1)])

Look for: validation accuracy along the cycle. In the middle, at high rates, it need not be good: what counts is where
it ends. See whether the cycle of half the length reaches what the constant rate does in the whole. The rival is a
cosine to zero, simpler and built in: ask what the rise and the momentum add to it. Compare the best peaks with the best
constant rate (`--search`).

Cost: an assignment a step, and each step executed by itself (`steps_per_execution=1`); the peak as a hyper-parameter
(learning_rate_range_test.py helps), and the length of the training, which must be known beforehand: a cycle cut short
lacks its last phase, which settles what the peak has unsettled. The optimizer needs a number as its rate, and momentum
or β₁.

Source: Smith, "A disciplined approach to neural network hyper-parameters: Part 1", arXiv:1803.09820, 2018, who reports
99.3 % on MNIST after 12 epochs, against 99.03 % after 85 at a constant rate; Smith and Topin, "Super-Convergence",
arXiv:1708.07120.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from keras import layers

from callbacks import Comparison, LearningRateLogger, OneCycle

# The schedule, its share of the epochs, and its rate, constant or the peak: the best of GRID (--search).
VARIANTS = {
    "constant": ("constant", 1, 0.03),
    "one cycle": ("cycle", 1, 0.3),
    "cycle, half as long": ("cycle", 0.5, 0.3),
    "cosine": ("cosine", 1, 0.3),
}

# The variant that answers the recipe's question.
HEADLINE = "one cycle"

# Learning rates, constant or the peak.
GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

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
    for _ in range(4):
        x = layers.Dense(128, use_bias=False, kernel_initializer="he_normal")(x)
        x = layers.BatchNormalization(momentum=0.9)(x)  # large rates need it
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def epochs_to(target, accuracies):
    """Return the number of epochs after which the accuracy first reached `target`: infinite if it never did."""
    return next((epoch for epoch, accuracy in enumerate(accuracies, start=1) if accuracy >= target), float("inf"))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 12,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    target: PositiveFloat = 0.84,
    search: bool = False,
):
    """Train one network at its best constant rate, along cycles of two lengths, and along a cosine.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data; the short cycle has half as many.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        target: validation accuracy; the epochs until it is reached are counted.
        search: find the best rate of each variant, on validation data, in place of the comparison.
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
        columns={f"epochs to {target}": f"epochs until validation accuracy first was {target}; inf if it never was"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (schedule, share, rate), run in loop:
            own_epochs = max(1, int(share * epochs))
            callbacks = []
            if schedule == "cycle":
                callbacks = [OneCycle(peak=rate)]  # the technique
            elif schedule == "cosine":
                rate = keras.optimizers.schedules.CosineDecay(rate, own_epochs * steps)
            model = build_model(train[0].shape[1:], classes)
            model.compile(
                optimizer=keras.optimizers.SGD(rate, momentum=0.9),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
            )
            history = model.fit(
                *train,
                batch_size=batch_size,
                epochs=own_epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[*callbacks, LearningRateLogger(), run],
            ).history
            comparison.add_figure(variant, run.seed, f"epochs to {target}", epochs_to(target, history["val_accuracy"]))
            comparison.add_signal(variant, run.seed, "learning rate", history["learning_rate"], by="epoch")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
