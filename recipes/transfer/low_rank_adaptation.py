"""Low-rank adaptation: adapts a trained network by two thin matrices a layer, and leaves its own weights as they are.

Symptom: to adapt the network you have to train all of its weights. The optimizer's memory does not fit, and for every
task there is another copy of the whole.

Technique: W is kept, and W + A B is used in its place, with A of shape (inputs, r) and B of shape (r, outputs). B
begins at zero, so that training begins at what the network was. The change A B has rank r at most: it can turn the
layer's output in r directions. Only A, B, biases and the head are trained. Keras: `enable_lora(rank)` of `Dense`,
`EinsumDense`, `Embedding` and convolutions.

Change: one line a layer, before `compile`:

    for layer in base.layers:
        if isinstance(layer, layers.Dense):
            layer.enable_lora(4)

`model.save_weights` saves W + A B merged, so that a network without adaptation can load it.

Look for: the least rank that is as good as training all weights, beside the number of weights that are trained and the
optimizer's memory. Then compare with the head alone, which trains fewer still: if that is enough, you need no
adaptation.

Cost: another product of matrices in each layer while it is trained, none once it is merged. Two hyper-parameters: the
rank, and a rate of its own, which is larger than that for all weights. It saves memory for the optimizer and for
copies, not for activations. What was learned has to be near to what is wanted: a change of low rank is a small one.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, who adapt GPT-3 with a
ten-thousandth of its weights.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The rank, 0 for the head alone and None for all weights, and the best rate of GRID (--search).
VARIANTS = {
    "all weights": (None, 0.001),
    "head alone": (0, 0.1),
    "rank 1": (1, 0.01),
    "rank 4": (4, 0.003),
    "rank 16": (16, 0.003),
}

# The variant that answers the recipe's question.
HEADLINE = "rank 4"

# Learning rates of Adam.
GRID = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)

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
    """Return layers that give 256 features of an image of `image_shape` (height, width, channels)."""
    x = inputs = keras.Input(image_shape)
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dense(256, activation="relu")(x)
    return keras.Model(inputs, x)


def build_model(base, classes, rank):
    """Return a classifier upon a base, of which all is trained (None), nothing (0), or a change of some rank."""
    base.trainable = rank != 0
    for layer in base.layers:
        if rank and isinstance(layer, layers.Dense):
            layer.enable_lora(rank)  # the technique
    inputs = keras.Input(base.input_shape[1:])
    return keras.Model(inputs, layers.Dense(classes)(base(inputs)))


def compile_and_fit(model, train, epochs, batch_size, learning_rate, **arguments):
    """Train a model, and return its history."""
    steps = -(-len(train[0]) // batch_size)
    model.compile(
        # Ends at a rate of zero, which leaves little noise between seeds.
        optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        steps_per_execution=min(steps, STEPS_PER_CALL),
    )
    return model.fit(*train, batch_size=batch_size, epochs=epochs, verbose=0, **arguments)


def count(weights):
    """Return the number of elements of a list of weights."""
    return int(sum(np.prod(weight.shape) for weight in weights))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    images: PositiveInt = 500,
    search: bool = False,
):
    """Train a network on the first half of the classes, and adapt it to the second by all weights or by few.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets, of four classes or more.
        data_dir: folder with the prepared data set.
        epochs: passes over the images of the second half.
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
        same_start=False,  # the variants differ in shape; the base starts equal
        pretrained=True,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "images": images},
        columns={
            "trained": "number of weights that are trained, the head's included",
            "optimizer, MB": "size of what the optimizer keeps, in float32",
        },
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (rank, learning_rate), run in loop:
            # Once a seed, for all variants.
            if run.seed not in pretrained:
                first = build_base(train[0].shape[1:])
                compile_and_fit(build_model(first, half, None), of_classes(train, 0, half), 8, 64, 0.001)
                pretrained[run.seed] = first.get_weights()
            # After the pretraining, which only a seed's first variant does.
            keras.utils.set_random_seed(run.seed)
            base = build_base(train[0].shape[1:])
            base.set_weights(pretrained[run.seed])
            model = build_model(base, classes - half, rank)
            compile_and_fit(model, few, epochs, 20, learning_rate, validation_data=validation, callbacks=[run])
            comparison.add_figure(variant, run.seed, "trained", count(model.trainable_variables))
            comparison.add_figure(variant, run.seed, "optimizer, MB", count(model.optimizer.variables) * 4 / 1e6)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
