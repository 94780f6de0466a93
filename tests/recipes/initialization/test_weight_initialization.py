import keras
import numpy as np
import pytest
from keras import layers

SEEDS = 5
IMAGES = np.random.default_rng(0).random((64, 16, 16, 1)).astype("float32")

# The standard deviation of the weights, from the numbers of inputs and outputs of a layer.
DEVIATIONS = {
    "Glorot": lambda inputs, outputs: np.sqrt(2 / (inputs + outputs)),
    "LeCun": lambda inputs, outputs: np.sqrt(1 / inputs),
    "He": lambda inputs, outputs: np.sqrt(2 / inputs),
    "N(0, 1)": lambda inputs, outputs: 1.0,
    "uniform ±0.05": lambda inputs, outputs: 0.05 / np.sqrt(3),
    "deviation 1/n": lambda inputs, outputs: 1 / inputs,
}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("initialization/weight_initialization")


def hidden_layers(model):
    return [layer for layer in model.layers if isinstance(layer, layers.Dense)][:-1]


def activations(recipe, variant, activation, seed):
    """Return the outputs of the hidden layers of a new model as an array of shape (layers, images, units)."""
    keras.utils.set_random_seed(seed)
    model = recipe.build_model((16, 16, 1), 5, recipe.VARIANTS[variant][0], activation, width=256)
    outputs = keras.Model(model.input, [layer.output for layer in hidden_layers(model)])(IMAGES)
    return np.stack([keras.ops.convert_to_numpy(output) for output in outputs]).astype("float64")


def ratios(recipe, variant, activation):
    """Return, for each seed, the deviation of layer 20 divided by that of layer 1."""
    deviations = [activations(recipe, variant, activation, seed).std(axis=(1, 2)) for seed in range(SEEDS)]
    return np.array([deviation[19] / deviation[0] for deviation in deviations])


@pytest.mark.parametrize("variant", DEVIATIONS)
def test_weights_have_the_deviation_of_the_formula_and_differ_between_layers(recipe, variant):
    keras.utils.set_random_seed(0)
    hidden = hidden_layers(recipe.build_model((20, 40, 1), 5, recipe.VARIANTS[variant][0], width=256))
    kernels = [keras.ops.convert_to_numpy(layer.kernel) for layer in hidden]
    assert [kernel.shape for kernel in kernels] == [(800, 256)] + [(256, 256)] * 19
    for index, kernel in enumerate(kernels):
        expected = DEVIATIONS[variant](*kernel.shape)
        np.testing.assert_allclose(kernel.std(), expected, rtol=0.02)
        assert abs(kernel.mean()) < 5 * expected / np.sqrt(kernel.size)
        assert not any(np.array_equal(kernel, other) for other in kernels[:index])
    assert not any(np.any(layer.bias) for layer in hidden)


def test_he_keeps_the_deviation_in_a_relu_network(recipe):
    values = ratios(recipe, "He", "relu")
    assert np.all((values > 0.5) & (values < 2))


def test_glorot_loses_it_by_the_square_root_of_one_half_a_layer_in_a_relu_network(recipe):
    values = ratios(recipe, "Glorot", "relu")
    np.testing.assert_allclose(np.exp(np.log(values).mean() / 19), np.sqrt(0.5), rtol=0.03)


def test_glorot_shrinks_it_slowly_in_a_tanh_network(recipe):
    values = ratios(recipe, "Glorot", "tanh")
    assert np.all((values > 0.15) & (values < 1))


def test_unit_deviation_explodes_relu_and_saturates_tanh(recipe):
    # A layer of 256 multiplies the mean square by 256 / 2: ReLU passes one half of it.
    np.testing.assert_allclose(np.log(ratios(recipe, "N(0, 1)", "relu")).mean() / 19, np.log(128) / 2, rtol=0.02)
    for seed in range(SEEDS):
        saturated = np.abs(activations(recipe, "N(0, 1)", "tanh", seed)) > 0.98
        assert saturated.mean(axis=(1, 2)).min() > 0.5


@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_small_uniform_loses_the_signal(recipe, activation):
    assert np.all(ratios(recipe, "uniform ±0.05", activation) < 0.01)


def test_figure_and_signals_are_those_of_a_forward_and_a_backward_pass_by_hand_before_training(recipe, monkeypatch):
    batches, initializers, fit = [], [], keras.Model.fit

    def spy(self, images, labels, **keywords):
        start = [weight.astype("float64") for weight in self.get_weights()]
        batches.append((start, images, labels))
        initializers.append(type(hidden_layers(self)[0].kernel_initializer).__name__)
        return fit(self, images, labels, **keywords)

    monkeypatch.setattr(keras.Model, "fit", spy)
    monkeypatch.setattr(recipe, "VARIANTS", {name: recipe.VARIANTS[name] for name in ("Glorot", "He")})
    # So few images are one batch.
    comparison = recipe.main(epochs=2, limit=64, activation="tanh")
    signals = {(entry["variant"], entry["name"]): entry["values"] for entry in comparison.result.signals}
    figures = {(entry["variant"], entry["name"]): entry["value"] for entry in comparison.result.figures}
    assert initializers == ["GlorotUniform", "HeNormal"]
    for variant, (weights, images, labels) in zip(recipe.VARIANTS, batches, strict=True):
        kernels, biases = weights[::2], weights[1::2]
        outputs = [images.reshape(len(images), -1)]
        for kernel, bias in zip(kernels[:-1], biases[:-1], strict=True):
            outputs.append(np.tanh(outputs[-1] @ kernel + bias))
        logits = outputs[-1] @ kernels[-1] + biases[-1]
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        delta = (probabilities - np.eye(len(biases[-1]))[labels]) / len(labels)
        norms = []
        for kernel, before, output in zip(kernels[:0:-1], outputs[-2::-1], outputs[:0:-1], strict=True):
            delta = delta @ kernel.T * (1 - output**2)
            norms.insert(0, np.sqrt(np.sum((before.T @ delta) ** 2) + np.sum(delta.sum(axis=0) ** 2)))
        deviations = [output.std() for output in outputs[1:]]
        np.testing.assert_allclose(signals[variant, "deviation of activations"], deviations, rtol=1e-4)
        np.testing.assert_allclose(signals[variant, "norm of gradient"], norms, rtol=1e-4)
        ratio = figures[variant, "last / first"]
        assert ratio == pytest.approx(deviations[19] / deviations[0], rel=1e-4)
