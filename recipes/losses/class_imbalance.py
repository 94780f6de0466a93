"""Class imbalance: what to do where one class is rare, and what each remedy changes: the ranking or the threshold.

Symptom: your network never predicts the rare class. Nineteen of twenty examples are of the other one.

Technique: four remedies. `class_weight` multiplies the loss of the rare class by n₀ / n₁. Resampling repeats its
examples as often. The focal loss, (1 - p)ᵞ · CE with the probability p of the right class, gives less weight to what is
right already. Or you change nothing, and compare the probability with another threshold than 0.5, chosen on validation
data. The first three shift probabilities towards the rare class. Whether they also rank the examples better is another
question, and one that a threshold cannot help with. Keras: `class_weight` of `fit`, `BinaryFocalCrossentropy`.

Change: nothing in training; a threshold, where predictions are made:

    probabilities = model.predict(validation_inputs)[:, 0]
    threshold = best_threshold(probabilities, validation_labels)

or one argument:

    model.fit(..., class_weight={0: 1.0, 1: zeros / ones})

Look for: average precision first, which only the order of the probabilities decides: if it is the same, the remedy has
found nothing that a threshold would not. Then balanced accuracy, the mean of the shares of both classes that are found,
at 0.5 and at the chosen threshold. And the Brier score, the mean squared error of the probabilities: remedies that
shift them make it worse, and who needs probabilities must undo that. Accuracy tells nothing here.

Cost: none in time but for resampling, whose epochs are longer. Repeated examples are learned by heart sooner. With a
weight of 20 a step is as if 20 examples were one, so the best rate is another. If mistakes of both kinds have a price,
the threshold follows from the prices: no remedy is needed.

Source: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017; Saito and Rehmsmeier, PLOS ONE 10, 2015, on
precision and recall; Elkan, "The Foundations of Cost-Sensitive Learning", IJCAI 2001, on thresholds.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# The remedy, and the best rate of GRID (--search). The threshold is moved for each of them.
VARIANTS = {
    "as it is": ("none", 0.001),
    "class weight": ("weight", 0.001),
    "resampling": ("resampling", 0.0003),
    "focal loss": ("focal", 0.001),
}

# The variant that answers the recipe's question.
HEADLINE = "class weight"

# Learning rates of Adam.
GRID = (0.0001, 0.0003, 0.001, 0.003, 0.01)

# Of more than two classes, the last is made the rare one: for each of its examples there are so many others.
OTHERS = 100

# Many steps a call: equal weights, less time. On PyTorch, Keras knows single steps only.
STEPS_PER_CALL = 1 if keras.backend.backend() == "torch" else 32

DATA_DIR = Path(__file__).resolve().parent.parent.parent / "data"


def load(dataset, data_dir, limit):
    """Return (inputs, labels) for training, validation and test, and the number of classes.

    Inputs are float32 arrays of shape (examples, columns): numbers of mean 0 and deviation 1 in training, and for each
    category a column of 0 and 1; of images, all pixels with values 0 to 1. Nothing is downloaded.
    """
    try:
        if not data_dir.is_dir():
            raise FileNotFoundError(f"there is no folder {data_dir}")
        known = tfds.builder(dataset, data_dir=data_dir).info.splits
        split = ["train", "validation", "test"] if "validation" in known else ["train[:80%]", "train[80%:]", "test"]
        splits, info = tfds.load(
            dataset, split=split, data_dir=data_dir, batch_size=-1, as_supervised=True, with_info=True, download=False
        )
        feature = info.features[info.supervised_keys[0]]
        (training, _), *_ = splits = tfds.as_numpy(splits)
        arrays = [(in_columns(feature, values, training)[:limit], labels[:limit]) for values, labels in splits]
        return *arrays, info.features[info.supervised_keys[1]].num_classes
    except Exception as error:
        cause = str(error).strip().partition("\n")[0].rstrip(".")
        error.add_note(
            f"{dataset!r} was not loaded from {data_dir}: {cause}. Use --data-dir to name a folder in which TensorFlow "
            "Datasets has prepared the set (`tfds build NAME --data_dir FOLDER` does so); the set must have rows of "
            "numbers and categories with a label, or labelled images of one size, a train and a test split. The "
            "recipes' own is in the folder data of their repository."
        )
        raise


def in_columns(feature, values, training):
    """Return the values of a feature as columns, a table's scaled by those of the training rows."""
    if isinstance(feature, tfds.features.Image):
        largest = np.iinfo(values.dtype).max if values.dtype.kind == "u" else 1  # floats are taken as they are
        return values.reshape(len(values), -1).astype("float32") / largest
    columns = []
    # Sorted, for the set itself has its columns in another order in each process.
    for name, column in sorted(feature.items()):
        if isinstance(column, tfds.features.ClassLabel):
            columns.append(np.eye(column.num_classes)[values[name]])
        else:
            scaled = (values[name] - training[name].mean()) / (training[name].std() or 1)
            columns.append(scaled[:, np.newaxis])
    return np.hstack(columns).astype("float32")


