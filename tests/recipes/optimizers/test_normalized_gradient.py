import keras
import numpy as np
import pytest


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("optimizers/normalized_gradient")


@pytest.fixture(scope="module")
def observed(recipe, observe):
    """One epoch, which is one step: the 48 training images are fewer than a batch."""
    return observe(recipe, train=True, epochs=1)


def flat(arrays):
    return np.concatenate([np.ravel(array) for array in arrays])


def step_of(run):
    return flat(run.after) - flat(run.before)


def full_gradient(run, images, gradients):
    return flat(gradients(run.before, *images[0]))


def test_a_step_of_fit_goes_along_the_gradient_and_is_as_long_as_the_rate(recipe, observed, images, gradients):
    rate = recipe.VARIANTS["normalised"][-1]
    for variant in ("normalised", "normalised, loss / 100"):
        gradient = full_gradient(observed[variant], images, gradients)
        expected = -rate * gradient / np.linalg.norm(gradient)
        step = step_of(observed[variant])
        np.testing.assert_allclose(np.linalg.norm(step), rate, rtol=1e-4)
        np.testing.assert_allclose(step, expected, rtol=1e-3, atol=1e-3 * abs(expected).max())


def test_a_step_of_gradient_descent_is_scaled_with_the_loss(recipe, observed, images, gradients):
    rate = recipe.VARIANTS["SGD"][-1]
    for variant, loss_weight in {"SGD": 1.0, "SGD, loss / 100": 0.01}.items():
        expected = -rate * loss_weight * full_gradient(observed[variant], images, gradients)
        np.testing.assert_allclose(step_of(observed[variant]), expected, rtol=1e-3, atol=1e-7)


def test_a_step_of_adagrad_follows_its_formula(recipe, observed, images, gradients):
    rate = recipe.VARIANTS["Adagrad"][-1]
    for variant, loss_weight in {"Adagrad": 1.0, "Adagrad, loss / 100": 0.01}.items():
        gradient = loss_weight * full_gradient(observed[variant], images, gradients)
        expected = -rate * gradient / np.sqrt(0.1 + gradient**2 + 1e-7)
        np.testing.assert_allclose(step_of(observed[variant]), expected, rtol=1e-3, atol=1e-7)


def apply(optimizer, steps):
    """Return the variables, which start at 1, after the steps, each a list of gradients."""
    variables = [keras.Variable(np.ones_like(gradient)) for gradient in steps[0]]
    for gradients in steps:
        optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in gradients], variables)
    return [keras.ops.convert_to_numpy(variable) for variable in variables]


def random_steps(scale=1.0):
    generator = np.random.default_rng(1)
    shapes = ((3, 5), (5,), (5, 2))
    return [[(scale * generator.normal(size=shape)).astype("float32") for shape in shapes] for _ in range(3)]


def test_several_steps_of_adagrad_follow_its_formula(recipe):
    new_optimizer, _, rate = recipe.VARIANTS["Adagrad"]
    steps = random_steps(0.3)
    squares, expected = 0.1, 1
    for gradients in steps:
        squares = squares + flat(gradients) ** 2
        expected = expected - rate * flat(gradients) / np.sqrt(squares + 1e-7)
    np.testing.assert_allclose(flat(apply(new_optimizer(rate), steps)), expected, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-8, 1e-3, 1.0, 1e3, 1e8])
def test_the_scale_of_the_gradient_changes_nothing(recipe, scale):
    steps, expected = random_steps(scale), 1.0
    for gradients in random_steps():
        expected = expected - 0.5 * flat(gradients) / np.linalg.norm(flat(gradients))
    np.testing.assert_allclose(flat(apply(recipe.NormalizedGradientDescent(0.5), steps)), expected, rtol=1e-5)


def test_a_gradient_of_zero_moves_nothing(recipe):
    zeros = [np.zeros((3, 5), "float32"), np.zeros(5, "float32")]
    np.testing.assert_array_equal(flat(apply(recipe.NormalizedGradientDescent(0.5), [zeros])), 1.0)


def test_it_can_be_saved_with_a_model_and_goes_on(recipe, images, tmp_path, weights_of):
    model = recipe.build_model((5, 4, 1), 3)
    model.compile(recipe.NormalizedGradientDescent(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(*images[0])
    model.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras")
    assert type(restored.optimizer) is recipe.NormalizedGradientDescent
    assert int(restored.optimizer.iterations) == 1
    before = flat(weights_of(restored))
    restored.train_on_batch(*images[0])
    np.testing.assert_allclose(np.linalg.norm(flat(weights_of(restored)) - before), 0.05, rtol=1e-4)


def test_scaling_the_loss_for_half_precision_leaves_the_step_as_long(recipe, images, weights_of):
    model = recipe.build_model((5, 4, 1), 3)
    optimizer = keras.optimizers.LossScaleOptimizer(recipe.NormalizedGradientDescent(0.05), initial_scale=1024.0)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    before = flat(weights_of(model))
    model.train_on_batch(*images[0])
    np.testing.assert_allclose(np.linalg.norm(flat(weights_of(model)) - before), 0.05, rtol=1e-4)


def test_every_optimizer_has_one_rate_for_both_scales_of_the_loss(recipe, observed):
    names = ("SGD", "normalised", "Adagrad")
    assert list(observed) == [f"{name}{suffix}" for suffix in (", loss / 100", "") for name in names]
    for name in names:
        scaled, as_it_is = recipe.VARIANTS[f"{name}, loss / 100"], recipe.VARIANTS[name]
        assert scaled == (as_it_is[0], 100, as_it_is[2])
        assert as_it_is[1] == 1
