import keras
import numpy as np
import pytest
from keras import layers

BLOCKS = 8
IMAGES = np.random.default_rng(0).random((512, 4, 4, 1)).astype("float32")


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("regularization/stochastic_depth")


def array(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def build(recipe, first, last):
    keras.utils.set_random_seed(0)
    return recipe.build_model((4, 4, 1), 5, first, last)


def sums(model):
    found = [layer for layer in model.layers if isinstance(layer, layers.Add)]
    assert len(found) == BLOCKS
    return found


def blocks_of(model, training):
    """Return (x, F(x), the sum) of each block for all images: F(x) by the formula, in NumPy."""
    tensors = [tensor for layer in sums(model) for tensor in (layer.input[0], layer.output)]
    values = [array(value) for value in keras.Model(model.input, tensors)(IMAGES, training=training)]
    weighted = [layer for layer in model.layers if layer.weights]
    found = []
    # The first layer and the last two are those outside of the blocks.
    for place, (x, total) in enumerate(zip(values[::2], values[1::2], strict=True)):
        normalization, first, second = weighted[1 + 3 * place : 4 + 3 * place]
        deviation = np.sqrt(x.var(axis=1, keepdims=True) + 1e-3)
        hidden = (x - x.mean(axis=1, keepdims=True)) / deviation
        hidden = hidden * array(normalization.gamma) + array(normalization.beta)
        hidden = np.maximum(hidden @ array(first.kernel) + array(first.bias), 0)
        found.append((x, hidden @ array(second.kernel) + array(second.bias), total))
    return found


def test_in_evaluation_every_block_adds_its_change(recipe):
    for x, change, total in blocks_of(build(recipe, 0.0, 0.5), training=False):
        np.testing.assert_allclose(total, x + change, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first, last", [(0.0, 0.5), (0.25, 0.25)])
def test_in_training_a_random_share_of_the_examples_skips_a_block_as_a_whole(recipe, first, last):
    probabilities = np.linspace(first, last, BLOCKS + 1)[1:]
    draws = []
    for probability, (x, change, total) in zip(
        probabilities, blocks_of(build(recipe, first, last), training=True), strict=True
    ):
        skipped = (total == x).all(axis=1)
        np.testing.assert_allclose(total[~skipped], (x + change / (1 - probability))[~skipped], rtol=1e-3, atol=1e-3)
        standard_error = np.sqrt(probability * (1 - probability) / len(IMAGES))
        assert abs(skipped.mean() - probability) < 4 * standard_error
        draws.append(skipped)
    assert len({draw.tobytes() for draw in draws}) == BLOCKS


def test_the_mean_over_draws_is_what_evaluation_gives(recipe):
    """The factor of F(x) has mean 1, with the variance p / (1 - p)."""
    model = build(recipe, 0.5, 0.5)
    x, change, total = blocks_of(model, training=True)[0]
    factors = ((total - x) * change).sum(axis=1) / (change**2).sum(axis=1)
    assert abs(factors.mean() - 1) < 4 / np.sqrt(len(IMAGES))
    assert factors.var() == pytest.approx(1, rel=0.05)


def test_every_step_draws_anew_and_without_skipping_nothing_is_random(recipe):
    model, plain = build(recipe, 0.0, 0.5), build(recipe, 0.0, 0.0)
    assert not np.array_equal(array(model(IMAGES, training=True)), array(model(IMAGES, training=True)))
    np.testing.assert_array_equal(array(plain(IMAGES, training=True)), array(plain(IMAGES, training=False)))
    # Skipping has no weights. (Drawing seeds for it changes what is drawn for them.)
    for weight, other in zip(plain.trainable_variables, model.trainable_variables, strict=True):
        weight.assign(other)
    np.testing.assert_allclose(array(model(IMAGES)), array(plain(IMAGES)), rtol=1e-5, atol=1e-5)


def test_variants_are_those_of_their_names(recipe):
    assert {variant: value[:2] for variant, value in recipe.VARIANTS.items()} == {
        "all blocks": (0.0, 0.0),
        "up to 0.2": (0.0, 0.2),
        "up to 0.5": (0.0, 0.5),
        "0.25 everywhere": (0.25, 0.25),
    }
    assert all(value[-1] in recipe.GRID for value in recipe.VARIANTS.values())


@pytest.mark.parametrize("search", [False, True])
def test_every_training_has_its_probabilities_and_a_rate_that_falls_to_zero(search, recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, epochs, callbacks, **keywords):
        # Without training.
        schedule = model.optimizer._learning_rate
        first, last = (float(schedule(step)) for step in (0, epochs))
        highest = [layer.rate for layer in model.layers if isinstance(layer, layers.Dropout)][-1]
        seen.append((highest, pytest.approx(first), pytest.approx(last, abs=1e-9)))
        run = callbacks[-1]
        metrics = {"validation" if search else "test": {"accuracy": 0.5}}
        run.comparison._finish_run(run.variant, run.seed, metrics, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "VARIANTS", {"all blocks": (0.0, 0.0, 0.003), "up to 0.5": (0.0, 0.5, 0.001)})
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=search, epochs=2, limit=200)
    if search:
        assert seen == [(highest, rate, 0.0) for highest in (0.0, 0.5) for rate in recipe.GRID]
        assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * 2
    else:
        assert seen == [(0.0, 0.003, 0.0), (0.5, 0.001, 0.0)]
