"""Stochastic depth: skips residual blocks at random in training, so that no block can rely on all the others.

Symptom: your residual network is deep, and overfits. You look for "drop path" in Keras, and find no layer of that name.

Technique: y = x + b · F(x) / (1 - p), with b = 0 with probability p and else 1, drawn anew for each example, block and
step. Where b is 0, the block is skipped as a whole. In evaluation y = x + F(x). p rises linearly with depth, from 0
before the first block to its highest at the last: the later blocks can be spared, what the first ones find is used by
all. Keras: `Dropout` with a `noise_shape` that has a 1 in each place but the first, so that a whole example shares one
draw. (The paper divides by nothing, and multiplies F by 1 - p in evaluation, which is the same up to a scale of F.)

Change: one layer at the end of each block, before the sum; `(None, 1)` behind dense layers:

    x = layers.Add()([x, layers.Dropout(0.2, noise_shape=(None, 1, 1, 1))(block(x))])

The paper's last block has p = 0.5; for a network of a few blocks, or a short training, begin with 0.1 or 0.2.

Look for: whether the gap between training and test accuracy closes, and whether test accuracy rises with it. It can
rise only if the network was overfitting, and training gets slower: if it falls, lower p or train longer, as with
dropout. Then compare the linear rule with one p for all blocks, at about as many skipped blocks.

Cost: a draw for each example and block, and one hyper-parameter. No time is saved: F is computed, then dropped. The
paper skips a block for the whole batch, which does save time. Without a sum there is nothing to skip to: it needs
residual blocks. `Dropout` without `noise_shape` drops single units, which is another method. Batch normalisation after
the sums learns variances that hold with blocks skipped only, so this network normalises by layer. The class
`StochasticDepth` in Keras's ConvNeXt is no public API, and draws without a seed of its own.

Source: Huang et al., "Deep Networks with Stochastic Depth", ECCV 2016: an error of 4.91 % on CIFAR-10 with 1202 layers.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The probabilities to skip a block, before the first and at the last (linear between), and the best of GRID (--search).
VARIANTS = {
    "all blocks": (0.0, 0.0, 0.003),
    "up to 0.2": (0.0, 0.2, 0.003),
    "up to 0.5": (0.0, 0.5, 0.003),
    "0.25 everywhere": (0.25, 0.25, 0.003),
}

# The variant that answers the recipe's question: the paper's.
HEADLINE = "up to 0.5"

# Learning rates of Adam.
GRID = (0.0003, 0.001, 0.003, 0.01)

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


def build_model(image_shape, classes, first, last, blocks=8):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Dense(64)(layers.Flatten()(inputs))
    for probability in np.linspace(first, last, blocks + 1)[1:].tolist():
        change = layers.LayerNormalization()(x)
        change = layers.Dense(64, activation="relu", kernel_initializer="he_normal")(change)
        change = layers.Dense(64)(change)
        # One draw for all the units of an example.
        change = layers.Dropout(probability, noise_shape=(None, 1))(change)  # the technique
        x = layers.Add()([x, change])
    x = layers.LayerNormalization()(x)
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
    """Train one residual network with all its blocks, and with blocks skipped at random, and compare test accuracy.

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
    batch_size = 256
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
        for _, (first, last, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes, first, last)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
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
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
