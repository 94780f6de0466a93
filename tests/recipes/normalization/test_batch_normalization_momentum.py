import functools

import keras
import numpy as np
import pytest
from keras import layers

EPOCHS = 2
IMAGES, BATCH = 300, 256  # the last batch is smaller


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("normalization/batch_normalization_momentum")


@pytest.fixture(scope="module")
def trainings(recipe):
    """What main trains: {variant: (its trainable weights, its moving statistics, its run, its figures)}."""
    fit, models = keras.Model.fit, {}

    def spy(model, *arguments, callbacks, **keywords):
        models[callbacks[-1].variant] = model
        return fit(model, *arguments, callbacks=callbacks, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", spy)
        # To compile takes longer than these few steps.
        patch.setattr(keras.Model, "compile", functools.partialmethod(keras.Model.compile, run_eagerly=True))
        comparison = recipe.main(epochs=EPOCHS, limit=IMAGES)
    figures = {row["variant"]: row["figures"] for row in comparison.summary()}
    found = {}
    for run in comparison.result.runs:
        model = models[run["variant"]]
        weights = [array(variable) for variable in model.trainable_variables]
        found[run["variant"]] = weights, statistics_of(model), run, figures[run["variant"]]
    return found


def array(tensor):
    """Return a copy in float64, because a backend may go on to write in the memory that it shows."""
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def normalizations(model):
    found = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    assert len(found) == 6
    return found


def statistics_of(model):
    return [(array(layer.moving_mean), array(layer.moving_variance)) for layer in normalizations(model)]


def forward(weights, images, statistics=None):
    """Return the logits, and the mean and the variance of what reaches each batch normalisation; ε is 1e-3.

    Without statistics the batch is normalised by its own.
    """
    values, moments = images.reshape(len(images), -1).astype("float64"), []
    for place in range(6):
        kernel, gamma, beta = weights[3 * place : 3 * place + 3]
        values = values @ kernel
        moments.append((values.mean(axis=0), values.var(axis=0)))
        mean, variance = moments[-1] if statistics is None else statistics[place]
        values = np.maximum(gamma * (values - mean) / np.sqrt(variance + 1e-3) + beta, 0)
    kernel, bias = weights[-2:]
    return values @ kernel + bias, moments


def batches_of(images):
    return [images[start : start + BATCH] for start in range(0, len(images), BATCH)]


def cross_entropy(logits, labels):
    logits = logits - logits.max(axis=1, keepdims=True)
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels])


@pytest.mark.parametrize("variant", ["momentum 0.99", "momentum 0.9", "momentum 0.5", "0.99, recomputed"])
def test_after_n_steps_on_one_batch_a_share_of_momentum_to_the_n_is_what_they_began_with(recipe, variant):
    momentum, steps = float(variant.removeprefix("momentum ").removesuffix(", recomputed")), 7
    keras.utils.set_random_seed(0)
    model = recipe.build_model((4, 4, 1), 5, recipe.VARIANTS[variant][0])
    images = np.random.default_rng(0).random((64, 4, 4, 1)).astype("float32")
    _, moments = forward([array(variable) for variable in model.trainable_variables], images)
    for _ in range(steps):
        model(images, training=True)
    kept = momentum**steps
    for (mean, variance), (moving_mean, moving_variance) in zip(moments, statistics_of(model), strict=True):
        np.testing.assert_allclose(moving_mean, (1 - kept) * mean, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(moving_variance, kept * 1 + (1 - kept) * variance, rtol=1e-3, atol=1e-5)


def test_momentum_does_not_enter_training(recipe, trainings):
    assert (
        list(trainings)
        == list(recipe.VARIANTS)
        == ["momentum 0.99", "momentum 0.9", "momentum 0.5", "0.99, recomputed"]
    )
    first, *others = [weights for weights, _, _, _ in trainings.values()]
    for other in others:
        for weight, expected in zip(other, first, strict=True):
            np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-5)


