import types

import keras
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

LIMIT, EPOCHS, CLASSES = 50, 3, 10


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("losses/noisy_labels")


@pytest.fixture(scope="module")
def logits_and_labels():
    generator = np.random.default_rng(0)
    return generator.normal(scale=3, size=(60, CLASSES)).astype("float32"), generator.integers(0, CLASSES, 60)


def mean(values):
    return np.mean(np.float64(keras.ops.convert_to_numpy(values)))


@pytest.mark.parametrize("q", [0.3, 0.7, 0.95])
def test_generalized_loss_is_that_of_the_formula(recipe, logits_and_labels, q):
    logits, labels = logits_and_labels
    p = softmax(np.float64(logits), axis=-1)[np.arange(len(labels)), labels]
    for given in (labels, labels.astype("float32")):  # as a user gives them, and as `fit` passes them on
        assert mean(recipe.build_loss(q=q)(given, logits)) == pytest.approx(np.mean((1 - p**q) / q), rel=1e-5)


def test_it_lies_between_cross_entropy_and_absolute_error(recipe, logits_and_labels):
    logits, labels = logits_and_labels
    log_p = log_softmax(np.float64(logits), axis=-1)[np.arange(len(labels)), labels]
    assert mean(recipe.build_loss(q=0.001)(labels, logits)) == pytest.approx(-log_p.mean(), rel=0.01)
    p = softmax(np.float64(logits), axis=-1)
    absolute_error = np.abs(np.eye(CLASSES)[labels] - p).sum(axis=-1) / 2
    assert mean(recipe.build_loss(q=1)(labels, logits)) == pytest.approx(absolute_error.mean(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_with_and_without_smoothing(recipe, logits_and_labels, smoothing):
    logits, labels = logits_and_labels
    log_p = log_softmax(np.float64(logits), axis=-1)
    expected = -(1 - smoothing) * log_p[np.arange(len(labels)), labels] - smoothing * log_p.mean(axis=-1)
    found = recipe.build_loss(smoothing=smoothing)(labels.astype("float32"), logits)
    assert mean(found) == pytest.approx(expected.mean(), rel=1e-5)


def step_of_the_bias(recipe, arguments, label, logits):
    """Return how a step of length 1 changes the last bias, the negative gradient of the loss by the logits."""
    keras.utils.set_random_seed(0)
    model = recipe.build_model((4, 4, 1), len(logits))
    model.layers[-1].kernel.assign(np.zeros(model.layers[-1].kernel.shape))
    model.layers[-1].bias.assign(logits)
    model.compile(keras.optimizers.SGD(1.0), loss=recipe.build_loss(**arguments))
    model.train_on_batch(np.ones((1, 4, 4, 1), "float32"), np.array([label]))
    assert all(np.isfinite(np.array(weight)).all() for weight in model.get_weights())
    return np.array(model.layers[-1].bias) - np.float32(logits)


@pytest.mark.parametrize("q", [0.3, 0.7])
def test_gradient_is_that_of_cross_entropy_times_a_power_of_the_probability(recipe, q):
    logits = np.float32([1.0, -0.5, 0.0, 0.7, -1.5])
    for label in range(5):
        p = softmax(logits)
        np.testing.assert_allclose(step_of_the_bias(recipe, {}, label, logits), np.eye(5)[label] - p, atol=1e-6)
        step = step_of_the_bias(recipe, {"q": q}, label, logits)
        np.testing.assert_allclose(step, p[label] ** q * (np.eye(5)[label] - p), atol=1e-6)


def test_gradient_is_finite_where_the_probability_is_rounded_to_zero(recipe):
    step = step_of_the_bias(recipe, {"q": 0.7}, 1, np.float32([300, 0, 0]))
    np.testing.assert_allclose(step, 0, atol=1e-4)


def test_the_share_of_wrong_labels_is_exact_and_they_hit_all_other_classes_alike(recipe):
    labels = np.random.default_rng(1).integers(0, CLASSES, 20_000)
    noisy, is_wrong = recipe.corrupt(labels, CLASSES, 0.4, seed=5)
    assert is_wrong.sum() == 8000
    np.testing.assert_array_equal(noisy != labels, is_wrong)
    assert noisy.dtype == labels.dtype
    counts = np.bincount((noisy - labels)[is_wrong] % CLASSES, minlength=CLASSES)
    assert counts[0] == 0
    expected = 8000 / (CLASSES - 1)
    assert np.all(abs(counts[1:] - expected) < 5 * np.sqrt(expected))
    np.testing.assert_array_equal(recipe.corrupt(labels, CLASSES, 0.4, seed=5)[0], noisy)
    assert np.mean(recipe.corrupt(labels, CLASSES, 0.4, seed=6)[0] == noisy) < 0.9
    assert not recipe.corrupt(labels, CLASSES, 0.0, seed=5)[1].any()


@pytest.fixture(scope="module")
def experiment(recipe):
    """main for two seeds, without training: (comparison, [(variant, seed, model, images, labels, keywords)])."""
    calls = []

    def fit(model, images, labels, *, callbacks, **keywords):
        run = callbacks[-1]
        calls.append((run.variant, run.seed, model, images, labels, keywords | {"others": callbacks[:-1]}))
        run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})
        return types.SimpleNamespace(history={})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(limit=LIMIT, epochs=EPOCHS, seeds=2)
    return comparison, calls


