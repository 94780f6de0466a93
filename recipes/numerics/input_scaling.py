"""Input scaling: brings the inputs to a range of order 1, in which initialisation and activation functions work.

Symptom: the loss starts at tens or hundreds instead of about log(classes). Only tiny learning rates do
not diverge.

Technique: initialisation keeps the size of a signal from layer to layer, so inputs of a hundred give logits of a
hundred; and the gradient of the first layer grows with its inputs, so that no rate suits both it and the other layers.
Pixels go to [0, 1] (x / 255), to [-1, 1] (x / 127.5 - 1), or to mean 0 and deviation 1, (x - mean) / deviation, both
measured on the training split alone. Keras: `Rescaling(1 / 255)`, `Rescaling(1 / 127.5, offset=-1)`, `Normalization()`
with `adapt`.

Change: one layer at the beginning of the model, which is saved with it:

    scaling = layers.Normalization()
    scaling.adapt(training_images)
    x = scaling(inputs)

Look for: the loss before training. It should be near that of guessing, log(classes). Then compare the test accuracies:
each variant has the learning rate that suits it best, so what is left between them is not a matter of the rate. See too
whether it matters which of the three ranges you take. `--search` shows how far apart the best rates lie.

Cost: one multiplication and addition for each pixel; `adapt` is one pass over the training images. It must not see
validation or test images.

Source: LeCun, Bottou, Orr and Müller, "Efficient BackProp", in Neural Networks: Tricks of the Trade, 1998.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import ActivationStatistics, Comparison

# How the inputs are scaled, and the best rate of GRID (--search).
VARIANTS = {
    "0 to 255": ("none", 0.0001),
    "0 to 1": ("unit", 0.1),
    "-1 to 1": ("symmetric", 0.03),
    "standardised": ("standardised", 0.03),
}

# The variant that answers the recipe's question.
HEADLINE = "standardised"

# Learning rates of gradient descent with momentum: a long grid, since inputs a hundred times as large need small ones.
GRID = (0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)

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


def scaling_layer(scaling, training_images):
    """Return a layer that scales images of shape (examples, height, width, channels), values 0 to 1."""
    if scaling == "symmetric":
        return layers.Rescaling(2, offset=-1, name="scaling")
    if scaling == "standardised":
        normalization = layers.Normalization(name="scaling")
        normalization.adapt(training_images)
        return normalization
    # `load` has scaled already: unscaled are the pixels as they lie in the data set.
    return layers.Rescaling(255 if scaling == "none" else 1, name="scaling")


def build_model(training_images, classes, scaling):
    """Return a classifier of images of the shape of `training_images` that gives a logit for each class."""
    inputs = keras.Input(training_images.shape[1:])
    x = scaling_layer(scaling, training_images)(inputs)  # the technique
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(128, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


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
    """Train one network on images in four ranges, each at its own best learning rate, and compare test accuracies.

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
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={
            "mean of inputs": "mean of what reaches the first layer with weights",
            "deviation of inputs": "its standard deviation",
            "untrained loss": "training loss of the network before training; that of guessing is log(classes)",
        },
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (scaling, learning_rate), run in loop:
            model = build_model(train[0], classes, scaling)
            # Ends at a rate of zero, which leaves little noise between seeds.
            schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
            model.compile(
                optimizer=keras.optimizers.SGD(schedule, momentum=0.9),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            untrained_loss = model.evaluate(*train, batch_size=batch_size, verbose=0)[0]
            statistics = ActivationStatistics(train[0][:256], log=False)
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[statistics, run],
            )
            comparison.add_figure(variant, run.seed, "mean of inputs", statistics.first_input["mean"])
            comparison.add_figure(variant, run.seed, "deviation of inputs", statistics.first_input["std"])
            comparison.add_figure(variant, run.seed, "untrained loss", untrained_loss)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
