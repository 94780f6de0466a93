import copy
import doctest
import pickle
import warnings

import keras
import numpy as np
import pytest
from keras import layers

from callbacks import Comparison
from callbacks.stochastic_weight_averaging import StochasticWeightAveraging

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(loc=0.5, size=(96, 4)).astype("float32")
TARGETS = (INPUTS.sum(axis=1) > 2).astype("float32")
DATA = (INPUTS, TARGETS)


def build_model(normalisation=layers.BatchNormalization, optimizer=None, dtype=None, jit_compile=False, **arguments):
    """Return a compiled model: Dense, normalisation, Dense, normalisation, Dense."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, activation="tanh", dtype=dtype, name="first"),
            *([normalisation(name="normalisation_1", **arguments)] if normalisation else []),
            layers.Dense(5, activation="tanh", dtype=dtype, name="second"),
            *([normalisation(name="normalisation_2", **arguments)] if normalisation else []),
            layers.Dense(1, activation="sigmoid", dtype=dtype, name="last"),
        ]
    )
    return compile_(model, optimizer or new_optimizer(), jit_compile)


def new_optimizer(**arguments):
    return keras.optimizers.SGD(0.1, momentum=0.9, **arguments)


def compile_(model, optimizer="sgd", jit_compile=False):
    # Compilation by XLA would take longer than these trainings.
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"], jit_compile=jit_compile)
    return model


def fit(model, *callbacks, epochs=5, **arguments):
    # Unshuffled, so that a resumed training sees the batches that the uninterrupted one saw.
    return model.fit(
        INPUTS, TARGETS, epochs=epochs, batch_size=48, shuffle=False, verbose=0, callbacks=list(callbacks), **arguments
    )


def copies(weights):
    return [np.array(weight) for weight in weights]


def assert_equal(first, second, **tolerance):
    for left, right in zip(first, second, strict=True):
        if tolerance:
            np.testing.assert_allclose(left, right, **tolerance)
        else:
            np.testing.assert_array_equal(left, right)


class Recorder(keras.callbacks.Callback):
    """Keeps the trainable weights of every epoch."""

    def on_train_begin(self, logs=None):
        self.weights = []

    def on_epoch_end(self, epoch, logs=None):
        self.weights.append(
            [np.array(keras.ops.convert_to_numpy(variable)) for variable in self.model.trainable_variables]
        )

    def average(self, start):
        return [np.mean(np.float64(values), axis=0) for values in zip(*self.weights[start:], strict=True)]


class Interruption(keras.callbacks.Callback):
    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == self.epoch:
            raise InterruptedError


def trainable(model):
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in model.trainable_variables]


def statistics(model):
    """Return the moving mean and variance of each of the two normalisations."""
    return [
        np.array(keras.ops.convert_to_numpy(value))
        for name in ("normalisation_1", "normalisation_2")
        for value in (model.get_layer(name).moving_mean, model.get_layer(name).moving_variance)
    ]


def expected_statistics(model, batches):
    """Compute, in float64, what one pass in training mode gives: the average over batches of each batch's moments."""
    weights = {layer.name: [np.float64(weight) for weight in layer.get_weights()] for layer in model.layers}
    moments = []
    for batch in batches:
        values, found = np.float64(batch), []
        for dense, normalisation in (("first", "normalisation_1"), ("second", "normalisation_2")):
            kernel, bias = weights[dense]
            gamma, beta = weights[normalisation][:2]
            values = np.tanh(values @ kernel + bias)
            mean, variance = values.mean(axis=0), values.var(axis=0)
            found += [mean, variance]
            values = gamma * (values - mean) / np.sqrt(variance + 1e-3) + beta
        moments.append(found)
    return [np.mean(values, axis=0) for values in zip(*moments, strict=True)]


def batches_of(size):
    return [INPUTS[start : start + size] for start in range(0, len(INPUTS), size)]


@pytest.fixture(scope="module")
def plain():
    """Return the weights after five epochs without a callback."""
    model = build_model()
    fit(model)
    return copies(model.get_weights())


