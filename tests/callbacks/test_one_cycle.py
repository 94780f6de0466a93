import copy
import doctest
import pickle
import warnings
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pytest
from keras import layers, ops

from callbacks.learning_rate_logger import LearningRateLogger
from callbacks.one_cycle import OneCycle

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(96, 4)).astype("float32")
TARGETS = (INPUTS.sum(axis=1) > 0).astype("float32")
COMPILED = [{}, {"jit_compile": True}, {"run_eagerly": True}]
MOMENTUM = (0.85, 0.95)
WITH_MOMENTUM = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}}


def network(optimizer=None, **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(1, "sigmoid", dtype="float32")])
    model.compile(optimizer or keras.optimizers.Adam(), "binary_crossentropy", metrics=["accuracy"], **arguments)
    model.optimizer.build(model.trainable_variables)
    return model


def fit(model, *callbacks, epochs=3, **arguments):
    return model.fit(INPUTS, TARGETS, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks), **arguments)


def quadratic(optimizer, **arguments):
    """Return a model of two weights w with the loss Σ w²/2, so that the gradient of each batch of ones is w."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(2, use_bias=False)])
    model.compile(optimizer, lambda targets, outputs: ops.sum(outputs**2, axis=-1) / 2, **arguments)
    model.set_weights([np.array([[1.0, -3.0]], "float32")])
    model.optimizer.build(model.trainable_variables)
    return model


def fit_ones(model, *callbacks, steps=12):
    ones = np.ones((4 * steps, 1), "float32")
    return model.fit(ones, np.ones((4 * steps, 2)), batch_size=4, verbose=0, callbacks=list(callbacks))


class Weights(keras.callbacks.Callback):
    """Records the weights after each step."""

    def on_train_begin(self, logs=None):
        self.values = []

    def on_train_batch_end(self, batch, logs=None):
        self.values.append(self.model.get_weights()[0][0])


def simulated_sgd(rates, momenta, nesterov=False):
    weights, velocity = np.array([1.0, -3.0]), np.zeros(2)
    for rate, momentum in zip(rates, momenta, strict=True):
        gradient = weights
        velocity = momentum * velocity - rate * gradient
        weights = weights + (momentum * velocity - rate * gradient if nesterov else velocity)
        yield weights


def simulated_adam(rates, momenta, beta_2=0.999, epsilon=1e-7):
    weights, mean, square = np.array([1.0, -3.0]), np.zeros(2), np.zeros(2)
    for step, (rate, beta_1) in enumerate(zip(rates, momenta, strict=True), start=1):
        gradient = weights
        mean = beta_1 * mean + (1 - beta_1) * gradient
        square = beta_2 * square + (1 - beta_2) * gradient**2
        step_size = rate * np.sqrt(1 - beta_2**step) / (1 - beta_1**step)
        weights = weights - step_size * mean / (np.sqrt(square) + epsilon)
        yield weights


def triangle(steps, peak, start, end, top, high=0.95, low=0.85):
    """Return the rates and the momenta of a cycle, phase by phase."""
    rates = np.concatenate(
        [
            np.linspace(start, peak, top + 1),
            np.linspace(peak, start, top + 1)[1:],
            np.linspace(start, end, steps - 2 * top)[1:],
        ]
    )
    down = np.linspace(high, low, top + 1)
    return rates, np.concatenate([down, down[::-1][1:], np.full(steps - 2 * top - 1, high)])


# The cycle


def test_shape_of_the_cycle():
    cycle = OneCycle(peak=0.5, steps=100)
    rates, momenta = triangle(100, peak=0.5, start=0.05, end=5e-5, top=42)
    np.testing.assert_allclose(cycle.learning_rate_at(np.arange(100)), rates)
    np.testing.assert_allclose(cycle.momentum_at(np.arange(100)), momenta)


@pytest.mark.parametrize("rise", [0.001, 0.25, 0.43, 0.499])
@pytest.mark.parametrize("steps", [4, 5, 6, 7, 50, 101, 102])
def test_every_cycle_begins_peaks_and_ends_where_it_says(steps, rise):
    rates = OneCycle(1.0, steps, rise, divisor=4, final_divisor=100).learning_rate_at(np.arange(steps))
    assert rates[0] == pytest.approx(1 / 4)
    assert rates.max() == 1
    assert rates[-1] == pytest.approx(1 / 400)
    top = rates.argmax()
    assert 1 <= top <= max(1, rise * steps)
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert (np.diff(rates[top:]) < 0).all()


# What the optimizer does with it


@pytest.mark.parametrize("arguments", COMPILED, ids=str)
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_takes_the_steps_of_a_simulation(nesterov, arguments):
    model = quadratic(keras.optimizers.SGD(0.3, momentum=0.5, nesterov=nesterov), **arguments)
    cycle, weights = OneCycle(0.4, 12, momentum=(0.2, 0.9)), Weights()
    fit_ones(model, cycle, weights)
    hyperparameters = triangle(12, peak=0.4, start=0.04, end=4e-5, top=4, high=0.9, low=0.2)
    np.testing.assert_allclose(weights.values, list(simulated_sgd(*hyperparameters, nesterov)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arguments", COMPILED, ids=str)
def test_adam_takes_the_steps_of_a_simulation(arguments):
    model = quadratic(keras.optimizers.Adam(0.3, beta_1=0.5), **arguments)
    cycle, weights = OneCycle(0.4, 12, momentum=(0.2, 0.9)), Weights()
    fit_ones(model, cycle, weights)
    hyperparameters = triangle(12, peak=0.4, start=0.04, end=4e-5, top=4, high=0.9, low=0.2)
    np.testing.assert_allclose(weights.values, list(simulated_adam(*hyperparameters)), rtol=1e-4, atol=1e-5)


def test_rate_takes_effect_when_no_other_callback_looks_at_the_model():
    model = quadratic(keras.optimizers.SGD(0.3, momentum=0.5))
    fit_ones(model, OneCycle(0.4, 12, momentum=(0.2, 0.9)))
    hyperparameters = triangle(12, peak=0.4, start=0.04, end=4e-5, top=4, high=0.9, low=0.2)
    np.testing.assert_allclose(model.get_weights()[0][0], list(simulated_sgd(*hyperparameters))[-1], rtol=1e-4)


def test_momentum_none_leaves_momentum_as_it_is():
    model = quadratic(keras.optimizers.SGD(0.3, momentum=0.5))
    cycle, weights = OneCycle(0.4, 12, momentum=None), Weights()
    logs = fit_ones(model, cycle, weights).history
    rates, _ = triangle(12, peak=0.4, start=0.04, end=4e-5, top=4)
    np.testing.assert_allclose(weights.values, list(simulated_sgd(rates, [0.5] * 12)), rtol=1e-4, atol=1e-6)
    assert "momentum" not in logs


@pytest.mark.parametrize("name", ["RMSprop", "Adamax", "Nadam", "Lamb", "Lion", "Muon"])
def test_each_optimizer_obeys_a_constant_momentum_as_its_own(name):
    make = getattr(keras.optimizers, name)
    attribute = "momentum" if name in ("RMSprop", "Muon") else "beta_1"
    as_cycle = network(make(0.01, **WITH_MOMENTUM.get(name, {})))
    fit(as_cycle, OneCycle(0.01, 9, momentum=(0.7, 0.7)))
    as_attribute = network(make(0.01, **{attribute: 0.7}))
    fit(as_attribute, OneCycle(0.01, 9, momentum=None))
    for ours, own in zip(as_cycle.get_weights(), as_attribute.get_weights(), strict=True):
        np.testing.assert_allclose(ours, own, rtol=1e-4, atol=1e-6)


def test_mixed_precision_takes_the_steps_of_full_precision():
    hyperparameters = {}
    for policy in ("float32", "mixed_float16"):
        keras.config.set_dtype_policy(policy)
        try:
            model = network(keras.optimizers.SGD(0.1, momentum=0.9))
            rates = LearningRateLogger()
            fit(model, OneCycle(0.4, 9), rates)
        finally:
            keras.config.set_dtype_policy("float32")
        hyperparameters[policy] = model.get_weights(), rates.history, model.optimizer.__class__.__name__
    (weights, history, _), (mixed_weights, mixed_history, name) = hyperparameters.values()
    assert name == "LossScaleOptimizer"
    assert mixed_history == history
    for full, mixed in zip(weights, mixed_weights, strict=True):
        np.testing.assert_allclose(mixed, full, atol=2e-3)


def test_accumulated_batches_count_as_steps():
    model = quadratic(keras.optimizers.SGD(0.3, momentum=0.5, gradient_accumulation_steps=2))
    cycle, weights = OneCycle(0.4, 12, momentum=(0.2, 0.9)), Weights()
    fit_ones(model, cycle, weights)
    hyperparameters = triangle(12, peak=0.4, start=0.04, end=4e-5, top=4, high=0.9, low=0.2)
    every_second = (values[1::2] for values in hyperparameters)
    np.testing.assert_allclose(weights.values[1::2], list(simulated_sgd(*every_second)), rtol=1e-4, atol=1e-6)


def test_logs_receive_the_rate_and_the_momentum_of_the_last_step():
    cycle, rates = OneCycle(0.5, 9), LearningRateLogger()
    logs = fit(network(), cycle, rates).history
    expected_rates, expected_momenta = triangle(9, peak=0.5, start=0.05, end=5e-5, top=3)
    np.testing.assert_allclose(rates.history, expected_rates, rtol=1e-6)
    np.testing.assert_allclose(logs["learning_rate"], expected_rates[2::3], rtol=1e-6)
    np.testing.assert_allclose(logs["momentum"], expected_momenta[2::3], rtol=1e-6)


# Before, after, again


def test_second_fit_is_a_second_cycle():
    model, cycle, rates = network(), OneCycle(0.5, 9), LearningRateLogger()
    for _ in range(2):
        fit(model, cycle, rates)
        np.testing.assert_allclose(rates.history, cycle.learning_rate_at(np.arange(9)), rtol=1e-6)


def unsized():
    """Return a generator of the batches of three epochs, which tells no length."""
    return ((INPUTS[start : start + 32], TARGETS[start : start + 32]) for _ in range(3) for start in (0, 32, 64))


def test_rate_stays_at_its_last_value_with_a_warning_when_training_goes_on():
    cycle, rates = OneCycle(0.5, 5), LearningRateLogger()
    with pytest.warns(UserWarning, match="after the 5 steps of OneCycle") as warnings:
        network().fit(unsized(), epochs=1, verbose=0, callbacks=[cycle, rates])
    assert sum("OneCycle" in str(warning.message) for warning in warnings) == 1
    np.testing.assert_allclose(rates.history[4:], [5e-5] * 5, rtol=1e-6)


# As many steps as fit makes


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"epochs": 10, "batch_size": 16, "validation_split": 0.2}, 50),
        ({"epochs": 3, "batch_size": 50}, 6),
        ({"epochs": 4, "steps_per_epoch": 3, "batch_size": 16}, 12),
        ({"epochs": 10, "initial_epoch": 8, "batch_size": 48}, 20),
    ],
    ids=str,
)
def test_steps_are_those_of_fit(arguments, steps):
    cycle, rates = OneCycle(0.5), LearningRateLogger()
    network().fit(INPUTS, TARGETS, verbose=0, callbacks=[cycle, rates], **arguments)
    assert cycle.steps == steps
    expected, _ = triangle(steps, peak=0.5, start=0.05, end=5e-5, top=int(0.43 * (steps - 1)))
    np.testing.assert_allclose(rates.history, expected[-len(rates.history) :], rtol=1e-5)
    assert rates.history[-1] == pytest.approx(5e-5)


def test_steps_of_the_second_fit_are_its_own():
    model, cycle = network(), OneCycle(0.5)
    fit(model, cycle, epochs=4)
    fit(model, cycle, epochs=2)
    assert cycle.steps == 6


@pytest.mark.parametrize("given", [8, 10, np.int64(12)])
def test_number_of_steps_that_fit_does_not_make_is_refused_before_training(given):
    model = network()
    with pytest.raises(ValueError, match=f"steps={given}, but fit makes 3 epochs of 3 steps, 9 in all"):
        fit(model, OneCycle(0.5, given))
    assert int(model.optimizer.iterations) == 0


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_numpy_integers_are_integers(integer):
    fit(network(), cycle := OneCycle(0.5, steps=integer(9)))
    pickle.dumps(cycle)


def test_data_without_a_length_need_a_number():
    with pytest.raises(ValueError, match="pass steps=..., or steps_per_epoch"):
        network().fit(unsized(), verbose=0, callbacks=[OneCycle(0.5)])
    rates = LearningRateLogger()
    with warnings.catch_warnings():
        # Keras begins a tenth step, for which there are no data.
        warnings.filterwarnings("error", message="Training (goes on|ended)")
        network().fit(unsized(), verbose=0, callbacks=[OneCycle(0.5, 9), rates])
    np.testing.assert_allclose(rates.history, triangle(9, 0.5, 0.05, 5e-5, top=3)[0], rtol=1e-5)


def test_fit_of_fewer_than_four_steps_is_the_beginning_of_the_shortest_cycle():
    rates = LearningRateLogger()
    with pytest.warns(UserWarning, match="ended after 3 of the 4 steps of OneCycle"):
        fit(network(), OneCycle(0.5), rates, epochs=1)
    np.testing.assert_allclose(rates.history, [0.05, 0.5, 0.05], rtol=1e-6)


def test_training_that_ends_before_its_cycle_is_told():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = epoch == 1

    with pytest.warns(UserWarning, match="ended after 6 of the 9 steps of OneCycle, at the rate 0.2"):
        fit(network(), OneCycle(0.5), Stop())


@pytest.mark.filterwarnings("ignore:.*ran out of data", "ignore:Training ended")
def test_data_that_end_early():
    places = []

    class Spy(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.first = 3 * epoch

        def on_train_batch_end(self, batch, logs=None):
            places.append(self.first + batch)

    cycle, rates = OneCycle(0.5), LearningRateLogger()
    data = ((INPUTS[:32], TARGETS[:32]) for _ in range(7))
    logs = network().fit(data, epochs=5, steps_per_epoch=3, verbose=0, callbacks=[cycle, rates, Spy()]).history
    expected, _ = triangle(15, peak=0.5, start=0.05, end=5e-5, top=6)
    # Keras begins the third epoch with the last batch, and makes fewer than three steps in those after it too.
    assert places[:7] == list(range(7))
    assert 7 < len(places) < 15
    np.testing.assert_allclose(rates.history, expected[places], rtol=1e-5)
    last = [max(place for place in places if place // 3 == epoch) for epoch in range(5)]
    np.testing.assert_allclose(logs["learning_rate"], expected[last], rtol=1e-5)


# Resumed


class Interruption(keras.callbacks.Callback):
    """Stops training in the middle of an epoch."""

    def __init__(self, epoch):
        super().__init__()
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        self.is_due = epoch == self.epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.is_due and batch == 1:
            raise InterruptedError


@pytest.mark.parametrize("order", ["cycle first", "backup first"])
@pytest.mark.parametrize("epoch", [1, 2, 4])
def test_training_resumed_from_a_backup_ends_as_the_uninterrupted_one(epoch, order, tmp_path):
    def train(*others, folder):
        model, rates = network(keras.optimizers.SGD(0.25, momentum=0.9)), LearningRateLogger()
        callbacks = [OneCycle(0.5), keras.callbacks.BackupAndRestore(tmp_path / folder)]
        try:
            fit(model, *(callbacks if order == "cycle first" else callbacks[::-1]), *others, rates, epochs=5)
        except InterruptedError:
            return None
        return model, rates.history

    train(Interruption(epoch), folder="interrupted")
    resumed, rest = train(folder="interrupted")
    whole, rates = train(folder="whole")
    assert rest == rates[3 * epoch :]
    np.testing.assert_allclose(rates, triangle(15, 0.5, 0.05, 5e-5, top=6)[0], rtol=1e-5)
    for ours, expected in zip(resumed.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-7)
    assert float(ops.convert_to_numpy(resumed.optimizer.learning_rate)) == 0.25


def test_data_without_a_length_go_on_where_the_optimizer_is():
    def one_epoch():
        return ((INPUTS[start : start + 32], TARGETS[start : start + 32]) for start in (0, 32, 64))

    model, rates = network(), LearningRateLogger()
    expected, _ = triangle(15, 0.5, 0.05, 5e-5, top=6)
    for epoch in range(3):
        # TensorFlow counts a step too many where data without a length end.
        place = int(model.optimizer.iterations)
        assert 3 * epoch <= place <= 4 * epoch
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Training ended")
            arguments = {"initial_epoch": epoch, "epochs": epoch + 1}
            model.fit(one_epoch(), verbose=0, callbacks=[OneCycle(0.5, 15), rates], **arguments)
        np.testing.assert_allclose(rates.history, expected[place : place + 3], rtol=1e-5)
    fresh = network()
    with pytest.raises(ValueError, match="begins at epoch 2.* made 0 steps: that tells no place in a cycle of 9"):
        fresh.fit(one_epoch(), initial_epoch=2, epochs=3, verbose=0, callbacks=[OneCycle(0.5, 9)])


# Several optimizers


class TwoOptimizers(keras.Model):
    """Trains its two layers with optimizers of their own, none of which is the one of `compile`."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(3), layers.Dense(1)
        self.optimizers_of = {
            "first": keras.optimizers.SGD(0.25, momentum=0.9),
            "second": keras.optimizers.SGD(0.25, momentum=0.9),
        }

    def call(self, inputs):
        return self.second(self.first(inputs))

    def train_step(self, data):
        x, y = data
        losses = []
        for layer, optimizer in zip((self.first, self.second), self.optimizers_of.values(), strict=True):
            loss, gradients = gradients_of(lambda: ops.mean((self(x)[:, 0] - y) ** 2), layer.trainable_variables)
            optimizer.apply(gradients, layer.trainable_variables)
            losses.append(loss)
        return {"first_loss": losses[0], "second_loss": losses[1]}


