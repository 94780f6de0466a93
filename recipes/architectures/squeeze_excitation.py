"""Squeeze excitation: scales each channel by a factor that the whole image decides.

Symptom: a wider convolutional network is hardly better. Would channel attention do more with as many parameters?

Technique: squeeze: z is the mean of each channel over the pixels. Excite: s = σ(W₂ · ReLU(W₁ z + b₁) + b₂), with a
sigmoid σ and a hidden layer of C / r units for C channels. Scale: y = s · x, one factor in (0, 1) for each channel and
example. A convolution sees a few pixels; by s it gets to know of the whole image. Keras: `GlobalAveragePooling2D`, two
`Dense` layers, and `Multiply`, as a function of one's own.

Change: four lines after a convolution. `keepdims=True` keeps the two axes along which s is repeated:

    s = layers.GlobalAveragePooling2D(keepdims=True)(x)
    s = layers.Dense(x.shape[-1] // 4, activation="relu")(s)
    s = layers.Dense(x.shape[-1], activation="sigmoid")(s)
    x = layers.Multiply()([x, s])

Look for: test accuracy beside that of a network with as many parameters, spent on more filters, and the time of an
epoch, for parameters are not what a processor counts. The narrow network alone tells whether either is worth it. Then
the picture: how much s differs from image to image, by block. Where it does not, it is no attention but a constant, and
the convolution's own weights could do the same.

Cost: 2 C² / r weights for each block, which are few beside the 9 C² of a 3×3 convolution, but four more layers to
call. One hyper-parameter, r: the paper takes 16, with hundreds of channels. At the start s is near one half, so each
block halves the signal: the next batch normalisation, or a residual sum, makes up for that. In a residual block it
comes last, before the sum.

Source: Hu, Shen and Sun, "Squeeze-and-Excitation Networks", CVPR 2018: first place in the ImageNet challenge of 2017,
with a top-5 error of 2.251 %.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

FILTERS = 24
BLOCKS = 3
RATIO = 4

# The kind of network, and the best rate of GRID (--search). The wider one gets as many filters as it takes to have the
# parameters of the one with squeeze and excitation.
VARIANTS = {
    "wider": ("wider", 0.03),
    "squeeze-excitation": ("attention", 0.01),
    "plain": ("plain", 0.01),
}

# The variant that answers the recipe's question.
HEADLINE = "squeeze-excitation"

# Learning rates of Adam.
GRID = (0.003, 0.01, 0.03, 0.1)

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


def squeeze_excitation(x):
    """Return x, of shape (examples, height, width, channels), with each channel scaled by what the image decides."""
    channels = x.shape[-1]
    s = layers.GlobalAveragePooling2D(keepdims=True)(x)
    s = layers.Dense(channels // RATIO, activation="relu")(s)
    s = layers.Dense(channels, activation="sigmoid")(s)
    return layers.Multiply()([x, s])


def convolution(x, filters, strides=1):
    """Return x, of shape (examples, height, width, channels), after a convolution and batch normalisation."""
    x = layers.Conv2D(filters, 3, strides=strides, padding="same", use_bias=False)(x)
    # Few steps: with the default momentum of 0.99, the statistics would lag behind.
    return layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))


def build_model(image_shape, classes, attention, filters=FILTERS):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.MaxPooling2D(padding="same")(convolution(inputs, filters, strides=2))
    for _ in range(BLOCKS):
        x = convolution(x, filters)
        if attention:
            x = squeeze_excitation(x)  # the technique
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def equal_filters(image_shape, classes):
    """Return the number of filters that brings a plain network nearest to the parameters of that with attention."""
    target = build_model(image_shape, classes, attention=True).count_params()

    def parameters(filters):
        # A normalisation has four for each filter.
        first, last = (9 * image_shape[-1] + 4) * filters, (filters + 1) * classes
        return first + BLOCKS * (9 * filters + 4) * filters + last

    return min(range(1, 2 * FILTERS), key=lambda filters: abs(parameters(filters) - target))


def deviations_of_factors(model, images):
    """Return for each block the deviation of s from image to image, the mean over its channels."""
    factors = [layer.input[1] for layer in model.layers if isinstance(layer, layers.Multiply)]
    values = keras.Model(model.input, factors)(images)
    return [np.mean(np.std(keras.ops.convert_to_numpy(value), axis=0)) for value in values]


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train a convolutional network, one with channel attention, and one as large as that, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    image_shape = train[0].shape[1:]
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    wider = equal_filters(image_shape, classes)  # before the seeds are set, for it builds a model
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # the variants differ in shape
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={"parameters": "of the whole network"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (kind, learning_rate), run in loop:
            model = build_model(image_shape, classes, kind == "attention", wider if kind == "wider" else FILTERS)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            comparison.add_figure(variant, run.seed, "parameters", model.count_params())
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            )
            if kind == "attention":
                deviations = deviations_of_factors(model, validation[0])
                comparison.add_signal(variant, run.seed, "deviation of s over images", deviations, by="block")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
