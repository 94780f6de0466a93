import copy
import doctest
import itertools
import pickle
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pytest
from keras import layers

from callbacks.learning_rate_range_test import LearningRateRangeTest

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(96, 4)).astype("float32")
TARGETS = (INPUTS.sum(axis=1) > 0).astype("float32")


def build_model(optimizer="adam"):
    """A model with every kind of state. Without `seed`, dropout on PyTorch has none."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, kernel_regularizer="l2"),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Dropout(0.5, seed=1),
            layers.Dense(1, "sigmoid"),
        ]
    )
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"])
    return model


def linear_model(optimizer="sgd", l2=0.0, **arguments):
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(1, use_bias=False, kernel_regularizer=keras.regularizers.L2(l2))]
    )
    model.compile(optimizer, "mse", **arguments)
    return model


def fit(model, *callbacks, epochs=20, batch_size=40, **arguments):
    return model.fit(
        INPUTS, TARGETS, epochs=epochs, batch_size=batch_size, verbose=0, callbacks=list(callbacks), **arguments
    )


def snapshot(model):
    """Return copies of all variables of the model and its optimizer, and the states of the random generators."""
    variables = [*model.variables, *model.optimizer.variables]
    return (
        [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables],
        random.getstate(),
        [np.array(part) for part in np.random.get_state()],
    )


def assert_equal(first, second):
    for one, other in zip(first[0], second[0], strict=True):
        np.testing.assert_array_equal(one, other)
    assert first[1] == second[1]
    for one, other in zip(first[2], second[2], strict=True):
        np.testing.assert_array_equal(one, other)


def with_losses(losses, low=1e-6, high=1.0):
    """Return a range test that has seen these losses, one after the other."""

    class Model:
        stop_training = False

    finder = LearningRateRangeTest(low, high, steps=100)
    finder.set_model(Model())
    for step, loss in enumerate(losses):
        finder.learning_rates.append(low * (high / low) ** (step / 99))
        finder.on_train_batch_end(step, {"loss": loss})
        if finder.model.stop_training:
            break
    return finder


# The rates and the losses


def test_rates_rise_by_one_factor_from_low_to_high():
    applied = []

    class Spy(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            applied.append(float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    finder = LearningRateRangeTest(1e-4, 1e-2, steps=25)
    fit(linear_model(), finder, Spy())
    assert finder.learning_rates == pytest.approx(np.geomspace(1e-4, 1e-2, 25))
    assert applied == pytest.approx(finder.learning_rates)
    assert len(finder.losses) == 25


def test_losses_are_those_of_single_batches():
    """Penalty included, over epochs with a smaller last batch, against stochastic gradient descent in NumPy."""
    l2 = 0.1
    model = linear_model(l2=l2)
    weights = np.array(model.get_weights()[0], "float64")
    finder = LearningRateRangeTest(1e-3, 0.1, steps=25)
    fit(model, finder, shuffle=False)
    batches = itertools.cycle([slice(0, 40), slice(40, 80), slice(80, 96)])
    expected = []
    for rate, batch in zip(np.geomspace(1e-3, 0.1, 25), batches, strict=False):
        x, errors = INPUTS[batch], INPUTS[batch] @ weights - TARGETS[batch, None]
        expected.append((errors**2).mean() + l2 * (weights**2).sum())
        weights -= rate * (2 * x.T @ errors / len(x) + 2 * l2 * weights)
    assert finder.losses == pytest.approx(expected, rel=1e-5)


def test_losses_are_single_in_a_model_with_a_loss_metric_of_its_own():
    class Model(keras.Sequential):
        def compute_metrics(self, x, y, y_pred, sample_weight=None):
            self.tracker.update_state(keras.ops.mean(keras.ops.square(y_pred[:, 0] - y)))
            return {"loss": self.tracker.result()}

    results = []
    for kind in (keras.Sequential, Model):
        model = kind([keras.Input((4,)), layers.Dense(1, kernel_initializer="ones")])
        model.tracker = keras.metrics.Mean(name="another name")
        model.compile("sgd", "mse")
        finder = LearningRateRangeTest(1e-3, 0.1, steps=20)
        fit(model, finder, shuffle=False)
        results.append(finder.losses)
    assert results[0] == pytest.approx(results[1], rel=1e-5)


def test_logs_of_batches_and_epochs_have_the_rate():
    batch_rates = []

    class Spy(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            batch_rates.append(logs["learning_rate"])

    finder = LearningRateRangeTest(1e-4, 1e-2, steps=24)
    history = fit(linear_model(), finder, Spy()).history
    assert batch_rates == finder.learning_rates
    assert history["learning_rate"] == finder.learning_rates[2::3]
    assert history["loss"] == pytest.approx(finder.losses[2::3])


# When it stops


def test_test_stops_when_the_loss_is_not_finite():
    model = linear_model()
    finder = LearningRateRangeTest(1e-2, 1e30, steps=100, threshold=np.inf)
    fit(model, finder, epochs=100)
    assert len(finder.losses) < 100
    assert np.isfinite(finder.losses[:-1]).all()
    assert not np.isfinite(finder.losses[-1])


@pytest.mark.parametrize("offset", [0.0, -5.0])
def test_test_stops_when_the_smoothed_loss_exceeds_the_threshold(offset):
    """From a minimum of 1 or of -4, a steady rise by 0.5 a step."""
    losses = [*np.linspace(2, 1, 40), *(1 + 0.5 * np.arange(60))] + np.full(100, offset)
    finder = with_losses(losses)
    means = np.convolve(losses, np.ones(finder.window) / finder.window, "valid")
    minimum = np.minimum.accumulate(means)
    first = np.flatnonzero(means - minimum > 3 * np.abs(minimum))[0]
    assert len(finder.losses) == first + finder.window < 100
    assert finder.smoothed_losses == pytest.approx(means[: first + 1])


def test_test_ends_after_its_steps_when_the_loss_stays_low():
    finder = with_losses(np.linspace(2, 1, 100))
    assert len(finder.losses) == 100
    assert finder.model.stop_training


# The suggestion


@pytest.mark.parametrize("width", [5.0, 8.0])
@pytest.mark.parametrize(
    "end",
    [
        pytest.param(1 + 0.05 * np.arange(25), id="rise"),
        pytest.param(np.inf, id="infinity"),
        pytest.param(np.repeat([3.0, 1.2], [12, 13]), id="rise and steeper fall"),
    ],
)
def test_suggestion_is_halfway_between_steepest_descent_and_minimum(width, end):
    """The loss falls around step 50, and from step 75 on does something else."""
    steps = np.arange(100)
    losses = 1 + 1 / (1 + np.exp((steps - 50) / (width / 2)))
    losses[75:] = end
    finder = with_losses(losses)
    assert finder.window == 11
    means = np.convolve(losses, np.ones(11) / 11, "valid")
    minimum = 5 + means.argmin()
    assert finder.suggestion == pytest.approx(10 ** (-6 + 6 * (50 + minimum) / 2 / 99))


def test_noise_moves_the_suggestion_by_less_than_half_a_decade():
    steps = np.arange(100)
    losses = 0.5 + 1.8 / (1 + np.exp((steps - 50) / 4)) + 0.05 * np.maximum(steps - 70, 0)
    clean = with_losses(losses).suggestion
    generator = np.random.default_rng(0)
    noisy = [with_losses(losses + generator.normal(scale=0.1, size=100)).suggestion for _ in range(50)]
    assert np.abs(np.log10(np.array(noisy) / clean)).max() < 0.5


def test_suggestion_is_stable_on_a_quadratic_problem():
    """The loss is ‖w‖²: one step of descent solves it at the rate 1/2, and descent is unstable from 1 on."""
    inputs = np.linalg.qr(GENERATOR.normal(size=(40, 4)))[0] * np.sqrt(40)
    inputs = np.tile(inputs, (25, 1)).astype("float32")
    model = linear_model()
    model.set_weights([np.ones((4, 1))])
    finder = LearningRateRangeTest(1e-5, 100.0, steps=100)
    model.fit(inputs, np.zeros(1000), batch_size=40, epochs=4, shuffle=False, verbose=0, callbacks=[finder])
    assert finder.losses[0] == pytest.approx(4, rel=1e-5)
    assert 0.05 < finder.suggestion < 1
    assert finder.learning_rates[-1] > 1


def test_suggestion_is_refused_when_the_losses_tell_none():
    with pytest.raises(ValueError, match="fewer than 11 finite losses"):
        _ = with_losses([1.0] * 5 + [np.nan]).suggestion
    with pytest.raises(ValueError, match="fewer than 11 finite losses: run fit"):
        _ = LearningRateRangeTest(1e-6, 1.0, steps=100).suggestion
    with pytest.raises(ValueError, match="did not fall clearly"):
        _ = with_losses(np.random.default_rng(0).normal(10, 1, size=100)).suggestion
    with pytest.raises(ValueError, match="did not fall clearly"):
        _ = with_losses(np.linspace(1, 3, 100)).suggestion
    with pytest.raises(ValueError, match="still falling at the last rate, 1: raise `high`"):
        _ = with_losses(np.linspace(2, 1, 100)).suggestion


# What it leaves

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "average": lambda: keras.optimizers.Adam(0.01, use_ema=True, gradient_accumulation_steps=2),
    "mixed precision": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1, momentum=0.9)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_everything_is_restored_bit_by_bit(optimizer):
    model = build_model(OPTIMIZERS[optimizer]())
    model.optimizer.build(model.trainable_variables)
    states, steps = [], []

    class Spy(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            states.append(snapshot(self.model))
            steps.append(int(self.model.optimizer.iterations))

        def on_epoch_end(self, epoch, logs=None):
            self.on_train_begin()
            random.random()
            np.random.random()

    fit(model, LearningRateRangeTest(1e-3, 1.0, steps=24), Spy())
    assert_equal(snapshot(model), states[0])
    # Restored from something else: every variable of the model was another when the test ended.
    for before, after in list(zip(states[0][0], states[-1][0], strict=True))[: len(model.variables)]:
        assert not np.array_equal(before, after)
    assert steps[-1] > steps[0] == 0


def test_training_after_the_test_is_that_without_it():
    results = []
    for with_test in (False, True):
        model = build_model(keras.optimizers.Adam(0.01))
        if with_test:
            fit(model, LearningRateRangeTest(1e-3, 1.0, steps=24))
        history = fit(model, epochs=3).history
        results.append((snapshot(model), history))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_training_after_a_test_in_the_middle_is_that_without_it():
    results = []
    for with_test in (False, True):
        model = build_model()
        fit(model, epochs=2)
        if with_test:
            fit(model, LearningRateRangeTest(1e-3, 1.0, steps=24))
        fit(model, epochs=3)
        results.append(snapshot(model))
    assert_equal(*results)


TRAINING_AFTER_THE_TEST = """
import sys
import numpy as np
from callbacks.learning_rate_range_test import LearningRateRangeTest
from tests.callbacks.test_learning_rate_range_test import build_model, fit

