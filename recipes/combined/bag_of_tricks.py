"""Bag of tricks: combines what earns its place, for the tutorials' accuracy in a fifth of the time, or a higher one.

Symptom: you know the techniques one by one, but not what they bring together. The network of two convolutions that
tutorials teach trains for minutes, and you want more from them.

Technique: few pixels and many channels (a 5 × 5 convolution of stride 2, pooling before the others, the maximum over
all pixels at the end); batch normalisation; SGD with Nesterov momentum at a high rate, which rises over a fifth of the
steps and falls along a cosine to zero; label smoothing by 0.1; half of the images mirrored; 32 steps in one call. The
longer training has two more: each image is mirrored in every other epoch instead of at random, and the first
convolution is not learned: it whitens patches. With "2 views" the logits are the mean of those of an image and of its
mirror image. All layers are Keras built-ins.

Change: the network, the optimizer, and `compile`, where `labels` are one-hot and `steps` is epochs times batches:

    x = layers.Conv2D(filters, 3, padding="same", use_bias=False)(layers.MaxPooling2D()(x))
    x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=steps - steps // 5, warmup_target=1.0, warmup_steps=steps // 5
    )
    optimizer = keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.1)
    model.compile(optimizer, loss, metrics=["accuracy"], steps_per_execution=32)

Look for: the seconds beside the differences, in a fifth of the tutorial's time and in about the same. "tutorial,
cosine" tells how much is the falling rate alone. `--ablate` leaves out one trick after the other, at the rate that is
best with all: see which of them carry the whole, and which are lost in the noise. Some are there so that the rate can
be as high as that. On other images another one may carry it.

Cost: the rate and the smoothing as hyper-parameters; the length of the training, which must be known beforehand; twice
the time of prediction for 2 views. Mirroring is for images whose mirror images have the same class: not for digits.
With 32 steps a call, callbacks see one batch in 32. The first epoch compiles for longer than that of the tutorials'
network does, which a very short training does not win back.

Source: He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks", CVPR 2019. Alternating
mirroring and the whitening layer: Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024.
"""

from pathlib import Path
from typing import Annotated

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts import Group, Parameter, validators
from cyclopts.types import PositiveInt
from keras import layers
from tensorflow import data

from callbacks import Comparison

TRICKS = ["batch normalization", "warm-up", "cosine", "label smoothing", "mirroring", "steps per execution"]

# An image is mirrored in every other epoch, not at random; the first convolution is not learned, but whitens patches.
# Whitening makes an epoch longer, which a short training does not win back.
TRICKS_OF_LONG_TRAINING = ["alternation", "whitening"]

# The network, its tricks, the share of the tutorial's epochs, and the best rate of GRID (--search); the rate of
# "tutorial" is the one that is taught. The shares are those that take a fifth of its time, and about all of it.
VARIANTS = {
    "tutorial": ("tutorial", [], 15 / 15, 0.001),
    "tutorial, cosine": ("tutorial", ["cosine"], 15 / 15, 0.01),
    "combined, 1/5 time": ("combined", TRICKS, 4 / 15, 0.1),
    "combined": ("combined", TRICKS + TRICKS_OF_LONG_TRAINING, 14 / 15, 1.0),
}

# The variant that answers the recipe's question.
HEADLINE = "combined"

# Learning rates, from those that suit the tutorial's Adam to those that suit SGD.
GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

# Many steps a call: equal weights, less time. On PyTorch, Keras knows single steps only.
STEPS_PER_CALL = 1 if keras.backend.backend() == "torch" else 32

# For flags of which one at a time may be given.
ONE_OF = Group(validator=validators.mutually_exclusive)

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


def batches(images, labels, shuffle=False):
    """Return the images, kept in memory, and their labels in batches, for `fit`."""
    dataset = data.Dataset.from_tensor_slices((images, labels))
    if shuffle:
        dataset = dataset.shuffle(len(images))
    return without_tuning(dataset.batch(128).prefetch(2))


def alternating_batches(images, labels):
    """Return shuffled batches, in which each image is mirrored in every other epoch, half of them in the first."""
    is_mirrored = np.random.permutation(len(images)) < len(images) / 2

    def epoch():
        order = np.random.permutation(len(images))
        for start in range(0, len(images), 128):
            chosen = order[start : start + 128]
            flips = is_mirrored[chosen, None, None, None]
            yield np.where(flips, images[chosen, :, ::-1], images[chosen]), labels[chosen]
        np.logical_not(is_mirrored, out=is_mirrored)

    whole = batches(images, labels)
    dataset = data.Dataset.from_generator(epoch, output_signature=whole.element_spec)
    return without_tuning(dataset.apply(data.experimental.assert_cardinality(len(whole))).prefetch(2))


