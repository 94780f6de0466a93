import keras
import numpy as np
import pytest
from keras import layers

IMAGES = np.random.default_rng(0).random((10, 9, 8, 3)).astype("float32")
KINDS = ("noise", "blur", "contrast")


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("augmentation/augmentation_robustness")


def generator():
    return np.random.default_rng(1)


# Corruptions


@pytest.mark.parametrize("kind", KINDS)
def test_severity_0_is_the_identity_and_each_next_one_changes_more(recipe, kind):
    np.testing.assert_array_equal(recipe.corrupt(IMAGES, kind, 0, generator()), IMAGES)
    corrupted = [recipe.corrupt(IMAGES, kind, severity, generator()) for severity in range(6)]
    changes = [np.abs(each - IMAGES).mean() for each in corrupted]
    assert changes == sorted(changes)
    assert len(set(changes)) == 6
    assert all(each.dtype == "float32" and each.min() >= 0 and each.max() <= 1 for each in corrupted)


def test_noise_blur_and_contrast_are_what_they_are_called(recipe):
    grey = np.full((50, 20, 20, 1), 0.5, "float32")
    # Clipping at 0 and 1 is 5 deviations away.
    noisy = recipe.corrupt(grey, "noise", 2, generator())
    assert noisy.std() == pytest.approx(0.12, rel=0.02)
    assert noisy.mean() == pytest.approx(0.5, abs=0.003)
    point = np.zeros((1, 21, 21, 1), "float32")
    point[0, 10, 10] = 1
    offsets = np.arange(21) - 10
    weights = np.exp(-(offsets**2) / 2 / (0.4 * 4) ** 2)
    expected = np.outer(weights, weights) / weights.sum() ** 2
    np.testing.assert_allclose(recipe.corrupt(point, "blur", 4, generator())[0, :, :, 0], expected, atol=1e-4)
    pale = recipe.corrupt(IMAGES, "contrast", 5, generator())
    means = IMAGES.mean(axis=(1, 2, 3))
    np.testing.assert_allclose(pale.mean(axis=(1, 2, 3)), means, rtol=1e-5)
    expected = 0.1 * (IMAGES - means[:, None, None, None])
    np.testing.assert_allclose(pale - means[:, None, None, None], expected, atol=1e-6)


def test_all_corruptions_are_the_same_each_time_with_severities_in_turn(recipe):
    corrupted = recipe.corrupt_all(IMAGES)
    np.testing.assert_array_equal(corrupted, recipe.corrupt_all(IMAGES))
    assert corrupted.shape == (3, *IMAGES.shape)
    for number in range(10):
        # The seventh image has the second severity, in its own place.
        severity = number % 5 + 1
        for kind, found in zip(KINDS[1:], corrupted[1:], strict=True):
            expected = recipe.corrupt(IMAGES[number : number + 1], kind, severity, generator())[0]
            np.testing.assert_allclose(found[number], expected, atol=1e-6)


# Augmentation


def test_data_set_gives_each_image_once_an_epoch_with_its_label_in_a_new_order(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "PART", 4)
    images, labels = np.arange(10, dtype="float32").reshape(10, 1, 1, 1), np.arange(10)
    sizes = []

    def augmentation(part, training):
        assert training
        sizes.append(len(part))
        return part + 100

    keras.utils.set_random_seed(0)
    data = recipe.Augmented(images, labels, augmentation, batch_size=3)
    orders = []
    for _ in range(2):
        data.on_epoch_begin()
        batches = [data[index] for index in range(len(data))]
        assert [len(batch) for _, batch in batches] == [3, 3, 3, 1]
        pictures, order = (np.concatenate(parts) for parts in zip(*batches, strict=True))
        # From the clean images, not from those of the last epoch.
        np.testing.assert_array_equal(pictures.ravel(), order + 100)
        orders.append(order.tolist())
    assert sizes == [4, 4, 2] * 2
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(10))


