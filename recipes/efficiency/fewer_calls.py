"""Fewer calls: makes many training steps in one call, or has the compiler fuse them.

Symptom: your network is small, and the processor waits. A larger batch takes hardly more time.

Technique: `fit` calls a compiled function once a step, and comes back to Python for the next batch and for callbacks.
With a small network that takes longer than the step. `steps_per_execution=k` makes k steps of one call, and
`jit_compile=True` lets XLA fuse the operations of a step into few. Keras: both are arguments of `compile`. On JAX, XLA
compiles the steps in any case. On PyTorch, Keras 3.15 knows single steps only.

Change: one argument:

    model.compile(optimizer, loss, steps_per_execution=32)

Look for: the time of an epoch, and the distance between the final weights and those of single steps. More steps a call
change nothing but the time. XLA adds in another order, so that its weights are equal up to rounding, which training
enlarges. Then compare accuracy, for which neither should matter.

Cost: callbacks hear of every k-th batch only, and what they log is of k batches: a schedule object goes on as before,
but a callback that sets the rate at each batch sets it for k. Compiling takes longer at first. With k that does not
divide the steps of an epoch, the last call has fewer, for which TensorFlow does not compile anew. The larger the
network, the less there is to gain.

Source: Keras API, `Model.compile`.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The number of steps a call, and whether XLA compiles them: on TensorFlow it does not by default, on JAX always.
VARIANTS = {
    "1 step a call": (1, "auto"),
    "8 steps": (8, "auto"),
    "32 steps": (32, "auto"),
    "XLA": (1, True),
    "XLA, 32 steps": (32, True),
}

# The variant that answers the recipe's question, and its figure.
HEADLINE = ("32 steps", "ms a step")

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
        x = layers.Dense(64, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def trained_weights(model):
    """Return all trained weights as one array."""
    return np.concatenate([keras.ops.convert_to_numpy(weight).ravel() for weight in model.trainable_variables])


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 6,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
):
    """Train one network with one step a call and with many, compiled in two ways, and compare the time of a step.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    if keras.backend.backend() == "torch":
        raise NotImplementedError(
            "Keras 3.15 makes single steps only on PyTorch: run this recipe with KERAS_BACKEND=tensorflow or jax."
        )
    batch_size = 32
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "batch size": batch_size},
        columns={
            "ms a step": "milliseconds of a training step of an epoch, the median over epochs but the first",
            "distance": "between the final weights and those of single steps, over the length of their way",
        },
        save=save,
    ) as comparison:
        single = {}
        for variant, (steps_per_call, compiled), run in comparison.runs(VARIANTS, seeds):
            model = build_model(train[0].shape[1:], classes)
            start = trained_weights(model)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.001, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, steps_per_call),  # the technique
                jit_compile=compiled,
            )
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            )
            end = trained_weights(model)
            if (steps_per_call, compiled) == (1, "auto"):
                single[run.seed] = end
            # Not known if an earlier call, whose runs `save` has kept, made the single steps.
            if run.seed in single:
                distance = np.linalg.norm(end - single[run.seed]) / np.linalg.norm(single[run.seed] - start)
                comparison.add_figure(variant, run.seed, "distance", distance)
            # The first epoch is that in which the function is compiled.
            seconds = np.median(run.epoch_seconds[1:] or run.epoch_seconds)
            comparison.add_figure(variant, run.seed, "ms a step", 1000 * seconds / steps)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
