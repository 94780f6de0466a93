import keras
import numpy as np
import pytest

EPOCHS, START = 5, 2
RATE = 0.03
IMAGES, BATCH = 160, 64  # the last batch is smaller


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("averaging/stochastic_weight_averaging")


@pytest.fixture(scope="module")
def trainings(recipe):
    """What main trains: {variant: (weights after each epoch, weights at the end, optimizer, run)}."""
    fit, found = keras.Model.fit, {}

    def spy(model, *arguments, callbacks, **keywords):
        path = []

        class Record(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                path.append(weights_of(model))

        history = fit(model, *arguments, callbacks=[Record(), *callbacks], **keywords)
        found[callbacks[-1].variant] = path, weights_of(model), model.optimizer
        return history

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", spy)
        # At one rate, what differs is the averaging.
        patch.setattr(recipe, "VARIANTS", {name: (*value[:-1], RATE) for name, value in recipe.VARIANTS.items()})
        comparison = recipe.main(epochs=EPOCHS, limit=IMAGES)
    return {run["variant"]: (*found[run["variant"]], run) for run in comparison.result.runs}


def weights_of(model):
    """Return the weights of each layer that has some, in float64: [[kernel], [γ, β, mean, variance], …]."""
    return [
        [np.array(weight, dtype="float64") for weight in layer.get_weights()] for layer in model.layers if layer.weights
    ]


def average(path):
    """Return the equal averages of all weights, the moving statistics included, over the epochs from START on."""
    return [
        [np.mean(values, axis=0) for values in zip(*layers, strict=True)] for layers in zip(*path[START:], strict=True)
    ]


def forward(weights, images, training=False):
    """Return the logits, and for each batch normalisation the moments [mean, variance] of what reaches it."""
    values, moments = images.reshape(len(images), -1), []
    for (kernel,), (gamma, beta, mean, variance) in zip(weights[:-1:2], weights[1:-1:2], strict=True):
        values = values @ kernel
        moments.append([values.mean(axis=0), values.var(axis=0)])
        mean, variance = moments[-1] if training else (mean, variance)
        values = np.maximum(gamma * (values - mean) / np.sqrt(variance + 1e-3) + beta, 0)
    kernel, bias = weights[-1]
    return values @ kernel + bias, moments


def recomputed(weights, images):
    """Return the equal average over the batches of each batch's moments, with `weights` in training mode."""
    batches = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    assert len(batches) == 3
    moments = [forward(weights, batch, training=True)[1] for batch in batches]
    return [[np.mean(values, axis=0) for values in zip(*layers, strict=True)] for layers in zip(*moments, strict=True)]


def expected_weights(recipe, variant, path):
    """Return what the variant should leave in the model, given the weights after each epoch."""
    train, _, _, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, IMAGES)
    if variant in ("constant rate", "cosine decay"):
        return path[-1]
    weights = average(path)
    statistics = {
        "SWA": recomputed(weights, train[0]),
        "SWA, old statistics": [layer[2:] for layer in path[-1][1:-1:2]],
    }[variant]
    for layer, moments in zip(weights[1:-1:2], statistics, strict=True):
        layer[2:] = moments
    return weights


def test_weights_and_statistics_at_the_end_are_those_of_the_reference(recipe, trainings):
    assert list(trainings) == ["constant rate", "SWA", "SWA, old statistics", "cosine decay"]
    for variant, (path, found, _, _) in trainings.items():
        expected = expected_weights(recipe, variant, path)
        for layer, expected_layer in zip(found, expected, strict=True):
            for weight, expectation in zip(layer, expected_layer, strict=True):
                np.testing.assert_allclose(weight, expectation, rtol=1e-4, atol=1e-6)


def test_the_weights_at_the_end_are_those_that_are_evaluated(recipe, trainings):
    _, _, (images, labels), _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, IMAGES)
    losses = {}
    for variant, (path, _, _, run) in trainings.items():
        logits, _ = forward(expected_weights(recipe, variant, path), images)
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
        losses[variant] = -np.log(probabilities[np.arange(len(labels)), labels]).mean()
        assert run["metrics"]["test"]["loss"] == pytest.approx(losses[variant], rel=1e-3)
    # Far enough apart to be told from each other.
    gaps = np.diff(sorted(losses.values())) / np.mean(list(losses.values()))
    assert gaps.min() > 3e-3


def test_averaging_leaves_training_as_it_is_and_recomputing_changes_only_statistics(trainings):
    baseline = trainings["constant rate"]
    for variant in ("SWA", "SWA, old statistics"):
        path, found, _, run = trainings[variant]
        np.testing.assert_allclose(run["curve"]["val_loss"], baseline[3]["curve"]["val_loss"], rtol=1e-4)
        for epoch, expected_epoch in zip(path, baseline[0], strict=True):
            for layer, expected_layer in zip(epoch, expected_epoch, strict=True):
                for weight, expectation in zip(layer, expected_layer, strict=True):
                    np.testing.assert_allclose(weight, expectation, rtol=1e-3, atol=1e-4)
    for new, old in zip(trainings["SWA"][1], trainings["SWA, old statistics"][1], strict=True):
        for weight, expectation in zip(new[:2], old[:2], strict=True):
            np.testing.assert_allclose(weight, expectation, rtol=1e-3, atol=1e-4)
        for statistic, other in zip(new[2:], old[2:], strict=True):
            assert not np.allclose(statistic, other, rtol=0.05)


def test_the_decaying_rate_ends_at_zero_and_the_others_stay(trainings):
    steps = EPOCHS * 3
    for variant, (_, _, optimizer, _) in trainings.items():
        rate = optimizer.get_config()["learning_rate"]
        if variant == "cosine decay":
            schedule = keras.optimizers.schedules.deserialize(rate)
            assert float(schedule(0)) == pytest.approx(RATE)
            assert float(schedule(steps / 2)) == pytest.approx(RATE / 2)
            assert float(schedule(steps)) == pytest.approx(0, abs=1e-9)
        else:
            assert rate == pytest.approx(RATE)


def test_search_tries_each_rate_with_what_the_variant_has_beside_it(recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, callbacks, **keywords):
        # Without training.
        run = callbacks[-1]
        rate = model.optimizer._learning_rate
        seen.append((run.variant, pytest.approx(float(rate(0) if callable(rate) else rate)), len(callbacks)))
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"accuracy": 0.5}}, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=True, epochs=1, limit=IMAGES)
    assert seen == [
        (variant, rate, {"SWA": 2, "SWA, old statistics": 3}.get(variant, 1))
        for variant in recipe.VARIANTS
        for rate in (0.01, 0.02)
    ]
    assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * len(recipe.VARIANTS)
