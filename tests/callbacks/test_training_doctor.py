import math
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

from callbacks import training_doctor
from callbacks.training_doctor import RULES, THRESHOLDS, TrainingDoctor, contract
from callbacks.training_doctor.rules import ADVICE, FAULT, LEVELS, judge
from evidence.recipes import ROOT

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(256, 4)).astype("float32")
TARGETS = (INPUTS.sum(axis=1) > 0).astype("int32") + (INPUTS[:, 0] > 1)
CLASSES = 3
# Three of ten labels are at random, and can only be learned by heart.
NOISY = np.where(GENERATOR.random(256) < 0.3, GENERATOR.integers(0, CLASSES, 256), TARGETS)


def build_model(optimizer=None, activation="relu", depth=1, units=16, loss=None, seed=0, **arguments):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((4,))])
    for number in range(1, depth + 1):
        model.add(layers.Dense(units, activation=activation, name=f"hidden_{number}", **arguments))
    model.add(layers.Dense(CLASSES, name="output"))
    loss = loss or keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer or keras.optimizers.Adam(0.01), loss)
    return model


def examine(model, *callbacks, inputs=INPUTS, targets=TARGETS, epochs=4, doctor=None, **arguments):
    """Train a model and return its doctor."""
    doctor = doctor or TrainingDoctor(inputs[:32], verbose=0, every=1)
    settings = {"epochs": epochs, "batch_size": 32, "verbose": 0, "shuffle": False} | arguments
    model.fit(inputs, targets, callbacks=[*callbacks, doctor], **settings)
    return doctor


def names(doctor):
    return [finding.name for finding in doctor.findings]


def reproaches(doctor):
    return [finding.name for finding in doctor.findings if finding.level != ADVICE]


def message(doctor, name):
    (text,) = [finding.message for finding in doctor.findings if finding.name == name]
    return text


# Findings in real runs


def test_labels_all_the_same_are_a_fault_of_the_training_and_of_a_sorted_probe_only_advice():
    same = np.full(256, 2)
    doctor = TrainingDoctor((INPUTS[:32], same[:32]), verbose=0)
    examine(build_model(keras.optimizers.Adam(0.1)), targets=same, doctor=doctor, epochs=20)
    assert reproaches(doctor) == ["labels all the same"]
    order = np.argsort(TARGETS)
    doctor = TrainingDoctor((INPUTS[order[:32]], TARGETS[order[:32]]), verbose=0)
    examine(build_model(keras.optimizers.Adam(0.05)), doctor=doctor, epochs=9)
    assert "labels all the same" in names(doctor)
    assert reproaches(doctor) == []


def test_healthy_run_has_no_finding_and_says_so(capsys):
    doctor = TrainingDoctor((INPUTS[:32], TARGETS[:32]))
    examine(build_model(keras.optimizers.Adam(0.05)), doctor=doctor, validation_split=0.25, epochs=9)
    assert reproaches(doctor) == []
    examine(build_model(), doctor=doctor, validation_split=0.25, epochs=2)
    assert doctor.findings == []
    assert capsys.readouterr().out.splitlines()[-1] == "TrainingDoctor: nothing found."


def test_what_was_not_measured_is_named(capsys):
    examine(build_model(), doctor=TrainingDoctor())
    assert "Not examined: inputs, dead and saturated units, targets, overfitting." in capsys.readouterr().out
    model = build_model(loss="mean_squared_error")
    doctor = examine(model, targets=np.eye(CLASSES)[TARGETS], doctor=TrainingDoctor(INPUTS[:32], verbose=0))
    assert "Not examined: targets, chance, overfitting." in doctor.report()


@pytest.mark.parametrize("inputs", [INPUTS + 20, INPUTS * 100, INPUTS * 1e-3])
def test_inputs_out_of_range(inputs):
    assert "inputs out of range" in names(examine(build_model(), inputs=inputs, epochs=1))


