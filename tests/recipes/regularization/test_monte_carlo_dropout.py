import keras
import numpy as np
import pytest
from keras import layers
from scipy.special import softmax

RATE = 0.4
IMAGES = np.random.default_rng(0).random((16, 4, 4, 1)).astype("float32")


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("regularization/monte_carlo_dropout")


def array(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def build(recipe):
    keras.utils.set_random_seed(0)
    return recipe.build_model((4, 4, 1), 5, RATE)


def test_a_pass_without_dropout_has_no_spread_and_one_with_it_has(recipe):
    model = build(recipe)
    stochastic = recipe.with_dropout_on(model)
    np.testing.assert_array_equal(array(model(IMAGES)), array(model(IMAGES)))
    passes = [array(stochastic(IMAGES)) for _ in range(3)] + [stochastic.predict(IMAGES, verbose=0)]
    for index, one in enumerate(passes):
        assert not any(np.array_equal(one, other) for other in passes[:index])


def test_the_weights_are_shared_and_the_trained_model_is_left_as_it_was(recipe):
    model = build(recipe)
    before, weights = array(model(IMAGES)), [array(weight) for weight in model.weights]
    stochastic = recipe.with_dropout_on(model)
    stochastic(IMAGES)
    np.testing.assert_array_equal(array(model(IMAGES)), before)
    for weight, value in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(array(weight), value)
    assert [id(weight) for weight in stochastic.trainable_variables] == [
        id(weight) for weight in model.trainable_variables
    ]


def test_every_dropout_of_the_model_zeroes_its_share_at_inference(recipe):
    stochastic = recipe.with_dropout_on(build(recipe))
    dropouts = [layer for layer in stochastic.layers if isinstance(layer, layers.Dropout)]
    assert len(dropouts) == 2
    for layer in dropouts:
        values = array(layer(np.ones((100, 100), "float32"), training=False))
        dropped = values == 0
        assert abs(dropped.mean() - RATE) < 4 * np.sqrt(RATE * (1 - RATE) / dropped.size)
        np.testing.assert_allclose(values[~dropped], 1 / (1 - RATE), rtol=1e-6)


def test_batch_normalisation_stays_as_it_is_at_inference(recipe):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((3,)), layers.BatchNormalization(), layers.Dropout(0.0), layers.Dense(2, use_bias=False)]
    )
    model.layers[0].moving_mean.assign([1.0, 2.0, 3.0])
    model.layers[0].moving_variance.assign([4.0, 5.0, 6.0])
    inputs = np.random.default_rng(1).normal(size=(8, 3)).astype("float32")
    outputs = array(recipe.with_dropout_on(model)(inputs))
    normalised = (inputs - np.array([1, 2, 3])) / np.sqrt(np.array([4, 5, 6]) + 1e-3)
    np.testing.assert_allclose(outputs, normalised @ array(model.layers[-1].kernel), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(array(model.layers[0].moving_mean), [1, 2, 3])


def test_mean_and_spread_of_the_passes_are_those_of_the_formula(recipe):
    # For a linear layer after dropout: mean w·x, variance Σ w²x² · rate / (1 - rate).
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), layers.Dropout(RATE), layers.Dense(4, use_bias=False)])
    inputs = np.random.default_rng(2).normal(size=(1, 6)).astype("float32")
    stochastic, number = recipe.with_dropout_on(model), 4000
    # The rows of a batch have masks of their own, so that one call gives many passes of one input.
    passes = array(stochastic(np.repeat(inputs, number, axis=0)))
    kernel = array(model.layers[-1].kernel)
    mean, variance = inputs @ kernel, inputs**2 @ kernel**2 * RATE / (1 - RATE)
    assert np.all(np.abs(passes.mean(axis=0) - mean) < 4 * np.sqrt(variance / number))
    np.testing.assert_allclose(passes.var(axis=0), variance[0], rtol=0.15)


def test_more_passes_less_spread_by_the_square_root_of_their_number(recipe):
    stochastic = recipe.with_dropout_on(build(recipe))
    logits = array(stochastic(np.repeat(IMAGES[:1], 16 * 400, axis=0)))
    passes = recipe.log_probabilities(logits).reshape(16, 400, 5)
    spread = {number: np.exp(recipe.average(passes[:number])).std(axis=0).mean() for number in (1, 4, 16)}
    for number in (4, 16):
        assert spread[number] / spread[1] == pytest.approx(1 / np.sqrt(number), rel=0.1)


