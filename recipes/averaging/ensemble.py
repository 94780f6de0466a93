"""Ensemble: trains several networks from different seeds, and averages the probabilities that they predict.

Symptom: each seed makes other mistakes, and a larger network makes no fewer. You have trained one network several
times.

Technique: p = (1/K) Σ p_k, over K networks that differ in their seed alone, which gives each its own starting weights
and order of batches. As -log is convex, the log-loss of the average is never above the mean of the members' log-losses,
not even on a single example (Jensen's inequality). Nothing of the kind holds for accuracy, but members seldom agree on
a mistake. Keras: a loop, and a new model for each member.

Change: train in a loop, and average probabilities, in float64 and without leaving the logarithms. Start with K = 5:

    keras.utils.set_random_seed(seed * 5 + member)  # before building each member
    logits.append(model.predict(images))
    log_p = logsumexp(log_softmax(np.float64(logits), axis=-1), axis=0) - np.log(len(logits))

Probabilities in float32 round to 0 or 1, and Keras's losses clip them at 1e-7, which breaks the inequality. The mean of
the logits is another method: it averages the logarithms, and has to be normalised again.

Look for: how far the ensemble's accuracy and log-loss are from those of its members, and how soon another member adds
little (the picture). Then look at the single network with as many parameters as all members together: it tells whether
it was the size that helped.

Cost: K times the time, the memory and the inference of one network; the members can be trained side by side. No new
hyper-parameter but K. stochastic_weight_averaging.py averages weights instead, at the price of one network; weights of
networks from different seeds cannot be averaged, for their units do not correspond.

Source: Hansen and Salamon, "Neural Network Ensembles", IEEE Transactions on Pattern Analysis and Machine Intelligence
12, 1990; Lakshminarayanan et al., "Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
NeurIPS 2017.
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
FILTERS = 8

# The number of networks, how many times the parameters of one network each of them has, and the best learning rate of
# GRID for one such network (--search). A member has the rate of "one network", which differs from it in nothing.
VARIANTS = {
    "one network": (1, 1, 0.01),
    "ensemble of 5": (MEMBERS, 1, 0.01),
    "one, 5 times as large": (1, MEMBERS, 0.01),
}

# The variant that answers the recipe's question.
HEADLINE = "ensemble of 5"

# Learning rates of Adam.
GRID = (0.001, 0.003, 0.01, 0.03)

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


def build_model(image_shape, classes, filters):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    for number in (filters, 2 * filters):
        x = layers.Conv2D(number, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def filters_of(times, image_shape, classes):
    """Return the number of filters at which a network has about `times` the parameters of one with FILTERS."""
    height, width, channels = image_shape
    pixels = -(-height // 4) * -(-width // 4)

    def parameters(filters):
        convolutions = (9 * channels + 1) * filters + (9 * filters + 1) * 2 * filters
        return convolutions + (pixels * 2 * filters + 1) * classes

    return min(range(1, times * FILTERS + 1), key=lambda number: abs(parameters(number) - times * parameters(FILTERS)))


def average(logits):
    """Return the logarithms of the members' mean probabilities, from logits of shape (members, examples, classes).

    In float64 and without leaving the logarithms, so that a probability near 0 is neither rounded to 0 nor clipped.
    """
    log_probabilities = log_softmax(np.asarray(logits, dtype="float64"), axis=-1)
    return logsumexp(log_probabilities, axis=0) - np.log(len(logits))  # the technique


def figures(log_probabilities, labels):
    """Return the accuracy and the log-loss of predictions, log-probabilities of shape (examples, classes)."""
    return {
        "accuracy": np.mean(log_probabilities.argmax(axis=-1) == labels),
        "log-loss": -np.mean(log_probabilities[np.arange(len(labels)), labels]),
    }


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 12,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one network, an ensemble of such networks, and one network as large as the ensemble, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each single network, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        validation=validation,
        test=test,
        same_start=False,  # the members must start apart; the first starts as the baseline does
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "filters": FILTERS},
        columns={
            "log-loss": "mean of -log p of the right class, on test images",
            "members' accuracy": "mean of the members' own",
            "members' log-loss": "mean of the members' own",
        },
        save=save,
    ) as comparison:
        single = {variant: value for variant, value in VARIANTS.items() if value[0] == 1}
        loop = comparison.search(single, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (members, times, learning_rate), run in loop:
            filters = filters_of(times, train[0].shape[1:], classes)
            logits = []
            for member in range(members):
                keras.utils.set_random_seed(run.seed * MEMBERS + member)  # no two members of any ensemble share a seed
                model = build_model(train[0].shape[1:], classes, filters)
                # Ends at a rate of zero, which leaves little noise between seeds.
                schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
                model.compile(
                    optimizer=keras.optimizers.Adam(schedule),
                    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                    metrics=["accuracy"],
                    steps_per_execution=min(steps, STEPS_PER_CALL),
                )
                model.fit(*train, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=[run] if search else [])
                if not search:
                    model.run_eagerly = True  # TensorFlow warns of a graph for each member that is used but once
                    logits.append(model.predict(test[0], batch_size=256, verbose=0))
            if search:
                continue
            # In the picture a single network is a level line.
            by_count = [figures(average(logits[: count + 1]), test[1]) for count in range(MEMBERS)]
            by_member = [figures(average([member]), test[1]) for member in logits]
            comparison.add(variant, run.seed, by_count[-1])
            comparison.add_figure(variant, run.seed, "log-loss", by_count[-1]["log-loss"])
            for name in ("accuracy", "log-loss"):
                mean = np.mean([each[name] for each in by_member])
                comparison.add_figure(variant, run.seed, f"members' {name}", mean)
                values = [each[name] for each in by_count]
                comparison.add_signal(variant, run.seed, f"test {name}", values, by="number of members")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