@pytest.fixture(scope="module")
def experiment(recipe):
    """main, with AugMix and without it: (comparison, {variant: fed images of each epoch}, AugMix's draws)."""
    fit, on_epoch_begin = keras.Model.fit, recipe.Augmented.on_epoch_begin
    draw = layers.AugMix.get_random_transformation
    fed, draws = {}, []

    def spy_on_fit(model, data, *arguments, callbacks, **keywords):
        (run,) = callbacks
        data.variant = run.variant
        return fit(model, data, *arguments, callbacks=callbacks, **keywords)

    def spy_on_epoch(data):
        on_epoch_begin(data)
        fed.setdefault(data.variant, []).append((data.images, data.labels))

    def spy_on_draw(layer, *arguments, **keywords):
        drawn = draw(layer, *arguments, **keywords)
        chains = [[each["layer_name"] for each in chain] for chain in drawn["chain_transforms"]]
        draws.append((layer.value_range, chains))
        return drawn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", spy_on_fit)
        patch.setattr(recipe.Augmented, "on_epoch_begin", spy_on_epoch)
        patch.setattr(layers.AugMix, "get_random_transformation", spy_on_draw)
        patch.setattr(recipe, "PART", 16)
        kept = ("no augmentation", "AugMix")
        patch.setattr(recipe, "VARIANTS", {name: recipe.VARIANTS[name] for name in kept})
        comparison = recipe.main(epochs=2, limit=64)
    return comparison, fed, draws


def test_augmix_draws_its_operations_anew_for_each_part_and_epoch(experiment):
    _, _, draws = experiment
    # Keras draws a few times more when it builds the layer.
    assert len(draws) >= 2 * 4
    assert len({str(chains) for _, chains in draws}) > 4
    assert all(tuple(value_range) == (0, 1) for value_range, _ in draws)


def test_training_images_are_augmented_and_remain_between_0_and_1(recipe, experiment):
    _, fed, _ = experiment
    (clean, labels), *_ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 64)
    place = {image.tobytes(): label for image, label in zip(clean, labels, strict=True)}
    for images, given in fed["no augmentation"]:
        assert [place[image.tobytes()] for image in images] == given.tolist()
    for images, given in fed["AugMix"]:
        assert images.shape == clean.shape
        assert images.min() >= 0
        assert 0.1 < images.max() <= 1
        assert sorted(given) == sorted(labels)
        # A mixture with the clean image: changed, and yet like it.
        assert np.mean([image.tobytes() in place for image in images]) < 0.5
        # The order is known by the labels alone; the nearest clean image mostly has the same one.
        nearest = [np.abs(clean - image).sum(axis=(1, 2, 3)).argmin() for image in images]
        assert np.mean(labels[nearest] == given) > 0.6


def test_accuracy_is_the_mean_over_the_corruptions_which_are_figures_beside_the_clean_one(experiment):
    comparison, _, _ = experiment
    for run in comparison.result.runs:
        figures = {
            each["name"]: each["value"] for each in comparison.result.figures if each["variant"] == run["variant"]
        }
        assert list(figures) == ["clean", *KINDS]
        mean = np.mean([figures[kind] for kind in KINDS])
        assert run["metrics"]["test"]["accuracy"] == pytest.approx(mean, abs=1e-6)


def test_layers_are_told_the_range_of_the_values(recipe):
    (augment,) = recipe.new_augmentation("RandAugment").layers
    assert isinstance(augment, layers.RandAugment)
    assert tuple(augment.value_range) == (0, 1)
    (mix,) = recipe.new_augmentation("AugMix").layers
    assert isinstance(mix, layers.AugMix)
    assert tuple(mix.value_range) == (0, 1)
    # What would resemble the corruptions of the test.
    assert not mix.all_ops
    flip, shift = recipe.new_augmentation("flips and shifts").layers
    assert isinstance(flip, layers.RandomFlip)
    assert isinstance(shift, layers.RandomTranslation)
    np.testing.assert_array_equal(recipe.new_augmentation("none")(IMAGES, training=True), IMAGES)


def test_test_images_are_the_same_for_all_and_not_used_in_a_search(recipe, monkeypatch):
    tested = []

    def spy_on(method):
        def use(model, x=None, *arguments, **keywords):
            tested.append(x)
            return method(model, x, *arguments, **keywords)

        return use

    for name in ("evaluate", "predict"):
        monkeypatch.setattr(keras.Model, name, spy_on(getattr(keras.Model, name)))
    variants = {"no augmentation": ("none", 0.003), "twice": ("none", 0.003)}
    monkeypatch.setattr(recipe, "VARIANTS", variants)
    monkeypatch.setattr(recipe, "GRID", (0.01,))
    recipe.main(epochs=1, limit=20)
    assert len(tested) == 2 * (2 + 1 + 1 + len(KINDS))  # validation twice, all corruptions, clean and each alone
    first, second = tested[: len(tested) // 2], tested[len(tested) // 2 :]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    _, (validation, _), _, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 20)
    tested.clear()
    recipe.main(epochs=1, limit=20, search=True, seeds=1)
    assert len(tested) == 2 * 2
    assert all(np.array_equal(images, validation) for images in tested)
