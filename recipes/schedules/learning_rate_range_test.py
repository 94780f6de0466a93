"""Learning rate range test: raises the learning rate over one short run, and reads a good one from the loss.

Symptom: you do not know which learning rate suits a new network. A grid of whole trainings is too expensive.

Technique: the rate rises exponentially, here from 0.0001 to 10 over 101 steps, twenty of them a power of ten. The loss
of each batch stays flat at first, falls, and rises again when steps become too long. The suggestion is halfway, on the
logarithmic axis, between the rate of the steepest descent of the smoothed loss and that of its minimum, which is too
near to instability itself. The loss must be that of the single batch, and smoothed without a lag: the running mean that
Keras logs hides the rise, and so suggests rates that are too high. Keras has no range test; here it is
`callbacks.LearningRateRangeTest`, to be copied. It looks at training data only.

Change: one short fit before the training, which is undone when it ends:

    finder = LearningRateRangeTest(1e-4, 10.0, steps=101)
    model.fit(*train, batch_size=128, epochs=2, callbacks=[finder])
    model.optimizer.learning_rate = finder.suggestion

Look for: the smoothed loss. It is flat at first, lowest around step 65, a rate of 0.16, and leaps about above that (it
is drawn up to 1.5 times its first value). The tests of five seeds suggest 0.084 to 0.119. Trained with these, test
accuracy is 0.822, as it is with the best two rates of the grid: 0.822 with 0.1 and 0.825 with 0.3. Keras's default of
0.01 is 6.8 ± 2.6 points below after ten epochs, and at 1 the network learns nothing. The suggestion is an order of
magnitude: that 0.3 does as well as 0.1 in the end is not to be seen in the first hundred steps.

Cost: a hundred steps, less than two epochs here, and no validation data. The suggestion holds for its batch size,
optimizer, momentum and initialisation, and for the start of training: what only shows later, such as the best rate for
a long training, it cannot see. The optimizer needs a number as its rate; a schedule comes after the test.

Source: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017 (arXiv:1506.01186), with a linear rise;
the exponential one is that of the library fastai.
"""

import math
from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison, LearningRateRangeTest

# The learning rate; None is the one that the range test suggests. The first is Keras's default.
VARIANTS = {
    "rate 0.01": 0.01,
    "rate 0.03": 0.03,
    "rate 0.1": 0.1,
    "rate 0.3": 0.3,
    "rate 1": 1.0,
    "range test": None,
}

# The variant that answers the recipe's question.
HEADLINE = "range test"

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


def build_model(image_shape, classes, learning_rate):
    """Return a compiled classifier of images of `image_shape` (height, width, channels)."""
    inputs = keras.Input(image_shape)
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(128, activation="relu")(x)
    model = keras.Model(inputs, layers.Dense(classes)(x))
    model.compile(
        optimizer=keras.optimizers.SGD(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def range_test(model, images, labels, batch_size):
    """Return the range test of a compiled model, which is afterwards as it was before."""
    finder = LearningRateRangeTest(1e-4, 10.0, steps=101)  # the technique
    epochs = math.ceil(finder.steps / math.ceil(len(images) / batch_size))
    model.fit(images, labels, batch_size=batch_size, epochs=epochs, verbose=0, callbacks=[finder])
    return finder


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
):
    """Train one network at each learning rate of a grid, and at the one that a range test suggests.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 128
    with Comparison(
        metric="accuracy",
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # the seed makes equal starts, that of the range test's own model included
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "batch size": batch_size},
        save=save,
    ) as comparison:
        for variant, learning_rate, run in comparison.runs(VARIANTS, seeds):
            if learning_rate is None:
                # A comparison takes new models only, so the test has one of its own, from the same start.
                finder = range_test(build_model(train[0].shape[1:], classes, 0.01), *train, batch_size)
                learning_rate = finder.suggestion
                # Padded, so that the place of each mean of several losses is that of the step in its middle.
                shown = np.minimum(finder.smoothed_losses, 1.5 * finder.smoothed_losses[0])
                losses = [math.nan] * (finder.window // 2) + list(shown)
                by = "step of the test"
                comparison.add_signal(variant, run.seed, "smoothed loss (capped)", losses, by=by)
                comparison.add_signal(variant, run.seed, "learning rate", finder.learning_rates, by=by, scale="log")
                keras.utils.set_random_seed(run.seed)  # the test has drawn random numbers
            model = build_model(train[0].shape[1:], classes, learning_rate)
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            )
            comparison.add_figure(variant, run.seed, "learning rate", learning_rate)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