def test_labels_of_training_and_validation_are_wrong_and_those_of_the_test_right(recipe, experiment):
    comparison, calls = experiment
    (_, right), (_, right_in_validation), (_, right_in_test), _ = recipe.load(
        "fashion_mnist_10k", recipe.DATA_DIR, LIMIT
    )
    of_seed = {}
    for _, seed, _, _, labels, keywords in calls:
        assert np.sum(labels != right) == 0.4 * LIMIT
        assert np.sum(keywords["validation_data"][1] != right_in_validation) == 0.4 * LIMIT
        np.testing.assert_array_equal(of_seed.setdefault(seed, labels), labels)
    assert not np.array_equal(of_seed[0], of_seed[1])
    np.testing.assert_array_equal(comparison._data["test"][1], right_in_test)


def test_variants_have_their_loss_their_stopping_and_their_rates(recipe, experiment, logits_and_labels):
    logits, labels = logits_and_labels
    log_p = log_softmax(np.float64(logits), axis=-1)
    of_label = log_p[np.arange(len(labels)), labels]
    cross_entropy = -of_label.mean()
    expected = {
        "cross-entropy": cross_entropy,
        "early stopping": cross_entropy,
        "label smoothing": 0.9 * cross_entropy - 0.1 * log_p.mean(),
        "generalized 0.3": np.mean((1 - np.exp(0.3 * of_label)) / 0.3),
        "generalized 0.7": np.mean((1 - np.exp(0.7 * of_label)) / 0.7),
    }
    assert list(recipe.VARIANTS) == list(expected)
    for variant, _, model, _, _, keywords in experiment[1]:
        assert mean(model.loss(labels, logits)) == pytest.approx(expected[variant], rel=1e-5)
        stops = variant == "early stopping"
        assert [(each.patience, each.monitor, each.restore_best_weights) for each in keywords["others"]] == (
            [(3, "val_loss", True)] if stops else []
        )
        peak, schedule = recipe.VARIANTS[variant][-1], model.optimizer._learning_rate
        rates = [float(schedule)] * 2 if stops else [float(schedule(step)) for step in (0, EPOCHS)]
        assert rates == pytest.approx([peak, peak if stops else 0], abs=1e-9)
        assert peak in recipe.GRID


def test_mistakes_learned_are_the_share_of_wrong_labels_that_are_repeated(recipe, experiment):
    comparison, calls = experiment
    (_, right), *_ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, LIMIT)
    found = {(entry["variant"], entry["seed"]): entry["value"] for entry in comparison.result.figures}
    for variant, seed, model, images, labels, _ in calls:
        predicted = model.predict(images, verbose=0).argmax(axis=1)
        wrong = [place for place in range(LIMIT) if labels[place] != right[place]]
        assert found[variant, seed] == pytest.approx(np.mean([predicted[place] == labels[place] for place in wrong]))
    assert len(found) == len(calls)


def test_search_tries_each_rate_with_what_the_variant_has_beside_it(recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, callbacks, **keywords):
        run, rate = callbacks[-1], model.optimizer._learning_rate
        seen.append((run.variant, pytest.approx(float(rate(0) if callable(rate) else rate)), len(callbacks) - 1))
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"accuracy": 0.5}}, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    recipe.main(search=True, limit=LIMIT, epochs=1)
    assert seen == [(name, rate, int(name == "early stopping")) for name in recipe.VARIANTS for rate in (0.01, 0.02)]
