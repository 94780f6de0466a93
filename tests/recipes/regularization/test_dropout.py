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


def test_every_training_has_its_dropout(import_recipe, planned):
    recipe = import_recipe("regularization/dropout")
    for training in planned(recipe):
        rates = {layer.rate for layer in training.model.layers if isinstance(layer, layers.Dropout)}
        assert rates == {recipe.VARIANTS[training.variant][0]}
