"""Mixed precision: computes with numbers of 16 bits, and keeps the weights in 32.

Symptom: your GPU or TPU is full, or slow, and its tensor cores sit idle.

Technique: layers cast their inputs and weights to 16 bits. That halves the activations, and matrix units multiply such
numbers several times as fast. The variables and their updates stay in float32, for they are too small for 16 bits.
bfloat16 has the range of float32, and three digits. float16 has one digit more, but small gradients become zero in it:
the loss is multiplied by a large scale, and the gradients are divided by it. If one of them is not finite, the step is
left out and the scale halved. Keras: `keras.config.set_dtype_policy`; with "mixed_float16", `compile` wraps the
optimizer in `LossScaleOptimizer`.

Change: one line before the network is built, and the last layer, whose logits the loss needs exactly:

    keras.config.set_dtype_policy("mixed_bfloat16")
    outputs = layers.Dense(classes, dtype="float32")(layers.Flatten()(x))

Take bfloat16 where your hardware has it. A policy that is given to the layers alone, by `dtype`, does not reach
`compile`: wrap the optimizer yourself.

Look for: the time of a step, the memory that training adds, and the accuracy, which should be the same. What you win is
the hardware's: on a CPU without instructions for 16 bits, each number is converted there and back.

Cost: nothing to tune. Steps are left out at the beginning of training in float16, until the scale is low enough; a
schedule does not count them. Layers of your own must not name float32 in their computations. Sums of many numbers,
such as means and norms, lose digits: Keras' normalisation layers add in float32 by themselves.

Source: Micikevicius et al., "Mixed Precision Training", ICLR 2018, whose ResNet-50 on ImageNet has 76.04 % with and
75.92 % without.
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

# The policy of the layers.
VARIANTS = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}

# The variant that answers the recipe's question, and its figure.
HEADLINE = ("bfloat16", "ms a step")

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


def build_model(image_shape, classes, policy):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)  # the technique
    try:
        x = inputs = keras.Input(image_shape)
        for filters in (16, 32, 64):
            x = layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu")(x)
        x = layers.Flatten()(x)
        return keras.Model(inputs, layers.Dense(classes, dtype="float32")(x))
    finally:
        keras.config.set_dtype_policy(before)


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
    """Train one network with numbers of 32 bits and of 16, of two kinds, and compare time, memory and accuracy.

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
        for variant, policy, run in comparison.runs(VARIANTS, seeds):
            model = build_model(train[0].shape[1:], classes, policy)
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
