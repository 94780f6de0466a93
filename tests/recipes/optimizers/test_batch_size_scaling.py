import keras
import numpy as np
import pytest

EPOCHS = 20
# The batch size, the steps that it makes of 48 images in an epoch, and what multiplies the rate for 32 images.
EXPECTED = {
    "32, tuned": (32, 2, 1),
    "256, kept": (256, 1, 1),
    "256, root": (256, 1, 8**0.5),
    "256, linear": (256, 1, 8),
    "1024, root": (1024, 1, 32**0.5),
    "1024, linear": (1024, 1, 32),
}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("optimizers/batch_size_scaling")


@pytest.fixture(scope="module")
def observed(recipe, observe):
    return observe(recipe, train=False, epochs=EPOCHS)


def rate_at(run, step):
    return float(keras.ops.convert_to_numpy(run.model.optimizer._learning_rate(step)))


def test_peak_rates_are_scaled_by_the_rules(recipe, observed):
    assert list(observed) == [*EXPECTED, "1024, tuned"]
    for variant, (batch_size, _, factor) in EXPECTED.items():
        run = observed[variant]
        assert run.arguments["batch_size"] == batch_size
        assert run.figures["peak rate"] == pytest.approx(recipe.VARIANTS["32, tuned"][-1] * factor)
    tuned = observed["1024, tuned"]
    assert tuned.figures["peak rate"] == pytest.approx(recipe.VARIANTS["1024, tuned"][-1])


def test_schedules_last_as_long_as_the_training_and_rise_for_a_tenth_of_it(observed):
    for variant, (_, steps_per_epoch, _) in EXPECTED.items():
        run, steps = observed[variant], EPOCHS * steps_per_epoch
        peak, warmup = run.figures["peak rate"], steps // 10
        assert run.figures["steps"] == steps
        assert rate_at(run, 0) == 0
        assert rate_at(run, warmup / 2) == pytest.approx(peak / 2)
        assert rate_at(run, warmup) == pytest.approx(peak)
        assert rate_at(run, warmup + (steps - warmup) / 2) == pytest.approx(peak / 2, rel=1e-5)
        assert rate_at(run, steps) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("variant", ["256, linear", "1024, linear"])
def test_a_linearly_scaled_step_is_the_sum_of_the_small_steps_from_one_point(
    recipe, observed, images, gradients, weights_of, variant
):
    run, small, (pictures, labels) = observed[variant], observed["32, tuned"], images[0]
    times = EXPECTED[variant][0] // 32
    # Made once more as many times: each part of the large batch is the 48 images again, in another order or not.
    parts = [np.random.default_rng(part).permutation(48)[:6] for part in range(times)]
    # The rate of the first step is 0, and changes nothing.
    for _ in range(2):
        chosen = np.concatenate(parts)
        run.model.train_on_batch(pictures[chosen], labels[chosen])
    # As far into the warm-up as the second step of the large batch: the small one's has twice as many steps.
    small_rate = rate_at(small, 2)
    found = [gradients(run.before, pictures[part], labels[part]) for part in parts]
    for after, before, *each in zip(weights_of(run.model), run.before, *found, strict=True):
        expected = -small_rate * np.sum(each, axis=0)
        np.testing.assert_allclose(after - before, expected, rtol=2e-3, atol=2e-4 * abs(expected).max() + 1e-7)


def test_search_tunes_the_tuned_alone(recipe, images, monkeypatch):
    seen = []

    def fit(model, *arguments, batch_size, callbacks, **keywords):
        # Without training.
        (run,) = callbacks
        rates = model.optimizer._learning_rate
        seen.append((run.variant, batch_size, pytest.approx(rates.warmup_target)))
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"accuracy": 0.5}}, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "load", lambda *arguments: images)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    recipe.main(search=True, epochs=1, seeds=1)
    sizes = {"32, tuned": 32, "1024, tuned": 1024}
    assert seen == [(variant, size, rate) for variant, size in sizes.items() for rate in (0.01, 0.02)]
