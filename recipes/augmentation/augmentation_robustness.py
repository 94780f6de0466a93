"""Augmentation robustness: trains on randomly changed images, so that the network stands changes it was not shown.

Symptom: accuracy drops as soon as images are noisy, blurred or pale. On clean test images it was good.

Technique: RandAugment applies a few operations, drawn at random from a list (shear, shift, rotate, posterise, …), one
after another. AugMix applies several short chains of them, averages the results with random weights, and mixes that
with the clean image, which keeps the images natural. Both leave labels as they are. Keras: `layers.RandAugment`,
`layers.AugMix`.

Change: let a data set call the layer on the training images, at the beginning of each epoch, and not a graph:

    augment = layers.AugMix(value_range=(0, 1), factor=0.1, all_ops=False)
    images = augment(images, training=True)  # in `on_epoch_begin` of a keras.utils.PyDataset

Three traps. Say `value_range`: the default is (0, 255), and ruins images of 0 to 1. In Keras 3.15, AugMix draws its
operations by Python's `random`: within a model or `Dataset.map` it draws them once, and all of the training has the
same. And `factor` is a share of whatever the operation has: of a full turn, of the height, of the bits that are kept,
which is fewer bits for a small one. By default RandAugment turns images by up to half a turn, all to the same side.

Look for: the accuracy on corrupted images, of noise, blur and low contrast at five severities, and what it costs on
clean ones. Compare with plain flips and shifts: does it take more than usual augmentation? See which corruption gains.
RandAugment has a change of contrast among its operations; AugMix leaves out what resembles the test (`all_ops=False`).

Cost: the time of the operations, often more than that of training, and a strength to choose. Augmented images are
harder, and want more epochs. Both layers draw the operations once for all images of a call: call them on small parts.
Keras's AugMix lacks the consistency loss of the paper.

Source: Cubuk et al., "RandAugment", NeurIPS 2020; Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve
Robustness and Uncertainty", ICLR 2020; Hendrycks and Dietterich, ICLR 2019, on corruptions at five severities.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers
from scipy.ndimage import gaussian_filter

from callbacks import Comparison

# The augmentation, and the best rate of GRID (--search), on clean validation images, for you have no others.
VARIANTS = {
    "no augmentation": ("none", 0.01),
    "flips and shifts": ("flips and shifts", 0.03),
    "RandAugment": ("RandAugment", 0.01),
    "AugMix": ("AugMix", 0.01),
}

# The variant that answers the recipe's question.
HEADLINE = "AugMix"

# Learning rates of Adam.
GRID = (0.001, 0.003, 0.01, 0.03)

CORRUPTIONS = ("noise", "blur", "contrast")
SEVERITIES = 5

# Images that share the operations drawn for them: fewer would be better, and slower.
PART = 1000

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
    for filters in (8, 16):
        x = layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def new_augmentation(name):
    """Return a layer that augments images of values 0 to 1 when it is called with `training=True`."""
    # A tenth: turns of up to 36 degrees, shifts of up to a tenth of the height.
    operations = {
        "none": lambda: [layers.Identity()],
        "flips and shifts": lambda: [layers.RandomFlip("horizontal"), layers.RandomTranslation(0.1, 0.1)],
        "RandAugment": lambda: [layers.RandAugment(value_range=(0, 1), factor=0.1)],
        "AugMix": lambda: [layers.AugMix(value_range=(0, 1), factor=0.1, all_ops=False)],
    }
    return layers.Pipeline(operations[name]())


class Augmented(keras.utils.PyDataset):
    """Batches of (images, labels), shuffled and augmented anew at the beginning of each epoch."""

    def __init__(self, images, labels, augmentation, batch_size):
        super().__init__()
        self.images, self.labels = self.clean = images, labels
        self.augmentation = augmentation
        self.batch_size = batch_size

    def __len__(self):
        return -(-len(self.labels) // self.batch_size)

    def __getitem__(self, index):
        batch = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return self.images[batch], self.labels[batch]

    def on_epoch_begin(self):
        order = np.random.permutation(len(self.labels))
        images, self.labels = (array[order] for array in self.clean)
        parts = [images[start : start + PART] for start in range(0, len(images), PART)]
        # Called outside of any graph, where AugMix would draw its operations once only.
        augmented = [self.augmentation(part, training=True) for part in parts]  # the technique
        self.images = np.concatenate([keras.ops.convert_to_numpy(part) for part in augmented])


def corrupt(images, kind, severity, generator):
    """Return images of values 0 to 1 with noise, blur or less contrast, at a severity of 0, which is none, to 5."""
    if kind == "noise":
        noise = generator.normal(scale=0.06 * severity, size=images.shape)
        return np.clip(images + noise, 0, 1).astype("float32")
    if kind == "blur":
        return gaussian_filter(images, (0, 0.4 * severity, 0.4 * severity, 0))  # in pixels
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return images + 0.18 * severity * (mean - images)


def corrupt_all(images):
    """Return the images under each of CORRUPTIONS, in an array with one axis more; severities take turns from 1 on."""
    generator = np.random.default_rng(0)  # the same for all variants and seeds
    corrupted = np.empty((len(CORRUPTIONS), *images.shape), "float32")
    for kind, into in zip(CORRUPTIONS, corrupted, strict=True):
        for severity in range(1, SEVERITIES + 1):
            part = slice(severity - 1, None, SEVERITIES)
            into[part] = corrupt(images[part], kind, severity, generator)
    return corrupted


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 8,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one network on clean and on augmented images, and compare them on images with noise, blur or low contrast.

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
    corrupted = corrupt_all(images)
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        validation=validation,
        test=(corrupted.reshape(-1, *images.shape[1:]), np.tile(labels, len(CORRUPTIONS))),
        settings={
            "dataset": dataset,
            "limit": limit,
            "epochs": epochs,
            "test images": f"{', '.join(CORRUPTIONS)}, severity 1 to {SEVERITIES}",
        },
        columns={"clean": "accuracy on the test images as they are"}
        | {kind: f"accuracy on the test images with {kind}" for kind in ("noise", "blur")}
        | {"contrast": "accuracy on the test images with low contrast"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (augmentation, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            model.fit(
                Augmented(*train, new_augmentation(augmentation), batch_size),
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            )
            if search:
                continue
            model.run_eagerly = True  # TensorFlow warns of a graph for each model that is used but once
            for name, pictures in zip(("clean", *CORRUPTIONS), (images, *corrupted), strict=True):
                predicted = model.predict(pictures, batch_size=1000, verbose=0).argmax(axis=-1)
                comparison.add_figure(variant, run.seed, name, np.mean(predicted == labels))
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
