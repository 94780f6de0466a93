import contextlib
import copy
import pickle
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import keras
import numpy as np
import pandas
import pytest
from keras import layers, ops

from callbacks.gradient_norms import GradientNorms

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(64, 4)).astype("float32")
TOKENS = GENERATOR.integers(0, 3, (64, 5))
TARGETS = (INPUTS.sum(axis=1) > 0).astype("float32")
BACKEND = keras.backend.backend()


def dense_network(frozen=False):
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, activation="tanh", name="first", trainable=not frozen),
            layers.BatchNormalization(name="middle"),
            layers.Dense(1, "sigmoid", name="last", dtype="float32"),
        ]
    )
    return model, INPUTS


def plain_network():
    # Without batch normalisation, whose statistics are those of each replica.
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "tanh"), layers.Dense(1, "sigmoid")])
    return model, INPUTS


def embedding_network():
    inputs = keras.Input((5,), dtype="int32")
    # Every token occurs many times in a batch, so the rows of a sparse gradient must be added up.
    x = layers.Flatten()(layers.Embedding(3, 4, name="embedding")(inputs))
    return keras.Model(inputs, layers.Dense(1, "sigmoid", name="last")(x)), TOKENS


def recurrent_network():
    inner = keras.Sequential([keras.Input((4, 1)), layers.LSTM(3, name="lstm")], name="inner")
    inputs = keras.Input((4,))
    x = inner(layers.Reshape((4, 1))(inputs))
    return keras.Model(inputs, layers.Dense(1, "sigmoid", name="last")(x)), INPUTS


def compiled(make_model=dense_network, optimizer=None, **arguments):
    keras.utils.set_random_seed(0)
    model, inputs = make_model()
    model.compile(optimizer or keras.optimizers.Adam(0.01), "binary_crossentropy", **arguments)
    return model, inputs


def explicit_norms(model, inputs, targets=TARGETS):
    """Return the norms of the gradients, by variable, computed by the backend's own automatic differentiation."""
    if BACKEND == "jax":
        import jax

        def loss(weights):
            fixed = [variable.value for variable in model.non_trainable_variables]
            outputs, _ = model.stateless_call(weights, fixed, inputs, training=True)
            return model.compute_loss(inputs, ops.convert_to_tensor(targets[:, None]), outputs)

        gradients = jax.grad(loss)([variable.value for variable in model.trainable_variables])
    elif BACKEND == "torch":
        import torch

        state = [(variable, np.array(ops.convert_to_numpy(variable))) for variable in model.non_trainable_variables]
        loss = model.compute_loss(inputs, ops.convert_to_tensor(targets[:, None]), model(inputs, training=True))
        gradients = torch.autograd.grad(loss, [variable.value for variable in model.trainable_variables])
        gradients = [ops.convert_to_numpy(gradient) for gradient in gradients]
        for variable, value in state:
            variable.assign(value)
    else:
        import tensorflow as tf

        state = [variable.numpy() for variable in model.non_trainable_variables]
        with tf.GradientTape() as tape:
            outputs = model(inputs, training=True)
            loss = model.compute_loss(inputs, ops.convert_to_tensor(targets[:, None]), outputs)
        gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, model.trainable_weights)]
        for variable, value in zip(model.non_trainable_variables, state, strict=True):
            variable.assign(value)
    return [float(np.linalg.norm(np.asarray(gradient, "float64"))) for gradient in gradients]


STEPS_AT_ONCE = pytest.mark.skipif(BACKEND == "torch", reason="on PyTorch, Keras executes steps one by one")
ON_TENSORFLOW = pytest.mark.skipif(BACKEND != "tensorflow", reason="is of TensorFlow")


class Reference(keras.callbacks.Callback):
    """Computes each epoch's gradient before its only step, by layer, from the weights as they are then."""

    def __init__(self, inputs):
        super().__init__()
        self.inputs = inputs
        self.norms = []

    def on_epoch_begin(self, epoch, logs=None):
        self.norms.append(explicit_norms(self.model, self.inputs))


