"""Floating-point range: computes the cross-entropy from logits, so that no exponential leaves the range of the numbers.

Symptom: the loss becomes NaN, or stays constant, once logits are large. In half precision that is soon.

Technique: a format has a spacing (relative: about 1.2e-7 for float32, so 1e10 + 1e-10 = 1e10, and the next number is
1024 away) and a largest value (3.4e38 for float32, which exp(z) exceeds from z = 89 on; 65504 for float16, from
z = 12). Written out, -log(exp(z) / Σ exp(z)) overflows, although the result is small. From logits it is computed as
logsumexp(z) - z, with max(z) taken out of the exponentials, which then are at most 1. Keras:
`from_logits=True`, and no softmax in the model.

Change: the last layer gives logits, and the loss knows it:

    outputs = layers.Dense(classes)(x)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

Look for: the second table, with the loss of one example whose wrong logit grows. The formula as written stops giving a
number. Probabilities are clipped by Keras: from some logit on the loss stands still, and where it does, there is no
gradient. Then the comparison, with logits 100 times as large as usual, as large weights or unscaled inputs make them:
which runs diverge, and whether probabilities still learn. `--scale 1` shows all three where the range is no problem.

Cost: none; whoever needs probabilities applies `keras.ops.softmax` to the model's output. In mixed precision, keep the
last layer in float32 (`dtype="float32"`). On TensorFlow, Keras finds the logits by itself where a softmax is the very
last operation, and spares you the clipping; on JAX and PyTorch it does not.

Source: Goldberg, "What Every Computer Scientist Should Know About Floating-Point Arithmetic", ACM Computing Surveys 23,
1991; Keras documentation, `SparseCategoricalCrossentropy`.
"""

from pathlib import Path

import cyclopts
import keras
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from keras import layers
from rich import box
from rich.console import Console
from rich.table import Table

from callbacks import Comparison

# What the loss is computed from, and the best rate of GRID (--search).
VARIANTS = {
    "probabilities": 0.0001,
    "written out": 0.003,
    "from logits": 0.003,
}

# The variant that answers the recipe's question.
HEADLINE = "from logits"

# Learning rates of Adam.
GRID = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01)

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


def written_out(labels, logits):
    """Return -log(exp(z) / Σ exp(z)) as the formula stands, of shape (examples,), for logits (examples, classes)."""
    exponentials = keras.ops.exp(logits)
    probabilities = exponentials / keras.ops.sum(exponentials, axis=-1, keepdims=True)
    one_hot = keras.ops.one_hot(keras.ops.cast(keras.ops.reshape(labels, (-1,)), "int32"), logits.shape[-1])
    return -keras.ops.log(keras.ops.sum(one_hot * probabilities, axis=-1))


LOSSES = {
    "probabilities": keras.losses.SparseCategoricalCrossentropy(from_logits=False),
    "written out": written_out,
    "from logits": keras.losses.SparseCategoricalCrossentropy(from_logits=True),  # the technique
}


def build_model(image_shape, classes, variant, scale):
    """Return a classifier of images of `image_shape` (height, width, channels) with its logits scaled up.

    It gives probabilities for the variant "probabilities", else logits.
    """
    inputs = keras.Input(image_shape)
    x = layers.Flatten()(inputs)
    x = layers.Dense(128, activation="relu")(x)
    x = layers.Dense(classes)(x)
    outputs = layers.Rescaling(scale)(x)
    if variant == "probabilities":
        outputs = layers.Softmax()(outputs)
        # On TensorFlow, Keras would find the logits of a softmax that comes last. Any layer after it hides them.
        outputs = layers.Rescaling(1)(outputs)
    return keras.Model(inputs, outputs)


def first_absorbing(dtype):
    """Return the smallest power of two n for which n + 1 gives n again."""
    number, one = keras.ops.ones((), dtype), keras.ops.ones((), dtype)
    while number + one != number:
        number = number + number
    return float(keras.ops.cast(number, "float32"))


def show_formats():
    """Print the range of three formats, and the loss of one example whose wrong logit grows, computed in three ways."""
    formats = Table("format", "spacing at 1", "largest value", "n + 1 = n from", box=box.SIMPLE_HEAD)
    for dtype in ("float16", "bfloat16", "float32"):
        limits = ml_dtypes.finfo(dtype)
        formats.add_row(dtype, f"{float(limits.eps):.3g}", f"{float(limits.max):.5g}", f"{first_absorbing(dtype):.0f}")
    losses = Table("right, wrong logit", *LOSSES, title="loss of one example", box=box.SIMPLE_HEAD)
    for wrong in (1, 10, 20, 80, 90, 1000):
        logits, label = keras.ops.convert_to_tensor([[0.0, wrong]], "float32"), keras.ops.zeros((1,), "int32")
        given = dict.fromkeys(LOSSES, logits) | {"probabilities": keras.ops.softmax(logits) * 1}
        values = [float(keras.ops.max(loss(label, given[variant]))) for variant, loss in LOSSES.items()]
        losses.add_row(f"0, {wrong}", *(f"{value:.4g}" for value in values))
    Console().print(formats, losses)


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    scale: PositiveFloat = 100,
    search: bool = False,
):
    """Show the range of number formats, then train with the cross-entropy computed from logits, and otherwise.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        scale: factor by which the logits are scaled up.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    show_formats()
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "scale of the logits": scale},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, learning_rate, run in loop:
            model = build_model(train[0].shape[1:], classes, variant, scale)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=LOSSES[variant],
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
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
