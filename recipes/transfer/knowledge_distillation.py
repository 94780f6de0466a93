"""Knowledge distillation: trains a small network towards the probabilities of a large one, beside the labels.

Symptom: the network that is good enough is too large for where it has to run, and a small one trained on the same data
is worse.

Technique: the loss of the student is α · CE(labels) + (1 - α) · T² · KL(p_T ‖ q_T), where p_T = softmax(z / T) of the
teacher and q_T that of the student. With T > 1 the small probabilities count: they tell which classes resemble the
image. T² keeps the gradient's size as it is, whatever T. Keras: `keras.distillation.Distiller`.

Change: `fit` and `compile` of another model, around both networks, which give logits:

    distiller = keras.distillation.Distiller(
        teacher,
        student,
        keras.distillation.LogitsDistillation(temperature=4.0, loss=keras.losses.KLDivergence()),
        student_loss_weight=0.1,
    )
    distiller.compile(optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    distiller.fit(images, labels)  # afterwards the student is trained

Name the loss as an object. With the default, "kl_divergence", Keras 3.15 puts the logits themselves into the formula,
without softmax and without T².

Look for: how much of the way from the student alone to the teacher is made, and whether it needs a teacher: label
smoothing makes targets soft as well, the same for all images. Each variant has its own best rate, for a loss of another
size acts as another rate would. The last column tells how often the student decides as the teacher does.

Cost: a teacher, trained once, and its forward pass in each step: with the same images in each epoch you can keep its
answers. Two hyper-parameters, α and T. Two networks in memory. It needs logits of both, for the same classes.

Source: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531, whose headline is a
speech model that has 60.8 % of frames right, between 58.9 % alone and 61.1 % of ten; Yuan et al., "Revisiting Knowledge
Distillation via Label Smoothing Regularization", CVPR 2020.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveFloat, PositiveInt
from keras import layers

from callbacks import Comparison

# What is trained, and the best rate of GRID (--search).
VARIANTS = {
    "student alone": ("alone", 0.01),
    "label smoothing": ("smoothing", 0.03),
    "distilled": ("distilled", 0.03),
    "default loss": ("default", 0.03),
    "teacher": ("teacher", 0.01),
}

# The variant that answers the recipe's question.
HEADLINE = "distilled"

# Learning rates of Adam.
GRID = (0.001, 0.003, 0.01, 0.03, 0.1)

# Filters of the two networks, and the share of the labels in the student's loss.
STUDENT, TEACHER = (4, 8, 16), (16, 32, 64)
LABELS = 0.1

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


def build_model(image_shape, classes, filters):
    """Return a classifier of images of `image_shape` (height, width, channels) that gives a logit for each class."""
    x = inputs = keras.Input(image_shape)
    for number in filters:
        x = layers.Conv2D(number, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Flatten()(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


def new_distiller(teacher, student, temperature, default_loss=False):
    """Return a model whose training is that of the student."""
    # The name of the loss, which is the default, would compare logits as if they were probabilities.
    loss = "kl_divergence" if default_loss else keras.losses.KLDivergence()
    return keras.distillation.Distiller(  # the technique
        teacher,
        student,
        keras.distillation.LogitsDistillation(temperature, loss),
        student_loss_weight=LABELS,
    )


def new_loss(smoothing=0.0):
    """Return the cross-entropy of integer labels of shape (examples,) and logits of shape (examples, classes)."""

    def cross_entropy(labels, logits):
        one_hot = keras.ops.one_hot(keras.ops.cast(labels, "int32"), logits.shape[-1])
        return keras.losses.categorical_crossentropy(one_hot, logits, from_logits=True, label_smoothing=smoothing)

    return cross_entropy


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 15,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    temperature: PositiveFloat = 4.0,
    search: bool = False,
):
    """Train a small network alone, with label smoothing and towards a large one's answers, and compare accuracy.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data, for both networks.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        temperature: both networks' logits are divided by it in the distillation loss.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    image_shape = train[0].shape[1:]
    batch_size = 128
    steps = -(-len(train[0]) // batch_size)

    def fit(model, learning_rate, loss, callbacks):
        model.compile(
            # Ends at a rate of zero, which leaves little noise between seeds.
            optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
            loss=loss,
            metrics=["accuracy"],
            steps_per_execution=min(steps, STEPS_PER_CALL),
        )
        arguments = {"batch_size": batch_size, "epochs": epochs, "validation_data": validation, "verbose": 0}
        model.fit(*train, callbacks=callbacks, **arguments)

    teachers = {}
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        same_start=False,  # teacher and student differ in shape; all students of a seed start equal
        pretrained=True,  # a teacher has been
        settings={"dataset": dataset, "limit": limit, "epochs": epochs, "temperature": temperature},
        columns={
            "parameters": "of the network that is evaluated",
            "as the teacher": "share of the validation images on which it decides as the teacher does",
        },
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (kind, learning_rate), run in loop:
            if run.seed not in teachers and (kind != "teacher" or not search):
                # Once a seed; of the same seed it is the same teacher in a later call.
                keras.utils.set_random_seed(run.seed)
                teacher = build_model(image_shape, classes, TEACHER)
                fit(teacher, VARIANTS["teacher"][-1] if "teacher" in VARIANTS else 0.003, new_loss(), [])
                teachers[run.seed] = teacher
                keras.utils.set_random_seed(run.seed)
            network = build_model(image_shape, classes, TEACHER if kind == "teacher" else STUDENT)
            model = network
            if kind in ("distilled", "default"):
                model = new_distiller(teachers[run.seed], network, temperature, default_loss=kind == "default")
                model(train[0][:1])  # builds it
            fit(model, learning_rate, new_loss(0.1 if kind == "smoothing" else 0.0), [run])
            if search:
                continue
            comparison.add_figure(variant, run.seed, "parameters", network.count_params())
            decisions = []
            for each in (network, teachers[run.seed]):
                each.run_eagerly = True  # TensorFlow warns of a graph for each model that is used but once
                decisions.append(each.predict(validation[0], batch_size=256, verbose=0).argmax(axis=1))
            comparison.add_figure(variant, run.seed, "as the teacher", np.mean(decisions[0] == decisions[1]))
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
