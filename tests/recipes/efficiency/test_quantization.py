import keras
import numpy as np
import pytest
from keras import ops

IMAGE_SHAPE, CLASSES = (12, 12, 1), 3


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("efficiency/quantization")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).normal(size=(64, *IMAGE_SHAPE)).astype("float32")


@pytest.fixture(scope="module")
def model(recipe):
    keras.utils.set_random_seed(0)
    return recipe.build_model(IMAGE_SHAPE, CLASSES)


@pytest.fixture(scope="module")
def quantized(recipe, model):
    return {variant: recipe.quantize(model, how) for variant, how in recipe.VARIANTS.items()}


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


@pytest.mark.parametrize("variant, group", [("int4", 128), ("int4, no groups", 10_000)])
def test_four_bits_have_sixteen_values_for_each_group_of_weights(model, quantized, variant, group):
    for layer, kernel in zip(dense_layers(quantized[variant]), kernels(model), strict=True):
        # Row by row of the identity, whose rounding is exact.
        restored = ops.convert_to_numpy(linear(layer, np.eye(len(kernel), dtype="float32")))
        for start in range(0, len(kernel), group):
            some, expected = restored[start : start + group], kernel[start : start + group]
            if group == 128:
                step = (np.maximum(expected.max(axis=0), 0) - np.minimum(expected.min(axis=0), 0)) / 15
            else:
                step = np.abs(expected).max(axis=0) / 7
            # One step at the ends, where zero must be a whole number.
            assert np.all(np.abs(some - expected) <= 1.01 * step + 1e-6)
            assert np.quantile(np.abs(some - expected) / step, 0.95) < 0.5
            assert max(len(np.unique(np.round(column, 5))) for column in some.T) <= 16


def linear(layer, inputs):
    """Return what a layer gives without its activation."""
    activation, layer.activation = layer.activation, None
    try:
        return layer(inputs)
    finally:
        layer.activation = activation


def test_more_bits_and_groups_make_the_error_smaller(model, quantized, images):
    expected = ops.convert_to_numpy(model(images))
    error = {name: np.linalg.norm(ops.convert_to_numpy(each(images)) - expected) for name, each in quantized.items()}
    assert error["float32"] == 0
    assert 0 < 5 * error["int8"] < error["int4"] < error["int4, no groups"]


def test_network_is_left_as_it_was(recipe, model):
    before = model.get_weights()
    recipe.quantize(model, "int8")
    for weight, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_file_has_a_byte_or_half_a_byte_a_weight_and_loads_equal(recipe, model, quantized, images):
    weights = sum(kernel.size for kernel in kernels(model))
    sizes = {}
    for variant, each in quantized.items():
        sizes[variant], loaded = recipe.store(each)
        np.testing.assert_array_equal(loaded.predict(images, verbose=0), each.predict(images, verbose=0))
    # Beside the weights there are biases, scales and the description of the network.
    for variant, bytes_each in {"float32": 4, "int8": 1, "int4": 0.5, "int4, no groups": 0.5}.items():
        assert 0 < 1000 * sizes[variant] - weights * bytes_each < 60_000


@pytest.mark.skipif(keras.__version__ > "3.15.9", reason="repaired")
def test_gptq_of_this_keras_is_plain_rounding(recipe, images):
    """If it fails, Keras has changed: then GPTQ may become a variant."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((24,))
    model = keras.Model(inputs, keras.layers.Dense(8)(inputs))
    # Correlated, so that there is much to make up for.
    generator = np.random.default_rng(0)
    x = (generator.normal(size=(64, 4)) @ generator.normal(size=(4, 24))).astype("float32")
    copy = recipe.quantize(model, None)
    config = keras.quantizers.GPTQConfig(
        # Keras asks for texts, cut into sequences of tokens. Here a text is one token, the number of an example.
        dataset=[np.arange(len(x))],
        tokenizer="none",
        num_samples=len(x),
        sequence_length=1,
        quantization_layer_structure={
            "pre_block_layers": [lambda numbers: ops.take(x, numbers, axis=0)],
            "sequential_blocks": dense_layers(copy),
        },
    )
    copy.quantize(config=config)
    expected = recipe.quantize(model, "int4")
    np.testing.assert_allclose(copy.predict(x), expected.predict(x), atol=1e-4)


def test_figures_are_those_of_each_network_after_one_training(recipe, monkeypatch):
    made, timed = [], []
    store = recipe.store

    def spy_on_store(model):
        made.append(store(model))
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
