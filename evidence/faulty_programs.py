"""Faulty training programs that people asked for help with in public, each with its repair, written anew in Keras 3.

Many are from the benchmark of DeepFD (Cao et al., 2022), whose numbers are given, which took them from Stack Overflow
(SO) and GitHub. Their data are Fashion-MNIST, in the place of MNIST or CIFAR-10, or made here of random numbers.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow_datasets as tfds
from keras import layers

from evidence.recipes import ROOT

PROGRAMS = {}


@dataclasses.dataclass(frozen=True)
class Program:
    """A faulty program.

    Attributes:
        source: where it was asked about.
        fault, repair: what is wrong with it, and what mends it.
        exact: names of the findings that tell the fault, or one of its causes if there are several.
        symptoms: names of the findings that tell what follows from it.
        build: function that returns the `Run` of the faulty or, given True, of the repaired program.
    """

    source: str
    fault: str
    repair: str
    exact: tuple[str, ...]
    symptoms: tuple[str, ...]
    build: Callable[[bool], "Run"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A compiled model, its data, the numbers of the examples that are the probe, and other arguments of `fit`."""

    model: keras.Model
    inputs: np.ndarray
    targets: np.ndarray
    arguments: dict[str, Any]
    probe: Any = dataclasses.field(default_factory=lambda: slice(64))

    def fit(self, make_doctor):
        """Train with the doctor that `make_doctor` returns for the probe, and return it."""
        doctor = make_doctor((self.inputs[self.probe], self.targets[self.probe]))
        self.model.fit(self.inputs, self.targets, verbose=0, callbacks=[doctor], **self.arguments)
        return doctor


def program(source, fault, repair, exact, symptoms=()):
    """Enter a function, which builds the run, into `PROGRAMS` under its name."""

    def enter(build):
        PROGRAMS[build.__name__] = Program(source, fault, repair, exact, symptoms, build)
        return build

    return enter


def load(count):
    """Return (images, labels) of some training images and of some validation images, with values of 0 to 255."""
    splits = tfds.load(
        "fashion_mnist_10k",
        split=[f"train[:{count}]", "train[80%:85%]"],
        data_dir=ROOT / "data",
        as_supervised=True,
        batch_size=-1,
        download=False,
    )
    return [(images.numpy().astype("float32"), labels.numpy().astype("int64")) for images, labels in splits]


def scaled(count):
    """Return what `load` does, with values of 0 to 1."""
    return [(images / 255, labels) for images, labels in load(count)]


def one_hot(labels):
    return np.eye(10, dtype="float32")[labels]


def standardised(values):
    return ((values - values.mean(axis=0)) / values.std(axis=0)).astype("float32")


def sequential(shape, *stack):
    return keras.Sequential([keras.Input(shape), *stack])


def compiled(model, optimizer, loss):
    model.compile(optimizer, loss, metrics=["accuracy"])
    return model


@program(
    "DeepFD 1, SO 48385830",
    "no activations, squared error, rate 3, initial weights of deviation 1",
    "sigmoid, softmax, cross-entropy",
    ("rate too high", "output does not fit the loss", "no activation between layers"),
    ("loss not finite", "exploding gradients"),
)
def linear_digits(repaired):
    (images, labels), _ = scaled(4000)
    one = {"kernel_initializer": keras.initializers.RandomNormal(stddev=1)}
    hidden, last = ("sigmoid", "softmax") if repaired else (None, None)
    model = sequential((28, 28, 1), layers.Flatten(), layers.Dense(30, hidden, **one), layers.Dense(10, last, **one))
    loss = "categorical_crossentropy" if repaired else "mean_squared_error"
    model = compiled(model, keras.optimizers.SGD(0.3 if repaired else 3.0), loss)
    return Run(model, images, one_hot(labels), {"batch_size": 10, "epochs": 6})


@program(
    "DeepFD 3, SO 31556268",
    "exclusive or with an absolute error, at a low rate, for too few epochs",
    "squared error, Adam, more epochs",
    ("output does not fit the loss", "rate too low", "stopped while improving"),
    ("stuck at chance", "constant output", "underfitting", "plateau at a constant rate"),
)
def exclusive_or(repaired):
    inputs = np.array([[1, 1], [1, 0], [0, 0], [0, 1]], "float32")
    targets = np.array([[0], [1], [0], [1]], "float32")
    model = sequential((2,), layers.Dense(4, "sigmoid"), layers.Dense(1, "sigmoid"))
    optimizer = keras.optimizers.Adam(0.05) if repaired else keras.optimizers.SGD(0.05, momentum=0.11, nesterov=True)
    model = compiled(model, optimizer, "mean_squared_error" if repaired else "mean_absolute_error")
    return Run(model, inputs, targets, {"batch_size": 4, "epochs": 400})


