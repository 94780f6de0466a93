import types

import keras
import numpy as np
import pytest

# Worked out by hand: after each epoch, how often the rate has been lowered with patience 1, and with patience 3. The
# third loss is lower than the second, but by less than 0.0001.
LOSSES = [1.0, 0.9, 0.89995, 0.95, 0.9, 0.8, 0.81, 0.82, 0.83, 0.84, 0.85, 0.7, 0.7]
REDUCTIONS = {1: [0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 8, 9], 3: [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("schedules/reduce_on_plateau")


@pytest.fixture(scope="module")
def fits(recipe):
    """What main gives to fit, {variant: (model, callbacks, keywords)}; nothing is trained."""
    found = {}

    def fit(model, *arguments, callbacks, **keywords):
        run = callbacks[-1]
        found[run.variant] = model, callbacks, keywords
        run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})
        return types.SimpleNamespace(history={"learning_rate": [0.4, 0.4, 0.2, 0.1], "val_loss": [1.0] * 4})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(limit=8)
    assert all(row["figures"] == {"reductions": 2} for row in comparison.summary())
    return found


def plateau_callbacks(callbacks):
    return [callback for callback in callbacks if isinstance(callback, keras.callbacks.ReduceLROnPlateau)]


def rates_after_epochs(callback, losses, optimizer):
    """Return the rate after each epoch, for a validation loss that follows a script while the training loss falls."""
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(optimizer, "mse")
    callback.set_model(model)
    callback.on_train_begin()
    rates = []
    for epoch, loss in enumerate(losses):
        callback.on_epoch_end(epoch, {"loss": 1.0 / (epoch + 1), "val_loss": loss})
        rates.append(float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)))
    return rates


def reference(losses, rate, factor, patience, min_delta=1e-4):
    """Return the rate after each epoch: by looking back, not by counting on."""
    rates, since = [], 0  # the epoch of the last improvement or reduction
    for epoch, loss in enumerate(losses):
        if all(loss < earlier - min_delta for earlier in best_so_far(losses[:epoch], min_delta)):
            since = epoch
        elif epoch - since >= patience:
            rate, since = rate * factor, epoch
        rates.append(rate)
    return rates


def best_so_far(losses, min_delta):
    """Return the losses that were improvements."""
    found = []
    for loss in losses:
        if not found or loss < found[-1] - min_delta:
            found.append(loss)
    return found


def test_only_the_baseline_and_the_cosine_have_no_callback_and_the_others_differ(fits):
    found = {
        variant: [(callback.factor, callback.patience) for callback in plateau_callbacks(callbacks)]
        for variant, (_, callbacks, _) in fits.items()
    }
    assert found == {
        "constant": [],
        "half, patience 1": [(0.5, 1)],
        "half, patience 3": [(0.5, 3)],
        "tenth, patience 3": [(0.1, 3)],
        "cosine": [],
    }


def test_the_cosine_ends_with_the_training(recipe, fits):
    model, _, keywords = fits["cosine"]
    rates = []
    for step in range(keywords["epochs"] + 1):  # of one step each
        model.optimizer.iterations.assign(step)
        rates.append(float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)))
    model.optimizer.iterations.assign(0)
    cosine = (1 + np.cos(np.pi * np.arange(len(rates)) / keywords["epochs"])) / 2
    np.testing.assert_allclose(rates, recipe.VARIANTS["cosine"][1] * cosine, rtol=1e-4, atol=1e-7)


def test_on_a_scripted_loss_the_rate_falls_where_it_was_worked_out_by_hand(recipe, fits):
    for variant, (model, callbacks, _) in fits.items():
        first_rate = float(keras.ops.convert_to_numpy(model.optimizer.learning_rate))
        assert first_rate == pytest.approx(recipe.VARIANTS[variant][1])
        for callback in plateau_callbacks(callbacks):
            rates = rates_after_epochs(callback, LOSSES, keras.optimizers.SGD(first_rate))
            expected = first_rate * callback.factor ** np.array(REDUCTIONS[callback.patience])
            np.testing.assert_allclose(rates, expected, rtol=1e-5)


def test_on_random_losses_the_rate_falls_as_the_reference_says(fits):
    generator = np.random.default_rng(0)
    for _ in range(5):
        losses = 1 / np.arange(1, 31) + generator.normal(0, 0.1, 30)
        for _, callbacks, _ in fits.values():
            for callback in plateau_callbacks(callbacks):
                rates = rates_after_epochs(callback, losses, keras.optimizers.SGD(0.1))
                expected = reference(losses, 0.1, callback.factor, callback.patience)
                np.testing.assert_allclose(rates, expected, rtol=1e-5)
                assert len(set(rates)) > 2


def test_the_loss_that_is_watched_is_that_of_the_validation_data(recipe, fits):
    _, validation, test, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 8)
    for _, _, keywords in fits.values():
        np.testing.assert_array_equal(keywords["validation_data"][0], validation[0])
        assert not np.array_equal(keywords["validation_data"][0], test[0])


def test_a_schedule_raises_at_the_first_reduction_and_not_before(fits):
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    (callback,) = plateau_callbacks(fits["half, patience 3"][1])
    rates_after_epochs(callback, LOSSES[:4], keras.optimizers.SGD(schedule))
    with pytest.raises(TypeError, match="not settable"):
        rates_after_epochs(callback, LOSSES[:5], keras.optimizers.SGD(schedule))


def test_patience_0_acts_as_1_and_a_cooldown_ignores_one_epoch_less(fits):
    def reductions(**arguments):
        callback = keras.callbacks.ReduceLROnPlateau(factor=0.5, **arguments)
        rates = rates_after_epochs(callback, LOSSES, keras.optimizers.SGD(1.0))
        return (-np.log2(rates)).round().tolist()

    assert reductions(patience=0) == reductions(patience=1) == reductions(patience=1, cooldown=1) == REDUCTIONS[1]
    assert reductions(patience=1, cooldown=3) == [0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]


def test_without_validation_data_keras_warns_and_the_rate_stays(fits):
    (callback,) = plateau_callbacks(fits["half, patience 1"][1])
    callback.set_model(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))
    callback.model.compile(keras.optimizers.SGD(0.1), "mse")
    callback.on_train_begin()
    for epoch in range(3):
        with pytest.warns(UserWarning, match="val_loss"):
            callback.on_epoch_end(epoch, {"loss": 1.0})
    assert float(keras.ops.convert_to_numpy(callback.model.optimizer.learning_rate)) == pytest.approx(0.1)
