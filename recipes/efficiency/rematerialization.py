"""Rematerialization: forgets what layers computed, and computes it again when its gradient is due.

Symptom: training runs out of memory, and you want neither a smaller batch nor a smaller network.

Technique: the gradient of a layer needs what the layer computed, so all of that is kept from the forward pass to the
backward pass. Instead, cut the network into blocks, keep the input of each, and compute the rest of a block again
before its gradient. With n layers in √n blocks, the memory grows as √n instead of n, for one forward pass more. Keras:
`keras.remat(function)`. (`keras.RematScope` does so with each layer by itself: their outputs are kept, and only what
they compute on the way is not.)

Change: where a block of layers is called, with a new function each time:

    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(64, activation="gelu")

        def call(self, x):
            return keras.remat(lambda x: self.dense(x))(x)

Of a function that it has seen before, JAX may take the weights of that time for constants: the block is never trained,
without an error. It is so with a wrapper that is made in `__init__`, as Keras' documentation makes it, and, if the
garbage collector is late, with `keras.remat(self.dense)(x)` and with `RematScope` (Keras 3.15).

Look for: the memory that training adds to a process, the time of a step, and the accuracy, which stays the same: the
gradients are equal up to rounding. If the memory stays the same as well, the compiler has joined the two computations:
on CPUs, JAX does so.

Cost: the time of another forward pass. No dropout and no batch normalisation in such a block: on TensorFlow the second
pass draws another mask, and takes other statistics, so that the gradient is wrong, without an error; JAX refuses it.
A `keras.Model` cannot be such a block on TensorFlow, a layer can.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, who train a network of 1,000 layers in 7 GB
instead of 48.
"""

import subprocess
import sys
from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# What is computed again.
VARIANTS = {"nothing": None, "within layers": "layers", "within blocks": "blocks"}

# The variant that answers the recipe's question, and its figure.
HEADLINE = ("within blocks", "peak MB")

# Blocks of the network, and layers of convolution in each; their channels.
BLOCKS, DEPTH, CHANNELS = 4, 3, 16

BATCH_SIZE = 128

DATA_DIR = Path(__file__).resolve().parent.parent.parent / "data"

# Has another process measure the peak of its memory, which for this one is that of the largest variant so far.
MEASURE = "import runpy, sys; runpy.run_path(sys.argv[1])['print_peak'](*sys.argv[2:])"


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


class Block(layers.Layer):
    """Layers of convolution, to whose output their input of shape (examples, height, width, CHANNELS) is added.

    Args:
        recomputed: "layers", "blocks" or None: what is computed again in the backward pass.
    """

    def __init__(self, recomputed):
        super().__init__()
        self.recomputed = recomputed
        self.layers = [layer for _ in range(DEPTH) for layer in convolution()]

    def build(self, shape):
        for layer in self.layers:
            layer.build(shape)

    def forward(self, x):
        y = x
        for layer in self.layers:
            y = recompute(layer, y) if self.recomputed == "layers" else layer(y)
        return x + y

    def call(self, x):
        return recompute(self.forward, x) if self.recomputed == "blocks" else self.forward(x)  # the technique


def recompute(function, x):
    """Return function(x), which is computed again for its gradient."""
    # The lambda is a new function each time: of one that JAX has seen before, it may take the weights of that time.
    return keras.remat(lambda x: function(x))(x)


def convolution():
    """Return the layers of one convolution; none of them computes anything else when it is called again."""
    yield layers.Conv2D(CHANNELS, 3, padding="same", use_bias=False)
    yield layers.LayerNormalization()
    yield layers.Activation("gelu")


def build_model(image_shape, classes, recomputed):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    x = layers.Conv2D(CHANNELS, 3, strides=2, padding="same")(x)
    for _ in range(BLOCKS):
        x = Block(recomputed)(x)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def compile_model(model, steps):
    """Compile a model for so many steps of training."""
    model.compile(
        # Ends at a rate of zero, which leaves little noise between seeds.
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.003, steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )


def peak_bytes():
    """Return the peak memory of this process, or NaN where it computes on a GPU, which has a memory of its own."""
    if any(device.startswith("gpu") for device in keras.distribution.list_devices()):
        return np.nan
    status = Path("/proc/self/status")
    if not status.exists():
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Not `resource`, which on Linux begins with the memory of the process that started this one.
    return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])


def print_peak(variant, dataset, data_dir, limit):
    """Train a variant for three steps, and print by how many megabytes this raises the peak memory of this process."""
    (images, labels), *_, classes = load(dataset, Path(data_dir), int(limit))
    model = build_model(images.shape[1:], classes, VARIANTS[variant])
    compile_model(model, steps=3)
    before = peak_bytes()
    model.fit(images, labels, batch_size=BATCH_SIZE, verbose=0)
    print((peak_bytes() - before) / 1e6)


def peak_megabytes(variant, dataset, data_dir, limit):
    """Return by how many megabytes the training of a variant raises the peak memory of a process of its own."""
    limit = min(limit or np.inf, 3 * BATCH_SIZE)
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, __file__, variant, dataset, str(data_dir.resolve()), str(limit)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"The memory of {variant!r} was not measured:\n{process.stderr}")
    return float(process.stdout.split()[-1])


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 2,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
):
    """Train one network that keeps all it computes, and two that compute part of it again, and compare the memory.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    steps = -(-len(train[0]) // BATCH_SIZE)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "batch size": BATCH_SIZE},
        columns={
            "peak MB": "megabytes by which training raises the peak memory of a process of its own",
            "ms a step": "milliseconds of a training step of an epoch, the median over epochs but the first",
        },
        save=save,
    ) as comparison:
        for variant, recomputed, run in comparison.runs(VARIANTS, seeds):
            model = build_model(train[0].shape[1:], classes, recomputed)
            compile_model(model, epochs * steps)
            model.fit(
                *train,
                batch_size=BATCH_SIZE,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            )
            comparison.add_figure(variant, run.seed, "peak MB", peak_megabytes(variant, dataset, data_dir, limit))
            # The first epoch is that in which the function is compiled.
            seconds = np.median(run.epoch_seconds[1:] or run.epoch_seconds)
            comparison.add_figure(variant, run.seed, "ms a step", 1000 * seconds / steps)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
