import keras
import numpy as np
import pytest
from keras import ops

IMAGE_SHAPE, CLASSES = (12, 12, 1), 3


@pytest.fixture(scope="module")
def recipe(import_recipe):
    recipe = import_recipe("efficiency/quantization")
    with pytest.MonkeyPatch.context() as patch:
        # GPTQ takes time for each column of a layer's weights.
        patch.setattr(recipe, "WIDTH", 48)
        yield recipe


@pytest.fixture(scope="module")
def images():
    # Correlated, for GPTQ wins nothing of independent pixels.
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(8, 144))
    return (generator.normal(size=(64, 8)) @ mixing).reshape(-1, *IMAGE_SHAPE).astype("float32")


@pytest.fixture(scope="module")
def model(recipe):
    keras.utils.set_random_seed(0)
    return recipe.build_model(IMAGE_SHAPE, CLASSES)


@pytest.fixture(scope="module")
def quantized(recipe, model, images):
    return {mode: recipe.quantize(model, mode, images) for mode in recipe.VARIANTS.values()}


def dense_layers(model):
    return [layer for layer in model.layers if isinstance(layer, keras.layers.Dense)]


def kernels(model):
    return [ops.convert_to_numpy(layer.kernel).astype("float64") for layer in dense_layers(model)]


def test_weights_are_whole_numbers_wrong_by_half_a_step_at_most(model, quantized):
    for layer, kernel in zip(dense_layers(quantized["int8"]), kernels(model), strict=True):
        whole = ops.convert_to_numpy(layer._kernel)
        assert whole.dtype == np.int8
        steps = np.abs(kernel).max(axis=0) / 127
        assert np.all(np.abs(whole * steps - kernel) <= 0.5001 * steps)


def test_four_bits_have_sixteen_values_for_each_group_of_weights(model, quantized):
    for layer, kernel in zip(dense_layers(quantized["int4"]), kernels(model), strict=True):
        # Row by row of the identity, whose rounding is exact.
        inputs = np.eye(len(kernel), dtype="float32")
        restored = ops.convert_to_numpy(linear(layer, inputs))
        for start in range(0, len(kernel), 128):
            group, expected = restored[start : start + 128], kernel[start : start + 128]
            step = (np.maximum(expected.max(axis=0), 0) - np.minimum(expected.min(axis=0), 0)) / 15
            # One step at the ends, where zero must be a whole number.
            assert np.all(np.abs(group - expected) <= 1.01 * step + 1e-6)
            assert np.median(np.abs(group - expected) / step) < 0.5
            assert max(len(np.unique(np.round(column, 5))) for column in group.T) <= 16


def linear(layer, inputs):
    activation, layer.activation = layer.activation, None
    try:
        return layer(inputs)
    finally:
        layer.activation = activation


def test_calibration_makes_the_error_of_the_outputs_smaller(model, quantized, images):
    expected = ops.convert_to_numpy(model(images))
    error = {mode: np.linalg.norm(ops.convert_to_numpy(each(images)) - expected) for mode, each in quantized.items()}
    assert error[None] == 0
    assert 0 < error["int8"] < error["gptq"] < error["int4"]


def test_network_is_left_as_it_was(recipe, model, images):
    before = [weight.copy() for weight in model.get_weights()]
    for mode in ("int8", "gptq"):
        recipe.quantize(model, mode, images)
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_file_has_a_byte_or_half_a_byte_a_weight_and_loads_equal(recipe, model, quantized, images):
    weights = sum(kernel.size for kernel in kernels(model))
    sizes = {}
    for mode, each in quantized.items():
        sizes[mode], loaded = recipe.store(each, mode)
        np.testing.assert_array_equal(loaded.predict(images, verbose=0), each.predict(images, verbose=0))
    # Beside the weights there are biases, scales and the description of the network.
    for mode, bytes_each in {None: 4, "int8": 1, "int4": 0.5, "gptq": 0.5}.items():
        assert 1 < 1000 * sizes[mode] / (weights * bytes_each) < (1.1 if mode is None else 3)


def test_figures_are_those_of_each_network_after_one_training(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "CALIBRATION", 8)
    made, timed = [], []
    store = recipe.store

    def spy_on_store(model, mode):
        made.append(store(model, mode))
        return made[-1]

    def give_times(models, images):
        timed.append((list(models), len(images)))
        return {name: 1.0 + number for number, name in enumerate(models)}

    monkeypatch.setattr(recipe, "store", spy_on_store)
    monkeypatch.setattr(recipe, "milliseconds", give_times)
    comparison = recipe.main(limit=200, epochs=1)
    _, _, (images, labels), _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 200)
    figures = {(each["variant"], each["name"]): each["value"] for each in comparison.result.figures}
    accuracy = {run["variant"]: run["metrics"]["test"]["accuracy"] for run in comparison.result.runs}
    assert timed == [(list(recipe.VARIANTS), 200)]
    for number, (variant, (size, loaded)) in enumerate(zip(recipe.VARIANTS, made, strict=True)):
        assert figures[variant, "KB"] == size
        assert figures[variant, "ms a batch"] == 1 + number
        predicted = ops.convert_to_numpy(loaded(images)).argmax(axis=-1)
        assert accuracy[variant] == pytest.approx(np.mean(predicted == labels), abs=0.01)


def test_models_are_timed_in_turn(recipe, monkeypatch):
    calls = []

    class Model:
        def __init__(self, name):
            self.name = name

        def predict_on_batch(self, images):
            calls.append(self.name)

    monkeypatch.setattr(recipe, "REPETITIONS", 3)
    times = recipe.milliseconds({"a": Model("a"), "b": Model("b")}, None)
    assert calls == ["a", "b"] * 4
    assert set(times) == {"a", "b"}
    assert all(time >= 0 for time in times.values())
