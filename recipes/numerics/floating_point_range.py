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

Look for: the second table, where the formula as written fails from z = 90 on, and probabilities, which Keras clips to
1e-7 and more, give the same loss 16.12 to all large errors, so that no gradient is left. Trained with logits scaled up
100 times, as large weights or inputs would, the written-out loss is NaN in all five runs, clipped probabilities end
at 0.26 test accuracy, near chance, and the loss from logits at 0.79. With small logits all three learn alike. With a
softmax as the very last operation, Keras on TensorFlow finds the logits by itself; on JAX it clips.

Cost: none; whoever needs probabilities applies `keras.ops.softmax` to the model's output. In mixed precision, keep the
last layer in float32 (`dtype="float32"`).

Source: Goldberg, "What Every Computer Scientist Should Know About Floating-Point Arithmetic", ACM Computing Surveys 23,
1991; Keras documentation, `SparseCategoricalCrossentropy`.
"""

from pathlib import Path

import cyclopts
import keras
import ml_dtypes
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from keras import layers
from rich import box
from rich.console import Console
from rich.table import Table

from callbacks import Comparison

# How the loss is computed, and the factor by which the logits are scaled up.
VARIANTS = {
    "from logits": ("logits", 1),
    "written out": ("written out", 1),
    "softmax": ("probabilities", 1),
    "logits ×100": ("logits", 100),
    "softmax ×100": ("probabilities", 100),
    "written ×100": ("written out", 100),
}

# The variant that answers the recipe's question.
HEADLINE = "softmax ×100"

DATA_DIR = Path(__file__).resolve().parent.parent.parent / "data"


def load(dataset, data_dir, limit):
    """Return (images, labels) for training, validation and test, and the number of classes.

    Images are uint8 arrays of shape (examples, height, width, channels), values 0 to 255. Nothing is downloaded.
    """
    try:
        if not data_dir.is_dir():
            raise FileNotFoundError(f"there is no folder {data_dir}")
        split = ["train[:80%]", "train[80%:]", "test"]
        splits, info = tfds.load(
            dataset, split=split, data_dir=data_dir, as_supervised=True, with_info=True, download=False
        )
        arrays = [next(iter(tfds.as_numpy(split.take(limit or -1).batch(len(split))))) for split in splits]
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
    "logits": keras.losses.SparseCategoricalCrossentropy(from_logits=True),  # the technique
    "probabilities": keras.losses.SparseCategoricalCrossentropy(from_logits=False),
    "written out": written_out,
}


def build_model(image_shape, classes, kind, scale):
    """Return a classifier of images of `image_shape` (height, width, channels) with its logits scaled up.

    It gives probabilities for the loss of `kind` "probabilities", else logits.
    """
    inputs = keras.Input(image_shape)
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Flatten()(x)
    x = layers.Dense(128, activation="relu")(x)
    x = layers.Dense(classes)(x)
    outputs = layers.Rescaling(scale)(x)
    if kind == "probabilities":
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
    losses = Table("logits", *(f"loss: {kind}" for kind in LOSSES), box=box.SIMPLE_HEAD)
    for wrong in (1, 10, 20, 80, 90, 1000):
        logits, label = keras.ops.convert_to_tensor([[0.0, wrong]], "float32"), keras.ops.zeros((1,), "int32")
        given = {"logits": logits, "probabilities": keras.ops.softmax(logits) * 1, "written out": logits}
        values = [float(keras.ops.max(loss(label, given[kind]))) for kind, loss in LOSSES.items()]
        losses.add_row(f"right 0, wrong {wrong}", *(f"{value:.4g}" for value in values))
    Console().print(formats, losses)


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    # Validation accuracy over three seeds, from logits: 0.8318 at 0.0003, 0.8437 at 0.001, 0.8488 at 0.003; from logits
    # scaled up 100 times: 0.7648, 0.7962 and 0.7922.
    learning_rate: PositiveFloat = 0.003,
):
    """Show the range of number formats, then train with the cross-entropy computed from logits, and otherwise.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        learning_rate: step size of Adam, the same for every variant.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    show_formats()
    with Comparison(
        metric="accuracy",
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "learning rate": learning_rate},
        save=save,
    ) as comparison:
        for _, (kind, scale), run in comparison.runs(VARIANTS, seeds):
            model = build_model(train[0].shape[1:], classes, kind, scale)
            model.compile(keras.optimizers.Adam(learning_rate), LOSSES[kind], metrics=["accuracy"])
            model.fit(
                *train,
                batch_size=128,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            )
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
