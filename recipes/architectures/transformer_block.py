"""Transformer block: normalises before or after the sum, and asks which of them needs a warm-up.

Symptom: your transformer does not learn, or only with a long warm-up and a small rate. You do not know which of the
published blocks to take.

Technique: a block has two sublayers F, causal attention and a network for each position. Post-norm, the first form, is
x ← norm(x + F(x)): the sum itself is normalised, so nothing passes straight from the first block to the last. Pre-norm
is x ← x + F(norm(x)), with one norm more at the end: x passes unchanged, and so does its gradient. RMSNorm divides by
the root mean square and subtracts nothing. Keras: `MultiHeadAttention` with `use_causal_mask=True`,
`LayerNormalization`, `RMSNormalization`.

Change: where the norm stands, for both sublayers:

    x = x + sublayer(layers.LayerNormalization()(x))

Look for: bits per character on plays that it was not trained on. Compare both forms without warm-up, and see what
warm-up is worth to each, every variant at its own best rate. In the search see how high a rate each stands: what a
warm-up mends is a rate that is too high at the start. The picture shows the first steps.

Cost: none between the two forms. Warm-up is a hyper-parameter. Attention takes time and memory with the square of the
length. The characters of the training text are the vocabulary; others count as one.

Source: Vaswani et al., "Attention Is All You Need", NIPS 2017 (post-norm, with warm-up); Xiong et al., "On Layer
Normalization in the Transformer Architecture", ICML 2020, who find that pre-norm needs none; Zhang and Sennrich, "Root
Mean Square Layer Normalization", NeurIPS 2019.
"""

from pathlib import Path

import cyclopts
import keras
import numpy as np
import tensorflow_datasets as tfds
from cyclopts.types import PositiveInt
from keras import layers, ops

from callbacks import Comparison

# Whether the norm comes first, the norm, the share of warm-up, and the best rate of GRID (--search).
VARIANTS = {
    "post-norm": (False, layers.LayerNormalization, 0.0, 0.003),
    "post-norm, warm-up": (False, layers.LayerNormalization, 0.1, 0.003),
    "pre-norm": (True, layers.LayerNormalization, 0.0, 0.003),
    "pre-norm, warm-up": (True, layers.LayerNormalization, 0.1, 0.003),
    "pre-norm, RMSNorm": (True, layers.RMSNormalization, 0.0, 0.003),
}

# The variant that answers the recipe's question.
HEADLINE = "pre-norm"

# Peak learning rates of Adam.
GRID = (0.0003, 0.001, 0.003, 0.01, 0.03)

# Characters in a sequence; units of each, attention heads, blocks.
LENGTH, WIDTH, HEADS, BLOCKS = 64, 32, 2, 6

# Many steps a call: equal weights, less time. On PyTorch, Keras knows single steps only.
STEPS_PER_CALL = 1 if keras.backend.backend() == "torch" else 32

DATA_DIR = Path(__file__).resolve().parent.parent.parent / "data"


def load(dataset, data_dir, limit):
    """Return (inputs, targets) for training, validation and test, and the number of different characters.

    Both are int32 arrays of shape (sequences, LENGTH): numbers of characters, and of those that follow them. Nothing is
    downloaded.
    """
    try:
        if not data_dir.is_dir():
            raise FileNotFoundError(f"there is no folder {data_dir}")
        split = ["train", "validation", "test"]
        splits = tfds.load(dataset, split=split, data_dir=data_dir, download=False)
        texts = ["".join(example["text"].decode() for example in tfds.as_numpy(examples)) for examples in splits]
        # 0 is for all characters that do not occur in training.
        numbers = {character: number for number, character in enumerate(sorted(set(texts[0])), start=1)}
        arrays = []
        for text in texts:
            encoded = np.array([numbers.get(character, 0) for character in text], "int32")
            end = (len(text) - 1) // LENGTH * LENGTH
            inputs, targets = (part.reshape(-1, LENGTH)[:limit] for part in (encoded[:end], encoded[1 : end + 1]))
            arrays.append((inputs, targets))
        return *arrays, len(numbers) + 1
    except Exception as error:
        cause = str(error).strip().partition("\n")[0].rstrip(".")
        error.add_note(
            f"{dataset!r} was not loaded from {data_dir}: {cause}. Use --data-dir to name a folder in which TensorFlow "
            "Datasets has prepared the set (`tfds build NAME --data_dir FOLDER` does so); the set must have a feature "
            '"text", and splits for training, validation and test. The recipes\' own is in the folder data of their '
            "repository."
        )
        raise


