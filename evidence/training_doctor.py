"""Measure what TrainingDoctor says of healthy and of sick runs, and of programs that people asked about in public.

    python -m evidence.training_doctor

trains in one process, with one thread, for about two hours; each model is written down as it ends, and an interrupted
measurement goes on when the command is given again. Seeds below 200 were used while the rules were made.
"""

import itertools
import json
from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers
from rich.console import Console
from rich.progress import track

from callbacks import TrainingDoctor
from callbacks.comparison import environment, write_whole
from evidence.faulty_programs import PROGRAMS
from evidence.recipes import ROOT
from evidence.tables import FITS, HEALTHY, PROGRAM, SICK_RUN, doctor_note, doctor_table, program_table, rich_table

RESULT = ROOT / "evidence" / "training_doctor.json"

# Seeds of each kind of run, from the first one on.
SEEDS = {HEALTHY: 20, SICK_RUN: 10, PROGRAM: 2}
FIRST_SEED = 200
PROBE = 64


def load():
    """Return (images, labels) of the embedded training and validation images."""
    splits = tfds.load(
        "fashion_mnist_10k",
        split=["train[:80%]", "train[80%:]"],
        data_dir=ROOT / "data",
        as_supervised=True,
        batch_size=-1,
        download=False,
    )
    return [tuple(array.numpy() for array in split) for split in splits]


# Healthy runs: each architecture, task, batch size and kind of fit.


def dense_network():
    return [layers.Flatten(), layers.Dense(64, activation="relu"), layers.Dropout(0.2), layers.Dense(32, "relu")]


def convolutional_network():
    return [
        layers.Conv2D(16, 3, use_bias=False),
        layers.BatchNormalization(momentum=0.9),
        layers.ReLU(),
        layers.MaxPooling2D(),
        layers.Flatten(),
        layers.Dense(32, activation="relu"),
    ]


def recurrent_network():
    return [layers.Reshape((14, 14)), layers.GRU(32)]


ARCHITECTURES = {"dense": dense_network, "convolutional": convolutional_network, "recurrent": recurrent_network}


def classification(images, labels):
    return labels, [layers.Dense(10)], keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def binary(images, labels):
    """Shoes against all else, 3 of the 10 classes."""
    return np.isin(labels, (5, 7, 9)).astype("float32"), [layers.Dense(1, "sigmoid")], "binary_crossentropy"


def skewed_regression(images, labels):
    """The exponential of the brightness, so that a few targets are many times the others."""
    brightness = images.mean(axis=(1, 2, 3))
    noise = np.random.default_rng(0).normal(0, 0.2, len(images))
    return np.exp(1.2 * (brightness - 0.29) / 0.15 + noise).astype("float32"), [layers.Dense(1)], "mean_squared_error"


TASKS = {"classification": classification, "binary": binary, "skewed regression": skewed_regression}

# Epochs of each batch size, of about as many steps as it takes.
EPOCHS = {8: 2, 32: 6, 128: 16}


def doctor_for(probe):
    return TrainingDoctor(probe, verbose=0)


def healthy(architecture, task, batch_size, train_data, validation_data):
    """Yield (kind of fit, doctor) of one model: trained, trained on, and with its first layer frozen."""
    counts = {"training": 1024, "validation": 256}
    parts = [
        (images[:count, ::2, ::2].astype("float32") / 255, labels[:count])
        for (images, labels), count in zip((train_data, validation_data), counts.values(), strict=True)
    ]
    (images, (targets, head, loss)), (other_images, (other_targets, _, _)) = (
        (images, TASKS[task](images, labels)) for images, labels in parts
    )
    model = keras.Sequential([keras.Input(images.shape[1:]), *ARCHITECTURES[architecture](), *head])
    for fit in FITS:
        if fit == "fine-tuning":
            model.layers[1].trainable = False
        if fit != "second fit":
            model.compile(keras.optimizers.Adam(0.002 if fit == "first fit" else 0.0002), loss)
        doctor = doctor_for((images[:PROBE], targets[:PROBE]))
        model.fit(
            images,
            targets,
            batch_size=batch_size,
            epochs=EPOCHS[batch_size],
            validation_data=(other_images, other_targets),
            verbose=0,
            callbacks=[doctor],
        )
        yield fit, doctor


