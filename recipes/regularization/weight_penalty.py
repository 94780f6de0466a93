"""Weight penalty: keeps weights small, by a term in the loss, a decay at every step, or a limit to each unit's norm.

Symptom: training accuracy is far above validation accuracy. The weights keep growing.

Technique: there are three ways. A penalty adds l1 · Σ|w| or l2 · Σw² to the loss, over all kernels and no biases.
Decoupled decay leaves the loss alone, and takes η · decay · w from each weight w at every step, where η is the learning
rate. Max-norm cuts the incoming weights of a unit back to norm c after each step that made them longer. Keras:
`kernel_regularizer`, `keras.optimizers.AdamW` (`weight_decay` is decoupled in every optimizer of Keras), and
`kernel_constraint`. Under plain gradient descent, L2 and decay are the same, for decay = 2 · l2. Under Adam they are
not: it divides the gradient of the penalty, too, by the size of recent gradients, so that weights with large gradients
are hardly held back.

Change: one argument of each layer, `kernel_regularizer` or `kernel_constraint`. Start with 0.0001 for L2:

    x = layers.Dense(128, activation="relu", kernel_regularizer=keras.regularizers.L2(0.0001))(x)

or the optimizer, with the biases left out, as a regularizer does:

    optimizer = keras.optimizers.AdamW(0.001, weight_decay=0.3)
    optimizer.exclude_from_weight_decay(var_names=["bias"])

Look for: whether the gap between training and test accuracy closes, and which side moves. If test accuracy falls as
well, the penalty is too strong. The share of weights near zero tells the kinds apart: L1 pulls small weights as hard as
large ones, L2 and decay pull large ones harder, and max-norm lets single weights be.

Cost: one hyper-parameter, or two. The losses that Keras logs contain the penalty: compare accuracy, or add the
cross-entropy as a metric. L1 makes weights small, not exactly zero. Penalty and decay work through the learning rate:
halve it, and there is half as much of them. Where batch normalisation follows, the size of a kernel does not matter to
the output: there they change the effective learning rate, and nothing else.

Source: Krogh and Hertz, "A Simple Weight Decay Can Improve Generalization", NIPS 1991; Loshchilov and Hutter,
"Decoupled Weight Decay Regularization", ICLR 2019, where a residual network gains, in 100 epochs on CIFAR-10;
max-norm: Srivastava et al., "Dropout", JMLR 15, 2014.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# What keeps the weights small, and the best of GRID (--search).
VARIANTS = {
    "no penalty": ({}, 0.003),
    "L1": ({"regularizer": keras.regularizers.L1(0.00001)}, 0.003),
    "L2": ({"regularizer": keras.regularizers.L2(0.0001)}, 0.003),
    "L1 and L2": ({"regularizer": keras.regularizers.L1L2(0.00001, 0.0001)}, 0.003),
    "AdamW": ({"weight_decay": 0.3}, 0.003),
    "max-norm": ({"constraint": keras.constraints.MaxNorm(1.5)}, 0.003),
}

# The variant that answers the recipe's question.
HEADLINE = "L2"

# Learning rates of Adam.
GRID = (0.0003, 0.001, 0.003, 0.01, 0.03)

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


def build_model(image_shape, classes, regularizer=None, constraint=None):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    penalty = {"kernel_regularizer": regularizer, "kernel_constraint": constraint}  # the technique
    x = inputs = keras.Input(image_shape)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(128, activation="relu", **penalty)(x)
    return keras.Model(inputs, layers.Dense(classes, **penalty)(x))


def build_optimizer(learning_rate, weight_decay=None):
    """Return Adam or, with weight decay, AdamW that leaves the biases alone, as a kernel regularizer does."""
    if weight_decay is None:
        return keras.optimizers.Adam(learning_rate)
    optimizer = keras.optimizers.AdamW(learning_rate, weight_decay=weight_decay)  # the technique
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    return optimizer


def near_zero(model):
    """Return the share of the kernels' weights with |w| < 0.001."""
    kernels = [layer.kernel for layer in model.layers if isinstance(layer, layers.Dense)]
    weights = np.concatenate([keras.ops.convert_to_numpy(kernel).ravel() for kernel in kernels])
    return np.mean(np.abs(weights) < 0.001)


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
    """Train one network without a penalty and with five kinds of it, and compare test accuracy and small weights.

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
        columns={"weights near zero": "share of the kernels' weights that are smaller than 0.001"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (options, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes, options.get("regularizer"), options.get("constraint"))
            # Ends at a rate of zero, which leaves little noise between seeds.
            schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
            model.compile(
                optimizer=build_optimizer(schedule, options.get("weight_decay")),
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
            comparison.add_figure(variant, run.seed, "weights near zero", near_zero(model))
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
