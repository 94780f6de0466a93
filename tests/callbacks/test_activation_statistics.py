import copy
import doctest
import pickle
import threading
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pandas
import pytest
from keras import layers

from callbacks.activation_statistics import ActivationStatistics

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(96, 4)).astype("float32")
TARGETS = (INPUTS.sum(axis=1) > 0).astype("float32")
PROBE = INPUTS[:20]
IMAGES = GENERATOR.normal(size=(12, 6, 6, 2)).astype("float32")


def compiled(model, **arguments):
    model.compile("adam", "binary_crossentropy", **arguments)
    return model


def build_model():
    keras.utils.set_random_seed(0)
    return compiled(
        keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(8, "relu", name="hidden"),
                layers.BatchNormalization(name="normalization"),
                layers.Dropout(0.5),
                layers.Dense(1, "sigmoid", name="probability"),
            ]
        )
    )


def fit(model, *callbacks, inputs=INPUTS, epochs=2):
    targets = TARGETS[: len(keras.tree.flatten(inputs)[0])]
    return model.fit(inputs, targets, epochs=epochs, batch_size=16, verbose=0, callbacks=list(callbacks))


def measure(model, probe):
    """Return {layer: entry} as measured before training."""
    statistics = ActivationStatistics(probe)
    statistics.set_model(model)
    statistics.on_train_begin()
    return {name: entry for name, (entry,) in statistics.history.items()}


def single(layer, values):
    """Return the entry of a layer without weights, or with built weights, fed with `values`."""
    model = keras.Sequential([keras.Input(values.shape[1:]), layer])
    (entry,) = measure(model, values).values()
    return entry


def approximately(values):
    values = np.asarray(values, "float64")
    return {"mean": pytest.approx(values.mean(), rel=1e-4), "std": pytest.approx(values.std(), rel=1e-4)}


def mean_and_std(entry):
    return {statistic: entry[statistic] for statistic in ("mean", "std")}


# The statistics


def test_statistics_of_a_dense_network_are_those_of_numpy():
    model = build_model()
    statistics = ActivationStatistics(PROBE)
    fit(model, statistics)
    kernel, bias, gamma, beta, mean, variance, output_kernel, output_bias = model.get_weights()
    hidden = np.maximum(PROBE @ kernel + bias, 0)
    normalized = gamma * (hidden - mean) / np.sqrt(variance + 1e-3) + beta
    probability = 1 / (1 + np.exp(-(normalized @ output_kernel + output_bias)))
    assert list(statistics.history) == ["hidden", "normalization", "probability"]
    for values, (name, entries) in zip((hidden, normalized, probability), statistics.history.items(), strict=True):
        assert mean_and_std(entries[-1]) == approximately(values), name


def test_unit_is_dead_only_if_it_is_zero_for_every_example():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(4, "relu")])
    bias = np.array([-100, -100, -100, 0], "float32")
    model.layers[0].set_weights([np.eye(4, dtype="float32"), bias])
    probe = PROBE.copy()
    probe[7, 2] = 101  # One example keeps this unit alive.
    (entry,) = measure(model, probe).values()
    assert entry["dead"] == 0.5


def test_units_of_a_convolution_are_its_channels():
    model = keras.Sequential([keras.Input((6, 6, 2)), layers.Conv2D(5, 3, activation="relu", padding="same")])
    kernel, bias = model.get_weights()
    bias[:] = [0, -100, 0, -100, 0]
    model.set_weights([kernel, bias])
    probe = IMAGES.copy()
    probe[:, :, :2] = 0  # The first column of the output is zero for every image, also in the channels that live.
    output = keras.ops.convert_to_numpy(model(probe))
    (entry,) = measure(model, probe).values()
    assert entry["dead"] == 0.4
    assert mean_and_std(entry) == approximately(output)


def test_channels_are_the_second_axis_of_images_that_say_so(monkeypatch):
    images = np.ones((3, 5, 6, 6), "float32")
    images[:, :2] = -1
    images[..., 0] = -1
    assert single(layers.ReLU(), images)["dead"] == pytest.approx(1 / 6)
    monkeypatch.setattr(keras.config, "image_data_format", lambda: "channels_first")
    assert single(layers.ReLU(), images)["dead"] == pytest.approx(2 / 5)
    sequences = images[:, :, 0]
    assert single(layers.ReLU(), sequences)["dead"] == pytest.approx(1 / 6)


