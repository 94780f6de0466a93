import types

import keras
import numpy as np
import pytest

LIMIT, SEEDS = 41, 3


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("reproducibility/noise_floor")


@pytest.fixture(scope="module")
def experiment(recipe):
    """main, without training: (comparison, {(variant, seed): model})."""
    models = []

    def fit(model, *arguments, **keywords):
        # What is drawn in training.
        noise = keras.random.normal(model.layers[-1].kernel.shape)
        model.layers[-1].kernel.assign_add(noise)
        models.append(model)
        return types.SimpleNamespace(history={"val_accuracy": [0.5]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(limit=LIMIT, epochs=1, seeds=SEEDS)
    return comparison, dict(zip([(run["variant"], run["seed"]) for run in comparison.result.runs], models, strict=True))


def weights_of(model):
    return np.concatenate(
        [np.array(keras.ops.convert_to_numpy(weight)).ravel() for weight in model.trainable_variables]
    )


def test_the_same_seed_is_the_same_training_and_all_others_are_not(experiment):
    _, models = experiment
    weights = {key: weights_of(model) for key, model in models.items()}
    for seed in range(SEEDS):
        np.testing.assert_array_equal(weights.pop(("A again", seed)), weights["A", seed])
    weights = list(weights.values())
    assert len(weights) == 6 * SEEDS
    for number, one in enumerate(weights):
        # No number is drawn twice, neither of the start nor of what follows.
        assert all(np.mean(one == two) < 0.1 for two in weights[:number])


def test_names_differ_in_nothing_but_the_seed(experiment):
    _, models = experiment
    first, *others = models.values()
    for model in others:
        assert model.optimizer.get_config() | {"name": None} == first.optimizer.get_config() | {"name": None}
        assert [weight.shape for weight in model.weights] == [weight.shape for weight in first.weights]


def test_halves_are_every_second_test_image(recipe, experiment):
    comparison, models = experiment
    *_, (images, labels), _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, LIMIT)
    figures = {(each["variant"], each["seed"], each["name"]): each["value"] for each in comparison.result.figures}
    for run in comparison.result.runs:
        key = run["variant"], run["seed"]
        logits = models[key].predict(images, verbose=0)
        right = [int(np.argmax(row)) == label for row, label in zip(logits, labels, strict=True)]
        assert run["metrics"]["test"]["accuracy"] == pytest.approx(sum(right) / LIMIT)
        assert figures[*key, "even images"] == pytest.approx(sum(right[place] for place in range(0, LIMIT, 2)) / 21)
        assert figures[*key, "odd images"] == pytest.approx(sum(right[place] for place in range(1, LIMIT, 2)) / 20)


def test_training_is_repeated_to_the_bit_with_all_that_is_drawn(recipe):
    comparison = recipe.main(limit=300, epochs=2)
    curves = {run["variant"]: run["curve"] for run in comparison.result.runs}
    assert curves["A again"] == curves["A"]
    assert curves["B"] != curves["A"]
