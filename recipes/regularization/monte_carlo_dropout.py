"""Monte Carlo dropout: averages the predictions of many passes with dropout left on, instead of one without it.

Symptom: your network, trained with dropout, is too sure of itself. Its probabilities are higher than the share of its
answers that are right, and the loss on new data is high for its accuracy.

Technique: every pass with dropout on is the prediction of another thinned network. p = 1/T · Σ pₜ averages the
probabilities of T passes, not their logits; what is left of the randomness shrinks as 1/√T. The usual pass, with
dropout off, is a fast approximation of this mean, and surer of itself. Keras: a second model whose dropout is on at
inference, too, and nothing else. `model(x, training=True)` would have batch normalisation use, and move, the statistics
of the test batch; `Dropout(rate)(x, training=True)` in the model is overruled by `predict` (Keras 3.15).

Change: nothing in training. Afterwards a second model, which shares the weights. Start with 20 passes:

    class AlwaysDropout(layers.Dropout):
        def call(self, inputs, training=False):
            return super().call(inputs, training=True)

    def replace(layer):
        return AlwaysDropout(layer.rate) if isinstance(layer, layers.Dropout) else layer

    stochastic = keras.models.clone_model(model, clone_function=replace)
    probabilities = np.mean([ops.softmax(stochastic(x)) for _ in range(20)], axis=0)

Look for: the loss, which is the negative log-likelihood, and the calibration error, by the number of passes (the
picture). See from which number on the average is better than the usual pass, and where more passes stop paying. Look at
accuracy apart from them: it need not gain. A network that is not too sure of itself becomes too unsure: then the
calibration error rises with the average.

Cost: T times the time of a prediction, none in training; one hyper-parameter, T. The network must have been trained
with the same dropout. The answer is random: two calls differ by what is left of the randomness.

Source: Gal and Ghahramani, "Dropout as a Bayesian Approximation: Representing Model Uncertainty in Deep Learning", ICML
2016; calibration error: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

from pathlib import Path
from typing import Annotated

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from cyclopts.validators import Number
from keras import layers
from scipy.special import log_softmax, logsumexp

from callbacks import Comparison

# The number of passes with dropout on that are averaged; 0 stands for the usual pass, with dropout off.
VARIANTS = {"usual pass": 0, "1 pass": 1, "5 passes": 5, "20 passes": 20}

# The variant that answers the recipe's question.
HEADLINE = "20 passes"

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


def build_model(image_shape, classes, rate):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(256, activation="relu")(x)
        x = layers.Dropout(rate)(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


class AlwaysDropout(layers.Dropout):
    """Dropout that is on at inference, too."""

    def call(self, inputs, training=False):
        return super().call(inputs, training=True)


def with_dropout_on(model):
    """Return a model with the layers and weights of `model`, but with its dropout on at inference, too."""

    def replace(layer):
        return AlwaysDropout(layer.rate) if isinstance(layer, layers.Dropout) else layer

    return keras.models.clone_model(model, clone_function=replace)


def log_probabilities(logits):
    """Return logits of shape (…, classes) as logarithms of probabilities, in float64, so that none of them is lost."""
    return log_softmax(keras.ops.convert_to_numpy(logits).astype("float64"), axis=-1)


def average(passes):
    """Return the logarithm of the mean probabilities of passes, log-probabilities of (passes, images, classes)."""
    return logsumexp(passes, axis=0) - np.log(len(passes))  # the technique


def calibration_error(confidences, correct, bins=15):
    """Return the expected calibration error: Σ share of the bin · |accuracy in the bin - mean confidence in the bin|.

    Args:
        confidences: probability of the predicted class, of shape (images,); the bins divide [0, 1] evenly.
        correct: whether that class is right, of shape (images,).
        bins: number of bins.
    """
    bin_of_image = np.digitize(confidences, np.linspace(0, 1, bins + 1)[1:-1])
    errors = [np.sum((correct - confidences)[bin_of_image == number]) for number in range(bins)]
    return np.sum(np.abs(errors)) / len(confidences)


def figures(log_probabilities, labels):
    """Return loss, accuracy and calibration error of log-probabilities of shape (images, classes)."""
    correct = np.argmax(log_probabilities, axis=-1) == labels
    return {
        "loss": -np.mean(log_probabilities[np.arange(len(labels)), labels]),
        "accuracy": np.mean(correct),
        "calibration error": calibration_error(np.exp(np.max(log_probabilities, axis=-1)), correct),
    }


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 40,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    dropout: Annotated[float, cyclopts.Parameter(validator=Number(gte=0, lt=1))] = 0.5,
    learning_rate: PositiveFloat = 0.001,
):
    """Train a network with dropout, and compare its usual prediction with averages of passes with dropout left on.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        dropout: share of the units that dropout switches off.
        learning_rate: peak step size of Adam.
    """
    train, _, (images, labels), classes = load(dataset, data_dir, limit)
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="loss",
        margin=0.02,
        test=(images, labels),
        same_start=False,  # one training serves all variants of a seed
        settings={
            "dataset": dataset,
            "limit": limit,
            "epochs": epochs,
            "dropout": dropout,
            "learning rate": learning_rate,
        },
        columns={
            "accuracy": "share of the test images that are classified right",
            "calibration error": "how far the probability of the predicted class is from the share of right answers",
        },
        save=save,
    ) as comparison:
        # The loop skips the variants that the first one's training has served.
        for _, _, run in comparison.runs(VARIANTS, seeds):
            model = build_model(images.shape[1:], classes, dropout)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            model.fit(*train, batch_size=batch_size, epochs=epochs, verbose=0)
            stochastic = with_dropout_on(model)
            model.run_eagerly = True  # TensorFlow warns of a graph for each seed that is used but once
            usual = log_probabilities(model.predict(images, batch_size=256, verbose=0))
            passes = np.stack([log_probabilities(stochastic(images)) for _ in range(max(VARIANTS.values()))])
            # Of the first pass, of the first two, and so on. Without any: the usual pass.
            averages = [average(passes[:number]) for number in range(1, len(passes) + 1)]
            results = [figures(predicted, labels) for predicted in [usual, *averages]]
            for variant, number in VARIANTS.items():
                comparison.add(variant, run.seed, results[number])
                for name in ("accuracy", "calibration error"):
                    comparison.add_figure(variant, run.seed, name, results[number][name])
                # In the picture the usual pass is a level line, and the largest average shows all the smaller ones.
                if number in (0, len(passes)):
                    for name in ("loss", "calibration error"):
                        line = [result[name] for result in results[1:]] if number else [results[0][name]] * len(passes)
                        comparison.add_signal(variant, run.seed, f"test {name}", line, by="number of passes")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
