import keras
import numpy as np
import pytest
from keras import layers

CLASSES = 3


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("transfer/low_rank_adaptation")


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    return generator.normal(size=(64, 5, 5, 1)).astype("float32"), generator.integers(0, CLASSES, 64)


def dense_layers(base):
    return [layer for layer in base.layers if isinstance(layer, layers.Dense)]


def kernels(base):
    return [np.array(keras.ops.convert_to_numpy(layer.kernel)) for layer in dense_layers(base)]


def train(recipe, data, rank):
    """Return a base, the kernels that it used before and after training, and the model."""
    keras.utils.set_random_seed(0)
    base = recipe.build_base(data[0].shape[1:])
    model = recipe.build_model(base, CLASSES, rank)
    before = kernels(base)
    recipe.compile_and_fit(model, data, 3, 16, 0.01)
    return base, before, kernels(base), model


@pytest.mark.parametrize("rank", [1, 4])
def test_change_has_the_rank_and_the_weights_themselves_stay(recipe, data, rank):
    base, before, after, model = train(recipe, data, rank)
    for layer, first, last in zip(dense_layers(base), before, after, strict=True):
        singular = np.linalg.svd(last - first, compute_uv=False)
        assert singular[rank - 1] > 1e-3
        assert np.all(singular[rank:] < 1e-5)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer._kernel), first)
    # A and B of two layers, their biases, and the head.
    of_matrices = rank * (25 + 256) + rank * (256 + 256)
    assert recipe.count(model.trainable_variables) == of_matrices + 2 * 256 + 256 * CLASSES + CLASSES
    # Adam's two moments, and the count of steps.
    assert recipe.count(model.optimizer.variables) == 2 * recipe.count(model.trainable_variables) + 1


def test_it_begins_at_what_the_network_was(recipe, data):
    base = recipe.build_base(data[0].shape[1:])
    before = keras.ops.convert_to_numpy(base(data[0]))
    recipe.build_model(base, CLASSES, 4)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(base(data[0])), before, rtol=1e-6, atol=1e-7)


def test_saved_weights_are_merged(recipe, data, tmp_path):
    base, _, after, _ = train(recipe, data, 4)
    base.save_weights(tmp_path / "base.weights.h5")
    plain = recipe.build_base(data[0].shape[1:])
    plain.load_weights(tmp_path / "base.weights.h5")
    for one, other in zip(kernels(plain), after, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    outputs = [keras.ops.convert_to_numpy(each(data[0])) for each in (base, plain)]
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-5)


def test_head_alone_leaves_the_base_and_all_weights_change_it_in_all_directions(recipe, data):
    base, before, after, model = train(recipe, data, 0)
    assert recipe.count(model.trainable_variables) == 256 * CLASSES + CLASSES
    for first, last in zip(before, after, strict=True):
        np.testing.assert_array_equal(first, last)
    base, before, after, model = train(recipe, data, None)
    assert recipe.count(model.trainable_variables) == 26 * 256 + 257 * 256 + 256 * CLASSES + CLASSES
    assert np.linalg.matrix_rank(after[0] - before[0], tol=1e-4) == 25


def test_first_variant_of_a_seed_has_no_other_start_than_those_after_it(recipe, monkeypatch):
    starts, fit = [], recipe.compile_and_fit

    def note_and_fit(model, *arguments, **keywords):
        base, head = model.layers[-2:]
        starts.append([np.array(keras.ops.convert_to_numpy(head.kernel)), *kernels(base)])
        return fit(model, *arguments, **keywords)

    monkeypatch.setattr(recipe, "compile_and_fit", note_and_fit)
    monkeypatch.setattr(recipe, "VARIANTS", {"all weights": (None, 0.001), "head alone": (0, 0.1)})
    recipe.main(limit=64, epochs=1)
    _, first, second = starts
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
