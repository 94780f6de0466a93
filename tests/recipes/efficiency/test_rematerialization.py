import subprocess
import types

import keras
import numpy as np
import pytest

IMAGE_SHAPE, CLASSES = (8, 8, 1), 3
PEAKS = {"nothing": 30.0, "within layers": 20.0, "within blocks": 10.0}


@pytest.fixture(scope="module")
def recipe(import_recipe):
    recipe = import_recipe("efficiency/rematerialization")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "BLOCKS", 2)
        yield recipe


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    return generator.normal(size=(32, *IMAGE_SHAPE)).astype("float32"), generator.integers(0, CLASSES, 32)


def trained(recipe, data, recomputed, **arguments):
    """Return the weights of a model before and after a step of SGD, whose difference is the gradient."""
    keras.utils.set_random_seed(0)
    model = recipe.build_model(IMAGE_SHAPE, CLASSES, recomputed)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), loss, **arguments)
    before = model.get_weights()
    model.fit(*data, batch_size=32, verbose=0)
    return before, model.get_weights()


@pytest.mark.parametrize("recomputed", ["layers", "blocks"])
def test_gradients_are_equal_and_every_layer_is_trained(recipe, data, recomputed):
    start, expected = trained(recipe, data, None)
    before, after = trained(recipe, data, recomputed)
    for first, other, end, expected_end in zip(start, before, after, expected, strict=True):
        np.testing.assert_array_equal(other, first)
        assert np.abs(end - other).max() > 1e-5
        np.testing.assert_allclose(end, expected_end, atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere the second pass does not call Python")
def test_layers_of_a_block_run_twice_in_a_step(recipe, data, monkeypatch):
    runs, forward = [], recipe.Block.forward

    def count(block, x):
        runs.append(block)
        return forward(block, x)

    monkeypatch.setattr(recipe.Block, "forward", count)
    calls = {}
    for recomputed in (None, "blocks"):
        trained(recipe, data, recomputed, run_eagerly=True)
        calls[recomputed] = len(runs)
        runs.clear()
    # When the model is built, each block is called once; in the step once or twice.
    assert calls == {None: 2 * recipe.BLOCKS, "blocks": 3 * recipe.BLOCKS}


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="how JAX computes again")
@pytest.mark.parametrize("recomputed, factor", [(None, 1), ("layers", 1), ("blocks", 2)])
def test_convolutions_are_computed_again_within_blocks_alone(recipe, data, recomputed, factor):
    import jax.extend

    model = recipe.build_model(IMAGE_SHAPE, CLASSES, recomputed)
    trainable = [variable.value for variable in model.trainable_variables]

    def loss(trainable):
        logits, _ = model.stateless_call(trainable, [], data[0], training=True)
        return logits.sum()

    def count(jaxpr):
        own = sum(each.primitive.name == "conv_general_dilated" for each in jaxpr.eqns)
        return own + sum(map(count, jax.extend.core.subjaxprs(jaxpr)))

    convolutions = recipe.BLOCKS * recipe.DEPTH
    # In the forward pass, and in the backward pass to the input and to the kernel; the first layer's has no gradient.
    assert count(jax.make_jaxpr(jax.grad(loss))(trainable).jaxpr) == (2 + factor) * convolutions + 2


def test_figures_are_peak_and_time_of_a_step(recipe, monkeypatch):
    asked = []

    def peak(variant, dataset, data_dir, limit):
        asked.append((variant, dataset, data_dir, limit))
        return PEAKS[variant]

    monkeypatch.setattr(recipe, "peak_megabytes", peak)
    comparison = recipe.main(limit=300, epochs=3)
    assert asked == [(variant, "fashion_mnist_10k", recipe.DATA_DIR, 300) for variant in recipe.VARIANTS]
    figures = {(each["variant"], each["name"]): each["value"] for each in comparison.result.figures}
    for run in comparison.result.runs:
        assert figures[run["variant"], "peak MB"] == PEAKS[run["variant"]]
        _, *later = run["epoch_seconds"]
        assert figures[run["variant"], "ms a step"] == pytest.approx(1000 * np.median(later) / 3)


def test_peak_is_what_training_adds_in_another_process(recipe, tmp_path):
    # Three batches of training, of which the process holds several times as much.
    megabytes = recipe.peak_megabytes("nothing", "fashion_mnist_10k", recipe.DATA_DIR, None)
    assert 20 < megabytes < 2000


def test_process_that_fails_is_told_with_what_it_said(recipe, monkeypatch):
    ended = types.SimpleNamespace(returncode=1, stdout="", stderr="MemoryError: no memory left")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **keywords: ended)
    with pytest.raises(RuntimeError, match="'nothing' was not measured:\n.*no memory left"):
        recipe.peak_megabytes("nothing", "fashion_mnist_10k", recipe.DATA_DIR, None)
