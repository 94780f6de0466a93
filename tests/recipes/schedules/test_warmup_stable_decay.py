import types

import keras
import numpy as np
import pytest


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("schedules/warmup_stable_decay")


def rates(schedule, steps):
    """Return the rate of each step, and that after the last one."""
    return keras.ops.convert_to_numpy(keras.ops.vectorized_map(schedule, keras.ops.arange(steps + 1)))


def test_rate_rises_stays_and_falls_to_zero(recipe):
    found = rates(recipe.WarmupStableDecay(0.5, warmup_steps=10, decay_steps=20, steps=100), 100)
    expected = np.concatenate([0.5 * np.arange(10) / 10, np.full(70, 0.5), 0.5 * np.arange(20, -1, -1) / 20])
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    # The corners.
    assert found[[0, 10, 80, 100]].tolist() == [0.0, 0.5, 0.5, 0.0]
    assert 0 < found[99] < found[81] < 0.5


def test_without_warm_up_it_begins_at_the_peak_and_without_decay_it_stays_there(recipe):
    assert rates(recipe.WarmupStableDecay(0.5, 0, 0, 5), 9).tolist() == [0.5] * 10
    assert rates(recipe.WarmupStableDecay(0.5, 0, 5, 5), 5)[0] == 0.5
    assert rates(recipe.WarmupStableDecay(0.5, 5, 0, 5), 50)[-1] == 0.5


def test_before_the_decay_nothing_depends_on_the_length(recipe):
    short, long = (recipe.new_schedule("decay", 0.5, 10, 20, steps) for steps in (60, 100))
    np.testing.assert_array_equal(rates(short, 40), rates(long, 40))


def test_schedule_can_be_saved(recipe):
    schedule = recipe.WarmupStableDecay(0.5, 10, 20, 100)
    again = keras.optimizers.schedules.deserialize(keras.optimizers.schedules.serialize(schedule))
    np.testing.assert_array_equal(rates(again, 100), rates(schedule, 100))


def test_cosine_has_the_same_warm_up(recipe):
    cosine = rates(recipe.new_schedule("cosine", 0.5, 10, 20, 100), 100)
    np.testing.assert_allclose(cosine[:11], 0.5 * np.arange(11) / 10, rtol=1e-6)
    np.testing.assert_allclose(cosine[55], 0.25, rtol=1e-5)
    np.testing.assert_allclose(cosine[100], 0.0, atol=1e-7)


def train(recipe, schedule, epochs, callbacks=(), begin=None):
    """Train a small network, one step an epoch; `begin` is (what has kept states, the epoch to go on from)."""
    generator = np.random.default_rng(0)
    inputs, targets = generator.normal(size=(16, 4)), generator.normal(size=(16, 1))
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, "tanh"), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(schedule), "mse")
    first = 0
    if begin is not None:
        keep, first = begin
        keep.restore(first, model)
    arguments = {"batch_size": 16, "shuffle": False, "verbose": 0}
    model.fit(inputs, targets, initial_epoch=first, epochs=epochs, callbacks=list(callbacks), **arguments)
    return model


def test_branch_is_the_training_that_had_its_schedule_from_the_start(recipe):
    keep = recipe.KeepStates([4])
    trunk = train(recipe, recipe.new_schedule("decay", 0.1, 2, 3, 15), 15, [keep])
    branch = train(recipe, recipe.new_schedule("decay", 0.1, 2, 3, 7), 7, begin=(keep, 4))
    alone = train(recipe, recipe.new_schedule("decay", 0.1, 2, 3, 7), 7)
    assert int(branch.optimizer.iterations) == 7
    for one, other, end_of_trunk in zip(branch.get_weights(), alone.get_weights(), trunk.get_weights(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
        assert not np.allclose(one, end_of_trunk)


def test_main_trains_the_trunk_once_and_only_the_decays_of_the_shorter_lengths(recipe):
    found = {}

    def fit(model, images, labels, *, initial_epoch, epochs, callbacks, **keywords):
        if callbacks:
            *_, run = callbacks
            found[run.variant] = []
            callbacks[0].set_model(model)
            model.optimizer.build(model.trainable_variables)
            for epoch in range(epochs):
                model.optimizer.iterations.assign((epoch + 1) * 5)
                callbacks[0].on_epoch_end(epoch)
            run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})
        (*_, runs) = found.values()
        schedule = model.optimizer.get_config()["learning_rate"]["config"]
        runs.append((initial_epoch, epochs, schedule))
        if initial_epoch:
            assert int(model.optimizer.iterations) == initial_epoch * 5
        return types.SimpleNamespace(history={"val_accuracy": [epoch / 100 for epoch in range(initial_epoch, epochs)]})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(limit=300, epochs=20)
    lengths = {variant: [(first, last) for first, last, _ in runs] for variant, runs in found.items()}
    assert lengths == {
        "cosine": [(0, 20), (0, 10), (0, 5)],
        "stable, decay": [(0, 20), (8, 10), (4, 5)],
        "stable alone": [(0, 20)],
    }
    # 300 images are 5 batches, and the decay has a fifth of them.
    decays = [(schedule["decay_steps"], schedule["steps"]) for *_, schedule in found["stable, decay"]]
    assert decays == [(20, 100), (10, 50), (5, 25)]
    assert {schedule["warmup_steps"] for runs in found.values() for *_, schedule in runs} == {5}
    spent = {
        entry["variant"]: entry["value"] for entry in comparison.result.figures if entry["name"] == "epochs in all"
    }
    assert spent == {"cosine": 35, "stable, decay": 23, "stable alone": 20}
    halves = {entry["variant"]: entry["value"] for entry in comparison.result.figures if entry["name"] == "after half"}
    assert halves == pytest.approx(dict.fromkeys(spent, 0.09))