@pytest.mark.parametrize(
    "activation, threshold",
    [("tanh", np.arctanh(0.98)), ("sigmoid", np.log(99)), ("hard_tanh", 0.98), ("hard_sigmoid", 2.94)],
)
@pytest.mark.parametrize("separate", [True, False])
def test_values_within_one_percent_of_an_end_are_saturated(activation, threshold, separate):
    # In units of the threshold: 2 of 5 lie beyond it below, 1 of 5 above.
    values = np.array([[-3, -1.01, -0.99, 0.99, 1.01]] * 4, "float32") * np.float32(threshold)
    if separate:
        entry = single(layers.Activation(activation), values)
    else:
        model = keras.Sequential([keras.Input((5,)), layers.Dense(5, activation)])
        model.set_weights([np.eye(5, dtype="float32"), np.zeros(5, "float32")])
        (entry,) = measure(model, values).values()
    assert entry["saturated"] == pytest.approx(3 / 5)


@pytest.mark.parametrize("function", [keras.ops.tanh, keras.activations.softsign, keras.activations.sparse_sigmoid])
def test_bounded_functions_are_recognised_however_they_are_given(function):
    values = np.array([[1e4, 0.1]], "float32")
    assert single(layers.Activation(function), values)["saturated"] == 0.5


@pytest.mark.parametrize("layer", [layers.ReLU, layers.Softmax, lambda: layers.Activation("relu6"), layers.LeakyReLU])
def test_functions_that_do_not_flatten_at_both_ends_have_no_saturation(layer):
    assert single(layer(), PROBE)["saturated"] is None


def test_recurrent_layer_is_measured_as_a_whole():
    sequences = IMAGES[:, 0] * 3
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((6, 2)), layers.SimpleRNN(3, return_sequences=True)])
    kernel, recurrent_kernel, bias = model.get_weights()
    state, states = np.zeros((12, 3)), []
    for step in range(6):
        state = np.tanh(sequences[:, step] @ kernel + bias + state @ recurrent_kernel)
        states.append(state)
    (entry,) = measure(model, sequences).values()
    assert mean_and_std(entry) == approximately(states)
    assert entry["saturated"] == np.mean(np.abs(states) > 0.98) > 0


def test_huge_values_do_not_overflow_and_infinite_ones_show():
    assert single(layers.ReLU(), np.array([[1e30], [3e30]], "float32"))["std"] == pytest.approx(1e30)
    entry = single(layers.ReLU(), np.array([[np.inf], [1]], "float32"))
    assert entry["mean"] == np.inf
    assert np.isnan(entry["std"])


# Models of every kind


def test_nested_models_count_by_their_layers_and_shared_layers_for_all_uses():
    keras.utils.set_random_seed(0)
    encoder = keras.Sequential([keras.Input((4,)), layers.Dense(4, "relu", name="dense")], name="encoder")
    left, right = keras.Input((4,), name="left"), keras.Input((4,), name="right")
    shared = layers.Dense(6, "tanh", name="shared")
    outputs = layers.Dense(1, "sigmoid", name="dense")(layers.Add()([shared(encoder(left)), shared(right)]))
    model = keras.Model({"left": left, "right": right}, outputs)
    bias = np.array([-100, 0, 0, 0], "float32")
    encoder.set_weights([encoder.get_weights()[0], bias])
    probe = {"left": PROBE, "right": PROBE * 100}
    measured = measure(model, probe)
    assert set(measured) == {"encoder/dense", "shared", "dense"}
    assert list(measured).index("encoder/dense") < list(measured).index("dense")
    kernel, bias = shared.get_weights()
    uses = np.tanh(np.stack([keras.ops.convert_to_numpy(encoder(probe["left"])), probe["right"]]) @ kernel + bias)
    assert mean_and_std(measured["shared"]) == approximately(uses)
    assert measured["shared"]["saturated"] == pytest.approx(np.mean(np.abs(uses) >= 0.98))
    assert measured["encoder/dense"]["dead"] == 0.25


