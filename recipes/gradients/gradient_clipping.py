"""Gradient clipping: shortens gradients that are longer than a threshold, so that one bad step cannot undo training.

Symptom: the loss leaps up or becomes NaN in the middle of training. Recurrent networks do so most of all.

Technique: g ← g · min(1, θ / ‖g‖). A gradient over the threshold θ keeps its direction and gets the length θ; one under
it stays as it is. Dividing by ‖g‖ alone gives the length 1 whatever θ is: right for θ = 1 only. Keras:
`global_clipnorm` takes the norm of all gradients together; `clipnorm` that of each variable by itself, which changes
the direction of the whole; `clipvalue` cuts each element to [-θ, θ], which changes it too. Only one of them may be set.

Change: one argument of the optimizer:

    optimizer = keras.optimizers.SGD(0.3, global_clipnorm=1.0)

Look for: runs that end in NaN without clipping, at a rate at which those with clipping learn. Then what this is worth:
compare with the network without clipping at the best of the rates that it survives. The picture has the largest norm of
the gradient in each epoch, before clipping (NaN, and larger ones, as 10⁴). The share of steps with a norm over 1 is the
share that is clipped for "global norm 1". If it is near 1, the threshold is no guard against rare bad steps, but sets
the length of nearly all of them.

Cost: the norms of the gradients at every step, and one hyper-parameter, the threshold, for which the paper advises half
to ten times the usual norm. A gradient with a NaN stays one; with `global_clipnorm` it makes all gradients NaN.

Source: Pascanu, Mikolov and Bengio, "On the Difficulty of Training Recurrent Neural Networks", ICML 2013.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison, GradientNorms

# The clipping, and the best rate of GRID (--search); without clipping the best of those at which no run fails.
VARIANTS = {
    "unclipped": ({}, 0.03),
    "global norm 1": ({"global_clipnorm": 1.0}, 0.3),
    "each norm 0.3": ({"clipnorm": 0.3}, 1.0),
    "each value 0.03": ({"clipvalue": 0.03}, 0.3),
}

# What clipping is for: the rate of the others without it. The search, which tries all rates anyway, leaves it out.
FAILING = {"unclipped, rate 0.3": ({}, 0.3)}

# The variant that answers the recipe's question.
HEADLINE = "global norm 1"

# Learning rates of gradient descent.
GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

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
    """Return a classifier that reads images of `image_shape` (height, width, channels) row by row, and gives logits."""
    inputs = keras.Input(image_shape)
    x = layers.Reshape((image_shape[0], -1))(inputs)
    # Unrolled, as TensorFlow's graph optimiser complains of the loop that it would be else.
    x = layers.SimpleRNN(64, activation="relu", unroll=True)(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train a recurrent network, which reads images row by row, with and without clipping of its gradients.

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
        columns={"norm over 1": "share of the steps whose gradient, before clipping, was longer than 1 or not finite"},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS | FAILING, seeds)
        for variant, (clipping, learning_rate), run in loop:
            # Ends at a rate of zero, which leaves little noise between seeds.
            schedule = keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)
            model = build_model(train[0].shape[1:], classes)
            model.compile(
                optimizer=keras.optimizers.SGD(schedule, **clipping),  # the technique
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            gradient_norms = GradientNorms(every=1, log=False)
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[gradient_norms, run],
            )
            norms = np.fmin(gradient_norms.history["all"], 1e4)  # NaN counts as 1e4, too
            comparison.add_figure(variant, run.seed, "norm over 1", np.mean(norms > 1))
            largest = norms.reshape(epochs, -1).max(axis=1)
            comparison.add_signal(variant, run.seed, "largest gradient norm", largest, by="epoch", scale="log")
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
