import keras
import numpy as np
import pytest
from keras import layers

CHANNELS, HIDDEN, BLOCKS = 24, 6, 3
GENERATOR = np.random.default_rng(0)
IMAGES = (GENERATOR.random((8, 13, 10, 1)) * np.linspace(0.1, 1, 8).reshape(8, 1, 1, 1)).astype("float32")


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("architectures/squeeze_excitation")


@pytest.fixture(scope="module")
def model(recipe):
    keras.utils.set_random_seed(0)
    model = recipe.build_model(IMAGES.shape[1:], 5, attention=True)
    generator = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, layers.Dense):
            # At their starting values, biases would not show, and the factors hardly differ.
            layer.kernel.assign(generator.normal(size=layer.kernel.shape))
            layer.bias.assign(generator.normal(size=layer.bias.shape))
    return model


def array(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def blocks_of(model):
    """Return [(x, y, the two dense layers)] of each block: what it scales, for IMAGES, and what comes of it."""
    found = [layer for layer in model.layers if isinstance(layer, layers.Multiply)]
    assert len(found) == BLOCKS
    dense = [layer for layer in model.layers if isinstance(layer, layers.Dense)][:-1]
    tensors = [tensor for layer in found for tensor in (layer.input[0], layer.output)]
    values = [array(value) for value in keras.Model(model.input, tensors)(IMAGES)]
    return list(zip(values[::2], values[1::2], dense[::2], dense[1::2], strict=True))


def factors(x, first, second):
    """Return s by the formula, of shape (examples, channels)."""
    hidden = np.maximum(x.mean(axis=(1, 2)) @ array(first.kernel) + array(first.bias), 0)
    return 1 / (1 + np.exp(-(hidden @ array(second.kernel) + array(second.bias))))


def parameters_by_hand(channels, classes, filters, attention):
    # A batch normalisation has four numbers for each filter.
    first, last = 9 * channels * filters + 4 * filters, filters * classes + classes
    convolution = 9 * filters * filters + 4 * filters
    squeeze = filters * HIDDEN + HIDDEN + HIDDEN * filters + filters
    return first + BLOCKS * (convolution + attention * squeeze) + last


def test_each_channel_is_scaled_by_one_factor_that_the_whole_image_decides(model):
    for x, y, first, second in blocks_of(model):
        s = factors(x, first, second)
        assert s.shape == (len(IMAGES), CHANNELS)
        assert s.min() > 0
        assert s.max() < 1
        np.testing.assert_allclose(y, x * s[:, None, None, :], rtol=1e-4, atol=1e-5 * np.abs(x).max())
        # It is the image that decides.
        assert s.std(axis=0).max() > 1e-3
        assert np.abs(y - x).max() > 0.1 * np.abs(x).max()


def test_a_pixel_changes_the_scale_of_pixels_that_no_convolution_brings_it_to(recipe):
    """With another value in one corner, the opposite corner's features change by the factor of their channel alone."""
    generator = np.random.default_rng(2)
    inputs = keras.Input((9, 9, CHANNELS))
    block = keras.Model(inputs, recipe.squeeze_excitation(inputs))
    block.set_weights([generator.normal(size=weight.shape) for weight in block.get_weights()])
    x = generator.random((1, 9, 9, CHANNELS)).astype("float32")
    other = x.copy()
    other[:, 0, 0] += 50
    ratios = (array(block(other)) / array(block(x)))[0, 1:, 1:]
    np.testing.assert_allclose(ratios, np.broadcast_to(ratios[0, 0], ratios.shape), rtol=1e-3)
    assert np.abs(ratios - 1).max() > 0.01


@pytest.mark.parametrize("image_shape, classes", [((28, 28, 1), 10), ((9, 11, 3), 3)])
def test_parameters_are_those_counted_by_hand_and_the_wider_network_has_as_many(recipe, image_shape, classes):
    channels = image_shape[-1]
    target = recipe.build_model(image_shape, classes, attention=True).count_params()
    assert target == parameters_by_hand(channels, classes, CHANNELS, True)
    plain = recipe.build_model(image_shape, classes, attention=False).count_params()
    assert plain == parameters_by_hand(channels, classes, CHANNELS, False)
    filters = recipe.equal_filters(image_shape, classes)
    sizes = [recipe.build_model(image_shape, classes, False, filters + step).count_params() for step in (0, -1, 1)]
    assert sizes == [parameters_by_hand(channels, classes, filters + step, False) for step in (0, -1, 1)]
    errors = [abs(size - target) for size in sizes]
    assert errors[0] == min(errors)
    assert sizes[0] == pytest.approx(target, rel=0.05)


def test_deviations_are_those_of_the_factors_over_the_images(recipe, model):
    expected = [factors(x, first, second).std(axis=0).mean() for x, _, first, second in blocks_of(model)]
    np.testing.assert_allclose(recipe.deviations_of_factors(model, IMAGES), expected, rtol=1e-3)


def test_deviations_are_zero_where_the_factors_are_constant(recipe):
    keras.utils.set_random_seed(0)
    model = recipe.build_model(IMAGES.shape[1:], 5, attention=True)
    for _, _, _, second in blocks_of(model):
        second.kernel.assign(np.zeros((HIDDEN, CHANNELS)))
    np.testing.assert_allclose(recipe.deviations_of_factors(model, IMAGES), [0] * BLOCKS, atol=1e-7)


def test_variants_are_the_networks_of_their_names(recipe):
    kinds = {variant: value[0] for variant, value in recipe.VARIANTS.items()}
    assert kinds == {"wider": "wider", "squeeze-excitation": "attention", "plain": "plain"}
    assert all(rate in recipe.GRID for _, rate in recipe.VARIANTS.values())


@pytest.mark.parametrize("search", [False, True])
def test_every_training_has_its_network_and_a_rate_that_falls_to_zero(search, recipe, monkeypatch):
    seen, parameters, starts, deviations = [], {}, {}, []

    def fit(model, *arguments, epochs, validation_data, callbacks, **keywords):
        # Without training.
        (run,) = callbacks
        schedule = model.optimizer._learning_rate
        first, last = (float(schedule(step)) for step in (0, 2 * epochs))
        has_attention = any(isinstance(layer, layers.Multiply) for layer in model.layers)
        if has_attention:
            deviations[:] = recipe.deviations_of_factors(model, validation_data[0])
        seen.append((has_attention, pytest.approx(first), pytest.approx(last, abs=1e-9)))
        parameters[run.variant] = model.count_params()
        starts[run.variant] = array(model.layers[1].kernel)
        metrics = {"validation" if search else "test": {"accuracy": 0.5}}
        run.comparison._finish_run(run.variant, run.seed, metrics, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=search, epochs=2, limit=200)
    filters = recipe.equal_filters((28, 28, 1), 10)
    assert parameters == {
        "wider": parameters_by_hand(1, 10, filters, False),
        "squeeze-excitation": parameters_by_hand(1, 10, CHANNELS, True),
        "plain": parameters_by_hand(1, 10, CHANNELS, False),
    }
    np.testing.assert_array_equal(starts["plain"], starts["squeeze-excitation"])
    if search:
        assert seen == [(kind, rate, 0.0) for kind in (False, True, False) for rate in recipe.GRID]
        assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * 3
        return
    rates = [value[-1] for value in recipe.VARIANTS.values()]
    assert seen == [(kind, rate, 0.0) for kind, rate in zip((False, True, False), rates, strict=True)]
    assert {row["variant"]: row["figures"]["parameters"] for row in comparison.summary()} == parameters
    (signal,) = comparison.result.signals
    assert (signal["variant"], signal["values"]) == ("squeeze-excitation", pytest.approx(deviations))
