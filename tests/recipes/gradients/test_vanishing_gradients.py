import keras
import numpy as np
import pytest

# Each function with its derivative, given the function's value.
FUNCTIONS = {
    "sigmoid": (lambda z: 1 / (1 + np.exp(-z)), lambda value: value * (1 - value)),
    "tanh": (np.tanh, lambda value: 1 - value**2),
    "relu": (lambda z: np.maximum(z, 0), lambda value: value > 0),
}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("gradients/vanishing_gradients")


def weights_of(model):
    """Return the arrays of each layer as {name of the layer: list}, those of the last layer as "output"."""
    weights = {layer.name: [weight.astype("float64") for weight in layer.get_weights()] for layer in model.layers}
    return weights | {"output": weights[model.layers[-1].name]}


def gradient_of_logits(logits, labels):
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return (probabilities - np.eye(logits.shape[-1])[labels]) / len(labels)


def norm(inputs, delta, with_bias=True):
    """Return the norm of a dense layer's gradients, from its inputs and the gradient of its outputs."""
    return np.sqrt(np.sum((inputs.T @ delta) ** 2) + with_bias * np.sum(delta.sum(axis=0) ** 2))


def dense_norms(weights, images, labels, activation, normalise):
    """Return the norms of the gradients of the layers "layer_1", "layer_2", …, by a backward pass by hand."""
    function, derivative = FUNCTIONS[activation]
    outputs, normalised, deviations = [images.reshape(len(images), -1)], [], []
    kernels = [weights[f"layer_{number}"][0] for number in range(1, 11)]
    for kernel in kernels:
        z = outputs[-1] @ kernel  # biases begin at zero
        if normalise:
            deviations.append(np.sqrt(z.var(axis=0) + 1e-3))
            z = (z - z.mean(axis=0)) / deviations[-1]
            normalised.append(z)
        outputs.append(function(z))
    upstream = gradient_of_logits(outputs[-1] @ weights["output"][0], labels) @ weights["output"][0].T
    norms = []
    for number in reversed(range(10)):
        delta = upstream * derivative(outputs[number + 1])
        if normalise:
            z = normalised[number]
            delta = (delta - delta.mean(axis=0) - z * (delta * z).mean(axis=0)) / deviations[number]
        norms.insert(0, norm(outputs[number], delta, with_bias=not normalise))
        upstream = delta @ kernels[number].T
    return norms


def recurrent_norms(weights, images, labels):
    """Return the norms of the gradients of the layers "row_1", "row_2", …, by a backward pass by hand."""
    rows = images.transpose(1, 0, 2, 3).reshape(images.shape[1], len(images), -1)
    (recurrent,) = weights["recurrent"]
    states = []
    for number, row in enumerate(rows, start=1):
        states.append(np.tanh(row @ weights[f"row_{number}"][0] + (states[-1] @ recurrent if states else 0)))
    delta = gradient_of_logits(states[-1] @ weights["output"][0], labels) @ weights["output"][0].T
    norms = []
    for row, state in zip(rows[::-1], states[::-1], strict=True):
        delta = delta * (1 - state**2)
        norms.insert(0, norm(row, delta))
        delta = delta @ recurrent.T
    return norms


def random_data(seed):
    """Return 64 images of 12 × 10 × 1, which are one batch, and their labels."""
    return np.random.default_rng(seed).random((64, 12, 10, 1)).astype("float32"), np.arange(64) % 5


@pytest.fixture
def started(recipe, monkeypatch):
    """Have `main` train on random data; return the list that gets the weights, images and labels of each `fit`."""
    started, fit = [], keras.Model.fit

    def spy(self, images, labels, **keywords):
        started.append((weights_of(self), images, labels))
        return fit(self, images, labels, **keywords)

    monkeypatch.setattr(keras.Model, "fit", spy)
    monkeypatch.setattr(recipe, "load", lambda *arguments: (random_data(0), random_data(1), random_data(2), 5))
    return started


def check(comparison, expected_norms, place):
    """Compare each run's signal and figure with the norms expected."""
    assert len(comparison.result.signals) == len(comparison.result.figures) == len(expected_norms)
    for signal, figure, expected in zip(
        comparison.result.signals, comparison.result.figures, expected_norms, strict=True
    ):
        np.testing.assert_allclose(signal["values"], expected, rtol=1e-3)
        assert (signal["by"], signal["scale"]) == (place, "log")
        assert figure["value"] == pytest.approx(expected[0] / expected[-1], rel=1e-3)
        assert figure["variant"] == signal["variant"]


def test_norms_by_layer_and_their_ratio_are_those_of_a_backward_pass_by_hand(recipe, started):
    comparison = recipe.main(epochs=2)
    expected = [
        dense_norms(*start, activation, normalise)
        for start, (activation, _, normalise, _) in zip(started, recipe.VARIANTS.values(), strict=True)
    ]
    check(comparison, expected, "layer")


def test_norms_by_row_and_their_ratio_are_those_of_a_backward_pass_by_hand(recipe, started, monkeypatch):
    variants = {name: recipe.RECURRENT_VARIANTS[name] for name in ("orthogonal × 0.5", "orthogonal × 3")}
    monkeypatch.setattr(recipe, "RECURRENT_VARIANTS", variants)
    comparison = recipe.main(epochs=2, network="recurrent")
    check(comparison, [recurrent_norms(*start) for start in started], "row")
    for (weights, _, _), gain in zip(started, (0.5, 3), strict=True):
        np.testing.assert_allclose(np.linalg.svd(weights["recurrent"][0])[1], gain, rtol=1e-5)
    vanishing, exploding = [figure["value"] for figure in comparison.result.figures]
    assert vanishing < 1e-3
    assert exploding > 5


def test_gradient_vanishes_with_sigmoid_alone(recipe):
    images, labels = random_data(0)
    ratios, deviations = {}, {}
    for variant, (activation, initializer, normalise, _) in recipe.VARIANTS.items():
        for seed in range(3):
            keras.utils.set_random_seed(seed)
            weights = weights_of(recipe.build_model(images.shape[1:], 5, activation, initializer, normalise))
            norms = dense_norms(weights, images, labels, activation, normalise)
            ratios.setdefault(variant, []).append(norms[0] / norms[-1])
            deviations[variant] = weights["layer_2"][0].std()
    sigmoid, *others = [np.exp(np.log(values).mean()) for values in ratios.values()]
    assert sigmoid < 1e-4
    assert all(0.2 < ratio < 5 for ratio in others)
    expected = dict.fromkeys(recipe.VARIANTS, np.sqrt(1 / 128)) | {"ReLU, He": np.sqrt(2 / 128)}
    assert deviations == pytest.approx(expected, rel=0.03)