def test_layer_shared_by_outputs_of_different_widths_pools_values_and_units():
    relu = layers.ReLU(name="relu")
    inputs = [keras.Input((1,)), keras.Input((3,))]
    model = keras.Model(inputs, [relu(one) for one in inputs])
    narrow, wide = -np.ones((2, 1), "float32"), np.arange(6, dtype="float32").reshape(2, 3)
    (entry,) = measure(model, (narrow, wide)).values()
    assert entry["dead"] == 0.25
    assert mean_and_std(entry) == approximately([0, 0, *range(6)])


class Branches(keras.Model):
    """Two hidden layers of one name, a recurrent layer that shares its cell, a composite layer, an idle layer."""

    class Block(layers.Layer):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.inner = layers.Dense(3, "tanh", name="inner")

        def call(self, inputs):
            return self.inner(inputs) + 5

    def __init__(self):
        super().__init__()
        self.hidden = [layers.Dense(4, "relu", name="hidden"), layers.Dense(4, "relu", name="hidden")]
        self.cell = layers.SimpleRNNCell(2)
        self.recurrent = layers.RNN(self.cell, name="recurrent")
        self.block = self.Block(name="block")
        self.dropout = layers.Dropout(0.5)
        self.idle = layers.Dense(2, name="idle")
        self.head = layers.Dense(1, "sigmoid", name="head")

    def call(self, inputs):
        features = self.block(self.dropout(self.hidden[1](self.hidden[0](inputs))))
        return self.head(self.recurrent(features[:, None]))


def test_subclassed_model_is_measured_in_order_of_execution():
    keras.utils.set_random_seed(0)
    model = compiled(Branches())
    statistics = ActivationStatistics(PROBE)
    fit(model, statistics)
    assert list(statistics.history) == ["hidden", "hidden_2", "block", "recurrent", "head"]
    second = keras.ops.convert_to_numpy(model.hidden[1](model.hidden[0](PROBE)))
    assert mean_and_std(statistics.history["hidden_2"][-1]) == approximately(second)
    assert statistics.history["block"][-1]["mean"] > 4
    assert statistics.history["block"][-1]["saturated"] is None


def test_layers_that_come_and_go_keep_their_place_in_the_history():
    class Growing(keras.Model):
        use_extra = False

        def __init__(self):
            super().__init__()
            self.first, self.extra, self.last = (layers.Dense(1, "sigmoid", name=name) for name in "abc")

        def call(self, inputs):
            outputs = self.first(inputs)
            return self.last(self.extra(outputs) if self.use_extra else outputs)

    model = Growing()
    statistics = ActivationStatistics(PROBE)
    statistics.set_model(model)
    statistics.on_train_begin()
    for epoch, model.use_extra in enumerate([True, False]):
        logs = {}
        statistics.on_epoch_end(epoch, logs)
        # Not there before training, so in no epoch: the columns of the logs are the same throughout.
        assert "activation_mean/b" not in logs
    assert [entry["mean"] is None for entry in statistics.history["b"]] == [True, False, True]
    assert [entry["mean"] is None for entry in statistics.history["a"]] == [False] * 3


def test_layer_that_is_not_executed_in_an_epoch_is_nan_in_its_logs():
    class Shrinking(keras.Model):
        use_extra = True

        def __init__(self):
            super().__init__()
            self.first, self.extra, self.last = (layers.Dense(1, "sigmoid", name=name) for name in "abc")

        def call(self, inputs):
            outputs = self.first(inputs)
            return self.last(self.extra(outputs) if self.use_extra else outputs)

    model = Shrinking()
    statistics = ActivationStatistics(PROBE)
    statistics.set_model(model)
    statistics.on_train_begin()
    rows = []
    for epoch, model.use_extra in enumerate([True, False, True]):
        rows.append({})
        statistics.on_epoch_end(epoch, rows[-1])
    assert rows[0].keys() == rows[1].keys() == rows[2].keys()
    frame = pandas.DataFrame(rows)
    assert frame["activation_saturated/b"].isna().tolist() == [False, True, False]
    assert frame["activation_mean/a"].notna().all()