@program(
    "DeepFD 6, SO 38648195",
    "several labels at once with softmax and a squared error",
    "sigmoid and binary cross-entropy",
    ("output does not fit the loss",),
)
def several_labels(repaired):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(4000, 20)).astype("float32")
    noise = generator.normal(size=(4000, 3))
    targets = (inputs @ generator.normal(size=(20, 3)) + noise > 0).astype("float32")
    hidden = [layers.Dense(20, "relu"), layers.Dropout(0.5), layers.Dense(20, "relu"), layers.Dropout(0.5)]
    model = sequential((20,), *hidden, layers.Dense(3, "sigmoid" if repaired else "softmax"))
    model = compiled(model, "sgd", "binary_crossentropy" if repaired else "mean_squared_error")
    return Run(model, inputs, targets, {"batch_size": 20, "epochs": 10, "validation_split": 0.2})


@program(
    "DeepFD 8, SO 55328966",
    "pixels of 0 to 255, a sigmoid output with categorical cross-entropy, rate 0.0001",
    "division by 255, softmax, Adam",
    ("output does not fit the loss", "inputs out of range"),
)
def sigmoid_digits(repaired):
    (images, labels), _ = scaled(4000) if repaired else load(4000)
    last = layers.Dense(10, "softmax" if repaired else "sigmoid")
    model = sequential((28, 28, 1), layers.Flatten(), layers.Dense(784), layers.Dense(50, "relu"), last)
    optimizer = keras.optimizers.Adam(1e-4) if repaired else keras.optimizers.SGD(1e-4)
    model = compiled(model, optimizer, "categorical_crossentropy")
    return Run(model, images, one_hot(labels), {"batch_size": 32, "epochs": 8})


@program("DeepFD 10, SO 31880720", "softmax over one unit", "sigmoid", ("softmax over one unit",), ("no gradient",))
def softmax_of_one(repaired):
    inputs = np.repeat([[1.0], [0.0]], 500, axis=0).astype("float32") @ np.ones((1, 128), "float32")
    targets = inputs[:, 0]
    hidden = [layers.Dense(50, "relu"), layers.Dropout(0.2), layers.Dense(50, "relu"), layers.Dropout(0.2)]
    model = sequential((128,), *hidden, layers.Dense(1, "sigmoid" if repaired else "softmax"))
    model = compiled(model, "rmsprop", "binary_crossentropy")
    return Run(model, inputs, targets, {"batch_size": 4, "epochs": 2}, probe=slice(None, None, 16))


@program(
    "DeepFD 13, SO 48934338",
    "regression at a rate of 0.1",
    "rate 0.001",
    ("rate too high",),
    ("loss not finite", "dead units", "constant output", "stuck at chance", "targets out of scale"),
)
def parabola(repaired):
    generator = np.random.default_rng(0)
    inputs = np.arange(0, 5, 0.1, dtype="float32")[:, None]
    targets = (5 * inputs**2 + generator.normal(size=(50, 1)) ** 3).astype("float32")
    small = keras.initializers.RandomUniform(-0.05, 0.05)
    hidden = [layers.Dense(50, "relu"), layers.Dense(30, "relu", kernel_initializer=small)]
    optimizer = keras.optimizers.SGD(0.001 if repaired else 0.1)
    model = compiled(sequential((1,), *hidden, layers.Dense(1)), optimizer, "mean_squared_error")
    return Run(model, inputs, targets, {"epochs": 300})


@program(
    "DeepFD 15, SO 59325381, Defects4ML 98",
    "labels divided by 255, like the images",
    "labels as they are",
    ("targets do not fit the loss",),
)
def divided_labels(repaired):
    (images, labels), _ = scaled(2000)
    targets = labels[:, None] / (1 if repaired else 255)
    stack = [layers.Conv2D(32, 3), layers.MaxPooling2D(), layers.Conv2D(32, 3), layers.MaxPooling2D()]
    stack += [layers.Flatten(), layers.Dense(128, "relu"), layers.Dense(10, "softmax")]
    model = compiled(sequential((28, 28, 1), *stack), "adam", "sparse_categorical_crossentropy")
    return Run(model, images, targets, {"epochs": 4})


