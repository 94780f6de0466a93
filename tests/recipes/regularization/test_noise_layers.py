import keras
import numpy as np
import pytest
from keras import layers

RATE, DEVIATION = 0.2, 0.5
IMAGES = np.random.default_rng(0).random((128, 16, 16, 1)).astype("float32")
KINDS = {
    "Dropout": layers.Dropout,
    "SpatialDropout2D": layers.SpatialDropout2D,
    "GaussianDropout": layers.GaussianDropout,
    "GaussianNoise": layers.GaussianNoise,
}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("regularization/noise_layers")


def array(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def build(recipe, variant):
    keras.utils.set_random_seed(0)
    return recipe.build_model((16, 16, 1), 5, recipe.VARIANTS[variant][0])


def around_noise(recipe, variant, training):
    """Return [(what goes into a noise layer, what comes out)], of shape (examples, height, width, maps)."""
    model = build(recipe, variant)
    tensors = []
    for before, layer in zip(model.layers, model.layers[1:], strict=False):
        if isinstance(before, layers.Conv2D):
            assert isinstance(layer, KINDS[variant])
            tensors += [layer.input, layer.output]
    values = [array(value) for value in keras.Model(model.input, tensors)(IMAGES, training=training)]
    assert [value.shape for value in values] == [(128, 8, 8, 12)] * 2 + [(128, 4, 4, 24)] * 2
    return list(zip(values[::2], values[1::2], strict=True))


def factors(recipe, variant):
    """Return for each layer what its values were multiplied by, NaN where ReLU gives zero."""
    found = []
    for before, after in around_noise(recipe, variant, training=True):
        assert not after[before == 0].any()
        found.append(np.where(before > 1e-3, after / np.where(before > 1e-3, before, 1), np.nan))
    return found


def ends_of_maps(values):
    """Return the lowest and the highest factor of each map of each example, infinite where none is known."""
    unknown = np.isnan(values)
    return np.where(unknown, np.inf, values).min(axis=(1, 2)), np.where(unknown, -np.inf, values).max(axis=(1, 2))


def assert_mean_and_variance(values, mean, variance, draws):
    """Check moments to within four standard errors, for a distribution whose fourth moment is up to four variances²."""
    assert abs(values.mean() - mean) < 4 * np.sqrt(variance / draws)
    assert abs(values.var() - variance) < 4 * np.sqrt(4 * variance**2 / draws)


def test_dropout_draws_for_each_pixel(recipe):
    for values in factors(recipe, "Dropout"):
        known = values[np.isfinite(values)]
        np.testing.assert_allclose(known[known > 0], 1 / (1 - RATE), rtol=1e-4)
        assert_mean_and_variance(known, 1, RATE / (1 - RATE), known.size)
        lowest, highest = ends_of_maps(values)
        assert (highest > lowest).mean() > 0.5


def test_spatial_dropout_draws_for_each_map_of_each_example(recipe):
    for values in factors(recipe, "SpatialDropout2D"):
        lowest, highest = ends_of_maps(values)
        active = np.isfinite(lowest)
        assert active.mean() > 0.5
        np.testing.assert_allclose(highest[active], lowest[active], rtol=1e-4)
        kept = lowest[active] > 0
        np.testing.assert_allclose(lowest[active][kept], 1 / (1 - RATE), rtol=1e-4)
        assert_mean_and_variance(lowest[active], 1, RATE / (1 - RATE), active.sum())
        # Neither all maps of an example nor all examples of a map share it.
        dropped = lowest == 0
        assert dropped.any()
        assert not dropped.all(axis=1).any()
        assert not dropped.all(axis=0).any()


def test_gaussian_dropout_multiplies_by_normal_numbers_of_the_mean_and_variance_of_dropout(recipe):
    for values in factors(recipe, "GaussianDropout"):
        known = values[np.isfinite(values)]
        assert_mean_and_variance(known, 1, RATE / (1 - RATE), known.size)
        # Normal: 68.3 % lie within one deviation.
        within = (np.abs(known - 1) < np.sqrt(RATE / (1 - RATE))).mean()
        assert abs(within - 0.6827) < 4 * 0.5 / np.sqrt(known.size)


def test_gaussian_noise_adds_normal_numbers_to_zeros_too(recipe):
    for before, after in around_noise(recipe, "GaussianNoise", training=True):
        noise = after - before
        assert_mean_and_variance(noise, 0, DEVIATION**2, noise.size)
        assert_mean_and_variance(noise[before == 0], 0, DEVIATION**2, (before == 0).sum())
        assert abs((np.abs(noise) < DEVIATION).mean() - 0.6827) < 4 * 0.5 / np.sqrt(noise.size)


@pytest.mark.parametrize("variant", KINDS)
def test_at_inference_nothing_changes_and_every_step_draws_anew(recipe, variant):
    for before, after in around_noise(recipe, variant, training=False):
        np.testing.assert_array_equal(after, before)
    model = build(recipe, variant)
    assert not np.array_equal(array(model(IMAGES, training=True)), array(model(IMAGES, training=True)))


def test_the_baseline_has_no_noise_and_the_others_have_no_weights_for_it(recipe):
    plain = build(recipe, "no noise")
    assert [type(layer).__name__ for layer in plain.layers[1:]] == ["Conv2D", "Conv2D", "Flatten", "Dense", "Dense"]
    np.testing.assert_array_equal(array(plain(IMAGES, training=True)), array(plain(IMAGES, training=False)))
    assert list(recipe.VARIANTS) == ["no noise", *KINDS]
    for variant in KINDS:
        model = build(recipe, variant)
        shapes = [[variable.shape for variable in each.trainable_variables] for each in (model, plain)]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("search", [False, True])
def test_every_training_has_its_noise_and_a_rate_that_falls_to_zero(search, recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, epochs, callbacks, **keywords):
        # Without training.
        schedule = model.optimizer._learning_rate
        first, last = (float(schedule(step)) for step in (0, 2 * epochs))
        seen.append((type(model.layers[2]).__name__, pytest.approx(first), pytest.approx(last, abs=1e-9)))
        run = callbacks[-1]
        metrics = {"validation" if search else "test": {"accuracy": 0.5}}
        run.comparison._finish_run(run.variant, run.seed, metrics, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=search, epochs=2, limit=200)
    kinds = ["Conv2D", *KINDS]
    if search:
        assert seen == [(kind, rate, 0.0) for kind in kinds for rate in recipe.GRID]
        assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * 5
    else:
        rates = [value[-1] for value in recipe.VARIANTS.values()]
        assert seen == [(kind, rate, 0.0) for kind, rate in zip(kinds, rates, strict=True)]
