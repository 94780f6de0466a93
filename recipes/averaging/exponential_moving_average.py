"""Exponential moving average: keeps a running average of the weights, and evaluates that in their place.

Symptom: validation figures leap up and down from epoch to epoch. At a constant learning rate, training ends wherever
the last step has led.

Technique: after every step, a ← m · a + (1 - m) · w. The average a looks back over some 1 / (1 - m) steps, so the noise
of single steps cancels, while training goes on with w as before. Keras: `use_ema=True` in any optimizer. Its average
begins with the weights after the first step, not with zeros: it needs no correction as Adam's moments do, but that one
step keeps the share mᵗ⁻¹ after t steps. Choose m so that training lasts for many times 1 / (1 - m) steps.

Change: two arguments of the optimizer, and one callback:

    optimizer = keras.optimizers.Adam(0.001, use_ema=True, ema_momentum=0.99)
    model.fit(..., callbacks=[keras.callbacks.SwapEMAWeights()])

`fit` ends with the average in the model either way; the callback also puts it there for each validation. So that
`ModelCheckpoint` or `EarlyStopping(restore_best_weights=True)`, later in the list, keeps averages, too, it needs
`swap_on_epoch=True`; but then, in Keras 3.15, a training that is stopped before its last epoch leaves the trained
weights in the model, not the average, unless such a callback restores what it has kept.

Look for: at the constant rate that is best without averaging, 0.001, m = 0.99 gains 1.4 ± 0.9 points of test accuracy,
0.9 gains 0.9 ± 0.8; 0.999 is not measurably better (1.0 ± 1.0). An epoch has 250 steps, so with 0.999 the first one
keeps 78 % after an epoch, and validation accuracy lies under that of the trained weights until epoch 4. The average is
no better than a rate that decays to 0 over the same epochs, from its own best rate, 0.003: that gains 1.6 ± 0.5. What
an average offers is that its gain is there at any time, without a schedule that must know the last step: after five
epochs validation accuracy is 0.856 with m = 0.99, 0.838 with the decay, 0.830 with the constant rate.

Cost: a copy of the weights; too little time to see in an epoch here; one hyper-parameter, m. Batch normalisation's
moving statistics are not averaged, for no optimizer trains them: they belong to the trained weights, not to the
average. Renew them before use by calling the model on training batches with `training=True` until the old ones are
forgotten (with a momentum of 0.9, 50 batches leave half a percent); this network has none. (See
stochastic_weight_averaging.py for what old statistics cost.) `ema_overwrite_frequency` is another method: it puts the
average into the training, every so many steps.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", SIAM Journal on Control and
Optimization 30, 1992, for the equal average; Keras API, optimizers, `use_ema`.
"""

import math
from pathlib import Path

import cyclopts
import keras
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The learning rate, whether it decays to 0, and the optimizer's arguments for averaging. Validation accuracy over three
# seeds:
#   rate           0.0003  0.001   0.003   0.01
#   constant rate  0.8467  0.8492  0.8390  0.8100
#   EMA 0.9        0.8518  0.8547  0.8458  0.8337
#   EMA 0.99       0.8597  0.8663  0.8602  0.8420
#   EMA 0.999      0.8513  0.8628  0.8573  0.8435
#   cosine decay   0.8513  0.8643  0.8650  0.8540
VARIANTS = {
    "constant rate": (0.001, False, {}),
    "EMA 0.9": (0.001, False, {"use_ema": True, "ema_momentum": 0.9}),
    "EMA 0.99": (0.001, False, {"use_ema": True, "ema_momentum": 0.99}),
    "EMA 0.999": (0.001, False, {"use_ema": True, "ema_momentum": 0.999}),
    "cosine decay": (0.003, True, {}),
}

# The variant that answers the recipe's question.
HEADLINE = "EMA 0.99"

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


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    batch_size: PositiveInt = 32,
):
    """Train one network at a constant rate, with averages of its weights, and at a decaying rate, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        batch_size: examples in a training step; the fewer, the noisier are the weights.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    steps = epochs * math.ceil(len(train[0]) / batch_size)
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
            "learning rate": "0.001, decaying from 0.003",
        },
        save=save,
    ) as comparison:
        for _, (learning_rate, decays, averaging), run in comparison.runs(VARIANTS, seeds):
            model = build_model(train[0].shape[1:], classes)
            rate = keras.optimizers.schedules.CosineDecay(learning_rate, steps) if decays else learning_rate
            model.compile(
                optimizer=keras.optimizers.Adam(rate, **averaging),  # the technique
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
            )
            # So that validation figures are those of the averaged weights, too.
            swap = [keras.callbacks.SwapEMAWeights()] if averaging else []
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[*swap, run],
            )
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