def attention(x):
    """Return what each position of x (examples, LENGTH, WIDTH) takes from itself and those before it."""
    return layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(x, x, use_causal_mask=True)


def feed_forward(x):
    """Return the output of a network that sees each position of x (examples, LENGTH, WIDTH) for itself."""
    return layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, activation="gelu")(x))


def block(x, pre, norm):
    """Return x, of shape (examples, LENGTH, WIDTH), after attention and a network for each position."""
    for sublayer in (attention, feed_forward):
        x = x + sublayer(norm()(x)) if pre else norm()(x + sublayer(x))  # the technique
    return x


def build_model(characters, pre, norm):
    """Return a network that gives, at each of LENGTH positions, a logit for each character that may follow."""
    inputs = keras.Input((LENGTH,), dtype="int32")
    positions = ops.cumsum(ops.ones_like(inputs), axis=1) - 1
    x = layers.Embedding(characters, WIDTH)(inputs) + layers.Embedding(LENGTH, WIDTH)(positions)
    for _ in range(BLOCKS):
        x = block(x, pre, norm)
    if pre:
        x = norm()(x)
    return keras.Model(inputs, layers.Dense(characters)(x))


def bits_per_character(targets, logits):
    """Return the mean number of bits that the characters of each sequence take."""
    loss = keras.losses.sparse_categorical_crossentropy(targets, logits, from_logits=True)
    return ops.mean(loss, axis=-1) / np.log(2)


def main(
    *,
    dataset: str = "shakespeare",
    data_dir: Path = DATA_DIR,
    epochs: PositiveInt = 1,
    seeds: PositiveInt = 1,
    limit: PositiveInt | None = None,
    save: Path | None = None,
    search: bool = False,
):
    """Train a small transformer on the characters of plays, with both forms of its block, with and without warm-up.

    Args:
        dataset: name of a set of texts of TensorFlow Datasets.
        data_dir: folder with the prepared data set.
        epochs: passes over the training data.
        seeds: number of paired repetitions; from 5 on there are verdicts, 10 are worth reporting.
        limit: use only this many sequences of each split.
        save: NAME, to write the result to NAME.json and the picture to NAME.svg.
        search: find the best peak rate of each variant, on validation data, in place of the comparison.
    """
    train, validation, test, characters = load(dataset, data_dir, limit)
    batch_size = 32
    steps = -(-len(train[0]) // batch_size)
    with Comparison(
        metric="bits per character",
        mode="min",
        margin=0.02,
        validation=validation,
        test=test,
        same_start=False,  # the variants differ in their norms
        settings={"dataset": dataset, "limit": limit, "epochs": epochs},
        save=save,
    ) as comparison:
        loop = comparison.search(VARIANTS, GRID, seeds) if search else comparison.runs(VARIANTS, seeds)
        for _, (pre, norm, share, peak), run in loop:
            model = build_model(characters, pre, norm)
            warmup_steps = int(share * epochs * steps)
            # Ends at a rate of zero, which leaves little noise between seeds.
            rate = keras.optimizers.schedules.CosineDecay(
                0.0 if warmup_steps else peak,
                decay_steps=epochs * steps - warmup_steps,
                warmup_target=peak if warmup_steps else None,
                warmup_steps=warmup_steps,
            )
            model.compile(
                optimizer=keras.optimizers.Adam(rate),
                loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
                metrics=[keras.metrics.MeanMetricWrapper(bits_per_character, name="bits per character")],
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