def gradients_of(compute, variables):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = compute()
        return loss, tape.gradient(loss, variables)
    import torch

    loss = compute()
    return loss.detach(), torch.autograd.grad(loss, [variable.value for variable in variables])


def two_optimizers():
    keras.utils.set_random_seed(0)
    model = TwoOptimizers()
    model(INPUTS[:1])
    model.compile("adam")
    return model


NOT_ON_JAX = pytest.mark.skipif(
    keras.backend.backend() == "jax", reason="on JAX, fit carries the state of one optimizer only"
)


@NOT_ON_JAX
def test_one_of_several_optimizers_is_set_and_no_other():
    model = two_optimizers()
    first, second = model.optimizers_of.values()
    rates = [LearningRateLogger(optimizer=first), LearningRateLogger(optimizer=second, log=False)]
    cycle = OneCycle(0.5, optimizer=first)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*has not made a step")
        logs = fit(model, cycle, *rates).history
    expected, _ = triangle(9, peak=0.5, start=0.05, end=5e-5, top=3)
    np.testing.assert_allclose(rates[0].history, expected, rtol=1e-6)
    assert rates[1].history == [0.25] * 9
    np.testing.assert_allclose(logs["learning_rate"], expected[2::3], rtol=1e-6)
    assert (float(first.learning_rate.numpy()), first.momentum) == (0.25, 0.9)


