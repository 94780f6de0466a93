"""Early stopping: ends training when validation loss stops improving, and keeps the weights of its best epoch.

Symptom: validation loss falls at first, then climbs. Training loss goes on falling, and the number of epochs was
guessed.

Technique: after every epoch the validation loss is compared with the lowest so far. Training ends once it has not
fallen for `patience` epochs in a row, and the weights of the epoch with the lowest one are put back. Keras:
`keras.callbacks.EarlyStopping`, which monitors "val_loss" by default. Three things to know: without
`restore_best_weights=True` the model keeps the weights of `patience` epochs after the best; with it they come back
when training ends even if it was never stopped (but not when `fit` raises); patience 0 and 1 do the same.

Change: one callback. A callback that evaluates or saves the final weights comes after it.

    stopping = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
    model.fit(..., validation_data=validation, callbacks=[stopping])

Look for: at a rate of 0.001 all 30 epochs give a test loss of 0.600, a patience of 3 gives 0.446 after 13 epochs
(median), 0.154 ± 0.066 less. The best fixed number, 8, gives 0.450, but had to be found by full runs first. A patience
of 5 finds the same weights as one of 3, two epochs later; a patience of 1 takes one bad epoch for the end, in one run
after 3 epochs, and gives 0.454. With the rate that is best for all 30 epochs, 0.0001, the network is not yet overfitted
when they end, and the test loss is 0.441: no difference from early stopping is measurable at five seeds. So it saves
epochs, and the loss of having chosen their number badly; it does not beat a well chosen number. Test accuracy suffers
little from overfitting here: 0.843 after all epochs, 0.847 with a patience of 3, both at 0.001.

Cost: a copy of the weights, and validation data that nothing is learned from; one hyper-parameter, the patience. The
lowest validation loss was chosen for being low, so it is no estimate of the loss on new data: the test data, used once,
gives that. Stopping on the test data would spoil it in the same way. A schedule that lowers the learning rate over a
given number of epochs is cut off. Validation loss and validation accuracy need not be best at the same epoch.

Source: Prechelt, "Early Stopping - But When?", in: Neural Networks: Tricks of the Trade, 1998; Keras documentation,
`EarlyStopping`.
"""

from pathlib import Path

import cyclopts
import keras
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# When training ends, and the learning rate of the one variant that has its own. Validation loss over three seeds:
#   rate             0.0001  0.0003  0.001   0.003
#   all 30 epochs    0.4184  0.4680  0.5288  0.6883
#   best fixed       0.4184  0.4292  0.4068  0.4302   (after 30, 16, 8 and 6 epochs)
#   patience 1       0.4184  0.4332  0.4040  0.4379
#   patience 3 or 5  0.4184  0.4170  0.4025  0.4235
# 0.0001 is the best for all 30 epochs, 0.001 where training ends earlier.
VARIANTS = {
    "all, rate 0.0001": {"learning_rate": 0.0001},
    "all, rate 0.001": {},
    "first 8 epochs": {"epochs": 8},
    "patience 1": {"patience": 1},
    "patience 3": {"patience": 3},
    "patience 5": {"patience": 5},
}

# The variant that answers the recipe's question.
HEADLINE = "patience 3"

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
):
    """Train one network for all epochs, for the best fixed number of them, and with early stopping at three patiences.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data, at most.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    with Comparison(
        metric="loss",
        train=train,
        validation=validation,
        test=test,
        settings={
            "dataset": dataset,
            "limit": limit,
            "epochs": f"at most {epochs}",
            "learning rate": "0.001 unless named",
        },
        save=save,
    ) as comparison:
        for variant, options, run in comparison.runs(VARIANTS, seeds):
            model = build_model(train[0].shape[1:], classes)
            model.compile(
                optimizer=keras.optimizers.Adam(options.get("learning_rate", 0.001)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
            )
            stopping = []
            if "patience" in options:
                # The technique: it looks at the validation loss, never at test data.
                patience = options["patience"]
                stopping = [keras.callbacks.EarlyStopping(patience=patience, restore_best_weights=True)]
            history = model.fit(
                *train,
                batch_size=128,
                epochs=min(epochs, options.get("epochs", epochs)),
                validation_data=validation,
                verbose=0,
                callbacks=[*stopping, run],
            )
            spent = len(history.epoch)
            kept = stopping[0].best_epoch + 1 if stopping else spent
            comparison.add_figure(variant, run.seed, "epochs spent", spent)
            comparison.add_figure(variant, run.seed, "weights of epoch", kept)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
