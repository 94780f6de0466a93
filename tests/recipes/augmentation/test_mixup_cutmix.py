import types

import keras
import numpy as np
import pytest

SIDE = 4
NUMBER = SIDE * SIDE  # as many images as pixels
LIMIT, EPOCHS = 200, 3


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("augmentation/mixup_cutmix")


def mixed(recipe, variant, images, repetitions=1):
    """Return images and labels of `repetitions` epochs, each image having been of a class of its own."""
    keras.utils.set_random_seed(0)
    layer, strength, _ = recipe.VARIANTS[variant]
    mixing = None if layer is None else layer(strength)
    dataset = recipe.batches(images, np.eye(len(images), dtype="float32"), mixing, len(images), seed=0)
    batches = [batch for _ in range(repetitions) for batch in dataset.as_numpy_iterator()]
    return [np.concatenate(arrays) for arrays in zip(*batches, strict=True)]


def share_of_two(labels):
    """Return the share of one of the two classes that each label consists of; a class mixed with itself is left out."""
    assert np.all((labels > 0).sum(axis=1) <= 2)
    np.testing.assert_allclose(labels.sum(axis=1), 1, rtol=1e-5)
    return np.array([row[row.argmax()] if row.max() == 1 else row[np.flatnonzero(row)[0]] for row in labels])


@pytest.mark.parametrize("variant", ["MixUp 0.2", "MixUp 1"])
def test_mixup_mixes_images_and_labels_in_the_same_proportion(recipe, variant):
    # Pixel i is 1 in image i alone: where λ is the same, a mixture looks like its label.
    images = np.eye(NUMBER, dtype="float32").reshape(NUMBER, SIDE, SIDE, 1)
    found, labels = mixed(recipe, variant, images, repetitions=5)
    np.testing.assert_allclose(found.reshape(-1, NUMBER), labels, atol=1e-6)
    shares = share_of_two(labels)
    assert np.mean((shares > 0.001) & (shares < 0.999)) > 0.3


def test_cutmix_pastes_a_rectangle_whose_area_is_the_share_of_the_label(recipe):
    side, number = 32, 16
    # Each pixel tells of which image and place it is.
    images = np.arange(number * side * side, dtype="float32").reshape(number, side, side, 1)
    found, labels = mixed(recipe, "CutMix", images, repetitions=5)
    sources, places = np.divmod(found[..., 0].astype(int), side * side)
    np.testing.assert_array_equal(places, np.broadcast_to(np.arange(side * side).reshape(side, side), places.shape))
    pasted = 0
    for source, label in zip(sources, labels, strict=True):
        assert set(np.unique(source)) <= set(np.flatnonzero(label))
        areas = {number: np.argwhere(source == number) for number in np.unique(source)}
        # Of the two parts at least one fills its bounding box: the pasted rectangle.
        boxes = {key: np.prod(np.ptp(each, axis=0) + 1) for key, each in areas.items()}
        assert any(boxes[key] == len(each) for key, each in areas.items())
        for key, each in areas.items():
            # Each side of the rectangle is rounded to whole pixels.
            assert len(each) / side**2 == pytest.approx(label[key], abs=(2 * side + 1) / side**2)
        pasted += len(areas) == 2
    assert pasted > 0.5 * len(labels)


@pytest.mark.parametrize("variant, alpha", [("MixUp 0.2", 0.2), ("MixUp 1", 1), ("CutMix", 1)])
def test_proportions_are_drawn_from_the_beta_distribution(recipe, variant, alpha):
    labels = mixed(recipe, variant, np.zeros((100, 8, 8, 1), "float32"), repetitions=40)[1]
    shares = share_of_two(labels)
    # The variance of Beta(α, α), about its mean of a half; a hundredth are mixed with themselves.
    assert np.mean((shares - 0.5) ** 2) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_without_mixing_images_are_shuffled_only(recipe):
    images = np.random.default_rng(0).random((NUMBER, SIDE, SIDE, 1)).astype("float32")
    found, labels = mixed(recipe, "no mixing", images)
    np.testing.assert_array_equal(found, images[labels.argmax(axis=1)])
    assert not np.array_equal(found, images)
    np.testing.assert_array_equal(np.sort(labels.argmax(axis=1)), np.arange(NUMBER))