def test_probabilities_are_averaged_and_not_logits(recipe):
    logits = np.random.default_rng(3).normal(size=(5, 7, 4)) * 5
    averaged = np.exp(recipe.average(recipe.log_probabilities(logits)))
    np.testing.assert_allclose(averaged, softmax(logits, axis=-1).mean(axis=0), rtol=1e-12)
    assert not np.allclose(averaged, softmax(logits.mean(axis=0), axis=-1), rtol=0.1)


def test_no_probability_is_lost_however_large_the_logits(recipe):
    logits = np.array([[[2000.0, 0.0]], [[1990.0, 0.0]]], "float32")
    result = recipe.average(recipe.log_probabilities(logits))
    # The mean of exp(-2000) and exp(-1990) is a half of the second, but for one part in exp(10).
    np.testing.assert_allclose(result[0], [0, -1990 + np.log((1 + np.exp(-10)) / 2)], rtol=1e-12, atol=1e-12)


def test_calibration_error_of_a_worked_example(recipe):
    # Three bins: 0.55 twice, one right; 0.75, wrong; 0.95 four times, three right. The mean of 0.05 · 2, 0.75, 0.2 · 4.
    confidences = np.array([0.55, 0.55, 0.75, 0.95, 0.95, 0.95, 0.95])
    correct = np.array([True, False, False, True, True, True, False])
    assert recipe.calibration_error(confidences, correct) == pytest.approx((0.1 + 0.75 + 0.8) / 7)
    assert recipe.calibration_error(np.ones(4), np.array([True] * 3 + [False])) == pytest.approx(0.25)
    # In one bin, over- and under-confidence cancel out.
    assert recipe.calibration_error(np.array([0.2, 0.8]), np.array([False, True]), bins=1) == pytest.approx(0)


def test_loss_and_accuracy_are_those_of_keras(recipe):
    generator = np.random.default_rng(4)
    logits, labels = generator.normal(size=(50, 5)).astype("float32"), generator.integers(0, 5, 50)
    result = recipe.figures(recipe.log_probabilities(logits), labels)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)(labels, logits)
    assert result["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert result["accuracy"] == pytest.approx(np.mean(logits.argmax(axis=1) == labels))


def test_main_averages_the_first_passes_of_one_trained_network(recipe, monkeypatch):
    number = 20
    logits, made, fitted = [], [], []
    with_dropout_on = recipe.with_dropout_on

    def spy(model):
        stochastic = with_dropout_on(model)
        made.append(model)

        def record(images):
            logits.append(array(stochastic(images)))
            return logits[-1]

        return record

    monkeypatch.setattr(recipe, "with_dropout_on", spy)
    monkeypatch.setattr(keras.Model, "fit", lambda model, *arguments, **keywords: fitted.append(model))
    comparison = recipe.main(limit=40, epochs=3)
    _, _, (images, labels), _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 40)
    (model,) = fitted
    assert fitted == made
    peak = recipe.main.__kwdefaults__["learning_rate"]
    assert [float(model.optimizer._learning_rate(step)) for step in (0, 3)] == pytest.approx([peak, 0], abs=1e-9)
    assert len(logits) == number
    probabilities = softmax(np.array(logits), axis=-1)
    runs = {run["variant"]: run["metrics"]["test"] for run in comparison.result.runs}
    signals = {each["variant"]: each["values"] for each in comparison.result.signals if each["name"] == "test loss"}
    assert recipe.VARIANTS == {"usual pass": 0, "1 pass": 1, "5 passes": 5, "20 passes": 20}
    assert set(runs) == set(recipe.VARIANTS)
    for variant, passes in recipe.VARIANTS.items():
        p = probabilities[:passes].mean(axis=0) if passes else softmax(array(model(images)), axis=-1)
        loss = -np.log(p[np.arange(40), labels]).mean()
        assert runs[variant]["loss"] == pytest.approx(loss, rel=1e-5)
        assert runs[variant]["accuracy"] == pytest.approx(np.mean(p.argmax(axis=1) == labels))
        line = signals["20 passes" if passes else variant]
        assert line[passes - 1] == pytest.approx(loss, rel=1e-5)
        assert passes or line == [line[0]] * number
    assert {entry["name"] for entry in comparison.result.figures} == set(comparison.result.columns)