@program(
    "DeepFD 17, SO 52800582",
    "inputs of ±100 and targets of up to 1e8, neither scaled",
    "both standardised, relu",
    ("targets out of scale", "inputs out of range"),
    ("stuck at chance", "constant output"),
)
def fourth_power(repaired):
    inputs = np.arange(-100, 100, 0.5)[:, None]
    targets = inputs**4
    if repaired:
        inputs, targets = standardised(inputs), standardised(targets)
    hidden = [layers.Dense(50, "relu" if repaired else "sigmoid"), layers.Dense(50, "elu")]
    model = compiled(sequential((1,), *hidden, layers.Dense(1)), "adam", "mean_squared_error")
    arguments = {"batch_size": 400, "epochs": 300}
    return Run(model, inputs.astype("float32"), targets.astype("float32"), arguments, probe=slice(None, None, 6))


@program(
    "DeepFD 24, SO 51930566",
    "three kinds of flowers with a sigmoid output and categorical cross-entropy",
    "standardised inputs, softmax",
    ("output does not fit the loss",),
)
def flowers(repaired):
    generator = np.random.default_rng(0)
    # Means and deviations of the three kinds of iris.
    means = np.array([[5.0, 3.4, 1.5, 0.2], [5.9, 2.8, 4.3, 1.3], [6.6, 3.0, 5.6, 2.0]])
    deviations = np.array([[0.35, 0.38, 0.17, 0.11], [0.52, 0.31, 0.47, 0.2], [0.64, 0.32, 0.55, 0.27]])
    labels = generator.permutation(np.arange(150) % 3)
    inputs = (means[labels] + deviations[labels] * generator.normal(size=(150, 4))).astype("float32")
    if repaired:
        inputs = standardised(inputs)
    last = layers.Dense(3, "softmax" if repaired else "sigmoid")
    model = compiled(sequential((4,), layers.Dense(4, "relu"), last), "adam", "categorical_crossentropy")
    return Run(model, inputs, one_hot(labels)[:, :3], {"batch_size": 5, "epochs": 50, "validation_split": 0.3})


@program(
    "DeepFD 27, SO 48594888",
    "convolutions on pixels of 0 to 255",
    "division by 255",
    ("inputs out of range",),
    ("overfitting",),
)
def unscaled_images(repaired):
    (images, labels), (other_images, other_labels) = scaled(1500) if repaired else load(1500)
    stack = [layers.Conv2D(32, 3, activation="relu", kernel_initializer="he_normal"), layers.MaxPooling2D()]
    stack += [layers.Conv2D(64, 3, activation="relu", kernel_initializer="he_normal"), layers.MaxPooling2D()]
    stack += [layers.Flatten(), layers.Dense(128, "relu"), layers.Dropout(0.3), layers.Dense(10, "softmax")]
    model = compiled(sequential((28, 28, 1), *stack), "adam", "categorical_crossentropy")
    validation = other_images, one_hot(other_labels)
    return Run(model, images, one_hot(labels), {"batch_size": 50, "epochs": 5, "validation_data": validation})


@program(
    "DeepFD 48, GitHub gol_nn",
    "the Game of Life for too few epochs at a low rate",
    "Adam at 0.01, more epochs",
    ("stopped while improving", "rate too low"),
    ("underfitting",),
)
def game_of_life(repaired):
    cells = (np.random.default_rng(0).random((2000, 10, 10)) < 0.5).astype("float32")
    around = np.pad(cells, ((0, 0), (1, 1), (1, 1)), "wrap")
    places = [(row, column) for row in range(3) for column in range(3) if (row, column) != (1, 1)]
    neighbours = sum(around[:, row : row + 10, column : column + 10] for row, column in places)
    targets = ((neighbours == 3) | ((cells == 1) & (neighbours == 2))).astype("float32")[..., None]
    stack = [layers.Conv2D(10, 3, activation="relu"), layers.Conv2D(20, 1, activation="relu")]
    model = sequential((12, 12, 1), *stack, layers.Conv2D(1, 1, activation="sigmoid"))
    model = compiled(model, keras.optimizers.Adam(0.01 if repaired else 0.001), "binary_crossentropy")
    arguments = {"epochs": 15 if repaired else 5, "batch_size": 32, "validation_split": 0.2}
    return Run(model, around[..., None], targets, arguments)


