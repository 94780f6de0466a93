"""Image augmentation: shows another random version of every image in every epoch.

Symptom: you have few images, and the network knows them by heart. More data are not to be had.

Technique: change each image at random in ways that leave its label right: mirror it, move it by a few pixels, blot out
a rectangle. Keras: `keras.layers.RandomFlip`, `RandomTranslation`, `RandomErasing`, and `Pipeline`, which applies them
one after another. Two defaults surprise (Keras 3.15): `RandomErasing(1.0)` draws the probability itself between 0 and
1, so that half of the images stay whole; and its noise reaches 255 unless you give `value_range`.

Change: one layer, and one line in the input pipeline:

    augmentation = layers.Pipeline([
        layers.RandomFlip("horizontal"),
        layers.RandomTranslation(0.1, 0.1, fill_mode="constant", interpolation="nearest"),
        layers.RandomErasing((0.5, 0.5), value_range=(0, 1)),
    ])
    dataset = dataset.map(lambda images, labels: (augmentation(images), labels))

It can also stand in the model, after `keras.Input`: `fit` trains with it, `evaluate` and `predict` leave images as they
are. But `model(x)` augments: say `training=False`. And `RandomTranslation` keeps the whole model from being compiled on
JAX, and by XLA on TensorFlow.

Look for: which of the three helps, and whether all together help more. See whether the gap between training and test
accuracy closes, and which side moves. If test accuracy falls, train longer, or ask whether the change keeps the label:
a mirrored shirt is a shirt, a mirrored 2 is no 2. Compare the time in the pipeline with that in the model: which is
less depends on the machine; accuracy should not.

Cost: time for each image and epoch, and more epochs. In the pipeline it runs on the CPU, beside an accelerator, and can
be made parallel; in the model it takes the accelerator's time. Never augment validation or test images.

Source: erasing: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020. Its figures for Fashion-MNIST, with a
ResNet-20 and other augmentation beside it: an error of 4.02 % with erasing instead of 4.39 %.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers
from tensorflow import data

from callbacks import Comparison

# What is done to the images, whether a layer of the model does it, and the best of GRID (--search). The last variant
# has the rate of the one before, from which it differs in the place alone.
VARIANTS = {
    "none": ([], False, 0.01),
    "flip": (["flip"], False, 0.01),
    "translation": (["translation"], False, 0.01),
    "erasing": (["erasing"], False, 0.01),
    "all": (["flip", "translation", "erasing"], False, 0.01),
    "all, in the model": (["flip", "translation", "erasing"], True, 0.01),
}

# The variant that answers the recipe's question.
HEADLINE = "all"

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


def build_augmentation(kinds):
    """Return a layer that changes images of shape (batch, height, width, channels), values 0 to 1; None for no kind."""
    of_kind = {
        "flip": layers.RandomFlip("horizontal"),
        # By whole pixels, for in between images would be blurred; what comes in at the edge is black.
        "translation": layers.RandomTranslation(0.1, 0.1, fill_mode="constant", interpolation="nearest"),
        # Of every second image. A single number would draw the probability itself, between 0 and it.
        "erasing": layers.RandomErasing((0.5, 0.5), value_range=(0, 1)),
    }
    return layers.Pipeline([of_kind[kind] for kind in kinds]) if kinds else None


def batches(images, labels, augmentation, batch_size, seed):
    """Return shuffled batches of images, changed by a layer unless it is None, and labels, for `fit`.

    Without the automatic tuning of `tf.data`: the end of an epoch waits for it, up to as long as the epoch took.
    """
    dataset = data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images), seed=seed).batch(batch_size)
    if augmentation is not None:
        dataset = dataset.map(lambda images, labels: (augmentation(images), labels))  # the technique
    options = data.Options()
    options.autotune.enabled = False
    return dataset.prefetch(2).with_options(options)


def build_model(image_shape, classes, augmentation=None):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    if augmentation is not None:
        x = augmentation(x)  # the technique
    for filters in (12, 24, 48):
        x = layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 12,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one network on images as they are, on three kinds of changed ones, and on all kinds in two ways.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each variant in the pipeline, on validation data, in place of the
            comparison.
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
        evaluate_batch_size=256,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        save=save,
    ) as comparison:
        in_pipeline = {variant: value for variant, value in VARIANTS.items() if not value[1]}
        loop = comparison.search(in_pipeline, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for _, (kinds, in_model, learning_rate), run in loop:
            augmentation = build_augmentation(kinds)
            model = build_model(train[0].shape[1:], classes, augmentation if in_model else None)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            model.fit(
                batches(*train, None if in_model else augmentation, batch_size, run.seed),
                epochs=epochs,
                validation_data=validation,
                validation_batch_size=256,
                shuffle=False,  # by `fit`, because `batches` does
                verbose=0,
                callbacks=[run],
            )
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
