import keras
import numpy as np
import pytest
from keras import ops

IMAGE_SHAPE, CLASSES = (12, 12, 1), 3
PEAKS = {"float32": 30.0, "bfloat16": 20.0, "float16": 10.0}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("efficiency/mixed_precision")


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    return generator.normal(size=(32, *IMAGE_SHAPE)).astype("float32"), generator.integers(0, CLASSES, 32)


def build(recipe, policy):
    keras.utils.set_random_seed(0)
    model = recipe.build_model(IMAGE_SHAPE, CLASSES, policy)
    recipe.compile_model(model, 10)
    return model


@pytest.mark.parametrize("variant, bits, digits", [("float32", 32, 24), ("bfloat16", 16, 8), ("float16", 16, 11)])
def test_layers_compute_in_few_bits_and_variables_and_logits_have_32(recipe, data, variant, bits, digits):
    model = build(recipe, recipe.VARIANTS[variant])
    assert keras.config.dtype_policy().name == "float32", "the policy is left to others"
    computed = {layer.compute_dtype for layer in model.layers if isinstance(layer, keras.layers.Conv2D)}
    assert computed == {variant}
    assert {variable.dtype for variable in model.variables} == {"float32"}
    logits = model(data[0])
    assert keras.backend.standardize_dtype(logits.dtype) == "float32"
    features = keras.Model(model.input, model.layers[-2].output)(data[0])
    features = ops.convert_to_numpy(ops.cast(features, "float32")).astype("float64")
    # A number with so many binary digits is a whole one when it is multiplied by a power of two.
    exponents = np.floor(np.log2(np.maximum(abs(features), 1e-30)))
    is_rounded = np.mod(features * 2.0 ** (digits - 1 - exponents), 1) == 0
    assert is_rounded.all()
    assert (bits == 32) != (np.mod(features * 2.0 ** (11 - 1 - exponents), 1) == 0).all()


def test_float16_alone_scales_the_loss(recipe):
    wrapped = {
        variant: isinstance(build(recipe, policy).optimizer, keras.optimizers.LossScaleOptimizer)
        for variant, policy in recipe.VARIANTS.items()
    }
    assert wrapped == {"float32": False, "bfloat16": False, "float16": True}


def test_gradient_that_is_not_finite_skips_the_step_and_halves_the_scale(recipe, data):
    model = build(recipe, "mixed_float16")
    optimizer = model.optimizer
    optimizer.build(model.trainable_variables)
    images, labels = data
    before = model.get_weights()
    scale = float(ops.convert_to_numpy(optimizer.dynamic_scale))
    # Beyond the largest number of float16.
    model.fit(np.full_like(images, 1e6), labels, batch_size=32, verbose=0)
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)
    assert float(ops.convert_to_numpy(optimizer.dynamic_scale)) == scale / 2
    assert int(ops.convert_to_numpy(optimizer.iterations)) == 0
    # The scale is lowered until the gradients are finite.
    model.fit(images, labels, batch_size=32, epochs=10, verbose=0)
    assert 0 < int(ops.convert_to_numpy(optimizer.iterations)) <= 10
    assert all(np.abs(weight - first).max() > 0 for weight, first in zip(model.get_weights(), before, strict=True))


@pytest.mark.parametrize("policy, most", [("mixed_bfloat16", 0.1), ("mixed_float16", 0.03)])
def test_gradients_are_those_of_float32_up_to_rounding(recipe, data, policy, most):
    # Of one sign and one class, so that the sums do not cancel, which would enlarge the error. A unit near zero that
    # changes sides makes it larger than a few roundings.
    images, labels = abs(data[0]), np.zeros_like(data[1])
    moved = []
    for each in ("float32", policy):
        model = build(recipe, each)
        optimizer = keras.optimizers.SGD(1.0)
        if each == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=128.0)
        model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        before = model.get_weights()
        model.fit(images, labels, batch_size=32, verbose=0)
        moved.append([after - first for after, first in zip(model.get_weights(), before, strict=True)])
    for expected, gradient in zip(*moved, strict=True):
        error = np.linalg.norm(gradient - expected) / np.linalg.norm(expected)
        assert 0 < error < most


def test_figures_are_peak_and_time_of_a_step(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "peak_megabytes", lambda variant, *arguments: PEAKS[variant])
    comparison = recipe.main(limit=300, epochs=3)
    figures = {(each["variant"], each["name"]): each["value"] for each in comparison.result.figures}
    for run in comparison.result.runs:
        assert figures[run["variant"], "peak MB"] == PEAKS[run["variant"]]
        _, *later = run["epoch_seconds"]
        assert figures[run["variant"], "ms a step"] == pytest.approx(1000 * np.median(later) / 3)


def test_peak_is_that_of_another_process(recipe):
    assert 1 < recipe.peak_megabytes("float32", "fashion_mnist_10k", recipe.DATA_DIR, 200) < 2000
