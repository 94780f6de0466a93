import keras
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras 3.15 makes single steps only there")

LIMIT, EPOCHS, STEPS = 320, 3, 10
STEPS_PER_CALL = {"1 step a call": 1, "8 steps": 8, "32 steps": STEPS, "XLA": 1, "XLA, 32 steps": STEPS}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("efficiency/fewer_calls")


@pytest.fixture(scope="module")
def experiment(recipe):
    """main: (comparison, {variant: (model, weights before, weights after, calls)})."""
    trainings, fit = [], keras.Model.fit

    class Count(keras.callbacks.Callback):
        """Counts the calls, each of which ends in one batch for the callbacks."""

        calls = 0

        def on_train_batch_end(self, batch, logs=None):
            self.calls += 1

    def spy(model, *arguments, callbacks, **keywords):
        before, count = weights_of(model), Count()
        history = fit(model, *arguments, callbacks=[count, *callbacks], **keywords)
        trainings.append((model, before, weights_of(model), count.calls))
        return history

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", spy)
        comparison = recipe.main(limit=LIMIT, epochs=EPOCHS)
    return comparison, dict(zip(recipe.VARIANTS, trainings, strict=True))


def weights_of(model):
    return np.concatenate(
        [np.array(keras.ops.convert_to_numpy(weight)).ravel() for weight in model.trainable_variables]
    )


def test_more_steps_a_call_end_equal_to_the_bit_and_xla_up_to_rounding(experiment):
    _, trainings = experiment
    _, before, expected, _ = trainings["1 step a call"]
    for variant, (_, _, after, _) in trainings.items():
        if "XLA" not in variant:
            np.testing.assert_array_equal(after, expected)
        np.testing.assert_allclose(after, expected, atol=1e-5 * np.linalg.norm(expected - before))
    assert np.abs(expected - before).max() > 1e-3, "nothing was trained"


def test_a_call_makes_so_many_steps(experiment):
    _, trainings = experiment
    calls = {variant: training[-1] for variant, training in trainings.items()}
    assert calls == {variant: EPOCHS * -(-STEPS // steps) for variant, steps in STEPS_PER_CALL.items()}
    for model, *_ in trainings.values():
        assert int(keras.ops.convert_to_numpy(model.optimizer.iterations)) == EPOCHS * STEPS


def test_xla_compiles_where_it_is_asked_to(experiment):
    _, trainings = experiment
    for variant, (model, *_) in trainings.items():
        assert model.jit_compile == ("XLA" in variant or keras.backend.backend() == "jax")


def test_figures_are_the_time_of_a_step_and_the_distance(experiment):
    comparison, trainings = experiment
    figures = {(each["variant"], each["name"]): each["value"] for each in comparison.result.figures}
    _, before, expected, _ = trainings["1 step a call"]
    for run in comparison.result.runs:
        _, *later = run["epoch_seconds"]
        assert figures[run["variant"], "ms a step"] == pytest.approx(1000 * np.median(later) / STEPS)
        _, _, after, _ = trainings[run["variant"]]
        distance = np.linalg.norm(after - expected) / np.linalg.norm(expected - before)
        assert figures[run["variant"], "distance"] == pytest.approx(distance, rel=1e-3, abs=1e-9)
