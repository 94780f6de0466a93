import keras
import numpy as np
import pytest
from keras import layers

LIMIT, EPOCHS = 200, 3
ALL = ["flip", "translation", "erasing"]


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("augmentation/image_augmentation")


def augmented(recipe, kinds, images, labels=None):
    """Return images and labels of an epoch, by default one for each image."""
    keras.utils.set_random_seed(0)
    labels = np.arange(len(images)) if labels is None else labels
    dataset = recipe.batches(images, labels, recipe.build_augmentation(kinds), len(images) // 2, seed=0)
    return [np.concatenate(arrays) for arrays in zip(*dataset.as_numpy_iterator(), strict=True)]


def test_flip_mirrors_every_second_image_from_left_to_right(recipe):
    images = np.random.default_rng(0).random((400, 5, 4, 2)).astype("float32")
    found, labels = augmented(recipe, ["flip"], images)
    originals = images[labels]
    is_same = (found == originals).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(found[~is_same], originals[~is_same][:, :, ::-1])
    assert abs(is_same.mean() - 0.5) < 4 * 0.5 / np.sqrt(400)


def test_translation_moves_by_up_to_a_tenth_of_the_side_in_whole_pixels(recipe):
    images = np.zeros((400, 20, 30, 1), "float32")
    images[:, 10, 15] = 1
    found, _ = augmented(recipe, ["translation"], images)
    assert set(np.unique(found)) == {0, 1}
    _, rows, columns, _ = np.nonzero(found)
    assert len(rows) == 400
    assert set(rows - 10) == set(range(-2, 3))
    assert set(columns - 15) == set(range(-3, 4))
    # What comes in is black.
    found, _ = augmented(recipe, ["translation"], np.ones((400, 20, 30, 1), "float32"))
    shares = 1 - found.mean(axis=(1, 2, 3))
    assert 0.1 < shares.max() <= 1 - 0.9**2 + 1e-6


def test_erasing_blots_out_a_rectangle_of_every_second_image(recipe):
    side = 40
    images = np.full((600, side, side, 1), 0.5, "float32")
    found, _ = augmented(recipe, ["erasing"], images)
    erased = (found != 0.5)[..., 0]
    is_erased = erased.any(axis=(1, 2))
    assert abs(is_erased.mean() - 0.5) < 4 * 0.5 / np.sqrt(600)
    shares = erased[is_erased].mean(axis=(1, 2))
    # Each side of the rectangle is rounded to whole pixels.
    assert np.all(shares > 0.02 - 2 / side)
    assert np.all(shares < 0.33 + 2 / side)
    assert np.ptp(shares) > 0.2
    for mask in erased[is_erased][:50]:
        assert np.prod(np.ptp(np.argwhere(mask), axis=0) + 1) == mask.sum()
    noise = found[erased[..., None]]
    assert (noise.min(), noise.max()) == (0, 1)
    assert np.std(noise) > 0.2


def test_labels_stay_with_their_images(recipe):
    number, side = 100, 20
    values = np.float32(np.arange(1, number + 1) / (number + 1))
    images = np.broadcast_to(values[:, None, None, None], (number, side, side, 1))
    found, labels = augmented(recipe, ALL, np.ascontiguousarray(images))
    np.testing.assert_array_equal(np.sort(labels), np.arange(number))
    changed = 0
    for image, label in zip(found, labels, strict=True):
        known, counts = np.unique(image[(image > 0) & (image < 1)], return_counts=True)
        assert known[counts.argmax()] == values[label]
        changed += counts.max() < side * side
    assert changed > 0.8 * number


def test_in_the_model_images_change_in_training_only(recipe):
    keras.utils.set_random_seed(0)
    model = recipe.build_model((12, 12, 1), 3, recipe.build_augmentation(ALL))
    plain = recipe.build_model((12, 12, 1), 3)
    plain.set_weights([np.array(variable) for variable in model.trainable_variables])
    images = np.random.default_rng(1).random((16, 12, 12, 1)).astype("float32")
    expected = plain.predict(images, verbose=0)
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, rtol=1e-5, atol=1e-6)
    first, second = (np.array(keras.ops.convert_to_numpy(model(images, training=True))) for _ in range(2))
    assert not np.allclose(first, expected, rtol=0.01)
    assert not np.allclose(first, second, rtol=0.01)


@pytest.fixture(scope="module")
def experiment(recipe):
    """main, without training: (comparison, {variant: (model, images of two epochs, keywords)})."""
    calls = {}

    def fit(model, dataset, *, callbacks, **keywords):
        (run,) = callbacks
        epochs = [np.concatenate([images for images, _ in dataset.as_numpy_iterator()]) for _ in range(2)]
        calls[run.variant] = model, epochs, keywords
        run.comparison.add(run.variant, run.seed, {"accuracy": 0.5})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(limit=LIMIT, epochs=EPOCHS)
    return comparison, calls


def test_each_variant_changes_training_images_anew_in_each_epoch_and_no_others(recipe, experiment):
    train, validation, _, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, LIMIT)
    originals = {image.tobytes() for image in train[0]}
    # Shares of images that are left as they are: rarely one is not moved by half a pixel.
    expected = {
        "none": (1, 1),
        "flip": (0.3, 0.7),
        "translation": (0, 0.15),
        "erasing": (0.3, 0.7),
        "all": (0, 0.1),
        "all, in the model": (1, 1),
    }
    assert list(recipe.VARIANTS) == list(expected)
    for variant, (model, epochs, keywords) in experiment[1].items():
        lowest, highest = expected[variant]
        seen = [{image.tobytes() for image in images} for images in epochs]
        for images in epochs:
            assert images.shape == train[0].shape
            assert lowest <= np.mean([image.tobytes() in originals for image in images]) <= highest
        assert (seen[0] == seen[1]) == (highest == 1)
        np.testing.assert_array_equal(keywords["validation_data"][0], validation[0])
        inside = [layer for layer in model.layers if isinstance(layer, layers.Pipeline)]
        assert len(inside) == (variant == "all, in the model")
        assert all(len(layer.layers) == 3 for layer in inside)


def test_rates_are_those_of_the_variants_and_fall_to_zero(recipe, experiment):
    for variant, (model, _, keywords) in experiment[1].items():
        rate = recipe.VARIANTS[variant][-1]
        # Two steps an epoch.
        rates = [float(model.optimizer._learning_rate(step)) for step in (0, 2 * keywords["epochs"])]
        assert rates == pytest.approx([rate, 0], abs=1e-9)
        assert rate in recipe.GRID


def test_search_tries_each_rate_with_what_the_variant_has_beside_it(recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, callbacks, **keywords):
        (run,) = callbacks
        seen.append((run.variant, pytest.approx(float(model.optimizer._learning_rate(0)))))
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"accuracy": 0.5}}, {}, [], rate=run.rate)

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    recipe.main(search=True, limit=LIMIT, epochs=1)
    # In the model, the rate of the pipeline is taken.
    assert seen == [(variant, rate) for variant in list(recipe.VARIANTS)[:-1] for rate in (0.01, 0.02)]
    assert recipe.VARIANTS["all, in the model"] == (ALL, True, recipe.VARIANTS["all"][-1])
