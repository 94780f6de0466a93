import keras
import numpy as np
import pytest
from keras import layers

from callbacks import Comparison

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(96, 4)).astype("float32")
TARGETS = (INPUTS.sum(axis=1) > 0).astype("float32")
TRAIN, VALIDATION, TEST = [(INPUTS[part], TARGETS[part]) for part in (slice(48), slice(48, 64), slice(64, 96))]


def build_model(rate=0.0, units=3, activation="tanh"):
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dropout(rate), layers.Dense(units, activation), layers.Dense(1, "sigmoid")]
    )
    # Three steps are made sooner than they are compiled.
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"], run_eagerly=True)
    return model


def new_comparison(**arguments):
    return Comparison(**{"metric": "accuracy", "test": TEST} | arguments)


def fit(model, *callbacks, epochs=1, **arguments):
    return model.fit(*TRAIN, epochs=epochs, batch_size=16, verbose=0, callbacks=list(callbacks), **arguments)


def with_figures(figures, **arguments):
    """Return a comparison of {variant: [figure of seed 0, figure of seed 1, …]}."""
    comparison = new_comparison(**arguments)
    for variant, values in figures.items():
        for seed, value in enumerate(values):
            comparison.add(variant, seed, {comparison.result.metric: value})
    return comparison


@pytest.fixture
def weights_at_start():
    """A callback that keeps copies of the weights of each model when its first step begins, and the list of them."""

    class Start(keras.callbacks.Callback):
        starts = []

        def on_train_begin(self, logs=None):
            self.is_first = True

        def on_train_batch_begin(self, batch, logs=None):
            if self.is_first:
                self.starts.append([np.array(keras.ops.convert_to_numpy(weight)) for weight in self.model.weights])
                self.is_first = False

    Start.starts = []
    return Start()