model = build_model()
fit(model, LearningRateRangeTest(1e-3, 1.0, steps=24))
fit(model, epochs=3)
np.savez(sys.argv[1], *model.get_weights())
"""


def test_training_after_the_test_in_a_new_process_is_that_without_it_in_this(tmp_path):
    path = tmp_path / "weights.npz"
    subprocess.run([sys.executable, "-c", TRAINING_AFTER_THE_TEST, path], check=True, capture_output=True)
    model = build_model()
    fit(model, epochs=3)
    with np.load(path) as there:
        for weights, name in zip(model.get_weights(), there.files, strict=True):
            np.testing.assert_array_equal(weights, there[name])


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="Keras refuses unseeded random calls in layers on JAX")
@pytest.mark.parametrize("drawn_before", [False, True])
@pytest.mark.parametrize("run_eagerly", [False, True])
def test_generator_that_unseeded_random_calls_share_is_restored(drawn_before, run_eagerly):
    class Noise(layers.Layer):
        def call(self, inputs):
            return inputs + keras.random.normal(keras.ops.shape(inputs))

    results = []
    for with_test in (False, True):
        model = keras.Sequential([keras.Input((4,)), Noise(), layers.Dense(1, kernel_initializer="ones")])
        model.compile("sgd", "mse", run_eagerly=run_eagerly)
        # The generator is made when it is first drawn from: here, or in the training step.
        keras.utils.set_random_seed(0)
        if drawn_before:
            keras.random.normal((1,))
        if with_test:
            fit(model, LearningRateRangeTest(1e-3, 0.1, steps=24))
        fit(model, epochs=2)
        results.append((snapshot(model), keras.ops.convert_to_numpy(keras.random.normal((3,))).tolist()))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


class Counting(layers.Layer):
    """Holds variables in a list, a dict and, on TensorFlow, of its own kind, and changes them in training."""

    def __init__(self):
        super().__init__()
        self.counts = [keras.Variable(0.0, trainable=False), {"second": keras.Variable(0.0, trainable=False)}]
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            self.raw = tf.Variable(0.0, trainable=False)

    def call(self, inputs, training=False):
        if training:
            for count in (self.counts[0], self.counts[1]["second"], *([self.raw] if hasattr(self, "raw") else [])):
                count.assign(count + 1.0)
        return inputs


def stateful():
    """Return a model with states that are not among `model.variables`."""
    keras.utils.set_random_seed(0)
    recurrent = layers.LSTM(3, stateful=True)
    # On PyTorch, Keras 3.15 cannot train a stateful recurrent layer: its states are changed before their gradient.
    is_trained = keras.backend.backend() != "torch"
    before = [layers.Reshape((4, 1)), recurrent] if is_trained else []
    counting, spectral = Counting(), layers.SpectralNormalization(layers.Dense(1))
    parts = [*before, layers.BatchNormalization(), counting, spectral]
    model = keras.Sequential([keras.Input((4,), batch_size=8), *parts])
    model.compile(keras.optimizers.Adam(0.01), "mse")
    model.optimizer.build(model.trainable_variables)
    raw = [counting.raw] if hasattr(counting, "raw") else []
    held = [*(recurrent.states or []), counting.counts[0], counting.counts[1]["second"], *raw]
    return model, lambda: [np.array(keras.ops.convert_to_numpy(variable)) for variable in [*held, *model.variables]]


def test_states_that_are_not_among_the_variables_are_restored():
    model, states = stateful()
    model.fit(INPUTS[:24], TARGETS[:24], batch_size=8, verbose=0)
    before = states()
    seen = []

    class Spy(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(states())

    callbacks = [LearningRateRangeTest(1e-3, 1.0, steps=24), Spy()]
    model.fit(INPUTS, TARGETS, batch_size=8, epochs=20, verbose=0, callbacks=callbacks)
    if keras.backend.backend() != "jax":
        # On JAX, a compiled step does not change what is not among the variables.
        assert not any(map(np.array_equal, seen[-1][:2], before[:2]))
    for after, value in zip(states(), before, strict=True):
        np.testing.assert_array_equal(after, value)


def test_buffers_of_a_module_of_pytorch_are_restored():
    torch = pytest.importorskip("torch")
    if keras.backend.backend() != "torch":
        pytest.skip("is of PyTorch")
    module = torch.nn.BatchNorm1d(4)
    model = keras.Sequential([keras.Input((4,)), layers.TorchModuleWrapper(module), layers.Dense(1)])
    model.compile("sgd", "mse")
    before = module.running_mean.clone()
    seen = []

    class Spy(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(module.running_mean.clone())

    fit(model, LearningRateRangeTest(1e-3, 1.0, steps=24), Spy())
    assert not torch.equal(seen[-1], before)
    assert torch.equal(module.running_mean, before)


class LeaveWeights(keras.callbacks.Callback):
    """Puts weights into the model when training ends."""

    def on_train_end(self, logs=None):
        self.model.set_weights([np.ones_like(weight) for weight in self.model.get_weights()])
        random.random()


@pytest.mark.parametrize(
    "make_other",
    [
        lambda: keras.callbacks.EarlyStopping("loss", restore_best_weights=True, start_from_epoch=0),
        LeaveWeights,
        lambda: keras.callbacks.SwapEMAWeights(swap_on_epoch=True),
    ],
    ids=["early stopping", "weights", "exponential average"],
)
def test_callbacks_after_it_leave_nothing_in_the_model(make_other):
    # On JAX, Keras 3.15 cannot fit twice with an exponential average: weights and average then share their memory.
    model = build_model(keras.optimizers.Adam(0.01, use_ema=True))
    model.optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "jax":
        fit(model, epochs=0)
    else:
        fit(model, epochs=1)
    before = snapshot(model)
    history = fit(model, LearningRateRangeTest(1e-3, 1.0, steps=24), make_other())
    assert_equal(snapshot(model), before)
    assert "on_train_end" not in vars(history)


def test_callbacks_after_it_see_the_restored_model():
    model = build_model()
    model.optimizer.build(model.trainable_variables)
    before, seen = snapshot(model), []

    class Spy(keras.callbacks.Callback):
        def on_train_end(self, logs=None):
            seen.append(snapshot(self.model))

    fit(model, LearningRateRangeTest(1e-3, 1.0, steps=24), Spy())
    for one, other in zip(seen[0][0], before[0], strict=True):
        np.testing.assert_array_equal(one, other)


class TwoOptimizers(keras.Model):
    """Trains its two layers with optimizers of their own, and logs no loss of that name."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(3), layers.Dense(1)
        self.first_optimizer = keras.optimizers.Adam(0.01)
        self.others = [keras.optimizers.Adam(0.01)]

    def call(self, inputs):
        return self.second(self.first(inputs))

    def train_step(self, data):
        x, y = data
        for layer, optimizer in ((self.first, self.first_optimizer), (self.second, self.others[0])):
            loss, gradients = self.gradients(x, y, layer.trainable_variables)
            optimizer.apply(gradients, layer.trainable_variables)
        return {"error": loss, "per example": keras.ops.stack([loss, loss])}

    def gradients(self, x, y, variables):
        def compute():
            return keras.ops.mean((self(x)[:, 0] - y) ** 2)

        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            with tf.GradientTape() as tape:
                loss = compute()
            return loss, tape.gradient(loss, variables)
        import torch

        loss = compute()
        return loss.detach(), torch.autograd.grad(loss, [variable.value for variable in variables])


