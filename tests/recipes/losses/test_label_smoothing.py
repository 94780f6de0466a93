import types

import keras
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

LIMIT, EPOCHS, CLASSES = 40, 3, 10
SMOOTHING = {"no smoothing": 0.0, "smoothing 0.05": 0.05, "smoothing 0.1": 0.1, "smoothing 0.2": 0.2}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("losses/label_smoothing")


@pytest.fixture(scope="module")
def experiment(recipe):
    """main, without training: (comparison, {variant: model}, the arguments of each fit)."""
    models, calls = [], []

    def fit(model, x, y, **keywords):
        # As sure of itself as a trained network.
        model.layers[-1].kernel.assign(30 * model.layers[-1].kernel)
        models.append(model)
        calls.append((x, y, keywords))
        return types.SimpleNamespace(history={"val_log-loss": [0.7] * EPOCHS})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(limit=LIMIT, epochs=EPOCHS)
    return comparison, dict(zip(recipe.VARIANTS, models, strict=True)), calls


def reference(logits, labels, smoothing):
    """Return (1 - ε) · CE + ε · mean over the classes of -log p, for integer labels, in float64."""
    log_p = log_softmax(np.float64(logits), axis=-1)
    cross_entropy = -log_p[np.arange(len(labels)), labels]
    return np.mean((1 - smoothing) * cross_entropy - smoothing * log_p.mean(axis=-1))


def test_loss_is_that_of_the_formula(experiment):
    generator = np.random.default_rng(0)
    logits, labels = generator.normal(scale=5, size=(50, CLASSES)).astype("float32"), generator.integers(0, CLASSES, 50)
    found = {name: float(model.loss(np.eye(CLASSES)[labels], logits)) for name, model in experiment[1].items()}
    assert found == {name: pytest.approx(reference(logits, labels, each), rel=1e-5) for name, each in SMOOTHING.items()}


def test_loss_is_lowest_at_the_smoothed_target(experiment):
    generator = np.random.default_rng(1)
    for name, smoothing in list(SMOOTHING.items())[1:]:
        target = np.full(CLASSES, smoothing / CLASSES)
        target[3] += 1 - smoothing

        def loss(logits, model=experiment[1][name]):
            return float(model.loss(np.eye(CLASSES)[[3]], np.float32([logits])))

        lowest = loss(np.log(target))
        assert lowest == pytest.approx(-np.sum(target * np.log(target)), rel=1e-5)
        for _ in range(10):
            assert loss(np.log(target) + generator.normal(size=CLASSES)) > lowest + 0.001


def test_logged_log_loss_is_without_smoothing(recipe, experiment):
    _, (images, labels), _, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, LIMIT)
    for name, model in experiment[1].items():
        logits = model.predict(images, verbose=0)
        logged = model.evaluate(images, np.eye(CLASSES)[labels], verbose=0, return_dict=True)
        assert logged["log-loss"] == pytest.approx(reference(logits, labels, 0), rel=1e-4)
        assert logged["loss"] == pytest.approx(reference(logits, labels, SMOOTHING[name]), rel=1e-4)


def test_figures_are_those_of_the_test_images_without_smoothing(recipe, experiment):
    comparison, models, _ = experiment
    _, _, (images, labels), _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, LIMIT)
    for run in comparison.result.runs:
        logits = models[run["variant"]].predict(images, verbose=0)
        probabilities = softmax(np.float64(logits), axis=-1)
        assert run["metrics"]["test"] == {
            "log-loss": pytest.approx(reference(logits, labels, 0), rel=1e-5),
            "accuracy": np.mean(probabilities.argmax(axis=-1) == labels),
            "calibration error": pytest.approx(calibration(probabilities, labels), rel=1e-5),
        }
        assert run["curve"] == {"val_log-loss": [0.7] * EPOCHS}
    named = {(entry["variant"], entry["name"]): entry["value"] for entry in comparison.result.figures}
    assert named == {
        (run["variant"], name): run["metrics"]["test"][name]
        for run in comparison.result.runs
        for name in ("accuracy", "calibration error")
    }
    assert {name for _, name in named} == set(comparison.result.columns)


def calibration(probabilities, labels, bins=15):
    """Return the expected calibration error, one example after another."""
    sums = {}
    for row, label in zip(probabilities, labels, strict=True):
        place = min(int(max(row) * bins), bins - 1)
        sums[place] = sums.get(place, 0) + (int(np.argmax(row)) == label) - max(row)
    return sum(abs(each) for each in sums.values()) / len(labels)


def test_calibration_error_of_a_worked_example(recipe):
    # Three bins: 0.55 twice, one right; 0.75, wrong; 1 four times, three right.
    confidence, correct = np.array([0.55, 0.55, 0.75, 1, 1, 1, 1]), np.array([1, 0, 0, 1, 1, 1, 0])
    probabilities = np.stack([confidence, 1 - confidence], axis=1)
    assert recipe.calibration_error(probabilities, 1 - correct) == pytest.approx((0.1 + 0.75 + 1) / 7)
    probabilities = np.random.default_rng(2).dirichlet(np.ones(4), 200)
    labels = np.random.default_rng(3).integers(0, 4, 200)
    assert recipe.calibration_error(probabilities, labels) == pytest.approx(calibration(probabilities, labels))


def test_variants_differ_in_smoothing_alone_and_rates_fall_to_zero(recipe, experiment):
    _, models, calls = experiment
    assert {name: value[0] for name, value in recipe.VARIANTS.items()} == SMOOTHING
    starts = [np.array(model.layers[-1].kernel) for model in models.values()]
    assert all(np.array_equal(start, starts[0]) for start in starts)
    for model, (name, (_, rate)) in zip(models.values(), recipe.VARIANTS.items(), strict=True):
        schedule = model.optimizer._learning_rate
        # An epoch is a step.
        assert [float(schedule(step)) for step in (0, EPOCHS)] == pytest.approx([rate, 0], abs=1e-9), name
        assert rate in recipe.GRID
    for images, labels, _ in calls:
        np.testing.assert_array_equal(images, calls[0][0])
        np.testing.assert_array_equal(labels, calls[0][1])
        assert set(np.unique(labels)) == {0, 1}


def test_search_tries_each_rate_with_each_smoothing(recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, callbacks, **keywords):
        (run,) = callbacks
        rate = float(model.optimizer._learning_rate(0))
        seen.append((model.loss.get_config()["label_smoothing"], pytest.approx(rate)))
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"log-loss": 0.5}}, {}, [], rate=run.rate)
        return types.SimpleNamespace(history={})

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    recipe.main(search=True, limit=LIMIT, epochs=1)
    assert seen == [(smoothing, rate) for smoothing in SMOOTHING.values() for rate in recipe.GRID]