def by_layer(norms, model):
    """Add up the norms of a layer's variables, by the layer that holds them."""
    sums = {}
    for norm, variable in zip(norms, model.trainable_variables, strict=True):
        name = next(part for part in reversed(variable.path.split("/")[:-1]))
        sums[name] = sums.get(name, 0) + norm**2
    return {name: np.sqrt(total) for name, total in sums.items()} | {"all": np.sqrt(np.square(norms).sum())}


def fit(model, inputs, *callbacks, epochs=3, batch_size=64, **arguments):
    arguments = {"shuffle": False, "verbose": 0} | arguments
    return model.fit(inputs, TARGETS, batch_size=batch_size, epochs=epochs, callbacks=list(callbacks), **arguments)


def weights_of(model):
    return [np.array(weight) for weight in model.get_weights()]


def arrays(variables):
    return [np.array(ops.convert_to_numpy(variable)) for variable in variables]


@pytest.fixture
def mixed_precision():
    keras.config.set_dtype_policy("mixed_float16")
    yield
    keras.config.set_dtype_policy("float32")


CASES = {
    "plain": {},
    "clipnorm": {"optimizer": lambda: keras.optimizers.Adam(0.01, clipnorm=1e-3)},
    "global_clipnorm": {"optimizer": lambda: keras.optimizers.SGD(0.1, global_clipnorm=1e-3)},
    "clipvalue": {"optimizer": lambda: keras.optimizers.SGD(0.1, momentum=0.9, clipvalue=1e-3)},
    "gradient accumulation": {"optimizer": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)},
    "exponential moving average": {"optimizer": lambda: keras.optimizers.Adam(0.01, use_ema=True)},
    "loss scale factor": {"optimizer": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=8.0)},
    "jit_compile": {"jit_compile": True},
    "run_eagerly": {"run_eagerly": True},
    "frozen layer": {"make_model": lambda: dense_network(frozen=True)},
    "embedding": {"make_model": embedding_network},
    "nested recurrent": {"make_model": recurrent_network},
}


@pytest.mark.parametrize("case", CASES)
def test_norms_equal_an_explicit_gradient_computation(case):
    arguments = dict(CASES[case])
    optimizer = arguments.pop("optimizer", keras.optimizers.Adam)()
    model, inputs = compiled(optimizer=optimizer, **arguments)
    norms, reference = GradientNorms(2), Reference(inputs)
    fit(model, inputs, norms, reference)
    assert norms.steps == [0, 2]
    expected = [by_layer(values, model) for values in reference.norms[::2]]
    assert [name.rpartition("/")[2] for name in norms.layers] == [name for name in expected[0] if name != "all"]
    for name, values in norms.history.items():
        np.testing.assert_allclose(values, [norm[name.rpartition("/")[2]] for norm in expected], rtol=1e-5)


def test_norms_of_mixed_precision_are_unscaled(mixed_precision):
    model, inputs = compiled()
    assert isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    norms, reference = GradientNorms(1), Reference(inputs)
    fit(model, inputs, norms, reference)
    expected = [by_layer(values, model) for values in reference.norms]
    for name, values in norms.history.items():
        np.testing.assert_allclose(values, [norm[name] for norm in expected], rtol=1e-2)


def test_steps_that_mixed_precision_skips_do_not_count(mixed_precision):
    # The initial loss scale of 2^15 times this loss overflows float16, so the first steps are skipped.
    model, inputs = compiled(optimizer=keras.optimizers.SGD(1e-6), loss_weights=[300.0])
    norms = GradientNorms(2)
    fit(model, inputs, norms, batch_size=16)
    applied = int(model.optimizer.inner_optimizer.iterations)
    assert 0 < applied < 12
    assert norms.steps == list(range(0, applied, 2))
    assert np.isfinite(norms.history["all"]).all()


