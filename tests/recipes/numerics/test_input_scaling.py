import keras
import numpy as np
import pytest

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 6, 5, 3)).astype("float64")
PIXELS[..., 1] //= 2  # channels of different mean and deviation
TRAINING, OTHERS = PIXELS[:40], PIXELS[40:] // 4


def as_loaded(pixels):
    """Return pixels, values 0 to 255, as the recipe's `load` gives them."""
    return (pixels / 255).astype("float32")


@pytest.fixture
def recipe(import_recipe):
    return import_recipe("numerics/input_scaling")


def first_weights_receive(model, pixels):
    """Return what reaches the first layer with trainable weights."""
    first = next(layer for layer in model.layers if layer.trainable_weights)
    received = keras.Model(model.input, first.input)(as_loaded(pixels))
    return keras.ops.convert_to_numpy(received).reshape(pixels.shape)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ("none", lambda pixels: pixels),
        ("unit", lambda pixels: pixels / 255),
        ("symmetric", lambda pixels: pixels / 127.5 - 1),
        ("standardised", lambda pixels: (pixels - TRAINING.mean(axis=(0, 1, 2))) / TRAINING.std(axis=(0, 1, 2))),
    ],
)
@pytest.mark.parametrize("pixels", [TRAINING, OTHERS], ids=["training", "others"])
def test_first_weights_receive_the_formula_with_statistics_of_the_training_images(recipe, scaling, expected, pixels):
    model = recipe.build_model(as_loaded(TRAINING), 4, scaling)
    np.testing.assert_allclose(first_weights_receive(model, pixels), expected(pixels), rtol=1e-4, atol=1e-4)


def test_ranges_are_those_that_the_variants_name(recipe):
    extremes = np.stack([np.zeros((6, 5, 3)), np.full((6, 5, 3), 255)])
    for scaling, ends in {"none": (0, 255), "unit": (0, 1), "symmetric": (-1, 1)}.items():
        received = first_weights_receive(recipe.build_model(as_loaded(TRAINING), 4, scaling), extremes)
        np.testing.assert_allclose((received.min(), received.max()), ends, atol=1e-6)
    received = first_weights_receive(recipe.build_model(as_loaded(TRAINING), 4, "standardised"), TRAINING)
    np.testing.assert_allclose(received.mean(axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(received.std(axis=(0, 1, 2)), 1, atol=1e-3)


def test_main_adapts_to_the_training_split_alone_and_reports_what_the_layer_receives(recipe, monkeypatch):
    adapted, build_model = [], recipe.build_model

    def spy(images, classes, scaling):
        model = build_model(images, classes, scaling)
        adapted.extend(layer for layer in model.layers if isinstance(layer, keras.layers.Normalization))
        return model

    monkeypatch.setattr(recipe, "build_model", spy)
    comparison = recipe.main(epochs=1, limit=64)
    images = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 64)[0][0].astype("float64")
    (normalization,) = adapted
    assert float(np.squeeze(keras.ops.convert_to_numpy(normalization.mean))) == pytest.approx(images.mean(), rel=1e-4)
    figures = {row["variant"]: row["figures"] for row in comparison.summary()}
    assert figures["0 to 255"]["deviation of inputs"] == pytest.approx(255 * images.std(), rel=1e-4)
    assert figures["0 to 1"]["mean of inputs"] == pytest.approx(images.mean(), rel=1e-4)
    assert figures["-1 to 1"]["mean of inputs"] == pytest.approx(2 * images.mean() - 1, rel=1e-3)
    assert figures["standardised"]["deviation of inputs"] == pytest.approx(1, rel=1e-3)


def test_every_variant_has_its_scaling_and_a_rate_of_the_grid(recipe):
    scalings, rates = zip(*recipe.VARIANTS.values(), strict=True)
    assert scalings == ("none", "unit", "symmetric", "standardised")
    assert set(rates) <= set(recipe.GRID)
