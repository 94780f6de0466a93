import keras
import numpy as np
import pytest
from keras import layers

DEPTHS = [8, 20, 44]
GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.random((32, 9, 7, 1)).astype("float32")


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("architectures/residual_connections")


def build(recipe, depth, residual, network="dense"):
    """Return a model whose statistics and scales are none of those it starts with, and its blocks."""
    keras.utils.set_random_seed(0)
    model = recipe.build_model(IMAGES.shape[1:], 5, depth, residual, network)
    generator = np.random.default_rng(1)
    for layer in model._flatten_layers():
        if isinstance(layer, layers.BatchNormalization):
            layer.gamma.assign(generator.uniform(0.5, 1.5, layer.gamma.shape))
            layer.beta.assign(generator.uniform(-0.5, 0.5, layer.beta.shape))
            layer.moving_mean.assign(generator.uniform(-0.5, 0.5, layer.gamma.shape))
            layer.moving_variance.assign(generator.uniform(0.5, 2, layer.gamma.shape))
    return model, [layer for layer in model.layers if layer.name.startswith("block_")]


def array(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor), dtype="float64")


def activation(x, normalization):
    """Return the ReLU of x normalised by the moving statistics; Keras's ε is 1e-3."""
    deviation = np.sqrt(array(normalization.moving_variance) + 1e-3)
    x = array(normalization.gamma) * (x - array(normalization.moving_mean)) / deviation + array(normalization.beta)
    return np.maximum(x, 0)


def change(x, block):
    """Return F(x) of a dense block."""
    before_first, _, first, before_second, _, second = block.layers
    x = activation(x, before_first) @ array(first.kernel)
    return activation(x, before_second) @ array(second.kernel)


def forward(model, images, residual, skipped=None):
    """Return the logits of a dense model in NumPy, and ‖F(x)‖ / ‖x‖ of each block."""
    x = images.reshape(len(images), -1) @ array(model.get_layer("stem").layers[-1].kernel)
    ratios = []
    for number in range(1, sum(layer.name.startswith("block_") for layer in model.layers) + 1):
        f = change(x, model.get_layer(f"block_{number}"))
        ratios.append(np.sqrt((f**2).sum() / (x**2).sum()))
        if number != skipped:
            x = x + f if residual else f
    before, _, last = model.get_layer("head").layers
    return activation(x, before) @ array(last.kernel) + array(last.bias), ratios


@pytest.mark.parametrize("residual", [False, True])
def test_output_is_that_of_the_formula(recipe, residual):
    for depth in (8, 20):
        model, _ = build(recipe, depth, residual)
        logits, _ = forward(model, IMAGES, residual)
        np.testing.assert_allclose(array(model(IMAGES)), logits, rtol=1e-3, atol=1e-3 * np.abs(logits).max())


def test_with_its_last_weights_zeroed_a_residual_block_is_the_identity_and_a_plain_one_is_not(recipe):
    for residual in (True, False):
        model, blocks = build(recipe, 20, residual)
        for block in blocks:
            block.layers[-1].kernel.assign(np.zeros((64, 64)))
        identity = array(model.get_layer("head")(model.get_layer("stem")(IMAGES)))
        assert np.array_equal(array(model(IMAGES)), identity) == residual
        # Without the blocks' inputs, nothing of the image comes through, but for rounding by the place in the batch.
        assert (np.ptp(array(model(IMAGES)), axis=0).max() < 1e-6) != residual


