import keras
import numpy as np
import pytest
from keras import layers
from scipy.special import erf, expit

DEPTH = 10
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.normal(size=(256, 16, 16, 1)).astype("float32")

# Klambauer et al. 2017, equation 14.
SCALE, ALPHA = 1.0507009873554805, 1.6732632423543773

FUNCTIONS = {
    "ReLU": lambda z: np.maximum(z, 0),
    "leaky ReLU": lambda z: np.where(z > 0, z, 0.2 * z),
    "ELU": lambda z: np.where(z > 0, z, np.expm1(z)),
    "SELU": lambda z: SCALE * np.where(z > 0, z, ALPHA * np.expm1(z)),
    "GELU": lambda z: z * (1 + erf(z / np.sqrt(2))) / 2,
    "SiLU": lambda z: z * expit(z),
    "tanh": np.tanh,
    "sigmoid": expit,
}
HE, LECUN, GLOROT = (
    lambda inputs, outputs: np.sqrt(2 / inputs),
    lambda inputs, outputs: np.sqrt(1 / inputs),
    lambda inputs, outputs: np.sqrt(2 / (inputs + outputs)),
)
DEVIATIONS = {"SELU": LECUN, "tanh": GLOROT, "sigmoid": GLOROT}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("architectures/activation_functions")


def array(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def build(recipe, variant, **arguments):
    keras.utils.set_random_seed(0)
    activation, initializer, _ = recipe.VARIANTS[variant]
    return recipe.build_model(IMAGES.shape[1:], 5, activation, initializer, **arguments)


def hidden_of(model):
    return [layer for layer in model.layers if isinstance(layer, layers.Dense)][:-1]


def outputs_of(model, chosen, training=False):
    outputs = keras.Model(model.input, [layer.output for layer in chosen])
    return [array(value) for value in outputs(IMAGES, training=training)]


@pytest.mark.parametrize("variant", FUNCTIONS)
def test_every_hidden_layer_has_the_function_of_the_formula(recipe, variant):
    model = build(recipe, variant)
    hidden = hidden_of(model)
    assert len(hidden) == DEPTH
    # Sums on both sides of zero, and far from it.
    for layer in hidden:
        layer.bias.assign(np.linspace(-4, 4, 100))
    values = IMAGES.reshape(len(IMAGES), -1).astype("float64")
    for layer, output in zip(hidden, outputs_of(model, hidden), strict=True):
        expected = FUNCTIONS[variant](values @ array(layer.kernel) + array(layer.bias))
        np.testing.assert_allclose(output, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
        values = output
    last = model.layers[-1]
    np.testing.assert_allclose(
        array(model(IMAGES)), values @ array(last.kernel) + array(last.bias), rtol=1e-4, atol=1e-3
    )


@pytest.mark.parametrize("variant", FUNCTIONS)
def test_every_hidden_layer_starts_as_suits_its_function(recipe, variant):
    kernels = [array(layer.kernel) for layer in hidden_of(build(recipe, variant))]
    for kernel in kernels:
        np.testing.assert_allclose(kernel.std(), DEVIATIONS.get(variant, HE)(*kernel.shape), rtol=0.04)
    assert len({kernel.tobytes() for kernel in kernels}) == DEPTH


def test_selu_keeps_mean_0_and_variance_1_through_30_layers_and_elu_does_not(recipe):
    model = build(recipe, "SELU", depth=30, width=256)
    for values in outputs_of(model, hidden_of(model)):
        assert abs(values.mean()) < 0.15
        assert values.var() == pytest.approx(1, abs=0.2)
    keras.utils.set_random_seed(0)
    model = recipe.build_model(IMAGES.shape[1:], 5, "elu", "lecun_normal", depth=30, width=256)
    assert outputs_of(model, hidden_of(model))[-1].var() < 0.2


def test_dropout_after_selu_keeps_mean_and_variance_and_sets_one_low_value(recipe):
    model = build(recipe, "SELU", dropout=0.1, depth=5, width=256)
    dropouts = [layer for layer in model.layers if isinstance(layer, layers.AlphaDropout)]
    assert len(dropouts) == 5
    for values in outputs_of(model, dropouts, training=True):
        assert abs(values.mean()) < 0.15
        assert values.var() == pytest.approx(1, abs=0.25)
        # The lowest value of the function, -λα, after what makes up for the change of mean and variance.
        low = -SCALE * ALPHA * 0.9 / np.sqrt(0.9 * (1 + 0.1 * (SCALE * ALPHA) ** 2))
        assert np.isclose(values, low, atol=1e-5).mean() == pytest.approx(0.1, abs=0.01)


def test_dropout_after_the_others_is_the_usual_one_and_off_by_default(recipe):
    for variant in FUNCTIONS:
        model = build(recipe, variant, dropout=0.1)
        kind = layers.AlphaDropout if variant == "SELU" else layers.Dropout
        assert [layer.rate for layer in model.layers if isinstance(layer, kind)] == [0.1] * DEPTH
        model = build(recipe, variant)
        np.testing.assert_array_equal(array(model(IMAGES, training=True)), array(model(IMAGES, training=False)))


def test_figures_are_the_dead_units_at_the_end_and_the_deviations_before_training(recipe, monkeypatch):
    def fit(model, *arguments, validation_data, callbacks, **keywords):
        # In the place of training: the first 30 units of the first hidden layer die.
        statistics, run = callbacks
        statistics.set_model(model)
        hidden = hidden_of(model)
        outputs = keras.Model(model.input, [layer.output for layer in hidden])
        images = validation_data[0][:256]
        deviations = [array(output).std() for output in outputs(images)]
        statistics.on_train_begin()
        hidden[0].bias.assign(np.where(np.arange(100) < 30, -1000.0, 0.0))
        statistics.on_epoch_end(0, {})
        dead = [np.mean(np.all(array(output) == 0, axis=0)) for output in outputs(images)]
        expected[run.variant] = deviations, dead
        run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})

    expected = {}
    monkeypatch.setattr(recipe, "VARIANTS", {name: recipe.VARIANTS[name] for name in ("ReLU", "tanh")})
    monkeypatch.setattr(keras.Model, "fit", fit)
    comparison = recipe.main(limit=300)
    signals = {signal["variant"]: signal["values"] for signal in comparison.result.signals}
    for row in comparison.summary():
        deviations, dead = expected[row["variant"]]
        assert row["figures"] == {"dead units": pytest.approx(np.mean(dead))}
        assert signals[row["variant"]] == pytest.approx(deviations, rel=1e-4)
        assert len(deviations) == DEPTH
    assert expected["ReLU"][1][0] >= 0.3
    assert not any(expected["tanh"][1])