def test_outputs_that_are_not_float_are_left_out():
    codes = layers.IntegerLookup(vocabulary=[3, 5], name="codes")
    inputs = keras.Input((2,), dtype="int64")
    outputs = layers.Dense(1, name="head")(layers.Flatten()(layers.Embedding(4, 2, name="embedding")(codes(inputs))))
    assert list(measure(keras.Model(inputs, outputs), np.array([[3, 5], [5, 9]]))) == ["embedding", "head"]


def test_mixed_precision_is_measured():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh", dtype="mixed_bfloat16")])
    (entry,) = measure(model, PROBE).values()
    kernel, _ = model.get_weights()
    assert entry["std"] == pytest.approx(np.tanh(PROBE @ kernel).std(), rel=0.02)


def test_rematerialised_layers_are_measured():
    with keras.RematScope(mode="full"):
        layer = layers.Dense(8, "tanh")
    model = keras.Sequential([keras.Input((4,)), layer])
    (entry,) = measure(model, PROBE).values()
    assert mean_and_std(entry) == approximately(np.tanh(PROBE @ model.get_weights()[0]))


def test_layers_within_a_compiled_function_are_left_out():
    class Compiled(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.last = layers.Dense(1, name="first"), layers.Dense(1, name="last")

        def call(self, inputs):
            return self.last(compile_function(self.first)(inputs))

    if keras.backend.backend() == "torch":
        pytest.skip("PyTorch's compiler is not waited for")
    if keras.backend.backend() == "jax":
        from jax import jit as compile_function
    else:
        from tensorflow import function as compile_function
    assert list(measure(Compiled(), PROBE)) == ["last"]


# Where the statistics go


def test_logs_have_the_figures_of_each_epoch_and_the_history_also_those_before_training():
    model = build_model()
    before = measure(model, PROBE)
    statistics = ActivationStatistics(PROBE)
    logs = fit(model, statistics, epochs=3).history
    names = {f"activation_{statistic}/{layer}" for layer in before for statistic in ("mean", "std", "dead")}
    assert logs.keys() == {"loss", "activation_saturated/probability"} | names
    for layer, entries in statistics.history.items():
        assert entries[0] == before[layer]
        assert entries[0]["mean"] != entries[1]["mean"]
        for statistic in ("mean", "std", "dead"):
            assert logs[f"activation_{statistic}/{layer}"] == [entry[statistic] for entry in entries[1:]]


def first_input(model, probe):
    statistics = ActivationStatistics(probe)
    statistics.set_model(model)
    statistics.on_train_begin()
    first = statistics.first_input
    return None if first is None else mean_and_std(first)


def test_first_input_is_what_the_first_trainable_layer_receives():
    frozen = layers.Dense(3, trainable=False)
    model = keras.Sequential([keras.Input((4,)), layers.Rescaling(1 / 8, offset=3), frozen, layers.Dense(1)])
    kernel, bias = frozen.get_weights()
    expected = (PROBE / 8 + 3) @ kernel + bias
    assert first_input(model, PROBE) == approximately(expected)
    nested = keras.Sequential([keras.Input((4,)), keras.Sequential([layers.Rescaling(2.0), layers.Dense(1)])])
    assert first_input(nested, PROBE) == approximately(PROBE * 2)
    unbuilt = keras.Sequential([layers.Rescaling(2.0), layers.Dense(1)])
    assert first_input(unbuilt, PROBE) == approximately(PROBE * 2)
    tokens = keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(9, 3), layers.Dense(1)])
    assert first_input(tokens, np.ones((4, 5), "int32")) is None


