import numpy as np
import pytest


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("optimizers/stochastic_gradient_descent")


@pytest.fixture(scope="module")
def observed(recipe, observe):
    return observe(recipe, train=True, epochs=1, target=0.75)


def step_on(run, pictures, labels):
    """Make the first step of a training on these images alone."""
    for variable, weight in zip(run.model.trainable_variables, run.before, strict=True):
        variable.assign(weight)
    run.model.optimizer.iterations.assign(0)
    run.model.fit(pictures, labels, batch_size=len(labels), verbose=0)


def test_an_epoch_of_the_full_batch_is_one_step_along_the_full_gradient(recipe, observed, images, gradients):
    run, rate = observed["full batch"], recipe.VARIANTS["full batch"][-1]
    for before, after, gradient in zip(run.before, run.after, gradients(run.before, *images[0]), strict=True):
        np.testing.assert_allclose(after - before, -rate * gradient, rtol=1e-3, atol=1e-6 * rate + 1e-7)


def test_a_step_on_a_batch_follows_its_gradient(recipe, observed, images, gradients, weights_of):
    for variant, (_, rate) in recipe.VARIANTS.items():
        run = observed[variant]
        batch = images[0][0][:16], images[0][1][:16]
        step_on(run, *batch)
        after = weights_of(run.model)
        for old, new, gradient in zip(run.before, after, gradients(run.before, *batch), strict=True):
            np.testing.assert_allclose(new - old, -rate * gradient, rtol=1e-3, atol=1e-6 * rate + 1e-7)


def test_the_mean_of_the_batches_gradients_is_the_full_gradient(recipe, observed, images, gradients, weights_of):
    run, (size, rate) = observed["batch 16"], recipe.VARIANTS["batch 16"]
    (pictures, labels), sums = images[0], 0
    for start in range(0, 48, size):
        step_on(run, pictures[start : start + size], labels[start : start + size])
        step = np.concatenate([(old - new).ravel() for old, new in zip(run.before, weights_of(run.model), strict=True)])
        sums = sums + step / rate
    full = np.concatenate([gradient.ravel() for gradient in gradients(run.before, pictures, labels)])
    np.testing.assert_allclose(sums / 3, full, rtol=1e-3, atol=1e-4 * abs(full).max())
    assert np.linalg.norm(step / rate - full) > 0.1 * np.linalg.norm(full)  # a single batch has another gradient


def test_all_see_the_same_number_of_examples_in_steps_of_their_own_size(recipe, observed):
    sizes = {"full batch": 48, "batch 1024": 1024, "batch 128": 128, "batch 16": 16}
    assert {variant: run.arguments["batch_size"] for variant, run in observed.items()} == sizes
    assert all(run.arguments["epochs"] == 1 for run in observed.values())
    steps = {"full batch": 1, "batch 1024": 1, "batch 128": 1, "batch 16": 3}
    assert {variant: run.figures["steps"] for variant, run in observed.items()} == steps


def test_time_counts_from_the_end_of_an_epoch_without_compilation(recipe, observed):
    np.testing.assert_array_equal(recipe.ends_of_epochs([9.0, 1.0, 3.0, 2.0]), [2.0, 3.0, 6.0, 8.0])
    np.testing.assert_array_equal(recipe.ends_of_epochs([9.0]), [9.0])
    # The epochs that were pretended: 0.5, 0.8 and 0.7 after 2, 4 and 6 seconds.
    assert all(run.figures["seconds to 0.75"] == 4 for run in observed.values())
    signals = observed["full batch"].signals
    assert len(signals) == 4
    for signal in signals:
        assert signal["by"] == "second of training"
        np.testing.assert_allclose(signal["at"], np.arange(1, 61) / 10)
        assert np.isnan(signal["values"][:19]).all()
        np.testing.assert_allclose([signal["values"][tenth - 1] for tenth in (20, 30, 40, 60)], [0.5, 0.65, 0.8, 0.7])


def test_a_target_that_is_not_reached_counts_as_infinite(recipe, observe):
    assert all(run.figures["seconds to 0.9"] == np.inf for run in observe(recipe, train=False, target=0.9).values())