def test_the_larger_the_momentum_the_nearer_are_the_statistics_to_what_they_began_with(trainings):
    shares = [trainings[f"momentum {momentum}"][1][0] for momentum in (0.99, 0.9, 0.5)]
    # Of the first layer, whose inputs are the same in each epoch, the moments hardly change.
    target, _ = trainings["0.99, recomputed"][1][0]
    distances = [np.linalg.norm(mean - target) / np.linalg.norm(target) for mean, _ in shares]
    for distance, momentum in zip(distances, (0.99, 0.9, 0.5), strict=True):
        assert distance == pytest.approx(momentum ** (2 * EPOCHS), abs=0.15)


def test_recomputed_statistics_are_the_equal_average_of_the_batches(recipe, trainings):
    (images, _), _, _, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, IMAGES)
    weights, found, _, _ = trainings["0.99, recomputed"]
    moments = [forward(weights, batch)[1] for batch in batches_of(images)]
    assert len(moments) == 2
    for place, (mean, variance) in enumerate(found):
        expected_mean, expected_variance = np.mean([batch[place] for batch in moments], axis=0)
        np.testing.assert_allclose(mean, expected_mean, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(variance, expected_variance, rtol=1e-3, atol=1e-4)


def test_recomputing_leaves_the_momentum_as_it_was(recipe):
    model = recipe.build_model((4, 4, 1), 5, 0.9)
    callback = recipe.RecomputeStatistics(np.zeros((5, 4, 4, 1), "float32"), 2)
    callback.set_model(model)
    callback.on_train_end()
    assert [layer.momentum for layer in normalizations(model)] == [0.9] * 6


def test_recomputed_statistics_are_those_that_are_evaluated(recipe, trainings):
    _, _, (images, labels), _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, IMAGES)
    for weights, statistics, run, _ in trainings.values():
        logits, _ = forward(weights, images, statistics)
        assert run["metrics"]["test"]["loss"] == pytest.approx(cross_entropy(logits, labels), rel=1e-3)


def test_figures_are_the_losses_of_both_modes_on_the_training_images(recipe, trainings):
    (images, labels), _, _, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, IMAGES)
    for weights, statistics, run, figures in trainings.values():
        in_training = np.concatenate([forward(weights, batch)[0] for batch in batches_of(images)])
        in_inference, _ = forward(weights, images, statistics)
        assert figures == {
            "loss, training mode": pytest.approx(cross_entropy(in_training, labels), rel=1e-3),
            "loss, inference": pytest.approx(cross_entropy(in_inference, labels), rel=1e-3),
        }
        assert figures["loss, inference"] == pytest.approx(run["metrics"]["train"]["loss"], rel=1e-4)


def test_measuring_the_losses_leaves_the_model_as_it_is(recipe):
    keras.utils.set_random_seed(0)
    model = recipe.build_model((4, 4, 1), 5, 0.5)
    images = np.random.default_rng(0).random((9, 4, 4, 1)).astype("float32")
    before = [array(variable) for variable in model.variables]
    in_training, in_inference = recipe.losses(model, images, np.arange(9) % 5, 4)
    assert in_training != pytest.approx(in_inference, rel=1e-3)
    for variable, expected in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(array(variable), expected)


def test_every_training_has_one_rate_that_falls_to_zero(recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, epochs, callbacks, **keywords):
        # Without training.
        schedule = model.optimizer._learning_rate
        seen.append([float(schedule(step)) for step in (0, 2 * epochs)])
        assert len(callbacks) == 1 + (callbacks[-1].variant == "0.99, recomputed")
        callbacks[-1].comparison.add(callbacks[-1].variant, callbacks[-1].seed, {"accuracy": 0.5})

    monkeypatch.setattr(keras.Model, "fit", fit)
    recipe.main(epochs=EPOCHS, limit=IMAGES, learning_rate=0.2)
    assert seen == [[pytest.approx(0.2), pytest.approx(0, abs=1e-9)]] * 4
