import keras
import numpy as np
import pytest

EPOCHS, STOPS = 8, (2, 4, 8)
RATE = 0.01
IMAGES = 32  # one batch, so that an epoch is a step


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("averaging/schedule_free")


@pytest.fixture(scope="module")
def experiment(recipe):
    """main: (comparison, {variant: training}, the trainings of the cosine that end earlier).

    A training is (optimizer, the weights after each step, its z after each step or nothing, the logged accuracies).
    """
    fit, found, earlier = keras.Model.fit, {}, []

    def spy(model, *arguments, callbacks, **keywords):
        weights, z = [], []

        class Record(keras.callbacks.Callback):
            def on_epoch_end(self, epoch, logs=None):
                optimizer = self.model.optimizer
                weights.append(copies(self.model.trainable_variables))
                if isinstance(optimizer, keras.optimizers.ScheduleFreeAdamW):
                    z.append(copies(optimizer._momentums))

        # First in the list, it sees the weights that were trained, before any are swapped.
        history = fit(model, *arguments, callbacks=[Record(), *callbacks], **keywords)
        training = model.optimizer, weights, z, history.history["val_accuracy"]
        if callbacks:
            found[callbacks[-1].variant] = training
        else:
            earlier.append(training)
        return history

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", spy)
        # At one rate, what differs is the optimizer.
        patch.setattr(recipe, "VARIANTS", {name: (*value[:-1], RATE) for name, value in recipe.VARIANTS.items()})
        comparison = recipe.main(epochs=EPOCHS, limit=IMAGES)
    return comparison, found, earlier


def copies(variables):
    return [np.array(keras.ops.convert_to_numpy(variable), "float64") for variable in variables]


def means(paths, count):
    return [np.mean(values[:count], axis=0) for values in zip(*paths, strict=True)]


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


def test_the_average_of_z_is_validated_in_each_epoch_and_evaluated_at_the_end(recipe, experiment):
    comparison, trainings, _ = experiment
    train, validation, test, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, IMAGES)
    (run,) = [run for run in comparison.result.runs if run["variant"] == "schedule-free"]
    _, weights, z, _ = trainings["schedule-free"]
    expected = [loss(means(z, step), validation) for step in range(1, EPOCHS + 1)]
    np.testing.assert_allclose(run["curve"]["val_loss"], expected, rtol=1e-4)
    for split, data in {"train": train, "validation": validation, "test": test}.items():
        assert run["metrics"][split]["loss"] == pytest.approx(loss(means(z, EPOCHS), data), rel=1e-4)
    # That is neither z nor y, where it was trained.
    for others in (z[-1], weights[-1]):
        assert abs(loss(others, test) / loss(means(z, EPOCHS), test) - 1) > 1e-3


def test_training_is_at_y_between_z_and_the_average(experiment):
    _, trainings, _ = experiment
    _, weights, z, _ = trainings["schedule-free"]
    for step in range(1, EPOCHS + 1):
        for y, last, mean in zip(weights[step - 1], z[step - 1], means(z, step), strict=True):
            np.testing.assert_allclose(y, 0.1 * last + 0.9 * mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["constant rate", "schedule-free, no swap"])
def test_without_the_callback_the_trained_weights_are_evaluated(recipe, experiment, variant):
    comparison, trainings, _ = experiment
    _, validation, test, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, IMAGES)
    (run,) = [run for run in comparison.result.runs if run["variant"] == variant]
    _, weights, _, _ = trainings[variant]
    np.testing.assert_allclose(run["curve"]["val_loss"], [loss(each, validation) for each in weights], rtol=1e-4)
    assert run["metrics"]["test"]["loss"] == pytest.approx(loss(weights[-1], test), rel=1e-4)


def test_only_the_cosine_knows_when_it_ends(experiment):
    _, trainings, earlier = experiment
    cosines = [*earlier, trainings["cosine decay"]]
    for (optimizer, weights, _, _), stop in zip(cosines, STOPS, strict=True):
        schedule = optimizer._learning_rate
        assert len(weights) == stop
        assert float(schedule(0)) == pytest.approx(RATE)
        assert float(schedule(stop / 2)) == pytest.approx(RATE / 2)
        assert float(schedule(stop)) == pytest.approx(0, abs=1e-8)
    for variant, (optimizer, _, _, _) in trainings.items():
        if variant != "cosine decay":
            assert optimizer.get_config()["learning_rate"] == pytest.approx(RATE)
            assert isinstance(optimizer, keras.optimizers.ScheduleFreeAdamW) == variant.startswith("schedule-free")


def test_early_stops_are_ends_of_the_cosine_and_moments_of_the_others(experiment):
    comparison, trainings, earlier = experiment
    for variant, (_, _, _, accuracies) in trainings.items():
        expected = [accuracies[stop - 1] for stop in STOPS]
        if variant == "cosine decay":
            expected = [*(each[-1] for _, _, _, each in earlier), accuracies[-1]]
        figures = {each["name"]: each["value"] for each in comparison.result.figures if each["variant"] == variant}
        assert [figures["stopped at a quarter"], figures["stopped at half"]] == expected[:2]
        (signal,) = [each for each in comparison.result.signals if each["variant"] == variant]
        assert (signal["at"], signal["values"]) == (list(STOPS), expected)


def test_all_trainings_start_equal(recipe, monkeypatch):
    starts = []

    def fit(model, *arguments, epochs, callbacks, **keywords):
        # Without training.
        starts.append(copies(model.trainable_variables))
        for run in callbacks[-1:]:
            run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})
        return type("History", (), {"history": {"val_accuracy": [0.5] * epochs}})

    monkeypatch.setattr(keras.Model, "fit", fit)
    recipe.main(epochs=EPOCHS, limit=IMAGES)
    assert len(starts) == len(recipe.VARIANTS) + 2
    for start in starts:
        for weight, expected in zip(start, starts[0], strict=True):
            np.testing.assert_array_equal(weight, expected)


def test_search_tries_each_rate_with_what_the_variant_has_beside_it(recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, epochs, callbacks, **keywords):
        # Without training.
        run, rate = callbacks[-1], model.optimizer._learning_rate
        seen.append((run.variant, pytest.approx(float(rate(0) if callable(rate) else rate)), len(callbacks)))
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"accuracy": 0.5}}, {}, [], rate=run.rate)
        return type("History", (), {"history": {"val_accuracy": [0.5] * epochs}})

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    recipe.main(search=True, epochs=4, seeds=1, limit=IMAGES)
    swapped = {"schedule-free": 2}
    assert seen == [(name, rate, swapped.get(name, 1)) for name in recipe.VARIANTS for rate in (0.01, 0.02)]
