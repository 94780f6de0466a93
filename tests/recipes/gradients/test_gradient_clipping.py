import keras
import numpy as np
import pytest


def reference(gradients, argument, threshold):
    """Return the gradients as clipping makes them, in NumPy."""
    if argument == "global_clipnorm":
        norm = np.sqrt(sum((gradient**2).sum() for gradient in gradients))
        return [gradient * min(1, threshold / norm) for gradient in gradients]
    if argument == "clipnorm":
        return [gradient * min(1, threshold / np.sqrt((gradient**2).sum())) for gradient in gradients]
    assert argument == "clipvalue"
    return [np.minimum(np.maximum(gradient, -threshold), threshold) for gradient in gradients]


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("gradients/gradient_clipping")


@pytest.fixture(scope="module")
def optimizers(recipe):
    """The optimizers with which main compiles its models, {variant: optimizer}; nothing is trained."""
    found = {}

    def fit(model, *arguments, callbacks, **keywords):
        norms, run = callbacks
        found[run.variant] = model.optimizer
        norms.history = {"all": [0.25, 0.5, float("nan"), 1.5]}
        run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(epochs=2, limit=200)
    assert all(row["figures"] == {"norm over 1": 0.5} for row in comparison.summary())
    assert all((signal["by"], signal["values"]) == ("epoch", [0.5, 1e4]) for signal in comparison.result.signals)
    return found


def update_of(optimizer, gradients):
    """Return what one step of a new optimizer of the same settings subtracts, divided by the learning rate."""
    optimizer = type(optimizer).from_config(optimizer.get_config())
    variables = [keras.Variable(np.zeros_like(gradient)) for gradient in gradients]
    optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in gradients], variables)
    rate = float(optimizer._learning_rate(0))
    return [-keras.ops.convert_to_numpy(variable) / rate for variable in variables]


def gradients_of_norm(norm):
    generator = np.random.default_rng(1)
    gradients = [generator.normal(size=shape).astype("float32") for shape in ((5, 64), (64, 64), (64,))]
    scale = norm / np.sqrt(sum((gradient**2).sum() for gradient in gradients))
    return [gradient * np.float32(scale) for gradient in gradients]


def clipping_of(optimizer):
    """Return the arguments for clipping that are set, as {name: threshold}."""
    arguments = {name: getattr(optimizer, name) for name in ("clipnorm", "global_clipnorm", "clipvalue")}
    return {name: threshold for name, threshold in arguments.items() if threshold is not None}


def test_each_argument_has_a_variant_and_one_rate_fails_without(optimizers, recipe):
    assert [clipping_of(optimizer) for optimizer in optimizers.values()] == [
        {},
        {"global_clipnorm": 1.0},
        {"clipnorm": 0.3},
        {"clipvalue": 0.03},
        {},
    ]
    rates = [float(optimizer._learning_rate(0)) for optimizer in optimizers.values()]
    assert rates == pytest.approx([rate for _, rate in (recipe.VARIANTS | recipe.FAILING).values()])
    assert rates[-1] == rates[1] > rates[0], "without clipping, the rate of the headline is to be tried"
    # Two epochs of two steps.
    assert [float(optimizer._learning_rate(4)) for optimizer in optimizers.values()] == pytest.approx([0.0] * 5)


def test_a_long_gradient_is_clipped_as_the_formula_says(optimizers):
    gradients = gradients_of_norm(50.0)
    for optimizer in optimizers.values():
        expected = gradients
        for argument, threshold in clipping_of(optimizer).items():
            expected = reference(gradients, argument, threshold)
            assert not np.allclose(expected[0], gradients[0])
        for applied, expectation in zip(update_of(optimizer, gradients), expected, strict=True):
            np.testing.assert_allclose(applied, expectation, rtol=1e-5, atol=1e-8)


def test_a_gradient_under_the_threshold_is_left_as_it_is(optimizers):
    gradients = gradients_of_norm(0.02)
    for optimizer in optimizers.values():
        for applied, gradient in zip(update_of(optimizer, gradients), gradients, strict=True):
            np.testing.assert_allclose(applied, gradient, rtol=1e-5, atol=1e-10)


def test_only_all_together_keep_the_direction_and_the_norm_is_the_threshold(optimizers):
    gradients = gradients_of_norm(50.0)
    gradients[0] *= 10
    before = np.concatenate([gradient.ravel() for gradient in gradients])

    def norm_and_cosine(variant):
        applied = update_of(optimizers[variant], gradients)
        after = np.concatenate([gradient.ravel() for gradient in applied])
        return np.linalg.norm(after), before @ after / np.linalg.norm(before) / np.linalg.norm(after)

    norm, cosine = norm_and_cosine("global norm 1")
    np.testing.assert_allclose(norm, 1, rtol=1e-5)
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)
    norm, cosine = norm_and_cosine("each norm 0.3")
    np.testing.assert_allclose(norm, 0.3 * np.sqrt(3), rtol=1e-5)
    assert cosine < 0.95
    norm, cosine = norm_and_cosine("each value 0.03")
    assert norm > 0.9 * 0.03 * np.sqrt(before.size)
    assert cosine < 0.95


@pytest.mark.parametrize("image_shape", [(6, 5, 1), (9, 11, 3)])
def test_the_network_reads_rows_in_order(recipe, image_shape):
    keras.utils.set_random_seed(0)
    model = recipe.build_model(image_shape, 3)
    kernel, recurrent_kernel, bias, last_kernel, last_bias = model.get_weights()
    images = np.random.default_rng(2).random((4, *image_shape)).astype("float32")
    state = np.zeros((4, len(recurrent_kernel)), "float32")
    for row in range(image_shape[0]):
        pixels = images[:, row].reshape(4, -1)
        state = np.maximum(pixels @ kernel + state @ recurrent_kernel + bias, 0)
    np.testing.assert_allclose(model(images), state @ last_kernel + last_bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("search", [False, True])
def test_gradients_are_measured_before_clipping_at_every_step(search, recipe, monkeypatch):
    monkeypatch.setattr(recipe, "VARIANTS", {"global norm 1e-6": ({"global_clipnorm": 1e-6}, 0.1)})
    monkeypatch.setattr(recipe, "FAILING", {})
    monkeypatch.setattr(recipe, "GRID", (0.1, 0.2))
    comparison = recipe.main(search=search, epochs=2, limit=200)
    assert len(comparison.result.runs) == 1 + search
    for signal in comparison.result.signals:
        assert len(signal["values"]) == 2
        assert min(signal["values"]) > 0.01
