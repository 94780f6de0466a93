"""What --search does is the same in every recipe of this theme."""

import inspect
import types

import keras
import pytest

from evidence.recipes import find_recipes

RECIPES = [recipe.stem for recipe in find_recipes() if recipe.parent.name == "optimizers"]


@pytest.fixture(params=RECIPES)
def recipe(request, import_recipe):
    return import_recipe(f"optimizers/{request.param}")


@pytest.fixture
def fits(monkeypatch, images):
    """Pretend to train with two seeds: 0.03 is the best rate by the mean of both, by neither of them alone."""
    calls = []
    accuracies = {0.03: (0.8, 0.8), 0.01: (0.9, 0.5)}

    def fit(model, x, y, callbacks=(), **keywords):
        rate = round(float(model.optimizer.learning_rate), 6)
        calls.append(types.SimpleNamespace(rate=rate, x=x, y=y, searching=not callbacks, **keywords))
        for run in callbacks:
            run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})
            run.comparison.result.runs[-1]["epoch_seconds"] = [1.0, 1.0]
            model.optimizer.build(model.trainable_variables)
        last = accuracies.get(rate, (0.1, 0.9))[(len(calls) - 1) % 2]
        return types.SimpleNamespace(model=model, history={"val_accuracy": [0.95, last]})

    def refuse(*arguments, **keywords):
        raise AssertionError("a model was evaluated in the search")

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(keras.Model, "evaluate", refuse)
    monkeypatch.setattr(keras.Model, "predict", refuse)
    return calls


def test_all_recipes_have_one_grid_and_one_search(import_recipe):
    recipes = [import_recipe(f"optimizers/{name}") for name in RECIPES]
    assert len({recipe.GRID for recipe in recipes}) == 1
    assert len({inspect.getsource(recipe.search_rates) for recipe in recipes}) == 1
    for recipe in recipes:
        assert all(rate in recipe.GRID for *_, rate in recipe.VARIANTS.values())


def test_it_trains_every_variant_at_every_rate_and_the_comparison_takes_the_best(
    recipe, fits, images, monkeypatch, capsys
):
    train, validation, _, _ = images
    monkeypatch.setattr(recipe, "load", lambda *arguments: images)
    monkeypatch.setattr(recipe, "VARIANTS", dict(list(recipe.VARIANTS.items())[:2]))
    monkeypatch.setenv("COLUMNS", "80")
    comparison = recipe.main(search=True, seeds=2, epochs=2)
    searched = [call for call in fits if call.searching]
    assert [call.rate for call in searched] == [rate for _ in recipe.VARIANTS for rate in recipe.GRID for _ in range(2)]
    for call in fits:
        assert (call.x, call.y) == train
        assert call.validation_data is validation
        assert call.epochs == 2
    assert {call.rate for call in fits if not call.searching} == {0.03}
    assert all(row["figures"]["learning rate"] == 0.03 for row in comparison.summary())
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    first = next(iter(recipe.VARIANTS)).split()
    row = next(line.split() for line in output.splitlines() if line.split()[: len(first)] == first)
    assert row[len(first) :] == ["50.0"] * 5 + ["70.0", "80.0"] + ["50.0"] * 3 + ["0.03"]


def test_it_takes_a_list_of_seeds_too(recipe, monkeypatch):
    seen = []

    def train_model(variant, rate, seed):
        seen.append(seed)
        return types.SimpleNamespace(history={"val_accuracy": [0.5]})

    monkeypatch.setattr(recipe, "train_model", train_model)
    recipe.search_rates([3, 7])
    assert seen == [3, 7] * len(recipe.VARIANTS) * len(recipe.GRID)


def test_without_it_the_stored_rates_are_used(recipe, fits, images, monkeypatch):
    monkeypatch.setattr(recipe, "load", lambda *arguments: images)
    comparison = recipe.main()
    assert not any(call.searching for call in fits)
    for row in comparison.summary():
        variant = row["variant"].partition(", loss")[0]
        assert row["figures"]["learning rate"] == recipe.VARIANTS[variant][-1]
