"""Noisy labels: trains on labels of which many are wrong, with losses that give in to single mistakes less.

Symptom: some of your labels are wrong, and you do not know which. Training accuracy climbs all the same: your network
learns the mistakes by heart.

Technique: the generalised cross-entropy (1 - pᵠ) / q, where p is the probability of the label. Its gradient is that of
the cross-entropy times pᵠ, so that a label which the network finds unlikely pulls less. With q → 0 it is the
cross-entropy, which pulls hardest at what is unlikely; with q = 1 the mean absolute error, which learns slowly. Keras:
`keras.losses.CategoricalGeneralizedCrossEntropy(q)`. Despite its name it takes integer labels, not one-hot ones, and of
shape (batch,): with (batch, 1) it compares every image with every label. It takes probabilities, not logits; where one
is rounded to 0, the gradient is not a number (Keras 3.15).

Change: the loss, kept off zero. Start with q = 0.7:

    def loss(labels, logits):
        probabilities = ops.maximum(ops.softmax(logits), 1e-7)
        return keras.losses.categorical_generalized_cross_entropy(labels, probabilities, q=0.7)

Look for: accuracy on test images, whose labels are right, and the share of the wrong training labels that the network
repeats. Compare with early stopping, which needs no other loss: networks tend to learn what labels have in common
before they learn the mistakes. The validation labels are as noisy as those of training, for you would have no better
ones. They rank networks all the same, as long as mistakes hit all classes alike; they also choose the rates here.

Cost: one hyper-parameter, q, and no time. With a large q, what is hard but right is given up as well. On clean labels
(`--noise 0`) you may lose by it. Real mistakes mix up classes that look alike, which is harder than these.

Source: Zhang and Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels",
NeurIPS 2018, on Fashion-MNIST among others; on smoothing, Lukasik et al., "Does Label Smoothing Mitigate Label Noise?",
ICML 2020.
"""

from pathlib import Path
from typing import Annotated

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from cyclopts.validators import Number
from keras import layers, ops

from callbacks import Comparison

# The arguments of the loss, the patience of early stopping, and the best of GRID (--search).
VARIANTS = {
    "cross-entropy": ({}, None, 0.0003),
    "early stopping": ({}, 3, 0.0001),
    "label smoothing": ({"smoothing": 0.1}, None, 0.0003),
    "generalized 0.3": ({"q": 0.3}, None, 0.0003),
    "generalized 0.7": ({"q": 0.7}, None, 0.001),
}

# The variant that answers the recipe's question.
HEADLINE = "generalized 0.7"

# Learning rates of Adam.
GRID = (0.0001, 0.0003, 0.001, 0.003, 0.01)

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


def corrupt(labels, classes, noise, seed):
    """Return labels of which a share `noise` is replaced by any of the other classes, and which these are."""
    generator = np.random.default_rng(seed)
    is_wrong = generator.permutation(len(labels)) < round(noise * len(labels))
    others = (labels + generator.integers(1, classes, len(labels))) % classes
    return np.where(is_wrong, others, labels), is_wrong


def build_model(image_shape, classes):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(256, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def build_loss(smoothing=0.0, q=None):
    """Return a loss of integer labels of shape (examples,) and logits of shape (examples, classes)."""

    def generalized_cross_entropy(labels, logits):
        # A probability that is rounded to 0 would have a gradient that is not a number.
        probabilities = ops.maximum(ops.softmax(logits), 1e-7)
        return keras.losses.categorical_generalized_cross_entropy(labels, probabilities, q)  # the technique

    def cross_entropy(labels, logits):
        one_hot = ops.one_hot(ops.cast(labels, "int32"), logits.shape[-1])
        return keras.losses.categorical_crossentropy(one_hot, logits, from_logits=True, label_smoothing=smoothing)

    return cross_entropy if q is None else generalized_cross_entropy


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    noise: Annotated[float, cyclopts.Parameter(validator=Number(gte=0, lt=1))] = 0.4,
    search: bool = False,
):
    """Train one network on partly wrong labels, with early stopping and with three other losses, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        noise: share of the training and validation labels that are made wrong.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    (images, labels), (validation_images, validation_labels), test, classes = load(dataset, data_dir, limit)
    # Whoever has wrong labels has them in validation, too; those of the test alone are right.
    validation = validation_images, corrupt(validation_labels, classes, noise, seed=0)[0]
    batch_size = 128
    steps = -(-len(images) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "wrong labels": noise},
        columns={"mistakes learned": "share of the wrong training labels that the network repeats"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (arguments, patience, learning_rate), run in loop:
            noisy, is_wrong = corrupt(labels, classes, noise, run.seed)  # the same for all variants of a seed
            model = build_model(images.shape[1:], classes)
            # Ends at a rate of zero, which leaves little noise between seeds; constant where it may be stopped before.
            cosine = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
            model.compile(
                optimizer=keras.optimizers.Adam(learning_rate if patience else cosine),
                loss=build_loss(**arguments),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            stopping = [keras.callbacks.EarlyStopping(patience=patience, restore_best_weights=True)] if patience else []
            model.fit(
                images,
                noisy,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[*stopping, run],
            )
            if not search:
                model.run_eagerly = True  # TensorFlow warns of a graph for each model that is used but once
                predicted = model.predict(images, batch_size=256, verbose=0).argmax(axis=1)
                learned = np.sum((predicted == noisy) & is_wrong) / max(1, np.sum(is_wrong))
                comparison.add_figure(variant, run.seed, "mistakes learned", learned)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