@pytest.mark.parametrize(
    ("scale", "dtype", "received", "low", "high"),
    [
        (255, "uint8", "uint8 of shape (12, 4), 0 to 255, mean", 0, 255),
        (1, "float32", "float32 of shape (12, 4), 0 to 1, mean", 0, 1),
        (-2, "float64", "float64 of shape (12, 4), -2 to 0, mean", -2, 0),
    ],
)
def test_what_was_received_is_said(scale, dtype, received, low, high):
    values = GENERATOR.uniform(size=(12, 4))
    values[0, :2] = 0, 1
    probe = (scale * values).astype(dtype)
    statistics = ActivationStatistics(probe)
    assert statistics.received.startswith(received)
    assert f"mean {probe.mean():.4g}, deviation {probe.std():.4g}" in statistics.received
    statistics.set_model(keras.Sequential([keras.Input((4,)), layers.Rescaling(0.5), layers.Dense(1)]))
    statistics.on_train_begin()
    assert statistics.first_input["low"] == pytest.approx(low / 2)
    assert statistics.first_input["high"] == pytest.approx(high / 2)


def test_what_was_received_is_said_of_each_array():
    received = ActivationStatistics({"tokens": np.array([[3, 5]]), "words": np.array([["a", "b"]])}).received
    assert received == "int64 of shape (1, 2), 3 to 5, mean 4, deviation 1; <U1 of shape (1, 2)"


def test_seldom_validation_and_a_later_epoch_do_not_shift_anything():
    model = build_model()
    statistics = ActivationStatistics(PROBE)
    arguments = {"validation_data": (INPUTS, TARGETS), "validation_freq": 2, "initial_epoch": 2, "epochs": 5}
    history = model.fit(INPUTS, TARGETS, verbose=0, callbacks=[statistics], **arguments).history
    assert statistics.epochs == [2, 3, 4]
    assert len(history["activation_mean/hidden"]) == 3
    assert {len(entries) for entries in statistics.history.values()} == {4}


def test_log_false_keeps_it_out_of_the_logs():
    statistics = ActivationStatistics(PROBE, log=False)
    assert set(fit(build_model(), statistics).history) == {"loss"}
    assert {len(entries) for entries in statistics.history.values()} == {3}


def test_picture_shows_each_statistic_by_layer_over_the_epochs(tmp_path):
    statistics = ActivationStatistics(PROBE)
    fit(build_model(), statistics, epochs=3)
    figure = statistics.plot(tmp_path / "activations.svg")
    for axes, statistic in zip(figure.axes, ("mean", "std", "dead", "saturated"), strict=True):
        for line in axes.lines:
            assert list(line.get_xdata()) == [0, 1, 2, 3]
            expected = [entry[statistic] for entry in statistics.history[line.get_label()]]
            np.testing.assert_allclose(line.get_ydata(), expected)
    assert [len(axes.lines) for axes in figure.axes] == [3, 3, 3, 1]
    texts = {element.text for element in ElementTree.parse(tmp_path / "activations.svg").iter() if element.text}
    assert {"epochs trained", "share of dead units", "hidden", "normalization", "probability"} <= texts
    statistics.plot(tmp_path / "activations.png")
    assert (tmp_path / "activations.png").read_bytes().startswith(b"\x89PNG")
    ActivationStatistics(PROBE).plot()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda statistics: pickle.loads(pickle.dumps(statistics))])
def test_copies_and_pickles_have_what_was_measured_and_serve_again(duplicate):
    statistics = ActivationStatistics(PROBE)
    fit(build_model(), statistics)
    again = duplicate(statistics)
    assert (again.history, again.first_input) == (statistics.history, statistics.first_input)
    fit(build_model(), again, epochs=1)
    assert again.history["hidden"][0] == statistics.history["hidden"][0]


def test_second_fit_begins_a_new_history():
    model = build_model()
    statistics = ActivationStatistics(PROBE)
    fit(model, statistics, epochs=3)
    last = {layer: entries[-1] for layer, entries in statistics.history.items()}
    fit(model, statistics, epochs=1)
    assert {layer: entries[0] for layer, entries in statistics.history.items()} == last
    assert {len(entries) for entries in statistics.history.values()} == {2}


# Training stays as it was


class Noise(layers.Layer):
    """Draws from its seed generator in inference too, and adds a loss."""

    def __init__(self):
        super().__init__()
        self.seeds = keras.random.SeedGenerator(1)
        self.calls = self.add_weight(name="calls", initializer="zeros", trainable=False)

    def call(self, inputs):
        self.calls.assign_add(1)
        self.add_loss(keras.ops.mean(keras.ops.square(inputs)))
        return inputs + keras.random.normal(keras.ops.shape(inputs), seed=self.seeds)