def test_convolutional_blocks_with_zeroed_weights_pass_every_second_pixel_and_add_empty_channels(recipe):
    model, blocks = build(recipe, 8, True, "convolutional")
    for block in blocks:
        block.layers[-1].kernel.assign(np.zeros(block.layers[-1].kernel.shape))
    x = array(model.get_layer("stem")(IMAGES))
    assert x.shape == (32, 9, 7, 16)
    for _ in range(2):
        x = x[:, ::2, ::2]
        x = np.concatenate([x, np.zeros_like(x)], axis=-1)
    before, _, _, last = model.get_layer("head").layers
    expected = activation(x, before).mean(axis=(1, 2)) @ array(last.kernel) + array(last.bias)
    np.testing.assert_allclose(array(model(IMAGES)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", ["dense", "convolutional"])
def test_the_depth_counts_layers_with_weights_and_both_kinds_start_equal(recipe, network):
    for depth in DEPTHS[:2] if network == "convolutional" else DEPTHS:
        weights = []
        for residual in (False, True):
            keras.utils.set_random_seed(0)
            model = recipe.build_model((9, 7, 3), 5, depth, residual, network)
            weighted = [layer for layer in model._flatten_layers() if isinstance(layer, layers.Dense | layers.Conv2D)]
            assert len(weighted) == depth
            assert sum(isinstance(layer, layers.Add) for layer in model.layers) == residual * (depth - 2) // 2
            weights.append(model.get_weights())
        for plain, other in zip(*weights, strict=True):
            np.testing.assert_array_equal(plain, other)


def test_every_depth_is_tried_with_and_without(recipe):
    kinds = {True: "residual", False: "plain"}
    assert {name: value[:2] for name, value in recipe.VARIANTS.items()} == {
        f"{kinds[residual]} {depth}": (depth, residual) for residual in (False, True) for depth in DEPTHS
    }
    assert next(iter(recipe.VARIANTS)) == recipe.HEADLINE.replace("residual", "plain")


def test_the_convolutional_network_has_the_three_stages_of_the_paper(recipe):
    _, blocks = build(recipe, 20, True, "convolutional")
    shapes = [block.output_shape[1:] for block in blocks]
    assert shapes == [(9, 7, 16)] * 3 + [(5, 4, 32)] * 3 + [(3, 2, 64)] * 3


def test_contributions_are_ratios_of_norms(recipe):
    model, _ = build(recipe, 20, True)
    _, ratios = forward(model, IMAGES, residual=True)
    np.testing.assert_allclose(recipe.contributions(model, IMAGES), ratios, rtol=1e-3)


@pytest.mark.parametrize("residual", [False, True])
def test_skipping_a_block_gives_the_network_without_it_and_its_accuracy(recipe, residual):
    model, blocks = build(recipe, 8, residual)
    x = model.get_layer("stem")(IMAGES)
    expected = [forward(model, IMAGES, residual, number)[0] for number in (None, 1, 2, 3)]
    for skipped, logits in zip([None, *blocks], expected, strict=True):
        result = array(model.get_layer("head")(recipe.connect(x, blocks, residual, skipped)))
        np.testing.assert_allclose(result, logits, rtol=1e-3, atol=1e-3 * np.abs(logits).max())
    predictions = [logits.argmax(axis=-1) for logits in expected]
    for labels in predictions:
        accuracies = [np.mean(each == labels) for each in predictions]
        np.testing.assert_allclose(recipe.accuracies_skipping(model, residual, IMAGES, labels), accuracies)


def test_signals_are_those_of_the_validation_images(recipe, monkeypatch):
    variants = {"plain 8": (8, False, 0.03), "residual 8": (8, True, 0.03)}
    monkeypatch.setattr(recipe, "VARIANTS", variants)
    models = []

    def fit(model, *arguments, validation_data, callbacks, **keywords):
        (run,) = callbacks
        models.append(model)
        metrics = {"train": {"accuracy": 0.75}, "test": {"accuracy": 0.5}}
        run.comparison._finish_run(run.variant, run.seed, metrics, {}, [])

    monkeypatch.setattr(keras.Model, "fit", fit)
    comparison = recipe.main(limit=50)
    _, (images, labels), _, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 50)
    signals = {(signal["variant"], signal["name"]): signal for signal in comparison.result.signals}
    for (variant, (_, residual, _)), model in zip(variants.items(), models, strict=True):
        expected = [
            np.mean(forward(model, images, residual, number)[0].argmax(axis=-1) == labels) for number in (None, 1, 2, 3)
        ]
        skipping = signals[variant, "validation accuracy"]
        assert skipping["at"] == [0, 1, 2, 3]
        assert skipping["values"] == pytest.approx(expected)
        if residual:
            _, ratios = forward(model, images, residual)
            np.testing.assert_allclose(signals[variant, "‖F(x)‖ / ‖x‖"]["values"], ratios, rtol=1e-3)
    assert len(signals) == 3


def test_every_training_has_its_network(recipe, planned, monkeypatch):
    monkeypatch.setattr(recipe, "VARIANTS", {"plain 4": (4, False, 0.003), "residual 8": (8, True, 0.001)})
    additions = [sum(isinstance(layer, layers.Add) for layer in each.model.layers) for each in planned(recipe)]
    assert additions == [0, 3]
