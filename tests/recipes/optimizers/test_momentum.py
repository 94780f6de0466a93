import numpy as np
import pytest

STEPS, EPOCHS = 4, 6  # an epoch is one step: the 48 training images are fewer than a batch


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("optimizers/momentum")


@pytest.fixture(scope="module")
def observed(recipe, observe):
    return observe(recipe, train=False, target=0.75, epochs=EPOCHS)


@pytest.fixture(scope="module")
def paths(observed, images, weights_of):
    """The change of all weights at each of several steps, {variant: array of shape (steps, weights)}."""
    changes = {}
    for variant, run in observed.items():
        changes[variant] = []
        for step in range(STEPS):
            run.model.train_on_batch(*batch(images, step))
            changes[variant].append(flat(weights_of(run.model)) - flat(run.before))
    return changes


def batch(images, step):
    (pictures, labels), chosen = images[0], slice(12 * step, 12 * step + 12)
    return pictures[chosen], labels[chosen]


def flat(arrays):
    return np.concatenate([array.ravel() for array in arrays])


def gradient_at(gradients, start, change, data):
    """Return the flat gradient at the weights `start`, a list of arrays, plus the flat `change`."""
    ends = np.cumsum([array.size for array in start])[:-1]
    weights = [a + b.reshape(a.shape) for a, b in zip(start, np.split(change, ends), strict=True)]
    return flat(gradients(weights, *data))


def assert_follows(path, expected):
    for change, expectation in zip(path, expected, strict=True):
        np.testing.assert_allclose(change, expectation, rtol=2e-3, atol=2e-4 * abs(expectation).max() + 2e-7)


@pytest.mark.parametrize("variant, gamma", [("momentum 0.5", 0.5), ("momentum 0.9", 0.9), ("momentum 0.99", 0.99)])
def test_steps_follow_the_recurrence(recipe, observed, paths, images, gradients, falling_rates, variant, gamma):
    start, rates = observed[variant].before, falling_rates(recipe.VARIANTS[variant][-1], EPOCHS)
    velocity = change = np.zeros_like(flat(start))
    expected = []
    for step in range(STEPS):
        velocity = gamma * velocity - rates[step] * gradient_at(gradients, start, change, batch(images, step))
        change = change + velocity
        expected.append(change)
    assert_follows(paths[variant], expected)


def test_without_momentum_each_step_is_the_rate_times_the_gradient(
    recipe, observed, paths, images, gradients, falling_rates
):
    start, rates = observed["no momentum"].before, falling_rates(recipe.VARIANTS["no momentum"][-1], EPOCHS)
    change, expected = np.zeros_like(flat(start)), []
    for step in range(STEPS):
        change = change - rates[step] * gradient_at(gradients, start, change, batch(images, step))
        expected.append(change)
    assert_follows(paths["no momentum"], expected)
    assert not observed["no momentum"].model.optimizer.momentum


def test_nesterov_takes_the_gradient_where_momentum_leads(recipe, observed, paths, images, gradients, falling_rates):
    """Sutskever's form: gradients are taken at θ + γ v, which is what Keras stores as the weights."""
    start, rates = observed["Nesterov 0.9"].before, falling_rates(recipe.VARIANTS["Nesterov 0.9"][-1], EPOCHS)
    theta = velocity = np.zeros_like(flat(start))
    expected = []
    for step in range(STEPS):
        ahead = theta + 0.9 * velocity
        velocity = 0.9 * velocity - rates[step] * gradient_at(gradients, start, ahead, batch(images, step))
        theta = theta + velocity
        expected.append(theta + 0.9 * velocity)
    assert_follows(paths["Nesterov 0.9"], expected)


def test_variants_differ_in_momentum_and_rate_alone(recipe, observed):
    settings = {
        "no momentum": (0.0, False),
        "momentum 0.5": (0.5, False),
        "momentum 0.9": (0.9, False),
        "momentum 0.99": (0.99, False),
        "Nesterov 0.9": (0.9, True),
    }
    assert list(recipe.VARIANTS) == list(settings)
    for variant, (gamma, nesterov) in settings.items():
        run = observed[variant]
        config = run.model.optimizer.get_config()
        assert (config["momentum"], config["nesterov"]) == (gamma, nesterov) == recipe.VARIANTS[variant][:2]
        assert run.arguments["batch_size"] == 512
        for weight, first in zip(run.before, observed["no momentum"].before, strict=True):
            np.testing.assert_array_equal(weight, first)


def test_epochs_to_a_target_are_counted_from_one_and_infinite_if_it_is_not_reached(recipe, observed):
    assert all(run.figures["epochs to 0.75"] == 2 for run in observed.values())
    assert recipe.epochs_to(0.5, [0.5]) == 1
    assert recipe.epochs_to(0.95, [0.5, float("nan"), 0.9]) == float("inf")
