"""One cycle: one rise and one fall of the learning rate, far above and far below its constant best.

Symptom: training takes many epochs at the best constant rate. A larger one makes it unstable or worse.

Technique: the rate rises linearly from a tenth of its peak to the peak, falls back as fast, and in the last steps falls
to a thousandth of its start. Momentum goes the other way, 0.95 to 0.85 and back, as both large would be unstable: the
step grows to η / (1 - momentum) times the gradient. The peak may lie above the rates that suit a constant training,
because it is held only for a while, and what it unsettles, the fall settles. Keras has no one-cycle schedule; here it
is `callbacks.OneCycle`, to be copied.

Change: one callback, where `steps` is epochs times batches per epoch:

    model.fit(..., callbacks=[OneCycle(peak=0.3, steps=steps)])

Look for: validation accuracy, which at the high rates in the middle of the cycle is no better than at the best constant
rate, 0.003, and rises above it in the last epochs. After 12 epochs one cycle with a peak of 0.3, a hundred times that
rate, has 0.854 test accuracy instead of 0.831; one of half the length, with a peak of 0.1, has 0.847 after 6; the peak
held constant 0.816. The cycle also fits the training images best: the gap grows, and so does test loss (0.55 instead of
0.49). The median of the epochs until validation accuracy is 0.84 is 10 with one cycle, 6 with the short one, and inf at
both constant rates: most runs never get there. (In the search a constant 0.01 got there after 5 epochs in two of three
runs, and then fell back to 0.827 by overfitting.)

Cost: a tenth of a millisecond a step; the peak as a hyper-parameter (learning_rate_range_test.py helps), and the length
of the training, which must be known beforehand: most of the gain comes in the last phase, and a cycle cut short lacks
it. The optimizer needs a number as its rate, and momentum or β₁.

Source: Smith, "A disciplined approach to neural network hyper-parameters: Part 1", arXiv:1803.09820, 2018, who reports
99.3 % on MNIST after 12 epochs, against 99.03 % after 85 at a constant rate; Smith and Topin, "Super-Convergence",
arXiv:1708.07120.
"""

import math
from pathlib import Path

import cyclopts
import keras
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from keras import layers

from callbacks import Comparison, LearningRateLogger, OneCycle

# The learning rate, constant or the peak of a cycle. Validation accuracy over three seeds:
#   rate          0.001   0.003   0.01    0.03    0.1     0.3     1.0     3.0
#   constant     0.8163  0.8363  0.8267  0.8212  0.8123  0.8203
#   one cycle                                    0.8653  0.8662  0.8615  0.8420
#   half as long                                 0.8590  0.8582  0.8538  0.7545
VARIANTS = {
    "constant": (0.003, "constant"),
    "peak held": (0.3, "constant"),
    "one cycle": (0.3, "cycle"),
    "half as long": (0.1, "short cycle"),
}

# The variant that answers the recipe's question.
HEADLINE = "one cycle"

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
):
    """Train one network at its best constant rate, at the peak of the cycle, and along cycles of two lengths.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data; the short cycle has half as many.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        target: validation accuracy; the epochs until it is reached are counted.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 128
    steps_per_epoch = math.ceil(len(train[0]) / batch_size)
    with Comparison(
        metric="accuracy",
        train=train,
        validation=validation,
        test=test,
        settings={
            "dataset": dataset,
            "limit": limit,
            "epochs": epochs,
            "rates": "the best on validation data, see VARIANTS",
        },
        save=save,
    ) as comparison:
        for variant, (rate, kind), run in comparison.runs(VARIANTS, seeds):
            model = build_model(train[0].shape[1:], classes)
            model.compile(
                optimizer=keras.optimizers.SGD(rate, momentum=0.9),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
            )
            run_epochs = max(1, epochs // 2) if kind == "short cycle" else epochs
            callbacks = []
            if kind != "constant":
                steps = max(4, run_epochs * steps_per_epoch)  # a cycle has at least 4
                callbacks = [OneCycle(peak=rate, steps=steps)]  # the technique
            rates = LearningRateLogger()
            history = model.fit(
                *train,
                batch_size=batch_size,
                epochs=run_epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[*callbacks, rates, run],
            ).history
            comparison.add_figure(variant, run.seed, "peak rate", max(rates.history))
            comparison.add_figure(variant, run.seed, f"epochs to {target}", epochs_to(target, history["val_accuracy"]))
            comparison.add_signal(
                variant, run.seed, "learning rate", rates.history[::7], by="block of 7 steps", scale="log"
            )
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