@pytest.fixture(scope="module")
def whole():
    """Return the weights after five epochs averaged from epoch 1 on, without an interruption."""
    model = build_model()
    fit(model, StochasticWeightAveraging(1, DATA))
    return copies(model.get_weights())


# The average


@pytest.mark.parametrize("start_epoch, jit_compile", [(0, False), (2, True), (4, False)])
def test_weights_are_the_average_over_the_epochs_from_the_start_epoch(start_epoch, jit_compile):
    model, recorder = build_model(jit_compile=jit_compile), Recorder()
    history = fit(model, StochasticWeightAveraging(start_epoch, DATA), recorder)
    assert_equal(trainable(model), recorder.average(start_epoch), rtol=1e-6, atol=1e-8)
    assert history.history["averaged_models"] == [max(0, epoch + 1 - start_epoch) for epoch in range(5)]


def test_half_precision_weights_are_averaged_in_full_precision():
    # In float16, 2048 + 1 is 2048, so that a sum or a running average in that precision does not move.
    class Assign(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.get_layer("first").kernel.assign(np.full((4, 6), 2048.0 if epoch == 0 else 2050.0))

    model = build_model(normalisation=None, dtype="float16", optimizer="sgd")
    fit(model, Assign(), StochasticWeightAveraging(0), epochs=8)
    # The average is 2049.75, whose nearest neighbour in float16 is 2050.
    np.testing.assert_array_equal(model.get_layer("first").kernel.numpy(), np.float16(2050))


def test_mixed_precision_with_loss_scaling():
    model, recorder = build_model(dtype="mixed_float16"), Recorder()
    compile_(model, keras.optimizers.LossScaleOptimizer(new_optimizer()))
    fit(model, StochasticWeightAveraging(1, DATA), recorder)
    assert_equal(trainable(model), recorder.average(1), rtol=1e-6, atol=1e-8)
    assert_equal(statistics(model), expected_statistics(model, batches_of(32)), rtol=1e-2, atol=1e-3)


def test_trained_weights_are_averaged_beside_the_exponential_average_of_the_optimizer():
    optimizer = new_optimizer(use_ema=True, ema_momentum=0.9)
    model, recorder = build_model(optimizer=optimizer), Recorder()
    averaging = StochasticWeightAveraging(1, DATA)
    fit(model, averaging, recorder)
    assert_equal(trainable(model), recorder.average(1), rtol=1e-6, atol=1e-8)
    plain = build_model(optimizer=new_optimizer(use_ema=True, ema_momentum=0.9))
    fit(plain)
    averaging.swap()
    assert_equal(trainable(model), trainable(plain))


def test_early_end_before_the_start_epoch_leaves_the_weights_and_warns(plain):
    model = build_model()
    averaging = StochasticWeightAveraging(5, DATA)
    with pytest.warns(UserWarning, match="before start_epoch=5 .* no weights were averaged"):
        history = fit(model, averaging)
    assert_equal(model.get_weights(), plain)
    assert history.history["averaged_models"] == [0] * 5
    assert averaging.other_weights is None
    with pytest.raises(ValueError, match="no weights to swap"):
        averaging.swap()


def test_second_fit_begins_a_new_average():
    model, recorder = build_model(), Recorder()
    averaging = StochasticWeightAveraging(2, DATA)
    fit(model, averaging)
    history = fit(model, averaging, recorder)
    assert history.history["averaged_models"] == [0, 0, 1, 2, 3]
    assert_equal(trainable(model), recorder.average(2), rtol=1e-6, atol=1e-8)
    assert_equal(statistics(model), expected_statistics(model, batches_of(32)), rtol=1e-5, atol=1e-6)


def test_one_callback_serves_a_second_model():
    averaging = StochasticWeightAveraging(2, DATA)
    fit(build_model(), averaging)
    other, recorder = build_model(normalisation=None), Recorder()
    fit(other, averaging, recorder)
    assert_equal(trainable(other), recorder.average(2), rtol=1e-6, atol=1e-8)


def test_model_without_batch_normalisation_needs_no_data():
    model, recorder = build_model(layers.LayerNormalization), Recorder()
    fit(model, StochasticWeightAveraging(1), recorder)
    assert_equal(trainable(model), recorder.average(1), rtol=1e-6, atol=1e-8)


def test_swap_gives_the_weights_back_that_training_without_the_callback_gives(plain):
    model = build_model()
    averaging = StochasticWeightAveraging(1, DATA)
    fit(model, averaging)
    average = copies(model.get_weights())
    assert_equal(averaging.other_weights, plain)
    averaging.swap()
    assert_equal(model.get_weights(), plain)
    averaging.swap()
    assert_equal(model.get_weights(), average)


def test_comparison_evaluates_the_average():
    model = build_model()
    with Comparison(baseline="average", metric="loss", test=DATA) as comparison:
        fit(model, StochasticWeightAveraging(1, DATA), comparison.run("average", 0))
    assert comparison.result.runs[0]["metrics"]["test"] == pytest.approx(
        model.evaluate(*DATA, verbose=0, return_dict=True)
    )


# Batch-norm statistics


def test_statistics_are_the_average_over_batches_of_the_moments_of_each():
    model = build_model()
    for batch_size in (32, 40):
        fit(model, StochasticWeightAveraging(2, DATA, batch_size=batch_size))
        assert_equal(statistics(model), expected_statistics(model, batches_of(batch_size)), rtol=1e-5, atol=1e-6)
    assert [model.get_layer(f"normalisation_{number}").momentum for number in (1, 2)] == [0.99, 0.99]


def in_batches():
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return INPUTS[32 * index : 32 * (index + 1)], TARGETS[32 * index : 32 * (index + 1)]

    return Batches()


def batches(*shapes):
    class Batches(keras.utils.PyDataset):
        def __len__(self):
            return len(shapes)

        def __getitem__(self, index):
            return np.ones(shapes[index], "float32")

    return Batches()


def as_tensorflow_data():
    import tensorflow

    return tensorflow.data.Dataset.from_tensor_slices(DATA).batch(32)


def test_every_kind_of_data_gives_these_statistics():
    model = build_model()
    for data in (INPUTS, (INPUTS, TARGETS, TARGETS), in_batches(), as_tensorflow_data()):
        fit(model, StochasticWeightAveraging(0, data), epochs=1)
        assert_equal(statistics(model), expected_statistics(model, batches_of(32)), rtol=1e-5, atol=1e-6)


def test_several_inputs_are_cut_into_batches_together():
    keras.utils.set_random_seed(0)
    inputs = {"left": keras.Input((4,), name="left"), "right": keras.Input((4,), name="right")}
    sums = layers.BatchNormalization(name="normalisation")(inputs["left"] + 2 * inputs["right"])
    model = keras.Model(inputs, layers.Dense(1, "sigmoid")(sums))
    compile_(model)
    x = {"left": INPUTS, "right": INPUTS[::-1].copy()}
    model.fit(x, TARGETS, verbose=0, callbacks=[StochasticWeightAveraging(0, (x, TARGETS))])
    batches = (x["left"] + 2 * x["right"]).reshape(3, 32, 4)
    layer = model.get_layer("normalisation")
    np.testing.assert_allclose(layer.moving_mean.numpy(), batches.mean(axis=1).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(layer.moving_variance.numpy(), batches.var(axis=1).mean(axis=0), rtol=1e-5)


def test_layer_called_several_times_has_the_average_over_its_calls_in_training_mode():
    class Calls(layers.Layer):
        def __init__(self):
            super().__init__()
            self.shared = layers.BatchNormalization()

        def call(self, inputs, training=None):
            unchanged = self.shared(inputs, training=False)
            return unchanged + self.shared(inputs, training=training) + self.shared(3 * inputs + 1, training=training)

    keras.utils.set_random_seed(0)
    model = compile_(keras.Sequential([keras.Input((4,)), Calls(), layers.Dense(1, "sigmoid")]))
    fit(model, StochasticWeightAveraging(0, DATA), epochs=1)
    shared = model.layers[0].shared
    calls = np.concatenate([batch for part in batches_of(32) for batch in (part[None], 3 * part[None] + 1)])
    np.testing.assert_allclose(shared.moving_mean.numpy(), calls.mean(axis=1).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(shared.moving_variance.numpy(), calls.var(axis=1).mean(axis=0), rtol=1e-5)


def test_statistics_that_have_overflowed_are_replaced():
    class Overflow(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.get_layer("normalisation_1").moving_variance.assign(np.full(6, np.inf))

    model = build_model()
    fit(model, Overflow(), StochasticWeightAveraging(2, DATA))
    assert_equal(statistics(model), expected_statistics(model, batches_of(32)), rtol=1e-5, atol=1e-6)


def test_nothing_but_the_statistics_changes_in_the_pass():
    keras.utils.set_random_seed(0)
    frozen = layers.BatchNormalization(name="frozen")
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dropout(0.5, seed=1),
            layers.SpectralNormalization(layers.Dense(6, activity_regularizer="l2")),
            frozen,
            layers.BatchNormalization(name="trained"),
            layers.Dense(1, "sigmoid"),
        ]
    )
    frozen.trainable = False
    compile_(model, jit_compile=keras.backend.backend() == "jax")
    trained = model.get_layer("trained")
    recomputed = {id(trained.moving_mean), id(trained.moving_variance)}

    def others():
        return {
            variable.path: np.array(keras.ops.convert_to_numpy(variable))
            for variable in model.non_trainable_variables
            if id(variable) not in recomputed
        }

    class Before(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            self.others = others()
            self.mean = np.array(trained.moving_mean.numpy())

    before, recorder = Before(), Recorder()
    fit(model, before, StochasticWeightAveraging(1, DATA), recorder)
    # Those of the frozen normalisation, a seed and the vector of the spectral norm.
    assert len(before.others) == 6
    assert_equal(before.others.values(), others().values())
    assert not np.array_equal(before.mean, trained.moving_mean.numpy())
    assert_equal(trainable(model), recorder.average(1), rtol=1e-6, atol=1e-8)
    assert all(np.isfinite(fit(model).history["loss"]))


def test_dropout_is_active_in_the_pass():
    keras.utils.set_random_seed(0)
    normalisation = layers.BatchNormalization()
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dropout(0.5, seed=1), normalisation, layers.Dense(1, "sigmoid")]
    )
    compile_(model)
    ones = np.ones((4096, 4), "float32")
    model.fit(ones, ones[:, 0], verbose=0, callbacks=[StochasticWeightAveraging(0, ones, batch_size=4096)])
    # Half are 2 and half are 0, so that the variance is 1; without dropout it would be 0.
    np.testing.assert_allclose(normalisation.moving_variance.numpy(), np.ones(4), atol=0.01)


@pytest.mark.parametrize("kind", ["flat", "nested"])
def test_batch_normalisation_without_data_is_refused(kind):
    model = build_model()
    if kind == "nested":
        inner = keras.Sequential([keras.Input((4,)), layers.Dense(3), layers.BatchNormalization()])
        model = keras.Sequential([keras.Input((4,)), keras.Sequential([inner]), layers.Dense(1, "sigmoid")])
        compile_(model)
    before = copies(model.get_weights())
    with pytest.raises(ValueError, match=r"batch normalisation .*pass the training data, data=\(inputs, targets\)"):
        fit(model, StochasticWeightAveraging(1))
    assert_equal(model.get_weights(), before)


def test_batch_normalisation_that_is_made_by_the_first_batch_is_refused_too():
    class Late(keras.Model):
        def build(self, input_shape):
            self.normalisation, self.dense = layers.BatchNormalization(), layers.Dense(1, "sigmoid")
            self.normalisation.build(input_shape)
            self.dense.build(input_shape)

        def call(self, inputs, training=None):
            return self.dense(self.normalisation(inputs, training=training))

    model = Late()
    compile_(model)
    with pytest.raises(ValueError, match="pass the training data"):
        fit(model, StochasticWeightAveraging(0))


def test_frozen_batch_normalisation_needs_no_data():
    model = build_model()
    for number in (1, 2):
        model.get_layer(f"normalisation_{number}").trainable = False
    compile_(model)
    before = statistics(model)
    fit(model, StochasticWeightAveraging(1))
    assert_equal(statistics(model), before)


def test_batch_renormalisation_is_refused():
    with pytest.raises(ValueError, match="renorm=True"):
        fit(build_model(renorm=True), StochasticWeightAveraging(1, DATA))


# Interruption


def resumable(folder, start_epoch=1, data=DATA):
    return (
        StochasticWeightAveraging(start_epoch, data, backup_dir=folder / "average"),
        keras.callbacks.BackupAndRestore(folder / "training"),
    )


@pytest.mark.parametrize("epoch", [1, 3])
def test_resumed_training_ends_exactly_as_the_uninterrupted_one(epoch, whole, tmp_path):
    with pytest.raises(InterruptedError):
        fit(build_model(), *resumable(tmp_path), Interruption(epoch))
    resumed = build_model()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Training begins at epoch")
        history = fit(resumed, *resumable(tmp_path))
    assert history.epoch == list(range(epoch, 5))
    assert history.history["averaged_models"] == list(range(epoch, 5))
    assert_equal(resumed.get_weights(), whole)
    assert not (tmp_path / "average").exists()


def test_same_callback_resumes_in_the_same_process_with_an_exponential_average(tmp_path):
    def new_model():
        return build_model(optimizer=new_optimizer(use_ema=True))

    whole, model = new_model(), new_model()
    fit(whole, StochasticWeightAveraging(1, DATA))
    averaging = resumable(tmp_path)
    with pytest.raises(InterruptedError):
        fit(model, *averaging, Interruption(3))
    fit(model, *averaging)
    assert_equal(model.get_weights(), whole.get_weights())


def test_interruption_between_the_saves_of_an_epoch_is_resumed(whole, tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 3:
                raise InterruptedError

    averaging, backup = resumable(tmp_path)
    with pytest.raises(InterruptedError):
        fit(build_model(), averaging, Stop(), backup)
    resumed = build_model()
    assert fit(resumed, *resumable(tmp_path)).epoch == [3, 4]
    assert_equal(resumed.get_weights(), whole)


def test_interruption_after_the_last_epoch_is_resumed(whole, tmp_path):
    model, resumed = build_model(), build_model()
    # The pass over data fails at its second batch, which has one column too many.
    with pytest.raises(Exception, match="shape|dimension|axis"):
        fit(model, *resumable(tmp_path, data=batches((32, 4), (32, 5))))
    assert [model.get_layer(f"normalisation_{number}").momentum for number in (1, 2)] == [0.99, 0.99]
    history = fit(resumed, *resumable(tmp_path))
    assert history.epoch == []
    assert_equal(resumed.get_weights(), whole)
    assert not (tmp_path / "average").exists()


def test_fresh_training_does_not_mix_with_a_save_that_was_left_over(tmp_path):
    folder = tmp_path / "average"
    with pytest.raises(InterruptedError):
        fit(build_model(), *resumable(tmp_path), Interruption(4))
    assert sorted(path.name for path in folder.iterdir()) == ["average_1_to_3.npz", "average_1_to_4.npz"]
    fresh, recorder = build_model(), Recorder()
    with pytest.raises(InterruptedError):
        fit(fresh, StochasticWeightAveraging(1, DATA, backup_dir=folder), recorder, Interruption(1))
    assert not folder.exists()
    fit(fresh, StochasticWeightAveraging(1, DATA, backup_dir=folder), recorder)
    assert_equal(trainable(fresh), recorder.average(1), rtol=1e-6, atol=1e-8)


def test_average_from_another_start_epoch_is_not_continued(tmp_path):
    with pytest.raises(InterruptedError):
        fit(build_model(), *resumable(tmp_path, start_epoch=1), Interruption(3))
    model, recorder = build_model(), Recorder()
    with pytest.warns(UserWarning, match="begins at epoch 3, after start_epoch=2"):
        history = fit(model, *resumable(tmp_path, start_epoch=2), recorder)
    assert history.history["averaged_models"] == [1, 2]
    assert_equal(trainable(model), recorder.average(0), rtol=1e-6, atol=1e-8)


def test_resuming_without_a_saved_average_warns(tmp_path):
    backup = keras.callbacks.BackupAndRestore(tmp_path)
    with pytest.raises(InterruptedError):
        fit(build_model(), StochasticWeightAveraging(1, DATA), backup, Interruption(3))
    with pytest.warns(UserWarning, match="Training begins at epoch 3, after start_epoch=1"):
        fit(build_model(), StochasticWeightAveraging(1, DATA), backup)


def test_average_of_another_model_is_refused(tmp_path):
    with pytest.raises(InterruptedError):
        fit(build_model(), *resumable(tmp_path), Interruption(3))
    with pytest.raises(ValueError, match="belongs to another model"):
        fit(build_model(normalisation=None), resumable(tmp_path)[0], initial_epoch=3)


def test_save_that_fails_leaves_the_saves_before_it(whole, tmp_path, monkeypatch):
    savez = np.savez

    def fail(file, *arrays, count):
        savez(file, *arrays[:1])
        if count == 3:
            raise OSError("disk full")
        file.seek(0)
        savez(file, *arrays, count=count)

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        fit(build_model(), *resumable(tmp_path))
    monkeypatch.undo()
    saves = sorted(path.name for path in (tmp_path / "average").glob("*.npz"))
    assert saves == ["average_1_to_2.npz", "average_1_to_3.npz"]
    resumed = build_model()
    assert fit(resumed, *resumable(tmp_path)).epoch == [3, 4]
    assert_equal(resumed.get_weights(), whole)


# Arguments


class Endless(keras.utils.PyDataset):
    num_batches = None

    def __getitem__(self, index):
        return INPUTS[:32]


def test_bad_arguments_are_refused():
    for arguments, message in [
        ({"start_epoch": -1}, "start_epoch must be an integer of at least 0, not -1"),
        ({"start_epoch": 0.75}, "start_epoch must be an integer"),
        ({"start_epoch": 1, "batch_size": 0}, "batch_size must be a positive integer"),
        ({"start_epoch": 1, "data": [INPUTS, TARGETS]}, "data must be an array, a tuple .* not a list"),
        ({"start_epoch": 1, "data": iter([INPUTS])}, "data must be an array, a tuple .* not a list_iterator"),
        ({"start_epoch": 1, "data": Endless()}, "data must end after one pass"),
        ({"start_epoch": 1, "data": as_tensorflow_data().repeat()}, "data must end after one pass"),
    ]:
        with pytest.raises(ValueError, match=message):
            StochasticWeightAveraging(**arguments)


def unbatched():
    import tensorflow

    return tensorflow.data.Dataset.from_tensor_slices(DATA)


@pytest.mark.parametrize(
    ("make_data", "message"),
    [
        (lambda: INPUTS[:0], "data gives no batch"),
        (lambda: batches(), "data gives no batch"),
        (lambda: unbatched().batch(32).take(0), "data gives no batch"),
        (lambda: np.ones((96, 5), "float32"), r"first batch of data, of shapes \[\(32, 5\)\]"),
        (lambda: unbatched(), r"first batch of data, of shapes \[\(4,\)\]"),
        (lambda: batches((32, 4, 1, 1)), r"first batch of data, of shapes \[\(32, 4, 1, 1\)\]"),
        (lambda: {"inputs": INPUTS, "others": INPUTS[:, :2]}, "first batch of data"),
    ],
    ids=["no examples", "no batches", "empty data set", "width", "not batched", "rank", "structure"],
)
def test_data_that_cannot_be_used_are_refused_before_training(make_data, message):
    model = build_model()
    before = copies(model.get_weights())
    with pytest.raises(ValueError, match=message):
        fit(model, StochasticWeightAveraging(1, make_data()))
    assert_equal(model.get_weights(), before)
    assert int(model.optimizer.iterations) == 0


def test_trying_the_data_changes_nothing(plain):
    model = build_model()
    averaging = StochasticWeightAveraging(1, DATA)
    fit(model, averaging)
    averaging.swap()
    assert_equal(model.get_weights(), plain)


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_integers_are_integers(integer):
    model, recorder = build_model(), Recorder()
    fit(model, StochasticWeightAveraging(integer(2), DATA, batch_size=integer(32)), recorder)
    assert_equal(trainable(model), recorder.average(2), rtol=1e-6, atol=1e-8)


# Epochs without a step, training that is stopped, logs, copies


@pytest.mark.filterwarnings("ignore:.*ran out of data")
def test_epoch_without_a_step_gives_no_model():
    class Steps(Recorder):
        def on_epoch_begin(self, epoch, logs=None):
            self.made = 0

        def on_train_batch_end(self, batch, logs=None):
            self.made += 1

        def on_epoch_end(self, epoch, logs=None):
            if self.made:
                super().on_epoch_end(epoch, logs)

    model, recorder = build_model(), Steps()
    averaging = StochasticWeightAveraging(0, DATA)
    data = ((INPUTS[:32], TARGETS[:32, None]) for _ in range(5))
    history = model.fit(data, epochs=12, steps_per_epoch=2, verbose=0, callbacks=[averaging, recorder]).history
    assert 1 < len(recorder.weights) < 12
    assert history["averaged_models"][-1] == len(recorder.weights)
    assert_equal(trainable(model), recorder.average(0), rtol=1e-6, atol=1e-8)


class CtrlC(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if int(self.model.optimizer.iterations) == 9:
            raise KeyboardInterrupt


def test_average_so_far_is_there_after_ctrl_c():
    model, recorder = build_model(), Recorder()
    averaging = StochasticWeightAveraging(1, DATA)
    with pytest.raises(ValueError, match="No weights have been averaged"):
        averaging.average()
    with pytest.raises(KeyboardInterrupt):
        fit(model, averaging, recorder, CtrlC(), epochs=9)
    assert len(recorder.weights) == 4
    last = copies(model.get_weights())
    average = averaging.average()
    assert_equal(model.get_weights(), last)
    model.set_weights(average)
    assert_equal(trainable(model), recorder.average(1), rtol=1e-6, atol=1e-8)
    assert_equal(statistics(model), expected_statistics(model, batches_of(32)), rtol=1e-5, atol=1e-6)


def test_average_is_there_when_training_has_ended_too():
    model = build_model()
    averaging = StochasticWeightAveraging(1, DATA)
    fit(model, averaging)
    in_model = copies(model.get_weights())
    averaging.swap()
    assert_equal(averaging.average(), in_model)


def test_log_false_keeps_it_out_of_the_logs():
    assert set(fit(build_model(), StochasticWeightAveraging(1, DATA, log=False)).history) == {"loss", "accuracy"}


@pytest.mark.parametrize(
    ("duplicate", "make_data"),
    [
        (copy.deepcopy, lambda: DATA),
        (copy.deepcopy, as_tensorflow_data),
        (lambda averaging: pickle.loads(pickle.dumps(averaging)), lambda: DATA),
    ],
)
def test_copies_and_pickles_have_the_average_and_serve_again(duplicate, make_data):
    averaging = StochasticWeightAveraging(1, make_data())
    fit(build_model(), averaging)
    again = duplicate(averaging)
    assert again.model is None
    assert_equal(again.other_weights, averaging.other_weights)
    other, recorder = build_model(), Recorder()
    fit(other, again, recorder)
    assert_equal(trainable(other), recorder.average(1), rtol=1e-6, atol=1e-8)


def test_pickle_without_its_data_set_asks_for_data():
    averaging = StochasticWeightAveraging(1, as_tensorflow_data())
    fit(build_model(), averaging)
    with pytest.raises(ValueError, match="pass the training data"):
        fit(build_model(), pickle.loads(pickle.dumps(averaging)))


def test_example_in_the_docstring_runs():
    names = {"keras": keras, "layers": layers, "np": np, "x": INPUTS, "y": TARGETS, "model": build_model()}
    names["StochasticWeightAveraging"] = StochasticWeightAveraging
    examples = doctest.DocTestParser().get_examples(StochasticWeightAveraging.__doc__)
    for example in examples:
        exec(example.source, names)
    assert len(examples) <= 5
    assert names["fitted"].history["averaged_models"] == [0, 0, 1, 2, 3]
    assert names["loss_of_the_average"] != names["loss_of_the_last_weights"]
