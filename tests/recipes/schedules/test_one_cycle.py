import types

import keras
import numpy as np
import pytest
from keras import layers, ops

LIMIT, EPOCHS = 300, 8  # three steps an epoch, the last of a smaller batch


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("schedules/one_cycle")


@pytest.fixture(scope="module")
def fits(recipe):
    """What main gives to fit, {variant: (optimizer, callbacks, steps of fit)}; nothing is trained."""
    found = {}

    def fit(model, images, labels, *, batch_size, epochs, callbacks, **keywords):
        *callbacks, _, run = callbacks
        found[run.variant] = model.optimizer, callbacks, epochs * -(-len(images) // batch_size)
        run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})
        return types.SimpleNamespace(history={"val_accuracy": [0.5, 0.84, 0.85, 0.8], "learning_rate": [0.1, 0.4, 0.2]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(limit=LIMIT, epochs=EPOCHS, target=0.85)
    assert all(row["figures"] == {"epochs to 0.85": 3} for row in comparison.summary())
    for signal in comparison.result.signals:
        assert (signal["by"], signal["scale"], signal["values"]) == ("epoch", "linear", [0.1, 0.4, 0.2])
    return found


def cycle(peak, steps):
    """Return the rates and the momenta of all steps: up, down over as many steps, and on down to a thousandth."""
    top = int(0.43 * (steps - 1))
    rates = np.concatenate(
        [
            np.linspace(peak / 10, peak, top + 1),
            np.linspace(peak, peak / 10, top + 1)[1:],
            np.linspace(peak / 10, peak / 10_000, steps - 2 * top)[1:],
        ]
    )
    momenta = np.full(steps, 0.95)
    momenta[: 2 * top + 1] = 0.95 - 0.1 * (rates[: 2 * top + 1] - peak / 10) / (peak - peak / 10)
    return rates, momenta


def test_every_step_of_a_training_is_made_with_the_rate_and_the_momentum_of_the_cycle(recipe, fits):
    for variant, (optimizer, callbacks, steps) in fits.items():
        schedule, _, rate = recipe.VARIANTS[variant]
        rates, momenta = np.full(steps, rate), np.full(steps, 0.9)
        if schedule == "cycle":
            rates, momenta = cycle(rate, steps)
        elif schedule == "cosine":
            rates = rate / 2 * (1 + np.cos(np.pi * np.arange(steps) / steps))
        np.testing.assert_allclose(trained(optimizer, callbacks, steps), expected(rates, momenta), rtol=1e-4)


def trained(optimizer, callbacks, steps):
    """Return the weight after each step of minimising weight²/2 from 1 with an optimizer's settings and callbacks."""
    weights = []

    class Weights(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            weights.append(self.model.get_weights()[0].item())

    optimizer = type(optimizer).from_config(optimizer.get_config())
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    model.compile(optimizer, lambda targets, outputs: ops.sum(outputs**2, axis=-1) / 2)
    ones = np.ones((steps, 1), "float32")
    model.fit(ones, ones, batch_size=1, verbose=0, callbacks=[*callbacks, Weights()])
    return weights


def expected(rates, momenta):
    weight, velocity, weights = 1.0, 0.0, []
    for rate, momentum in zip(rates, momenta, strict=True):
        velocity = momentum * velocity - rate * weight
        weight += velocity
        weights.append(weight)
    return weights


def test_the_cycle_ends_with_the_training_and_the_short_one_has_half_the_epochs(fits):
    lengths = {variant: steps for variant, (_, _, steps) in fits.items()}
    assert lengths == {"constant": 24, "one cycle": 24, "cycle, half as long": 12, "cosine": 24}
    assert [len(callbacks) for _, callbacks, _ in fits.values()] == [0, 1, 1, 0]


def test_the_normalisation_that_large_rates_need_stands_before_each_activation(recipe):
    kinds = [type(layer).__name__ for layer in recipe.build_model((4, 4, 1), 5).layers[2:]]
    assert kinds == ["Dense", "BatchNormalization", "ReLU"] * 4 + ["Dense"]


@pytest.mark.parametrize("accuracies, epochs", [([0.5, 0.9, 0.8], 2), ([0.9], 1), ([0.5, 0.6], float("inf"))])
def test_epochs_to_counts_from_one(recipe, accuracies, epochs):
    assert recipe.epochs_to(0.85, accuracies) == epochs
