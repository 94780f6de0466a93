"""Gradient accumulation: averages the gradients of several small batches, and then makes one step with the average.

Symptom: the batch that you want does not fit into memory. A smaller one fits, and you ask whether accumulated
gradients are as good as the large batch.

Technique: g = (1/k) Σ g_j over k batches of b examples, then one step with g. A mean of means over parts of equal size
is the mean of the whole: it is the step of one batch of k · b examples. That holds as long as an example's output does
not depend on the rest of its batch. With batch normalisation it does, and normalises over b examples, not over k · b.
Keras: `gradient_accumulation_steps=k` of any optimizer.

Change: one argument of the optimizer, and the batch size of `fit`:

    optimizer = keras.optimizers.SGD(rate, momentum=0.9, gradient_accumulation_steps=10)
    model.fit(..., batch_size=32)

Look for: the distance between the final weights and those of the large batch. Without batch normalisation only rounding
is between them: nothing after a few epochs (`--epochs 4`), then more and more, for training enlarges any disturbance.
See what becomes of it with batch normalisation, and whether accuracy suffers. Compare the plain small batch, too, at
its own rate. It makes k steps where you make one: perhaps you did not need the large batch.

Cost: the time of k small batches for a step, and one copy of the weights for the sum; in return the outputs of b
examples are kept, not those of k · b. A schedule counts batches, not steps: its length is epochs times batches. `fit`
carries a sum that is not complete over to the next epoch, and after the last one it is lost: let k divide the number of
batches. A smaller last batch weighs as much as the others. Moving statistics and `use_ema` move with every batch, so
choose their momentum for batches, not for steps.

Source: Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", arXiv:1706.02677, section 3, on
means over parts of a batch and on batch normalisation, which they keep per part on purpose; Keras API, optimizers.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

SMALL = 32
LARGE = 320

# The batch size, the number of batches to a step, whether there is batch normalisation, and the best rate of GRID
# (--search). Accumulation has the rate of the large batch, for its steps are to be the same.
VARIANTS = {
    "batch 320": (LARGE, 1, False, 0.1),
    "10 × 32": (SMALL, LARGE // SMALL, False, 0.1),
    "batch 32": (SMALL, 1, False, 0.03),
    "320, batch norm": (LARGE, 1, True, 0.3),
    "10 × 32, batch norm": (SMALL, LARGE // SMALL, True, 0.3),
}

# The variant that answers the recipe's question.
HEADLINE = "10 × 32"

# Learning rates of gradient descent with momentum.
GRID = (0.01, 0.03, 0.1, 0.3, 1.0)

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


def build_model(image_shape, classes, normalised):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    x = layers.Flatten()(x)
    for _ in range(3):
        x = layers.Dense(100, use_bias=not normalised, kernel_initializer="he_normal")(x)
        if normalised:
            x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def outputs_in_megabytes(model, batch_size):
    """Return the size of all layers' outputs for one batch, in float32, which the backward pass needs."""
    return batch_size * sum(np.prod(layer.output.shape[1:]) for layer in model.layers) * 4 / 1e6


def trained_weights(model):
    """Return all trained weights as one array."""
    return np.concatenate([keras.ops.convert_to_numpy(weight).ravel() for weight in model.trainable_variables])


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 12,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one network with large batches, with the sum of small ones, and with small ones, and compare them.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each variant that does not accumulate, on validation data, in place of
            the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # batch normalisation has other weights; all others start equal, being drawn in one order
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={
            "distance to 320": "between the final weights and those of one batch of 320, over the length of their way",
            "outputs, MB": "all layers' outputs for one batch in float32, which are kept for the backward pass",
        },
        save=save,
    ) as comparison:
        own_rates = {variant: value for variant, value in VARIANTS.items() if value[1] == 1}
        loop = comparison.search(own_rates, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        ends = {}
        for variant, (batch_size, batches, normalised, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes, normalised)
            start = trained_weights(model)
            steps = -(-len(train[0]) // batch_size)
            # Ends at a rate of zero, which leaves little noise between seeds. A schedule counts batches, and a step is
            # made at the last of them: begun that much later, it gives each step the rate that the large batch has.
            schedule = keras.optimizers.schedules.CosineDecay(
                learning_rate, epochs * steps, warmup_target=learning_rate, warmup_steps=batches - 1
            )
            model.compile(
                optimizer=keras.optimizers.SGD(
                    schedule,
                    momentum=0.9,
                    gradient_accumulation_steps=batches if batches > 1 else None,  # the technique
                ),
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
            end = trained_weights(model)
            if batch_size == LARGE:
                ends[run.seed, normalised] = start, end
            # Not known if an earlier call, whose runs `save` has kept, trained with the large batch.
            if (run.seed, normalised) in ends:
                start, large = ends[run.seed, normalised]
                distance = np.linalg.norm(end - large) / np.linalg.norm(large - start)
                comparison.add_figure(variant, run.seed, "distance to 320", distance)
            comparison.add_figure(variant, run.seed, "outputs, MB", outputs_in_megabytes(model, batch_size))
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
