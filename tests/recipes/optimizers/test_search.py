"""What rates the recipes of this theme train with, in a comparison and in a search."""

import keras
import pytest

from evidence.recipes import find_recipes

RECIPES = [recipe.stem for recipe in find_recipes() if recipe.parent.name == "optimizers"]


@pytest.fixture(params=RECIPES)
def recipe(request, import_recipe):
    return import_recipe(f"optimizers/{request.param}")


@pytest.mark.parametrize("search", [False, True])
def test_every_training_has_its_rate_which_falls_to_zero(recipe, search, images, monkeypatch):
    fit, seen = keras.Model.fit, []

    def spy(model, inputs, targets, *, batch_size, epochs, callbacks, **keywords):
        (run,) = callbacks
        schedule, steps = model.optimizer._learning_rate, epochs * -(-len(targets) // batch_size)
        first, last = float(schedule(0)), float(schedule(steps))
        seen.append((run.variant, pytest.approx(first), pytest.approx(last, abs=1e-9)))
        assert float(schedule(steps - 1)) > 0
        return fit(model, inputs, targets, batch_size=batch_size, epochs=epochs, callbacks=callbacks, **keywords)

    first, *_, last = recipe.VARIANTS
    monkeypatch.setattr(keras.Model, "fit", spy)
    monkeypatch.setattr(recipe, "load", lambda *arguments: images)
    monkeypatch.setattr(recipe, "VARIANTS", {first: recipe.VARIANTS[first], last: recipe.VARIANTS[last]})
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=search, epochs=2)
    if search:
        # A loss that is scaled keeps the rate that is best without.
        searched = [variant for variant in (first, last) if "loss / 100" not in variant]
        assert seen == [(variant, rate, 0.0) for variant in searched for rate in recipe.GRID]
        assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * len(searched)
    else:
        assert seen == [(variant, value[-1], 0.0) for variant, value in recipe.VARIANTS.items()]
