import keras
import numpy as np
import pytest
import tensorflow_datasets as tfds

from evidence.recipes import ROOT


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("losses/class_imbalance")


@pytest.fixture(scope="module")
def loaded(recipe):
    return recipe.load("lending_club", ROOT / "data", None)


def test_numbers_are_standardised_by_the_training_rows_and_categories_are_columns(loaded):
    train, validation, test, classes = loaded
    assert classes == 2
    assert [inputs.shape for inputs, _ in (train, validation, test)] == [(5914, 119), (1972, 119), (1971, 119)]
    is_category = np.all((train[0] == 0) | (train[0] == 1), axis=0)
    # Loans last 36 or 60 months, have 35 grades, are of 50 states, verified in three ways, after 12 times in a job.
    assert is_category.sum() == 2 + 35 + 50 + 3 + 12
    np.testing.assert_array_equal(train[0][:, is_category].sum(axis=1), 5)
    numbers = train[0][:, ~is_category]
    np.testing.assert_allclose(numbers.mean(axis=0), 0, atol=1e-4)
    np.testing.assert_allclose(numbers.std(axis=0), 1, rtol=1e-3)
    # The columns are in the order of their names, and those of the test rows are scaled by the same numbers.
    raw, info = tfds.load(
        "lending_club", data_dir=ROOT / "data", split=["train", "test"], batch_size=-1, with_info=True
    )
    widths = {name: getattr(feature, "num_classes", 1) for name, feature in info.features["loan"].items()}
    column = sum(width for name, width in widths.items() if name < "int_rate")
    rates = [table["loan"]["int_rate"] for table in tfds.as_numpy(raw)]
    for (inputs, _), own in zip((train, test), rates, strict=True):
        np.testing.assert_allclose(inputs[:, column], (own - rates[0].mean()) / rates[0].std(), atol=1e-4)


def test_of_images_the_last_class_is_thinned_to_one_in_a_hundred_of_all_others(recipe):
    train, validation, test, classes = recipe.load("fashion_mnist_10k", ROOT / "data", None)
    assert classes == 10
    images = tfds.load("fashion_mnist_10k", data_dir=ROOT / "data", split="test", batch_size=-1)["image"]
    np.testing.assert_array_equal(test[0], images.numpy().reshape(10_000, 784) / np.float32(255))
    for inputs, labels in (train, validation, test):
        thin_inputs, thin_labels = recipe.thinned(inputs, labels, 9)
        others = np.sum(labels != 9)
        assert np.bincount(thin_labels).tolist() == [others, others // 100]
        np.testing.assert_array_equal(thin_inputs[thin_labels == 1], inputs[labels == 9][: others // 100])
        np.testing.assert_array_equal(thin_inputs[thin_labels == 0], inputs[labels != 9])
    with pytest.raises(ValueError, match="class 9"):
        recipe.thinned(inputs[labels < 9], labels[labels < 9], 9)


def step(recipe, inputs, labels, **arguments):
    """Return the weights after one step of plain gradient descent on the sum of the losses."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1, activation="sigmoid")])
    loss = keras.losses.BinaryCrossentropy(reduction="sum")
    model.compile(keras.optimizers.SGD(0.01), loss)
    model.fit(inputs, labels, batch_size=len(labels), verbose=0, **arguments)
    return model.get_weights()


def test_weight_is_as_many_repetitions(recipe):
    generator = np.random.default_rng(0)
    inputs, labels = generator.normal(size=(8, 3)).astype("float32"), np.array([0, 1, 0, 0, 1, 0, 0, 0])
    repeated = recipe.resampled(inputs, labels, 3)
    assert len(repeated[1]) == 6 + 2 * 3
    weighted = step(recipe, inputs, labels, class_weight={0: 1.0, 1: 3.0})
    plain = step(recipe, inputs, labels)
    for one, other, without in zip(weighted, step(recipe, *repeated), plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
        assert not np.allclose(one, without)


def test_focal_loss_is_cross_entropy_for_gamma_0_and_less_of_it_for_what_is_right():
    labels, probabilities = np.array([[1.0], [0.0], [1.0]]), np.array([[0.9], [0.4], [0.2]])
    right = np.array([0.9, 0.6, 0.2])
    for gamma in (0.0, 2.0):
        found = keras.losses.BinaryFocalCrossentropy(gamma=gamma, reduction=None)(labels, probabilities)
        expected = -((1 - right) ** gamma) * np.log(right)
        np.testing.assert_allclose(keras.ops.convert_to_numpy(found), expected, rtol=1e-5)


def test_average_precision_is_the_mean_of_the_precisions_at_each_find(recipe):
    labels = np.array([1, 0, 1, 0, 0, 1])
    # Ranks: 1 (found), 2, 3 (found), 4, 5, 6 (found).
    assert recipe.average_precision(np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), labels) == pytest.approx(
        (1 + 2 / 3 + 3 / 6) / 3
    )
    # Nothing but the order counts.
    logits = np.random.default_rng(0).normal(size=200)
    many = np.random.default_rng(1).integers(0, 2, 200)
    first = recipe.average_precision(1 / (1 + np.exp(-logits)), many)
    assert first == pytest.approx(recipe.average_precision(1 / (1 + np.exp(-3 * logits - 2)), many))
    metric = keras.metrics.AUC(curve="PR", num_thresholds=5000)
    assert first == pytest.approx(float(metric(many, 1 / (1 + np.exp(-logits)))), abs=0.01)


def test_threshold_is_the_best_one(recipe):
    probabilities, labels = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0, 0, 1, 1])
    assert recipe.best_threshold(probabilities, labels) == 0.3
    assert recipe.balanced_accuracy(probabilities, labels, 0.3) == 1
    # Of the ones half is found, of the zeros all.
    assert recipe.balanced_accuracy(probabilities, labels, 0.4) == 0.75
    assert recipe.balanced_accuracy(probabilities, labels, 0.5) == 0.5


def test_remedies_are_used_in_training(recipe):
    found = {}

    def fit(model, inputs, labels, *, class_weight, **keywords):
        found[len(found)] = (len(labels), class_weight, model.loss.name)
        return type("History", (), {"history": {}})()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", fit)
        comparison = recipe.main()
    # 330 of 5914 went bad: one in 17 of the others.
    plain, weight, resampling, focal = found.values()
    assert plain == (5914, None, "binary_crossentropy")
    assert weight == (5914, {0: 1.0, 1: 17.0}, "binary_crossentropy")
    assert resampling[0] == 5914 + 16 * 330 and resampling[1] is None
    assert focal == (5914, None, "binary_focal_crossentropy")
    assert [run["variant"] for run in comparison.result.runs] == list(recipe.VARIANTS)
