import keras
import ml_dtypes
import numpy as np
import pytest

LOGITS = np.random.default_rng(0).uniform(-100, 100, (32, 5)).astype("float32")
LABELS = np.arange(32) % 5


@pytest.fixture
def recipe(import_recipe):
    return import_recipe("numerics/floating_point_range")


def reference(logits, labels):
    """Return the loss of each example and its gradient with respect to the logits, in float64."""
    logits = logits.astype("float64")
    shifted = logits - logits.max(axis=1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    one_hot = np.eye(logits.shape[1])[labels]
    losses = np.log(np.exp(shifted).sum(axis=1)) - (shifted * one_hot).sum(axis=1)
    return losses, (probabilities - one_hot) / len(logits)


def loss_and_step(recipe, variant, scale, logits, labels):
    """Return the mean loss and its gradient: what one step of size 1 takes from logits that are the weights."""
    classes = logits.shape[1]
    identity = np.eye(len(logits), dtype="float32")
    network = recipe.build_model((1, len(logits), 1), classes, variant, scale)
    weights = keras.layers.Dense(classes, use_bias=False)
    model = keras.Sequential([keras.Input((len(logits),)), weights, *_after_last_dense(network)])
    weights.set_weights([logits])
    model.compile(keras.optimizers.SGD(1.0), recipe.LOSSES[variant])
    loss = model.train_on_batch(identity, labels)
    return float(loss), logits - keras.ops.convert_to_numpy(weights.kernel)


def _after_last_dense(network):
    places = [place for place, layer in enumerate(network.layers) if isinstance(layer, keras.layers.Dense)]
    return [layer.__class__.from_config(layer.get_config()) for layer in network.layers[places[-1] + 1 :]]


def test_from_logits_loss_and_gradient_are_right_far_outside_the_range_of_exp(recipe):
    losses, gradient = reference(LOGITS, LABELS)
    loss, step = loss_and_step(recipe, "from logits", 1, LOGITS, LABELS)
    assert loss == pytest.approx(losses.mean(), rel=1e-5)
    # The step is a difference of weights of up to 100, whose spacing in float32 is 8e-6.
    np.testing.assert_allclose(step, gradient, atol=1e-5)


def test_from_logits_scaled_up_they_are_those_of_the_scaled_logits(recipe):
    losses, gradient = reference(100 * LOGITS / 100, LABELS)
    loss, step = loss_and_step(recipe, "from logits", 100, LOGITS / 100, LABELS)
    assert loss == pytest.approx(losses.mean(), rel=1e-5)
    np.testing.assert_allclose(step, 100 * gradient, atol=1e-3)


def test_written_out_the_loss_agrees_for_small_logits_and_fails_for_large_ones(recipe):
    small = LOGITS / 100
    losses, gradient = reference(small, LABELS)
    loss, step = loss_and_step(recipe, "written out", 1, small, LABELS)
    assert loss == pytest.approx(losses.mean(), rel=1e-5)
    np.testing.assert_allclose(step, gradient, atol=1e-6)
    loss, step = loss_and_step(recipe, "written out", 1, LOGITS, LABELS)
    assert not np.isfinite(loss)
    assert not np.isfinite(step).all()


def test_clipped_probabilities_give_a_finite_loss_and_lose_the_gradient(recipe):
    wrong = np.array([[0.0, 50.0], [50.0, 0.0]], "float32")
    loss, step = loss_and_step(recipe, "probabilities", 1, wrong, np.array([0, 1]))
    assert loss == pytest.approx(-np.log(1e-7), rel=1e-3)
    np.testing.assert_allclose(step, 0.0, atol=1e-6)
    _, gradient = reference(wrong, np.array([0, 1]))
    assert abs(gradient).min() == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_absorption_begins_where_the_spacing_is_two(recipe, dtype):
    number = ml_dtypes.finfo(dtype).eps.astype("float64")
    assert recipe.first_absorbing(dtype) == 2 / number
    reference_type = np.dtype(getattr(ml_dtypes, dtype, dtype))
    absorbing = reference_type.type(recipe.first_absorbing(dtype))
    assert absorbing + reference_type.type(1) == absorbing
    assert absorbing / 2 + reference_type.type(1) != absorbing / 2


def test_tables_show_where_the_written_out_loss_fails(recipe, capsys):
    recipe.show_formats()
    output = capsys.readouterr().out
    for figure in ("65504", "0.000977", "16777216"):
        assert figure in output
    rows = {line.split()[1]: line.split()[2:] for line in output.splitlines() if line.strip().startswith("0,")}
    assert rows["80"] == ["16.12", "80", "80"]
    assert rows["90"] == ["16.12", "nan", "90"]


@pytest.mark.parametrize("scale", [1, 100])
def test_each_variant_trains_with_its_loss_and_the_scale_of_the_command_line(recipe, scale, monkeypatch):
    fit, seen = keras.Model.fit, {}

    def spy(model, images, labels, **keywords):
        (run,) = keywords["callbacks"]
        outputs = keras.ops.convert_to_numpy(model(images))
        kernel, bias, last_kernel, last_bias = model.get_weights()
        hidden = np.maximum(images.reshape(len(images), -1) @ kernel + bias, 0)
        logits = scale * (hidden @ last_kernel + last_bias)
        if run.variant == "probabilities":
            exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
            logits = exponentials / exponentials.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(outputs, logits, rtol=1e-3, atol=1e-3)
        seen[run.variant] = model.loss
        return fit(model, images, labels, **keywords)

    monkeypatch.setattr(keras.Model, "fit", spy)
    recipe.main(epochs=1, limit=64, scale=scale)
    assert seen == recipe.LOSSES
    assert list(seen) == list(recipe.VARIANTS)
