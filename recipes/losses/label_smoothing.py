"""Label smoothing: trains towards targets that are not quite 0 and 1, so that full confidence is never asked for.

Symptom: your network is certain of its answers, even of the wrong ones. Training loss goes to zero, and the loss on new
data climbs.

Technique: with K classes, the target of the right class becomes 1 - ε + ε / K, and that of every other class ε / K. The
loss is then (1 - ε) · CE + ε · mean of -log p over all classes. It is lowest where the probabilities equal these
targets: growing logits no longer pay. Keras: `label_smoothing` of `keras.losses.CategoricalCrossentropy`, which wants
one-hot labels. `SparseCategoricalCrossentropy` has no such argument (Keras 3.15).

Change: one-hot labels, and one argument of the loss. Start with 0.1:

    labels = keras.utils.to_categorical(labels, classes)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)

Look for: log-loss and calibration error on test images, and whether one ε is best for both. Smoothing makes every
answer less sure, the right ones as well: with a large ε the network may end up less sure than it is right, and both
figures rise again. Look at accuracy apart from them. Do not compare the losses that Keras logs, of training or of
validation: they contain the smoothing, and cannot reach zero. Add the plain cross-entropy as a metric, as here.

Cost: no time, and one hyper-parameter. A network trained so is said to be a worse teacher for distillation. MixUp and
CutMix soften the labels already (mixup_cutmix.py): with both, take less of each. If all you want is the right
confidence of a network that you have already, temperature_scaling.py needs no training.

Source: Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", CVPR 2016. Its headline, on
ImageNet: 0.2 % less error, top-1 and top-5. Müller et al., "When Does Label Smoothing Help?", NeurIPS 2019; calibration
error: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers
from scipy.special import log_softmax

from callbacks import Comparison

# ε, and the best of GRID (--search).
VARIANTS = {
    "no smoothing": (0.0, 0.001),
    "smoothing 0.05": (0.05, 0.003),
    "smoothing 0.1": (0.1, 0.003),
    "smoothing 0.2": (0.2, 0.003),
}

# The variant that answers the recipe's question.
HEADLINE = "smoothing 0.1"

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


def build_model(image_shape, classes):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(256, activation="relu")(x)
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
    """Train one network without label smoothing and with three amounts of it, and compare their test log-loss.

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
    # One-hot, as the loss with smoothing wants them.
    train, validation = ((x, keras.utils.to_categorical(y, classes)) for x, y in (train, validation))
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="log-loss",
        margin=0.02,
        validation=validation,
        test=(images, labels),
        same_start=False,  # it is the seed that makes the starts equal, for runs are added after their training
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={
            "accuracy": "share of the test images that are classified right",
            "calibration error": "how far the probability of the predicted class is from the share of right answers",
        },
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (smoothing, learning_rate), run in loop:
            model = build_model(images.shape[1:], classes)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=smoothing),  # the technique
                # Without smoothing, so that variants can be compared.
                metrics=[keras.metrics.CategoricalCrossentropy(from_logits=True, name="log-loss")],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            history = model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run] if search else [],
            ).history
            if search:
                continue
            model.run_eagerly = True  # TensorFlow warns of a graph for each model that is used but once
            found = figures(model.predict(images, batch_size=256, verbose=0), labels)
            comparison.add(variant, run.seed, found, history)
            for name in ("accuracy", "calibration error"):
                comparison.add_figure(variant, run.seed, name, found[name])
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
