import keras
import numpy as np
import pytest

CLASSES = 3


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("transfer/fine_tuning")


@pytest.fixture(scope="module")
def data():
    generator = np.random.default_rng(0)
    # Unlike what the moving statistics begin with.
    return generator.normal(3, 2, size=(16, 8, 8, 1)).astype("float32"), generator.integers(0, CLASSES, 16)


def train(recipe, data, kind, epochs=2):
    """Return a base before and after training for 2 steps an epoch: its weights by name, and the model."""
    keras.utils.set_random_seed(0)
    base = recipe.build_base(data[0].shape[1:])
    model = recipe.build_model(base, CLASSES, kind)
    before = weights_of(base)
    recipe.compile_and_fit(model, data, epochs, 8, recipe.new_optimizer(kind, 0.01, 2 * epochs), shuffle=False)
    return before, weights_of(base), model


def weights_of(model):
    return {weight.path: np.array(keras.ops.convert_to_numpy(weight)) for weight in model.weights}


def changed(before, after):
    """Return the names of the kinds of weights that differ."""
    return {path.rpartition("/")[2] for path in before if not np.array_equal(before[path], after[path])}


def test_frozen_base_is_equal_to_the_bit_after_training(recipe, data):
    before, after, model = train(recipe, data, "frozen")
    assert changed(before, after) == set()
    assert len(before) == 15
    # The head alone.
    assert sum(np.prod(weight.shape) for weight in model.trainable_variables) == 64 * CLASSES + CLASSES


def test_statistics_move_though_no_weight_of_the_base_does(recipe, data):
    before, after, model = train(recipe, data, "statistics")
    assert changed(before, after) == {"moving_mean", "moving_variance"}
    assert sum(np.prod(weight.shape) for weight in model.trainable_variables) == 64 * CLASSES + CLASSES


def test_where_all_is_trained_the_statistics_stay(recipe, data):
    before, after, _ = train(recipe, data, "all")
    assert changed(before, after) == {"kernel"}


def test_where_normalization_is_trained_as_well_its_statistics_move(recipe, data):
    before, after, _ = train(recipe, data, "all moves")
    assert changed(before, after) == {"kernel", "gamma", "beta", "moving_mean", "moving_variance"}


def test_calling_the_base_in_inference_mode_does_not_hold_its_statistics(recipe, data):
    """The card says so; where this fails, Keras has changed, and `training=False` is a way again."""
    base = recipe.build_base(data[0].shape[1:])
    inputs = keras.Input(data[0].shape[1:])
    model = keras.Model(inputs, keras.layers.Dense(CLASSES)(base(inputs, training=False)))
    before = weights_of(base)
    recipe.compile_and_fit(model, data, 1, 8, keras.optimizers.SGD(0.1))
    assert {"moving_mean", "moving_variance"} <= changed(before, weights_of(base))


def test_from_scratch_everything_changes(recipe, data):
    before, after, _ = train(recipe, data, "scratch")
    assert changed(before, after) == {"kernel", "gamma", "beta", "moving_mean", "moving_variance"}


def test_rates_fall_from_layer_to_layer_towards_the_input(recipe, data):
    # Adam's first step has the length of the rate in each weight whose gradient is not tiny.
    keras.utils.set_random_seed(0)
    base = recipe.build_base(data[0].shape[1:])
    model = recipe.build_model(base, CLASSES, "by layer")
    before = weights_of(model)
    recipe.compile_and_fit(model, data, 1, 16, recipe.new_optimizer("by layer", 0.01, 10), shuffle=False)
    after = weights_of(model)
    lengths = {path: np.abs(after[path] - before[path]).max() for path in before}
    expected = {"head/kernel": 0.01} | {f"conv_{number}/kernel": 0.01 * 0.3 ** (3 - number) for number in range(3)}
    for end, length in expected.items():
        (found,) = [length for path, length in lengths.items() if path.endswith(end)]
        np.testing.assert_allclose(found, length, rtol=1e-2)


def test_classes_are_chosen_and_counted_from_nought(recipe):
    images, labels = np.arange(12).reshape(6, 2), np.array([0, 3, 2, 1, 3, 2])
    chosen, counted = recipe.of_classes((images, labels), 2, 4)
    np.testing.assert_array_equal(chosen, images[[1, 2, 4, 5]])
    np.testing.assert_array_equal(counted, [1, 0, 1, 0])
    assert len(recipe.of_classes((images, labels), 2, 4, 3)[1]) == 3


def test_main_pretrains_once_a_seed_on_other_classes_and_starts_from_that(recipe):
    fit, found = keras.Model.fit, []

    def spy(model, images, labels, **keywords):
        found.append((len(images), set(labels), model.layers[-1].units))
        return fit(model, images, labels, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", spy)
        comparison = recipe.main(epochs=2, seeds=1, limit=120, images=30)
    pretraining = [entry for entry in found if entry[0] != 30]
    assert len(pretraining) == 1
    assert all(units == 5 and labels <= set(range(5)) for _, labels, units in found)
    # One training a variant, and the head's before all.
    assert len(found) - 1 == len(recipe.VARIANTS) + 1
    assert len(comparison.result.runs) == len(recipe.VARIANTS)