@NOT_ON_JAX
def test_optimizer_that_does_not_train_is_told_after_the_first_epoch():
    with pytest.warns(UserWarning, match="OneCycle sets the rate of the optimizer 'adam', which has not made a step"):
        fit(two_optimizers(), OneCycle(0.5))


def test_members_of_a_multi_optimizer():
    def multi_optimizer():
        return keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(
                keras.optimizers.SGD(0.25, momentum=0.9), {".*dense_1.*": keras.optimizers.SGD(0.125, momentum=0.9)}
            )
        )

    model = network(multi_optimizer())
    with pytest.raises(ValueError, match="several: pass one of them, optimizer=model.optimizer.optimizers"):
        fit(model, OneCycle(0.5))
    member = model.optimizer.optimizers[-1]
    rates = LearningRateLogger(optimizer=member)
    fit(model, OneCycle(0.5, optimizer=member), rates)
    np.testing.assert_allclose(rates.history, triangle(9, 0.5, 0.05, 5e-5, top=3)[0], rtol=1e-6)


# Kept out of the logs, drawn, copied


def test_log_false_keeps_it_out_of_the_logs():
    assert set(fit(network(), OneCycle(0.5, log=False)).history) == {"loss", "accuracy"}


def test_picture_shows_rate_and_momentum(tmp_path):
    cycle = OneCycle(0.5)
    with pytest.raises(ValueError, match="not known before fit"):
        cycle.plot()
    fit(network(), cycle)
    figure = cycle.plot(tmp_path / "cycle.svg")
    for axes, values in zip(figure.axes, triangle(9, 0.5, 0.05, 5e-5, top=3), strict=True):
        np.testing.assert_allclose(axes.lines[0].get_ydata(), values)
    texts = {element.text for element in ElementTree.parse(tmp_path / "cycle.svg").iter() if element.text}
    assert {"step", "learning rate", "momentum"} <= texts
    cycle.plot(tmp_path / "cycle.png")
    assert (tmp_path / "cycle.png").read_bytes().startswith(b"\x89PNG")
    assert len(OneCycle(0.5, 9, momentum=None).plot().axes) == 1


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda cycle: pickle.loads(pickle.dumps(cycle))])
def test_copies_and_pickles_make_the_same_cycle(duplicate):
    model = network()
    cycle, rates = OneCycle(0.5, optimizer=model.optimizer), LearningRateLogger()
    fit(model, cycle)
    again = duplicate(cycle)
    assert again.model is None
    fit(network(), again, rates)
    np.testing.assert_allclose(rates.history, cycle.learning_rate_at(np.arange(9)), rtol=1e-6)


