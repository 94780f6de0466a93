"""Batch size scaling: raises the learning rate along with the batch size, so that fewer steps go as far.

Symptom: you raised the batch size to train faster, and accuracy fell. The epochs are as many as before.

Technique: with a batch k times as large, an epoch has 1/k of the steps. The linear rule makes each of them k times as
long, η ← k · η: while the weights hardly move, k small steps add up to just that, for the gradient of a batch is the
mean of its parts' gradients. The root rule, η ← √k · η, keeps the noise of a step as it was. Both begin with a warm-up,
because the first weights do move. Keras: none; set the optimizer's rate.

Change: the rate, in one place, and the schedule's length with the number of steps:

    rate = 0.01 * batch_size / 32  # or 0.01 * (batch_size / 32) ** 0.5
    steps = epochs * -(-examples // batch_size)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 10, warmup_target=rate, warmup_steps=steps // 10
    )

Look for: what the larger batch loses at the old rate, and how much of that each rule brings back. Then go to the
largest batch: whether the linear rule still holds there, or its rate is too high to train at all. The tuned variants
say what any rate could have reached. If they stay behind the small batch, it is steps that are missing: train for more
epochs.

Cost: none in itself, and the gain is time: compare the time of an epoch, which depends on what your machine does side
by side. A rule saves the search for a rate but is only as good as the rate that you scale. These rules are for gradient
descent, with or without momentum; for Adam the root is usual.

Source: Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv:1706.02677, who kept accuracy
up to batches of 8,192 with the linear rule and a warm-up; Krizhevsky, arXiv:1404.5997, for the root; Shallue et al.,
JMLR 20, 2019, who find that neither rule holds everywhere.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The batch size from which the rate is scaled.
SMALL = 32

# The batch size, the power of its growth with which the rate grows, and the rate that grows: the best of GRID for the
# small batch (--search). The last one is not scaled: it is the best of GRID for its own batch size.
VARIANTS = {
    "32, tuned": (SMALL, 0, 0.01),
    "256, kept": (256, 0, 0.01),
    "256, root": (256, 0.5, 0.01),
    "256, linear": (256, 1, 0.01),
    "1024, root": (1024, 0.5, 0.01),
    "1024, linear": (1024, 1, 0.01),
    "1024, tuned": (1024, 0, 0.1),
}

# The variant that answers the recipe's question.
HEADLINE = "256, linear"

# Learning rates of gradient descent with momentum.
GRID = (0.003, 0.01, 0.03, 0.1, 0.3)

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
    for _ in range(3):
        x = layers.Dense(100, activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one network with small and with larger batches, at rates scaled by two rules, for equally many epochs.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each tuned variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={
            "peak rate": "the learning rate after the warm-up",
            "steps": "updates of the weights in the whole training",
        },
        save=save,
    ) as comparison:
        tuned = {variant: value for variant, value in VARIANTS.items() if variant.endswith("tuned")}
        loop = comparison.search(tuned, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (batch_size, power, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes)
            rate = learning_rate * (batch_size / SMALL) ** power  # the technique
            steps_per_epoch = -(-len(train[0]) // batch_size)
            steps = epochs * steps_per_epoch
            # Ends at a rate of zero, which leaves little noise between seeds. The warm-up is for all variants.
            schedule = keras.optimizers.schedules.CosineDecay(
                0.0, steps - steps // 10, warmup_target=rate, warmup_steps=steps // 10
            )
            model.compile(
                optimizer=keras.optimizers.SGD(schedule, momentum=0.9),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps_per_epoch, STEPS_PER_CALL),
            )
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            )
            comparison.add_figure(variant, run.seed, "peak rate", rate)
            comparison.add_figure(variant, run.seed, "steps", steps)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