@pytest.mark.parametrize(
    "every, steps_per_execution",
    [pytest.param(1, 4, marks=STEPS_AT_ONCE), (3, 1), pytest.param(3, 2, marks=STEPS_AT_ONCE), (np.int64(3), 1)],
)
def test_recorded_steps_do_not_depend_on_how_steps_are_executed(every, steps_per_execution):
    recorded = {}
    for key, each, execution in (("reference", 1, 1), ("tested", every, steps_per_execution)):
        model, inputs = compiled(steps_per_execution=execution)
        recorded[key] = norms = GradientNorms(each)
        fit(model, inputs, norms, batch_size=8, epochs=2)
    assert recorded["tested"].steps == list(range(0, 16, every))
    for name, values in recorded["tested"].history.items():
        np.testing.assert_allclose(values, recorded["reference"].history[name][::every], rtol=1e-5)


def test_steps_are_read_before_the_device_overwrites_them(monkeypatch):
    recorded = {}
    for rows in (256, 3):
        monkeypatch.setattr("callbacks.gradient_norms.ROWS", rows)
        model, inputs = compiled()
        recorded[rows] = norms = GradientNorms(2)
        fit(model, inputs, norms, batch_size=4, epochs=2)
    assert recorded[3].steps == recorded[256].steps == list(range(0, 32, 2))
    np.testing.assert_allclose(recorded[3].history["all"], recorded[256].history["all"], rtol=1e-6)


def test_logs_hold_mean_and_maximum_of_each_epoch(tmp_path):
    model, inputs = compiled()
    norms = GradientNorms(1)
    logger = keras.callbacks.CSVLogger(tmp_path / "log.csv")
    history = fit(model, inputs, norms, logger, batch_size=16, epochs=2).history
    header = (tmp_path / "log.csv").read_text().splitlines()[0].split(",")
    for prefix, name in (("", "all"), ("first_layer_", "first"), ("last_layer_", "last")):
        values = np.reshape(norms.history[name], (2, 4))
        np.testing.assert_allclose(history[f"{prefix}gradient_norm_mean"], values.mean(axis=1))
        np.testing.assert_allclose(history[f"{prefix}gradient_norm_max"], values.max(axis=1))
        assert {f"{prefix}gradient_norm_mean", f"{prefix}gradient_norm_max"} <= set(header)
    np.testing.assert_allclose(history["update_to_weight_ratio"], norms.update_to_weight_ratios["all"])
    assert "update_to_weight_ratio" in header


