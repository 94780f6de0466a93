"""Quantization: stores the weights of a trained network in 8 or 4 bits.

Symptom: the trained network is too large for where it is to run.

Technique: w ≈ s · (q - z), with q a whole number of 8 or 4 bits. The scale s is one for each output channel or, with 4
bits, for each group of 128 weights of it, which then has a zero z of its own, too. A weight is wrong by half a step s
at most. Keras: `model.quantize`; layers of `Dense`, `EinsumDense` and `Embedding` change, convolutions do not (Keras
3.15).

Change: a line after training:

    model.quantize("int8")
    keras.Model(model.inputs, model.outputs).save("model.keras")

The second line leaves the optimizer out, whose state makes Adam's files three times as large: `include_optimizer=False`
does not reach this format.

Look for: the size of the file, and the accuracy, which 8 bits should keep. With 4 bits see what the groups are worth.
The time to predict tells whether your hardware multiplies whole numbers: where it does not, nothing is faster.

Cost: a second after training. "int8" also rounds the inputs of each layer, for each example anew. The network can be
trained no further, but for LoRA. Keras has GPTQ, too, which rounds one weight after another and lets the others make up
for the error that is seen on calibration data. It is not among the variants: in Keras 3.15 it never looks at these data
and rounds as "int4" does, without an error (keras #23512, repaired since).

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023:
a language model of 175 billion parameters loses 0.03 of a perplexity of 8.34 with 4 bits by GPTQ, and 2.2 by plain
rounding.
"""

import tempfile
import time
from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# What `quantize` is given. By default int4 has groups of 128 weights.
VARIANTS = {
    "float32": None,
    "int8": "int8",
    "int4": "int4",
    "int4, no groups": keras.quantizers.Int4QuantizationConfig(block_size=None),
}

# The variant that answers the recipe's question, and its figure.
HEADLINE = ("int8", "KB")

# Predictions that are timed, each of so many images.
REPETITIONS, TIMED = 20, 256

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
    for _ in range(2):
        x = layers.Dense(256, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def quantize(model, how):
    """Return a copy of a trained model, quantised as `Model.quantize` is told, or not if that is None."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    if how is not None:
        copy.quantize(**{"mode" if isinstance(how, str) else "config": how})  # the technique
    return copy


def store(model):
    """Return the size of a saved model in kilobytes, and the model that is loaded from there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        keras.Model(model.inputs, model.outputs).save(path)  # without the optimizer's state
        return path.stat().st_size / 1000, keras.saving.load_model(path)


def milliseconds(models, images):
    """Return {name: the median time to predict a batch of images}, of models by name, timed in turn."""
    seconds = {name: [] for name in models}
    for _ in range(REPETITIONS + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model.predict_on_batch(images)
            seconds[name].append(time.perf_counter() - start)
    # The first call compiles.
    return {name: 1000 * np.median(times[1:]) for name, times in seconds.items()}


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
):
    """Train a network, quantise it in three ways, and compare accuracy, size and time.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
    """
    train, validation, (images, labels), classes = load(dataset, data_dir, limit)
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="accuracy",
        margin=0.01,
        test=(images, labels),
        same_start=False,  # one training serves all variants of a seed
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={
            "KB": "kilobytes of the saved network",
            "ms a batch": f"milliseconds to predict {TIMED} images, the median of {REPETITIONS} calls",
        },
        save=save,
    ) as comparison:
        # The loop skips the variants that the first one's training has served.
        for _, _, run in comparison.runs(VARIANTS, seeds):
            model = build_model(images.shape[1:], classes)
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.001, epochs * steps)),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            model.fit(*train, batch_size=batch_size, epochs=epochs, verbose=0)
            stored = {variant: store(quantize(model, how)) for variant, how in VARIANTS.items()}
            times = milliseconds({variant: loaded for variant, (_, loaded) in stored.items()}, validation[0][:TIMED])
            for variant, (kilobytes, loaded) in stored.items():
                predicted = loaded.predict(images, batch_size=256, verbose=0).argmax(axis=-1)
                comparison.add(variant, run.seed, {"accuracy": np.mean(predicted == labels)})
                comparison.add_figure(variant, run.seed, "KB", kilobytes)
                comparison.add_figure(variant, run.seed, "ms a batch", times[variant])
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
