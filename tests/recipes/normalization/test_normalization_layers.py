import keras
import numpy as np
import pytest
from keras import layers

KINDS = {
    "batch": layers.BatchNormalization,
    "layer": layers.LayerNormalization,
    "group": layers.GroupNormalization,
    "RMS": layers.RMSNormalization,
}
# Dark pictures, whose values have a variance near ε, show which ε it is and on which side of the root it stands.
IMAGES = np.random.default_rng(0).integers(0, 32, (16, 4, 4, 1)).astype("float32") / 255


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("normalization/normalization_layers")


def build(recipe, kind, batch_size=4):
    keras.utils.set_random_seed(0)
    model = recipe.build_model((4, 4, 1), 5, kind, batch_size)
    generator = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, tuple(KINDS.values())):
            # At their starting values, 1 and 0, scale and shift would not show.
            for weight in layer.trainable_variables:
                weight.assign(generator.uniform(0.5, 2, weight.shape))
    return model


def array(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def around(model, kind):
    """Return each normalisation layer with what goes into it and what comes out of it in training."""
    found = [layer for layer in model.layers if isinstance(layer, KINDS[kind])]
    assert len(found) == 4
    tensors = [tensor for layer in found for tensor in (layer.input, layer.output)]
    values = [array(value) for value in keras.Model(model.input, tensors)(IMAGES, training=True)]
    return list(zip(found, values[::2], values[1::2], strict=True))


def standardized(values, axis):
    mean, variance = values.mean(axis=axis, keepdims=True), values.var(axis=axis, keepdims=True)
    return (values - mean) / np.sqrt(variance + 1e-3)


FORMULAS = {
    "batch": lambda x: standardized(x, axis=0),
    "layer": lambda x: standardized(x, axis=1),
    "group": lambda x: standardized(x.reshape(len(x), 8, 16), axis=2).reshape(x.shape),
    "RMS": lambda x: x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_does_what_its_formula_says(recipe, kind):
    for layer, before, after in around(build(recipe, kind), kind):
        scale, *shift = [array(weight) for weight in layer.trainable_variables]
        assert len(shift) == (kind != "RMS")
        np.testing.assert_allclose(after, FORMULAS[kind](before) * scale + sum(shift), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_in_training_only_batch_normalisation_lets_an_example_depend_on_its_batch(recipe, kind):
    model = build(recipe, kind)
    outputs = [array(model(np.concatenate([IMAGES[:1], IMAGES[rest]]), training=True))[0] for rest in ([1, 2], [3, 4])]
    if kind == "batch":
        assert np.abs(outputs[0] - outputs[1]).max() > 0.1
    else:
        np.testing.assert_allclose(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_at_inference_no_example_depends_on_its_batch(recipe, kind):
    model = build(recipe, kind)
    together = array(model(IMAGES, training=False))
    alone = np.concatenate([array(model(image[None], training=False)) for image in IMAGES])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", *KINDS])
def test_it_stands_between_the_weights_and_the_activation(recipe, kind):
    block = ["Dense", *([KINDS[kind].__name__] if kind in KINDS else []), "ReLU"]
    model = recipe.build_model((4, 4, 1), 5, kind, 4)
    assert [type(layer).__name__ for layer in model.layers[2:]] == 4 * block + ["Dense"]
    assert all(layer.use_bias == (kind != "batch") for layer in model.layers[2:-1] if isinstance(layer, layers.Dense))


def test_moving_statistics_forget_an_example_equally_fast_at_every_batch_size(recipe):
    steps = {4: 64, 128: 2}
    kept = {size: build(recipe, "batch", size).layers[3].momentum ** count for size, count in steps.items()}
    assert kept[4] == pytest.approx(kept[128]) == pytest.approx(0.9**2)


def test_every_training_has_its_layer_and_its_batches(recipe, planned):
    names = {kind: layer.__name__ for kind, layer in KINDS.items()} | {"none": "ReLU"}
    found = [(type(training.model.layers[3]).__name__, training.batch_size) for training in planned(recipe)]
    assert found == [(names[kind], size) for kind, size, _ in recipe.VARIANTS.values()]
    assert set(found) == {(name, 4) for name in names.values()} | {(names["batch"], 128)}


def test_kernels_of_a_seed_start_equal(recipe):
    kernels = []
    for kind in ("none", *KINDS):
        model = build(recipe, kind)
        kernels.append([array(layer.kernel) for layer in model.layers if isinstance(layer, layers.Dense)])
    for kernel, *others in zip(*kernels, strict=True):
        for other in others:
            np.testing.assert_array_equal(other, kernel)
