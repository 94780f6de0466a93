import types

import cyclopts
import keras
import numpy as np
import pytest
from keras import layers

GENERATOR = np.random.default_rng(0)
IMAGES = GENERATOR.uniform(0, 1, (12, 13, 10, 1)).astype("float32")


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("combined/bag_of_tricks")


def array(tensor):
    return np.array(keras.ops.convert_to_numpy(tensor))


def build(recipe, tricks):
    """Return a combined model whose statistics and scales are none of those it starts with."""
    keras.utils.set_random_seed(0)
    model = recipe.build_model(IMAGES, 5, tricks)
    generator = np.random.default_rng(1)
    for layer in model.layers:
        if isinstance(layer, layers.BatchNormalization):
            for weight in layer.weights:
                weight.assign(generator.uniform(0.5, 1.5, weight.shape))
    return model


def convolution(x, kernel, stride):
    """Return the convolution of x (examples, height, width, channels) to ⌈size / stride⌉, padded with zeros."""
    size = len(kernel)
    padding = []
    for length in x.shape[1:3]:
        total = max((-(-length // stride) - 1) * stride + size - length, 0)
        padding.append((total // 2, total - total // 2))
    padded = np.pad(x.astype("float64"), ((0, 0), *padding, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    return np.einsum("nhwcij,ijco->nhwo", windows, kernel)


def pooling(x):
    """Return the maximum of each 2 × 2 pixels of x, at an odd border of what there is of them."""
    padded = np.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)), constant_values=-np.inf)
    return padded.reshape(len(x), padded.shape[1] // 2, 2, padded.shape[2] // 2, 2, -1).max(axis=(2, 4))


def logits_of(model, images, normalized):
    """Return the logits of a combined model, in NumPy; Keras's ε is 1e-3."""
    normalizations = [layer for layer in model.layers if isinstance(layer, layers.BatchNormalization)]
    convolutions = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]
    assert [layer.kernel.shape[0] for layer in convolutions] in ([5, 3, 3], [5, 1, 3, 3])
    x = images.astype("float64")
    for index, layer in enumerate(convolutions):
        kernel = array(layer.kernel)
        x = convolution(pooling(x) if len(kernel) == 3 else x, kernel, stride=2 if index == 0 else 1)
        if normalized:
            gamma, beta, mean, variance = (array(weight) for weight in normalizations[index].weights)
            x = gamma * (x - mean) / np.sqrt(variance + 1e-3) + beta
        elif layer.use_bias:
            x = x + array(layer.bias)
        x = np.maximum(x, 0)
    last = model.layers[-1]
    return x.max(axis=(1, 2)) @ array(last.kernel) + array(last.bias)


@pytest.mark.parametrize("whitened", [True, False])
@pytest.mark.parametrize("normalized", [True, False])
def test_logits_are_those_of_the_formula(recipe, normalized, whitened):
    model = build(recipe, ["batch normalization"] * normalized + ["whitening"] * whitened + ["mirroring"])
    np.testing.assert_allclose(
        array(model(IMAGES, training=False)), logits_of(model, IMAGES, normalized), rtol=1e-3, atol=1e-4
    )
    assert any(isinstance(layer, layers.BatchNormalization) for layer in model.layers) == normalized


def test_batch_normalization_normalizes_by_the_batch_in_training(recipe):
    model = build(recipe, ["batch normalization"])
    normalization = next(layer for layer in model.layers if isinstance(layer, layers.BatchNormalization))
    x = convolution(IMAGES, array(model.layers[1].kernel), stride=2)
    start = array(normalization.moving_mean)
    model(IMAGES, training=True)
    np.testing.assert_allclose(
        array(normalization.moving_mean), 0.9 * start + 0.1 * x.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5
    )


def patches_of(images):
    windows = np.lib.stride_tricks.sliding_window_view(images, (5, 5), axis=(1, 2))[:, ::2, ::2]
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 25 * images.shape[-1])


@pytest.mark.parametrize("channels", [1, 3])
def test_whitening_gives_patches_values_that_are_uncorrelated_and_of_variance_1_where_there_is_some(recipe, channels):
    # Smooth images, so that neighbouring pixels are correlated.
    images = np.cumsum(GENERATOR.normal(size=(40, 12, 11, channels)), axis=2).astype("float32")
    kernel = recipe.whitening_kernel(images)
    assert kernel.shape == (5, 5, channels, 50 * channels)
    values = patches_of(images) @ kernel.reshape(25 * channels, -1)
    half = 25 * channels
    np.testing.assert_allclose(values[:, half:], -values[:, :half])
    covariance = np.cov(values[:, :half], rowvar=False)
    eigenvalues = np.linalg.eigvalsh(np.cov(patches_of(images), rowvar=False))
    expected = eigenvalues / (eigenvalues + eigenvalues[-1] / 100)
    assert expected[0] < 0.9 < 0.99 < expected[-1]
    np.testing.assert_allclose(covariance, np.diag(expected), atol=1e-4)


def test_the_whitening_layer_has_the_kernel_of_the_first_images_and_is_not_trained(recipe):
    images = np.concatenate([GENERATOR.random((1000, 9, 8, 1)), np.zeros((50, 9, 8, 1))]).astype("float32")
    model = recipe.build_model(images, 5, recipe.TRICKS + ["alternation", "whitening"])
    whitening, *others = [layer for layer in model.layers if isinstance(layer, layers.Conv2D)]
    np.testing.assert_allclose(array(whitening.kernel), recipe.whitening_kernel(images[:1000]), rtol=1e-4, atol=1e-5)
    assert whitening.strides == (2, 2)
    assert not whitening.trainable_variables
    assert all(layer.trainable_variables for layer in others)


@pytest.mark.parametrize("tricks", [[], ["mirroring"], ["mirroring", "alternation"]])
def test_mirroring_shows_about_half_of_the_images_mirrored_and_only_in_training(recipe, tricks):
    model = build(recipe, tricks)
    plain, mirrored = array(model(IMAGES, training=False)), array(model(IMAGES[:, :, ::-1], training=False))
    trained = np.concatenate([array(model(IMAGES, training=True)) for _ in range(10)]).reshape(10, *plain.shape)
    is_plain = np.isclose(trained, plain, rtol=1e-4, atol=1e-5).all(axis=-1)
    is_mirrored = np.isclose(trained, mirrored, rtol=1e-4, atol=1e-5).all(axis=-1)
    assert (is_plain != is_mirrored).all()
    if tricks == ["mirroring"]:
        assert 0.3 < is_mirrored.mean() < 0.7
    else:
        assert is_plain.all()


def rates(optimizer, steps):
    """Return the learning rate of each step."""
    found = []
    for step in range(steps):
        optimizer.iterations.assign(step)
        found.append(float(array(optimizer.learning_rate)))
    return np.array(found)


@pytest.mark.parametrize("warm_up", [True, False])
@pytest.mark.parametrize("cosine", [True, False])
def test_the_rate_rises_for_a_fifth_of_the_steps_and_falls_along_a_cosine(recipe, warm_up, cosine):
    tricks = ["warm-up"] * warm_up + ["cosine"] * cosine
    rise = 0.4 * np.arange(10) / 10 if warm_up else np.empty(0)
    rest = 50 - len(rise)
    fall = 0.2 * (1 + np.cos(np.pi * np.arange(rest) / rest)) if cosine else np.full(rest, 0.4)
    expected = np.concatenate([rise, fall])
    for network in ("tutorial", "combined"):
        found = rates(recipe.build_optimizer(network, tricks, 50, 0.4), 50)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_steps_are_those_of_nesterov_momentum(recipe):
    optimizer = recipe.build_optimizer("combined", [], 100, 0.4)
    weight, expected, velocity = keras.Variable(np.ones(5)), np.ones(5), np.zeros(5)
    optimizer.build([weight])
    for _ in range(3):
        gradient = GENERATOR.normal(size=5)
        optimizer.apply([keras.ops.convert_to_tensor(gradient, dtype="float32")])
        velocity = 0.9 * velocity - 0.4 * gradient
        expected = expected + 0.9 * velocity - 0.4 * gradient
        np.testing.assert_allclose(array(weight), expected, rtol=1e-5, atol=1e-6)


def test_the_tutorial_model_is_the_one_that_is_taught(recipe):
    model = recipe.build_tutorial_model((28, 28, 1), 10)
    kinds = ["InputLayer", *["Conv2D", "MaxPooling2D"] * 2, "Flatten", "Dropout", "Dense"]
    assert [type(layer).__name__ for layer in model.layers] == kinds
    assert model.get_layer(index=-2).rate == 0.5
    # The figure of "Simple MNIST convnet" on keras.io, which has the same layers.
    assert model.count_params() == 34_826
    assert all(layer.activation is keras.activations.relu for layer in model.layers if isinstance(layer, layers.Conv2D))
    zero = recipe.build_tutorial_model((28, 28, 1), 10)
    zero.set_weights([np.zeros_like(weight) for weight in zero.get_weights()])
    assert not array(zero(np.ones((1, 28, 28, 1)))).any()  # logits: no softmax


def test_batches_hold_each_image_once_with_its_label_and_are_shuffled_anew(recipe):
    images, labels = np.arange(300, dtype="uint8").reshape(300, 1, 1, 1).astype("float32"), np.arange(300)
    keras.utils.set_random_seed(0)
    dataset = recipe.batches(images, labels, shuffle=True)
    epochs = [[tuple(map(np.asarray, batch)) for batch in dataset] for _ in range(2)]
    for epoch in epochs:
        assert [len(batch) for batch, _ in epoch] == [128, 128, 44]
        order = np.concatenate([part for _, part in epoch])
        assert sorted(order) == list(range(300))
        np.testing.assert_array_equal(np.concatenate([part for part, _ in epoch]), images[order])
    first, second = (np.concatenate([part for _, part in epoch]) for epoch in epochs)
    assert not np.array_equal(first, second)
    assert np.mean(np.abs(first - labels)) > 50
    plain = np.concatenate([np.asarray(part) for _, part in recipe.batches(images, labels)])
    np.testing.assert_array_equal(plain, labels)
    assert not dataset.options().autotune.enabled


def test_alternating_batches_mirror_each_image_in_every_other_epoch_and_are_shuffled_anew(recipe):
    images, labels = np.random.default_rng(1).random((301, 2, 3, 1)).astype("float32"), np.arange(301)
    keras.utils.set_random_seed(0)
    dataset = recipe.alternating_batches(images, labels)
    assert len(dataset) == 3
    assert not dataset.options().autotune.enabled
    flips, orders = [], []
    for _ in range(4):
        epoch = [tuple(map(np.asarray, batch)) for batch in dataset]
        assert [len(batch) for batch, _ in epoch] == [128, 128, 45]
        seen, order = (np.concatenate(parts) for parts in zip(*epoch, strict=True))
        assert sorted(order) == list(range(301))
        flipped = np.empty(301, bool)
        flipped[order] = (seen != images[order]).any(axis=(1, 2, 3))
        np.testing.assert_array_equal(
            seen, np.where(flipped[order, None, None, None], images[order, :, ::-1], images[order])
        )
        flips.append(flipped)
        orders.append(order)
    assert flips[0].sum() == 151
    np.testing.assert_array_equal(flips[0], ~flips[1])
    np.testing.assert_array_equal(flips[:2], flips[2:])
    assert not np.array_equal(orders[0], orders[1])


def test_the_ablation_leaves_out_each_trick_in_turn(recipe):
    network, whole, share, rate = recipe.VARIANTS["combined"]
    ablation = recipe.without_each_trick()
    assert ablation.pop("combined") == recipe.VARIANTS["combined"]
    assert whole == recipe.TRICKS + recipe.TRICKS_OF_LONG_TRAINING
    assert list(ablation) == [f"no {trick}" for trick in whole]
    for trick, (own_network, tricks, own_share, own_rate) in zip(whole, ablation.values(), strict=True):
        assert (own_network, own_share, own_rate) == (network, share, rate)
        assert sorted([*tricks, trick]) == sorted(whole)


def test_the_tutorial_has_no_trick_and_its_rate(recipe):
    assert recipe.VARIANTS["tutorial"] == ("tutorial", [], 1, 0.001)


def test_ablation_and_search_exclude_each_other(recipe, capsys):
    app = cyclopts.App(default_command=recipe.main, result_action="return_value")
    with pytest.raises(SystemExit) as caught:
        app(["--ablate", "--search"])
    assert caught.value.code == 2
    assert "--ablate" in (error := capsys.readouterr().err)
    assert "--search" in error


@pytest.fixture(scope="module", params=[False, True], ids=["variants", "ablation"])
def trained(request, recipe):
    """What `fit` was called with, {variant: …}, and the comparison, of which no model was trained."""
    found = {}

    def fit(model, x, *, epochs, callbacks, **keywords):
        (run,) = callbacks
        found[run.variant] = types.SimpleNamespace(model=model, batches=x, epochs=epochs, **keywords)
        run.comparison._finish_run(run.variant, run.seed, {"test": {"accuracy": 0.5}}, {}, [2.0, 1.5])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(limit=300, epochs=15, ablate=request.param)
    return found, comparison, request.param


def test_the_two_views_have_rows_of_their_own_but_not_in_the_ablation(recipe, trained):
    _, comparison, ablate = trained
    rows = {row["variant"] for row in comparison.summary()}
    views = {"combined, 1/5 time, 2 views", "combined, 2 views"}
    assert rows == (set(recipe.without_each_trick()) if ablate else set(recipe.VARIANTS) | views)


def test_variants_train_for_their_share_of_the_epochs(recipe, trained):
    found, comparison, ablate = trained
    expected = {"tutorial": 15, "tutorial, cosine": 15, "combined, 1/5 time": 4, "combined": 14}
    if ablate:
        expected = dict.fromkeys(recipe.without_each_trick(), 14)
    assert {variant: fit.epochs for variant, fit in found.items()} == expected
    for row in comparison.summary():
        if "2 views" not in row["variant"]:
            assert row["figures"] == {"epochs": expected[row["variant"]], "seconds": 3.5}


def test_the_schedule_is_as_long_as_the_training(recipe, trained):
    for variant, fit in trained[0].items():
        network, tricks, _, rate = (recipe.VARIANTS | recipe.without_each_trick())[variant]
        assert type(fit.model.optimizer) is (keras.optimizers.Adam if network == "tutorial" else keras.optimizers.SGD)
        steps = 3 * fit.epochs
        assert len(fit.batches) == 3
        found = rates(fit.model.optimizer, steps + 1)
        if "cosine" in tricks:
            assert found[-2] < 0.1 * rate
            assert found[-1] == pytest.approx(0, abs=1e-6)
        else:
            assert found[-1] == pytest.approx(rate)
        assert found[0] == (0 if "warm-up" in tricks else pytest.approx(rate))
        assert max(found) == pytest.approx(rate, rel=0.05)


def test_images_are_mirrored_at_random_in_the_model_or_in_turn_in_the_batches(recipe, trained):
    for variant, fit in trained[0].items():
        at_random = any(isinstance(layer, layers.RandomFlip) for layer in fit.model.layers)
        assert at_random == (variant in ("combined, 1/5 time", "no alternation"))
        first, second = ({np.asarray(image).tobytes() for batch, _ in fit.batches for image in batch} for _ in range(2))
        alternates = not variant.startswith("tutorial") and not at_random and variant != "no mirroring"
        assert (first != second) == alternates


def test_label_smoothing_and_steps_per_execution_are_where_they_should_be(recipe, trained):
    logits, labels = np.array([[2.0, -1.0, 0.5]]), np.array([[0.0, 1.0, 0.0]])
    log_softmax = logits - np.log(np.exp(logits).sum())
    for variant, fit in trained[0].items():
        taught = variant.startswith("tutorial")
        smoothing = 0.0 if taught or variant == "no label smoothing" else 0.1
        expected = -(((1 - smoothing) * labels + smoothing / 3) * log_softmax).sum()
        assert float(array(fit.model.loss(labels, logits))) == pytest.approx(expected, rel=1e-5)
        several = not taught and variant != "no steps per execution"
        assert fit.model.steps_per_execution == (min(3, recipe.STEPS_PER_CALL) if several else 1)


def test_the_search_leaves_the_rate_that_is_taught_alone(recipe, monkeypatch):
    found = []

    def fit(model, *arguments, callbacks, **keywords):
        (run,) = callbacks
        found.append(run.variant)
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"accuracy": 0.5}}, {}, [2.0], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.1, 0.2))
    recipe.main(limit=300, epochs=1, search=True)
    assert found == [name for name in recipe.VARIANTS if name != "tutorial" for _ in range(2)]


def test_two_views_are_the_mean_of_the_logits_of_the_image_and_its_mirror_image(recipe):
    model = build(recipe, recipe.VARIANTS["combined"][1])
    expected = (array(model(IMAGES, training=False)) + array(model(IMAGES[:, :, ::-1], training=False))) / 2
    np.testing.assert_allclose(
        array(recipe.with_two_views(model)(IMAGES, training=False)), expected, rtol=1e-4, atol=1e-5
    )
