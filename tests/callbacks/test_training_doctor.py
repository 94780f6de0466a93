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

GENERATOR = np.random.default_rng(0)
INPUTS = GENERATOR.normal(size=(256, 4)).astype("float32")
TARGETS = (INPUTS.sum(axis=1) > 0).astype("int32") + (INPUTS[:, 0] > 1)
CLASSES = 3


def build_model(optimizer=None, activation="relu", depth=1, units=16, loss=None, **arguments):
    keras.utils.set_random_seed(0)
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


def test_rate_too_high_and_too_low():
    assert "rate too high" in names(examine(build_model(keras.optimizers.Adam(3.0))))
    assert "rate too low" in names(examine(build_model(keras.optimizers.Adam(1e-6))))


def test_overfitting_is_seen_in_the_validation_loss():
    targets = np.where(GENERATOR.random(len(INPUTS)) < 0.4, GENERATOR.integers(0, CLASSES, len(INPUTS)), TARGETS)
    doctor = examine(build_model(units=256), targets=targets, epochs=40, validation_split=0.5)
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
