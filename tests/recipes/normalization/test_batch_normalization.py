import keras
import numpy as np
import pytest
from keras import layers

EPSILON = 1e-3  # Keras's default
MOMENTUM = 0.9
# A dark picture, whose values have a variance near ε, shows on which side of the root ε stands.
IMAGES = np.random.default_rng(0).integers(0, 32, (64, 4, 4, 1)).astype("float32") / 255


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("normalization/batch_normalization")


@pytest.fixture(params=["before", "after"])
def model(request, recipe):
    keras.utils.set_random_seed(0)
    model = recipe.build_model((4, 4, 1), 5, request.param)
    generator = np.random.default_rng(1)
    for layer in normalizations(model):
        # At their starting values, 1 and 0, γ and β would not show.
        layer.gamma.assign(generator.uniform(0.5, 2, layer.gamma.shape))
        layer.beta.assign(generator.uniform(-1, 1, layer.beta.shape))
        layer.moving_mean.assign(generator.uniform(-1, 1, layer.gamma.shape))
        layer.moving_variance.assign(generator.uniform(0, 0.01, layer.gamma.shape))
    return model


def normalizations(model):
    found = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    assert len(found) == 6
    return found


def array(tensor):
    """Return a copy in float64, because a backend may go on to write in the memory that it shows."""
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def around(model, training):
    """Return what goes into and what comes out of every batch normalisation, as [(before, after)]."""
    tensors = [tensor for layer in normalizations(model) for tensor in (layer.input, layer.output)]
    values = [array(value) for value in keras.Model(model.input, tensors)(IMAGES, training=training)]
    return list(zip(values[::2], values[1::2], strict=True))


def moving_statistics(model):
    return [(array(layer.moving_mean), array(layer.moving_variance)) for layer in normalizations(model)]


def normalized(layer, values, mean, variance):
    return array(layer.gamma) * (values - mean) / np.sqrt(variance + EPSILON) + array(layer.beta)


def test_in_training_the_batch_is_normalised_by_its_own_mean_and_variance(model):
    for layer, (before, after) in zip(normalizations(model), around(model, training=True), strict=True):
        expected = normalized(layer, before, before.mean(axis=0), before.var(axis=0))
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-4)


def test_at_inference_the_moving_statistics_normalise(model):
    statistics = moving_statistics(model)
    for layer, (before, after), (mean, variance) in zip(
        normalizations(model), around(model, training=False), statistics, strict=True
    ):
        np.testing.assert_allclose(after, normalized(layer, before, mean, variance), rtol=1e-4, atol=1e-4)


def test_each_training_step_moves_the_statistics_by_a_tenth_and_inference_by_nothing(model):
    old = moving_statistics(model)
    around(model, training=False)
    np.testing.assert_array_equal(moving_statistics(model), old)
    batches = [before for before, _ in around(model, training=True)]
    for batch, (mean, variance), (new_mean, new_variance) in zip(batches, old, moving_statistics(model), strict=True):
        kept = MOMENTUM
        np.testing.assert_allclose(new_mean, kept * mean + (1 - kept) * batch.mean(axis=0), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(new_variance, kept * variance + (1 - kept) * batch.var(axis=0), rtol=1e-4, atol=1e-5)


def test_it_stands_on_the_side_of_the_activation_that_the_variant_names(recipe):
    kinds = {
        "none": ["Dense", "ReLU"],
        "before": ["Dense", "BatchNormalization", "ReLU"],
        "after": ["Dense", "ReLU", "BatchNormalization"],
    }
    assert {place for place, _ in recipe.VARIANTS.values()} == set(kinds)
    for place, block in kinds.items():
        model = recipe.build_model((4, 4, 1), 5, place)
        assert [type(layer).__name__ for layer in model.layers[2:]] == 6 * block + ["Dense"]


def test_only_the_layer_before_it_goes_without_a_bias_which_it_would_subtract(recipe, model):
    *hidden, last = [layer for layer in model.layers if isinstance(layer, layers.Dense)]
    directly_followed = model.layers[3] in normalizations(model)
    assert [layer.use_bias for layer in hidden] == [not directly_followed] * 6
    assert last.use_bias
    if directly_followed:
        layer, values = model.layers[3], np.random.default_rng(2).normal(size=(64, 128)).astype("float32")
        bias = np.random.default_rng(3).normal(size=128).astype("float32")
        np.testing.assert_allclose(layer(values, training=True), layer(values + bias, training=True), atol=1e-4)


def test_kernels_of_a_seed_start_equal(recipe):
    kernels = []
    for place in ("none", "before", "after"):
        keras.utils.set_random_seed(0)
        model = recipe.build_model((4, 4, 1), 5, place)
        kernels.append([array(layer.kernel) for layer in model.layers if isinstance(layer, layers.Dense)])
    for kernel, *others in zip(*kernels, strict=True):
        for other in others:
            np.testing.assert_array_equal(other, kernel)


def test_every_training_has_its_place(recipe, planned):
    kinds = {
        training.variant: [type(layer).__name__ for layer in training.model.layers[2:5]] for training in planned(recipe)
    }
    assert kinds == {
        "none": ["Dense", "ReLU", "Dense"],
        "before ReLU": ["Dense", "BatchNormalization", "ReLU"],
        "after ReLU": ["Dense", "ReLU", "BatchNormalization"],
    }