def two_optimizers(is_built=True):
    keras.utils.set_random_seed(0)
    model = TwoOptimizers()
    model(INPUTS[:1])
    model.compile("adam", run_eagerly=True)
    if is_built:
        model.first_optimizer.build(model.first.trainable_variables)
        model.others[0].build(model.second.trainable_variables)
    return model


NOT_ON_JAX = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="on JAX, fit carries the state of one optimizer only"
)


@NOT_ON_JAX
@pytest.mark.parametrize("monitor", ["error", "per example"])
def test_one_of_several_optimizers_is_raised_and_all_are_restored(monitor):
    model = two_optimizers()
    optimizers = [model.first_optimizer, model.others[0]]

    def state():
        variables = [*model.variables, *(variable for optimizer in optimizers for variable in optimizer.variables)]
        return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]

    before, rates = state(), []

    class Spy(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            rates.append([float(keras.ops.convert_to_numpy(optimizer.learning_rate)) for optimizer in optimizers])

    finder = LearningRateRangeTest(1e-4, 1e-2, steps=24, monitor=monitor, optimizer=model.first_optimizer)
    fit(model, finder, Spy())
    np.testing.assert_allclose(np.array(rates)[:, 0], np.geomspace(1e-4, 1e-2, 24), rtol=1e-5)
    np.testing.assert_allclose(np.array(rates)[:, 1], 0.01)
    assert len(finder.losses) == 24
    for after, value in zip(state(), before, strict=True):
        np.testing.assert_array_equal(after, value)


@NOT_ON_JAX
def test_what_cannot_be_tested_with_several_optimizers_is_told():
    model = two_optimizers()
    before = model.get_weights()[0].copy()
    with pytest.raises(ValueError, match="The logs have no 'loss', but error, per example"):
        fit(model, LearningRateRangeTest(1e-4, 1e-2, steps=24))
    np.testing.assert_array_equal(model.get_weights()[0], before)
    with pytest.warns(UserWarning, match="rate of the optimizer 'adam.*', which has not made a step"):
        fit(model, LearningRateRangeTest(1e-4, 1e-2, steps=24, monitor="error"))
    with pytest.raises(ValueError, match=r"optimizer 'adam.*' is not built.* build\(variables\)"):
        fit(two_optimizers(is_built=False), LearningRateRangeTest(1e-4, 1e-2, steps=24))


def test_multi_optimizer_is_refused_and_its_members_are_not():
    def multi_optimizer():
        first, second = keras.optimizers.SGD(0.1), keras.optimizers.SGD(0.2)
        return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(first, {".*bias": second}))

    model = build_model(multi_optimizer())
    with pytest.raises(ValueError, match="several: pass one of them"):
        fit(model, LearningRateRangeTest(1e-4, 1e-2, steps=24))
    finder = LearningRateRangeTest(1e-4, 1e-2, steps=24, optimizer=model.optimizer.optimizers[0])
    fit(model, finder)
    rates = [float(keras.ops.convert_to_numpy(each.learning_rate)) for each in model.optimizer.optimizers]
    assert rates == pytest.approx([0.2, 0.1])
    assert len(finder.losses) == 24


