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

Look for: the loss against the rate: flat, then falling, then leaping about. The suggestion (the column `learning rate`)
lies in the fall, before the minimum. Compare its test accuracy with that of Keras's default rate, and with the best of
the grid, which takes a whole training for each rate. The suggestion is an order of magnitude: see how flat accuracy is
around the best rate. Rates that differ only late in training, a hundred steps cannot tell apart.

Cost: a hundred steps, less than two epochs here, and no validation data. The suggestion holds for its batch size,
optimizer, momentum and initialisation, and for the start of training; a rate that falls to zero, as here, may begin a
little higher. During the test the optimizer needs a number as its rate, and steps are executed one by one; a schedule
comes afterwards.

Source: Smith, "Cyclical Learning Rates for Training Neural Networks", WACV 2017 (arXiv:1506.01186), with a linear rise;
the exponential one is that of the library fastai.
"""

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


def compile_model(model, learning_rate, steps_per_execution=1):
    """Compile a classifier for gradient descent at a learning rate: a number or a schedule object."""
    model.compile(
        optimizer=keras.optimizers.SGD(learning_rate),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=steps_per_execution,
    )


def range_test(model, images, labels, batch_size):
    """Return the range test of a compiled model, which is afterwards as it was before."""
    finder = LearningRateRangeTest(1e-4, 10.0, steps=101)  # the technique
    epochs = -(-finder.steps // -(-len(images) // batch_size))
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
    """Train one network from each learning rate of a grid, and from the one that a range test suggests.

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
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # the seed makes equal starts, that of the range test's own model included
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={"learning rate": "from which training falls to zero"},
        save=save,
    ) as comparison:
        for variant, learning_rate, run in comparison.runs(VARIANTS, seeds):
            if learning_rate is None:
                # A comparison takes new models only, so the test has one of its own, from the same start.
                model = build_model(train[0].shape[1:], classes)
                compile_model(model, 0.01)
                finder = range_test(model, *train, batch_size)
                learning_rate = finder.suggestion
                # Capped, for at the end of the test the loss leaps.
                losses = np.minimum(finder.smoothed_losses, 1.5 * finder.smoothed_losses[0])
                half = finder.window // 2  # each mean of several losses belongs to the rate in its middle
                rates = finder.learning_rates[half : half + len(losses)]
                comparison.add_signal(
                    variant, run.seed, "loss in the range test", losses, by="learning rate", at=rates, at_scale="log"
                )
                keras.utils.set_random_seed(run.seed)  # the first model has drawn random numbers
            model = build_model(train[0].shape[1:], classes)
            # Ends at a rate of zero, which leaves little noise between seeds.
            compile_model(
                model, keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps), min(steps, STEPS_PER_CALL)
            )
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
