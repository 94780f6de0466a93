from types import SimpleNamespace

import keras
import numpy as np
import pytest

WIDTHS = [4, 16, 64, 256]


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("architectures/model_capacity")


def parameters(width, pixels, classes):
    """Return the number of weights and biases of the hidden layer and of the last."""
    return pixels * width + width + width * classes + classes


@pytest.mark.parametrize("image_shape, classes", [((28, 28, 1), 10), ((9, 11, 3), 3)])
def test_the_number_of_parameters_is_that_of_the_formula(recipe, image_shape, classes):
    assert {f"width {width}": width for width in WIDTHS} == {
        name: width for name, (width, _) in recipe.VARIANTS.items()
    }
    for width in WIDTHS:
        model = recipe.build_model(image_shape, classes, width)
        assert model.count_params() == parameters(width, np.prod(image_shape), classes)
    # By hand, for the embedded images and 16 units: 784 × 16 + 16 and 16 × 10 + 10.
    assert recipe.build_model((28, 28, 1), 10, 16).count_params() == 12560 + 170


def test_the_network_is_two_products_with_a_relu_between_them(recipe):
    keras.utils.set_random_seed(0)
    model = recipe.build_model((4, 5, 1), 3, 16)
    images = np.random.default_rng(0).random((8, 4, 5, 1)).astype("float32")
    kernel, bias, last_kernel, last_bias = model.get_weights()
    hidden = np.maximum(images.reshape(8, -1) @ kernel + bias, 0)
    np.testing.assert_allclose(model(images), hidden @ last_kernel + last_bias, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def observed(recipe):
    """A comparison of two widths and two seeds without training, and what its fits and evaluations were given.

    A fit is (seed, width, images, labels, whether it is a run of the comparison); an evaluation (width, data).
    """
    fits, evaluations, seeds = [], [], []
    set_random_seed = keras.utils.set_random_seed

    class History:
        history = {"val_loss": [0.9, 0.4, 0.3, 0.5]}

    def fit(model, images, labels, *, callbacks, **keywords):
        width = model.layers[-1].kernel.shape[0]
        fits.append((seeds[-1], width, images, labels, bool(callbacks)))
        for run in callbacks:
            metrics = {"train": {"accuracy": 0.9}, "test": {"accuracy": 0.7 + width / 1000}}
            run.comparison._finish_run(run.variant, run.seed, metrics, {}, [])
        return History

    def evaluate(model, images, labels, **keywords):
        evaluations.append((model.layers[-1].kernel.shape[0], images, labels))
        return {"loss": 1.0, "accuracy": len(images) / 100}

    def seed(number):
        seeds.append(number)
        set_random_seed(number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "VARIANTS", {"width 4": (4, 0.01), "width 16": (16, 0.02)})
        patch.setattr(keras.Model, "fit", fit)
        patch.setattr(keras.Model, "evaluate", evaluate)
        patch.setattr(keras.utils, "set_random_seed", seed)
        return recipe.main(limit=64, seeds=2), fits, evaluations


def distinct(images):
    return {image.tobytes() for image in images}


def test_a_smaller_set_is_part_of_the_larger_and_repeated_to_its_length(observed, recipe):
    _, fits, _ = observed
    (images, labels), _, _, _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, 64)
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    assert [(seed, width) for seed, width, *_ in fits] == [(s, w) for s in (0, 1) for w in (4, 16) for _ in range(3)]
    for position in range(0, len(fits), 3):
        sets = [distinct(images) for _, _, images, _, _ in fits[position : position + 3]]
        assert [len(each) for each in sets] == [4, 16, 64]
        assert sets[0] < sets[1] < sets[2]
        for _, _, given, given_labels, _ in fits[position : position + 3]:
            assert len(given) == len(given_labels) == 64
            assert [label_of[image.tobytes()] for image in given] == list(given_labels)
            counts = np.unique([image.tobytes() for image in given], return_counts=True)[1]
            assert set(counts) == {64 // len(distinct(given))}
    # Every width of a seed sees the same sets, every seed others.
    assert distinct(fits[0][2]) == distinct(fits[3][2])
    assert distinct(fits[0][2]) != distinct(fits[6][2])


def test_only_the_whole_set_is_a_run_of_the_comparison_and_the_others_are_evaluated_on_their_own_images(observed):
    _, fits, evaluations = observed
    assert [is_run for *_, is_run in fits] == [False, False, True] * 4
    smaller = [fit for fit in fits if not fit[-1]]
    for fit, on_train, on_test in zip(smaller, evaluations[::2], evaluations[1::2], strict=True):
        assert fit[1] == on_train[0] == on_test[0]
        assert distinct(fit[2]) == distinct(on_train[1])
        assert len(on_train[1]) == len(distinct(on_train[1]))
        assert len(on_test[1]) == 64
        assert not distinct(on_test[1]) & distinct(fits[2][2])


def test_figures_and_signals_are_those_of_the_evaluations(observed):
    comparison, _, _ = observed
    for row, width in zip(comparison.summary(), (4, 16), strict=True):
        count = parameters(width, 784, 10)
        assert row["figures"] == {"parameters": count}
        for signal in comparison.result.signals:
            if signal["variant"] == row["variant"]:
                assert (signal["by"], signal["at"]) == ("number of training images", ["4", "16", "64"])
                whole = 0.7 + width / 1000
                expected = {
                    "test accuracy": [0.64, 0.64, whole],
                    "gap": [0.04 - 0.64, 0.16 - 0.64, 0.9 - whole],
                    "best epoch": [3, 3, 3],
                }[signal["name"]]
                assert signal["values"] == pytest.approx(expected)
    assert len(comparison.result.signals) == 2 * 2 * 3
    assert comparison.result.columns.keys() == {"parameters"}


@pytest.mark.parametrize("search", [False, True])
def test_all_sets_are_trained_at_a_rate_that_falls_to_zero_and_a_search_takes_the_whole_one(
    search, recipe, monkeypatch
):
    seen = []

    def fit(model, images, *arguments, epochs, callbacks, **keywords):
        # Without training.
        schedule = model.optimizer._learning_rate
        first, last = (float(schedule(step)) for step in (0, 2 * epochs))
        seen.append((len(distinct(images)), pytest.approx(first), pytest.approx(last, abs=1e-9)))
        for run in callbacks:
            metrics = (
                {"validation": {"accuracy": 0.5}} if search else dict.fromkeys(["train", "test"], {"accuracy": 0.5})
            )
            run.comparison._finish_run(run.variant, run.seed, metrics, {}, [], rate=run.rate)
        return SimpleNamespace(history={"val_loss": [0.5]})

    monkeypatch.setattr(keras.Model, "fit", fit)
    monkeypatch.setattr(recipe, "VARIANTS", {"width 4": (4, 0.003), "width 16": (16, 0.001)})
    monkeypatch.setattr(recipe, "GRID", (0.01, 0.02))
    comparison = recipe.main(search=search, epochs=2, limit=160)
    if search:
        assert seen == [(160, rate, 0.0) for rate in (0.01, 0.02, 0.01, 0.02)]
        assert [row["means"].keys() for row in comparison.result.search_summary()] == [{0.01, 0.02}] * 2
    else:
        assert seen == [(size, rate, 0.0) for rate in (0.003, 0.001) for size in (10, 40, 160)]
