import keras
import numpy as np
import pytest

STEPS, EPOCHS = 4, 6  # an epoch is one step: the 48 training images are fewer than a batch
EPSILON = 1e-7  # Keras's default


def sgd(weight, gradients, rates):
    for gradient, rate in zip(gradients, rates, strict=True):
        weight = weight - rate * gradient
    return weight


def momentum(weight, gradients, rates):
    velocity = 0
    for gradient, rate in zip(gradients, rates, strict=True):
        velocity = 0.9 * velocity - rate * gradient
        weight = weight + velocity
    return weight


def adagrad(weight, gradients, rates):
    squares = 0.1
    for gradient, rate in zip(gradients, rates, strict=True):
        squares = squares + gradient**2
        weight = weight - rate * gradient / np.sqrt(squares + EPSILON)
    return weight


def rmsprop(weight, gradients, rates):
    squares = 0
    for gradient, rate in zip(gradients, rates, strict=True):
        squares = 0.9 * squares + 0.1 * gradient**2
        weight = weight - rate * gradient / np.sqrt(squares + EPSILON)
    return weight


def adam(weight, gradients, rates, decay=0.0):
    m, v = 0, 0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        weight = weight - rate * decay * weight
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        corrected_rate = rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
        weight = weight - corrected_rate * m / (np.sqrt(v) + EPSILON)
    return weight


def adamax(weight, gradients, rates):
    m, u = 0, np.zeros_like(weight)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = 0.9 * m + 0.1 * gradient
        u = np.maximum(0.999 * u, abs(gradient))
        weight = weight - rate / (1 - 0.9**step) * m / (u + EPSILON)
    return weight


def adamw(weight, gradients, rates):
    return adam(weight, gradients, rates, decay=0.004)


def nadam(weight, gradients, rates):
    """Dozat 2016, algorithm 8, with its schedule of the momentum."""
    m, v = 0, 0
    factors = [0.9 * (1 - 0.5 * 0.96**step) for step in range(1, len(gradients) + 2)]
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        m = 0.9 * m + 0.1 * gradient
        v = 0.999 * v + 0.001 * gradient**2
        now, ahead = factors[step - 1], factors[step]
        m_hat = ahead * m / (1 - np.prod(factors[: step + 1])) + (1 - now) * gradient / (1 - np.prod(factors[:step]))
        weight = weight - rate * m_hat / (np.sqrt(v / (1 - 0.999**step)) + EPSILON)
    return weight


def lion(weight, gradients, rates):
    m = 0
    for gradient, rate in zip(gradients, rates, strict=True):
        weight = weight - rate * np.sign(0.9 * m + 0.1 * gradient)
        m = 0.99 * m + 0.01 * gradient
    return weight


def muon(weight, gradients, rates):
    m = 0
    for gradient, rate in zip(gradients, rates, strict=True):
        weight = weight - rate * 0.004 * weight
        m = 0.95 * m + gradient
        left, singular_values, right = np.linalg.svd(gradient + 0.95 * m, full_matrices=False)
        s = singular_values / np.sqrt((singular_values**2).sum())
        for _ in range(5):  # the Newton-Schulz iteration acts on the singular values alone
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        weight = weight - rate * 0.2 * np.sqrt(max(weight.shape)) * (left * s @ right)
    return weight


FORMULAS = {
    "SGD": sgd,
    "momentum": momentum,
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adam": adam,
    "Adamax": adamax,
    "AdamW": adamw,
    "Nadam": nadam,
    "Lion": lion,
    "Muon": muon,
}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("optimizers/adaptive_optimizers")


@pytest.fixture(scope="module")
def observed(recipe, observe):
    return observe(recipe, train=False)


def test_the_variants_are_those_that_have_a_formula_here(recipe):
    assert list(recipe.VARIANTS) == list(FORMULAS)


@pytest.mark.parametrize("variant", FORMULAS)
def test_several_steps_follow_the_formula(recipe, observe, weights_of, falling_rates, variant):
    # Only this variant, with a new optimizer.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "VARIANTS", {"SGD": recipe.VARIANTS["SGD"], variant: recipe.VARIANTS[variant]})
        run = observe(recipe, train=False, epochs=EPOCHS)[variant]
    generator = np.random.default_rng(1)
    # Sizes over five decades: where gradients are small, ε counts.
    steps = [
        [
            (generator.normal(size=weight.shape) * 10 ** generator.uniform(-5, 0, weight.shape)).astype("float32")
            for weight in run.before
        ]
        for _ in range(STEPS)
    ]
    for gradients in steps:
        run.model.optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], run.model.trainable_variables)
    rates = falling_rates(recipe.VARIANTS[variant][-1], EPOCHS)[:STEPS]
    last_kernel = len(run.before) - 2
    for index, (before, after) in enumerate(zip(run.before, weights_of(run.model), strict=True)):
        formula = FORMULAS[variant]
        if variant == "Muon" and (before.ndim != 2 or index == last_kernel):
            formula = adamw
        expected = formula(before, [gradients[index].astype("float64") for gradients in steps], rates)
        change = expected - before
        assert abs(change).max() > 1e-6
        tolerance = 1e-3 if formula is muon else 1e-4
        np.testing.assert_allclose(after - before, change, rtol=tolerance, atol=tolerance * change.std() + 2e-7)


def test_muon_makes_all_singular_values_of_a_step_about_one(recipe, observed, weights_of):
    run = observed["Muon"]
    generator = np.random.default_rng(2)
    # Two of the singular values of this gradient are 100 times as large as the others.
    shape = run.before[0].shape
    left, _, right = np.linalg.svd(generator.normal(size=shape), full_matrices=False)
    values = np.where(np.arange(min(shape)) < 2, 1.0, 0.01)
    gradients = [np.zeros_like(weight, "float32") for weight in run.before]
    gradients[0] = (left * values @ right).astype("float32")
    run.model.optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients], run.model.trainable_variables)
    rate = recipe.VARIANTS["Muon"][-1]
    step = weights_of(run.model)[0] - run.before[0] * (1 - rate * 0.004)
    step /= rate * 0.2 * np.sqrt(max(shape))
    singular_values = np.linalg.svd(step, compute_uv=False)
    assert singular_values.min() > 0.6
    assert singular_values.max() < 1.3


def test_numbers_kept_per_weight_are_counted(observed):
    weights = sum(weight.size for weight in observed["SGD"].before)
    with_adamw = sum(weight.size for weight in observed["SGD"].before if weight.ndim == 1) + 100 * 3
    expected = {"SGD": 0, "momentum": 1, "Adagrad": 1, "RMSprop": 1, "Adam": 2, "Adamax": 2, "AdamW": 2, "Nadam": 2}
    expected |= {"Lion": 1, "Muon": round(1 + with_adamw / weights, 2)}
    assert {variant: run.figures["kept per weight"] for variant, run in observed.items()} == expected


def test_the_network_has_three_layers_of_100(recipe):
    model = recipe.build_model((28, 28, 1), 10)
    shapes = [tuple(variable.shape) for variable in model.trainable_variables]
    assert shapes == [(784, 100), (100,), (100, 100), (100,), (100, 100), (100,), (100, 10), (10,)]