def thinned(inputs, labels, rare):
    """Return the examples with label 1 for those of class `rare`, of which one stays for OTHERS examples with label 0.

    Raises:
        ValueError: no example is of that class.
    """
    ones, zeros = np.flatnonzero(labels == rare), np.flatnonzero(labels != rare)
    if not len(ones):
        raise ValueError(f"No example of a split is of class {rare}, to be made the rare one: take more examples.")
    index = np.sort(np.concatenate([zeros, ones[: max(1, len(zeros) // OTHERS)]]))
    return inputs[index], (labels[index] == rare).astype("int64")


def build_model(columns):
    """Return a network that gives the probability of class 1 for rows of so many columns."""
    x = inputs = keras.Input((columns,))
    for _ in range(2):
        x = layers.Dense(32, activation="relu")(x)
        x = layers.Dropout(0.3)(x)
    return keras.Model(inputs, layers.Dense(1, activation="sigmoid")(x))


def resampled(inputs, labels, times):
    """Return the examples with those of class 1 repeated so many times, a whole number."""
    index = np.concatenate([np.flatnonzero(labels == 0), np.repeat(np.flatnonzero(labels == 1), times)])
    return inputs[index], labels[index]


def average_precision(probabilities, labels):
    """Return the mean precision at the rank of each example of class 1; of equals, the first in the list come first."""
    found = labels[np.argsort(-probabilities, kind="stable")] == 1
    return (np.cumsum(found) / np.arange(1, len(found) + 1))[found].mean()


def balanced_accuracy(probabilities, labels, threshold):
    """Return the mean of the two classes' shares that are on their side of the threshold."""
    predicted = probabilities >= threshold
    return ((predicted[labels == 1]).mean() + (~predicted[labels == 0]).mean()) / 2


def best_threshold(probabilities, labels):
    """Return the threshold of the highest balanced accuracy."""
    candidates = np.unique(probabilities)
    return candidates[np.argmax([balanced_accuracy(probabilities, labels, threshold) for threshold in candidates])]


def main(
    *,
    dataset: str = "lending_club",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train a network on a table with a rare class, as it is and with three remedies, and compare how it ranks.

    Args:
        dataset: name of a set of TensorFlow Datasets: a table or images whose labels are of two classes, the second one
            rare, or of more, the last of which is made rare.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many rows of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best learning rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    if classes > 2:
        train, validation, test = (thinned(*data, classes - 1) for data in (train, validation, test))
    inputs, labels = test
    ones = max(1, int(np.sum(train[1] == 1)))
    times = round((len(train[1]) - ones) / ones)
    batch_size = 128
    with Comparison(
        metric="average precision",
        margin=0.01,
        validation=validation,
        test=test,
        same_start=False,  # it is the seed that makes the starts equal, for runs are added after their training
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={
            "balanced at 0.5": "balanced accuracy on test data, with a threshold of 0.5",
            "balanced": "balanced accuracy on test data, with the threshold that is best on validation data",
            "Brier score": "mean squared error of the probabilities of class 1, on test data",
        },
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (remedy, learning_rate), run in loop:
            data = resampled(*train, times) if remedy == "resampling" else train
            steps = -(-len(data[0]) // batch_size)
            focal = keras.losses.BinaryFocalCrossentropy(gamma=2.0)
            model = build_model(inputs.shape[1])
            model.compile(
                # Ends at a rate of zero, which leaves little noise between seeds.
                optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(learning_rate, epochs * steps)),
                loss=focal if remedy == "focal" else keras.losses.BinaryCrossentropy(),
                metrics=[keras.metrics.AUC(curve="PR", num_thresholds=1000, name="average precision")],
                steps_per_execution=min(steps, STEPS_PER_CALL),
            )
            history = model.fit(
                *data,
                batch_size=batch_size,
                epochs=epochs,
                class_weight={0: 1.0, 1: float(times)} if remedy == "weight" else None,  # the technique
                validation_data=validation,
                verbose=0,
                callbacks=[run] if search else [],
            ).history
            if search:
                continue
            model.run_eagerly = True  # TensorFlow warns of a graph for each model that is used but once
            threshold = best_threshold(model.predict(validation[0], verbose=0)[:, 0], validation[1])
            probabilities = model.predict(inputs, verbose=0)[:, 0]
            comparison.add(variant, run.seed, {"average precision": average_precision(probabilities, labels)}, history)
            for name, value in {
                "balanced at 0.5": balanced_accuracy(probabilities, labels, 0.5),
                "balanced": balanced_accuracy(probabilities, labels, threshold),
                "Brier score": np.mean((probabilities - labels) ** 2),
            }.items():
                comparison.add_figure(variant, run.seed, name, value)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