# Sick runs


def dense(width=128, depth=2, activation="relu", scale=1 / 255, rate=0.0, last=(), **arguments):
    """Return a classifier with `depth` dense layers of `width` units."""
    model = keras.Sequential([keras.Input((28, 28, 1)), layers.Rescaling(scale), layers.Flatten()])
    for _ in range(depth):
        model.add(layers.Dense(width, activation=activation, **arguments))
        model.add(layers.Dropout(rate))
    for layer in (layers.Dense(10, **arguments), *last):
        model.add(layer)
    return model


def normalized():
    """Return a classifier whose statistics of inference hardly move."""
    hidden = [layers.Dense(128), layers.BatchNormalization(momentum=0.9999), layers.ReLU()]
    return keras.Sequential(
        [keras.Input((28, 28, 1)), layers.Rescaling(1 / 255), layers.Flatten(), *hidden, layers.Dense(10)]
    )


def partly_frozen():
    model = dense()
    model.layers[2].trainable = False
    return model


def adam(rate=0.001, **arguments):
    return keras.optimizers.Adam(rate, **arguments)


# What is wrong: (model, settings) of a run in which it is.
SICK = {
    "inputs out of range": lambda: (dense(scale=1.0), {}),
    "loss not finite": lambda: (
        dense(activation="tanh"),
        {"optimizer": keras.optimizers.SGD(10.0), "loss": "mean_squared_error"},
    ),
    "exploding gradients": lambda: (dense(), {"corrupt": 100}),
    "no gradient": lambda: (dense(last=[layers.Rescaling(0.0)]), {}),
    "vanishing gradients": lambda: (dense(width=64, depth=10, activation="sigmoid"), {}),
    "stuck at chance": lambda: (dense(kernel_initializer="zeros"), {}),
    "dead units": lambda: (dense(bias_initializer=keras.initializers.Constant(-20.0)), {}),
    "saturated units": lambda: (
        dense(activation="tanh", kernel_initializer=keras.initializers.RandomNormal(0, 3)),
        {"epochs": 2, "optimizer": adam(1e-4)},
    ),
    "rate too high": lambda: (dense(), {"optimizer": adam(0.3)}),
    "rate too low": lambda: (dense(), {"optimizer": adam(1e-6)}),
    "penalty too strong": lambda: (dense(kernel_regularizer=keras.regularizers.L2(0.3)), {}),
    "validation unlike training": lambda: (dense(), {"shuffle": True}),
    "batch normalization differs in inference": lambda: (normalized(), {}),
    "overfitting": lambda: (dense(width=512), {"epochs": 30, "examples": 1000}),
    "underfitting": lambda: (
        dense(width=1, depth=1, activation="linear"),
        {
            "optimizer": adam(keras.optimizers.schedules.ExponentialDecay(0.01, 250, 0.5)),
            "epochs": 20,
            "examples": 8000,
        },
    ),
    "plateau at a constant rate": lambda: (
        dense(width=32, activation="tanh"),
        {"optimizer": adam(0.03), "epochs": 20, "examples": 8000},
    ),
    "stopped while improving": lambda: (dense(), {"optimizer": keras.optimizers.SGD(0.005), "epochs": 5}),
    "clipping most of the time": lambda: (dense(), {"optimizer": adam(0.001, global_clipnorm=0.05)}),
    "layers frozen": lambda: (partly_frozen(), {}),
}


