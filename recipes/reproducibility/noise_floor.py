"""Noise floor: trains one network under six names, to see how often equal things seem to differ.

Symptom: accuracy rose by half a point: was it the line that you changed, or luck?

Technique: an A/A test. The same training has six names, each with seeds of its own, and goes through the same table as
any technique. What differs there is noise, and a verdict of "better" or "worse" is a mistake of the rule. The rule
takes the differences d of n pairs of seeds, and their 95 % interval mean(d) ± t · s(d) / √n, with t for the number of
differences in the table (Bonferroni): at most one table in twenty should have a mistake.

Change: before you believe a difference, give your own training another seed, and a name:

    for name, seed in {"A": 0, "B": 1}.items():
        keras.utils.set_random_seed(seed)
        train_and_evaluate(name)

Look for: the differences between A and the other names, which are your floor: with few seeds, no smaller gain means
anything. "A again" has A's own seed and must be equal to the bit; if it is not, something is drawn outside of the seed.
Then see how far accuracy spreads over the even test images, and over the odd ones. Networks that are really better are
better on both; what one half shows and the other does not is the luck of the test set, and grows as that gets smaller.

Cost: as many trainings as you have names, once for a project. A floor holds for its own network, data and number of
epochs. Seeds vary the start, the order and all that is drawn, but not the test images: with others, all differ.

Source: Jordan, "Calibrated Chaos: Variance Between Runs of Neural Network Training is Harmless and Inevitable", ICLR
2024, who finds that the spread between seeds is for the most part due to the finite test set.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The number of the seed among those of all names.
VARIANTS = {"A": 0, "A again": 0, "B": 1, "C": 2, "D": 3, "E": 4, "F": 5}

# The variant that answers the recipe's question.
HEADLINE = "B"

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
    x = layers.Dense(64, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 4,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
):
    """Train one network under six names, with one seed each, and under the first name again, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of repetitions, each with six new seeds; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
    """
    train, validation, (images, labels), classes = load(dataset, data_dir, limit)
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    names = 1 + max(VARIANTS.values())
    with Comparison(
        metric="accuracy",
        margin=0.01,
        validation=validation,
        test=(images, labels),
        same_start=False,  # the start is a part of the noise
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={"even images": "accuracy on every second test image", "odd images": "accuracy on the others"},
        save=save,
    ) as comparison:
        for variant, number, run in comparison.runs(VARIANTS, seeds):
            keras.utils.set_random_seed(names * run.seed + number)  # the technique
            model = build_model(images.shape[1:], classes)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.003, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            curves = model.fit(
                *train, batch_size=batch_size, epochs=epochs, validation_data=validation, verbose=0
            ).history
            model.run_eagerly = True  # TensorFlow warns of a graph for each model that is used but once
            is_right = model.predict(images, batch_size=256, verbose=0).argmax(axis=1) == labels
            comparison.add(variant, run.seed, {"accuracy": np.mean(is_right)}, curves)
            comparison.add_figure(variant, run.seed, "even images", np.mean(is_right[::2]))
            comparison.add_figure(variant, run.seed, "odd images", np.mean(is_right[1::2]))
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
