"""Warmup cosine: raises the learning rate from 0 over the first steps, then lets it fall along half a cosine to 0.

Symptom: the loss leaps up in the first steps, at a rate that is good later. It recovers slowly or never. At a rate that
is safe from the start, training is slow.

Technique: with W steps of warm-up, peak rate η and T steps in all, step i, counted from 0, is made at η · i / W while
i < W, and then at η/2 · (1 + cos(π (i - W) / (T - W))). Adam's first steps have the length of the rate in every weight,
however small the gradient: that is what warm-up softens. Restarts raise the rate to the peak again, for periods that
double. Keras: `CosineDecay` with `warmup_target` and `warmup_steps`; `CosineDecayRestarts`.

Change: the optimizer's learning rate, where `steps` is epochs times batches per epoch:

    rate = keras.optimizers.schedules.CosineDecay(
        0.0, decay_steps=steps - steps // 10, warmup_target=0.001, warmup_steps=steps // 10
    )
    optimizer = keras.optimizers.Adam(rate)

`decay_steps` counts from the end of the warm-up, so both together are the whole training. Write 0.0: with an integer 0
TensorFlow raises an error, and on JAX every step has the rate 0. Restarts end near 0 only if the training is 2ⁿ - 1
first periods long: here 1 + 2 + 4.

Look for: test accuracy, each schedule at its own best peak, and how close its seeds lie together: the fall settles what
the noise of the last steps scatters. Compare the cosine with and without warm-up, too, to see which of the two parts
gains. In the search, look at the highest peak: if warm-up helps, it does there.

Cost: none in time; the share of warm-up as a hyper-parameter, and the length of the training, which must be known
beforehand: weights from the middle of a cosine are not as good as those from the end of a shorter one. A schedule
counts the optimizer's steps, with gradient accumulation the batches; a second `fit` goes on where the first ended, for
`CosineDecay` at rate 0. Callbacks that set the rate raise an error.

Source: Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017; Goyal et al.,
"Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv:1706.02677, on warm-up.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers
from keras.optimizers import schedules

from callbacks import Comparison

# The schedule, and its highest learning rate, the best of GRID (--search).
VARIANTS = {
    "constant": ("constant", 0.0003),
    "cosine": ("cosine", 0.001),
    "warm-up, cosine": ("warm-up", 0.001),
    "cosine, restarts": ("restarts", 0.001),
}

# The variant that answers the recipe's question.
HEADLINE = "warm-up, cosine"

# Peak learning rates of Adam.
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
    for _ in range(10):
        x = layers.Dense(128, activation="relu", kernel_initializer="he_normal")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def learning_rate(schedule, peak, steps):
    """Return the learning rate for an optimizer that makes so many steps: a number or a schedule object."""
    if schedule == "cosine":
        return schedules.CosineDecay(peak, decay_steps=steps)
    if schedule == "warm-up":
        warmup_steps = steps // 10
        return schedules.CosineDecay(  # the technique
            0.0, decay_steps=steps - warmup_steps, warmup_target=peak, warmup_steps=warmup_steps
        )
    if schedule == "restarts":
        return schedules.CosineDecayRestarts(peak, first_decay_steps=steps / 7)  # three periods: 1/7, 2/7, 4/7
    return peak


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 14,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train a network of ten layers at a constant rate, along a cosine, with warm-up before it, and with restarts.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best peak rate of each variant, on validation data, in place of the comparison.
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
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (schedule, peak), run in loop:
            rate = learning_rate(schedule, peak, epochs * steps)
            model = build_model(train[0].shape[1:], classes)
            model.compile(
                optimizer=keras.optimizers.Adam(rate),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            )
            # Every seventh step makes lines that are short, and still smooth.
            shown = np.arange(0, epochs * steps, 7)
            rates = [float(rate(step)) if callable(rate) else rate for step in shown]
            comparison.add_signal(variant, run.seed, "learning rate", rates, by="epoch", at=shown / steps)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
