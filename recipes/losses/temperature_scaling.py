"""Temperature scaling: divides the logits of a trained network by one number, so that its confidence can be believed.

Symptom: the softmax says 99 %, but such answers are right less often. You have trained your network already, and want
its probabilities to mean something.

Technique: p = softmax(z / T), with the one T > 0 that gives the lowest log-loss on validation data. T > 1 makes every
answer less sure, T < 1 surer. The order of the classes stays, so no prediction changes. In 1 / T the log-loss is
convex: there is one minimum, and any search along a line finds it. Keras has no built-in for the search; afterwards
`keras.layers.Rescaling(1 / T)` divides the logits.

Change: nothing in training. Afterwards one search, on data that the network was not trained on:

    def loss(log_temperature):
        return -np.mean(log_softmax(logits / np.exp(log_temperature), axis=1)[np.arange(len(labels)), labels])

    temperature = np.exp(scipy.optimize.minimize_scalar(loss, bounds=(-5, 5)).x)
    calibrated = keras.Sequential([model, layers.Rescaling(1 / temperature), layers.Softmax()])

Look for: log-loss and calibration error as trained and at the fitted T, and whether the curves over T (the picture)
have their lowest points near it. Accuracy has to be the same to the last digit. Then look at T from training data: a
network that knows these by heart is right to be sure of them, so they tell nothing about new ones. A hundred validation
images may do, since one number is all that they have to tell: see what is lost.

Cost: next to none, and no hyper-parameter. It needs labelled data that training has not seen; validation data that
chose the network flatter a little. One number for all cannot mend a network that is too sure of some classes and not of
others, nor one that meets other data than these. The logits are needed: from probabilities, take their logarithms.

Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. Its headline, a ResNet-110 on CIFAR-100: a
calibration error of 1.26 % instead of 16.53 %.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from keras import layers
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from callbacks import Comparison

# The data that the temperature is fitted on, and how many images of them.
VARIANTS = {
    "as trained": None,
    "temperature": ("validation", None),
    "from 100 images": ("validation", 100),
    "from training data": ("training", None),
}

# The variant that answers the recipe's question.
HEADLINE = "temperature"

# Where the picture shows the figures.
TEMPERATURES = np.geomspace(0.25, 16, 25)

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
    for _ in range(2):
        x = layers.Dense(256, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def fit_temperature(logits, labels):
    """Return the temperature between exp(-5) and exp(5) with the lowest log-loss of logits (examples, classes)."""

    def loss(log_temperature):
        return figures(logits / np.exp(log_temperature), labels)["log-loss"]

    # Without errors among the examples, the log-loss falls for ever as T → 0: hence the bounds.
    return np.exp(minimize_scalar(loss, bounds=(-5, 5), options={"xatol": 1e-6}).x)  # the technique


def calibration_error(probabilities, labels, bins=15):
    """Return the expected calibration error: |accuracy - confidence| in bins of confidence, weighted by their sizes.

    Probabilities have shape (examples, classes), labels shape (examples,). Guo et al. 2017.
    """
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    return sum(abs((correct - confidence)[index == number].sum()) for number in range(bins)) / len(labels)


def figures(logits, labels):
    """Return log-loss, accuracy and calibration error of logits of shape (examples, classes)."""
    log_probabilities = log_softmax(logits.astype("float64"), axis=-1)
    return {
        "log-loss": -np.mean(log_probabilities[np.arange(len(labels)), labels]),
        "accuracy": np.mean(log_probabilities.argmax(axis=-1) == labels),
        "calibration error": calibration_error(np.exp(log_probabilities), labels),
    }


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    learning_rate: PositiveFloat = 0.001,  # the most accurate in the search of dropout.py, with a wider network
):
    """Train a network, fit a temperature on three sets of data, and compare test log-loss before and after.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        learning_rate: peak step size of Adam.
    """
    train, validation, (images, labels), classes = load(dataset, data_dir, limit)
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="log-loss",
        margin=0.02,
        test=(images, labels),
        same_start=False,  # one training serves all variants of a seed
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "learning rate": learning_rate},
        columns={
            "temperature": "the logits are divided by it",
            "accuracy": "share of the test images that are classified right",
            "calibration error": "how far the probability of the predicted class is from the share of right answers",
        },
        save=save,
    ) as comparison:
        # The loop skips the variants that the first one's training has served.
        for _, _, run in comparison.runs(VARIANTS, seeds):
            model = build_model(images.shape[1:], classes)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            model.fit(*train, batch_size=batch_size, epochs=epochs, verbose=0)
            model.run_eagerly = True  # TensorFlow warns of a graph for each model that is used but once
            fitted_on = {
                name: (model.predict(x, batch_size=256, verbose=0), y)
                for name, (x, y) in {"training": train, "validation": validation}.items()
            }
            logits = model.predict(images, batch_size=256, verbose=0)
            for variant, source in VARIANTS.items():
                temperature = 1.0
                if source is not None:
                    name, number = source
                    temperature = fit_temperature(*(array[:number] for array in fitted_on[name]))
                found = figures(logits / temperature, labels)
                comparison.add(variant, run.seed, found)
                comparison.add_figure(variant, run.seed, "temperature", temperature)
                for name in ("accuracy", "calibration error"):
                    comparison.add_figure(variant, run.seed, name, found[name])
            by_temperature = [figures(logits / temperature, labels) for temperature in TEMPERATURES]
            for name in ("log-loss", "calibration error"):
                values = [each[name] for each in by_temperature]
                comparison.add_signal(
                    HEADLINE, run.seed, f"test {name}", values, by="temperature", at=TEMPERATURES, at_scale="log"
                )
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
