import keras
import numpy as np
import pytest
from keras import layers
from scipy.special import log_softmax

IMAGES = np.random.default_rng(0).random((32, 4, 4, 1)).astype("float32")
LABELS = np.random.default_rng(1).integers(0, 5, 32)


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("regularization/weight_penalty")


@pytest.fixture(scope="module")
def compiled(recipe):
    """The models that main compiles, {variant: model}; nothing is trained."""
    found = {}

    def fit(model, *arguments, callbacks, **keywords):
        (run,) = callbacks
        found[run.variant] = model
        run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        recipe.main(limit=8)
    return found


def array(tensor):
    """Return a copy in float64, because a backend may go on to write in the memory that it shows."""
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def dense_layers(model):
    return [layer for layer in model.layers if isinstance(layer, layers.Dense)]


def trained(recipe, optimizer, steps=3, loss=None, **options):
    """Return the weights of a small model of the recipe before and after some steps, the biases not zero at first."""
    keras.utils.set_random_seed(0)
    model = recipe.build_model((4, 4, 1), 5, **options)
    for layer in dense_layers(model):
        layer.bias.assign(np.random.default_rng(2).normal(size=layer.bias.shape))
    before = [array(weight) for weight in model.trainable_variables]
    model.compile(optimizer=optimizer, loss=loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for _ in range(steps):
        model.train_on_batch(IMAGES, LABELS)
    return before, [array(weight) for weight in model.trainable_variables]


def largest_difference(weights, others):
    return max(np.abs(weight - other).max() for weight, other in zip(weights, others, strict=True))


def test_each_variant_changes_one_thing(recipe, compiled):
    def changes(model):
        (regularizer,) = {layer.kernel_regularizer for layer in dense_layers(model)}
        (constraint,) = {layer.kernel_constraint for layer in dense_layers(model)}
        assert not any(layer.bias_regularizer or layer.bias_constraint for layer in dense_layers(model))
        strengths = {name: float(getattr(regularizer, name, 0)) for name in ("l1", "l2")}
        strengths |= {"decay": model.optimizer.weight_decay or 0, "norm": getattr(constraint, "max_value", 0)}
        return {name for name, strength in strengths.items() if strength}

    assert {variant: changes(model) for variant, model in compiled.items()} == {
        "no penalty": set(),
        "L1": {"l1"},
        "L2": {"l2"},
        "L1 and L2": {"l1", "l2"},
        "AdamW": {"decay"},
        "max-norm": {"norm"},
    }


def test_the_loss_is_cross_entropy_plus_the_formula_over_all_kernels(recipe):
    l1, l2 = 0.003, 0.02
    for regularizer, formula in (
        (None, lambda w: 0),
        (keras.regularizers.L1(l1), lambda w: l1 * np.abs(w).sum()),
        (keras.regularizers.L2(l2), lambda w: l2 * np.sum(w**2)),
        (keras.regularizers.L1L2(l1, l2), lambda w: l1 * np.abs(w).sum() + l2 * np.sum(w**2)),
    ):
        keras.utils.set_random_seed(0)
        model = recipe.build_model((4, 4, 1), 5, regularizer=regularizer)
        model.compile(optimizer="sgd", loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        kernels = [array(layer.kernel) for layer in dense_layers(model)]
        assert [kernel.shape for kernel in kernels] == [(16, 128), (128, 128), (128, 5)]
        penalty = sum(map(formula, kernels))
        cross_entropy = -log_softmax(array(model(IMAGES)), axis=-1)[np.arange(32), LABELS].mean()
        loss = model.evaluate(IMAGES, LABELS, verbose=0)
        np.testing.assert_allclose(loss, cross_entropy + penalty, rtol=1e-5)


def test_one_step_of_plain_gradient_descent_subtracts_the_gradient_of_the_penalty(recipe):
    rate, l1, l2 = 0.1, 0.01, 0.05
    before, plain = trained(recipe, keras.optimizers.SGD(rate), steps=1)
    _, penalised = trained(recipe, keras.optimizers.SGD(rate), steps=1, regularizer=keras.regularizers.L1L2(l1, l2))
    for w, unpenalised, after in zip(before, plain, penalised, strict=True):
        pull = rate * (l1 * np.sign(w) + 2 * l2 * w) if w.ndim == 2 else 0
        np.testing.assert_allclose(after, unpenalised - pull, atol=1e-6)


def test_under_plain_gradient_descent_l2_is_a_decay_of_twice_its_strength_without_the_biases(recipe):
    rate, l2 = 0.1, 0.05
    decayed = keras.optimizers.SGD(rate, weight_decay=2 * l2)
    decayed.exclude_from_weight_decay(var_names=["bias"])
    _, penalised = trained(recipe, keras.optimizers.SGD(rate), regularizer=keras.regularizers.L2(l2))
    _, plain = trained(recipe, keras.optimizers.SGD(rate))
    assert largest_difference(penalised, trained(recipe, decayed)[1]) < 1e-6
    assert largest_difference(penalised, plain) > 1e-3


def test_under_adam_it_is_not(recipe):
    rate, l2 = 0.01, 0.05
    _, penalised = trained(recipe, recipe.build_optimizer(rate), regularizer=keras.regularizers.L2(l2))
    _, decayed = trained(recipe, recipe.build_optimizer(rate, weight_decay=2 * l2))
    assert largest_difference(penalised, decayed) > 1e-3


@pytest.mark.parametrize("weight_decay", [None, 0.5])
def test_steps_of_the_optimizer_are_those_of_the_formula(recipe, weight_decay):
    rate, beta_1, beta_2, epsilon = 0.01, 0.9, 0.999, 1e-7
    generator = np.random.default_rng(3)
    optimizer = recipe.build_optimizer(rate, weight_decay)
    variables = [keras.Variable(generator.normal(size=(4, 3)), name="kernel"), keras.Variable(np.ones(3), name="bias")]
    values = [array(variable) for variable in variables]
    means, squares = [0, 0], [0, 0]
    for step in range(1, 4):
        gradients = [generator.normal(size=variable.shape).astype("float32") for variable in variables]
        optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in gradients], variables)
        for index, (gradient, decay) in enumerate(zip(gradients, [weight_decay or 0, 0], strict=True)):
            means[index] = beta_1 * means[index] + (1 - beta_1) * gradient
            squares[index] = beta_2 * squares[index] + (1 - beta_2) * gradient**2
            mean, square = means[index] / (1 - beta_1**step), squares[index] / (1 - beta_2**step)
            values[index] = values[index] * (1 - rate * decay) - rate * mean / (np.sqrt(square) + epsilon)
    for variable, value in zip(variables, values, strict=True):
        np.testing.assert_allclose(array(variable), value, rtol=1e-4, atol=1e-6)