@pytest.mark.filterwarnings("ignore:.*ran out of data")
def test_data_that_end_early_give_as_many_rates_as_losses():
    data = ((INPUTS[:32], TARGETS[:32]) for _ in range(22))
    finder = LearningRateRangeTest(1e-4, 1e-2, steps=30)
    history = linear_model().fit(data, epochs=9, steps_per_epoch=5, verbose=0, callbacks=[finder]).history
    assert len(finder.losses) == len(finder.learning_rates)
    assert finder.learning_rates == pytest.approx(np.geomspace(1e-4, 1e-2, 30)[: len(finder.losses)])
    assert len(history["learning_rate"]) == len(history["loss"])


def test_log_false_keeps_it_out_of_the_logs():
    finder = LearningRateRangeTest(1e-4, 1e-2, steps=np.int64(24), log=False)
    assert set(fit(linear_model(), finder).history) == {"loss"}
    assert len(finder.losses) == 24


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda finder: pickle.loads(pickle.dumps(finder))])
def test_copies_and_pickles_have_what_was_measured_and_serve_again(duplicate):
    model = linear_model()
    finder = LearningRateRangeTest(1e-3, 1.0, steps=24, optimizer=model.optimizer)
    fit(model, finder, shuffle=False)
    again = duplicate(finder)
    assert (again.losses, again.learning_rates) == (finder.losses, finder.learning_rates)
    fit(model, again, shuffle=False)
    assert again.losses == pytest.approx(finder.losses)


