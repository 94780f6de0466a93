import keras
import numpy as np
import pytest
from keras import layers
from scipy.optimize import brentq
from scipy.special import softmax

LIMIT, CLASSES = 150, 10


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("losses/temperature_scaling")


def draw(number, temperature, seed=0, classes=CLASSES):
    """Return logits, and labels that are drawn from softmax(logits / temperature)."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=4, size=(number, classes))
    probabilities = softmax(logits / temperature, axis=-1)
    labels = (probabilities.cumsum(axis=-1) > generator.random((number, 1))).argmax(axis=-1)
    return logits.astype("float32"), labels


def slope(inverse, logits, labels):
    """Return the derivative of the log-loss by 1 / T: the mean of E[z] - z of the label."""
    logits = np.float64(logits)
    expected = np.sum(softmax(logits * inverse, axis=-1) * logits, axis=-1)
    return np.mean(expected - logits[np.arange(len(labels)), labels])


def reference(logits, labels):
    return 1 / brentq(slope, np.exp(-5), np.exp(5), args=(logits, labels), xtol=1e-10)


@pytest.mark.parametrize("temperature", [0.5, 1, 2.5])
def test_log_loss_has_no_slope_at_the_fitted_temperature(recipe, temperature):
    logits, labels = draw(500, temperature)
    fitted = recipe.fit_temperature(logits, labels)
    assert fitted == pytest.approx(reference(logits, labels), rel=1e-4)
    assert abs(slope(1 / fitted, logits, labels)) < 1e-3 * abs(slope(1.1 / fitted, logits, labels))


def test_it_finds_the_temperature_that_the_labels_were_drawn_with(recipe):
    assert recipe.fit_temperature(*draw(20_000, 2.5)) == pytest.approx(2.5, rel=0.05)


@pytest.mark.parametrize("factor", [0.2, 3])
def test_logits_times_a_factor_have_the_temperature_times_that_factor(recipe, factor):
    logits, labels = draw(500, 1.5)
    expected = factor * recipe.fit_temperature(logits, labels)
    assert recipe.fit_temperature(np.float32(factor) * logits, labels) == pytest.approx(expected, rel=1e-4)


def test_without_errors_it_stays_within_its_bounds(recipe):
    logits, _ = draw(50, 1)
    assert recipe.fit_temperature(logits, logits.argmax(axis=-1)) == pytest.approx(np.exp(-5), rel=0.01)


@pytest.fixture(scope="module")
def experiment(recipe):
    """main, without training: (comparison, {name of a split: (logits, labels)}), the logits being made up."""
    train, validation, test, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, LIMIT)
    splits = {"training": train, "validation": validation, "test": test}
    generator, made = np.random.default_rng(1), {}
    # Ever less sure of themselves, and right more or less often.
    for scale, (name, (_, labels)) in zip((4, 6, 9), splits.items(), strict=True):
        made[name] = generator.normal(scale=scale, size=(LIMIT, CLASSES)).astype("float32"), labels
        made[name][0][np.arange(LIMIT), labels] += 8
    fitted = []

    def predict(model, images, **keywords):
        (name,) = [name for name, (own, _) in splits.items() if np.array_equal(own, images)]
        return made[name][0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", lambda model, *arguments, **keywords: fitted.append(model))
        patch.setattr(keras.Model, "predict", predict)
        comparison = recipe.main(limit=LIMIT, epochs=3)
    (model,) = fitted
    assert [float(model.optimizer._learning_rate(step)) for step in (0, 3 * 2)] == pytest.approx([0.001, 0], abs=1e-9)
    return comparison, made


def figures_of(logits, labels):
    """Return log-loss, accuracy and calibration error, one example after another."""
    loss, correct, sums = 0, 0, {}
    for row, label in zip(softmax(np.float64(logits), axis=-1), labels, strict=True):
        loss -= np.log(row[label]) / len(labels)
        is_right = int(np.argmax(row)) == label
        correct += is_right / len(labels)
        place = min(int(max(row) * 15), 14)
        sums[place] = sums.get(place, 0) + is_right - max(row)
    return {
        "log-loss": pytest.approx(loss),
        "accuracy": pytest.approx(correct),
        "calibration error": pytest.approx(sum(abs(each) for each in sums.values()) / len(labels)),
    }


def test_each_variant_has_the_temperature_of_its_data_and_the_figures_of_the_test_at_it(recipe, experiment):
    comparison, made = experiment
    expected = {
        "as trained": 1,
        "temperature": reference(*made["validation"]),
        "from 100 images": reference(*(array[:100] for array in made["validation"])),
        "from training data": reference(*made["training"]),
    }
    assert len({round(each, 2) for each in expected.values()}) == 4
    runs = {run["variant"]: run["metrics"]["test"] for run in comparison.result.runs}
    named = {(entry["variant"], entry["name"]): entry["value"] for entry in comparison.result.figures}
    assert list(runs) == list(recipe.VARIANTS) == list(expected)
    logits, labels = made["test"]
    for variant, temperature in expected.items():
        found = named[variant, "temperature"]
        assert found == pytest.approx(temperature, rel=1e-4)
        assert runs[variant] == figures_of(logits / found, labels)
        assert runs[variant]["accuracy"] == runs["as trained"]["accuracy"]
        assert named[variant, "accuracy"] == runs[variant]["accuracy"]
        assert named[variant, "calibration error"] == runs[variant]["calibration error"]
    assert {name for _, name in named} == set(comparison.result.columns)


def test_picture_shows_the_figures_of_the_test_at_each_temperature(recipe, experiment):
    comparison, made = experiment
    logits, labels = made["test"]
    assert [signal["name"] for signal in comparison.result.signals] == ["test log-loss", "test calibration error"]
    for signal in comparison.result.signals:
        name = signal["name"].removeprefix("test ")
        assert signal["at"] == list(recipe.TEMPERATURES)
        assert signal["values"] == [figures_of(logits / each, labels)[name] for each in recipe.TEMPERATURES]


def test_rescaled_model_gives_the_probabilities_at_the_temperature():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    calibrated = keras.Sequential([model, layers.Rescaling(1 / 2.5), layers.Softmax()])
    inputs = np.random.default_rng(2).normal(size=(6, 4)).astype("float32")
    expected = softmax(model.predict(inputs, verbose=0) / 2.5, axis=-1)
    np.testing.assert_allclose(calibrated.predict(inputs, verbose=0), expected, rtol=1e-5)
