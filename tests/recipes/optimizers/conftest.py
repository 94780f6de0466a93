import types

import keras
import numpy as np
import pytest


@pytest.fixture(scope="session")
def images():
    """Training, validation and test data, and the number of classes, as `load` returns them; 48 training images."""
    generator = np.random.default_rng(0)
    sizes = (48, 8, 8)
    return *[(generator.random((n, 5, 4, 1), "float32"), generator.integers(0, 3, n)) for n in sizes], 3


@pytest.fixture(scope="session")
def observe(images):
    """Return a function that calls a recipe's main on `images`, and returns what it trains."""

    def observe(recipe, train, **flags):
        """Return {variant: namespace of the model, its weights before and after, and the arguments of fit}.

        Nothing is evaluated. If `train` is false, nothing is trained either, and optimizers are new but built.
        """
        observed, fit = {}, keras.Model.fit

        def spy(model, x, y, callbacks, **keywords):
            (run,) = callbacks
            before = arrays(model.trainable_variables)
            model.optimizer.build(model.trainable_variables)
            if train:
                fit(model, x, y, **keywords)
            after = arrays(model.trainable_variables)
            observed[run.variant] = types.SimpleNamespace(model=model, before=before, after=after, arguments=keywords)
            run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})
            run.comparison.result.runs[-1]["epoch_seconds"] = [9.0, 2.0, 2.0]
            return types.SimpleNamespace(model=model, history={"val_accuracy": [0.5, 0.8, 0.7]})

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(recipe, "load", lambda *arguments: images)
            patch.setattr(keras.Model, "fit", spy)
            comparison = recipe.main(**flags)
        for row in comparison.summary():
            observed[row["variant"]].figures = row["figures"]
        observed[comparison.baseline].signals = comparison.result.signals
        return observed

    return observe


def arrays(variables):
    """Return copies in float64, because a backend may go on to write in the memory that it shows."""
    return [np.array(keras.ops.convert_to_numpy(variable), "float64") for variable in variables]


@pytest.fixture(scope="session")
def weights_of():
    return lambda model: arrays(model.trainable_variables)


@pytest.fixture(scope="session")
def falling_rates():
    """Return a function that gives the rate of each step of a training, from `rate` to zero along half a cosine."""
    return lambda rate, steps: rate / 2 * (1 + np.cos(np.pi * np.arange(steps) / steps))


@pytest.fixture(scope="session")
def gradients():
    return back_propagation


def back_propagation(weights, images, labels):
    """Return the gradients of the mean cross-entropy of dense layers with ReLU, in NumPy: kernel, bias, kernel, …"""
    kernels, biases = weights[::2], weights[1::2]
    inputs = [images.reshape(len(images), -1)]
    for kernel, bias in zip(kernels[:-1], biases[:-1], strict=True):
        inputs.append(np.maximum(inputs[-1] @ kernel + bias, 0))
    exponentials = np.exp(inputs[-1] @ kernels[-1] + biases[-1])
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    error = (probabilities - np.eye(len(biases[-1]))[labels]) / len(labels)
    found = []
    for kernel, value in zip(reversed(kernels), reversed(inputs), strict=True):
        found = [value.T @ error, error.sum(axis=0), *found]
        error = error @ kernel.T * (value > 0)
    return found
