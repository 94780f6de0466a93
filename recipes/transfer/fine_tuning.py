"""Fine tuning: starts from a network that was trained on other classes, and decides which of its layers may change.

Symptom: you have few images, and a network that was trained on many others. You freeze it, and `evaluate` is far worse
than `fit` was.

Technique: a new output layer, the head, upon the trained layers, the base. Frozen, the base keeps its weights, and only
the head is trained: few weights for few images. Or all is trained, at a small rate, so that what was learned is kept.
Batch normalisation has two kinds of state: weights, and moving statistics, which are no weights and move in each call
in training mode. With `trainable = False` a `BatchNormalization` of Keras runs in inference mode, and both stay.

Change: one line before `compile`, for the whole base,

    base.trainable = False

or, to train it at a small rate, for its normalisation alone:

    for layer in base.layers:
        layer.trainable = not isinstance(layer, layers.BatchNormalization)

The call `base(inputs, training=False)`, which guides advise, does not hold the statistics: `fit` replaces the argument
by its own (Keras 3.15, issue 20285). A change of `trainable` counts from the next `compile` on.

Look for: what the trained start is worth against none, and the usual mistake, statistics that move while the weights
beside them stay. The column "in training mode" is what `fit` shows, the test figure is what you get. Compare the frozen
base with one that is trained at a small rate, with the head alone first, and with rates that fall towards the input:
which is best depends on how unlike the new classes are, and on how many images you have.

Cost: less than training anew: a frozen base needs no backward pass. You need the base's inputs: the same scaling, the
same size. The rate is a hyper-parameter anew, usually smaller where the base is trained.

Source: Yosinski et al., "How Transferable Are Features in Deep Neural Networks?", NIPS 2014; Howard and Ruder,
"Universal Language Model Fine-tuning for Text Classification", ACL 2018, for rates by layer; Keras issues 9214 and
20285 on statistics that move.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The rate of the head where it is trained first.
HEAD_RATE = 0.1

# What is trained beside the head, and the best rate of GRID (--search).
VARIANTS = {
    "from scratch": ("scratch", 0.03),
    "frozen": ("frozen", 0.1),
    "frozen, statistics move": ("statistics", 0.1),
    "all weights": ("all", 0.01),
    "all, statistics move": ("all moves", 0.03),
    "head first, then all": ("head first", 0.003),
    "rates by layer": ("by layer", 0.03),
}

# The variant that answers the recipe's question.
HEADLINE = "frozen"

# Learning rates of Adam.
GRID = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)

# How much smaller each layer's rate is than that of the next one ("rates by layer").
DECAY = 0.3

FILTERS = 16, 32, 64

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


def of_classes(data, first, end, number=None):
    """Return the images of the classes from `first` to before `end`, their labels counted from 0, `number` at most."""
    images, labels = data
    chosen = np.flatnonzero((first <= labels) & (labels < end))[:number]
    return images[chosen], labels[chosen] - first


def build_base(image_shape):
    """Return layers that give 64 features of an image of `image_shape` (height, width, channels)."""
    x = inputs = keras.Input(image_shape)
    for number, filters in enumerate(FILTERS):
        x = layers.Conv2D(
            filters, 3, 1 + (number > 0), "same", use_bias=False, kernel_initializer="he_normal", name=f"conv_{number}"
        )(x)
        x = layers.BatchNormalization(momentum=0.9, name=f"norm_{number}")(x)
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.GlobalAveragePooling2D()(x))


def build_model(base, classes, kind):
    """Return a classifier upon a base, of which is trained what the variant's kind says."""
    base.trainable = kind not in ("frozen", "statistics")  # the technique
    for layer in base.layers:
        if isinstance(layer, layers.BatchNormalization):
            # Where it is False the statistics stay, too.
            layer.trainable = kind in ("scratch", "statistics", "all moves")
            if kind == "statistics":
                layer.gamma.trainable = layer.beta.trainable = False
    inputs = keras.Input(base.input_shape[1:])
    x = base(inputs)
    return keras.Model(inputs, layers.Dense(classes, name="head")(x))


def new_optimizer(kind, learning_rate, steps):
    """Return Adam with a rate that falls along a cosine to zero, for "by layer" one for each layer."""

    def adam(rate):
        # Ends at a rate of zero, which leaves little noise between seeds.
        return keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps))

    if kind != "by layer":
        return adam(learning_rate)
    by_layer = {
        f".*_{number}/.*": adam(learning_rate * DECAY ** (len(FILTERS) - number)) for number in range(len(FILTERS))
    }
    return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(adam(learning_rate), by_layer))


def compile_and_fit(model, train, epochs, batch_size, optimizer, **arguments):
    """Train a model, and return its history."""
    model.compile(
        optimizer=optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=min(-(-len(train[0]) // batch_size), STEPS_PER_CALL),
    )
    return model.fit(*train, batch_size=batch_size, epochs=epochs, verbose=0, **arguments)


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    images: PositiveInt = 200,
    search: bool = False,
):
    """Train a network on the first half of the classes, and use it in six ways for few images of the second half.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets, of four classes or more.
        data_dir: folder with the prepared data set.
        epochs: passes over the few images.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        images: number of training images of the second half of the classes.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    half = classes // 2
    few, validation, test = (
        of_classes(data, half, classes, number) for data, number in ((train, images), (validation, None), (test, None))
    )
    pretrained = {}
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=few,
        validation=validation,
        test=test,
        same_start=False,  # the start is the subject
        pretrained=True,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "images": images},
        columns={
            "in training mode": "accuracy on the training images, normalised as in training",
            "trained": "number of weights that are trained, the head's included",
        },
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (kind, learning_rate), run in loop:
            base = build_base(train[0].shape[1:])
            if kind != "scratch":
                # Once a seed, for all variants.
                if run.seed not in pretrained:
                    old = of_classes(train, 0, half)
                    first = build_base(train[0].shape[1:])
                    steps = 8 * -(-len(old[0]) // 64)
                    compile_and_fit(
                        build_model(first, half, "scratch"), old, 8, 64, new_optimizer("scratch", 0.003, steps)
                    )
                    pretrained[run.seed] = first.get_weights()
                keras.utils.set_random_seed(run.seed)
                base.set_weights(pretrained[run.seed])
            batch_size = 20
            steps = -(-len(few[0]) // batch_size)
            length = epochs
            if kind == "head first" and epochs > 1:
                length = epochs - epochs // 2
                head = build_model(base, classes - half, "frozen")
                compile_and_fit(
                    head, few, epochs // 2, batch_size, new_optimizer("frozen", HEAD_RATE, epochs // 2 * steps)
                )
            model = build_model(base, classes - half, kind)
            if kind == "head first" and epochs > 1:
                model.get_layer("head").set_weights(head.get_layer("head").get_weights())
            optimizer = new_optimizer(kind, learning_rate, length * steps)
            compile_and_fit(model, few, length, batch_size, optimizer, validation_data=validation, callbacks=[run])
            with keras.StatelessScope():  # without it, a call in training mode would move the statistics
                logits = keras.ops.convert_to_numpy(model(few[0], training=True))
            comparison.add_figure(variant, run.seed, "in training mode", np.mean(logits.argmax(axis=1) == few[1]))
            trained = sum(np.prod(weight.shape) for weight in model.trainable_variables)
            comparison.add_figure(variant, run.seed, "trained", trained)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