def test_update_to_weight_ratio_is_that_of_the_first_step_of_an_epoch():
    snapshots = []

    class Snapshot(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            snapshots.append(arrays(self.model.trainable_variables))

    model, inputs = compiled()
    norms = GradientNorms()
    fit(model, inputs, norms, Snapshot(), epochs=2)
    snapshots.append(arrays(model.trainable_variables))
    for epoch in range(2):
        before, after = snapshots[epoch], snapshots[epoch + 1]
        # The variables of the first layer are the first two.
        for name, variables in {"first": slice(0, 2), "last": slice(-2, None), "all": slice(None)}.items():
            update = np.sqrt(
                sum(np.square(b - a).sum() for a, b in zip(before[variables], after[variables], strict=True))
            )
            weight = np.sqrt(sum(np.square(a).sum() for a in before[variables]))
            assert norms.update_to_weight_ratios[name][epoch] == pytest.approx(update / weight, rel=1e-4)


@pytest.mark.parametrize("how", ["run_eagerly", "jit_compile", "default"])
def test_training_is_as_without_it(how):
    arguments = {} if how == "default" else {how: True}
    trained = {}
    for callbacks in ((), (GradientNorms(2),)):
        model, inputs = compiled(**arguments)
        epochs = 1 if how == "default" and BACKEND == "tensorflow" else 3
        fit(model, inputs, *callbacks, batch_size=64 if epochs == 1 else 16, epochs=epochs)
        trained[len(callbacks)] = weights_of(model)
        start = weights_of(compiled(**arguments)[0])
    for without, with_norms, before in zip(trained[0], trained[1], start, strict=True):
        if how == "default" and BACKEND == "tensorflow":
            # Any extra node lets TensorFlow's graph optimiser reorder arithmetic.
            np.testing.assert_allclose(with_norms - before, without - before, rtol=1e-5, atol=1e-9)
        else:
            np.testing.assert_array_equal(with_norms, without)


def test_second_fit_begins_anew_and_the_optimizer_is_as_before():
    model, inputs = compiled()
    norms = GradientNorms(1)
    fit(model, inputs, norms, epochs=2)
    variables = len(model.optimizer.variables)
    fit(model, inputs, epochs=1)
    reference = Reference(inputs)
    fit(model, inputs, norms, reference, epochs=2)
    assert norms.steps == [0, 1]
    np.testing.assert_allclose(norms.history["all"], [np.linalg.norm(values) for values in reference.norms], rtol=1e-5)
    assert len(model.optimizer.variables) == variables


class Fail(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise RuntimeError("on purpose")


def attachments(model):
    """Return everything that the callback adds to or replaces in the model and its optimizer."""
    names = ("apply", "save_own_variables", "load_own_variables")
    replaced = [vars(model.optimizer).get(name) for name in names]
    return replaced, model.train_function, [variable.path for variable in model.optimizer.variables]


@pytest.mark.parametrize("who_detaches", ["the callback", "another one"])
def test_after_an_exception_in_fit_nothing_is_left_once_detached(who_detaches):
    model, inputs = compiled()
    fit(model, inputs, epochs=1)
    before = attachments(model)
    norms = GradientNorms(1)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(model, inputs, norms, Fail())
    fit(model, inputs, epochs=1)
    assert attachments(model) != before
    if who_detaches == "the callback":
        norms.detach()
        assert attachments(model) == before
    else:
        norms = GradientNorms(1)
    fit(model, inputs, norms, epochs=2)
    assert norms.steps == [0, 1]
    assert attachments(model) == before


def test_model_compiled_again_after_an_exception_is_trained_by_its_new_optimizer():
    model, inputs = compiled()
    norms = GradientNorms(2)
    with pytest.raises(RuntimeError, match="on purpose"):
        fit(model, inputs, norms, Fail())
    weights = arrays(model.trainable_variables)
    model.compile(keras.optimizers.SGD(0.0), "binary_crossentropy")
    fit(model, inputs, norms, epochs=3)
    assert norms.steps == [0, 2]
    for weight, before in zip(arrays(model.trainable_variables), weights, strict=True):
        np.testing.assert_array_equal(weight, before)


def test_two_in_one_fit_are_refused():
    model, inputs = compiled()
    with pytest.raises(ValueError, match="A fit takes one GradientNorms"):
        fit(model, inputs, GradientNorms(), GradientNorms())


def test_callback_that_has_the_training_function_made_anew_does_not_disturb_it():
    class MakeAnew(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            self.model.make_train_function(force=True)

    recorded = {}
    for others in ((), (MakeAnew(),)):
        model, inputs = compiled()
        recorded[len(others)] = norms = GradientNorms(2)
        fit(model, inputs, norms, *others, batch_size=16, epochs=2)
    assert recorded[1].steps == [0, 2, 4, 6]
    np.testing.assert_allclose(recorded[1].history["all"], recorded[0].history["all"], rtol=1e-6)


def test_step_that_applies_gradients_twice_leaves_gaps_but_no_wrong_norms(monkeypatch):
    class Twice(keras.Sequential):
        def train_step(self, *arguments):
            outputs = super().train_step(*arguments)
            return super().train_step(*((outputs[1], arguments[1]) if BACKEND == "jax" else arguments))

    monkeypatch.setattr("callbacks.gradient_norms.ROWS", 2)
    keras.utils.set_random_seed(0)
    model = Twice([keras.Input((4,)), layers.Dense(1, "sigmoid")])
    # Nothing is learned, so that the norms depend on the batch alone.
    model.compile(keras.optimizers.SGD(0.0), "binary_crossentropy")
    norms = GradientNorms(2)
    fit(model, INPUTS, norms, batch_size=16)
    assert 3 <= len(norms.steps) < 12
    assert all(step % 2 == 0 for step in norms.steps)
    batches = [slice(16 * batch, 16 * batch + 16) for batch in range(4)]
    expected = [np.linalg.norm(explicit_norms(model, INPUTS[batch], TARGETS[batch])) for batch in batches]
    np.testing.assert_allclose(norms.history["all"], [expected[step // 2 % 4] for step in norms.steps], rtol=1e-5)


def test_checkpoint_saved_in_the_middle_is_as_without_it(tmp_path):
    for name, callbacks in {"without": (), "with": (GradientNorms(1),)}.items():
        model, inputs = compiled(run_eagerly=True)
        path = str(tmp_path / f"{name}-{{epoch}}.keras")
        fit(model, inputs, *callbacks, keras.callbacks.ModelCheckpoint(path), epochs=2)
    loaded = [keras.models.load_model(tmp_path / f"{name}-1.keras") for name in ("without", "with")]
    first, second = (arrays([*model.variables, *model.optimizer.variables]) for model in loaded)
    assert len(first) == len(second)
    for expected, actual in zip(first, second, strict=True):
        np.testing.assert_array_equal(actual, expected)
    assert int(loaded[1].optimizer.iterations) == 1


@pytest.mark.parametrize("first", ["norms", "backup"])
def test_training_resumed_from_a_backup_goes_on_exactly(tmp_path, first):
    def train(*callbacks, folder):
        model, inputs = compiled(run_eagerly=True)
        backup = keras.callbacks.BackupAndRestore(tmp_path / folder)
        norms = GradientNorms(1)
        fit(model, inputs, *([norms, backup] if first == "norms" else [backup, norms]), *callbacks, epochs=4)
        return weights_of(model), norms

    expected, uninterrupted = train(folder="uninterrupted")
    with pytest.raises(RuntimeError, match="on purpose"):
        train(Fail(), folder="interrupted")
    weights, resumed = train(folder="interrupted")
    for actual, value in zip(weights, expected, strict=True):
        np.testing.assert_array_equal(actual, value)
    assert resumed.steps == list(range(len(resumed.steps)))
    assert resumed.history["all"] == uninterrupted.history["all"][-len(resumed.steps) :]


def test_layers_of_equal_name_are_told_apart():
    def block():
        return keras.Sequential([keras.Input((4,)), layers.Dense(4, name="dense")], name="block")

    inputs = keras.Input((4,))
    inner = keras.Model(inputs, block()(inputs), name="inner")
    outer = keras.Sequential([keras.Input((4,)), inner, keras.Sequential([keras.Input((4,)), block()], name="inner_2")])
    outer.add(layers.Dense(1, "sigmoid"))
    outer.compile("sgd", "binary_crossentropy")
    norms = GradientNorms(1)
    fit(outer, INPUTS, norms, epochs=1)
    assert len(set(norms.layers)) == 3


# Where the gradients come from


MIRRORED = """
import sys
import keras
import numpy as np
import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from callbacks.gradient_norms import GradientNorms
from tests.callbacks.test_gradient_norms import compiled, fit, plain_network

with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
    model, inputs = compiled(plain_network, keras.optimizers.SGD(0.1))
norms = GradientNorms(1)
fit(model, inputs, norms, batch_size=16, epochs=2)
np.savez(sys.argv[1], **{str(index): norms.history[name] for index, name in enumerate(norms.history)})
"""


@ON_TENSORFLOW
def test_norms_under_a_mirrored_strategy_are_those_of_the_whole_batch(tmp_path):
    # In a process of its own, because the devices are chosen before TensorFlow is used.
    path = tmp_path / "norms.npz"
    process = subprocess.run([sys.executable, "-c", MIRRORED, path], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    model, inputs = compiled(plain_network, keras.optimizers.SGD(0.1))
    norms = GradientNorms(1)
    fit(model, inputs, norms, batch_size=16, epochs=2)
    with np.load(path) as there:
        for index, name in enumerate(norms.history):
            np.testing.assert_allclose(there[str(index)], norms.history[name], rtol=1e-4)


class Alternating(keras.Model):
    """Trains its two layers with optimizers of their own; that of `compile` makes no step."""

    def __init__(self):
        super().__init__()
        self.first, self.second = layers.Dense(3, name="first"), layers.Dense(1, name="second")
        self.first_optimizer, self.second_optimizer = keras.optimizers.SGD(0.0), keras.optimizers.SGD(0.0)

    def call(self, inputs):
        return self.second(self.first(inputs))

    def loss_of(self, x, y):
        return ops.mean(ops.square(self(x)[:, 0] - ops.convert_to_tensor(y)))

    def train_step(self, data):
        x, y = data
        for layer, optimizer in ((self.first, self.first_optimizer), (self.second, self.second_optimizer)):
            variables = layer.trainable_variables
            optimizer.apply(gradients_of(lambda: self.loss_of(x, y), variables), variables)
        return {"total": ops.stop_gradient(self.loss_of(x, y))}


def gradients_of(compute, variables):
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss = compute()
        return tape.gradient(loss, variables)
    import torch

    return torch.autograd.grad(compute(), [variable.value for variable in variables])


def alternating():
    keras.utils.set_random_seed(0)
    model = Alternating()
    model(INPUTS[:1])
    model.compile("adam")
    return model


NOT_ON_JAX = pytest.mark.skipif(BACKEND == "jax", reason="on JAX, fit carries the state of one optimizer only")


@NOT_ON_JAX
def test_each_of_several_optimizers_has_its_own_norms():
    model = alternating()
    both = [GradientNorms(1, optimizer=model.first_optimizer), GradientNorms(1, optimizer=model.second_optimizer)]
    with warnings_as_errors():
        fit(model, INPUTS, *both, epochs=2)
    assert [norms.layers for norms in both] == [["first"], ["second"]]
    for norms, layer in zip(both, (model.first, model.second), strict=True):
        gradients = gradients_of(lambda: model.loss_of(INPUTS, TARGETS), layer.trainable_variables)
        expected = np.sqrt(sum(np.square(ops.convert_to_numpy(gradient)).sum() for gradient in gradients))
        np.testing.assert_allclose(norms.history["all"], [expected] * 2, rtol=1e-5)
        assert norms.history.keys() == norms.update_to_weight_ratios.keys() == {*norms.layers, "all"}


@contextlib.contextmanager
def warnings_as_errors():
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="GradientNorms")
        yield


@NOT_ON_JAX
def test_optimizer_that_does_not_train_is_told_after_the_first_epoch():
    norms = GradientNorms(1)
    with pytest.warns(UserWarning, match="watches the optimizer 'adam', which has not made a step in the first epoch"):
        history = fit(alternating(), INPUTS, norms, epochs=2).history
    assert norms.steps == []
    assert np.isnan(history["gradient_norm_mean"]).all()


def test_multi_optimizer_is_watched_as_a_whole_and_by_member():
    def optimizer():
        return keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {".*last/.*": keras.optimizers.Adam(0.01)})
        )

    model, inputs = compiled(optimizer=optimizer())
    norms, reference = GradientNorms(1), Reference(inputs)
    fit(model, inputs, norms, reference)
    np.testing.assert_allclose(norms.history["all"], [np.linalg.norm(each) for each in reference.norms], rtol=1e-5)
    model, inputs = compiled(optimizer=optimizer())
    norms, reference = GradientNorms(1, optimizer=model.optimizer.optimizers[0]), Reference(inputs)
    fit(model, inputs, norms, reference)
    assert norms.layers == ["last"]
    np.testing.assert_allclose(norms.history["all"], [np.linalg.norm(each[-2:]) for each in reference.norms], rtol=1e-5)


# Few steps, no steps, no weights


def test_every_key_is_in_the_logs_of_every_epoch():
    model, inputs = compiled(metrics=["accuracy"])
    norms = GradientNorms(10)
    arguments = {"validation_data": (INPUTS, TARGETS), "validation_freq": 2}
    history = fit(model, inputs, norms, batch_size=16, epochs=4, **arguments).history
    frame = pandas.DataFrame({key: values for key, values in history.items() if not key.startswith("val_")})
    assert frame["gradient_norm_mean"].isna().tolist() == [False, True, False, True]
    assert norms.steps == [0, 10]
    assert norms.epochs == [0, 1, 2, 3]
    np.testing.assert_allclose(frame["gradient_norm_max"].dropna(), norms.history["all"])


@pytest.mark.filterwarnings("ignore:.*ran out of data")
@pytest.mark.parametrize("arguments", [{"epochs": 3}, {"epochs": 4, "steps_per_epoch": 3}], ids=str)
def test_data_that_end_early(arguments):
    """Steps count up without a gap, and each has the norm of its batch."""
    model, inputs = compiled(optimizer=keras.optimizers.SGD(0.0))
    batches = []

    class Spy(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            batches.append(batch)

    norms = GradientNorms(1)
    data = ((inputs[:16], TARGETS[:16, None]) for _ in range(7))
    history = model.fit(data, verbose=0, callbacks=[norms, Spy()], **arguments).history
    assert norms.steps == list(range(len(batches)))
    first = norms.history["last"][0]
    np.testing.assert_allclose(norms.history["last"], [first] * len(batches), rtol=1e-4)
    assert len(pandas.DataFrame(history)) == len(norms.epochs) == len(norms.update_to_weight_ratios["all"])


def test_frozen_model_is_told_and_has_no_norms():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(1, "sigmoid", trainable=False)])
    model.compile("sgd", "binary_crossentropy")
    norms = GradientNorms()
    with pytest.warns(UserWarning, match="no weights are trained"):
        history = fit(model, INPUTS, norms).history
    assert (norms.layers, norms.steps) == ([], [])
    assert np.isnan(pandas.DataFrame(history)["gradient_norm_mean"]).all()


class Late(keras.Model):
    """Makes a layer when it is called."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.second = layer, layers.Dense(1, "sigmoid")

    def call(self, inputs):
        return self.second(self.first(inputs))


def late():
    first = layers.Dense(3)
    first.build((None, 4))
    return Late(first)


@pytest.mark.parametrize(
    "make_model", [lambda: keras.Sequential([layers.Dense(1)]), lambda: Late(layers.Dense(3)), late]
)
@ON_TENSORFLOW
def test_model_that_is_not_built_is_refused_in_words_that_fit(make_model):
    model = make_model()
    model.compile("sgd", "binary_crossentropy", run_eagerly=True)
    with pytest.raises(ValueError, match=r"is not built: call `model\(x\[:1\]\)`"):
        fit(model, INPUTS, GradientNorms())


# Kept out of the logs, drawn, copied


def test_log_false_keeps_it_out_of_the_logs():
    model, inputs = compiled()
    norms = GradientNorms(1, log=False)
    assert set(fit(model, inputs, norms).history) == {"loss"}
    assert len(norms.history["all"]) == len(norms.update_to_weight_ratios["all"]) == 3


def test_picture_shows_the_norms_by_step_and_by_layer(tmp_path):
    model, inputs = compiled()
    norms = GradientNorms(2)
    fit(model, inputs, norms, batch_size=16)
    figure = norms.plot(tmp_path / "norms.svg")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines.keys() == norms.history.keys()
    for name, line in lines.items():
        np.testing.assert_array_equal(line.get_xdata(), norms.steps)
        np.testing.assert_array_equal(line.get_ydata(), norms.history[name])
    texts = {element.text for element in ElementTree.parse(tmp_path / "norms.svg").iter() if element.text}
    assert {"step", "gradient norm", "all", *norms.layers} <= texts
    norms.plot(tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "norms.svg").read_bytes()
    norms.plot(tmp_path / "norms.pdf")
    assert (tmp_path / "norms.pdf").read_bytes().startswith(b"%PDF")
    GradientNorms().plot()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda norms: pickle.loads(pickle.dumps(norms))])
def test_copies_and_pickles_have_what_was_recorded_and_serve_again(duplicate):
    model, inputs = compiled()
    norms = GradientNorms(1, optimizer=model.optimizer)
    fit(model, inputs, norms)
    again = duplicate(norms)
    assert again.history == norms.history
    other, _ = compiled()
    fit(other, inputs, again)
    np.testing.assert_allclose(again.history["all"], norms.history["all"], rtol=1e-6)


@pytest.mark.parametrize("every", [0, -1, 1.5, None])
def test_bad_argument_is_named(every):
    with pytest.raises(ValueError, match="every must be a positive integer"):
        GradientNorms(every)
