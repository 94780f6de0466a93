"""Schedule free: averages the weights while it trains, in place of a learning rate that falls on a plan.

Symptom: you do not know how long you will train. A cosine has to know its last step, and a constant rate ends badly.

Technique: two sequences. Steps are added to z, at a constant rate: z ← z - η · (Adam's step at y). The result is x, the
equal average of all z so far. Gradients are taken between the two, at y = (1 - β₁) z + β₁ x. You may stop at any step
and take x. Keras: `keras.optimizers.ScheduleFreeAdamW`, with β₁ = 0.9, and `callbacks.SwapScheduleFreeWeights`.

Change: the optimizer, and one callback:

    model.compile(keras.optimizers.ScheduleFreeAdamW(0.003), ...)
    model.fit(..., callbacks=[SwapScheduleFreeWeights()])

Keras alone never puts x into the model: validation, checkpoints and the end of `fit` all have y. In Keras 3.15 the
optimizer also reads z too late on TensorFlow and PyTorch, where y then is the average itself; and on TensorFlow `fit`
builds it in a graph, where z begins at 0, so that the first step throws your weights away. The callback puts all three
right: y in training, x from the end of each epoch to the beginning of the next, and x at the end.

Look for: whether it is as good as the cosine at the end of the cosine's own plan, and better than the constant rate,
which needs no plan either. Then look at the early stops. There the cosine has been trained anew, with a plan for just
that length; schedule-free was only looked at on its way. Look at its curve as well: it should rise steadily, without
the leaps of the constant rate.

Cost: z and a second moment for each weight, as many as Adam has. Its best rate is its own, and often larger; so search
anew. It still likes a warm-up (`warmup_steps`) in large networks. Batch normalisation's moving statistics belong to y:
give the callback `data=(inputs, targets)`, and it computes those of x; this network has none. In the list the callback
comes before `ModelCheckpoint` and `EarlyStopping`.

Source: Defazio et al., "The Road Less Scheduled", NeurIPS 2024, arXiv:2405.15682; it won the self-tuning track of the
MLCommons AlgoPerf challenge of 2024.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison, SwapScheduleFreeWeights

# The optimizer and its schedule, whether the averaged weights are swapped in, and the best rate of GRID (--search).
VARIANTS = {
    "cosine decay": ("cosine", False, 0.003),
    "constant rate": ("constant", False, 0.0003),
    "schedule-free": ("schedule-free", True, 0.003),
    "schedule-free, no swap": ("schedule-free", False, 0.003),
}

# The variant that answers the recipe's question.
HEADLINE = "schedule-free"

# Learning rates.
GRID = (0.0001, 0.0003, 0.001, 0.003, 0.01)

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
    for _ in range(2):
        x = layers.Dense(128, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def new_optimizer(kind, learning_rate, steps):
    """Return the optimizer for a training of `steps` steps, which only the cosine has to know."""
    if kind == "cosine":
        return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, steps))
    if kind == "constant":
        return keras.optimizers.Adam(learning_rate)
    return keras.optimizers.ScheduleFreeAdamW(learning_rate)  # the technique


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 12,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    batch_size: PositiveInt = 32,
    search: bool = False,
):
    """Train one network by Adam with a cosine, by Adam at a constant rate, and schedule-free, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        batch_size: examples in a training step; the fewer, the noisier are the weights.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    steps = -(-len(train[0]) // batch_size)
    # After a quarter, after half and after all of the epochs.
    stops = [max(1, epochs // 4), max(1, epochs // 2), epochs]
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "batch size": batch_size},
        columns={
            "stopped at a quarter": "validation accuracy after a quarter of the epochs; the cosine had that plan",
            "stopped at half": "validation accuracy after half of the epochs; the cosine had that plan",
        },
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (kind, swaps, learning_rate), run in loop:
            accuracies = {}
            # The cosine is trained anew for each stop, at the rate that is best for all of the epochs.
            for length in sorted(set(stops)) if kind == "cosine" and not search else [epochs]:
                keras.utils.set_random_seed(run.seed)
                model = build_model(train[0].shape[1:], classes)
                model.compile(
                    optimizer=new_optimizer(kind, learning_rate, length * steps),
                    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                    metrics=["accuracy"],
                    steps_per_execution=min(steps, STEPS_PER_CALL),
                )
                swap = [SwapScheduleFreeWeights()] if swaps else []
                history = model.fit(
                    *train,
                    batch_size=batch_size,
                    epochs=length,
                    validation_data=validation,
                    verbose=0,
                    callbacks=[*swap, run] if length == epochs else [],
                ).history["val_accuracy"]
                accuracies |= {stop: history[stop - 1] for stop in stops if stop == length or kind != "cosine"}
            for name, stop in zip(("stopped at a quarter", "stopped at half"), stops, strict=False):
                comparison.add_figure(variant, run.seed, name, accuracies.get(stop, np.nan))
            comparison.add_signal(
                variant,
                run.seed,
                "validation accuracy when stopped",
                list(accuracies.values()),
                by="epochs of training",
                at=list(accuracies),
            )
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
