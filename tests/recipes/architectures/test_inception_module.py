import keras
import numpy as np
import pytest
from keras import layers

IMAGES = np.random.default_rng(0).random((8, 13, 10, 1)).astype("float32")
# The channels of the branches and those of the two reductions, in the order of the module.
WIDTHS = {"1×1": 16, "3×3": 32, "5×5": 8, "pooling": 8}
REDUCED_3, REDUCED_5 = 24, 4


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("architectures/inception_module")


@pytest.fixture(scope="module")
def model(recipe):
    keras.utils.set_random_seed(0)
    return recipe.build_model(IMAGES.shape[1:], 5)


def array(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor))


def parameters_of(kernel_size, inputs, outputs):
    return kernel_size**2 * inputs * outputs + outputs


def parameters_of_module(inputs):
    return (
        parameters_of(1, inputs, 16)
        + parameters_of(1, inputs, REDUCED_3)
        + parameters_of(3, REDUCED_3, 32)
        + parameters_of(1, inputs, REDUCED_5)
        + parameters_of(5, REDUCED_5, 8)
        + parameters_of(1, inputs, 8)
    )


def parameters_of_network(channels, classes):
    """Return the parameters of the inception network by hand: first layer, two modules, last layer."""
    first = parameters_of(3, channels, 16)
    return first + parameters_of_module(16) + parameters_of_module(64) + parameters_of(1, 64, classes)


def convolution(x, kernel, bias):
    """Return the ReLU of the convolution of x (examples, height, width, channels), padded with zeros to its size."""
    size = len(kernel)
    padded = np.pad(x.astype("float64"), ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))
    return np.maximum(np.einsum("nhwcij,ijco->nhwo", windows, kernel) + bias, 0)