class Fail(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            raise RuntimeError("stop")


@pytest.mark.parametrize(("momentum", "next_momentum"), [(MOMENTUM, MOMENTUM), (MOMENTUM, None), (None, MOMENTUM)])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_optimizer_is_as_before_after_fit_and_after_detach(name, momentum, next_momentum):
    model = network(getattr(keras.optimizers, name)(0.25, **WITH_MOMENTUM.get(name, {})))
    optimizer = model.optimizer
    attributes, variables, config = set(vars(optimizer)), optimizer.variables, optimizer.get_config()

    def assert_as_before():
        # Keras notes there which variables weight decay applies to, once it has trained.
        assert set(vars(optimizer)) - {"_exclude_from_weight_decay_cache"} == attributes
        assert [id(variable) for variable in optimizer.variables] == [id(variable) for variable in variables]
        assert optimizer.get_config() == config

    cycle = OneCycle(0.5, 9, momentum=momentum)
    fit(model, cycle)
    assert_as_before()
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, cycle, Fail())
    assert float(ops.convert_to_numpy(optimizer.learning_rate)) != 0.25
    cycle.detach()
    assert_as_before()
    with pytest.raises(RuntimeError, match="stop"):
        fit(model, cycle, Fail())
    fit(model, OneCycle(0.25, 9, momentum=next_momentum))
    assert_as_before()


