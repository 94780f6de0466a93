import keras
import numpy as np
import pytest
from keras import layers

GENERATOR = np.random.default_rng(0)
ROWS = GENERATOR.normal(size=(6, 5)).astype("float32")
IMAGES = GENERATOR.random((16, 8, 8, 1)).astype("float32")
LABELS = np.arange(16) % 5


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("normalization/weight_normalization")


def to_numpy(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor))


def lengths(kernel):
    """Return ‖w‖ of each output unit, the kernel's last axis."""
    return np.sqrt((kernel.reshape(-1, kernel.shape[-1]).astype("float64") ** 2).sum(axis=0))


@pytest.fixture
def dense(recipe):
    """A wrapped dense layer of 3 units with lengths, directions and biases of our own."""
    wrapper = recipe.WeightNormalization(layers.Dense(3))
    wrapper.build((None, 5))
    generator = np.random.default_rng(1)
    for weight in wrapper.trainable_variables:
        weight.assign(generator.normal(size=weight.shape) + 2.0)
    return wrapper


def test_the_kernel_of_each_unit_has_length_g_and_the_direction_of_v(dense):
    kernel, v, g = to_numpy(dense.kernel()), to_numpy(dense.layer.kernel), to_numpy(dense.g)
    np.testing.assert_allclose(lengths(kernel), g, rtol=1e-5)
    np.testing.assert_allclose(kernel / lengths(kernel), v / lengths(v), rtol=1e-5)
    np.testing.assert_allclose(dense(ROWS), ROWS @ (g * v / lengths(v)) + to_numpy(dense.layer.bias), rtol=1e-4)


def test_the_length_of_v_does_not_matter(dense):
    before = to_numpy(dense(ROWS))
    dense.layer.kernel.assign(to_numpy(dense.layer.kernel) * [0.1, 3.0, 20.0])
    np.testing.assert_allclose(dense(ROWS), before, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_reparametrised_formula(dense):
    targets = np.random.default_rng(2).normal(size=(6, 3)).astype("float32")
    model = keras.Sequential([keras.Input((5,)), dense])
    model.compile(keras.optimizers.SGD(1.0), lambda y, prediction: keras.ops.sum((prediction - y) ** 2, axis=-1))
    v, g, bias = (to_numpy(weight).astype("float64") for weight in (dense.layer.kernel, dense.g, dense.layer.bias))
    error = 2 * (ROWS @ (g * v / lengths(v)) + bias - targets) / len(ROWS)
    of_w = ROWS.T @ error
    of_g = (of_w * v).sum(axis=0) / lengths(v)
    of_v = g / lengths(v) * of_w - g * of_g / lengths(v) ** 2 * v
    model.train_on_batch(ROWS, targets)
    for weight, start, expected in ((dense.g, g, of_g), (dense.layer.kernel, v, of_v), (dense.layer.bias, bias, error)):
        expected = expected.sum(axis=0) if weight is dense.layer.bias else expected
        np.testing.assert_allclose(start - to_numpy(weight), expected, rtol=1e-3, atol=1e-4)
    assert (lengths(to_numpy(dense.layer.kernel)) > lengths(v)).all(), "v is not orthogonal to its gradient"


def test_the_first_outputs_and_kernels_are_those_of_the_network_without_it(recipe):
    models = []
    for normalisation in ("none", "weight"):
        keras.utils.set_random_seed(0)
        models.append(recipe.build_model((8, 8, 1), 5, normalisation))
    np.testing.assert_allclose(models[1](IMAGES), models[0](IMAGES), rtol=1e-4, atol=1e-5)
    wrapped = [layer for layer in models[1].layers if isinstance(layer, recipe.WeightNormalization)]
    plain = [layer for layer in models[0].layers if isinstance(layer, layers.Dense)]
    assert len(wrapped) == 6
    for wrapper, layer in zip(wrapped, plain, strict=False):
        np.testing.assert_array_equal(wrapper.layer.kernel, layer.kernel)
        np.testing.assert_allclose(wrapper.g, lengths(to_numpy(layer.kernel)), rtol=1e-5)


def test_training_moves_lengths_directions_and_biases(recipe):
    keras.utils.set_random_seed(0)
    model = recipe.build_model((8, 8, 1), 5, "weight")
    before = model.get_weights()
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(IMAGES, LABELS, verbose=0)
    assert len(before) == 6 * 3 + 2
    assert not any(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))


def test_a_saved_model_gives_the_same_outputs(recipe, tmp_path):
    model = recipe.build_model((8, 8, 1), 5, "weight")
    for layer in model.layers:
        if isinstance(layer, recipe.WeightNormalization):
            layer.g.assign(to_numpy(layer.g) * 1.5)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(IMAGES), model(IMAGES), rtol=1e-5)


def test_a_convolution_has_a_length_for_each_filter(recipe):
    wrapper = recipe.WeightNormalization(layers.Conv2D(4, 3))
    convolution = wrapper.layer
    wrapper.build((None, 8, 8, 1))
    np.testing.assert_allclose(wrapper(IMAGES), convolution(IMAGES), rtol=1e-4, atol=1e-3)
    wrapper.g.assign([1.0, 2.0, 3.0, 4.0])
    np.testing.assert_allclose(lengths(to_numpy(wrapper.kernel())), [1, 2, 3, 4], rtol=1e-5)


def test_batch_normalisation_stands_between_weights_without_bias_and_activation(recipe):
    kinds = [type(layer).__name__ for layer in recipe.build_model((8, 8, 1), 5, "batch").layers[2:]]
    assert kinds == ["Dense", "BatchNormalization", "ReLU"] * 6 + ["Dense"]
    dense = [layer for layer in recipe.build_model((8, 8, 1), 5, "batch").layers if isinstance(layer, layers.Dense)]
    assert [layer.use_bias for layer in dense] == [False] * 6 + [True]


def test_every_training_has_its_normalisation(recipe, planned):
    kinds = {
        training.variant: [type(layer).__name__ for layer in training.model.layers[2:4]] for training in planned(recipe)
    }
    assert kinds == {
        "plain": ["Dense", "ReLU"],
        "weight norm": ["WeightNormalization", "ReLU"],
        "batch norm": ["Dense", "BatchNormalization"],
    }