def pooling(x):
    """Return the maximum of each 3×3 neighbourhood of x, within its borders."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2)).max(axis=(-2, -1))


def modules(model):
    """Return the concatenations at the ends of the modules."""
    found = [layer for layer in model.layers if isinstance(layer, layers.Concatenate)]
    assert len(found) == 2
    return found


def test_a_module_is_its_four_branches_computed_one_by_one(recipe):
    generator = np.random.default_rng(1)
    inputs = keras.Input((6, 5, 3))
    module = keras.Model(inputs, recipe.inception(inputs))
    kernels = {}
    for layer in module.layers:
        if isinstance(layer, layers.Conv2D):
            weights = [generator.normal(size=weight.shape).astype("float32") for weight in layer.get_weights()]
            layer.set_weights(weights)
            kernels[weights[0].shape] = weights
    assert len(kernels) == 6
    x = generator.normal(size=(4, 6, 5, 3)).astype("float32")

    one = convolution(x, *kernels[1, 1, 3, 16])
    three = convolution(convolution(x, *kernels[1, 1, 3, REDUCED_3]), *kernels[3, 3, REDUCED_3, 32])
    five = convolution(convolution(x, *kernels[1, 1, 3, REDUCED_5]), *kernels[5, 5, REDUCED_5, 8])
    pooled = convolution(pooling(x), *kernels[1, 1, 3, 8])
    np.testing.assert_allclose(
        array(module(x)), np.concatenate([one, three, five, pooled], axis=-1), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("image_shape, reduced", [((28, 28, 1), (7, 7)), ((13, 10, 3), (4, 3)), ((9, 11, 3), (3, 3))])
def test_shapes_and_number_of_parameters_are_those_computed_by_hand(recipe, image_shape, reduced):
    model = recipe.build_model(image_shape, 7)
    assert [module.output.shape for module in modules(model)] == [(None, *reduced, sum(WIDTHS.values()))] * 2
    assert [branch.shape[-1] for branch in modules(model)[1].input] == list(WIDTHS.values())
    assert model.output.shape == (None, 7)
    assert model.count_params() == parameters_of_network(image_shape[-1], 7)


@pytest.mark.parametrize("image_shape, classes", [((28, 28, 1), 10), ((9, 11, 3), 3)])
def test_the_other_networks_have_as_many_parameters_to_within_five_per_cent(recipe, image_shape, classes):
    target = parameters_of_network(image_shape[-1], classes)
    for kernel_sizes, _ in recipe.VARIANTS.values():
        if kernel_sizes == "inception":
            continue
        filters = recipe.equal_filters(image_shape, classes, kernel_sizes)
        model = recipe.build_model(image_shape, classes, kernel_sizes, filters)
        convolutions = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)][1:]
        assert [layer.kernel_size for layer in convolutions] == [(size, size) for size in kernel_sizes] * 2
        counts, inputs = [parameters_of(3, image_shape[-1], 16)], 16
        for size in [*kernel_sizes, *kernel_sizes]:
            counts.append(parameters_of(size, inputs, filters))
            inputs = filters
        assert model.count_params() == sum(counts) + parameters_of(1, filters, classes)
        assert model.count_params() == pytest.approx(target, rel=0.05)


def test_variants_are_the_networks_of_their_names(recipe):
    kernel_sizes = {variant: sizes for variant, (sizes, _) in recipe.VARIANTS.items()}
    assert kernel_sizes == {"3×3": (3,), "5×5": (5,), "1×1, 3×3": (1, 3), "inception": "inception"}
    assert tuple(WIDTHS) == recipe.BRANCHES


def test_shares_are_those_of_deviation_times_weight_by_branch(recipe, model):
    outputs = array(keras.Model(model.input, modules(model)[1].output)(IMAGES)).astype("float64")
    kernel = array(model.layers[-1].kernel)
    expected, start = [], 0
    for width in WIDTHS.values():
        size = 0
        for channel in range(start, start + width):
            size += outputs[..., channel].mean(axis=(1, 2)).std() * np.sqrt((kernel[channel] ** 2).sum())
        expected.append(size)
        start += width
    np.testing.assert_allclose(recipe.branch_shares(model, IMAGES), np.array(expected) / sum(expected), rtol=1e-3)


def test_a_branch_without_weights_in_the_last_layer_has_no_share(recipe):
    keras.utils.set_random_seed(0)
    model = recipe.build_model(IMAGES.shape[1:], 5)
    kernel = array(model.layers[-1].kernel).copy()
    kernel[16:48] = 0
    model.layers[-1].kernel.assign(kernel)
    shares = recipe.branch_shares(model, IMAGES)
    assert shares[1] == 0
    np.testing.assert_allclose(sum(shares), 1, rtol=1e-6)


def test_main_trains_networks_of_equal_size_and_reports_shares_before_and_after(recipe, monkeypatch):
    models, before = {}, []

    def fit(model, *arguments, validation_data, callbacks, **keywords):
        (run,) = callbacks
        models[run.variant] = model
        if run.variant == "inception":
            before.extend(recipe.branch_shares(model, validation_data[0]))
            # In the place of training: the 1×1 branch is all that counts.
            kernel = array(model.layers[-1].kernel).copy()
            kernel[16:] = 0
            model.layers[-1].kernel.assign(kernel)
        run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})

    monkeypatch.setattr(recipe, "VARIANTS", {name: recipe.VARIANTS[name] for name in ("3×3", "inception")})
    monkeypatch.setattr(keras.Model, "fit", fit)
    comparison = recipe.main(limit=16)
    for row in comparison.summary():
        assert row["figures"] == {"parameters": models[row["variant"]].count_params()}
    signals = {(signal["variant"], signal["name"]): signal for signal in comparison.result.signals}
    assert {key: signal["values"] for key, signal in signals.items()} == {
        ("inception", "share before training"): pytest.approx(before),
        ("inception", "share after training"): pytest.approx([1, 0, 0, 0]),
    }
    assert all(signal["at"] == list(recipe.BRANCHES) for signal in signals.values())