class Failure(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if len(self.finder.losses) == 10:
            raise RuntimeError("failure")


@pytest.mark.parametrize("remedy", ["detach", "next fit"])
def test_exception_in_fit_is_undone_later(remedy):
    model = build_model()
    model.optimizer.build(model.trainable_variables)
    if keras.backend.backend() == "jax":
        # Makes the metrics, for which Keras draws one shuffled batch.
        fit(model, epochs=0)
    before = snapshot(model)
    finder, failure = LearningRateRangeTest(1e-3, 1.0, steps=24), Failure()
    failure.finder = finder
    with pytest.raises(RuntimeError, match="failure"):
        fit(model, finder, failure)
    assert not np.array_equal(snapshot(model)[0][0], before[0][0])
    if remedy == "detach":
        finder.detach()
        assert_equal(snapshot(model), before)
        weights = [np.zeros_like(weight) for weight in model.get_weights()]
        model.set_weights(weights)
        finder.detach()
        np.testing.assert_array_equal(model.get_weights()[0], weights[0])
    else:
        fit(model, finder)
        assert_equal(snapshot(model), before)
        assert len(finder.losses) == 24


def test_second_fit_repeats_the_first():
    model = linear_model()
    finder = LearningRateRangeTest(1e-3, 1.0, steps=24)
    fit(model, finder, shuffle=False)
    first = finder.losses
    fit(model, finder, shuffle=False)
    assert finder.losses == first
    assert len(finder.learning_rates) == 24


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 0.0}, "low must be a finite number above 0, not 0.0"),
        ({"low": np.nan}, "low must be"),
        ({"low": "0.1"}, "low must be a finite number above 0, not '0.1'"),
        ({"low": 0.1, "high": 0.1}, r"high must be a finite number above low \(0.1\), not 0.1"),
        ({"high": np.inf}, "high must be"),
        ({"steps": 19}, "steps must be an integer of at least 20, not 19"),
        ({"steps": 20.0}, "steps must be"),
        ({"threshold": 1.0}, "threshold must be a number above 1, not 1.0"),
    ],
)
def test_bad_argument_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        LearningRateRangeTest(**{"low": 1e-6, "high": 1.0, "steps": 100} | arguments)


