import keras
import numpy as np
import pytest

EPOCHS = 6
RATE = 0.001
IMAGES = 32  # one batch, so that an epoch is a step


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("averaging/exponential_moving_average")


@pytest.fixture(scope="module")
def trainings(recipe):
    """What main trains: {variant: (optimizer, the trained weights after each step, run)}."""
    fit, found = keras.Model.fit, {}

    def spy(model, *arguments, callbacks, **keywords):
        path = []

        class Record(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                path.append([np.array(weight, dtype="float64") for weight in model.get_weights()])

        found[callbacks[-1].variant] = model.optimizer, path
        return fit(model, *arguments, callbacks=[Record(), *callbacks], **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", spy)
        # At one rate, what differs is the averaging.
        patch.setattr(recipe, "VARIANTS", {name: (*value[:-1], RATE) for name, value in recipe.VARIANTS.items()})
        comparison = recipe.main(epochs=EPOCHS, limit=IMAGES)
    return {run["variant"]: (*found[run["variant"]], run) for run in comparison.result.runs}


def average(path, momentum):
    """Return the average after the last step: it begins with the weights after the first one."""
    averages = path[0]
    for weights in path[1:]:
        averages = [momentum * old + (1 - momentum) * new for old, new in zip(averages, weights, strict=True)]
    return averages


def loss(weights, data):
    """Return the mean cross-entropy of the recipe's network, in float64."""
    images, labels = data
    values = images.reshape(len(images), -1)
    for kernel, bias in zip(weights[:-2:2], weights[1:-2:2], strict=True):
        values = np.maximum(values @ kernel + bias, 0)
    logits = values @ weights[-2] + weights[-1]
    largest = logits.max(axis=-1)
    sums = np.exp(logits - largest[:, None]).sum(axis=-1)
    return np.mean(largest + np.log(sums) - logits[np.arange(len(labels)), labels])


def momentum_of(variant):
    return float(variant.removeprefix("EMA ")) if variant.startswith("EMA") else None


def test_optimizers_average_a_known_path_of_weights_by_the_recurrence(trainings):
    path = [np.float64([2**step, -step - 1]) for step in range(EPOCHS)]
    momenta = []
    for variant, (optimizer, _, _) in trainings.items():
        momentum = momentum_of(variant)
        momenta.append(momentum)
        optimizer = type(optimizer).from_config(optimizer.get_config())
        variable = keras.Variable(np.float32([7, 7]))
        for weights in path:
            # With gradients of zero, Adam leaves the weights where the test has put them.
            variable.assign(weights)
            optimizer.apply([keras.ops.zeros(2)], [variable])
        np.testing.assert_array_equal(variable, path[-1])
        optimizer.finalize_variable_values([variable])
        if momentum is None:
            np.testing.assert_array_equal(variable, path[-1])
            continue
        # The first step's weights have the share of all steps before them.
        shares = [momentum ** (EPOCHS - 1), *((1 - momentum) * momentum ** np.arange(EPOCHS - 2, -1, -1))]
        assert sum(shares) == pytest.approx(1)
        np.testing.assert_allclose(variable, shares @ np.array(path), rtol=1e-5)
        np.testing.assert_allclose(variable, average([[weights] for weights in path], momentum)[0], rtol=1e-5)
    assert momenta == [None, 0.9, 0.99, 0.999, None]


def test_validation_after_each_epoch_sees_the_averaged_weights(recipe, trainings):
    _, validation, _, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, IMAGES)
    for variant, (_, path, run) in trainings.items():
        trained = [loss(weights, validation) for weights in path]
        expected = trained
        if momentum := momentum_of(variant):
            expected = [loss(average(path[: step + 1], momentum), validation) for step in range(EPOCHS)]
            assert not np.allclose(expected[1:], trained[1:], rtol=1e-3)
        np.testing.assert_allclose(run["curve"]["val_loss"], expected, rtol=1e-5)


def test_averaged_weights_are_left_in_the_model_and_evaluated(recipe, trainings):
    train, validation, test, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, IMAGES)
    for variant, (_, path, run) in trainings.items():
        momentum = momentum_of(variant)
        weights = average(path, momentum) if momentum else path[-1]
        for split, data in {"train": train, "validation": validation, "test": test}.items():
            assert run["metrics"][split]["loss"] == pytest.approx(loss(weights, data), rel=1e-5)


def test_averaging_leaves_training_as_it_is(trainings):
    baseline = trainings["constant rate"][1]
    for variant in ("EMA 0.9", "EMA 0.99", "EMA 0.999"):
        for weights, expected in zip(trainings[variant][1], baseline, strict=True):
            for weight, expectation in zip(weights, expected, strict=True):
                # TensorFlow's swap adds and subtracts, which rounds.
                np.testing.assert_allclose(weight, expectation, rtol=0, atol=1e-5)


def test_the_decaying_rate_ends_at_zero_and_the_others_stay(trainings):
    for variant, (optimizer, _, _) in trainings.items():
        rate = optimizer.get_config()["learning_rate"]
        if variant == "cosine decay":
            schedule = keras.optimizers.schedules.deserialize(rate)
            assert float(schedule(0)) == pytest.approx(RATE)
            assert float(schedule(EPOCHS / 2)) == pytest.approx(RATE / 2)
            assert float(schedule(EPOCHS)) == pytest.approx(0, abs=1e-9)
        else:
            assert rate == pytest.approx(RATE)


def test_search_tries_each_rate_with_what_the_variant_has_beside_it(recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, callbacks, **keywords):
        # Without training.
        run = callbacks[-1]
        rate = model.optimizer._learning_rate
        seen.append((run.variant, pytest.approx(float(rate(0) if callable(rate) else rate)), model.optimizer.use_ema))
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"accuracy": 0.5}}, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=True, epochs=1, limit=IMAGES)
    assert seen == [(variant, rate, variant.startswith("EMA")) for variant in recipe.VARIANTS for rate in (0.01, 0.02)]
    assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * len(recipe.VARIANTS)
