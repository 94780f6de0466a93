import types

import keras
import numpy as np
import pytest

STEPS = 140


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("schedules/warmup_cosine")


def rates(schedule, steps=STEPS):
    """Return the rate of each step, as the optimizer computes them."""
    if isinstance(schedule, float):
        return np.full(steps, schedule)
    return keras.ops.convert_to_numpy(keras.ops.vectorized_map(schedule, keras.ops.arange(steps)))


def cosine(steps, length):
    """Return a cosine's share of the peak at steps counted from its beginning."""
    return (1 + np.cos(np.pi * np.asarray(steps) / length)) / 2


def test_without_warm_up_the_rate_falls_along_a_cosine_from_the_first_step(recipe):
    found = rates(recipe.learning_rate("cosine", 0.5, STEPS))
    np.testing.assert_allclose(found, 0.5 * cosine(range(STEPS), STEPS), rtol=1e-4, atol=1e-7)
    assert found[0] == 0.5
    np.testing.assert_allclose(found[STEPS // 2], 0.25, rtol=1e-5)


def test_warm_up_takes_a_tenth_of_the_steps_and_the_cosine_the_rest(recipe):
    found = rates(recipe.learning_rate("warm-up", 0.5, STEPS))
    expected = np.concatenate([0.5 * np.arange(14) / 14, 0.5 * cosine(range(126), 126)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert found[0] == 0.0
    np.testing.assert_allclose(found[7], 0.25, rtol=1e-5)  # the middle of the warm-up
    assert found[14] == 0.5 == found.max()  # its end
    np.testing.assert_allclose(found[14 + 63], 0.25, rtol=1e-5)  # the middle of the cosine
    np.testing.assert_allclose(found[-1], 0.5 * np.sin(np.pi / (2 * 126)) ** 2, rtol=1e-2)  # the last step


def test_restarts_begin_at_the_peak_and_double_their_length(recipe):
    found = rates(recipe.learning_rate("restarts", 0.5, STEPS))
    expected = 0.5 * np.concatenate([cosine(range(length), length) for length in (20, 40, 80)])
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found[[0, 20, 60]], 0.5, rtol=1e-6)
    assert found[-1] < 0.5 * 0.001


def test_the_constant_rate_is_a_number(recipe):
    assert recipe.learning_rate("constant", 0.5, STEPS) == 0.5


def test_a_training_of_one_step_has_a_rate(recipe):
    for schedule, _ in recipe.VARIANTS.values():
        assert rates(recipe.learning_rate(schedule, 0.5, 1), 1) == [0.5]


def test_a_start_at_an_integer_0_raises_on_tensorflow_and_is_a_rate_of_0_on_jax():
    schedule = keras.optimizers.schedules.CosineDecay(0, 126, warmup_target=0.5, warmup_steps=14)
    if keras.backend.backend() == "tensorflow":
        with pytest.raises(Exception, match="int32"):
            schedule(3)
    elif keras.backend.backend() == "jax":
        assert not rates(schedule).any()


@pytest.mark.parametrize("limit, epochs, steps", [(300, 3, 9), (256, 2, 4)])
def test_main_gives_the_schedules_as_many_steps_as_fit_makes(recipe, limit, epochs, steps):
    found = {}

    def fit(model, images, labels, *, batch_size, epochs, callbacks, **keywords):
        (run,) = callbacks
        found[run.variant] = model.optimizer
        assert epochs * -(-len(images) // batch_size) == steps
        run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})
        return types.SimpleNamespace(history={})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(limit=limit, epochs=epochs)
    for signal in comparison.result.signals:
        schedule, peak = recipe.VARIANTS[signal["variant"]]
        expected = rates(recipe.learning_rate(schedule, peak, steps), steps)[::7]
        np.testing.assert_allclose(signal["values"], expected, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose(signal["at"], np.arange(0, steps, 7) * epochs / steps)
    assert list(found) == list(recipe.VARIANTS) == ["constant", "cosine", "warm-up, cosine", "cosine, restarts"]
    for variant, optimizer in found.items():
        expected = rates(recipe.learning_rate(*recipe.VARIANTS[variant], steps), steps)
        for step in range(steps):
            optimizer.iterations.assign(step)
            rate = float(keras.ops.convert_to_numpy(optimizer.learning_rate))
            np.testing.assert_allclose(rate, expected[step], rtol=1e-5, atol=1e-9)


def test_trained_with_warm_up_the_first_step_changes_nothing_and_the_second_does(recipe):
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(recipe.learning_rate("warm-up", 0.5, STEPS)), "mse")
    weights = [model.get_weights()]
    for _ in range(2):
        model.train_on_batch(np.ones((4, 1)), np.ones((4, 1)))
        weights.append(model.get_weights())
    np.testing.assert_array_equal(weights[1][0], weights[0][0])
    # Adam's steps are as long as the rate, here that of step 1, where the gradient stays the same.
    np.testing.assert_allclose(abs(weights[2][0] - weights[1][0]), 0.5 / 14, rtol=1e-3)
