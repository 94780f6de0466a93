"""Reduce on plateau: lowers the learning rate when the validation loss stops falling.

Symptom: validation loss stands still, at a rate that was good before. Or it jumps about there, and you do not know
beforehand when that will be.

Technique: an epoch improves if its validation loss is below the best one so far by more than `min_delta`. After
`patience` epochs in a row without an improvement, η ← η · factor, and the count begins anew; the best loss stays.
Keras: `keras.callbacks.ReduceLROnPlateau`, by default with factor 0.1, patience 10 and an absolute `min_delta` of
0.0001, which suits neither tiny losses nor huge ones.

Change: one callback:

    model.fit(
        ..., validation_data=validation, callbacks=[keras.callbacks.ReduceLROnPlateau(factor=0.5, patience=3)]
    )

Look for: the learning rate, and whether the validation loss falls where the rate does. Count the reductions: with a
long patience a short training may end before the rate is low. The rival is a cosine to zero, which must know the length
of the training beforehand, and needs no validation data: if you know the length, compare the two.

Cost: a validation pass an epoch; three hyper-parameters. The validation data choose the rates, so their figures are
slightly too good; never monitor test data. Let `EarlyStopping` have a longer patience: a lower rate does not bring back
the weights of the best epoch. In Keras a patience of 0 acts as 1, and `cooldown=n` ignores n - 1 epochs. Without
validation data there is a warning each epoch, and the rate stays. With a schedule object as the optimizer's rate Keras
raises an error, but only at the first reduction, after hours perhaps.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, who divide the rate by 10 when the error
plateaus; the documentation of `keras.callbacks.ReduceLROnPlateau`.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison, LearningRateLogger

# What lowers the rate (nothing, the arguments of ReduceLROnPlateau, or a cosine to zero over the whole training), and
# the first rate, the best of GRID (--search).
VARIANTS = {
    "constant": ("constant", 0.3),
    "half, patience 1": ({"factor": 0.5, "patience": 1}, 0.3),
    "half, patience 3": ({"factor": 0.5, "patience": 3}, 0.3),
    "tenth, patience 3": ({"factor": 0.1, "patience": 3}, 0.3),
    "cosine": ("cosine", 0.3),
}

# The variant that answers the recipe's question.
HEADLINE = "half, patience 3"

# First learning rates.
GRID = (0.01, 0.03, 0.1, 0.3, 1.0)

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
        x = layers.Dense(128, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


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
    """Train one network at a constant learning rate, with three ways to lower it on a plateau, and along a cosine.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best first rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 64
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={"reductions": "epochs at a lower rate than the epoch before"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (way, rate), run in loop:
            callbacks = []
            if way == "cosine":
                rate = keras.optimizers.schedules.CosineDecay(rate, epochs * steps)
            elif way != "constant":
                # It looks at the validation loss, never at test data.
                callbacks = [keras.callbacks.ReduceLROnPlateau("val_loss", **way)]  # the technique
            model = build_model(train[0].shape[1:], classes)
            model.compile(
                optimizer=keras.optimizers.SGD(rate),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            history = model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[*callbacks, LearningRateLogger(), run],
            ).history
            rates = history["learning_rate"]
            comparison.add_figure(variant, run.seed, "reductions", np.count_nonzero(np.diff(rates)))
            comparison.add_signal(variant, run.seed, "learning rate", rates, by="epoch")
            comparison.add_signal(variant, run.seed, "validation loss", history["val_loss"], by="epoch")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
