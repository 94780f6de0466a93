"""Normalization layers: batch, layer, group and RMS normalisation, with batches of 128 and of 4 examples.

Symptom: batch normalisation costs accuracy, as only small batches fit into memory.

Technique: three compute γ · (x - μ) / √(σ² + ε) + β, and differ in where the mean μ and the variance σ² come from: for
each unit from the batch (`keras.layers.BatchNormalization`), for each example from all its units
(`LayerNormalization`), or for each example from groups of its units (`GroupNormalization`); ε = 0.001. RMS
normalisation (`RMSNormalization`) subtracts and adds nothing: γ · x / √(mean of x² + ε) over the units of an example,
with ε = 0.000001. In training, batch normalisation makes an example's output depend on the rest of its batch. The
others do not, and they do the same at inference as in training.

Change: one line between the weights and the activation:

    x = layers.LayerNormalization()(x)

Look for: the change of test accuracy from batch size 128 to 4. Batch normalisation loses 5 points (0.811 to 0.759):
the mean and variance of 4 examples are so noisy that training accuracy as logged is 0.68, that of `evaluate` 0.78.
The other layers gain 2.7 to 3.7 points (medians), and so does the network without one, since 4 examples a batch make
32 times as many steps; their means at size 4 lie between 0.805 and 0.810. At size 128 batch normalisation has the
highest mean; group is measurably below it, while none, layer and RMS are not at five seeds.

Cost: processor time for an epoch at size 128, relative to none: batch 1.15, layer 1.37, group 1.38, RMS 1.05. Every
size has a learning rate of its own. Batch normalisation adds the momentum of its moving statistics, group normalisation
the number of groups, which must divide the number of units. In a convolutional network batch normalisation averages
over positions as well, so that 4 images hold more values for it.

Source: Wu & He, "Group Normalization", ECCV 2018 (ResNet-50 on ImageNet, 2 images a batch: 10.6 points less error than
with batch normalisation); Ba, Kiros & Hinton, "Layer Normalization", 2016; Zhang & Sennrich, "Root Mean Square Layer
Normalization", NeurIPS 2019.
"""

from pathlib import Path

import cyclopts
import keras
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The layer, the examples in a batch, and the learning rate: the best for both on validation data, in one grid for all
# layers (0.001 to 0.3 at size 4, 0.01 to 1.0 at size 128). Validation accuracy over three seeds:
#   size 4    0.001   0.003   0.01    0.03    0.1     0.3     size 128  0.01    0.03    0.1     0.3     1.0
#   batch    0.7163  0.7537  0.7553  0.7633  0.7633  0.7173            0.7545  0.8023  0.8170  0.7967  0.8015
#   none     0.7795  0.8007  0.8080  0.7937  0.7342  0.0980            0.6880  0.7537  0.7740  0.7270  0.0975
#   layer    0.7967  0.8132  0.8098  0.8010  0.7992  0.7708            0.7450  0.7838  0.7783  0.7697  0.6027
#   group    0.8027  0.8103  0.8092  0.7853  0.7878  0.7390            0.7532  0.7783  0.7750  0.7475  0.5120
#   RMS      0.8003  0.8148  0.8132  0.8072  0.7878  0.5235            0.7452  0.7822  0.7838  0.7640  0.5508
VARIANTS = {
    "batch, size 128": ("batch", 128, 0.1),
    "batch, size 4": ("batch", 4, 0.03),
    "none, size 128": ("none", 128, 0.1),
    "none, size 4": ("none", 4, 0.01),
    "layer, size 128": ("layer", 128, 0.03),
    "layer, size 4": ("layer", 4, 0.003),
    "group, size 128": ("group", 128, 0.03),
    "group, size 4": ("group", 4, 0.003),
    "RMS, size 128": ("RMS", 128, 0.1),
    "RMS, size 4": ("RMS", 4, 0.003),
}

# The variant that answers the recipe's question.
HEADLINE = "layer, size 4"

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


def build_model(image_shape, classes, kind, batch_size):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    inputs = keras.Input(image_shape)
    x = layers.Rescaling(1 / 255)(inputs)
    x = layers.Flatten()(x)
    for _ in range(4):
        x = layers.Dense(128, use_bias=kind != "batch", kernel_initializer="he_normal")(x)
        if kind == "batch":
            # Smaller batches come more often: this way the moving statistics average as many examples at every size.
            x = layers.BatchNormalization(momentum=0.9 ** (batch_size / 128))(x)  # the technique
        elif kind == "layer":
            x = layers.LayerNormalization()(x)  # the technique
        elif kind == "group":
            x = layers.GroupNormalization(groups=8)(x)  # the technique
        elif kind == "RMS":
            x = layers.RMSNormalization()(x)  # the technique
        x = layers.ReLU()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 3,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
):
    """Train one network with each normalisation layer and without, in batches of 128 and of 4 examples.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data, the same number for both batch sizes.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    with Comparison(
        metric="accuracy",
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # the layers have weights of their own; the kernels start equal, for the seed makes them
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        save=save,
    ) as comparison:
        for variant, (kind, batch_size, learning_rate), run in comparison.runs(VARIANTS, seeds):
            model = build_model(train[0].shape[1:], classes, kind, batch_size)
            model.compile(
                optimizer=keras.optimizers.SGD(learning_rate),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=["accuracy"],
                # The same arithmetic as with one, in half the time: a step of 4 images is shorter than what `fit`
                # does between two steps.
                steps_per_execution=32,
            )
            model.fit(
                *train,
                batch_size=batch_size,
                epochs=epochs,
                validation_data=validation,
                verbose=0,
                callbacks=[run],
            )
            if batch_size == 4:
                accuracy = {
                    other["variant"]: other["metrics"]["test"]["accuracy"]
                    for other in comparison.result.runs
                    if other["seed"] == run.seed
                }
                change = accuracy[variant] - accuracy[f"{kind}, size 128"]
                comparison.add_figure(variant, run.seed, "change from size 128", change)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