def test_inputs_that_the_model_rescales_are_in_range():
    model = keras.Sequential([keras.Input((4,)), layers.Rescaling(1e-3), layers.Dense(CLASSES)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert "inputs out of range" not in names(examine(model, inputs=INPUTS * 1000))


@pytest.mark.parametrize("every", [1, 3])
def test_loss_that_is_not_finite_is_told_with_its_step_rate_norm_and_layer(every):
    inputs = INPUTS.copy()
    inputs[5 * 32] = np.inf  # in the sixth batch
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    doctor = TrainingDoctor(INPUTS[:32], verbose=0, every=every)
    examine(build_model(keras.optimizers.SGD(rate)), inputs=inputs, doctor=doctor)
    # It had not grown, so that the data are the cause.
    assert names(doctor) == ["values not finite", "loss not finite"]
    told = message(doctor, "loss not finite")
    norms = doctor.gradient_norms
    last = max(step for step in norms.steps if step < 5)
    assert f"step 5, at rate {0.1 * 0.5**5:.2g};" in told
    assert f"{norms.history['all'][norms.steps.index(last)]:.3g}, at step {last}," in told


def test_layer_whose_gradient_was_the_first_not_to_be_finite_is_named():
    class Spoil(layers.Layer):
        """The absolute value, as a root whose derivative at 0 is not finite: nor are the gradients in front of it."""

        def call(self, inputs):
            return keras.ops.sqrt(keras.ops.square(inputs))

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(8, name="first"),
            layers.Dense(8, kernel_initializer="zeros", name="second"),
            Spoil(),
            layers.Dense(CLASSES, name="third"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    doctor = examine(model)
    assert "that of layer 'second' was the first not to be finite" in message(doctor, "loss not finite")


@pytest.mark.parametrize("step", [0, 1, 4, 6, 30])
def test_one_exploding_step_is_told_wherever_it_is(step):
    inputs = np.tile(INPUTS, (4, 1))
    inputs[step * 32 : (step + 1) * 32] *= 1e4
    # At a rate of zero, the other steps know nothing of it.
    doctor = TrainingDoctor(INPUTS[:32], verbose=0, every=1)
    model = build_model(keras.optimizers.SGD(0.0))
    examine(model, inputs=inputs, targets=np.tile(TARGETS, 4), epochs=1, doctor=doctor)
    assert "exploding gradients" in names(doctor)
    norms = doctor.gradient_norms.history["all"]
    assert int(np.argmax(norms)) == step
    assert 0.5 < doctor.signs["norm_jump"] / (norms[step] / np.median(norms)) < 2


def test_vanishing_gradients_are_told_with_the_ratio_of_the_norms():
    doctor = examine(build_model(activation="sigmoid", depth=8))
    assert "vanishing gradients" in names(doctor)
    norms = doctor.gradient_norms.history
    ratio = np.median(np.array(norms["hidden_1"]) / np.array(norms["output"]))
    assert f"{ratio:.1e}" in message(doctor, "vanishing gradients")


def test_network_of_zeros_is_stuck_at_chance():
    doctor = examine(build_model(kernel_initializer="zeros"), targets=np.arange(256) % CLASSES)
    assert "stuck at chance" in names(doctor)
    assert doctor.signs["last"] / doctor.signs["constant"] == pytest.approx(1.0, abs=0.01)


def test_dead_and_saturated_hidden_layers_are_named_and_the_output_layer_is_not():
    dead = examine(build_model(bias_initializer=keras.initializers.Constant(-9.0)))
    assert "dead units" in names(dead)
    large = keras.initializers.RandomNormal(0.0, 30.0)
    saturated = examine(build_model(activation="tanh", kernel_initializer=large))
    assert "saturated units" in names(saturated)
    assert any("'hidden_1'" in finding.message for finding in saturated.findings)
    keras.utils.set_random_seed(0)
    output = keras.Sequential(
        [keras.Input((4,)), layers.Dense(8), layers.Dense(1, "sigmoid", kernel_initializer=large)]
    )
    output.compile("adam", "binary_crossentropy")
    assert "saturated units" not in names(examine(output, targets=(INPUTS[:, 0] > 0).astype("float32")))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("optimizer", "rate"), [("Adam", 3.0), ("Adam", 10.0), ("RMSprop", 3.0), ("SGD", 30.0)])
def test_rate_too_high_is_told_whichever_way_the_losses_go(optimizer, rate, seed):
    model = build_model(getattr(keras.optimizers, optimizer)(rate), seed=seed)
    assert set(names(examine(model))) - {"loss not finite"} == {"rate too high"}


def test_rate_too_low():
    assert "rate too low" in names(examine(build_model(keras.optimizers.Adam(1e-6))))


def test_overfitting_is_seen_in_the_validation_loss():
    doctor = examine(build_model(units=256), targets=NOISY, epochs=40, validation_split=0.5)
    assert reproaches(doctor) == ["overfitting"]
    losses = doctor.model.history.history["val_loss"]
    best = int(np.argmin(losses))
    told = f"from its minimum of {losses[best]:.3g} in epoch {best + 1} to {losses[-1]:.3g}"
    assert told in message(doctor, "overfitting")


def test_clipping_is_counted_with_the_norms_before_clipping():
    for arguments in ({"clipnorm": 0.25}, {"global_clipnorm": 0.5}, {"clipnorm": 100.0}):
        doctor = examine(build_model(keras.optimizers.Adam(0.01, **arguments)))
        norms = doctor.gradient_norms.history
        ((kind, limit),) = arguments.items()
        by_step = np.max([norms["hidden_1"], norms["output"]], axis=0) if kind == "clipnorm" else np.array(norms["all"])
        assert doctor.signs["clipped"] == np.mean(by_step > limit)
        assert ("clipping most of the time" in names(doctor)) == (np.mean(by_step > limit) > 0.5)


# What was said wrongly once


def regression(optimizer="adam", loss="mean_squared_error", units=1, **arguments):
    """Return a compiled linear model of one output."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(units, **arguments)])
    model.compile(optimizer, loss)
    return model


# Targets of which the first batches have the small ones.
SKEWED = np.sort(np.exp(1.5 * INPUTS[:, :1]), axis=0).astype("float32")
SORTED = INPUTS[np.argsort(INPUTS[:, 0])]


@pytest.mark.parametrize("rate", [0.01, 1e-6])
def test_first_batch_of_skewed_targets_is_not_the_loss_before_training(rate):
    model = regression(keras.optimizers.Adam(rate), kernel_initializer="zeros")
    doctor = examine(model, inputs=SORTED, targets=SKEWED, batch_size=8)
    assert "rate too high" not in names(doctor)


def test_second_fit_that_begins_with_easy_examples_is_healthy():
    model = build_model()
    model.fit(INPUTS, TARGETS, epochs=30, verbose=0)
    each = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    order = np.argsort(keras.ops.convert_to_numpy(each(TARGETS, model.predict(INPUTS, verbose=0))))
    doctor = examine(model, inputs=INPUTS[order], targets=TARGETS[order], batch_size=8)
    assert "rate too high" not in names(doctor)


def test_long_run_that_falls_slowly_is_no_plateau():
    model = regression(keras.optimizers.SGD(0.005), kernel_initializer="zeros", use_bias=False)
    doctor = examine(model, targets=INPUTS.sum(axis=1, keepdims=True), epochs=150, batch_size=256)
    losses = model.history.history["loss"]
    assert losses[-1] < 0.5 * losses[-50]
    assert "plateau at a constant rate" not in names(doctor)


def test_loss_that_rises_is_not_said_to_have_fallen():
    class Worsen(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.set_weights([weights + 0.01 for weights in self.model.get_weights()])

    model = regression(keras.optimizers.SGD(0.0), kernel_initializer="zeros")
    doctor = examine(model, Worsen(), targets=np.tile([[1.0], [-1.0]], (128, 1)), epochs=12)
    told = message(doctor, "plateau at a constant rate")
    assert "fell" not in told
    assert "rose" in told


def test_norms_that_converged_to_zero_make_no_explosion_of_a_hard_batch():
    inputs = np.tile(INPUTS, (8, 1))
    targets = inputs.sum(axis=1, keepdims=True)
    targets[-32:] += 0.5
    model = regression(keras.optimizers.SGD(0.2), kernel_initializer="zeros")
    doctor = examine(model, inputs=inputs, targets=targets, epochs=1)
    norms = doctor.gradient_norms.history["all"]
    assert norms[-1] > 1000 * norms[-2]
    assert "exploding gradients" not in names(doctor)


def test_untrained_loss_is_not_called_that_of_a_constant_prediction():
    targets = GENERATOR.normal(size=(256, 1)).astype("float32")
    doctor = examine(regression(kernel_initializer="zeros"), targets=targets, epochs=12)
    assert "constant prediction" not in doctor.report()


def test_loss_of_zero_does_not_end_the_fit():
    model = regression(loss=lambda true, predicted: 0 * keras.ops.sum(predicted, axis=-1))
    doctor = examine(model, targets=np.zeros((256, 1)), epochs=9, validation_split=0.25)
    assert len(model.history.history["loss"]) == 9
    assert "rate too high" not in names(doctor)


def test_negative_losses_fall_as_others_do():
    targets = INPUTS @ GENERATOR.normal(size=(4, 3)).astype("float32")
    model = regression(keras.optimizers.Adam(0.01), loss="cosine_similarity", units=3)
    doctor = examine(model, targets=targets, epochs=9, validation_split=0.25)
    losses = model.history.history["loss"]
    assert losses[-1] < losses[0] < 0
    assert reproaches(doctor) == []


class FiniteOnly(layers.Layer):
    """Replaces what is not a number by 0."""

    def call(self, inputs):
        return keras.ops.where(keras.ops.isnan(inputs), 0.0, inputs)


class Root(layers.Layer):
    """The absolute value, as a root, which has no derivative at 0."""

    def call(self, inputs):
        return keras.ops.sqrt(keras.ops.square(inputs))


@pytest.mark.parametrize("what", ["input", "weight", "root"])
def test_values_that_are_not_finite_are_found_although_the_loss_is_finite(what):
    inputs = INPUTS.copy()
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(8), *([Root()] if what == "root" else []), FiniteOnly()]
    model = keras.Sequential([keras.Input((4,)), *hidden, layers.Dense(1)])
    if what == "input":
        inputs[100] = np.nan
    elif what == "weight":
        model.layers[0].kernel.assign(np.full((4, 8), np.nan))
    else:
        inputs[0] = 0.0
    model.compile("adam", "mean_squared_error")
    doctor = examine(model, inputs=inputs, targets=np.ones((256, 1)), epochs=2)
    assert np.isfinite(model.history.history["loss"]).all()
    assert names(doctor)[0] == "values not finite"


def test_softmax_over_one_unit_is_told_alone():
    model = regression(loss="binary_crossentropy", activation="softmax")
    doctor = examine(model, targets=(INPUTS[:, :1] > 0).astype("float32"), epochs=9)
    assert names(doctor) == ["softmax over one unit"]


def test_no_gradient_is_told_alone():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(CLASSES), layers.Rescaling(0.0)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert names(examine(model, epochs=9)) == ["no gradient"]


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.last = layers.Dense(8, "relu"), layers.Dense(CLASSES)

    def call(self, inputs):
        return self.last(self.hidden(inputs))


def test_subclassed_model_with_cross_entropy_is_examined():
    keras.utils.set_random_seed(0)
    model = Subclassed()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    doctor = examine(model, epochs=2)
    assert doctor.signs["constant"] == pytest.approx(math.log(CLASSES), rel=1e-5)


def test_frozen_model_is_told_and_trained_on():
    model = build_model()
    model.trainable = False
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert names(examine(model)) == ["nothing to train"]


def test_data_that_run_out_end_the_run_and_not_the_doctor():
    def batches():
        for start in range(0, 128, 32):
            yield INPUTS[start : start + 32], TARGETS[start : start + 32]

    model = build_model()
    doctor = TrainingDoctor(INPUTS[:32], verbose=0)
    model.fit(batches(), steps_per_epoch=4, epochs=3, verbose=0, callbacks=[doctor])
    # Keras begins an epoch in which there is nothing, and then perhaps another one.
    assert doctor.signs["epochs"] in (1, 2)


def test_epoch_of_the_best_validation_is_told_with_validation_freq():
    model = build_model(units=256)
    doctor = examine(model, targets=NOISY, epochs=40, validation_split=0.5, validation_freq=4)
    best = 4 * (int(np.argmin(model.history.history["val_loss"])) + 1)
    assert f"epoch {best} " in message(doctor, "overfitting")


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="PyTorch makes one step at a time")
def test_steps_of_several_in_one_execution_are_not_told_apart():
    inputs = INPUTS.copy()
    inputs[5 * 32] = np.inf
    model = build_model()
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), steps_per_execution=4)
    doctor = examine(model, inputs=inputs, epochs=1)
    assert "one of the steps 4 to 7" in message(doctor, "loss not finite")


def test_validation_losses_that_are_never_finite_are_told():
    doctor = examine(build_model(activation="tanh"), validation_data=(INPUTS * np.nan, TARGETS))
    assert reproaches(doctor) == ["validation unlike training"]
    assert doctor.signs["validation_not_finite"] == doctor.signs["validation_epochs"] == 4


# Before the first step

CLASS_TARGETS = {"sparse": TARGETS, "one-hot": np.eye(CLASSES)[TARGETS], "binary": (INPUTS[:, :1] > 0) * 1.0}
SEVERAL = (INPUTS[:, :3] > 0) * 1.0
SPARSE, CATEGORICAL, BINARY = "sparse_categorical_crossentropy", "categorical_crossentropy", "binary_crossentropy"
MSE = "mean_squared_error"


def before(units, activation, loss, targets, subclassed=False):
    """Return the doctor of a model that was about to make its first step."""

    class Stop(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            raise KeyboardInterrupt

    keras.utils.set_random_seed(0)
    last = layers.Dense(units, activation)
    model = keras.Sequential([keras.Input((4,)), last])
    if subclassed:

        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.last = last

            def call(self, inputs):
                return self.last(inputs)

        model = Model()
    model.compile("adam", loss)
    doctor = TrainingDoctor((INPUTS[:64], targets[:64]), verbose=0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(INPUTS, targets, verbose=0, callbacks=[doctor, Stop()])
    return doctor


@pytest.mark.parametrize(
    ("units", "activation", "loss", "targets", "finding"),
    [
        (1, "softmax", BINARY, CLASS_TARGETS["binary"], "softmax over one unit"),
        (1, "softmax", CATEGORICAL, CLASS_TARGETS["binary"], "softmax over one unit"),
        (1, "sigmoid", CATEGORICAL, CLASS_TARGETS["binary"], "output does not fit the loss"),
        (3, None, SPARSE, TARGETS, "output does not fit the loss"),
        (3, "relu", SPARSE, TARGETS, "output does not fit the loss"),
        (1, "tanh", BINARY, CLASS_TARGETS["binary"], "output does not fit the loss"),
        (3, "sigmoid", CATEGORICAL, CLASS_TARGETS["one-hot"], "output does not fit the loss"),
        (3, "softmax", keras.losses.SparseCategoricalCrossentropy(True), TARGETS, "output does not fit the loss"),
        (1, "sigmoid", keras.losses.BinaryCrossentropy(True), CLASS_TARGETS["binary"], "output does not fit the loss"),
        (3, "softmax", BINARY, CLASS_TARGETS["one-hot"], "output does not fit the loss"),
        (3, "softmax", MSE, SEVERAL, "output does not fit the loss"),
        (3, "softmax", SPARSE, TARGETS / 255, "targets do not fit the loss"),
        (3, "softmax", SPARSE, TARGETS + 1, "targets do not fit the loss"),
        (3, "softmax", CATEGORICAL, SEVERAL, "output does not fit the loss"),
        (3, "softmax", CATEGORICAL, CLASS_TARGETS["one-hot"] * 2, "targets do not fit the loss"),
        (1, "sigmoid", BINARY, TARGETS[:, None], "targets do not fit the loss"),
        (1, "sigmoid", BINARY, CLASS_TARGETS["binary"] * 2 - 1, "targets do not fit the loss"),
        (1, None, "mean_absolute_percentage_error", CLASS_TARGETS["binary"], "targets do not fit the loss"),
        (1, "exponential", "poisson", INPUTS[:, :1], "targets do not fit the loss"),
        (1, "sigmoid", MSE, INPUTS[:, :1], "targets out of the output's range"),
        (1, "tanh", MSE, INPUTS[:, :1] * 3, "targets out of the output's range"),
        (1, "relu", MSE, INPUTS[:, :1], "targets out of the output's range"),
        (1, None, MSE, INPUTS[:, :1] * 1000, "targets out of scale"),
        (1, None, MSE, INPUTS[:, :1] * np.where(np.arange(256) == 5, np.nan, 1)[:, None], "values not finite"),
        (3, "softmax", SPARSE, TARGETS, None),
        (3, "softmax", CATEGORICAL, CLASS_TARGETS["one-hot"], None),
        (3, None, keras.losses.SparseCategoricalCrossentropy(True), TARGETS, None),
        (1, None, keras.losses.BinaryCrossentropy(True), CLASS_TARGETS["binary"], None),
        (1, "sigmoid", BINARY, CLASS_TARGETS["binary"][:, 0], None),
        (3, "sigmoid", BINARY, SEVERAL, None),
        (2, "softmax", BINARY, np.eye(2)[CLASS_TARGETS["binary"][:, 0].astype(int)], None),
        (1, None, MSE, INPUTS[:, :1], None),
        (1, "tanh", MSE, np.tanh(INPUTS[:, :1]), None),
        (3, None, "cosine_similarity", INPUTS[:, :3], None),
        (1, None, "hinge", CLASS_TARGETS["binary"] * 2 - 1, None),
    ],
)
def test_contract_of_output_loss_and_targets(units, activation, loss, targets, finding):
    assert reproaches(before(units, activation, loss, targets)) == ([finding] if finding else [])


@pytest.mark.parametrize(
    ("activation", "loss", "finding"),
    [
        ("softmax", keras.losses.SparseCategoricalCrossentropy(True), "output does not fit the loss"),
        (None, SPARSE, "output does not fit the loss"),
        ("softmax", SPARSE, None),
        (None, keras.losses.SparseCategoricalCrossentropy(True), None),
    ],
)
def test_what_the_layers_do_not_tell_the_outputs_do(activation, loss, finding):
    doctor = before(3, activation, loss, TARGETS, subclassed=True)
    assert reproaches(doctor) == ([finding] if finding else [])


def test_softmax_of_a_softmax_is_found_behind_other_layers():
    keras.utils.set_random_seed(0)
    stack = [layers.Dense(3, "softmax"), layers.Dropout(0.1), layers.Reshape((3,)), layers.Activation("softmax")]
    model = keras.Sequential([keras.Input((4,)), *stack])
    model.compile("adam", SPARSE)
    assert reproaches(examine(model, epochs=1)) == ["output does not fit the loss"]


@pytest.mark.parametrize(
    ("loss", "targets", "units", "expected"),
    [
        (MSE, INPUTS[:, :1], 1, np.var(INPUTS[:, 0], ddof=1)),
        (MSE, INPUTS[:, 0], 1, np.var(INPUTS[:, 0], ddof=1)),
        (MSE, INPUTS[:, :2], 2, np.var(INPUTS[:, :2], axis=0, ddof=1).mean()),
        ("mean_absolute_error", INPUTS[:, :1], 1, np.abs(INPUTS[:, 0] - np.median(INPUTS[:, 0])).mean() * 256 / 255),
    ],
)
def test_loss_of_the_best_constant_of_a_regression(loss, targets, units, expected):
    assert contract.constant_loss(loss, targets, units) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("from_logits", [False, True])
def test_loss_of_the_best_constant_of_classes_counts_how_frequent_they_are(from_logits):
    shares = np.bincount(TARGETS) / 256
    expected = -np.sum(shares * np.log(shares)) + 2 / 512
    sparse = keras.losses.SparseCategoricalCrossentropy(from_logits)
    assert contract.constant_loss(sparse, TARGETS, 3) == pytest.approx(expected, rel=1e-4)
    assert contract.constant_loss(sparse, TARGETS[:, None], 3) == pytest.approx(expected, rel=1e-4)
    categorical = keras.losses.CategoricalCrossentropy(from_logits)
    assert contract.constant_loss(categorical, CLASS_TARGETS["one-hot"], 3) == pytest.approx(expected, rel=1e-4)
    share = CLASS_TARGETS["binary"].mean()
    expected = -share * np.log(share) - (1 - share) * np.log(1 - share) + 1 / 512
    binary = keras.losses.BinaryCrossentropy(from_logits)
    assert contract.constant_loss(binary, CLASS_TARGETS["binary"], 1) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (SPARSE, math.log(3)),
        (keras.losses.SparseCategoricalCrossentropy(True), math.log(3)),
        (keras.losses.categorical_crossentropy, math.log(3)),
        (BINARY, math.log(2)),
        (MSE, None),
        (lambda true, predicted: keras.ops.mean(predicted), None),
    ],
)
def test_loss_of_equal_probabilities_is_known_for_cross_entropies(loss, expected):
    known = contract.loss_of_equal_probabilities(loss, 3)
    assert known == (expected if expected is None else pytest.approx(expected, rel=1e-5))


def two_inputs(outputs=1):
    keras.utils.set_random_seed(0)
    first, second = keras.Input((2,)), keras.Input((2,))
    joined = layers.Concatenate()([first, second])
    heads = [layers.Dense(1, name=f"head_{number}")(joined) for number in range(outputs)]
    model = keras.Model([first, second], heads if outputs > 1 else heads[0])
    model.compile("adam", MSE if outputs == 1 else [MSE, BINARY])
    return model


def test_parts_of_the_probe_are_told_apart():
    parts, target = (INPUTS[:, :2], INPUTS[:, 2:]), INPUTS[:, :1]
    for probe, targets in (
        (tuple(part[:32] for part in parts), False),
        ((tuple(part[:32] for part in parts), target[:32]), True),
        (([part[:32] for part in parts], None), False),
    ):
        doctor = TrainingDoctor(probe, verbose=0)
        two_inputs().fit(parts, target, epochs=1, verbose=0, callbacks=[doctor])
        assert ("targets" in doctor.report().splitlines()[0]) != targets


def test_each_of_several_outputs_has_its_contract():
    parts, target = (INPUTS[:, :2], INPUTS[:, 2:]), INPUTS[:, :1]
    doctor = TrainingDoctor((parts, (target, (target > 0) * 1.0)), verbose=0)
    two_inputs(2).fit(parts, [target, (target > 0) * 1.0], epochs=1, verbose=0, callbacks=[doctor])
    (finding,) = doctor.findings
    assert finding.name == "output does not fit the loss"
    assert "of the output 'head_1'" in finding.message


@pytest.mark.parametrize("probe", [(INPUTS[:32], TARGETS[:31]), INPUTS[:0], (INPUTS[:32], TARGETS[:32], TARGETS[:32])])
def test_probe_that_is_none_is_refused(probe):
    with pytest.raises(ValueError, match="probe"):
        examine(build_model(), doctor=TrainingDoctor(probe, verbose=0))


def test_what_is_certain_is_printed_before_the_first_step(capsys):
    class Look(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            assert "before the first step:\n- output does not fit the loss (fault): " in capsys.readouterr().out

    examine(build_model(loss=SPARSE), Look(), doctor=TrainingDoctor((INPUTS[:32], TARGETS[:32])), epochs=1)


# Judgement

LIMITS = {name: default for name, (default, _) in THRESHOLDS.items()}
OUTPUT = {"loss": "squared", "from_logits": False, "activation": "linear", "units": 1}
HEALTHY_SIGNS = {
    "epochs": 20,
    "steps": 200,
    "untrained": 1.0,
    "first_batch": 1.0,
    "constant": 1.0,
    "constant_is": "probe",
    "first": 0.5,
    "last": 0.1,
    "best": 0.1,
    "probe": 0.1,
    "probe_rise": -0.9,
    "probe_rise_error": 0.01,
    "highest": 1.1,
    "highest_step": 3,
    "highest_of_last": 0.2,
    "noise": 0.001,
    "fall": 0.005,
    "fall_from": 0.12,
    "fall_error": 0.0001,
    "rises": 0.0,
    "typical_rise": 0.0,
    "validation_epochs": 20,
    "validation_not_finite": 0,
    "validation_first": 0.6,
    "validation_best": 0.15,
    "validation_last": 0.15,
    "best_validation_epoch": 18,
    "first_validation_epoch": 1,
    "last_validation_epoch": 20,
    "first_epoch": 1,
    "training_at_best": 0.11,
    "training_at_last": 0.1,
    "rate": 0.001,
    "rate_fell": False,
    "rate_at_end": 1.0,
    "layers": 3,
    "recorded": 100,
    "zero": 0.0,
    "norm_jump": 3.0,
    "norm_jump_step": 50,
    "norm_ratio": 1.0,
    "update_ratio": 1e-3,
    "first_update_ratio": 1e-2,
    "still_layers": [],
    "update_epochs": 20,
    "clipped": 0.0,
    "input_mean": 0.0,
    "input_deviation": 1.0,
    "distinct": 64,
    "dead": 0.1,
    "dead_layer": "dense",
    "dead_before": 0.1,
    "saturated": 0.1,
    "saturated_layer": "dense",
    "saturated_before": 0.1,
    "output_deviation": 1.0,
    "weights": 100,
    "trainable": 100,
}
POOR = {"last": 0.9, "best": 0.9, "probe": 0.9, "fall": 0.05, "fall_from": 0.93, "training_at_last": 0.9}
POOR |= {"validation_best": 0.93, "validation_last": 0.935}
FLAT = {"fall": 0.001}


def told(signs, **limits):
    return [(finding.name, finding.level) for finding in judge(HEALTHY_SIGNS | signs, LIMITS | limits)]


@pytest.mark.parametrize(
    ("finding", "level", "sick", "threshold", "within"),
    [
        ("inputs out of range", FAULT, POOR | {"input_mean": -11}, "input_mean", 12.0),
        ("inputs out of range", FAULT, {"untrained": 3.1, "input_deviation": 11}, "input_deviation_high", 12.0),
        ("inputs out of range", ADVICE, {"input_deviation": 11}, "input_deviation_high", 12.0),
        ("inputs out of range", ADVICE, {"input_deviation": 0.009}, "input_deviation_low", 0.008),
        ("exploding gradients", "symptom", POOR | {"norm_jump": 21}, "norm_jump", 22.0),
        ("exploding gradients", ADVICE, {"last": 0.2, "best": 0.2, "probe": 0.2, "norm_jump": 21}, "norm_jump", 22.0),
        ("vanishing gradients", FAULT, POOR | {"norm_ratio": 9e-4}, "norm_ratio", 8e-4),
        ("vanishing gradients", ADVICE, {"norm_ratio": 9e-4}, "norm_ratio", 8e-4),
        ("stuck at chance", "symptom", POOR | {"last": 1.0, "best": 1.0, "probe": 0.96} | FLAT, "chance", 0.97),
        ("stuck at chance", "symptom", POOR | {"last": 1.0, "best": 1.0, "probe": 0.96} | FLAT, "steps", 201),
        ("dead units", FAULT, POOR | {"dead": 0.51, "dead_before": 0.5}, "dead", 0.52),
        ("dead units", ADVICE, {"dead": 0.51}, "dead", 0.52),
        ("saturated units", FAULT, POOR | {"saturated": 0.51}, "saturated", 0.52),
        ("rate too high", FAULT, POOR | {"dead": 0.51, "first_update_ratio": 0.06}, "update_ratio_high", 0.2),
        ("rate too high", FAULT, POOR | {"update_ratio": 0.11}, "update_ratio_high", 0.12),
        ("rate too high", FAULT, {"probe_rise": 0.2, "last": 0.5, "best": 0.5}, "rise", 1.3),
        ("rate too high", FAULT, {"probe_rise": 0.2, "last": 0.5, "best": 0.5}, "noise", 21.0),
        ("rate too high", FAULT, POOR | {"probe": 0.95, "last": 0.95, "highest": 5.1}, "peak", 5.2),
        ("rate too low", FAULT, POOR | {"update_ratio": 9e-5}, "update_ratio_low", 8e-5),
        ("overfitting", "symptom", {"validation_best": 0.3, "validation_last": 0.45}, "validation_rise", 1.6),
        ("overfitting", ADVICE, {"validation_best": 0.3, "validation_last": 0.38}, "validation_rise", 1.6),
        ("overfitting", ADVICE, {"validation_best": 0.3, "validation_last": 0.38}, "training_fall", 0.2),
        (
            "validation unlike training",
            FAULT,
            {"validation_best": 1.6, "validation_last": 1.6, "training_at_last": 0.97},
            "validation_apart",
            1.7,
        ),
        ("underfitting", ADVICE, FLAT | {"last": 0.5, "best": 0.5, "probe": 0.5, "rate_fell": True}, "high", 0.6),
        ("plateau at a constant rate", ADVICE, FLAT, "flat", 0.005),
        ("plateau at a constant rate", ADVICE, FLAT | {"epochs": 9}, "epochs", 10),
        ("stopped while improving", ADVICE, {"fall": 0.03}, "improving", 0.3),
        ("loss oscillates", "symptom", POOR | {"rises": 0.4, "typical_rise": 0.06}, "rises", 0.5),
        ("loss oscillates", "symptom", POOR | {"rises": 0.4, "typical_rise": 0.06}, "rise_size", 0.07),
        ("clipping most of the time", ADVICE, {"clipped": 0.51}, "clipped", 0.52),
        ("layers frozen", ADVICE, {"frozen": 0.51, "trainable": 49}, "frozen", 0.52),
        ("dropout too high", FAULT, POOR | {"dropout": ("dropout", 0.8)}, "dropout", 0.85),
        ("constant output", "symptom", {"output_deviation": 9e-4}, "constant_output", 8e-4),
        (
            "batch normalization differs in inference",
            FAULT,
            {"batch_normalization": True, "mode_training": 0.1, "mode_inference": 0.25},
            "mode",
            3.0,
        ),
    ],
)
def test_each_threshold_decides_and_can_be_set(finding, level, sick, threshold, within):
    assert told({}) == []
    assert told(sick) == [(finding, level)]
    assert finding not in dict(told(sick, **{threshold: within}))


def test_layer_that_does_not_change_is_told():
    assert told({"still_layers": ["dense"]}) == [("layer does not change", "symptom")]
    assert told({"still_layers": ["a", "b", "c"]}) == []


def test_rise_of_a_loss_that_had_been_learned_is_nothing_beside_what_there_was_to_learn():
    risen = {"untrained": 0.0017, "probe_rise": 0.0002, "probe_rise_error": 0.00004, "probe": 0.0019}
    risen |= {"first": 0.024, "last": 0.024, "constant": 0.63}
    assert "rate too high" not in dict(told(risen))
    assert dict(told(risen | {"probe_rise": 0.02, "probe": 0.0217}))["rate too high"] == FAULT


def test_rate_that_fell_makes_no_plateau_and_chance_no_underfitting():
    assert told(FLAT | {"rate_fell": True}) == []
    stuck = {"last": 1.0, "best": 1.0, "probe": 1.0, "fall_from": 1.0}
    assert told(FLAT | stuck) == [("stuck at chance", "symptom")]


def test_what_follows_from_a_fault_is_not_told_beside_it_and_faults_come_first():
    sick = POOR | {"dead": 0.9, "update_ratio": 9e-5, "norm_ratio": 0.0, "clipped": 0.6, "norm_jump": 30.0}
    assert told(sick) == [
        ("dead units", FAULT),
        ("exploding gradients", "symptom"),
        ("clipping most of the time", ADVICE),
    ]
    levels = [LEVELS.index(level) for _, level in told(sick)]
    assert levels == sorted(levels)


def test_every_rule_has_a_name_of_its_own_and_silences_only_rules():
    names_of_rules = [rule.name for rule in RULES]
    assert len(set(names_of_rules)) == len(names_of_rules)
    for rule in RULES:
        assert set(rule.silences) <= set(names_of_rules) - {rule.name}
        assert rule.level in LEVELS
        assert rule.change.endswith(".")
        for recipe in rule.recipes:
            assert (ROOT / "recipes" / f"{recipe}.py").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dread": 1.0}, "There is no threshold 'dread': choose from input_mean,"),
        ({"dead": 0}, "dead must be a positive number, not 0"),
        ({"dead": "half"}, "dead must be a positive number, not 'half'"),
        ({"constant_loss": -1}, "constant_loss must be a positive number or None, not -1"),
        ({"every": 0}, "every must be a positive integer"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        TrainingDoctor(**arguments)


@pytest.mark.parametrize(("first_update_ratio", "is_told"), [(0.9, False), (1.1, True)])
def test_batches_that_are_hard_each_epoch_excuse_no_step_larger_than_the_weights(first_update_ratio, is_told):
    lost = POOR | {"probe": 0.95, "last": 0.95, "highest": 8.0, "highest_of_last": 4.0}
    assert (("rate too high", FAULT) in told(lost | {"first_update_ratio": first_update_ratio})) == is_told


@pytest.mark.parametrize(("last", "finding"), [(4.9, "values not finite"), (5.1, "rate too high")])
def test_outputs_that_are_not_finite_are_laid_to_a_loss_that_grew_and_stayed(last, finding):
    sick = {"outputs_not_finite": 0.2, "first_update_ratio": 2.0, "highest": 20.0, "first_batch": 1.0, "last": last}
    sick |= {"first": 0.9, "probe": last, "probe_rise": last - 1.0}
    assert [name for name, level in told(sick) if level == FAULT] == [finding]


# Manners


def test_every_threshold_has_a_reason():
    assert all(value > 0 and len(reason.split()) > 4 for value, reason in THRESHOLDS.values())


def test_logs_hold_what_its_monitors_measure():
    model = build_model()
    doctor = examine(model)
    logged = set(model.history.history)
    assert {"gradient_norm_mean", "update_to_weight_ratio", "learning_rate"} <= logged
    assert doctor.gradient_norms.layers == ["hidden_1", "output"]


def test_second_fit_begins_anew_and_training_is_left_as_it_was():
    doctor = examine(build_model(keras.optimizers.Adam(3.0)))
    assert "rate too high" in names(doctor)
    model = build_model()
    examine(model, doctor=doctor)
    assert names(doctor) == []
    assert "apply" not in vars(model.optimizer)
    plain = build_model()
    plain.fit(INPUTS, TARGETS, epochs=4, batch_size=32, verbose=0, shuffle=False)
    for with_doctor, without in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(with_doctor, without, rtol=1e-4, atol=1e-6)


def test_findings_can_be_read_after_an_interruption():
    class Interrupt(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    doctor = TrainingDoctor(INPUTS[:32], verbose=0)
    with pytest.raises(KeyboardInterrupt):
        build_model(keras.optimizers.Adam(3.0)).fit(
            INPUTS, TARGETS, epochs=4, batch_size=32, verbose=0, callbacks=[doctor, Interrupt()]
        )
    assert "rate too high" in names(doctor)


def test_folder_copied_alone_judges_by_losses_and_probe_and_says_what_it_did_not_examine(tmp_path):
    folder = Path(training_doctor.__file__).parent
    shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import keras, numpy as np
from training_doctor import TrainingDoctor
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
model.compile(keras.optimizers.Adam(9.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
inputs = np.random.default_rng(0).normal(size=(256, 4)).astype("float32")
model.fit(inputs, np.arange(256) % 3, epochs=2, verbose=0, callbacks=[TrainingDoctor(inputs[:32])])
model.fit(inputs, np.arange(256) % 3, epochs=1, verbose=0, callbacks=[TrainingDoctor((inputs[:32], np.arange(32)))])
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "- rate too high (fault): " in process.stdout, process.stderr
    unseen = "inputs, dead and saturated units, targets, gradients and clipping, the rate"
    assert f"Not examined: {unseen}" in process.stdout
    assert "- targets do not fit the loss (fault): the targets of the probe run from 0 to 31" in process.stdout
