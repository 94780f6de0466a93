"""Checkpoint resume: goes on with an interrupted training as if nothing had happened, down to the last bit.

Symptom: after a crash you load the weights and train on, and the loss leaps up. It ends elsewhere than it should.

Technique: a training is more than its weights. To it belong the optimizer's averages, its count of steps, by which a
schedule finds its rate, the number of the epoch, and the state of everything that is drawn: the order of the examples,
the masks of dropout. Keras: `BackupAndRestore` keeps all but what is drawn. `fit` draws the orders of the first epochs
once more; and the state of `Dropout` is in no file that Keras 3.15 writes, neither of weights nor of models. Remedy: do
not store the numbers, but make them depend on the seed and the epoch alone.

Change: one callback of Keras, and one of your own, with a data set that shuffles itself (both below):

    data = Shuffled(images, labels, batch_size=128, seed=1)
    backup = keras.callbacks.BackupAndRestore("backup")
    model.fit(data, epochs=10, shuffle=False, callbacks=[backup, NumbersByEpoch(data, seed=1)])

Start the same script again after a crash: `fit` begins with the epoch that was lost.

Look for: the distance between the final weights and those of a training that was never interrupted: 0 means that it is
the same training. Then accuracy. With the weights alone the schedule begins anew, and its rates are too high to the
end: a training that was too short profits from that, but it is another one than you planned. See, too, whether it
matters that numbers are drawn again. If it does not, `BackupAndRestore` is enough for you, as long as nobody asks for
the same figures twice.

Cost: writing the weights and the optimizer, three times the size of the network with Adam, at the end of each epoch;
`save_freq` takes steps instead, but `fit` then repeats the epoch from its beginning. The backup is deleted when `fit`
ends; where it still lies from another run, that one goes on. Other callbacks forget: early stopping begins to count
anew, and so does whatever averages weights. `load_weights` in a model that has just been compiled skips the optimizer,
with no more than a warning: call `model.optimizer.build(model.trainable_variables)` before.

Source: Keras API, BackupAndRestore; Keras 3.15's `Layer.save_own_variables`, which stores no seed generator.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers

from callbacks import Comparison

# What is kept of the first half, and whether all that is drawn depends on the seed and the epoch alone.
VARIANTS = {
    "uninterrupted": ("all", False),
    "weights alone": ("weights", False),
    "BackupAndRestore": ("backup", False),
    "by epoch": ("all", True),
    "by epoch, resumed": ("backup", True),
}

# The variant that answers the recipe's question.
HEADLINE = "by epoch, resumed"

BATCH_SIZE = 128

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
        x = layers.Dense(128, activation="relu")(x)
        x = layers.Dropout(0.3)(x)
    return keras.Model(inputs, layers.Dense(classes)(x))


class Shuffled(keras.utils.PyDataset):
    """Batches of images and labels, in an order that the seed and the epoch decide."""

    def __init__(self, images, labels, batch_size, seed):
        super().__init__()
        self.images, self.labels, self.batch_size, self.seed = images, labels, batch_size, seed
        self.shuffle(epoch=0)

    def shuffle(self, epoch):
        self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.labels))

    def __len__(self):
        return -(-len(self.labels) // self.batch_size)

    def __getitem__(self, index):
        chosen = self.order[index * self.batch_size : (index + 1) * self.batch_size]
        return self.images[chosen], self.labels[chosen]


class NumbersByEpoch(keras.callbacks.Callback):
    """Makes the order of the examples and all random numbers of an epoch depend on the seed and the epoch alone."""

    def __init__(self, data, seed):
        super().__init__()
        self.data, self.seed = data, seed

    def on_epoch_begin(self, epoch, logs=None):
        self.data.shuffle(epoch)
        states = [variable for variable in self.model.variables if variable.path.endswith("seed_generator_state")]
        for number, state in enumerate(states):
            state.assign(np.random.SeedSequence([self.seed, epoch, number]).generate_state(2))  # the technique


def trained_weights(model):
    """Return all trained weights as one array."""
    return np.concatenate([keras.ops.convert_to_numpy(weight).ravel() for weight in model.trainable_variables])


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 10,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
):
    """Train one network in one go, and with an interruption after half of the epochs, and compare the final weights.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data, those before the interruption included.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    steps = -(-len(train[0]) // BATCH_SIZE)

    def begin(seed):
        """Return a new model, as a process that is started with this seed makes it."""
        keras.utils.set_random_seed(seed)
        model = build_model(train[0].shape[1:], classes)
        model.compile(
            # Ends at a rate of zero, which leaves little noise between seeds.
            optimizer=keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.001, epochs * steps)),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            steps_per_execution=min(steps, STEPS_PER_CALL),
        )
        return model

    def fit(model, by_epoch, seed, until, after=0, callbacks=()):
        """Train until an epoch, and return the curves."""
        numbers = []
        data = {"x": train[0], "y": train[1], "batch_size": BATCH_SIZE}
        if by_epoch:
            shuffled = Shuffled(*train, BATCH_SIZE, seed)
            data, numbers = {"x": shuffled, "shuffle": False}, [NumbersByEpoch(shuffled, seed)]
        return model.fit(
            **data,
            epochs=until,
            initial_epoch=after,
            validation_data=validation,
            verbose=0,
            callbacks=[*numbers, *callbacks],
        ).history

    with Comparison(
        metric="accuracy",
        margin=0.01,
        test=test,
        same_start=False,  # it is the seed that makes the starts equal, for runs are added after their training
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={"distance": "between the final weights and those without interruption, over the length of their way"},
        save=save,
    ) as comparison:
        half = -(-epochs // 2)
        whole = {}
        for variant, (kept, by_epoch), run in comparison.runs(VARIANTS, seeds):
            model = begin(run.seed)
            start = trained_weights(model)
            with TemporaryDirectory() as folder:
                backup = [keras.callbacks.BackupAndRestore(folder, delete_checkpoint=False)] if kept == "backup" else []
                curves = fit(model, by_epoch, run.seed, epochs if kept == "all" else half, callbacks=backup)
                if kept != "all":
                    weights = model.get_weights()
                    model = begin(run.seed)
                    if kept == "weights":
                        model.set_weights(weights)
                    more = fit(model, by_epoch, run.seed, epochs, after=half, callbacks=backup)
                    curves = {name: [*values, *more.get(name, [])] for name, values in curves.items()}
            end = trained_weights(model)
            if kept == "all":
                whole[run.seed, by_epoch] = start, end
            comparison.add(
                variant, run.seed, {"accuracy": model.evaluate(*test, verbose=0, return_dict=True)["accuracy"]}, curves
            )
            # Not known if an earlier call, whose runs `save` has kept, trained without interruption.
            if (run.seed, by_epoch) in whole:
                start, expected = whole[run.seed, by_epoch]
                distance = np.linalg.norm(end - expected) / np.linalg.norm(expected - start)
                comparison.add_figure(variant, run.seed, "distance", distance)
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
