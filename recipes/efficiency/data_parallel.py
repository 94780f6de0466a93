"""Data parallel: trains one network on several devices, each with a share of every batch.

Symptom: one device is too slow, and you have several, or several machines.

Technique: every device has all weights and computes the gradient of its share of the batch; the mean of the gradients
is that of the whole batch, and all make the same step. Nothing about the training changes but rounding, as long as the
global batch stays what it was. Keras: `keras.distribution.DataParallel`, on JAX. TensorFlow's form of it begins with
"DO NOT USE" in Keras 3.15, and `fit` under `MultiWorkerMirroredStrategy` is broken (keras #20585, #20329).

Change: before the network is built, and with `KERAS_BACKEND=jax`:

    keras.distribution.set_distribution(keras.distribution.DataParallel())

It takes all devices of the process. With several processes, on one machine or on several, each runs the same script and
begins with `keras.distribution.initialize("HOST:1234", processes, number)`: HOST is the machine of number 0, and each
has another number. On two machines, with the number as the script's argument, type `KERAS_BACKEND=jax python train.py
0` on HOST, and the same with 1 on the other. What is measured here ran on one machine.

Look for: the loss at each step and the final weights, equal but for rounding to those of one device: if not, the
processes see other batches, or the global batch has grown. Then the time of a step: devices that share the cores of
one processor win nothing.

Cost: the gradients travel between devices at each step, which small networks do not win back. Batches must be divisible
by the number of devices. Data of several processes must be a `tf.data.Dataset` that is shuffled alike in all: Keras
deals its batches out. If one process dies, the others wait for it: this recipe stops them.

Source: Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017: 256 GPUs, 90 % efficient.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers
from tensorflow import data

from callbacks import Comparison

# What there are several of, as many as the flag of this name says.
VARIANTS = {"1 device": None, "devices": "devices", "processes": "processes"}

# The variant that answers the recipe's question, and its figure.
HEADLINE = ("devices", "ms a step")

# Examples of a step, on all devices together.
BATCH_SIZE = 128

DATA_DIR = Path(__file__).resolve().parent.parent.parent / "data"

# A process has the devices that it had when it began, so that each variant is trained in processes of its own.
WORK = "import runpy, sys; runpy.run_path(sys.argv[1])['work'](*sys.argv[2:])"


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
        x = layers.Dense(128, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def batches(images, labels, seed):
    """Return batches of BATCH_SIZE examples, shuffled anew in each epoch and alike in each process."""
    size = min(BATCH_SIZE, len(images) // 2 * 2)
    dataset = data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images), seed=seed)
    return dataset.batch(size, drop_remainder=True)


class Steps(keras.callbacks.Callback):
    """Notes the mean loss of the epoch so far at each step, and the seconds of each epoch."""

    def __init__(self):
        super().__init__()
        self.losses, self.seconds = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.perf_counter()

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(float(logs["loss"]))

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.start)


def work(folder, number):
    """Train as the process of a number, as the file task.json in a folder says, and leave there what came of it."""
    folder, number = Path(folder), int(number)
    task = json.loads((folder / "task.json").read_text())
    if task["processes"] > 1:
        keras.distribution.initialize(task["address"], task["processes"], number)
    devices = keras.distribution.list_devices()
    if len(devices) < task["devices"]:
        raise RuntimeError(f"There are {len(devices)} devices, not {task['devices']}: give --devices {len(devices)}.")
    if task["processes"] == 1:
        devices = devices[: task["devices"]]
    keras.distribution.set_distribution(keras.distribution.DataParallel(devices=devices))  # the technique
    keras.utils.set_random_seed(task["seed"])
    (images, labels), *_, classes = load(task["dataset"], Path(task["data_dir"]), task["limit"])
    dataset = batches(images, labels, task["seed"])
    model = build_model(images.shape[1:], classes)
    model.compile(
        # Ends at a rate of zero, which leaves little noise between seeds.
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.001, task["epochs"] * len(dataset))),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    steps = Steps()
    model.fit(dataset, epochs=task["epochs"], verbose=0, callbacks=[steps])
    weights = {f"weight {index}": weight for index, weight in enumerate(model.get_weights())}
    np.savez(folder / f"{number}.npz", losses=steps.losses, seconds=steps.seconds, **weights)


def free_address():
    """Return an address of this machine, with a port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def train(task):
    """Do a task in processes of its own; return, for each of them, {name: array} of what came of it.

    Raises:
        RuntimeError: one of the processes has failed. The others are stopped.
    """
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={task['devices']}"
    environment = os.environ | {"KERAS_BACKEND": "jax", "XLA_FLAGS": flags}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        (Path(folder) / "task.json").write_text(json.dumps(task | {"address": free_address()}))
        processes, errors = [], []
        for number in range(task["processes"]):
            errors.append(stack.enter_context((Path(folder) / f"{number}.txt").open("w+")))
            command = [sys.executable, "-c", WORK, __file__, folder, str(number)]
            # Where this file is, for `callbacks` may lie beside it.
            process = subprocess.Popen(
                command, cwd=Path(__file__).parent, env=environment, stdout=subprocess.DEVNULL, stderr=errors[-1]
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        wait_for(processes, errors)
        return [dict(np.load(Path(folder) / f"{number}.npz")) for number in range(task["processes"])]


def wait_for(processes, errors):
    """Wait until all processes have ended, or one has failed.

    Raises:
        RuntimeError: a process has failed; the last lines of its errors say why.
    """
    while any(process.poll() is None for process in processes) and not any(process.poll() for process in processes):
        time.sleep(0.1)
    for number, process in enumerate(processes):
        if process.poll():
            errors[number].seek(0)
            said = "".join(errors[number].readlines()[-20:])
            raise RuntimeError(f"Process {number} of {len(processes)} ended with code {process.poll()}:\n{said}")


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 5,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    devices: PositiveInt = 2,
    processes: PositiveInt = 2,
):
    """Train one network on one device, on several devices of a process, and in several processes of this machine.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        devices: number of devices in one process; the cores of a CPU are shared by as many as you like.
        processes: number of processes, each with one device.
    """
    (images, _), _, test, classes = load(dataset, data_dir, limit)
    if keras.backend.backend() != "jax":
        raise NotImplementedError("Keras 3.15 does this on JAX only: run this recipe with KERAS_BACKEND=jax.")
    steps = len(batches(images, images, 0))
    with Comparison(
        metric="accuracy",
        margin=0.01,
        test=test,
        same_start=False,  # it is the seed that makes the starts equal, in other processes
        settings={
            "dataset": dataset,
            "limit": limit,
            "epochs": epochs,
            "batch size": BATCH_SIZE,
            "devices": devices,
            "processes": processes,
        },
        columns={
            "ms a step": "milliseconds of a training step of an epoch, the median over epochs but the first",
            "distance": "between the losses of all steps and those of 1 device, the largest",
        },
        save=save,
    ) as comparison:
        expected = {}
        for variant, several, run in comparison.runs(VARIANTS, seeds):
            task = {"dataset": dataset, "data_dir": str(data_dir.resolve()), "epochs": epochs, "limit": limit}
            counts = {"devices": 1, "processes": 1}
            if several:
                counts[several] = {"devices": devices, "processes": processes}[several]
            first, *_ = train(task | counts | {"seed": run.seed})
            model = build_model(images.shape[1:], classes)
            model.set_weights([first[f"weight {index}"] for index in range(len(model.weights))])
            model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
            comparison.add(variant, run.seed, model.evaluate(*test, batch_size=256, verbose=0, return_dict=True))
            comparison.add_signal(variant, run.seed, "training loss", first["losses"], by="step")
            if several is None:
                expected[run.seed] = first["losses"]
            # Not known if an earlier call, whose runs `save` has kept, trained on one device.
            if run.seed in expected:
                distance = np.abs(first["losses"] - expected[run.seed]).max()
                comparison.add_figure(variant, run.seed, "distance", distance)
            # The first epoch is that in which the function is compiled.
            seconds = np.median(first["seconds"][1:] if epochs > 1 else first["seconds"])
            comparison.add_figure(variant, run.seed, "ms a step", 1000 * seconds / steps)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
