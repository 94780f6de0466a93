import doctest

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


def test_rate_stays_at_its_last_value_with_a_warning_when_training_goes_on():
    cycle, rates = OneCycle(0.5, 5), LearningRateLogger()
    with pytest.warns(UserWarning, match="after the 5 steps of OneCycle") as warnings:
        fit(network(), cycle, rates)
    assert sum("OneCycle" in str(warning.message) for warning in warnings) == 1
    np.testing.assert_allclose(rates.history[4:], [5e-5] * 5, rtol=1e-6)


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
    assert float(optimizer.learning_rate.numpy()) != 0.25
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
    fit(network(make()), OneCycle(0.5, 9), save, epochs=2)
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
        ({"steps": 3}, "steps must be an integer of at least 4"),
        ({"steps": 9.0}, "steps must be an integer of at least 4"),
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
