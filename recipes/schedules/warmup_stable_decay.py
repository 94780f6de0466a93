"""Warmup stable decay: lets the learning rate fall to zero only when you want to stop, and holds it until then.

Symptom: your cosine has ended at a rate of zero, and you want to train on. It had to know its last step, and you did
not; or you want good weights after several lengths of training.

Technique: with W steps of warm-up, peak rate η, and a decay over the last D of T steps, step i, counted from 0, is made
at η · min(1, i / W, (T - i) / D). Before the decay nothing depends on T. So one training at the peak, the trunk, serves
all lengths: from any of its checkpoints a branch leads to zero in D more steps. Keras has no such schedule; the class
`WarmupStableDecay` of this recipe is one formula.

Change: the optimizer's learning rate, where `steps` is epochs times batches per epoch:

    rate = WarmupStableDecay(0.001, warmup_steps=steps // 20, decay_steps=steps // 5, steps=steps)
    optimizer = keras.optimizers.Adam(rate)

For a branch, compile a model with a schedule of other `steps`, and give it what the callback `KeepStates` has kept of
the trunk: the weights, and the optimizer's variables. One of these counts the steps, so the branch's schedule goes on
where the trunk was.

Look for: whether it is as good as the cosine at each length, though the cosine was trained anew for each, and how many
epochs both spent on all three. Then compare with the trunk alone, which ends at the peak rate. In the picture the trunk
looks worse than it is: see how steeply accuracy rises in the decay.

Cost: one hyper-parameter more than a cosine has, the length of the decay, a tenth to a fifth of the training, and
checkpoints that hold the optimizer's variables. The peak has to be one that training stands for long, so its best value
may be lower than a cosine's.

Source: Hu et al., "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
arXiv:2404.06395, 2024; Hägele et al., "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations",
NeurIPS 2024, who find it as good as a cosine with a decay over a fifth.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers, ops

from callbacks import Comparison

# The schedule, and its highest learning rate, the best of GRID for the longest training (--search).
VARIANTS = {
    "cosine": ("cosine", 0.003),
    "stable, decay": ("decay", 0.003),
    "stable alone": ("stable", 0.001),
}

# The variant that answers the recipe's question.
HEADLINE = "stable, decay"

# Peak learning rates of Adam.
GRID = (0.0001, 0.0003, 0.001, 0.003, 0.01)

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
    return keras.Model(inputs, layers.Dense(classes)(x))


@keras.saving.register_keras_serializable("recipes")
class WarmupStableDecay(keras.optimizers.schedules.LearningRateSchedule):
    """A rise to `peak` over the first steps, then the peak, then a fall to zero over the last of all `steps`.

    Without steps of warm-up it begins at the peak; without steps of decay it stays there, for ever.
    """

    def __init__(self, peak, warmup_steps, decay_steps, steps):
        self.peak, self.warmup_steps, self.decay_steps, self.steps = peak, warmup_steps, decay_steps, steps

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rise = step / self.warmup_steps if self.warmup_steps else 1.0
        fall = (self.steps - step) / self.decay_steps if self.decay_steps else 1.0
        return self.peak * ops.clip(ops.minimum(rise, fall), 0.0, 1.0)  # the technique

    def get_config(self):
        return {name: getattr(self, name) for name in ("peak", "warmup_steps", "decay_steps", "steps")}


class KeepStates(keras.callbacks.Callback):
    """Keeps, after each of some numbers of epochs, what it takes to go on from there."""

    def __init__(self, epochs):
        super().__init__()
        self.epochs = epochs
        self.states = {}

    def on_epoch_end(self, epoch, logs=None):
        if epoch + 1 in self.epochs:
            variables = {}
            self.model.optimizer.save_own_variables(variables)
            self.states[epoch + 1] = self.model.get_weights(), variables

    def restore(self, epoch, model):
        """Give a compiled model the weights, and the optimizer's variables, of the end of an epoch, counted from 1."""
        weights, variables = self.states[epoch]
        model.set_weights(weights)
        model.optimizer.build(model.trainable_variables)
        model.optimizer.load_own_variables(variables)


def new_schedule(kind, peak, warmup_steps, decay_steps, steps):
    """Return the schedule of a training of `steps` steps, of the variant's kind."""
    if kind == "cosine":
        return keras.optimizers.schedules.CosineDecay(
            0.0, decay_steps=steps - warmup_steps, warmup_target=peak, warmup_steps=warmup_steps
        )
    return WarmupStableDecay(peak, warmup_steps, decay_steps if kind == "decay" else 0, steps)


def main(
    *,
    dataset: str = "fashion_mnist_10k",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 20,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train for three lengths, along a cosine for each, and at a constant rate with a decay at the end of each.

    Args:
        dataset: name of a labelled image set of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data in the longest training; the others have a quarter and half of them.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many images of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best peak rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, classes = load(dataset, data_dir, limit)
    batch_size = 64
    steps = -(-len(train[0]) // batch_size)
    warmup_steps = epochs * steps // 20
    lengths = max(1, epochs // 4), max(1, epochs // 2), epochs
    # The decay takes a fifth of them, and begins when an epoch does.
    begins = {length: length - -(-length // 5) for length in lengths}
    with Comparison(
        metric="accuracy",
        margin=0.01,
        train=train,
        validation=validation,
        test=test,
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        columns={
            "after a quarter": "validation accuracy of a training of a quarter of the epochs",
            "after half": "validation accuracy of a training of half of the epochs",
            "epochs in all": "epochs that were trained to have all three lengths",
        },
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for variant, (kind, peak), run in loop:
            keep = KeepStates(begins.values())
            accuracies, trained = {}, 0
            # The longest first: it is the trunk of the others.
            for length in [epochs] if search else sorted(begins, reverse=True):
                schedule = new_schedule(
                    kind, peak, warmup_steps, decay_steps=(length - begins[length]) * steps, steps=length * steps
                )
                keras.utils.set_random_seed(run.seed)
                model = build_model(train[0].shape[1:], classes)
                model.compile(
                    optimizer=keras.optimizers.Adam(schedule),
                    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                    metrics=["accuracy"],
                    steps_per_execution=min(steps, STEPS_PER_CALL),
                )
                first = 0
                if kind == "decay" and begins[length] in keep.states:
                    first = begins[length]
                    keep.restore(first, model)
                history = model.fit(
                    *train,
                    batch_size=batch_size,
                    initial_epoch=first,
                    epochs=length,
                    validation_data=validation,
                    verbose=0,
                    callbacks=[keep, run] if length == epochs else [],
                ).history["val_accuracy"]
                trained += length - first
                accuracies[length] = history[-1]
                if kind == "stable":
                    # It is the same training at each length.
                    accuracies = {shorter: history[shorter - 1] for shorter in lengths}
                    break
            if search:
                continue
            for name, length in zip(("after a quarter", "after half"), lengths, strict=False):
                comparison.add_figure(variant, run.seed, name, accuracies[length])
            comparison.add_figure(variant, run.seed, "epochs in all", trained)
            at, values = zip(*sorted(accuracies.items()), strict=True)
            comparison.add_signal(
                variant, run.seed, "validation accuracy at the end", values, by="epochs of training", at=at
            )
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
