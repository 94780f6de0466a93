"""Normalized gradient: makes every step of gradient descent equally long, whatever the length of the gradient.

Symptom: gradients are tiny and the loss hardly moves. Or every change of the loss's scale asks for a new learning rate.

Technique: w ← w - η g / ‖g‖, with the norm of the gradients of all weights together: the direction is that of the
gradient, the length is always η. It is sometimes called Adagrad, which is another method: Adagrad keeps a sum of
squares for each weight, a ← a + g², and steps by -η g / √(a + ε). This changes the direction, and its steps shrink from
one to the next. Keras has it as `keras.optimizers.Adagrad`, where a starts at 0.1: much, where gradients are tiny.

Change: copy the class `NormalizedGradientDescent`, and pass it to `compile`:

    model.compile(optimizer=NormalizedGradientDescent(0.1), ...)

Look for: what dividing the loss by 100 does, when each optimizer keeps the learning rate that is best for the loss as
it is. The steps of SGD become a hundred times shorter. The squares that Adagrad sums are lost beside the 0.1 at which
it starts. The normalised gradient should not notice. With the loss as it is, compare what normalising alone does: it is
meant to save you a search, not to raise accuracy.

Cost: the norm at every step, a pass over all gradients; no number kept for each weight (Adagrad keeps one). Steps do
not shrink near a minimum by themselves: let the rate fall towards the end. Where gradients are small, the noise of a
small batch is scaled up with them. Do not combine it with `loss_scale_factor`. Adam divides out the scale as well, for
each weight by itself: see adaptive_optimizers.py.

Source: Shor, "Minimization Methods for Non-Differentiable Functions", Springer 1985; Hazan, Levy and Shalev-Shwartz,
"Beyond Convexity: Stochastic Quasi-Convex Optimization", NIPS 2015; for Adagrad, Duchi, Hazan and Singer, "Adaptive
Subgradient Methods for Online Learning and Stochastic Optimization", JMLR 12, 2011.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers, ops, optimizers

from callbacks import Comparison


@keras.saving.register_keras_serializable("normalized_gradient")
class NormalizedGradientDescent(optimizers.SGD):
    """Gradient descent along g / ‖g‖: every step has the length of the learning rate.

    The norm is that of all gradients together. Do not set `loss_scale_factor`, which would still divide the step.
    """

    def apply(self, grads, trainable_variables=None):
        squares = [ops.sum(ops.square(gradient)) for gradient in grads if gradient is not None]
        norm = ops.maximum(ops.sqrt(sum(squares)), 1e-12)  # a gradient of zero stays zero
        grads = [gradient if gradient is None else gradient / norm for gradient in grads]  # the technique
        super().apply(grads, trainable_variables)


# The optimizer, what the loss is divided by, and the best learning rate of GRID (--search), which is that for the loss
# as it is: who scales a loss does not search anew.
VARIANTS = {
    "SGD, loss / 100": (optimizers.SGD, 100, 0.3),
    "normalised, loss / 100": (NormalizedGradientDescent, 100, 0.3),
    "Adagrad, loss / 100": (optimizers.Adagrad, 100, 0.1),
    "SGD": (optimizers.SGD, 1, 0.3),
    "normalised": (NormalizedGradientDescent, 1, 0.3),
    "Adagrad": (optimizers.Adagrad, 1, 0.1),
}

# The variant that answers the recipe's question.
HEADLINE = "normalised, loss / 100"

# Learning rates.
GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

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
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    x = layers.Flatten()(x)
    for _ in range(3):
        x = layers.Dense(100, activation="relu", kernel_initializer="he_normal")(x)
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
    """Train one network by gradient descent, by the normalised gradient and by Adagrad, and with the loss scaled down.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each optimizer for the loss as it is, on validation data, in place of the
            comparison.
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
        save=save,
    ) as comparison:
        as_it_is = {name: value for name, value in VARIANTS.items() if value[1] == 1}
        loop = comparison.search(as_it_is, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for _, (new_optimizer, divisor, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=new_optimizer(optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                loss_weights=1 / divisor,
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