@program(
    "DeepFD 50, GitHub MovieReviews_Keras",
    "words of reviews, learned by heart",
    "dropout, fewer epochs",
    ("overfitting",),
)
def reviews(repaired):
    generator = np.random.default_rng(0)
    count, words = 3000, 2000
    weights = generator.normal(size=words) * (generator.random(words) < 0.15)
    inputs = (generator.random((count, words)) < 3 / np.arange(2, words + 2) ** 0.7).astype("float32")
    score = inputs @ weights
    targets = (score + generator.normal(0, 0.75 * score.std(), count) > np.median(score)).astype("float32")
    dropout = [layers.Dropout(0.5)] if repaired else []
    stack = [layers.Dense(16, "relu"), *dropout, layers.Dense(16, "relu"), *dropout, layers.Dense(1, "sigmoid")]
    model = compiled(sequential((words,), *stack), "rmsprop", "binary_crossentropy")
    arguments = {"epochs": 6 if repaired else 20, "batch_size": 64, "validation_split": 0.33}
    return Run(model, inputs, targets, arguments)


@program(
    "Data Science Stack Exchange 38604",
    "ten classes as targets of one sigmoid with binary cross-entropy",
    "softmax over 10 units, division by 255",
    ("targets do not fit the loss", "inputs out of range"),
)
def ten_classes_one_unit(repaired):
    (images, labels), _ = scaled(3000) if repaired else load(3000)
    last = layers.Dense(10, "softmax") if repaired else layers.Dense(1, "sigmoid")
    model = sequential((28, 28, 1), layers.Flatten(), layers.Dense(64, "relu"), last)
    model = compiled(model, "adam", "sparse_categorical_crossentropy" if repaired else "binary_crossentropy")
    targets = labels if repaired else labels.astype("float32")
    return Run(model, images, targets, {"validation_split": 0.33, "epochs": 8})


@program(
    "codemia.io, 'Keras model gets constant loss and accuracy'",
    "softmax over one unit with categorical cross-entropy: the loss is 0",
    "sigmoid and binary cross-entropy",
    ("softmax over one unit",),
    ("no gradient",),
)
def loss_of_zero(repaired):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(3000, 14)).astype("float32")
    targets = (inputs[:, :4].sum(axis=1) + generator.normal(size=3000) > 1).astype("float32")[:, None]
    last = layers.Dense(1, "sigmoid" if repaired else "softmax")
    model = sequential((14,), layers.Dense(21, "relu"), last)
    model = compiled(model, "adam", "binary_crossentropy" if repaired else "categorical_crossentropy")
    return Run(model, inputs, targets, {"epochs": 8})


@program(
    "GitHub mmalekzadeh/dana 1",
    "a softmax output with from_logits=True",
    "no softmax in the model",
    ("output does not fit the loss",),
)
def softmax_and_logits(repaired):
    (images, labels), (other_images, other_labels) = scaled(2000)
    stack = [layers.Conv2D(16, 3, activation="relu"), layers.MaxPooling2D(), layers.Flatten(), layers.Dense(64, "relu")]
    model = sequential((28, 28, 1), *stack, layers.Dense(10, None if repaired else "softmax"))
    model = compiled(model, "adam", keras.losses.CategoricalCrossentropy(from_logits=True))
    validation = other_images, one_hot(other_labels)
    return Run(model, images, one_hot(labels), {"epochs": 6, "validation_data": validation})


def small_classifier(count=2000, last="softmax", dropout=0.0, loss="sparse_categorical_crossentropy"):
    """Return a compiled classifier of two layers, its images and labels, and other ones."""
    (images, labels), others = scaled(count)
    stack = [layers.Flatten(), layers.Dense(128, "relu"), layers.Dropout(dropout), layers.Dense(64, "relu")]
    model = sequential((28, 28, 1), *stack, layers.Dropout(dropout), layers.Dense(10, last))
    return compiled(model, "adam", loss), images, labels, others


@program(
    "NeuraLint, UMLAUT: missing softmax before the loss",
    "no softmax, and a loss of probabilities",
    "softmax",
    ("output does not fit the loss",),
)
def missing_softmax(repaired):
    model, images, labels, others = small_classifier(last="softmax" if repaired else None)
    return Run(model, images, labels, {"epochs": 6, "validation_data": others})


@program(
    "asked often on SO: an empty cell in the column of targets",
    "one target is not a number",
    "the row left out",
    ("values not finite",),
    ("loss not finite",),
)
def missing_target(repaired):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(1000, 5)).astype("float32")
    targets = (inputs @ np.arange(1, 6) / 5 + generator.normal(0, 0.1, 1000)).astype("float32")
    if not repaired:
        targets[777] = np.nan
    model = sequential((5,), layers.Dense(32, "relu"), layers.Dense(1))
    model = compiled(model, keras.optimizers.Adam(0.01), "mean_squared_error")
    return Run(model, inputs, targets, {"epochs": 10})


