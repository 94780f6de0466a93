"""Snapshot ensemble: trains one network through several cycles of the learning rate, and averages their predictions.

Symptom: you want an ensemble, but have the time to train one network only.

Technique: the rate falls along a cosine to zero, leaps back to its peak, and so on for M cycles. At the end of each the
weights lie in a minimum, and a copy is kept. The leap is meant to carry them into another one, with other mistakes.
Predictions are averaged as in an ensemble: p = (1/M) Σ p_m. Keras: `CosineDecayRestarts`, and a callback of four lines.

Change: the schedule, one callback, and the average over its snapshots:

    schedule = keras.optimizers.schedules.CosineDecayRestarts(0.1, cycle_steps, t_mul=1.0)
    snapshots = KeepSnapshots(every=epochs_per_cycle)  # see below
    model.fit(..., epochs=5 * epochs_per_cycle, callbacks=[snapshots])

Say `t_mul=1.0`: by default each cycle is twice as long as the one before, and your snapshots would miss its ends.
`cycle_steps` are steps, not epochs.

Look for: whether the average is better than one network that spends all epochs on one cosine, in accuracy and in
log-loss. The rival for the same time are independent networks with one cycle each. Compare how often the members of
both disagree: snapshots that agree on everything are one network. And look at the members' own accuracy, for later
snapshots have been trained for longer than a network of one cycle.

Cost: training as for one network; M copies of the weights, and M times the inference. Two hyper-parameters, the number
of cycles and the peak, for which the authors took a larger rate than usual: the leap has to be large enough to leave
the minimum. Snapshots with batch normalisation keep their own moving statistics: nothing is to be recomputed, since
predictions are averaged here, not weights.

Source: Huang et al., "Snapshot Ensembles: Train 1, Get M for Free", ICLR 2017.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers
from scipy.special import log_softmax, logsumexp

from callbacks import Comparison

MEMBERS = 5

# How the members are made, and the best learning rate of GRID (--search). It is searched for what a single training
# ends with: the network of one cosine, the last snapshot, or one independent network.
VARIANTS = {
    "one cosine": ("one", 0.03),
    "5 snapshots": ("snapshots", 0.03),
    "5 short trainings": ("networks", 0.1),
}

# The variant that answers the recipe's question.
HEADLINE = "5 snapshots"

# Peak learning rates of gradient descent with momentum.
GRID = (0.01, 0.03, 0.1, 0.3)

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
    for filters in (8, 16):
        x = layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


class KeepSnapshots(keras.callbacks.Callback):
    """Keeps a copy of the weights at the end of each cycle of `every` epochs, when the learning rate is about zero."""

    def __init__(self, every):
        super().__init__()
        self.every = every
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        if (epoch + 1) % self.every == 0:
            self.weights.append(self.model.get_weights())  # the technique


def average(logits):
    """Return the logarithms of the members' mean probabilities, from logits of shape (members, examples, classes).

    In float64 and without leaving the logarithms, so that a probability near 0 is neither rounded to 0 nor clipped.
    """
    log_probabilities = log_softmax(np.asarray(logits, dtype="float64"), axis=-1)
    return logsumexp(log_probabilities, axis=0) - np.log(len(logits))


def calibration_error(probabilities, labels, bins=15):
    """Return the expected calibration error: |accuracy - confidence| in bins of confidence, weighted by their sizes.

    Probabilities have shape (examples, classes), labels shape (examples,). Guo et al. 2017.
    """
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    return sum(abs((correct - confidence)[index == number].sum()) for number in range(bins)) / len(labels)


def figures(log_probabilities, labels):
    """Return accuracy, log-loss and calibration error of log-probabilities of shape (examples, classes)."""
    return {
        "accuracy": np.mean(log_probabilities.argmax(axis=-1) == labels),
        "log-loss": -np.mean(log_probabilities[np.arange(len(labels)), labels]),
        "calibration error": calibration_error(np.exp(log_probabilities), labels),
    }


def disagreement(logits):
    """Return the share of examples on which two members differ, averaged over all pairs; 0 for one member."""
    choices = np.argmax(logits, axis=-1)
    pairs = [np.mean(one != other) for index, one in enumerate(choices) for other in choices[:index]]
    return np.mean(pairs) if pairs else 0.0


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 6,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one network along one cosine or along five, and five networks for a fifth of the time, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data in one cycle; each variant trains for five times as many in all.
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
        validation=validation,
        test=test,
        same_start=False,  # independent networks must start apart; the first starts as the baseline does
        settings={"dataset": dataset, "limit": limit, "epochs in all": MEMBERS * epochs, "members": MEMBERS},
        columns={
            "log-loss": "mean of -log p of the right class, on test images",
            "calibration error": "how far the probability of the predicted class is from the share of right answers",
            "members' accuracy": "mean of the members' own",
            "disagreement": "share of test images on which two members differ",
        },
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (kind, learning_rate), run in loop:
            cycles = 1 if kind == "networks" else MEMBERS
            members = []
            for member in range(MEMBERS if kind == "networks" and not search else 1):
                keras.utils.set_random_seed(run.seed * MEMBERS + member)  # no two networks share a seed
                model = build_model(train[0].shape[1:], classes)
                # Equal cycles, each of which ends at a rate of zero; one that is as long as the training is no restart.
                cycle = epochs if kind == "snapshots" else cycles * epochs
                schedule = keras.optimizers.schedules.CosineDecayRestarts(learning_rate, cycle * steps, t_mul=1.0)
                model.compile(
                    optimizer=keras.optimizers.SGD(schedule, momentum=0.9),
                    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                    metrics=["accuracy"],
                    steps_per_execution=min(steps, STEPS_PER_CALL),
                )
                snapshots = KeepSnapshots(every=cycle)
                model.fit(
                    *train,
                    batch_size=batch_size,
                    epochs=cycles * epochs,
                    verbose=0,
                    callbacks=[snapshots, run] if search else [snapshots],
                )
                members += snapshots.weights
            if search:
                continue
            logits = []
            for weights in members:
                model = build_model(train[0].shape[1:], classes)
                model.set_weights(weights)
                model.run_eagerly = True  # TensorFlow warns of a graph for each member that is used but once
                logits.append(model.predict(test[0], batch_size=256, verbose=0))
            together = figures(average(logits), test[1])
            comparison.add(variant, run.seed, together)
            for name in ("log-loss", "calibration error"):
                comparison.add_figure(variant, run.seed, name, together[name])
            own = [figures(average([each]), test[1])["accuracy"] for each in logits]
            comparison.add_figure(variant, run.seed, "members' accuracy", np.mean(own))
            comparison.add_figure(variant, run.seed, "disagreement", disagreement(logits))
            # The last members first, as the authors add them. In the picture a single network is a level line.
            by_count = [figures(average(logits[-count:]), test[1]) for count in range(1, MEMBERS + 1)]
            for name in ("accuracy", "log-loss"):
                values = [each[name] for each in by_count]
                comparison.add_signal(variant, run.seed, f"test {name}", values, by="number of members")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