def without_tuning(dataset):
    """Return the data set without automatic tuning: the end of an epoch waits for it, up to as long as it took."""
    options = data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def build_tutorial_model(image_shape, classes):
    """Return the network of two convolutions that tutorials teach; it gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    for filters in (32, 64):
        x = layers.Conv2D(filters, 3, activation="relu")(x)
        x = layers.MaxPooling2D()(x)
    x = layers.Dropout(0.5)(layers.Flatten()(x))
    return keras.Model(inputs, layers.Dense(classes)(x))


def whitening_kernel(images):
    """Return the kernel (5, 5, channels, filters) that gives 5 × 5 patches of images uncorrelated values of variance 1.

    As a ReLU follows, each filter has its negative beside it.
    """
    patches = keras.ops.convert_to_numpy(keras.ops.image.extract_patches(images, 5, strides=2))
    variances, directions = np.linalg.eigh(np.cov(patches.reshape(-1, patches.shape[-1]), rowvar=False))
    # Hardly any variance is noise, which is not to be made as loud as the rest.
    filters = directions / np.sqrt(variances + 1e-2 * variances.max())
    return np.concatenate([filters, -filters], axis=1).reshape(5, 5, images.shape[-1], -1)


def build_model(images, classes, tricks):
    """Return a network of three convolutions that gives a logit for each class.

    Images (examples, height, width, channels) are for the shape, and for the statistics of the whitening layer.
    """
    use_bias = "batch normalization" not in tricks

    def activation(x):
        x = layers.BatchNormalization(momentum=0.9)(x) if "batch normalization" in tricks else x
        return layers.ReLU()(x)

    def convolution(x, filters, kernel_size=3, strides=1):
        return activation(layers.Conv2D(filters, kernel_size, strides, padding="same", use_bias=use_bias)(x))

    x = inputs = keras.Input(images.shape[1:])
    x = layers.RandomFlip("horizontal")(x) if "mirroring" in tricks and "alternation" not in tricks else x
    if "whitening" in tricks:
        kernel = whitening_kernel(images[:1000])
        fixed = {"kernel_initializer": keras.initializers.Constant(kernel), "use_bias": False, "trainable": False}
        x = activation(layers.Conv2D(kernel.shape[-1], 5, 2, padding="same", **fixed)(x))
        x = convolution(x, 32, kernel_size=1)
    else:
        x = convolution(x, 32, kernel_size=5, strides=2)
    for filters in (48, 96):
        x = convolution(layers.MaxPooling2D(padding="same")(x), filters)
    x = layers.GlobalMaxPooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def build_optimizer(network, tricks, steps, peak):
    """Return the optimizer for so many steps: the rate rises to its peak for a fifth of them, then falls to zero."""
    warmup_steps = steps // 5 if "warm-up" in tricks else 0
    rate = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=steps - warmup_steps,
        alpha=0.0 if "cosine" in tricks else 1.0,
        warmup_target=peak,
        warmup_steps=warmup_steps,
    )
    if network == "tutorial":
        return keras.optimizers.Adam(rate)
    return keras.optimizers.SGD(rate, momentum=0.9, nesterov=True)


def without_each_trick():
    """Return the variants of the ablation: the combined recipe, and the same without each trick, all at its rate."""
    network, tricks, share, rate = VARIANTS["combined"]
    variants = {"combined": VARIANTS["combined"]}
    for trick in tricks:
        variants[f"no {trick}"] = (network, [other for other in tricks if other != trick], share, rate)
    return variants


def with_two_views(model):
    """Return the model that gives the mean of a model's logits for an image and for its mirror image."""
    mirrored = model(keras.ops.flip(model.input, axis=2))
    return keras.Model(model.input, layers.average([model.output, mirrored]))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 15,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    ablate: Annotated[bool, Parameter(group=ONE_OF)] = False,
    search: Annotated[bool, Parameter(group=ONE_OF)] = False,
):
    """Compare the tutorials' network with all tricks combined, in a fifth of its time and in the same time.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data by the tutorial's network; the others have a share of them.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        ablate: compare the combined recipe with itself without each of its tricks instead.
        search: find the best learning rate of each variant but "tutorial", on validation data, in place of the
            comparison.
    """
    *splits, classes = load(dataset, data_dir, limit)
    # One-hot labels, because label smoothing needs them.
    train, validation, test = ((images, keras.utils.to_categorical(labels, classes)) for images, labels in splits)
    variants = without_each_trick() if ablate else VARIANTS
    # One training serves a variant and its two views, which the loop then finds finished.
    views = {} if ablate else {f"{name}, 2 views": value for name, value in VARIANTS.items() if value[0] == "combined"}
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        same_start=False,
        columns={
            "epochs": "passes over the training data",
            "seconds": "of all epochs together, compilation and the evaluation of validation data included",
        },
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        save=save,
    ) as comparison:
        if search:
            tuned = {name: value for name, value in VARIANTS.items() if name != "tutorial"}
            loop = comparison.search(tuned, GRID, seeds)
        else:
            loop = comparison.runs(variants | views, seeds)
        for variant, (network, tricks, share, rate), run in loop:
            own_epochs = max(1, round(share * epochs))
            alternates = "mirroring" in tricks and "alternation" in tricks
            train_batches = alternating_batches(*train) if alternates else batches(*train, shuffle=True)
            if network == "tutorial":
                model = build_tutorial_model(train[0].shape[1:], classes)
            else:
                model = build_model(train[0], classes, tricks)
            steps_per_call = STEPS_PER_CALL if "steps per execution" in tricks else 1
            model.compile(
                optimizer=build_optimizer(network, tricks, own_epochs * len(train_batches), rate),
                loss=keras.losses.CategoricalCrossentropy(
                    from_logits=True, label_smoothing=0.1 if "label smoothing" in tricks else 0.0
                ),
                metrics=["accuracy"],
                steps_per_execution=min(len(train_batches), steps_per_call),
            )
            model.fit(
                train_batches,
                epochs=own_epochs,
                validation_data=batches(*validation),
                shuffle=False,  # by `fit`, because `batches` does
                verbose=0,
                callbacks=[run],
            )
            if search:
                continue
            comparison.add_figure(variant, run.seed, "epochs", own_epochs)
            comparison.add_figure(variant, run.seed, "seconds", sum(comparison.result.runs[-1]["epoch_seconds"]))
            if f"{variant}, 2 views" in views:
                two_views = with_two_views(model)
                two_views.compile(loss=model.loss, metrics=["accuracy"])
                metrics = two_views.evaluate(*test, batch_size=256, verbose=0, return_dict=True)
                comparison.add(f"{variant}, 2 views", run.seed, metrics)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
