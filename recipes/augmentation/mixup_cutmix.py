"""MixUp CutMix: trains on mixtures of two images, with the labels mixed in the same proportion.

Symptom: your network overfits, and no flip or shift suits your data. There are few images, or what they show must not
be turned or moved.

Technique: two images of a batch become one, x = λ x₁ + (1 - λ) x₂, with the label y = λ y₁ + (1 - λ) y₂. MixUp blends
all pixels, with λ drawn from Beta(α, α). CutMix pastes a rectangle of the second image into the first, and λ is the
share of the area that is left. Keras: `keras.layers.MixUp(alpha)` and `keras.layers.CutMix(factor)`. A single number
for `factor` draws another α below it for each batch; (1.0, 1.0) keeps it at 1, as in the paper (Keras 3.15).

Change: one-hot labels, and a layer in the input pipeline, where it sees images and labels. Start with an alpha of 0.2:

    mixing = keras.layers.MixUp(0.2)

    def mix(images, labels):
        mixed = mixing({"images": images, "labels": labels})
        return mixed["images"], mixed["labels"]

    dataset = dataset.batch(128).map(mix)  # a tf.data.Dataset of images and one-hot labels

As a layer of the model it mixes the images and leaves the labels as they are, without an error.

Look for: accuracy, log-loss and calibration error, each for itself: a network that is shown mixtures becomes less sure,
which may help or be too much. Training accuracy means little, being measured on mixtures. If test accuracy falls, the
network may be too small or the training too short for the harder task: try a smaller alpha, or more epochs.

Cost: one more operation on each batch, and one hyper-parameter. It acts like label smoothing: with both, take less of
each. Mix after batching, for a batch is where the second image comes from. It has no place in validation.

Source: Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018; Yun et al., "CutMix: Regularization
Strategy to Train Strong Classifiers with Localizable Features", ICCV 2019, whose headline is a ResNet-50 on ImageNet:
an error of 21.40 % instead of 23.68 %.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers
from scipy.special import log_softmax
from tensorflow import data

from callbacks import Comparison

# The layer that mixes, its argument, and the best of GRID (--search).
VARIANTS = {
    "no mixing": (None, None, 0.01),
    "MixUp 0.2": (layers.MixUp, 0.2, 0.01),
    "MixUp 1": (layers.MixUp, 1.0, 0.01),
    "CutMix": (layers.CutMix, (1.0, 1.0), 0.01),
}

# The variant that answers the recipe's question.
HEADLINE = "MixUp 0.2"

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


def batches(images, labels, mixing, batch_size, seed):
    """Return shuffled batches of images and one-hot labels, mixed by a layer unless it is None, for `fit`.

    Without the automatic tuning of `tf.data`: the end of an epoch waits for it, up to as long as the epoch took.
    """

    def mix(images, labels):
        mixed = mixing({"images": images, "labels": labels})  # the technique
        return mixed["images"], mixed["labels"]

    dataset = data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images), seed=seed).batch(batch_size)
    if mixing is not None:
        dataset = dataset.map(mix)
    options = data.Options()
    options.autotune.enabled = False
    return dataset.prefetch(2).with_options(options)


def build_model(image_shape, classes):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    for filters in (12, 24, 48):
        x = layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


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
    search: bool = False,
):
    """Train one network on images as they are, on two kinds of blends, and on images with pasted rectangles.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, (images, labels), classes = load(dataset, data_dir, limit)
    # One-hot, for integers cannot be mixed.
    train, validation = ((x, keras.utils.to_categorical(y, classes)) for x, y in (train, validation))
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        validation=validation,
        test=(images, labels),
        same_start=False,  # it is the seed that makes the starts equal, for runs are added after their training
        evaluate_batch_size=256,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={
            "log-loss": "mean of -log p of the right class, on test images",
            "calibration error": "how far the probability of the predicted class is from the share of right answers",
        },
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (layer, strength, learning_rate), run in loop:
            model = build_model(images.shape[1:], classes)  # before the layer, which would take numbers of the seed
            mixing = None if layer is None else layer(strength)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.CategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            history = model.fit(
                batches(*train, mixing, batch_size, run.seed),
                epochs=epochs,
                validation_data=validation,
                validation_batch_size=256,
                shuffle=False,  # by `fit`, because `batches` does
                verbose=0,
                callbacks=[run] if search else [],
            ).history
            if search:
                continue
            model.run_eagerly = True  # TensorFlow warns of a graph for each model that is used but once
            found = figures(model.predict(images, batch_size=256, verbose=0), labels)
            comparison.add(variant, run.seed, found, history)
            for name in ("log-loss", "calibration error"):
                comparison.add_figure(variant, run.seed, name, found[name])
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
