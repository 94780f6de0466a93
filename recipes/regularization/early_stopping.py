"""Early stopping: ends training when validation loss stops improving, and keeps the weights of its best epoch.

Symptom: validation loss falls at first, then climbs. Training loss goes on falling, and you have guessed the number
of epochs.

Technique: after every epoch the validation loss is compared with the lowest so far. Once it has not improved for
`patience` epochs in a row, training ends, and the weights of the best epoch come back. Keras:
`keras.callbacks.EarlyStopping`, which monitors "val_loss" unless you say otherwise. Without `restore_best_weights=True`
you are left with the weights of `patience` epochs after the best one. With it they come back even if training was never
stopped (but not if `fit` raises).

Change: one callback, ahead of those that evaluate or save the final weights. Start with a patience of 3 to 5:

    stopping = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
    model.fit(..., validation_data=validation, callbacks=[stopping])

Look for: the validation curve of all epochs, and where along it the others stop. Compare the test loss with that of all
epochs at the same rate, and the epochs spent. A small patience takes an unlucky epoch for the end; a larger one costs
epochs. A rate that falls to zero over all epochs is the rival that needs no stopping, but its peak and the number of
epochs have to suit each other: whether you know them beforehand decides between the two.

Cost: a copy of the weights, validation data that nothing is learned from, and one hyper-parameter, the patience. The
lowest validation loss was picked for being low, so it flatters: report the loss on test data, used once, and never stop
on them. Do not combine it with a schedule that falls to zero, which a stop would cut off. The epoch of the lowest loss
need not be that of the highest accuracy: monitor what you want.

Source: Prechelt, "Early Stopping - But When?", in: Neural Networks: Tricks of the Trade, 1998; Keras documentation,
`EarlyStopping`.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The patience, whether the learning rate falls to zero, and the rate: the best of GRID (--search). Patience 1, whose
# search finds another, has that of all epochs too, so that nothing but the stop differs.
VARIANTS = {
    "all epochs": (None, False, 0.0003),
    "patience 1": (1, False, 0.0003),
    "patience 3": (3, False, 0.0003),
    "patience 5": (5, False, 0.0003),
    "cosine, all epochs": (None, True, 0.0003),
}

# The variant that answers the recipe's question.
HEADLINE = "patience 3"

# Learning rates of Adam.
GRID = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01)

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


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 30,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one network for all epochs, with early stopping at three patiences, and at a rate that falls to zero.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data, at most.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="loss",
        margin=0.02,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": f"at most {epochs}"},
        columns={"epochs spent": "epochs trained, those after the best one included"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (patience, falls_to_zero, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes)
            # Constant where training may be stopped, for a stop would cut the schedule off.
            cosine = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
            model.compile(
                optimizer=keras.optimizers.Adam(cosine if falls_to_zero else learning_rate),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            stopping = []
            if patience is not None:
                # The technique: it looks at the validation loss, never at test data.
                stopping = [keras.callbacks.EarlyStopping(patience=patience, restore_best_weights=True)]
            history = model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[*stopping, run],
            )
            comparison.add_figure(variant, run.seed, "epochs spent", len(history.epoch))
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