@program(
    "asked often on SO: trainable=False before compile",
    "all layers frozen",
    "trainable",
    ("nothing to train",),
)
def all_frozen(repaired):
    model, images, labels, others = small_classifier()
    model.trainable = repaired
    compiled(model, "adam", "sparse_categorical_crossentropy")
    return Run(model, images, labels, {"epochs": 5, "validation_data": others})


@program(
    "Data Science Stack Exchange 19283",
    "one example in fifty is positive: the majority is predicted for all",
    "balanced weights of the classes",
    ("classes imbalanced",),
)
def rare_class(repaired):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(4000, 10)).astype("float32")
    score = inputs[:, 0] + 0.7 * inputs[:, 1] + generator.normal(0, 1.2, 4000)
    targets = (score > np.quantile(score, 0.98)).astype("float32")
    model = sequential((10,), layers.Dense(16, "relu"), layers.Dense(1, "sigmoid"))
    model = compiled(model, "adam", "binary_crossentropy")
    weights = {"class_weight": {0: 0.5 / 0.98, 1: 0.5 / 0.02}} if repaired else {}
    return Run(model, inputs, targets, {"epochs": 10, "validation_split": 0.2} | weights, probe=slice(256))


@program(
    "GitHub titu1994/Inception-v4 5, aymericdamien/TensorFlow-Examples 205",
    "dropout of 0.9, twice",
    "dropout of 0.1",
    ("dropout too high",),
    ("stuck at chance", "dead units", "underfitting"),
)
def too_much_dropout(repaired):
    model, images, labels, others = small_classifier(3000, dropout=0.1 if repaired else 0.9)
    return Run(model, images, labels, {"epochs": 6 if repaired else 10, "validation_data": others})


@program(
    "GitHub keras-team/keras 7520, SO 39217567",
    "labels that do not belong to their inputs",
    "both shuffled alike",
    ("validation unlike training",),
    ("stuck at chance", "overfitting"),
)
def shuffled_labels(repaired):
    model, images, labels, others = small_classifier()
    if not repaired:
        labels = np.random.default_rng(0).permutation(labels)
    return Run(model, images, labels, {"epochs": 8, "validation_data": others})


@program(
    "GitHub keras-team/keras 2194, tsgm 59",
    "an LSTM with relu over long sequences",
    "tanh",
    ("unbounded recurrence",),
    ("loss not finite", "exploding gradients", "rate too high"),
)
def recurrent_relu(repaired):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(600, 100, 8)).astype("float32") * (1 if repaired else 3)
    targets = (inputs.mean(axis=(1, 2)) > 0).astype("int64")
    recurrent = layers.LSTM(32, activation="tanh" if repaired else "relu")
    model = sequential((100, 8), recurrent, layers.Dense(2, "softmax"))
    model = compiled(model, keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy")
    return Run(model, inputs, targets, {"epochs": 5})


@program(
    "SO 51181393, 47932589",
    "prices of houses, in the order of 1e5, as targets",
    "standardised targets",
    ("targets out of scale",),
    ("stuck at chance", "rate too low"),
)
def prices(repaired):
    generator = np.random.default_rng(0)
    inputs = generator.normal(size=(1600, 20)).astype("float32")
    targets = 180_000 + 60_000 * (inputs[:, 0] + 0.5 * inputs[:, 1]) + generator.normal(0, 20_000, 1600)
    targets = standardised(targets) if repaired else targets.astype("float32")
    model = sequential((20,), layers.Dense(64, "relu"), layers.Dense(32, "relu"), layers.Dense(1))
    model = compiled(model, "adam", "mean_squared_error")
    return Run(model, inputs, targets, {"batch_size": 16, "epochs": 8, "validation_split": 0.2})


@program(
    "SO 42081257, DeepFD 36, SO 41327601",
    "softmax over ten classes with binary cross-entropy",
    "categorical cross-entropy",
    ("output does not fit the loss",),
)
def binary_loss_of_classes(repaired):
    loss = "categorical_crossentropy" if repaired else "binary_crossentropy"
    model, images, labels, (other_images, other_labels) = small_classifier(loss=loss)
    validation = other_images, one_hot(other_labels)
    return Run(model, images, one_hot(labels), {"epochs": 6, "validation_data": validation})
