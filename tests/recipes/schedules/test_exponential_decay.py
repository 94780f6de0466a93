import keras
import numpy as np
import pytest

EPOCHS, STEPS = 4, 3


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("schedules/exponential_decay")


class Rates(keras.callbacks.Callback):
    """Reads the rate that the optimizer is going to use, before each step."""

    def __init__(self):
        super().__init__()
        self.values = []

    def on_train_batch_begin(self, batch, logs=None):
        self.values.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))


@pytest.fixture(scope="module")
def trained(recipe):
    """What main trains, step by step, and its comparison: {variant: (callbacks, rate of each step, final weights)}."""
    return train(recipe, steps_per_execution=1)


def train(recipe, steps_per_execution):
    original_fit, found = keras.Model.fit, {}

    def fit(model, *arguments, callbacks, validation_data, **keywords):
        *callbacks, run = callbacks
        rates = Rates()
        assert model.steps_per_execution == STEPS
        model.steps_per_execution = steps_per_execution
        fitted = original_fit(model, *arguments, callbacks=[*callbacks, rates], **keywords)
        found[run.variant] = callbacks, rates.values, model.get_weights()
        run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})
        return fitted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(epochs=EPOCHS, limit=64 * STEPS - 10)  # the last batch is smaller
    return found, comparison


def expected_rates(first_rate, factor):
    return [first_rate * factor**epoch for epoch in range(EPOCHS) for _ in range(STEPS)]


def test_every_step_of_an_epoch_has_the_first_rate_times_the_factor_to_the_power_of_the_epoch(recipe, trained):
    for variant, (_, rates, _) in trained[0].items():
        _, factor, first_rate = recipe.VARIANTS[variant]
        np.testing.assert_allclose(rates, expected_rates(first_rate, factor), rtol=1e-6)


def test_factors_are_those_that_the_names_say_and_only_the_baseline_is_constant(recipe):
    settings = {variant: value[:2] for variant, value in recipe.VARIANTS.items()}
    assert settings == {
        "constant": (None, 1.0),
        "factor 0.9": ("schedule", 0.9),
        "factor 0.8": ("schedule", 0.8),
        "factor 0.8, callback": ("callback", 0.8),
    }


def test_one_way_is_a_callback_and_the_other_is_not(recipe, trained):
    for variant, (callbacks, _, _) in trained[0].items():
        sets_rate = any(isinstance(callback, keras.callbacks.LearningRateScheduler) for callback in callbacks)
        assert sets_rate == (recipe.VARIANTS[variant][0] == "callback")


def test_both_ways_give_the_same_weights(recipe, trained):
    constant, *both = (trained[0][variant][2] for variant in ("constant", "factor 0.8", "factor 0.8, callback"))
    assert recipe.VARIANTS["factor 0.8"][1:] == recipe.VARIANTS["factor 0.8, callback"][1:]
    for of_schedule, of_callback in zip(*both, strict=True):
        np.testing.assert_allclose(of_schedule, of_callback, rtol=1e-4, atol=1e-6)
    assert not np.allclose(both[0][0], constant[0], rtol=1e-4, atol=1e-6)


def test_several_steps_a_call_change_neither_the_weights_nor_the_signals(recipe, trained):
    found, comparison = trained
    at_once, other = train(recipe, steps_per_execution=STEPS)
    for variant, (_, rates, weights) in found.items():
        for expected, weight in zip(weights, at_once[variant][2], strict=True):
            np.testing.assert_allclose(weight, expected, rtol=1e-5, atol=1e-6)
        for signal in (*comparison.result.signals, *other.result.signals):
            if signal["variant"] == variant:
                np.testing.assert_allclose(signal["values"], rates[::STEPS], rtol=1e-6)
    assert len(comparison.result.signals) == len(other.result.signals) == len(found)


def test_a_second_fit_goes_on_with_the_schedule_and_begins_anew_with_the_callback(recipe):
    inputs, targets = np.ones((STEPS, 1)), np.zeros((STEPS, 1))
    for way, first_epoch in (("schedule", 1), ("callback", 0)):
        rate, callbacks = recipe.decaying_rate(way, 0.5, 0.1, STEPS)
        model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(rate), "mse", run_eagerly=True)
        for _ in range(2):
            rates = Rates()
            model.fit(inputs, targets, batch_size=1, verbose=0, callbacks=[*callbacks, rates])
        np.testing.assert_allclose(rates.values, [0.1 * 0.5**first_epoch] * STEPS, rtol=1e-6)


def test_a_callback_cannot_set_a_rate_that_is_a_schedule(recipe):
    rate, _ = recipe.decaying_rate("schedule", 0.5, 0.1, STEPS)
    _, callbacks = recipe.decaying_rate("callback", 0.5, 0.1, STEPS)
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(rate), "mse", run_eagerly=True)
    with pytest.raises(TypeError, match="not settable"):
        model.fit(np.ones((2, 1)), np.zeros((2, 1)), verbose=0, callbacks=callbacks)
