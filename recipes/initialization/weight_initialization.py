"""Weight initialization: scales the first weights so that signals keep their size, layer after layer.

Symptom: a deep network learns nothing from the first epoch on, or only slowly. Its deep layers give nearly the same
output for every input (signals vanish), or figures that are huge, infinite or saturated (signals explode).

Technique: a sum of n inputs of unit variance with weights of standard deviation σ has the deviation σ·√n; with N(0, 1)
it is √n, not n. So σ = 1/√n_in keeps a linear signal as it is (LeCun); ReLU, which passes half of the mean square on,
needs √(2 / n_in) (He); √(2 / (n_in + n_out)), the root over the whole fraction, is the compromise between the way
forward and back (Glorot). With σ = 1/n each layer divides the signal by √n. Keras: `kernel_initializer`; its default is
Glorot's.

Change: one argument of each hidden layer:

    x = layers.Dense(256, activation="relu", kernel_initializer="he_normal")(x)

Look for: the two panels by layer, on logarithmic axes, both measured before the first update: the deviation of the
activations, and the norm of the gradient. A level line is what you want; one that climbs or falls does so by a constant
factor a layer. Then see which of these starts training gets over: each variant has the learning rate that suits it
best, if one does. `--activation tanh` shows which start fits that function.

Cost: none; it is one argument. Batch normalisation and residual connections make the choice matter less.

Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", AISTATS 2010;
He et al., "Delving Deep into Rectifiers", ICCV 2015.
"""

from pathlib import Path
from typing import Literal

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import initializers, layers

from callbacks import ActivationStatistics, Comparison, GradientNorms

# The initializer for a layer of `n` inputs, and the best rate of GRID for ReLU (--search). Each layer needs an
# initializer of its own, as an object gives the same values whenever it is called.
VARIANTS = {
    "Glorot": (lambda n: initializers.GlorotUniform(), 0.003),
    "LeCun": (lambda n: initializers.LecunNormal(), 0.001),
    "He": (lambda n: initializers.HeNormal(), 0.001),
    "N(0, 1)": (lambda n: initializers.RandomNormal(stddev=1.0), 0.03),
    "uniform ±0.05": (lambda n: initializers.RandomUniform(-0.05, 0.05), 0.3),
    "deviation 1/n": (lambda n: initializers.RandomNormal(stddev=1 / n), 0.3),
}

# The variant that answers the recipe's question.
HEADLINE = "He"

# Learning rates of Adam.
GRID = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)

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


def build_model(image_shape, classes, initializer, activation="relu", depth=20, width=128):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Flatten()(inputs)
    for _ in range(depth):
        x = layers.Dense(width, activation, kernel_initializer=initializer(x.shape[-1]))(x)  # the technique
    return keras.Model(inputs, layers.Dense(classes)(x))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 3,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    activation: Literal["relu", "tanh"] = "relu",
    search: bool = False,
):
    """Train a network of 20 layers from six initial scales of its weights, and compare signals and test accuracy.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        activation: activation function of the hidden layers.
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
        same_start=False,  # the start is the subject
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "activation": activation},
        columns={"last / first": "deviation of the activations of layer 20 over that of layer 1, before training"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (initializer, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes, initializer, activation)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            statistics = ActivationStatistics(train[0][:256], log=False)
            norms = GradientNorms(every=epochs * steps, log=False)  # at the first step, before any weight has changed
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[statistics, norms, run],
            )
            hidden = norms.layers[:-1]
            deviations = [statistics.history[layer][0]["std"] for layer in hidden]  # before training
            gradients = [norms.history[layer][0] for layer in hidden]
            comparison.add_figure(variant, run.seed, "last / first", deviations[-1] / deviations[0])
            comparison.add_signal(variant, run.seed, "deviation of activations", deviations, scale="log")
            comparison.add_signal(variant, run.seed, "norm of gradient", gradients, scale="log")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
