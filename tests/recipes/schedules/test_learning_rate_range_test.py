import types

import keras
import numpy as np
import pytest

LOW, HIGH, STEPS, WINDOW = 1e-4, 10.0, 101, 11
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.random((100, 5, 5, 1), "float32")
LABELS = np.argmax(IMAGES.reshape(100, 25)[:, :3], axis=1)


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("schedules/learning_rate_range_test")


def loss_and_gradients(weights, images, labels):
    """Return the mean cross-entropy of the recipe's network and its gradients, in NumPy."""
    values = [images.reshape(len(images), -1)]
    for kernel, bias in zip(weights[0:4:2], weights[1:4:2], strict=True):
        values.append(np.maximum(values[-1] @ kernel + bias, 0))
    logits = values[-1] @ weights[4] + weights[5]
    logits -= logits.max(axis=1, keepdims=True)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    picked = np.arange(len(labels)), labels
    error = np.exp(log_probabilities)
    error[picked] -= 1
    error /= len(labels)
    gradients = []
    for layer in (2, 1, 0):
        gradients = [values[layer].T @ error, error.sum(axis=0), *gradients]
        error = error @ weights[2 * layer].T * (values[layer] > 0)
    return -log_probabilities[picked].mean(), gradients


@pytest.fixture(scope="module")
def tested(recipe):
    """A range test of the recipe with all images in one batch, and the weights before and after it."""
    keras.utils.set_random_seed(0)
    model = recipe.build_model((5, 5, 1), 3)
    recipe.compile_model(model, 0.01)
    before = model.get_weights()
    finder = recipe.range_test(model, IMAGES, LABELS, batch_size=128)
    return finder, before, model


def test_losses_and_suggestion_are_those_of_gradient_descent_with_a_rising_rate(tested):
    finder, weights, _ = tested
    weights = [weight.astype("float64") for weight in weights]
    rates, losses = LOW * (HIGH / LOW) ** (np.arange(STEPS) / (STEPS - 1)), []
    for rate in rates:
        loss, gradients = loss_and_gradients(weights, IMAGES, LABELS)
        losses.append(loss)
        weights = [weight - rate * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    made = len(finder.losses)
    assert made > 70
    np.testing.assert_allclose(finder.learning_rates, rates[:made], rtol=1e-6)
    np.testing.assert_allclose(finder.losses[:70], losses[:70], rtol=1e-3)
    smoothed = np.convolve(losses[:made], np.ones(WINDOW) / WINDOW, "valid")
    minimum = smoothed.argmin()
    steps = np.arange(WINDOW)
    slopes = [np.polyfit(steps, losses[start : start + WINDOW], 1)[0] for start in range(minimum + 1)]
    centres = rates[WINDOW // 2 :]
    suggestion = np.sqrt(centres[np.argmin(slopes)] * centres[minimum])
    np.testing.assert_allclose(finder.suggestion, suggestion, rtol=0.1)
    assert 10 * LOW < suggestion < HIGH / 3


def test_the_model_is_left_as_it_was(tested):
    _, before, model = tested
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old)
    assert float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(0.01)
    assert int(model.optimizer.iterations) == 0


@pytest.fixture(scope="module")
def fits(recipe):
    """What main gives to fit, as [(finder or None, model, its weights, images)], and its comparison; not trained."""
    found = []

    def fit(model, images, labels, *, callbacks, **keywords):
        (callback,) = callbacks
        found.append((callback, model, model.get_weights(), images))
        if hasattr(callback, "losses"):
            # The smoothed loss is level, falls most steeply at step 40, and is lowest at step 80.
            callback.learning_rates = list(LOW * (HIGH / LOW) ** (np.arange(STEPS) / (STEPS - 1)))
            falls = np.interp(np.arange(STEPS), [20, 40, 80, 90, 91, 100], [0, 1, 0, -0.25, -90, -90])
            callback.losses = list(10 - np.cumsum(falls) / 10)
            callback.smoothed_losses = list(np.convolve(callback.losses, np.ones(WINDOW) / WINDOW, "valid"))
        else:
            callback.comparison.add(callback.variant, callback.seed, {"accuracy": 0.5})
        return types.SimpleNamespace(history={})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(limit=8, seeds=2)
    return found, comparison


def test_the_suggestion_is_the_rate_that_the_last_variant_trains_with(recipe, fits):
    found, comparison = fits
    rates = {}
    for callback, model, _, _ in found:
        if hasattr(callback, "variant"):
            rates[callback.variant] = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
    *grid, suggested = rates.values()
    np.testing.assert_allclose(grid, [0.01, 0.03, 0.1, 0.3, 1.0], rtol=1e-6)
    # Steps 40 and 80 have the rates 0.01 and 1; the fall is flattest around its own middle, so a step or two is missed.
    np.testing.assert_allclose(suggested, 0.1, rtol=0.3)
    assert list(rates) == list(recipe.VARIANTS)
    for row in comparison.summary():
        assert row["figures"] == {"learning rate": pytest.approx(rates[row["variant"]])}


def test_the_range_test_has_a_model_of_its_own_that_starts_as_the_others_of_the_seed(fits):
    found, _ = fits
    assert len({id(model) for _, model, _, _ in found}) == len(found) == 2 * 7
    for seed_fits in (found[:7], found[7:]):
        for _, _, weights, _ in seed_fits:
            for weight, first in zip(weights, seed_fits[0][2], strict=True):
                np.testing.assert_array_equal(weight, first)
    assert not np.array_equal(found[0][2][0], found[7][2][0])


def test_every_training_falls_to_zero_from_its_rate_and_the_test_has_a_number(fits):
    for callback, model, _, _ in fits[0]:
        rate = model.optimizer._learning_rate
        if hasattr(callback, "variant"):
            assert float(rate(10)) == pytest.approx(0, abs=1e-7)  # epochs of one step
            assert float(rate(5)) == pytest.approx(float(rate(0)) / 2)
        else:
            assert model.steps_per_execution == 1
            assert float(rate) == pytest.approx(0.01)


def test_every_fit_is_given_the_training_data(recipe, fits):
    (images, _), *_ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 8)
    for _, _, _, given in fits[0]:
        np.testing.assert_array_equal(given, images)


def test_it_needs_no_validation_data_and_so_many_epochs_as_its_steps_take(recipe, monkeypatch):
    train, *_ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 300)
    found = {}
    monkeypatch.setattr(keras.Model, "fit", lambda model, *data, **keywords: found.update(keywords, data=data))
    recipe.range_test(recipe.build_model((28, 28, 1), 10), *train, batch_size=128)
    assert found["epochs"] == 34  # of three steps
    assert "validation_data" not in found
    np.testing.assert_array_equal(found["data"][0], train[0])


def test_the_signal_gives_each_smoothed_loss_the_rate_of_its_middle_step(fits):
    _, comparison = fits
    assert len(comparison.result.signals) == 2
    for signal in comparison.result.signals:
        assert (signal["variant"], signal["by"], signal["at_scale"]) == ("range test", "learning rate", "log")
        half, rates = WINDOW // 2, LOW * (HIGH / LOW) ** (np.arange(STEPS) / (STEPS - 1))
        np.testing.assert_allclose(signal["at"], rates[half : STEPS - half])
        assert signal["at"][np.argmin(signal["values"])] == pytest.approx(rates[80])
        assert max(signal["values"]) == pytest.approx(15)
