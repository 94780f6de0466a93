import math
import shutil
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

from callbacks import training_doctor
from callbacks.training_doctor import RECIPES, THRESHOLDS, TrainingDoctor

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
    model.fit(
        inputs,
        targets,
        epochs=epochs,
        batch_size=32,
        verbose=0,
        shuffle=False,
        callbacks=[*callbacks, doctor],
        **arguments,
    )
    return doctor


def names(doctor):
    return [finding.name for finding in doctor.findings]


# Findings in real runs


def test_healthy_run_has_no_finding_and_says_so(capsys):
    doctor = examine(build_model(), doctor=TrainingDoctor(INPUTS[:32]), validation_split=0.25)
    assert doctor.findings == []
    assert capsys.readouterr().out.strip() == "TrainingDoctor: nothing found."


def test_what_was_not_measured_is_named(capsys):
    doctor = examine(build_model(loss="sparse_categorical_crossentropy"), doctor=TrainingDoctor())
    assert "Not examined: inputs, dead and saturated units, overfitting." in capsys.readouterr().out
    model = build_model(loss="mean_squared_error")
    doctor = examine(model, targets=np.eye(CLASSES)[TARGETS], doctor=TrainingDoctor(INPUTS[:32], verbose=0))
    assert "Not examined: chance, overfitting." in doctor.report()


@pytest.mark.parametrize("inputs", [INPUTS + 20, INPUTS * 100, INPUTS * 1e-3, INPUTS * np.nan])
def test_inputs_out_of_range(inputs):
    assert "inputs out of range" in names(examine(build_model(), inputs=inputs, epochs=1))


def test_inputs_that_the_model_rescales_are_in_range():
    model = keras.Sequential([keras.Input((4,)), layers.Rescaling(1e-3), layers.Dense(CLASSES)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert names(examine(model, inputs=INPUTS * 1000)) == []


@pytest.mark.parametrize("every", [1, 3])
def test_loss_that_is_not_finite_is_told_with_its_step_rate_norm_and_layer(every):
    inputs = INPUTS.copy()
    inputs[5 * 32] = np.inf  # in the sixth batch
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 1, 0.5)
    doctor = TrainingDoctor(INPUTS[:32], verbose=0, every=every)
    examine(build_model(keras.optimizers.SGD(rate)), inputs=inputs, doctor=doctor)
    assert names(doctor) == ["loss not finite"]
    (finding,) = doctor.findings
    norms = doctor.gradient_norms
    last = max(step for step in norms.steps if step < 5)
    assert f"step 5, at rate {0.1 * 0.5**5:.2g};" in finding.message
    assert f"{norms.history['all'][norms.steps.index(last)]:.3g}, at step {last}," in finding.message


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
    (finding,) = doctor.findings
    assert finding.name == "loss not finite"
    assert "that of layer 'second' was the first not to be finite" in finding.message


@pytest.mark.parametrize("step", [0, 1, 4, 6, 30])
def test_one_exploding_step_is_told_wherever_it_is(step):
    inputs = np.tile(INPUTS, (4, 1))
    inputs[step * 32 : (step + 1) * 32] *= 1e4
    # At a rate of zero, the other steps know nothing of it.
    doctor = examine(build_model(keras.optimizers.SGD(0.0)), inputs=inputs, targets=np.tile(TARGETS, 4), epochs=1)
    assert "exploding gradients" in names(doctor)
    norms = doctor.gradient_norms.history["all"]
    assert int(np.argmax(norms)) == step
    assert 0.5 < doctor.signs["norm_jump"] / (norms[step] / np.median(norms)) < 2


def test_vanishing_gradients_are_told_with_the_ratio_of_the_norms():
    doctor = examine(build_model(activation="sigmoid", depth=8))
    assert "vanishing gradients" in names(doctor)
    norms = doctor.gradient_norms.history
    ratio = np.median(np.array(norms["hidden_1"]) / np.array(norms["output"]))
    (message,) = [finding.message for finding in doctor.findings if finding.name == "vanishing gradients"]
    assert f"{ratio:.1e}" in message


def test_network_of_zeros_is_stuck_at_chance():
    doctor = examine(build_model(kernel_initializer="zeros"), targets=np.arange(256) % CLASSES)
    assert "stuck at chance" in names(doctor)
    assert doctor.signs["chance"] == pytest.approx(1.0, abs=0.01)


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
    targets = GENERATOR.integers(0, CLASSES, len(INPUTS))
    doctor = examine(build_model(units=256), targets=targets, epochs=25, validation_split=0.5)
    # Labels at random are hard to fit: the training loss falls by little more than a hundredth per epoch of late.
    assert names(doctor) == ["overfitting", "plateau at a constant rate"]


def test_clipping_is_counted_with_the_norms_before_clipping():
    for arguments in ({"clipnorm": 0.25}, {"global_clipnorm": 0.5}, {"clipnorm": 100.0}):
        doctor = examine(build_model(keras.optimizers.Adam(0.01, **arguments)))
        norms = doctor.gradient_norms.history
        ((kind, limit),) = arguments.items()
        by_step = np.max([norms["hidden_1"], norms["output"]], axis=0) if kind == "clipnorm" else np.array(norms["all"])
        assert doctor.signs["clipped"] == np.mean(by_step > limit)
        assert ("clipping most of the time" in names(doctor)) == (np.mean(by_step > limit) > 0.5)


# Signs


def test_loss_before_training_is_that_of_the_first_batch():
    model = build_model()
    before = model.evaluate(INPUTS[:32], TARGETS[:32], batch_size=32, verbose=0)
    doctor = examine(model)
    losses = model.history.history["loss"]
    assert doctor.signs["first_epoch"] == pytest.approx(losses[0] / before, rel=1e-4)
    assert doctor.signs["slow"] == pytest.approx(losses[-1] / before, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ("sparse_categorical_crossentropy", math.log(3)),
        (keras.losses.SparseCategoricalCrossentropy(), math.log(3)),
        (keras.losses.categorical_crossentropy, math.log(3)),
        ("binary_crossentropy", math.log(2)),
        ("mean_squared_error", None),
        (lambda true, predicted: keras.ops.mean(predicted), None),
    ],
)
def test_loss_of_a_constant_prediction_is_known_for_cross_entropies(loss, expected):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, "softmax")])
    model.compile("sgd", loss)
    assert training_doctor._loss_of_equal_probabilities(model) == expected