def test_fit_after_it_has_the_momentum_from_before():
    models = [quadratic(keras.optimizers.SGD(0.1, momentum=0.5)) for _ in range(2)]
    fit_ones(models[0], OneCycle(0.4, 12))
    models[1].set_weights(models[0].get_weights())
    models[1].optimizer.set_weights([variable.numpy() for variable in models[0].optimizer.variables])
    for model in models:
        fit_ones(model)
    for continued, fresh in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(continued, fresh, rtol=1e-5)


def test_fit_that_trained_without_it_before_does_not_hide_it():
    model = quadratic(keras.optimizers.SGD(0.1, momentum=0.5))
    fit_ones(model)
    model.set_weights([np.array([[1.0, -3.0]], "float32")])
    model.optimizer.set_weights([np.zeros_like(variable.numpy()) for variable in model.optimizer.variables])
    weights = Weights()
    fit_ones(model, OneCycle(0.4, 12, momentum=(0.2, 0.9)), weights)
    hyperparameters = triangle(12, peak=0.4, start=0.04, end=4e-5, top=4, high=0.9, low=0.2)
    np.testing.assert_allclose(weights.values, list(simulated_sgd(*hyperparameters)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_checkpoint_saved_during_fit_is_one_of_the_plain_optimizer(name, tmp_path):
    def make():
        return getattr(keras.optimizers, name)(0.25, **WITH_MOMENTUM.get(name, {}), name=name)

    class Save(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.save(tmp_path / "during.keras")
            self.model.save_weights(tmp_path / "during.weights.h5")
            self.state = [variable.numpy() for variable in self.model.optimizer.variables]

    save = Save()
    fit(network(make()), OneCycle(0.5), save, epochs=2)
    plain = network(make())
    loaded = keras.saving.load_model(tmp_path / "during.keras").optimizer
    assert loaded.get_config() | {"learning_rate": 0.25} == plain.optimizer.get_config()
    plain.load_weights(tmp_path / "during.weights.h5")
    for optimizer in (loaded, plain.optimizer):
        for read, written in zip(optimizer.variables, save.state, strict=True):
            np.testing.assert_array_equal(read.numpy(), written)


# Refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peak": 0}, "peak must be a positive number"),
        ({"peak": np.inf}, "peak must be a positive number"),
        ({"steps": 3}, "steps must be None or an integer of at least 4"),
        ({"steps": 9.0}, "steps must be None or an integer of at least 4"),
        ({"rise": 0}, "rise must be between 0 and 0.5"),
        ({"rise": 0.5}, "rise must be between 0 and 0.5"),
        ({"divisor": 1}, "divisor must be above 1"),
        ({"final_divisor": 0.5}, "final_divisor must be at least 1"),
        ({"momentum": (0.95, 0.85)}, r"momentum must be None or \(lowest, highest\)"),
        ({"momentum": (0.9, 1.0)}, r"momentum must be None or \(lowest, highest\)"),
        ({"momentum": (0.9,)}, r"momentum must be None or \(lowest, highest\)"),
        ({"momentum": 0.9}, r"momentum must be None or \(lowest, highest\)"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        OneCycle(**{"peak": 0.1, "steps": 9} | arguments)


@pytest.mark.parametrize("rate", [keras.optimizers.schedules.CosineDecay(0.1, 9), lambda: 0.1])
def test_rate_that_is_a_schedule_is_refused(rate):
    with pytest.raises(ValueError, match="a schedule or a function. Give Adam a float"):
        fit(network(keras.optimizers.Adam(rate)), OneCycle(0.1, 9))


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="on PyTorch, Keras refuses them itself")
def test_several_steps_an_execution_are_refused():
    with pytest.raises(ValueError, match="steps_per_execution.*1"):
        fit(network(steps_per_execution=2), OneCycle(0.1, 9))


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "Adafactor", "ScheduleFreeAdamW"])
def test_optimizer_without_momentum_is_refused_unless_momentum_is_none(name):
    model = network(getattr(keras.optimizers, name)(0.25))
    with pytest.raises(ValueError, match=f"no momentum to change in {name}"):
        fit(model, OneCycle(0.1, 9))
    fit(model, OneCycle(0.1, 9, momentum=None))
    assert float(model.optimizer.learning_rate.numpy()) == 0.25


def test_example_in_the_docstring_runs():
    names = {"OneCycle": OneCycle, "keras": keras, "model": network(), "x": INPUTS, "y": TARGETS}
    exec("".join(example.source for example in doctest.DocTestParser().get_examples(OneCycle.__doc__)), names)
    assert names["rates"][-1] == pytest.approx(1e-6)
    assert names["momenta"][-1] == 0.95
