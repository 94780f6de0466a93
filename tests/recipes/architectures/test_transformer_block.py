import keras
import numpy as np
import pytest
from keras import layers
from scipy.special import erf, log_softmax, softmax

CHARACTERS, LENGTH, WIDTH, HEADS = 30, 16, 48, 4
GENERATOR = np.random.default_rng(0)
TEXTS = GENERATOR.integers(0, CHARACTERS, (5, LENGTH))


@pytest.fixture(scope="module")
def recipe(import_recipe):
    recipe = import_recipe("architectures/transformer_block")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LENGTH": LENGTH, "WIDTH": WIDTH, "HEADS": HEADS, "BLOCKS": 2}.items():
            patch.setattr(recipe, name, value)
        yield recipe


def array(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def randomize(model):
    """Give all weights other values than those at which norms and biases do nothing."""
    generator = np.random.default_rng(1)
    for weight in model.weights:
        weight.assign(array(weight) + generator.normal(0, 0.2, weight.shape))


def normalized(x, layer):
    """Return what a norm gives by the formula."""
    if isinstance(layer, layers.RMSNormalization):
        return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + layer.epsilon) * array(layer.scale)
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = (centered**2).mean(axis=-1, keepdims=True)
    return centered / np.sqrt(variance + layer.epsilon) * array(layer.gamma) + array(layer.beta)


def attended(x, layer):
    """Return what causal attention of several heads gives by the formula."""
    query, query_bias, key, key_bias, value, value_bias, output, output_bias = map(array, layer.weights)
    queries, keys, values = (
        np.einsum("etw,whd->ehtd", x, kernel) + bias[:, np.newaxis]
        for kernel, bias in ((query, query_bias), (key, key_bias), (value, value_bias))
    )
    scores = queries @ keys.swapaxes(-1, -2) / np.sqrt(WIDTH // HEADS)
    scores = np.where(np.tril(np.ones((x.shape[1],) * 2)) == 1, scores, -np.inf)
    return np.einsum("ehtd,hdw->etw", softmax(scores, axis=-1) @ values, output) + output_bias


def fed_forward(x, first, second):
    hidden = x @ array(first.kernel) + array(first.bias)
    return hidden * (1 + erf(hidden / np.sqrt(2))) / 2 @ array(second.kernel) + array(second.bias)


@pytest.mark.parametrize("norm", [layers.LayerNormalization, layers.RMSNormalization])
@pytest.mark.parametrize("pre", [False, True])
def test_block_is_that_of_the_formula(recipe, pre, norm):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((LENGTH, WIDTH))
    block = keras.Model(inputs, recipe.block(inputs, pre, norm))
    randomize(block)
    (attention,) = [layer for layer in block.layers if isinstance(layer, layers.MultiHeadAttention)]
    first_dense, second_dense = [layer for layer in block.layers if isinstance(layer, layers.Dense)]
    first, second = [layer for layer in block.layers if isinstance(layer, norm)]
    x = GENERATOR.normal(1, 2, (3, LENGTH, WIDTH))
    if pre:
        expected = x + attended(normalized(x, first), attention)
        expected = expected + fed_forward(normalized(expected, second), first_dense, second_dense)
    else:
        expected = normalized(x + attended(x, attention), first)
        expected = normalized(expected + fed_forward(expected, first_dense, second_dense), second)
    np.testing.assert_allclose(array(block(x.astype("float32"))), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pre", [False, True])
def test_later_character_changes_no_earlier_output_and_an_earlier_one_changes_later_ones(recipe, pre):
    keras.utils.set_random_seed(0)
    model = recipe.build_model(CHARACTERS, pre, layers.LayerNormalization)
    other = TEXTS.copy()
    other[:, 9] = (other[:, 9] + 1) % CHARACTERS
    before, after = array(model(TEXTS)), array(model(other))
    np.testing.assert_allclose(after[:, :9], before[:, :9], atol=1e-5)
    assert np.all(np.abs(after[:, 9:] - before[:, 9:]).max(axis=(0, 2)) > 1e-4)


def test_network_knows_the_places_of_the_characters(recipe):
    keras.utils.set_random_seed(0)
    model = recipe.build_model(CHARACTERS, True, layers.LayerNormalization)
    outputs = array(model(np.full((1, LENGTH), 7)))
    # Without places, all positions of equal characters would be the same.
    assert np.abs(outputs[0, 1:] - outputs[0, :1]).max(axis=-1).min() > 1e-4


@pytest.mark.parametrize("pre, norms", [(False, 4), (True, 5)])
def test_pre_norm_has_one_norm_more_at_the_end(recipe, pre, norms):
    model = recipe.build_model(CHARACTERS, pre, layers.LayerNormalization)
    found = [layer for layer in model.layers if isinstance(layer, layers.LayerNormalization)]
    assert len(found) == norms
    assert isinstance(model.layers[-2], layers.LayerNormalization)


def test_bits_are_the_mean_of_minus_log_2(recipe):
    logits = GENERATOR.normal(size=(5, LENGTH, CHARACTERS))
    chosen = np.take_along_axis(log_softmax(logits, axis=-1), TEXTS[..., np.newaxis], axis=-1)[..., 0]
    expected = -chosen.mean(axis=-1) / np.log(2)
    np.testing.assert_allclose(array(recipe.bits_per_character(TEXTS, logits.astype("float32"))), expected, rtol=1e-5)


def test_targets_are_the_characters_that_follow(recipe):
    train, validation, test, characters = recipe.load("shakespeare", recipe.DATA_DIR, 20)
    for inputs, targets in (train, validation, test):
        assert inputs.shape == targets.shape == (20, LENGTH)
        np.testing.assert_array_equal(inputs.ravel()[1:], targets.ravel()[:-1])
        assert targets.max() < characters
        assert inputs.min() >= 0
    assert train[0].min() >= 1, "every character of the training text has a number"


def test_variants_differ_in_place_of_the_norm_its_kind_and_warmup(recipe, planned):
    trainings = planned(recipe, epochs=20)
    assert [training.variant for training in trainings] == list(recipe.VARIANTS)
    steps = 20 * -(-200 // 32)
    for training, (pre, norm, share, peak) in zip(trainings, recipe.VARIANTS.values(), strict=True):
        norms = [layer for layer in training.model.layers if isinstance(layer, norm)]
        assert len(norms) == 4 + pre
        schedule = training.model.optimizer._learning_rate
        rates = [float(schedule(step)) for step in range(steps + 1)]
        assert max(rates) == pytest.approx(peak)
        assert int(np.argmax(rates)) == int(share * steps)
        assert rates[0] == pytest.approx(0 if share else peak)
        assert rates[-1] == pytest.approx(0, abs=1e-9)