def test_loss_with_penalties_is_not_compared_with_chance():
    model = build_model(kernel_regularizer="l2")
    assert training_doctor._loss_of_equal_probabilities(model) is None


# Judgement


class Told(TrainingDoctor):
    """A doctor that is told the signs."""

    signs = {}

    def __init__(self, signs, **thresholds):
        super().__init__(**thresholds)
        self.signs = signs
        self._not_finite = None
        self._constant_loss = math.log(3)


HEALTHY_SIGNS = {
    "epochs": 20,
    "first_epoch": 0.5,
    "slow": 0.1,
    "high": 0.1,
    "chance": 0.1,
    "last_chance": 0.1,
    "flat": 0.05,
    "validation_rise": 1.0,
    "best_validation_epoch": 20,
    "training_fall": 0.0,
    "rate": 0.001,
    "rate_fell": False,
    "norm_jump": 3.0,
    "norm_ratio": 1.0,
    "update_ratio": 1e-3,
    "clipped": 0.0,
    "input_mean": 0.0,
    "input_deviation": 1.0,
    "dead": 0.1,
    "dead_layer": "dense",
    "saturated": 0.1,
    "saturated_layer": "dense",
}


@pytest.mark.parametrize(
    ("finding", "sick", "threshold", "within"),
    [
        ("inputs out of range", {"input_mean": -11}, "input_mean", 12.0),
        ("inputs out of range", {"input_deviation": 11}, "input_deviation_high", 12.0),
        ("inputs out of range", {"input_deviation": 0.009}, "input_deviation_low", 0.008),
        ("exploding gradients", {"norm_jump": 21}, "norm_jump", 22.0),
        ("vanishing gradients", {"norm_ratio": 9e-4}, "norm_ratio", 8e-4),
        ("stuck at chance", {"chance": 0.96, "last_chance": 1.0}, "chance", 0.97),
        ("dead units", {"dead": 0.51}, "dead", 0.52),
        ("saturated units", {"saturated": 0.51}, "saturated", 0.52),
        ("rate too high", {"first_epoch": 1.2}, "first_epoch", 1.3),
        ("rate too high", {"update_ratio": 0.11}, "update_ratio_high", 0.12),
        ("rate too low", {"update_ratio": 9e-5, "slow": 0.8}, "update_ratio_low", 8e-5),
        ("rate too low", {"update_ratio": 9e-5, "slow": 0.8}, "slow", 0.9),
        ("overfitting", {"validation_rise": 1.2, "training_fall": 0.1}, "validation_rise", 1.3),
        ("overfitting", {"validation_rise": 1.2, "training_fall": 0.1}, "training_fall", 0.2),
        ("underfitting", {"flat": 0.014, "high": 0.5, "rate_fell": True}, "high", 0.6),
        ("plateau at a constant rate", {"flat": 0.014}, "flat", 0.013),
        ("plateau at a constant rate", {"flat": 0.014, "epochs": 9}, "epochs", 10),
        ("clipping most of the time", {"clipped": 0.51}, "clipped", 0.52),
    ],
)
def test_each_threshold_decides_and_can_be_set(finding, sick, threshold, within):
    assert names(Told(HEALTHY_SIGNS)) == []
    assert names(Told(HEALTHY_SIGNS | sick)) == [finding]
    assert names(Told(HEALTHY_SIGNS | sick, **{threshold: within})) == []


