"""Weight normalization: learns the length and the direction of each unit's weights apart.

Symptom: training is slow, and you do not want batch normalisation. An example's output is not to depend on the rest of
its batch.

Technique: w = g · v / ‖v‖ for each output unit, with g and v learned instead of w. Then ∇g = ∇w · v / ‖v‖ and
∇v = g / ‖v‖ · ∇w - g ∇g / ‖v‖² · v, which is at right angles to v: gradient descent makes v longer at every step, and
so turns it less and less. Keras has no such layer; the wrapper below serves `Dense` and convolutions.

Change: copy the class `WeightNormalization`, and wrap the layers:

    x = WeightNormalization(layers.Dense(128))(x)

Look for: test accuracy after a short training, for the promise is speed, beside that of batch normalisation. Each
variant has the learning rate that suits it best, and part of a gain in speed may come from a larger one: `--search`
shows which rates each of them bears. Compare the time of an epoch, too, and what is left with `--epochs 15`.

Cost: one length for each unit, time in every step, and no hyper-parameter. A kernel regulariser or constraint would act
on v, whose length does not matter to the output. Means and variances of the units are not normalised: the paper sets
the first g and biases from a batch of data for that, this recipe keeps g = ‖v‖.

Source: Salimans & Kingma, "Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural
Networks", NIPS 2016.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers, ops

from callbacks import Comparison

# The normalisation, and the best rate of GRID (--search).
VARIANTS = {
    "plain": ("none", 0.1),
    "weight norm": ("weight", 0.1),
    "batch norm": ("batch", 1.0),
}

# The variant that answers the recipe's question.
HEADLINE = "weight norm"

# Learning rates of gradient descent.
GRID = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)

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


@keras.saving.register_keras_serializable("weight_normalization")
class WeightNormalization(layers.Wrapper):
    """Has a layer compute with the kernel g · v / ‖v‖: v is the layer's own kernel, g a length for each output unit.

    The output units are the kernel's last axis, as in `Dense` and in convolutions. Since g starts as ‖v‖, the first
    outputs are those of the layer alone.
    """

    def build(self, input_shape=None):
        super().build(input_shape)
        self.g = self.add_weight(shape=self.layer.kernel.shape[-1:], initializer="ones", name="g")
        self.g.assign(self.length_of_v())

    def length_of_v(self):
        """Return ‖v‖ of shape (output units,)."""
        v = self.layer.kernel
        return ops.sqrt(ops.sum(ops.square(v), axis=tuple(range(len(v.shape) - 1))))

    def kernel(self):
        """Return g · v / ‖v‖, of the shape of v."""
        return self.g / self.length_of_v() * self.layer.kernel

    def call(self, inputs):
        weights = self.layer.trainable_variables
        weights = [self.kernel() if weight is self.layer.kernel else weight for weight in weights]
        outputs, _ = self.layer.stateless_call(weights, self.layer.non_trainable_variables, inputs)
        return outputs


def build_model(image_shape, classes, normalisation):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Flatten()(inputs)
    for _ in range(6):
        # Batch normalisation would subtract the bias again; its own β takes the bias's place.
        dense = layers.Dense(128, use_bias=normalisation != "batch", kernel_initializer="he_normal")
        if normalisation == "weight":
            dense = WeightNormalization(dense)  # the technique
        x = dense(x)
        if normalisation == "batch":
            # Keras's default momentum of 0.99 is slow where an epoch has few steps.
            x = layers.BatchNormalization(momentum=0.9)(x)
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 4,  # short: the promise is speed
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train one network without normalisation, with weight and with batch normalisation, each at its best rate.

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
        same_start=False,  # g, γ and β are weights of their own; the kernels start equal, for the seed makes them
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for _, (normalisation, learning_rate), run in loop:
            model = build_model(train[0].shape[1:], classes, normalisation)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.SGD(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
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
