import copy
import doctest
import pickle
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pandas
import pytest
from keras import layers, ops

from callbacks.learning_rate_logger import LearningRateLogger

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(96, 4)).astype("float32")
TARGETS = (INPUTS.sum(axis=1) > 0).astype("float32")
schedules = keras.optimizers.schedules


class Reciprocal(schedules.LearningRateSchedule):
    def __call__(self, step):
        return 0.1 / (ops.cast(step, "float32") + 1)


class FromPython(schedules.LearningRateSchedule):
    """Runs only eagerly."""

    def __call__(self, step):
        return 0.1 if int(step) < 4 else 0.01


SCHEDULES = {
    "exponential": lambda: schedules.ExponentialDecay(0.1, 3, 0.5),
    "staircase": lambda: schedules.ExponentialDecay(0.1, 3, 0.5, staircase=True),
    "piecewise": lambda: schedules.PiecewiseConstantDecay([2, 4], [0.1, 0.05, 0.01]),
    "polynomial": lambda: schedules.PolynomialDecay(0.1, 5, 0.01, power=2.0),
    "polynomial cycle": lambda: schedules.PolynomialDecay(0.1, 2, 0.01, cycle=True),
    "inverse time": lambda: schedules.InverseTimeDecay(0.1, 3, 0.5),
    "cosine": lambda: schedules.CosineDecay(0.1, 6),
    "warm-up": lambda: schedules.CosineDecay(0.0, 5, warmup_target=0.1, warmup_steps=3),
    "restarts": lambda: schedules.CosineDecayRestarts(0.1, 2),
    "custom": Reciprocal,
}


class Weights(keras.callbacks.Callback):
    """Records the only weight before each step and after the last, and the rate as the optimizer has it."""

    def on_train_begin(self, logs=None):
        self.values, self.rates = [], []

    def record(self):
        self.values.append(float(ops.convert_to_numpy(self.model.trainable_variables[0])[0, 0]))

    def on_train_batch_begin(self, batch, logs=None):
        self.record()
        self.rates.append(float(ops.convert_to_numpy(self.model.optimizer.learning_rate)))

    def on_train_end(self, logs=None):
        self.record()


class SetByHand(keras.callbacks.Callback):
    """Assigns a rate of its own before some steps."""

    def __init__(self, rates, convert=float):
        super().__init__()
        self.rates = rates
        self.convert = convert
        self.step = -1

    def on_train_batch_begin(self, batch, logs=None):
        self.step += 1
        if self.step in self.rates:
            self.model.optimizer.learning_rate = self.convert(self.rates[self.step])