def test_rate_that_fell_and_losses_that_follow_from_something_else_are_no_plateau():
    flat = HEALTHY_SIGNS | {"flat": 0.0}
    assert names(Told(flat | {"rate_fell": True})) == []
    stuck = {"chance": 1.0, "last_chance": 1.0, "high": 1.0}
    assert names(Told(flat | stuck)) == ["stuck at chance"]


def test_plateau_is_told_beside_overfitting_and_underfitting_is_not():
    signs = HEALTHY_SIGNS | {"flat": 0.0, "high": 0.5, "validation_rise": 1.3, "training_fall": 0.1}
    assert names(Told(signs)) == ["overfitting", "plateau at a constant rate"]


def test_rate_too_high_is_told_beside_the_explosion_that_may_come_from_it():
    both = Told(HEALTHY_SIGNS | {"norm_jump": 25.0, "first_epoch": 27.8})
    assert names(both) == ["exploding gradients", "rate too high"]


def test_findings_come_with_their_figures_and_recipes_in_a_fixed_order():
    findings = Told(HEALTHY_SIGNS | {"clipped": 0.625, "dead": 0.75, "norm_jump": 1234.0}).findings
    assert [finding.name for finding in findings] == ["exploding gradients", "dead units", "clipping most of the time"]
    for finding, figure in zip(findings, ("1.23e+03 times", "75% of the units", "62% of the recorded"), strict=True):
        assert figure in finding.message
        assert finding.recipes == RECIPES[finding.name]


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
    assert {"gradient_norm_mean", "update_to_weight_ratio", "learning_rate", "activation_dead/hidden_1"} <= logged
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


def test_file_copied_alone_judges_by_the_losses_and_says_what_it_did_not_examine(tmp_path):
    shutil.copy(training_doctor.__file__, tmp_path)
    code = """
import keras, numpy as np
from training_doctor import TrainingDoctor
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)])
model.compile(keras.optimizers.Adam(9.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
inputs = np.random.default_rng(0).normal(size=(256, 4)).astype("float32")
model.fit(inputs, np.arange(256) % 3, epochs=2, verbose=0, callbacks=[TrainingDoctor(inputs[:32])])
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "- rate too high: " in process.stdout, process.stderr
    assert "Not examined: inputs, dead and saturated units, gradients and clipping, the rate" in process.stdout