def test_the_decay_of_main_reaches_the_kernels_and_not_the_biases(recipe, compiled):
    optimizer = compiled["AdamW"].optimizer
    options, rate = recipe.VARIANTS["AdamW"]
    weights = compiled["AdamW"].trainable_variables
    for weight in weights:
        weight.assign(np.ones(weight.shape))
    optimizer.apply([keras.ops.zeros(weight.shape) for weight in weights], weights)
    for weight in weights:
        expected = 1 - rate * options["weight_decay"] if weight.name == "kernel" else 1
        np.testing.assert_allclose(array(weight), expected, rtol=1e-6)


def test_max_norm_scales_the_incoming_weights_of_long_units_to_the_limit_after_a_step(recipe, compiled):
    limit = 0.9
    _, free = trained(recipe, keras.optimizers.SGD(0.1), steps=1)
    _, constrained = trained(recipe, keras.optimizers.SGD(0.1), steps=1, constraint=keras.constraints.MaxNorm(limit))
    lengths = np.concatenate([np.sqrt(np.sum(w**2, axis=0)) for w in free if w.ndim == 2])
    assert lengths.min() < 0.9 * limit < 1.1 * limit < lengths.max()
    for w, after in zip(free, constrained, strict=True):
        scale = np.minimum(1, limit / np.sqrt(np.sum(w**2, axis=0))) if w.ndim == 2 else 1
        np.testing.assert_allclose(after, w * scale, atol=1e-6)
    for layer in dense_layers(compiled["max-norm"]):
        assert layer.kernel_constraint.axis == 0


def test_near_zero_counts_the_weights_of_all_kernels_and_no_biases(recipe):
    model = recipe.build_model((4, 4, 1), 5)
    for layer in dense_layers(model):
        layer.kernel.assign(np.resize([1.0, -1.0], layer.kernel.shape))
        layer.bias.assign(np.zeros(layer.bias.shape))
    assert recipe.near_zero(model) == 0
    first, _, last = dense_layers(model)
    kernel = np.ones((128, 5))
    kernel[:50, 0], kernel[50:100, 0], kernel[:, 1], kernel[:, 2] = 0.0009, -0.0009, 0.0011, -0.0011
    last.kernel.assign(kernel)
    first.kernel.assign(np.full((16, 128), -0.0005))
    assert recipe.near_zero(model) == pytest.approx((100 + 16 * 128) / (16 * 128 + 128 * 128 + 128 * 5))