@pytest.fixture(scope="module")
def experiment(recipe):
    """main, without training: (comparison, {variant: (model, batches of an epoch, keywords)})."""
    calls = []

    def fit(model, dataset, **keywords):
        calls.append((model, list(dataset.as_numpy_iterator()), keywords))
        return types.SimpleNamespace(history={"val_accuracy": [0.5] * EPOCHS})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main(limit=LIMIT, epochs=EPOCHS)
    return comparison, dict(zip(recipe.VARIANTS, calls, strict=True))


def test_only_training_data_are_mixed_in_each_variant_but_the_baseline(recipe, experiment):
    train, validation, _, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, LIMIT)
    originals = {image.tobytes() for image in train[0]}
    for variant, (_, batches, keywords) in experiment[1].items():
        assert [len(images) for images, _ in batches] == [128, LIMIT - 128]
        kept = np.mean([image.tobytes() in originals for images, _ in batches for image in images])
        hard = np.mean([label.max() == 1 for _, labels in batches for label in labels])
        if variant == "no mixing":
            assert kept == hard == 1
        else:
            assert kept < 0.7
            assert hard < 0.7
        np.testing.assert_array_equal(keywords["validation_data"][0], validation[0])
        np.testing.assert_array_equal(keywords["validation_data"][1].argmax(axis=1), validation[1])


def test_figures_are_those_of_the_test_images(recipe, experiment):
    comparison, calls = experiment
    _, _, (images, labels), _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, LIMIT)
    named = {(entry["variant"], entry["name"]): entry["value"] for entry in comparison.result.figures}
    for run in comparison.result.runs:
        logits = np.float64(calls[run["variant"]][0].predict(images, verbose=0))
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        sums = {}
        for row, label in zip(probabilities, labels, strict=True):
            place = min(int(max(row) * 15), 14)
            sums[place] = sums.get(place, 0) + (row.argmax() == label) - max(row)
        assert run["metrics"]["test"] == {
            "log-loss": pytest.approx(-np.log(probabilities[np.arange(LIMIT), labels]).mean(), rel=1e-5),
            "accuracy": pytest.approx(np.mean(logits.argmax(axis=1) == labels)),
            "calibration error": pytest.approx(sum(abs(each) for each in sums.values()) / LIMIT, rel=1e-4),
        }
        for name in ("log-loss", "calibration error"):
            assert named[run["variant"], name] == run["metrics"]["test"][name]
    assert {name for _, name in named} == set(comparison.result.columns)


def test_variants_start_equal_and_their_rates_fall_to_zero(recipe, experiment):
    models = [model for model, _, _ in experiment[1].values()]
    for model, (_, _, rate) in zip(models, recipe.VARIANTS.values(), strict=True):
        for weight, expected in zip(model.get_weights(), models[0].get_weights(), strict=True):
            np.testing.assert_array_equal(weight, expected)
        # Two steps an epoch.
        rates = [float(model.optimizer._learning_rate(step)) for step in (0, 2 * EPOCHS)]
        assert rates == pytest.approx([rate, 0], abs=1e-9)
        assert rate in recipe.GRID


def test_search_tries_each_rate_with_each_layer(recipe, monkeypatch):
    seen = []

    def fit(model, *arguments, callbacks, **keywords):
        (run,) = callbacks
        seen.append((run.variant, pytest.approx(float(model.optimizer._learning_rate(0)))))
        run.comparison._finish_run(run.variant, run.seed, {"validation": {"accuracy": 0.5}}, {}, [], rate=run.rate)
        return types.SimpleNamespace(history={})

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    recipe.main(search=True, limit=LIMIT, epochs=1)
    assert seen == [(variant, rate) for variant in recipe.VARIANTS for rate in (0.01, 0.02)]
