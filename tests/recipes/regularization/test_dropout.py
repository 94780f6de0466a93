import keras
import numpy as np
import pytest
from keras import layers

RATE = 0.3
IMAGES = np.random.default_rng(0).random((64, 8, 8, 1)).astype("float32")


@pytest.fixture(scope="module", params=["dense", "convolutional"])
def model(request, import_recipe):
    keras.utils.set_random_seed(0)
    return import_recipe("regularization/dropout").build_model((8, 8, 1), 5, RATE, request.param)


def values_around_dropout(model, training):
    """Return what goes into and what comes out of every dropout layer, as arrays."""
    dropouts = [layer for layer in model.layers if isinstance(layer, layers.Dropout)]
    assert dropouts, "no dropout in the model"
    around = keras.Model(model.input, [tensor for layer in dropouts for tensor in (layer.input, layer.output)])
    values = [keras.ops.convert_to_numpy(value) for value in around(IMAGES, training=training)]
    return list(zip(values[::2], values[1::2], strict=True))


def test_in_training_a_random_share_is_zeroed_and_the_rest_is_scaled_up(model):
    for before, after in values_around_dropout(model, training=True):
        active = before > 0  # a unit that ReLU has switched off cannot show whether it was dropped
        dropped = after[active] == 0
        standard_error = np.sqrt(RATE * (1 - RATE) / dropped.size)
        assert abs(dropped.mean() - RATE) < 4 * standard_error
        np.testing.assert_allclose(after[active][~dropped], before[active][~dropped] / (1 - RATE), rtol=1e-6)


def test_at_inference_nothing_changes(model):
    for before, after in values_around_dropout(model, training=False):
        np.testing.assert_array_equal(after, before)


def test_every_step_and_layer_draws_a_new_mask(model):
    masks = [after == 0 for _ in range(2) for before, after in values_around_dropout(model, training=True)]
    for index, mask in enumerate(masks):
        assert not any(mask.shape == other.shape and np.array_equal(mask, other) for other in masks[:index])


def test_outputs_vary_in_training_only(model):
    np.testing.assert_array_equal(model(IMAGES, training=False), model(IMAGES, training=False))
    assert not np.array_equal(model(IMAGES, training=True), model(IMAGES, training=True))


def test_baseline_has_no_randomness(import_recipe):
    recipe = import_recipe("regularization/dropout")
    assert [rate for rate, _ in recipe.VARIANTS.values()] == [0.0, 0.2, 0.5, 0.8]
    model = recipe.build_model((8, 8, 1), 5, 0.0)
    np.testing.assert_array_equal(model(IMAGES, training=True), model(IMAGES, training=False))


@pytest.mark.parametrize("search", [False, True])
def test_every_training_has_its_dropout_and_a_rate_that_falls_to_zero(search, import_recipe, monkeypatch):
    recipe, fit, seen = import_recipe("regularization/dropout"), keras.Model.fit, []

    def spy(model, *arguments, **keywords):
        schedule = model.optimizer._learning_rate
        first, last = (float(schedule(step)) for step in (0, 2 * keywords["epochs"]))
        (dropout, *_) = [layer.rate for layer in model.layers if isinstance(layer, layers.Dropout)]
        seen.append((dropout, pytest.approx(first), pytest.approx(last, abs=1e-9)))
        return fit(model, *arguments, **keywords)

    monkeypatch.setattr(keras.Model, "fit", spy)
    monkeypatch.setattr(recipe, "VARIANTS", {"no dropout": (0.0, 0.003), "dropout 0.5": (0.5, 0.001)})
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=search, epochs=2, limit=200)
    if search:
        assert seen == [(dropout, rate, 0.0) for dropout in (0.0, 0.5) for rate in recipe.GRID]
        assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * 2
    else:
        assert seen == [(0.0, 0.003, 0.0), (0.5, 0.001, 0.0)]