def test_variants_are_the_functions_of_their_names(recipe):
    assert list(recipe.VARIANTS) == list(FUNCTIONS)
    assert all(value[-1] in recipe.GRID for value in recipe.VARIANTS.values())


@pytest.mark.parametrize("search", [False, True])
def test_every_training_has_its_function_and_a_rate_that_falls_to_zero(search, recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, epochs, callbacks, **keywords):
        # Without training.
        statistics, run = callbacks
        statistics.set_model(model)
        statistics.on_train_begin()
        schedule = model.optimizer._learning_rate
        first, last = (float(schedule(step)) for step in (0, 2 * epochs))
        name = hidden_of(model)[0].activation.__name__
        seen.append((name, pytest.approx(first), pytest.approx(last, abs=1e-9)))
        metrics = {"validation" if search else "test": {"accuracy": 0.5}}
        run.comparison._finish_run(run.variant, run.seed, metrics, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    variants = {"ReLU": ("relu", "he_normal", 0.003), "GELU": ("gelu", "he_normal", 0.001)}
    monkeypatch.setattr(recipe, "VARIANTS", variants)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=search, epochs=1, limit=200)
    if search:
        assert seen == [(name, rate, 0.0) for name in ("relu", "gelu") for rate in recipe.GRID]
        assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * 2
    else:
        assert seen == [("relu", 0.003, 0.0), ("gelu", 0.001, 0.0)]
