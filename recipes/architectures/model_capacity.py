"""Model capacity: sets the number of parameters against that of training images, and measures both.

Symptom: you do not know whether a larger network or more data would help. Accuracy is low on the training images, too
(too little capacity), or much higher on them than on others (overfitting).

Technique: a hidden layer of w units between d inputs and k classes has w (d + 1) + k (w + 1) parameters. A wider one
can fit more, and learns images by heart sooner; more images make that harder. The number of parameters alone decides
nothing: from the epoch of the lowest validation loss on, a network overfits, and that epoch can be measured. Keras:
`layers.Dense(width)`, `model.count_params()`.

Change: one argument. Try a network four times as wide, and one a quarter as wide:

    x = layers.Dense(256, activation="relu")(x)

Look for: the table says what width does with all training images; the picture, what it does with fewer. Compare the
step from one width to the next with the step from one number of images to the next: that is your question, a larger
network or more data. A small gap with a low accuracy is too little capacity. A large gap alone does no harm: see
whether test accuracy falls where the gap is widest. Where the best epoch is the last one, overfitting has not begun.

Cost: parameters and operations grow with the width, the time of an epoch more slowly. Give each number of images
equally many training steps, as here, where a small set is repeated to the number of all images. With equally many
passes, small sets would have fewer steps, and would look as though they overfitted less.

Source: Zhang et al., "Understanding Deep Learning Requires Rethinking Generalization", ICLR 2017; Belkin et al.,
"Reconciling Modern Machine-Learning Practice and the Classical Bias-Variance Trade-Off", PNAS 116, 2019.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The number of hidden units, and the best of GRID for all training images (--search).
VARIANTS = {"width 64": (64, 0.003), "width 256": (256, 0.003), "width 16": (16, 0.01), "width 4": (4, 0.001)}

# The variant that answers the recipe's question: does a network four times as wide help?
HEADLINE = "width 256"

# Learning rates of Adam.
GRID = (0.0003, 0.001, 0.003, 0.01, 0.03)

# The training sets, as shares of all training images.
SHARES = (1 / 16, 1 / 4, 1)

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


def build_model(image_shape, classes, width):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    x = layers.Flatten()(x)
    x = layers.Dense(width, activation="relu")(x)  # the technique
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
    """Train networks of four widths on three training sets, and compare training and test accuracy.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over as many images as all training images; a smaller training set is repeated to that number.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each width, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    images, labels = train
    batch_size = 128
    steps = -(-len(images) // batch_size)
    # A search looks at all images only.
    sizes = [len(images)] if search else sorted({max(1, round(share * len(images))) for share in SHARES})
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # the variants differ in shape
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={"parameters": "of the whole network"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (width, learning_rate), run in loop:
            # Each seed has training sets of its own, the smaller ones parts of the larger ones.
            order = np.random.default_rng(run.seed).permutation(len(images))
            results = []
            for size in sizes:
                keras.utils.set_random_seed(run.seed)  # the sizes start equal
                model = build_model(images.shape[1:], classes, width)
                # Ends at a rate of zero, which leaves little noise between seeds.
                schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
                model.compile(
                    optimizer=keras.optimizers.Adam(schedule),
                    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                    metrics=["accuracy"],
                    steps_per_execution=min(steps, STEPS_PER_CALL),
                )
                # Repeated to the number of all images, a small set gets as many training steps as a large one.
                repeated = np.resize(order[:size], len(order))
                history = model.fit(
                    images[repeated],
                    labels[repeated],
                    batch_size=batch_size,
                    epochs=epochs,
                    validation_data=validation,
                    verbose=0,
                    # The table and its verdicts are those of all training images.
                    callbacks=[run] if size == len(images) else [],
                )
                if size == len(images):
                    metrics = comparison.result.runs[-1]["metrics"]
                else:
                    parts = {"train": (images[order[:size]], labels[order[:size]]), "test": test}
                    metrics = {
                        split: model.evaluate(*data, verbose=0, return_dict=True) for split, data in parts.items()
                    }
                results.append((metrics, 1 + np.argmin(history.history["val_loss"])))
            if search:
                continue
            comparison.add_figure(variant, run.seed, "parameters", model.count_params())
            signals = {
                "test accuracy": [metrics["test"]["accuracy"] for metrics, _ in results],
                "gap": [metrics["train"]["accuracy"] - metrics["test"]["accuracy"] for metrics, _ in results],
                "best epoch": [best_epoch for _, best_epoch in results],
            }
            for name, values in signals.items():
                at = [f"{size:,}" for size in sizes]
                comparison.add_signal(variant, run.seed, name, values, by="number of training images", at=at)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
