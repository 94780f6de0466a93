import keras
import numpy as np
import pytest

SEEDS, MEMBERS = 2, 5


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("averaging/ensemble")


@pytest.fixture(scope="module")
def experiment(recipe):
    """main, without training: (comparison, its models in order, their logits, the labels of the test images).

    The logits are made up. In float32, the probabilities of some labels would be 0.
    """
    models, logits = [], []
    generator = np.random.default_rng(0)
    _, _, (_, labels), _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 50)

    def predict(model, images, **keywords):
        models.append(model)
        logits.append(generator.normal(scale=5, size=(50, 10)).astype("float32"))
        logits[-1][np.arange(0, 50, 5), labels[::5]] -= 200
        return logits[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", lambda *arguments, **keywords: None)
        patch.setattr(keras.Model, "predict", predict)
        comparison = recipe.main(seeds=SEEDS, limit=50)
    return comparison, models, logits, labels


def of_each_run(comparison, values):
    """Yield each run of the comparison with the part of `values`, one for each model in order, that belongs to it."""
    values = iter(values)
    for run in comparison.result.runs:
        yield run, [next(values) for _ in range(MEMBERS if run["variant"] == "ensemble of 5" else 1)]
    assert next(values, None) is None


def reference(members, labels):
    """Return accuracy and log-loss of the mean probabilities, in the longest floating-point numbers there are."""
    logits = np.array(members, dtype=np.longdouble)
    logits -= logits.max(axis=-1, keepdims=True)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    mean = probabilities.mean(axis=0)
    return np.mean(mean.argmax(axis=-1) == labels), -np.mean(np.log(mean[np.arange(len(labels)), labels]))


def figures_of(comparison, run):
    of_run = [
        figure
        for figure in comparison.result.figures
        if (figure["variant"], figure["seed"]) == (run["variant"], run["seed"])
    ]
    return {figure["name"]: figure["value"] for figure in of_run}


def test_figures_are_those_of_the_mean_of_the_members_probabilities(experiment):
    comparison, _, logits, labels = experiment
    for run, members in of_each_run(comparison, logits):
        accuracy, loss = reference(members, labels)
        found = figures_of(comparison, run)
        assert run["metrics"]["test"] == {"accuracy": pytest.approx(accuracy), "log-loss": pytest.approx(loss)}
        assert found["log-loss"] == pytest.approx(loss)
        each = np.mean([reference([member], labels) for member in members], axis=0)
        assert [found["members' accuracy"], found["members' log-loss"]] == pytest.approx(each)
        if len(members) > 1:
            assert accuracy != pytest.approx(each[0])
            assert loss < 0.95 * each[1]


def test_signals_count_the_members_from_one(experiment):
    comparison, _, logits, labels = experiment
    for run, members in of_each_run(comparison, logits):
        of_run = {
            signal["name"]: signal["values"]
            for signal in comparison.result.signals
            if (signal["variant"], signal["seed"]) == (run["variant"], run["seed"])
        }
        expected = [reference(members[: count + 1], labels) for count in range(MEMBERS)]
        assert of_run["test accuracy"] == pytest.approx([accuracy for accuracy, _ in expected])
        assert of_run["test log-loss"] == pytest.approx([loss for _, loss in expected])


def test_log_loss_of_the_average_is_never_above_the_members_mean(recipe):
    generator = np.random.default_rng(1)
    for scale in (0, 0.1, 1, 10, 1000):
        logits = generator.normal(scale=scale, size=(3, 40, 7)).astype("float32")
        labels = generator.integers(0, 7, 40)
        together = recipe.figures(recipe.average(logits), labels)["log-loss"]
        apart = np.mean([recipe.figures(recipe.average([member]), labels)["log-loss"] for member in logits])
        assert np.isfinite(together)
        assert together <= apart + 1e-12
        assert (together < 0.99 * apart) == (scale >= 1)
        # Equal members: equality.
        assert recipe.figures(recipe.average(logits[[0, 0, 0]]), labels) == pytest.approx(
            recipe.figures(recipe.average(logits[:1]), labels)
        )


def test_it_is_never_above_it_after_training(recipe, monkeypatch):
    # Three members do, and take less time.
    variants = {"one network": (1, 1, 0.001), "ensemble of 5": (3, 1, 0.001)}
    monkeypatch.setattr(recipe, "VARIANTS", variants)
    comparison = recipe.main(epochs=2, limit=300)
    for run in comparison.result.runs:
        found = figures_of(comparison, run)
        assert found["log-loss"] <= found["members' log-loss"] + 1e-12
        if run["variant"] == "ensemble of 5":
            assert found["log-loss"] < found["members' log-loss"] - 1e-4


def test_all_members_of_all_ensembles_start_apart_and_the_first_as_the_baseline(experiment):
    comparison, models, _, _ = experiment
    starts = []
    for run, of_run in of_each_run(comparison, models):
        kernels = [np.array(model.get_weights()[0]) for model in of_run]
        if run["variant"] == "one network":
            baseline = kernels[0]
        elif run["variant"] == "ensemble of 5":
            np.testing.assert_array_equal(kernels[0], baseline)
            starts += kernels
    assert len(starts) == SEEDS * MEMBERS
    assert len({start.tobytes() for start in starts}) == len(starts)
    assert len({id(model) for model in models}) == len(models) == SEEDS * (MEMBERS + 2)


def test_the_large_network_has_as_many_parameters_as_the_ensemble(experiment):
    comparison, models, _, _ = experiment
    sizes = {}
    for run, of_run in of_each_run(comparison, models):
        sizes[run["variant"]] = sum(model.count_params() for model in of_run)
    one, ensemble, large = sizes.values()
    assert ensemble == MEMBERS * one
    assert large == pytest.approx(ensemble, rel=0.05)


@pytest.mark.parametrize("image_shape, classes", [((9, 11, 3), 3), ((32, 32, 3), 100), ((2, 2, 1), 10)])
def test_the_number_of_filters_for_an_equal_size_is_found_for_any_data(recipe, image_shape, classes):
    assert recipe.filters_of(1, image_shape, classes) == recipe.FILTERS

    def size(filters):
        return recipe.build_model(image_shape, classes, filters).count_params()

    for times in (2, MEMBERS):
        filters = recipe.filters_of(times, image_shape, classes)
        errors = [abs(size(filters + step) - times * size(recipe.FILTERS)) for step in (0, -1, 1)]
        assert errors[0] == min(errors)


def test_variants_are_the_counts_and_sizes_that_their_names_say(recipe):
    assert recipe.MEMBERS == MEMBERS
    assert {variant: values[:2] for variant, values in recipe.VARIANTS.items()} == {
        "one network": (1, 1),
        "ensemble of 5": (5, 1),
        "one, 5 times as large": (1, 5),
    }


def test_every_training_ends_at_a_rate_of_zero_and_a_member_is_trained_as_the_one_network(recipe, monkeypatch):
    rates = {}

    def fit(model, *arguments, epochs, **keywords):
        schedule = model.optimizer._learning_rate
        first, last = (float(schedule(step)) for step in (0, 2 * epochs))
        rates.setdefault(model.count_params(), []).append((pytest.approx(first), pytest.approx(last, abs=1e-9)))

    monkeypatch.setattr(keras.Model, "fit", fit)
    recipe.main(epochs=3, limit=200)
    single, ensemble, large = (rate for _, _, rate in recipe.VARIANTS.values())
    assert ensemble == single
    assert list(rates.values()) == [[(single, 0)] * (1 + MEMBERS), [(large, 0)]]


def test_search_tries_each_rate_with_each_single_network(recipe, monkeypatch):
    rates = {}

    def fit(model, *arguments, callbacks, **keywords):
        # Without training.
        (run,) = callbacks
        rates.setdefault(run.variant, []).append(pytest.approx(float(model.optimizer._learning_rate(0))))
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"accuracy": 0.5}}, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=True, epochs=1, limit=200)
    assert rates == dict.fromkeys(["one network", "one, 5 times as large"], [0.01, 0.02])
    assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * 2
