"""What the searches of this theme train with."""

import keras
import pytest

from evidence.recipes import find_recipes

RECIPES = [
    path.stem for path in find_recipes() if path.parent.name == "schedules" and "comparison.search(" in path.read_text()
]


@pytest.fixture(params=RECIPES)
def recipe(request, import_recipe):
    return import_recipe(f"schedules/{request.param}")


@pytest.mark.parametrize("search", [False, True])
def test_every_training_has_its_rate(recipe, search, monkeypatch):
    fit, seen = keras.Model.fit, []

    def spy(model, *arguments, callbacks, **keywords):
        *_, run = callbacks
        schedule = model.optimizer._learning_rate
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            rate = max(float(schedule(step)) for step in range(20))
        else:
            # A cycle takes the peak from its argument.
            rate = next((each.peak for each in callbacks if hasattr(each, "peak")), float(schedule))
        seen.append((run.variant, pytest.approx(rate)))
        return fit(model, *arguments, callbacks=callbacks, **keywords)

    first, second, *_ = recipe.VARIANTS
    monkeypatch.setattr(keras.Model, "fit", spy)
    monkeypatch.setattr(recipe, "VARIANTS", {name: recipe.VARIANTS[name] for name in (first, second)})
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=search, limit=300, epochs=2)
    if search:
        assert seen == [(variant, rate) for variant in recipe.VARIANTS for rate in recipe.GRID]
        assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * 2
    else:
        assert seen == [(variant, value[-1]) for variant, value in recipe.VARIANTS.items()]
