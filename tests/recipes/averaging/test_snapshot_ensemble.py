import keras
import numpy as np
import pytest

EPOCHS, MEMBERS, RATE = 4, 5, 0.1
IMAGES = 50  # one batch, so that an epoch is a step


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("averaging/snapshot_ensemble")


@pytest.fixture(scope="module")
def experiment(recipe):
    """main: (comparison, trainings, predictions, labels of the test images).

    A training is (schedule, the weights before it and after each of its epochs); a prediction is (weights, logits).
    """
    fit, predict = keras.Model.fit, keras.Model.predict
    trainings, predictions = [], []
    _, _, (_, labels), _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, IMAGES)

    def spy_on_fit(model, *arguments, callbacks, **keywords):
        path = [copies(model)]

        class Record(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                path.append(copies(self.model))

        trainings.append((model.optimizer._learning_rate, path))
        return fit(model, *arguments, callbacks=[Record(), *callbacks], **keywords)

    def spy_on_predict(model, *arguments, **keywords):
        logits = predict(model, *arguments, **keywords)
        predictions.append((copies(model), logits))
        return logits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", spy_on_fit)
        patch.setattr(keras.Model, "predict", spy_on_predict)
        patch.setattr(recipe, "VARIANTS", {name: (kind, RATE) for name, (kind, _) in recipe.VARIANTS.items()})
        comparison = recipe.main(epochs=EPOCHS, limit=IMAGES)
    return comparison, trainings, predictions, labels


def copies(model):
    return [np.array(weight) for weight in model.get_weights()]


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def members_of(experiment):
    """Return {variant: its predictions}."""
    comparison, _, predictions, _ = experiment
    assert len(predictions) == 1 + 2 * MEMBERS
    parts = predictions[:1], predictions[1 : 1 + MEMBERS], predictions[1 + MEMBERS :]
    return dict(zip((run["variant"] for run in comparison.result.runs), parts, strict=True))


def test_snapshots_are_the_weights_at_the_ends_of_the_cycles(experiment):
    _, trainings, _, _ = experiment
    members = members_of(experiment)
    _, one_path = trainings[0]
    assert_equal(members["one cosine"][0][0], one_path[-1])
    _, path = trainings[1]
    assert len(path) == 1 + MEMBERS * EPOCHS
    for number, (weights, _) in enumerate(members["5 snapshots"], start=1):
        assert_equal(weights, path[number * EPOCHS])
    for (weights, _), (_, path) in zip(members["5 short trainings"], trainings[2:], strict=True):
        assert len(path) == 1 + EPOCHS
        assert_equal(weights, path[-1])


def test_the_rate_falls_along_a_cosine_in_each_cycle_and_leaps_back_to_its_peak(experiment):
    _, trainings, _, _ = experiment
    cycles = [MEMBERS * EPOCHS, EPOCHS, *[EPOCHS] * MEMBERS]
    for (schedule, path), cycle in zip(trainings, cycles, strict=True):
        steps = np.arange(len(path) - 1)
        expected = RATE / 2 * (1 + np.cos(np.pi * (steps % cycle) / cycle))
        found = [float(keras.ops.convert_to_numpy(schedule(step))) for step in steps]
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        # The steps after which the snapshots are taken have the lowest rates.
        assert expected[cycle - 1 :: cycle].max() == pytest.approx(expected.min())


def test_the_optimizer_steps_along_that_schedule(experiment):
    """At equal starts the two long trainings part when their rates do: after the first step."""
    _, trainings, _, _ = experiment
    (_, one), (_, snapshots), (_, short), *_ = trainings
    assert_equal(one[0], snapshots[0])
    assert_equal(snapshots[0], short[0])
    # The same schedule until the first restart.
    for step in range(EPOCHS + 1):
        for weight, expected in zip(snapshots[step], short[step], strict=True):
            np.testing.assert_allclose(weight, expected, rtol=1e-4, atol=1e-6)
    assert not np.allclose(one[EPOCHS][0], snapshots[EPOCHS][0], rtol=1e-4, atol=1e-6)


def reference(members, labels):
    """Return accuracy, log-loss and calibration error of the mean probabilities, computed the long way."""
    logits = np.array(members, dtype=np.longdouble)
    logits -= logits.max(axis=-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    mean = probabilities.mean(axis=0)
    edges, error = np.linspace(0, 1, 16), 0
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = (mean.max(axis=-1) >= low) & (mean.max(axis=-1) < high)
        if inside.any():
            accuracy = np.mean(mean[inside].argmax(axis=-1) == labels[inside])
            error += inside.mean() * abs(accuracy - mean[inside].max(axis=-1).mean())
    loss = -np.mean(np.log(mean[np.arange(len(labels)), labels]))
    return np.mean(mean.argmax(axis=-1) == labels), loss, error


def test_figures_are_those_of_the_mean_of_the_members_probabilities(experiment):
    comparison, _, _, labels = experiment
    for run in comparison.result.runs:
        logits = [each for _, each in members_of(experiment)[run["variant"]]]
        accuracy, loss, error = reference(logits, labels)
        found = {each["name"]: each["value"] for each in comparison.result.figures if each["variant"] == run["variant"]}
        assert run["metrics"]["test"]["accuracy"] == pytest.approx(accuracy)
        assert found["log-loss"] == pytest.approx(loss)
        assert found["calibration error"] == pytest.approx(error, abs=1e-9)
        own = [reference([each], labels)[0] for each in logits]
        assert found["members' accuracy"] == pytest.approx(np.mean(own))
        choices = np.argmax(logits, axis=-1)
        pairs = [np.mean(choices[i] != choices[j]) for i in range(len(choices)) for j in range(i)]
        assert found["disagreement"] == pytest.approx(np.mean(pairs) if pairs else 0)
        signals = {
            each["name"]: each["values"] for each in comparison.result.signals if each["variant"] == run["variant"]
        }
        by_count = [reference(logits[-count:], labels) for count in range(1, MEMBERS + 1)]
        assert signals["test accuracy"] == pytest.approx([each[0] for each in by_count])
        assert signals["test log-loss"] == pytest.approx([each[1] for each in by_count])


def test_networks_of_one_cycle_start_apart(experiment):
    _, trainings, _, _ = experiment
    starts = {path[0][0].tobytes() for _, path in trainings[2:]}
    assert len(starts) == len(trainings[2:]) == MEMBERS


def test_search_trains_each_kind_once_at_each_rate(recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, epochs, callbacks, **keywords):
        # Without training.
        run = callbacks[-1]
        seen.append((run.variant, epochs, pytest.approx(model.optimizer._learning_rate.initial_learning_rate)))
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"accuracy": 0.5}}, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    recipe.main(search=True, epochs=2, seeds=1, limit=IMAGES)
    epochs = {"one cosine": 10, "5 snapshots": 10, "5 short trainings": 2}
    assert seen == [(variant, number, rate) for variant, number in epochs.items() for rate in (0.01, 0.02)]