def build_noisy(subclassed):
    keras.utils.set_random_seed(0)
    parts = [layers.Dense(4, "relu"), layers.BatchNormalization(), layers.Dropout(0.5), Noise(), layers.Dense(1)]
    if not subclassed:
        return keras.Sequential([keras.Input((4,)), *parts])

    class Subclassed(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = parts

        def call(self, inputs):
            for part in self.parts:
                inputs = part(inputs)
            return inputs

    return Subclassed()


@pytest.mark.parametrize(
    "mode, subclassed",
    [
        ({"run_eagerly": True}, False),
        ({"jit_compile": True}, False),
        ({"jit_compile": False}, False),
        ({"run_eagerly": True}, True),
        ({"jit_compile": True}, True),
    ],
)
def test_training_is_bit_identical_with_and_without_the_callback(mode, subclassed):
    variables = []
    for callbacks in ([], [ActivationStatistics(PROBE)]):
        model = build_noisy(subclassed)
        model.compile("adam", "mse", **mode)
        fit(model, *callbacks)
        variables.append([np.array(keras.ops.convert_to_numpy(variable)) for variable in model.variables])
        variables[-1] += [np.array(keras.ops.convert_to_numpy(variable)) for variable in model.optimizer.variables]
    assert len(variables[0]) == len(variables[1])
    assert all(map(np.array_equal, *variables))


def test_measuring_leaves_no_trace_in_the_model():
    model = build_noisy(subclassed=False)
    before = [np.array(keras.ops.convert_to_numpy(variable)) for variable in model.variables]
    attributes = [set(vars(layer)) for layer in model.layers]
    call = keras.Layer.__call__
    measure(model, PROBE)
    assert keras.Layer.__call__ is call
    assert [set(vars(layer)) for layer in model.layers] == attributes
    assert len(model.losses) == 0
    assert all(map(np.array_equal, before, map(keras.ops.convert_to_numpy, model.variables)))


def test_layers_that_another_thread_runs_meanwhile_are_not_measured():
    elsewhere = layers.Dense(2, name="elsewhere")
    elsewhere(PROBE)

    class Meanwhile(keras.Model):
        def __init__(self):
            super().__init__()
            self.head = layers.Dense(1, name="head")

        def call(self, inputs):
            thread = threading.Thread(target=elsewhere, args=(PROBE,))
            thread.start()
            thread.join()
            return self.head(inputs)

    assert list(measure(Meanwhile(), PROBE)) == ["head"]


# Wrong arguments


@pytest.mark.parametrize(
    "probe", [None, [], {}, 3.0, [[1.0, 2.0]], np.zeros((0, 4)), (np.zeros((2, 4)), np.zeros((3, 4))), "images"]
)
def test_probe_that_is_no_batch_of_examples_is_refused(probe):
    with pytest.raises(ValueError, match="probe must be an array of inputs"):
        ActivationStatistics(probe)


@pytest.mark.parametrize("probe", [np.zeros((2, 5)), np.zeros(4), np.array([["a"] * 4])])
def test_probe_that_does_not_fit_the_model_is_refused_when_training_begins(probe):
    model = build_model()
    call = keras.Layer.__call__
    with pytest.raises(ValueError, match=r"cannot be measured on the probe \(.* of shape \("):
        fit(model, ActivationStatistics(probe))
    assert keras.Layer.__call__ is call
    assert int(model.optimizer.iterations) == 0


def test_model_without_a_layer_to_measure_is_refused():
    with pytest.raises(ValueError, match="needs a model with layers"):
        measure(keras.Sequential([keras.Input((4,)), layers.Dropout(0.5)]), PROBE)


def test_example_in_the_docstring_runs():
    model = build_model()
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    names = {"ActivationStatistics": ActivationStatistics, "keras": keras, "layers": layers, "np": np}
    names |= {"x": INPUTS, "y": TARGETS, "model": model}
    for example in doctest.DocTestParser().get_examples(ActivationStatistics.__doc__):
        exec(example.source, names)
    assert names["before_training"].keys() == names["dead_at_the_end"].keys() == names["statistics"].history.keys()
