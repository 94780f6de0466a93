import types

import keras
import numpy as np
import pytest

LIMIT, EPOCHS = 300, 4
STEPS = 3  # of 128 examples or fewer


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("reproducibility/checkpoint_resume")


@pytest.fixture(scope="module")
def experiment(recipe):
    """main: (comparison, {variant: [a namespace for each training, of model, and of weights and steps around it]})."""
    calls, fit = [], keras.Model.fit

    def spy(model, **keywords):
        around = types.SimpleNamespace(model=model, keywords=keywords)

        class Begin(keras.callbacks.Callback):
            def on_epoch_begin(self, epoch, logs=None):
                if not hasattr(around, "before"):
                    around.epoch, around.before, around.steps = epoch, weights_of(model), steps_of(model)

        calls.append(around)
        history = fit(model, **keywords | {"callbacks": [*keywords["callbacks"], Begin()]})
        around.after, around.steps_after = weights_of(model), steps_of(model)
        return history

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.Model, "fit", spy)
        comparison = recipe.main(limit=LIMIT, epochs=EPOCHS)
    one, weights, weights_more, backup, backup_more, by_epoch, resumed, resumed_more = calls
    trainings = [[one], [weights, weights_more], [backup, backup_more], [by_epoch], [resumed, resumed_more]]
    return comparison, dict(zip(recipe.VARIANTS, trainings, strict=True))


def weights_of(model):
    return [np.array(keras.ops.convert_to_numpy(weight)) for weight in model.trainable_variables]


def steps_of(model):
    return int(keras.ops.convert_to_numpy(model.optimizer.iterations))


def are_equal(first, second):
    return all(map(np.array_equal, first, second))


def test_resumed_training_ends_equal_to_the_bit_where_numbers_depend_on_the_epoch(experiment):
    _, trainings = experiment
    assert are_equal(trainings["by epoch, resumed"][-1].after, trainings["by epoch"][0].after)
    assert not are_equal(trainings["BackupAndRestore"][-1].after, trainings["uninterrupted"][0].after)
    assert not are_equal(trainings["weights alone"][-1].after, trainings["uninterrupted"][0].after)
    assert not are_equal(trainings["by epoch"][0].after, trainings["uninterrupted"][0].after)


def test_it_goes_on_from_the_weights_and_in_the_epoch_in_which_it_was_interrupted(experiment):
    _, trainings = experiment
    for first, second in (trainings["weights alone"], trainings["BackupAndRestore"], trainings["by epoch, resumed"]):
        assert first.model is not second.model
        assert are_equal(first.after, second.before)
        assert first.steps_after == EPOCHS // 2 * STEPS
        assert second.epoch == EPOCHS // 2


def test_steps_are_counted_on_unless_only_the_weights_are_kept(experiment):
    _, trainings = experiment
    steps = {variant: each[-1].steps for variant, each in trainings.items() if len(each) > 1}
    assert steps == {
        "weights alone": 0,
        "BackupAndRestore": EPOCHS // 2 * STEPS,
        "by epoch, resumed": EPOCHS // 2 * STEPS,
    }
    # So that its rate has not fallen to zero at the end.
    optimizer = trainings["weights alone"][-1].model.optimizer
    assert float(optimizer._learning_rate(EPOCHS // 2 * STEPS)) == pytest.approx(0.0005)


def length(first, second):
    """Return the distance between two lists of weights."""
    return np.linalg.norm(
        np.concatenate([(np.float64(one) - two).ravel() for one, two in zip(first, second, strict=True)])
    )


def test_distance_is_that_of_the_final_weights(experiment):
    comparison, trainings = experiment
    found = {entry["variant"]: entry["value"] for entry in comparison.result.figures if entry["name"] == "distance"}
    for variant, each in trainings.items():
        [whole] = trainings["by epoch" if variant.startswith("by epoch") else "uninterrupted"]
        expected = length(each[-1].after, whole.after) / length(whole.after, whole.before)
        assert found[variant] == pytest.approx(expected, rel=1e-4)
    assert found["by epoch, resumed"] == 0


def test_curves_are_of_all_epochs(experiment):
    comparison, _ = experiment
    for run in comparison.result.runs:
        assert {len(values) for values in run["curve"].values()} == {EPOCHS}


def batches_of(data):
    return [data[index] for index in range(len(data))]


def test_an_epochs_order_has_each_example_once_and_is_its_own(recipe):
    images, labels = np.arange(50).reshape(50, 1, 1, 1), np.arange(50)
    data, other = recipe.Shuffled(images, labels, 16, seed=3), recipe.Shuffled(images, labels, 16, seed=4)
    orders = []
    for epoch in (0, 1, 2, 1):
        data.shuffle(epoch)
        batches = batches_of(data)
        assert [len(each) for _, each in batches] == [16, 16, 16, 2]
        order = np.concatenate([each for _, each in batches])
        np.testing.assert_array_equal(np.concatenate([each for each, _ in batches]).ravel(), order)
        np.testing.assert_array_equal(np.sort(order), labels)
        orders.append(order)
    assert are_equal([orders[1]], [orders[3]])
    other.shuffle(1)
    others = [orders[0], orders[1], orders[2], np.concatenate([each for _, each in batches_of(other)])]
    assert all(not np.array_equal(one, two) for number, one in enumerate(others) for two in others[:number])


def test_masks_are_those_of_the_seed_and_the_epoch_and_differ_between_layers(recipe):
    model = recipe.build_model((4, 4, 1), 3)
    dropouts = [layer for layer in model.layers if isinstance(layer, keras.layers.Dropout)]
    data = recipe.Shuffled(np.zeros((8, 4, 4, 1)), np.zeros(8, int), 4, seed=3)
    ones = np.ones((8, 128), "float32")

    def masks(seed, epoch):
        callback = recipe.NumbersByEpoch(data, seed)
        callback.set_model(model)
        callback.on_epoch_begin(epoch)
        order = np.array(data.order)
        data.shuffle(epoch)
        np.testing.assert_array_equal(order, data.order)
        return [np.array(keras.ops.convert_to_numpy(layer(ones, training=True))) for layer in dropouts]

    first, second, again, other = masks(3, 5), masks(3, 6), masks(3, 5), masks(4, 5)
    assert are_equal(first, again)
    different = [*first, *second, *other]
    assert all(not np.array_equal(one, two) for number, one in enumerate(different) for two in different[:number])


def test_no_file_of_keras_keeps_the_state_of_dropout(recipe, tmp_path):
    """If one does some day, the card is to say so."""
    keras.utils.set_random_seed(0)
    model = recipe.build_model((4, 4, 1), 3)
    model(np.ones((2, 4, 4, 1)), training=True)
    model.save_weights(tmp_path / "model.weights.h5")
    other = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(model))
    other.load_weights(tmp_path / "model.weights.h5")
    assert are_equal(weights_of(model), weights_of(other))
    state, other_state = (
        [np.array(each) for each in one.non_trainable_variables if "seed_generator" in each.path]
        for one in (model, other)
    )
    assert len(state) == 2
    assert not any(map(np.array_equal, state, other_state))
