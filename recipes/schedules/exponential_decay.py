"""Exponential decay: multiplies the learning rate by the same factor after every epoch.

Symptom: late epochs jump up and down, while training loss falls slowly. A lower learning rate calms them, but is too
slow at the start.

Technique: η = η₀ · factor^epoch, the first epoch being epoch 0. The rates of all epochs, without end, add up to
η₀ / (1 - factor): with 0.98 to 50 epochs at the first rate, with 0.9 to 10, with 0.8 to 5. So a factor near 1 changes
little in a short training, and a small one ends it early. Keras: `keras.optimizers.schedules.ExponentialDecay`, a
function of the optimizer's step, or `keras.callbacks.LearningRateScheduler`, a function of the epoch: the same curve
two ways.

Change: the optimizer's learning rate, where `steps_per_epoch` is the number of batches, the last, smaller one included,

    rate = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=steps_per_epoch, decay_rate=0.9, staircase=True)
    optimizer = keras.optimizers.SGD(rate)

or, with a number as the optimizer's rate, a callback:

    model.fit(..., callbacks=[keras.callbacks.LearningRateScheduler(lambda epoch, rate: 0.1 * 0.9**epoch)])

Without `staircase` the rate falls at every step. `lambda epoch, rate: 0.9 * rate` lowers it in the first epoch, too.

Look for: the learning rate, straight lines on a logarithmic axis, the schedule's and the callback's one upon the other.
Their test accuracies, 0.842 both, differ a little from seed to seed, because the rates are rounded differently and
2,500 steps magnify that. The best constant rate, 0.1, gives 0.838; decay by 0.9 and by 0.8, for which a first rate of
0.3 is the best, 0.848 both. At five seeds no difference from the constant rate is measurable, though the interval just
reaches zero: 1.0 ± 1.0 points with 0.8. Decay makes the larger first rate usable: in the search, the validation
accuracies of the last five epochs had a deviation of 0.011 at a constant 0.3, and of 0.002 with 0.9 (three seeds).

Cost: none in time; two hyper-parameters, the first rate and the factor, which go together: a smaller factor wants a
larger first rate. The schedule counts the optimizer's steps, so its length in epochs changes with the batch size, and a
second `fit` goes on where the first ended; the callback begins anew unless `initial_epoch` is given. A rate that is a
schedule cannot be set, so callbacks that set it (LearningRateScheduler, ReduceLROnPlateau) raise an error.

Source: Robbins and Monro, "A Stochastic Approximation Method", Annals of Mathematical Statistics 22, 1951, on why rates
must fall; Senior et al., "An Empirical Study of Learning Rates in Deep Neural Networks for Speech Recognition",
ICASSP 2013, on exponential decay.
"""

import math
from pathlib import Path

import cyclopts
import keras
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison, LearningRateLogger

# The first learning rate, the factor, and what applies it. Validation accuracy over three seeds:
#   rate       0.03     0.1      0.3      1.0
#   constant  0.8423   0.8433   0.8345   0.1240
#   0.98      0.8392   0.8480   0.8463   0.1588
#   0.9                0.8522   0.8533   0.5855
#   0.8                0.8452   0.8530   0.5587
VARIANTS = {
    "constant": (0.1, 1.0, None),
    "0.98, schedule": (0.1, 0.98, "schedule"),
    "0.98, callback": (0.1, 0.98, "callback"),
    "0.9, schedule": (0.3, 0.9, "schedule"),
    "0.8, schedule": (0.3, 0.8, "schedule"),
}

# The variant that answers the recipe's question.
HEADLINE = "0.9, schedule"

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


def build_model(image_shape, classes):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(128, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def decaying_rate(first_rate, factor, way, steps_per_epoch):
    """Return a learning rate for the optimizer, and a list of callbacks, that follow first_rate · factor^epoch."""
    if way == "schedule":
        decay = keras.optimizers.schedules.ExponentialDecay(  # the technique
            first_rate, decay_steps=steps_per_epoch, decay_rate=factor, staircase=True
        )
        return decay, []
    if way == "callback":
        return first_rate, [
            keras.callbacks.LearningRateScheduler(lambda epoch, rate: first_rate * factor**epoch)  # the technique
        ]
    return first_rate, []


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
):
    """Train one network at a constant learning rate and at rates that decay by three factors, one of them two ways.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 64
    steps_per_epoch = math.ceil(len(train[0]) / batch_size)
    with Comparison(
        metric="accuracy",
        train=train,
        validation=validation,
        test=test,
        settings={
            "dataset": dataset,
            "limit": limit,
            "epochs": epochs,
            "batch size": batch_size,
            "first rate": "best of 0.03, 0.1, 0.3, 1 on validation data",
        },
        save=save,
    ) as comparison:
        for variant, (first_rate, factor, way), run in comparison.runs(VARIANTS, seeds):
            model = build_model(train[0].shape[1:], classes)
            rate, callbacks = decaying_rate(first_rate, factor, way, steps_per_epoch)
            model.compile(
                optimizer=keras.optimizers.SGD(rate),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
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
            comparison.add_figure(variant, run.seed, "first rate", rates[0])
            comparison.add_figure(variant, run.seed, "last rate", rates[-1])
            comparison.add_signal(variant, run.seed, "learning rate", rates, by="epoch", scale="log")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