@pytest.mark.parametrize("rate", [keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9), lambda: 0.1])
def test_schedule_is_refused(rate):
    with pytest.raises(ValueError, match="cannot have a schedule or a function"):
        fit(linear_model(keras.optimizers.SGD(rate)), LearningRateRangeTest(1e-6, 1.0, steps=24))


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="on PyTorch, Keras refuses them itself")
def test_several_steps_per_execution_are_refused():
    with pytest.raises(ValueError, match="compile with steps_per_execution=1, not 2"):
        fit(linear_model(steps_per_execution=2), LearningRateRangeTest(1e-6, 1.0, steps=24))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere fit builds before any callback sees it")
def test_unbuilt_model_is_refused():
    model = keras.Sequential([layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"is not built.*call `model\(x\[:1\]\)`.*keras.Input"):
        fit(model, LearningRateRangeTest(1e-6, 1.0, steps=24))


def test_too_few_epochs_are_refused():
    with pytest.raises(ValueError, match="3 steps an epoch, so 25 steps need epochs=9, not 8"):
        fit(linear_model(), LearningRateRangeTest(1e-6, 1.0, steps=25), epochs=8)


# The picture and the example


def test_picture_shows_the_curve_and_the_suggestion(tmp_path):
    steps = np.arange(100)
    losses = 1 + 1 / (1 + np.exp((steps - 50) / 4)) + 0.05 * np.maximum(steps - 75, 0)
    finder = with_losses(losses)
    figure = finder.plot(tmp_path / "finder.svg")
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), finder.losses)
    assert finder.plot().axes[0].get_xscale() == "log"
    texts = {element.text for element in ElementTree.parse(tmp_path / "finder.svg").iter() if element.text}
    expected = {"learning rate", "loss", "one batch", "mean of 11 batches", f"suggestion: {finder.suggestion:.2g}"}
    assert expected <= texts
    finder.plot(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "finder.svg").read_bytes()
    finder.plot(str(tmp_path / "finder.png"))
    assert (tmp_path / "finder.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("losses", [np.linspace(1, 3, 100), [1.0, 2.0, np.inf], []])
def test_picture_without_a_suggestion_shows_what_there_is(losses, tmp_path):
    with_losses(losses).plot(tmp_path / "finder.svg")
    texts = {element.text for element in ElementTree.parse(tmp_path / "finder.svg").iter() if element.text}
    assert "one batch" in texts
    assert not any("suggestion" in text for text in texts)


def test_example_in_the_docstring_runs():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="tanh"), layers.Dense(1, "sigmoid")])
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    names = {"keras": keras, "layers": layers, "np": np, "x": INPUTS, "y": TARGETS, "model": model}
    names["LearningRateRangeTest"] = LearningRateRangeTest
    for example in doctest.DocTestParser().get_examples(LearningRateRangeTest.__doc__):
        exec(example.source, names)
    assert float(keras.ops.convert_to_numpy(model.optimizer.learning_rate)) == pytest.approx(names["finder"].suggestion)
    assert len(names["finder"].losses) <= 60