def unit_gradient(learning_rate=0.1, **arguments):
    """Return a model of one weight with the gradient one, so that each step of SGD shows the rate that it used."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(
        keras.optimizers.SGD(learning_rate, gradient_accumulation_steps=arguments.pop("accumulation", None)),
        lambda targets, outputs: ops.mean(outputs),
        **arguments,
    )
    return model


def fit_ones(model, *callbacks, epochs=2, batches=3, **arguments):
    ones = np.ones((4 * batches, 1), "float32")
    return model.fit(ones, ones, batch_size=4, epochs=epochs, verbose=0, callbacks=list(callbacks), **arguments)


def network(optimizer="adam", **arguments):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(1, "sigmoid", dtype="float32")])
    model.compile(optimizer, "binary_crossentropy", metrics=["accuracy"], **arguments)
    model.optimizer.build(model.trainable_variables)
    return model


STEPS_AT_ONCE = pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="on PyTorch, Keras executes steps one by one"
)


def used(weights):
    return -np.diff(weights.values)


@pytest.fixture
def mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


# The rate that each step used


CASES = [(name, {}) for name in SCHEDULES] + [("warm-up", {"jit_compile": True}), ("warm-up", {"run_eagerly": True})]


@pytest.mark.parametrize(("name", "arguments"), CASES, ids=str)
def test_history_of_a_schedule_is_what_the_steps_used(name, arguments):
    model, rates, weights = unit_gradient(SCHEDULES[name](), **arguments), LearningRateLogger(), Weights()
    logs = fit_ones(model, rates, weights).history
    np.testing.assert_allclose(rates.history, used(weights), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(rates.history, weights.rates, rtol=1e-5, atol=1e-9)
    assert logs["learning_rate"] == pytest.approx(rates.history[2::3], rel=1e-6)


def test_schedule_that_branches_in_python_is_right_when_run_eagerly():
    model, rates, weights = unit_gradient(FromPython(), run_eagerly=True), LearningRateLogger(), Weights()
    fit_ones(model, rates, weights)
    assert rates.history == pytest.approx([0.1] * 4 + [0.01] * 2)
    assert rates.history == pytest.approx(used(weights), rel=1e-5)


def test_float_rate_is_the_same_at_each_step():
    model, rates = unit_gradient(0.25), LearningRateLogger()
    assert fit_ones(model, rates).history["learning_rate"] == [0.25] * 2
    assert rates.history == [0.25] * 6


def test_scheduler_callback_is_seen_before_and_after_it_in_the_list():
    for position in (0, 1):
        scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
        rates, weights = LearningRateLogger(), Weights()
        callbacks = [scheduler, weights]
        callbacks.insert(position, rates)
        logs = fit_ones(unit_gradient(0.5), *callbacks).history
        assert rates.history == [0.25] * 3 + [0.125] * 3 == pytest.approx(used(weights))
        assert logs["learning_rate"] == [0.25, 0.125]


@pytest.mark.parametrize("position", [0, 1])
def test_logged_rate_is_the_one_before_the_reduction_on_a_plateau(position):
    reduction = keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=1, min_delta=100.0)
    rates, weights = LearningRateLogger(), Weights()
    callbacks = [reduction, weights]
    callbacks.insert(position, rates)
    logs = fit_ones(unit_gradient(0.5), *callbacks, epochs=3).history
    assert rates.history == [0.5] * 6 + [0.25] * 3 == pytest.approx(used(weights))
    assert logs["learning_rate"] == [0.5, 0.5, 0.25]


@pytest.mark.parametrize("convert", [float, np.float32, ops.convert_to_tensor], ids=["float", "numpy", "tensor"])
def test_rate_that_a_callback_sets_within_an_epoch_is_seen_at_once(convert):
    rates, weights = LearningRateLogger(), Weights()
    by_hand = SetByHand({0: 0.5, 2: 0.25, 4: 0.125}, convert)
    logs = fit_ones(unit_gradient(), by_hand, rates, weights).history
    assert rates.history == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125] == pytest.approx(used(weights))
    assert logs["learning_rate"] == [0.25, 0.125]


def test_rate_that_the_device_rounds_is_logged_as_the_device_has_it():
    rates = LearningRateLogger()
    fit_ones(unit_gradient(), SetByHand({0: 0.3}), rates, epochs=1)
    assert rates.history == [float(np.float32(0.3))] * 3


def test_callbacks_after_it_that_look_at_the_model_do_not_mislead_it():
    rates = LearningRateLogger()
    fit_ones(unit_gradient(0.5), SetByHand({1: 0.25}), rates, Weights())
    assert rates.history == [0.5] + [0.25] * 5


def test_rate_set_by_hand_between_fits_and_a_second_fit():
    model, rates, weights = unit_gradient(0.5), LearningRateLogger(), Weights()
    fit_ones(model, rates, weights)
    model.optimizer.learning_rate = 0.25
    fit_ones(model, rates, weights, epochs=1)
    assert rates.history == [0.25] * 3 == pytest.approx(used(weights))


def test_schedule_goes_on_in_a_second_fit():
    model, rates, weights = unit_gradient(Reciprocal()), LearningRateLogger(), Weights()
    fit_ones(model, rates, weights)
    fit_ones(model, rates, weights, epochs=1)
    assert rates.history == pytest.approx([0.1 / 7, 0.1 / 8, 0.1 / 9])
    assert rates.history == pytest.approx(used(weights), rel=1e-4)


def test_float_replaced_by_a_schedule_between_fits():
    model, rates = unit_gradient(0.5), LearningRateLogger()
    fit_ones(model, rates, epochs=1)
    model.compile(keras.optimizers.SGD(Reciprocal()), lambda targets, outputs: ops.mean(outputs))
    fit_ones(model, rates, epochs=1)
    assert rates.history == pytest.approx([0.1, 0.1 / 2, 0.1 / 3])


@STEPS_AT_ONCE
@pytest.mark.parametrize("rate", [0.5, Reciprocal()], ids=["float", "schedule"])
def test_several_steps_an_execution_have_an_entry_each(rate):
    model, rates = unit_gradient(rate, steps_per_execution=2), LearningRateLogger()
    scheduler = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate / 2)
    with_scheduler = [scheduler] if rate == 0.5 else []
    # Five batches: the third execution of an epoch has one step only.
    logs = fit_ones(model, *with_scheduler, rates, batches=5).history
    expected = [0.25] * 5 + [0.125] * 5 if with_scheduler else 0.1 / np.arange(1, 11)
    np.testing.assert_allclose(rates.history, expected, rtol=1e-6)
    assert logs["learning_rate"] == pytest.approx([rates.history[4], rates.history[9]])


@pytest.mark.parametrize("rate", [0.5, Reciprocal()], ids=["float", "schedule"])
def test_accumulated_batches_have_an_entry_each_and_every_second_one_is_used(rate):
    model, rates, weights = unit_gradient(rate, accumulation=2), LearningRateLogger(), Weights()
    fit_ones(model, rates, weights)
    assert len(rates.history) == 6
    np.testing.assert_allclose(used(weights)[1::2], rates.history[1::2], rtol=1e-5)
    np.testing.assert_array_equal(used(weights)[::2], 0)


# Mixed precision


@pytest.mark.parametrize("rate", [0.5, Reciprocal()], ids=["float", "schedule"])
def test_mixed_precision(rate, mixed_precision):
    model, rates = network(keras.optimizers.SGD(rate)), LearningRateLogger()
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    by_hand = [SetByHand({4: 0.25})] if rate == 0.5 else []
    model.fit(INPUTS, TARGETS, epochs=2, verbose=0, callbacks=[*by_hand, rates])
    expected = [0.5] * 4 + [0.25] * 2 if by_hand else 0.1 / np.arange(1, 7)
    np.testing.assert_allclose(rates.history, expected, rtol=1e-6)


class Overflow(keras.callbacks.Callback):
    """Makes the gradient of some steps infinite by the loss scale, so that they are skipped."""

    def __init__(self, steps):
        super().__init__()
        self.steps = steps
        self.step = -1

    def on_train_batch_begin(self, batch, logs=None):
        self.step += 1
        self.model.optimizer.dynamic_scale.assign(np.inf if self.step in self.steps else 1.0)


def test_steps_that_mixed_precision_skips_have_no_entry(mixed_precision):
    model, rates = network(keras.optimizers.SGD(0.5)), LearningRateLogger()
    by_hand = SetByHand({1: 0.25, 3: 0.125, 4: 0.0625})
    arguments = {"epochs": 2, "verbose": 0}
    logs = model.fit(INPUTS, TARGETS, **arguments, callbacks=[Overflow({1, 3}), by_hand, rates]).history
    # The steps 0, 2, 4 and 5 are taken.
    assert rates.history == [0.5, 0.25, 0.0625, 0.0625]
    assert int(model.optimizer.iterations) == 4
    assert logs["learning_rate"] == [0.25, 0.0625]


def test_epoch_whose_steps_are_all_skipped_has_the_rate_that_they_would_have_used(mixed_precision):
    model, rates = network(keras.optimizers.SGD(Reciprocal())), LearningRateLogger()
    logs = model.fit(INPUTS, TARGETS, epochs=2, verbose=0, callbacks=[Overflow({0, 1, 2}), rates]).history
    assert logs["learning_rate"] == pytest.approx([0.1, 0.1 / 3])
    assert rates.history == pytest.approx([0.1, 0.1 / 2, 0.1 / 3])


# What it leaves alone


@pytest.mark.parametrize("rate", [0.01, Reciprocal()], ids=["float", "schedule"])
def test_training_is_bit_identical_with_and_without_it(rate):
    def weights(*callbacks):
        model = network(keras.optimizers.Adam(rate))
        model.fit(INPUTS, TARGETS, epochs=2, verbose=0, callbacks=list(callbacks))
        return model.get_weights() + [ops.convert_to_numpy(variable) for variable in model.optimizer.variables]

    for with_it, without in zip(weights(LearningRateLogger()), weights(), strict=True):
        np.testing.assert_array_equal(with_it, without)


def test_nothing_is_left_on_the_variable_after_fit_nor_after_detach():
    class Fail(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise RuntimeError("stop")

    model, rates = unit_gradient(0.5), LearningRateLogger()
    attributes = set(vars(model.optimizer.learning_rate))
    fit_ones(model, rates)
    assert set(vars(model.optimizer.learning_rate)) == attributes
    with pytest.raises(RuntimeError, match="stop"):
        fit_ones(model, rates, Fail())
    # What is left still assigns.
    model.optimizer.learning_rate = 0.125
    assert float(ops.convert_to_numpy(model.optimizer.learning_rate)) == 0.125
    rates.detach()
    assert set(vars(model.optimizer.learning_rate)) == attributes
    with pytest.raises(RuntimeError, match="stop"):
        fit_ones(model, rates, Fail())
    fit_ones(model, rates, epochs=1)
    assert rates.history == [0.125] * 3
    assert set(vars(model.optimizer.learning_rate)) == attributes


def test_asynchronous_dispatch_stays_on():
    # Private: Keras turns it off for callbacks that have an `on_train_batch_end` and do not say that they allow it.
    is_on = [keras.callbacks.CallbackList(callbacks)._async_train for callbacks in ([LearningRateLogger()], None)]
    assert is_on[0] == is_on[1]


def test_rate_is_logged_for_callbacks_after_it(tmp_path):
    rates = LearningRateLogger()
    fit_ones(unit_gradient(0.5), rates, keras.callbacks.CSVLogger(tmp_path / "log.csv"))
    header, *rows = (tmp_path / "log.csv").read_text().split()
    column = header.split(",").index("learning_rate")
    assert [float(row.split(",")[column]) for row in rows] == [0.5, 0.5]


# Data that end early


class Steps(keras.callbacks.Callback):
    """Records the batches that were trained, by epoch."""

    def on_train_begin(self, logs=None):
        self.made = {}

    def on_epoch_begin(self, epoch, logs=None):
        self.made[epoch] = 0

    def on_train_batch_end(self, batch, logs=None):
        self.made[list(self.made)[-1]] += 1


@pytest.mark.filterwarnings("ignore:.*ran out of data")
@pytest.mark.parametrize("arguments", [{"epochs": 3}, {"epochs": 4, "steps_per_epoch": 3}], ids=str)
@pytest.mark.parametrize("rate", [0.5, Reciprocal()], ids=["float", "schedule"])
def test_data_that_end_early(rate, arguments):
    ones = np.ones((4, 1), "float32")
    model, rates, steps, weights = unit_gradient(rate), LearningRateLogger(), Steps(), Weights()
    by_hand = [SetByHand({2: 0.25, 5: 0.125, 7: 0.0625})] if rate == 0.5 else []
    data = ((ones, ones) for _ in range(7))
    logs = model.fit(data, verbose=0, callbacks=[*by_hand, rates, steps, weights], **arguments).history
    assert len(rates.history) == sum(steps.made.values())
    changes = -np.diff(weights.values)
    # A step that was begun when the data had run out changed nothing.
    np.testing.assert_allclose(rates.history, changes[changes > 1e-9], rtol=1e-4)
    assert len(pandas.DataFrame(logs)) == len(steps.made)
    ends = np.cumsum(list(steps.made.values()))
    expected = [rates.history[end - 1] for end, made in zip(ends, steps.made.values(), strict=True) if made]
    assert [
        value for value, made in zip(logs["learning_rate"], steps.made.values(), strict=True) if made
    ] == pytest.approx(expected)


def test_every_key_is_in_the_logs_of_every_epoch_with_seldom_validation():
    ones = np.ones((12, 1), "float32")
    logs = fit_ones(unit_gradient(), LearningRateLogger(), validation_data=(ones, ones), validation_freq=2, epochs=4)
    assert logs.history["learning_rate"] == pytest.approx([0.1] * 4)


# Several optimizers: those of a `train_step` are tested with `OneCycle`


def test_members_of_a_multi_optimizer():
    def multi_optimizer():
        first, second = keras.optimizers.SGD(0.5), keras.optimizers.SGD(Reciprocal())
        return keras.optimizers.MultiOptimizer(keras.optimizers.OptimizerMap(first, {".*bias": second}))

    model = network(multi_optimizer())
    with pytest.raises(ValueError, match="a MultiOptimizer has several: pass one of them"):
        model.fit(INPUTS, TARGETS, verbose=0, callbacks=[LearningRateLogger()])
    loggers = [LearningRateLogger(optimizer=member, log=False) for member in model.optimizer.optimizers]
    history = model.fit(INPUTS, TARGETS, epochs=2, verbose=0, callbacks=loggers).history
    by_name = sorted(loggers, key=lambda logger: logger.history[-1])
    np.testing.assert_allclose(by_name[0].history, 0.1 / np.arange(1, 7), rtol=1e-5)
    assert by_name[1].history == [0.5] * 6
    assert "learning_rate" not in history


def test_optimizer_that_does_not_train_is_told_after_the_first_epoch():
    rates = LearningRateLogger(optimizer=keras.optimizers.SGD(0.25, name="idle"))
    with pytest.warns(UserWarning, match="watches the optimizer 'idle', which has not made a step") as warnings:
        logs = fit_ones(unit_gradient(), rates).history
    assert sum("'idle'" in str(warning.message) for warning in warnings) == 1
    assert rates.history == []
    assert logs["learning_rate"] == [0.25] * 2


# Drawn and copied


def test_picture_shows_the_rate_of_each_step(tmp_path):
    rates = LearningRateLogger()
    fit_ones(unit_gradient(Reciprocal()), rates)
    figure = rates.plot(tmp_path / "rates.svg")
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), rates.history)
    texts = {element.text for element in ElementTree.parse(tmp_path / "rates.svg").iter() if element.text}
    assert {"step", "learning rate"} <= texts
    rates.plot(str(tmp_path / "rates.png"))
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("rate", [0.5, Reciprocal()], ids=["float", "schedule"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda rates: pickle.loads(pickle.dumps(rates))])
def test_copies_and_pickles_have_the_rates_and_serve_again(rate, duplicate):
    model = unit_gradient(rate)
    rates = LearningRateLogger(optimizer=model.optimizer)
    fit_ones(model, rates)
    again = duplicate(rates)
    assert again.history == rates.history
    fit_ones(unit_gradient(0.25), again)
    assert again.history == [0.25] * 6


def test_rate_that_is_a_function_is_refused():
    with pytest.raises(ValueError, match="float or a LearningRateSchedule"):
        fit_ones(unit_gradient(lambda: 0.1), LearningRateLogger())


def test_example_in_the_docstring_runs():
    model = network()
    names = {"LearningRateLogger": LearningRateLogger, "keras": keras, "model": model, "x": INPUTS, "y": TARGETS}
    exec("".join(example.source for example in doctest.DocTestParser().get_examples(LearningRateLogger.__doc__)), names)
    assert len(names["by_step"]) == 6
    assert names["by_epoch"] == pytest.approx([0.001, 0.001])
