from types import SimpleNamespace

import keras
import numpy as np
import pytest

# Validation losses by epoch, with a tie, which is no improvement: the lowest are those of epochs 3, 5, 9 and 15.
LOSSES = [5.0, 4.0, 3.0, 3.0, 2.0, 2.5, 2.1, 2.2, 1.0, 1.5, 1.4, 1.3, 1.2, 1.1, 0.5, 0.6]
# By patience: the epochs spent, and the epoch whose weights are kept.
EXPECTED = {1: (4, 3), 3: (8, 5), 5: (14, 9)}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("regularization/early_stopping")


def run_scripted(recipe, losses, epochs):
    """Run main without training; return the comparison, {variant: epochs spent} and the validation data of each fit.

    The validation losses are given, the training loss falls for ever. The weights of an epoch are the epoch's number,
    and so are the losses of `evaluate`.
    """
    spent, validation = {}, []

    def fit(model, images, labels, *, epochs, validation_data, callbacks, **keywords):
        variant = callbacks[-1].variant
        validation.append(validation_data)
        callbacks = keras.callbacks.CallbackList(callbacks, add_history=True, model=model, epochs=epochs)
        model.stop_training = False
        callbacks.on_train_begin()
        for epoch in range(epochs):
            callbacks.on_epoch_begin(epoch)
            for weight in model.trainable_variables:
                weight.assign(np.full(weight.shape, epoch + 1))
            spent[variant] = epoch + 1
            callbacks.on_epoch_end(epoch, {"loss": 1 / (epoch + 1), "val_loss": losses[epoch]})
            if model.stop_training:
                break
        callbacks.on_train_end()
        return model.history

    def evaluate(model, *arguments, **keywords):
        (number,) = {float(value) for weight in model.get_weights() for value in np.unique(weight)}
        return {"loss": number}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        patch.setattr(keras.Model, "evaluate", evaluate)
        return recipe.main(epochs=epochs, limit=8), spent, validation


@pytest.fixture(scope="module")
def scripted(recipe):
    return run_scripted(recipe, LOSSES, epochs=len(LOSSES))


def evaluated_weights(comparison):
    """Return {variant: the epoch whose weights were evaluated on the test data}."""
    return {run["variant"]: run["metrics"]["test"]["loss"] for run in comparison.result.runs}


def test_it_stops_after_as_many_epochs_without_improvement_as_the_patience_says(recipe, scripted):
    _, spent, _ = scripted
    assert [patience for patience, _, _ in recipe.VARIANTS.values() if patience] == list(EXPECTED)
    for patience, (epochs, _) in EXPECTED.items():
        assert spent[f"patience {patience}"] == epochs


def test_the_weights_of_the_lowest_validation_loss_are_the_ones_that_are_evaluated(scripted):
    kept = evaluated_weights(scripted[0])
    for patience, (_, epoch) in EXPECTED.items():
        assert kept[f"patience {patience}"] == epoch


def test_the_weights_come_back_when_it_never_stops(recipe):
    # Lowest in epoch 5 of 7, too near the end for a patience of 3.
    comparison, spent, _ = run_scripted(recipe, LOSSES, epochs=7)
    assert spent["patience 3"] == 7
    assert evaluated_weights(comparison)["patience 3"] == 5


def test_random_curves_agree_with_a_search_for_the_first_pause(recipe):
    for seed in range(3):
        losses = np.random.default_rng(seed).normal(size=20).cumsum().tolist()
        comparison, spent, _ = run_scripted(recipe, losses, epochs=20)
        for patience in EXPECTED:
            pauses = [
                end
                for end in range(patience + 1, 20)
                if min(losses[end - patience : end]) >= min(losses[: end - patience])
            ]
            end = min(pauses, default=20)
            assert spent[f"patience {patience}"] == end
            assert evaluated_weights(comparison)[f"patience {patience}"] == np.argmin(losses[:end]) + 1


def test_without_a_patience_all_epochs_are_spent_and_the_last_weights_kept(recipe, scripted):
    comparison, spent, _ = scripted
    for variant in ("all epochs", "cosine, all epochs"):
        assert recipe.VARIANTS[variant][0] is None
        assert spent[variant] == evaluated_weights(comparison)[variant] == len(LOSSES)


def test_the_figure_tells_the_epochs_spent(scripted):
    comparison, spent, _ = scripted
    for row in comparison.summary():
        assert row["figures"] == {"epochs spent": spent[row["variant"]]}
    assert comparison.result.columns.keys() == {"epochs spent"}


def test_stopping_sees_the_validation_split(recipe, scripted):
    _, (images, labels), _, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 8)
    for given_images, given_labels in scripted[2]:
        np.testing.assert_array_equal(given_images, images)
        np.testing.assert_array_equal(given_labels, labels)


def test_in_training_what_is_evaluated_has_the_lowest_validation_loss(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "VARIANTS", {"patience 3": (3, False, 0.01)})
    (run,) = recipe.main(epochs=60, limit=200).result.runs
    losses = run["curve"]["val_loss"]
    assert np.argmin(losses) + 4 == len(losses) < 60
    assert run["metrics"]["validation"]["loss"] == pytest.approx(min(losses), rel=1e-5)
    assert losses[-1] > 1.001 * min(losses)


@pytest.mark.parametrize("search", [False, True])
def test_only_the_rate_of_the_cosine_falls_and_stopping_is_searched_as_it_is_used(search, recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, epochs, callbacks, **keywords):
        # Without training.
        rate = model.optimizer.get_config()["learning_rate"]
        if isinstance(rate, dict):
            schedule = keras.optimizers.schedules.deserialize(rate)
            rate = tuple(float(schedule(step)) for step in (0, 2 * epochs))
        seen.append((len(callbacks), pytest.approx(rate, abs=1e-9)))
        run = callbacks[-1]
        metrics = {"validation" if search else "test": {"loss": 0.5}}
        run.comparison._finish_run(run.variant, run.seed, metrics, {}, [], rate=run.rate)
        return SimpleNamespace(epoch=[0])

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=search, epochs=2, limit=200)
    expected = []
    for patience, falls, chosen in recipe.VARIANTS.values():
        for rate in recipe.GRID if search else [chosen]:
            expected.append((2 if patience else 1, (rate, 0.0) if falls else rate))
    assert seen == expected
    if search:
        assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * 5


def test_the_baseline_has_the_rate_of_the_headline(recipe):
    assert next(iter(recipe.VARIANTS.values())) == (None, *recipe.VARIANTS[recipe.HEADLINE][1:])