def sick(kind, train_data, validation_data):
    """Train one run that has what `kind` says, and return its doctor."""
    model, settings = SICK[kind]()
    (images, labels), (other_images, other_labels) = train_data, validation_data
    examples = settings.get("examples", 2000)
    images, labels = images[:examples].astype("float32"), labels[:examples]
    loss = settings.get("loss", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    if loss == "mean_squared_error":
        labels, other_labels = np.eye(10)[labels], np.eye(10)[other_labels]
    if settings.get("shuffle"):
        labels = np.random.default_rng(0).permutation(labels)
    probe = images[:PROBE].copy(), labels[:PROBE]
    if step := settings.get("corrupt"):
        images[::step] *= 1000
        probe = images[1:PROBE], labels[1:PROBE]
    model.compile(settings.get("optimizer", adam()), loss)
    doctor = doctor_for(probe)
    model.fit(
        images,
        labels,
        batch_size=64 if examples == 8000 else 32,
        epochs=settings.get("epochs", 8),
        validation_data=(other_images[:500], other_labels[:500]),
        verbose=0,
        callbacks=[doctor],
    )
    return doctor


# The measurement


def units(seeds):
    """Return (group, kind, seed) of each model, seed by seed, so that an unfinished measurement has some of all."""
    kinds = {
        PROGRAM: [f"{name}, {state}" for name in PROGRAMS for state in ("faulty", "repaired")],
        SICK_RUN: list(SICK),
        HEALTHY: [", ".join(map(str, kind)) for kind in itertools.product(ARCHITECTURES, TASKS, EPOCHS)],
    }
    by_seed = itertools.zip_longest(*([(group, seed) for seed in range(count)] for group, count in seeds.items()))
    return [
        (group, kind, FIRST_SEED + seed)
        for together in by_seed
        for group, seed in filter(None, together)
        for kind in kinds[group]
    ]


def measure(group, kind, seed, data):
    """Return a list with what was found in each run of one model."""
    keras.utils.clear_session()
    keras.utils.set_random_seed(seed)
    if group == HEALTHY:
        architecture, task, batch_size = kind.split(", ")
        doctors = healthy(architecture, task, int(batch_size), *data)
    elif group == SICK_RUN:
        doctors = [(None, sick(kind, *data))]
    else:
        name, state = kind.split(", ")
        doctors = [(None, PROGRAMS[name].build(state == "repaired").fit(doctor_for))]
    return [
        {
            "group": group,
            "kind": kind,
            "seed": seed,
            "fit": fit,
            "findings": [[finding.name, finding.level, finding.message] for finding in doctor.findings],
            "signs": {name: value for name, value in doctor.signs.items() if name != "outputs"},
        }
        for fit, doctor in doctors
    ]


def facts_of_programs():
    """Return {name of a public program: what the tables say of it}."""
    facts = "source", "fault", "exact", "symptoms"
    return {name: {fact: getattr(program, fact) for fact in facts} for name, program in PROGRAMS.items()}


def use_one_thread():
    """Hold TensorFlow, before its first operation, to one thread."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)


def main(*, seeds: PositiveInt | None = None, save: Path = RESULT):
    """Train healthy and sick runs and the public programs, and count what TrainingDoctor finds.

    Args:
        seeds: number of runs of each kind, for all kinds; by default 20 of healthy and 10 of sick runs, 2 of programs.
        save: JSON file that receives every run's findings and figures.
    """
    data = load()
    chosen = units(dict.fromkeys(SEEDS, seeds) if seeds else SEEDS)
    finished = save.with_suffix(".unfinished")
    lines = finished.read_text(encoding="utf-8").splitlines() if finished.exists() else []
    runs = [run for line in lines for run in json.loads(line)]
    done = {(run["group"], run["kind"], run["seed"]) for run in runs}
    left = [unit for unit in chosen if unit not in done]
    for unit in track(left, "training", console=Console(stderr=True)):
        new = json.loads(json.dumps(measure(*unit, data)), parse_constant=str)
        runs += new
        with finished.open("a", encoding="utf-8") as file:
            file.write(json.dumps(new) + "\n")
    result = {"environment": environment(), "programs": facts_of_programs(), "runs": runs}
    console = Console()
    console.print(rich_table("What TrainingDoctor found", doctor_table(result)))
    console.print(rich_table("What it said of public programs", program_table(result)))
    console.print(doctor_note(result), style="dim", highlight=False)
    write_whole(save, json.dumps(result, indent=1) + "\n")
    finished.unlink(missing_ok=True)


if __name__ == "__main__":
    use_one_thread()
    cyclopts.run(main)
