"""Quantization: stores the weights of a trained network in 8 or 4 bits.

Symptom: the trained network is too large for where it is to run.

Technique: w ≈ s · q, with q a whole number of 8 or 4 bits and a scale s for each output channel, or for each group of
weights of it. Each weight is wrong by at most half a step s. GPTQ rounds the weights one after another, and lets those
that are not rounded yet make up for the error that the others have made on calibration data. Keras: `model.quantize`;
layers of `Dense`, `EinsumDense` and `Embedding` change, convolutions do not (Keras 3.15).

Change: a line after training:

    model.quantize("int8")
    keras.Model(model.inputs, model.outputs).save("model.keras")

The second line leaves the optimizer out, whose state makes Adam's files three times as large: `include_optimizer=False`
does not reach this format.

Look for: the size of the file, and the accuracy, which 8 bits should keep. With 4 bits see whether calibration wins
anything. The time to predict tells whether your hardware multiplies whole numbers: where it does not, the weights are
turned back into floats for each batch, and nothing is faster.

Cost: seconds after training; GPTQ takes longer, and needs images like those to come. "int8" also rounds the inputs of
each layer, for each example anew. The network can be trained no further, but for LoRA. In Keras 3.15, GPTQ fails for
groups other than 128 weights if a layer has more inputs, cannot be saved while its configuration holds the layers, and
cannot be loaded: keep the float32 network, and quantise where it runs.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", ICLR 2023,
whose language model of 175 billion parameters loses 0.03 of perplexity 8.34 with 4 bits, and 2.2 with plain rounding.
"""

import contextlib
import io
import tempfile
import time
from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers, ops

from callbacks import Comparison

# How the weights are quantised.
VARIANTS = {"float32": None, "int8": "int8", "int4": "int4", "int4, GPTQ": "gptq"}

# The variant that answers the recipe's question, and its figure.
HEADLINE = ("int8", "KB")

# Units of a hidden layer.
WIDTH = 256

# Training images that GPTQ sees; predictions that are timed, each of so many images.
CALIBRATION, REPETITIONS, TIMED = 128, 20, 256

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
        x = layers.Dense(WIDTH, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def quantize(model, mode, images):
    """Return a quantised copy of a trained model; GPTQ sees `images` of shape (examples, height, width, channels)."""
    copy = keras.models.clone_model(model)
    copy.set_weights(model.get_weights())
    if mode == "gptq":
        first, *dense = copy.layers[1:]
        config = keras.quantizers.GPTQConfig(
            # Keras asks for texts, cut into sequences of tokens. Here a text is one token, the number of an image.
            dataset=[np.arange(len(images))],
            tokenizer="none",
            num_samples=len(images),
            sequence_length=1,
            quantization_layer_structure={
                "pre_block_layers": [lambda numbers: first(ops.take(images, numbers[:, 0], axis=0))[:, None]],
                "sequential_blocks": dense,
            },
        )
        with contextlib.redirect_stdout(io.StringIO()):  # it shows its progress
            copy.quantize(config=config)
        config.quantization_layer_structure = None  # the layers hold it, and cannot be saved with themselves
    elif mode is not None:
        copy.quantize(mode)  # the technique
    return copy


def store(model, mode):
    """Return the size of a saved model in kilobytes, and the model that is loaded from there."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        keras.Model(model.inputs, model.outputs).save(path)  # without the optimizer's state
        # What GPTQ has made Keras 3.15 cannot load.
        loaded = model if mode == "gptq" else keras.saving.load_model(path)
        return path.stat().st_size / 1000, loaded


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
            stored = {
                variant: store(quantize(model, mode, train[0][:CALIBRATION]), mode)
                for variant, mode in VARIANTS.items()
            }
            times = milliseconds({variant: loaded for variant, (_, loaded) in stored.items()}, validation[0][:TIMED])
            for variant, (kilobytes, loaded) in stored.items():
                predicted = loaded.predict(images, batch_size=256, verbose=0).argmax(axis=-1)
                comparison.add(variant, run.seed, {"accuracy": np.mean(predicted == labels)})
                comparison.add_figure(variant, run.seed, "KB", kilobytes)
                comparison.add_figure(variant, run.seed, "ms a batch", times[variant])
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
