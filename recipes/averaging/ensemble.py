"""Ensemble: trains several networks from different seeds, and averages the probabilities that they predict.

Symptom: each seed makes other mistakes, and a larger network makes no fewer. You have trained one network several
times.

Technique: p = (1/K) Σ p_k, over K networks that differ in their seed alone, which gives each its own starting weights
and order of batches. As -log is convex, -log p ≤ (1/K) Σ -log p_k for every single example (Jensen's inequality): the
log-loss of the average is never above the mean of its members' log-losses. Nothing of the kind holds for accuracy,
which usually rises, too, for members seldom agree on a mistake. Keras: a loop, and one new model for each member.

Change: train in a loop, and average probabilities, in float64 and without leaving the logarithms:

    keras.utils.set_random_seed(seed * 5 + member)  # before building each member
    logits.append(model.predict(images))
    log_p = logsumexp(log_softmax(np.float64(logits), axis=-1), axis=0) - np.log(len(logits))

Probabilities in float32 round to 0 or 1, and Keras's losses clip them at 1e-7, which breaks the inequality. The mean of
the logits is another method: it averages the logarithms of the probabilities, and has to be normalised again.

Look for: five members at 0.003, the rate that is best for their average, have a log-loss of 0.519 on average, and
together of 0.410; their accuracy rises from 0.835 to 0.856. One such network at its own best rate, 0.001, has 0.469 and
0.840: the ensemble gains 1.6 ± 1.0 points. One network with as many parameters as all five, at its best rate of
0.0003, has 0.442 and 0.845, not measurably better than the small one. So it is not the number of parameters that
helps. Members overfit more at 0.003, each in its own way, and their average forgives it. Two members give more than
half of the gain over their mean (the picture), the fifth little more.

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
WIDTH = 64

# The number of networks, how many times the parameters of one network each of them has, and the learning rate.
# Validation accuracy over three seeds (that of one network is the mean of the members, 15 networks):
#   rate                   0.0001  0.0003  0.001   0.003   0.01
#   one network                    0.8346  0.8439  0.8407  0.8316
#   ensemble of 5                  0.8455  0.8612  0.8633  0.8590
#   one, 5 times as large  0.8417  0.8513  0.8505  0.8418  0.8310
VARIANTS = {
    "one network": (1, 1, 0.001),
    "ensemble of 5": (MEMBERS, 1, 0.003),
    "one, 5 times as large": (1, MEMBERS, 0.0003),
}

# The variant that answers the recipe's question.
HEADLINE = "ensemble of 5"

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


def build_model(image_shape, classes, width):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(width, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def width_of(times, image_shape, classes):
    """Return the width at which a network has about `times` the parameters of one of width WIDTH."""
    pixels = np.prod(image_shape)

    def parameters(width):
        return (pixels + 1) * width + (width + 1) * width + (width + 1) * classes

    return min(range(1, times * WIDTH + 1), key=lambda width: abs(parameters(width) - times * parameters(WIDTH)))


def average(logits):
    """Return the logarithms of the members' mean probabilities, from logits of shape (members, examples, classes).

    In float64 and without leaving the logarithms, so that a probability near 0 is neither rounded to 0 nor clipped.
    """
    return logsumexp(log_softmax(np.asarray(logits, dtype="float64"), axis=-1), axis=0) - np.log(len(logits))


def figures(log_probabilities, labels):
    """Return the accuracy and the log-loss of predictions, log-probabilities of shape (examples, classes)."""
    return {
        "accuracy": np.mean(log_probabilities.argmax(axis=-1) == labels),
        "loss": -np.mean(log_probabilities[np.arange(len(labels)), labels]),
    }


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 15,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
):
    """Train one network, an ensemble of such networks, and one network as large as the ensemble, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
    """
    train, _, test, classes = load(dataset, data_dir, limit)
    with Comparison(
        metric="accuracy",
        test=test,
        same_start=False,  # the members must start apart; the first starts as the baseline does
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "width": WIDTH},
        save=save,
    ) as comparison:
        for variant, (members, times, learning_rate), run in comparison.runs(VARIANTS, seeds):
            logits = []
            for member in range(members):
                # The technique: no two members of any ensemble share a seed.
                keras.utils.set_random_seed(run.seed * MEMBERS + member)
                width = width_of(times, train[0].shape[1:], classes)
                model = build_model(train[0].shape[1:], classes, width)
                model.compile(
                    optimizer=keras.optimizers.Adam(learning_rate),
                    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                    metrics=["accuracy"],
                )
                model.fit(*train, batch_size=128, epochs=epochs, verbose=0)
                logits.append(model.predict(test[0], batch_size=256, verbose=0))
            by_count = [figures(average(logits[: count + 1]), test[1]) for count in range(MEMBERS)]
            comparison.add(variant, run.seed, by_count[-1])
            by_member = [figures(average([member]), test[1]) for member in logits]
            comparison.add_figure(variant, run.seed, "log-loss", by_count[-1]["loss"])
            for title, name in ("members' accuracy", "accuracy"), ("members' log-loss", "loss"):
                comparison.add_figure(variant, run.seed, title, np.mean([member[name] for member in by_member]))
            for title, name in ("test accuracy", "accuracy"), ("test log-loss", "loss"):
                values = [of_count[name] for of_count in by_count]
                comparison.add_signal(variant, run.seed, title, values, by="number of members")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
