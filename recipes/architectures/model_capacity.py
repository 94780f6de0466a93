"""Model capacity: sets a network's number of parameters against the number of training images, and measures both.

Symptom: you do not know whether a larger network or more data would help. Accuracy is low on the training images, too
(too little capacity); or it is much higher on them than on others (overfitting).

Technique: a hidden layer of w units between d inputs and k classes has w (d + 1) + k (w + 1) parameters. A wider one
can fit more, and fits images by heart sooner; more images make that harder. The number of parameters alone decides
nothing: a network overfits from the epoch on at which validation loss is lowest, and that epoch is what to measure.
Keras: `layers.Dense(width)`, `model.count_params()`.

Change: one argument:

    x = layers.Dense(256, activation="relu")(x)

Look for: the table, for all 8,000 images, and the picture, for 500, 2,000 and 8,000 (1 to 3 on its axis). Width 4, with
fewer parameters than images, underfits: 0.768 in training, 0.743 in test. Test accuracy rises with the width, to 0.833,
0.844 and 0.848, and so does the gap, from 2.6 points to 8.4; each width is measurably better than the first, which is
what the verdicts compare. 25 parameters for each image do no harm here, nor do 407, with 500 images: the widest has the
highest mean test accuracy with each number of images. "best epoch" is the one of the 20 with the lowest validation
loss: where it is 20, overfitting has not begun. Its median with 500 images is 18, 6, 3 and 2 from the narrowest to the
widest; with 2,000 it is 20, 14, 7 and 4; with 8,000 only the widest gets there, at 18. Four times as many images gain 2
to 4 points of test accuracy at every width; four times the width gains 9 points once, and then 1.1 and 0.4 (all
images).

Cost: parameters and operations grow with the width (256 units take 1.5 times as long as 4 for an epoch here, for much
of an epoch does not depend on the width). Each number of images is trained for the same number of steps: an epoch shows
8,000 images, and a smaller set is repeated to that number. With equal numbers of passes the small sets would have fewer
steps, and would look as though they overfitted less.

Source: Zhang et al., "Understanding Deep Learning Requires Rethinking Generalization", ICLR 2017; Belkin et al.,
"Reconciling Modern Machine-Learning Practice and the Classical Bias-Variance Trade-Off", PNAS 116, 2019.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from keras import layers

from callbacks import Comparison

# The number of hidden units.
VARIANTS = {"width 4": 4, "width 16": 16, "width 64": 64, "width 256": 256}

# The variant that answers the recipe's question.
HEADLINE = "width 256"

# The training sets, as shares of all training images.
SHARES = (1 / 16, 1 / 4, 1)

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


def build_model(image_shape, classes, width):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Rescaling(1 / 255)(inputs)
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
    # Validation accuracy on the whole training set, over three seeds, for the widths 4, 16, 64, 256 and 1024:
    # 0.634, 0.815, 0.842, 0.848 and 0.853 at 0.0003; 0.753, 0.834, 0.834, 0.852 and 0.854 at 0.001;
    # 0.742, 0.829, 0.842, 0.848 and 0.858 at 0.003; 0.434, 0.819, 0.831, 0.820 and 0.843 at 0.01.
    learning_rate: PositiveFloat = 0.001,
):
    """Train networks of four widths on three training sets, and compare training and test accuracy.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over as many images as all training images; a smaller training set is repeated to that number.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        learning_rate: step size of Adam, the same for every width, so that their epochs can be compared.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    images, labels = train
    sizes = sorted({max(1, round(share * len(images))) for share in SHARES})
    by = f"images: {', '.join(map(str, sizes))}"
    with Comparison(
        metric="accuracy",
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # the variants differ in shape
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "learning rate": learning_rate},
        save=save,
    ) as comparison:
        for variant, width, run in comparison.runs(VARIANTS, seeds):
            # Each seed has training sets of its own, the smaller ones parts of the larger ones.
            order = np.random.default_rng(run.seed).permutation(len(images))
            results = []
            for size in sizes:
                keras.utils.set_random_seed(run.seed)  # the sizes start equal
                model = build_model(images.shape[1:], classes, width)
                model.compile(
                    optimizer=keras.optimizers.Adam(learning_rate),
                    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                    metrics=["accuracy"],
                )
                # Repeated to the number of all images, a small set gets as many training steps as a large one.
                repeated = np.resize(order[:size], len(order))
                history = model.fit(
                    images[repeated],
                    labels[repeated],
                    batch_size=128,
                    epochs=epochs,
                    validation_data=validation,
                    verbose=0,
                    # The table and its verdicts are those of the whole training set.
                    callbacks=[run] if size == len(images) else [],
                )
                if size == len(images):
                    metrics = comparison.result.runs[-1]["metrics"]
                    on_train, on_test = metrics["train"]["accuracy"], metrics["test"]["accuracy"]
                else:
                    part = images[order[:size]], labels[order[:size]]
                    on_train, on_test = (model.evaluate(*data, verbose=0)[1] for data in (part, test))
                best_epoch = 1 + np.argmin(history.history["val_loss"])
                results.append((on_test, on_train - on_test, best_epoch))
            parameters = model.count_params()
            comparison.add_figure(variant, run.seed, "parameters", parameters)
            comparison.add_figure(variant, run.seed, "per image", parameters / len(images))
            comparison.add_figure(variant, run.seed, "training accuracy", on_train)
            comparison.add_figure(variant, run.seed, "best epoch", best_epoch)
            names = ("test accuracy", "gap", "best epoch")
            for name, values in zip(names, zip(*results, strict=True), strict=True):
                comparison.add_signal(variant, run.seed, name, values, by=by)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
