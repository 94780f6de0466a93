import keras
import numpy as np
import pytest
from keras import layers

from callbacks.comparison.start import Start, describe_data, start_of


def values(model):
    return [np.array(keras.ops.convert_to_numpy(weight)) for weight in model.weights]


def compiled(model, optimizer="adam"):
    model.compile(optimizer, "mse")
    return model


def dense(*between, frozen=False, **arguments):
    """Return a model with two hidden layers, `between` before the second."""
    return compiled(
        keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(3, trainable=not frozen, **arguments),
                *between,
                layers.Dense(2, **arguments),
            ]
        )
    )


FRESH = {
    "dense": dense,
    "recurrent": lambda: compiled(
        keras.Sequential(
            [
                keras.Input((5, 4)),
                layers.Bidirectional(layers.LSTM(3, return_sequences=True)),
                layers.RNN(layers.GRUCell(3), return_sequences=True),
                layers.SimpleRNN(2),
            ]
        )
    ),
    "convolutional": lambda: compiled(
        keras.Sequential(
            [
                keras.Input((6, 6, 2)),
                layers.SeparableConv2D(3, 3),
                layers.DepthwiseConv2D(2),
                layers.BatchNormalization(),
                layers.Flatten(),
                layers.Dense(1, kernel_initializer="orthogonal"),
            ]
        )
    ),
    "attention": lambda: compiled(attention()),
    "seed generators": lambda: dense(kernel_initializer=keras.initializers.HeNormal(keras.random.SeedGenerator(1))),
    "spectral": lambda: dense(layers.SpectralNormalization(layers.Dense(3))),
    "nested": lambda: compiled(keras.Sequential([keras.Input((4,)), dense(), layers.Dense(1)])),
}


def attention():
    inputs = keras.Input((5,))
    x = layers.Embedding(10, 4)(inputs)
    return keras.Model(inputs, layers.MultiHeadAttention(2, 3)(x, x))


@pytest.mark.parametrize("build", FRESH.values(), ids=FRESH)
def test_new_models_are_fresh_and_trained_ones_are_not(build):
    keras.utils.set_random_seed(0)
    model = build()
    assert start_of(model).changed() == []
    for weight in model.trainable_variables:
        weight.assign(weight + 0.001)
    # An initializer with a generator for a seed cannot be called again.
    assert bool(start_of(model).changed()) == (build is not FRESH["seed generators"])


def test_one_changed_layer_is_seen():
    model = dense()
    model.layers[0].kernel.assign(np.zeros((4, 3)))
    assert [name.rpartition("/")[2] for name in start_of(model).changed()] == ["kernel"]


def test_a_frozen_random_layer_behind_a_dropout_becomes_equal_too():
    keras.utils.set_random_seed(0)
    first = dense(frozen=True)
    keras.utils.set_random_seed(0)
    model = compiled(
        keras.Sequential([keras.Input((4,)), layers.Dropout(0.5), layers.Dense(3, trainable=False), layers.Dense(2)])
    )
    assert not np.array_equal(values(first)[0], values(model)[0])
    assert start_of(model).become(start_of(first), model, "b", 0) == []
    for mine, expected in zip(values(model), values(first), strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_frozen_and_trained_backbones_have_one_start():
    first, model = dense(), dense(frozen=True)
    start_of(model).become(start_of(first), model, "b", 0)
    np.testing.assert_array_equal(values(model)[0], values(first)[0])


def test_trained_weights_are_left_as_they_are_and_have_to_be_equal():
    first, same, other = dense(), dense(), dense()
    for model, value in ((first, 1.0), (same, 1.0), (other, 2.0)):
        model.layers[0].kernel.assign(np.full((4, 3), value))
    start_of(same).become(start_of(first), same, "b", 0)
    np.testing.assert_array_equal(values(same)[0], np.full((4, 3), 1.0))
    # The new layer on top of the trained one starts equal.
    np.testing.assert_array_equal(values(same)[2], values(first)[2])
    for model in (other, dense()):
        with pytest.raises(ValueError, match="starts from other trained weights.*same_start=False"):
            start_of(model).become(start_of(first), model, "b", 0)
    np.testing.assert_array_equal(values(other)[0], np.full((4, 3), 2.0))


def test_initializers_that_differ_are_not_made_equal():
    first, model = dense(), dense(kernel_initializer="he_normal")
    assert start_of(model).changed() == []
    with pytest.raises(ValueError, match="HeNormal.*GlorotUniform.*same_start=False"):
        start_of(model).become(start_of(first), model, "b", 0)
    # The seed of an initializer is no difference.
    model = dense(kernel_initializer=keras.initializers.GlorotUniform(seed=3))
    start_of(model).become(start_of(first), model, "b", 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda: dense(bias_initializer=keras.initializers.Constant(-2.0)),
        lambda: dense(kernel_initializer="zeros"),
        lambda: dense(kernel_initializer=lambda shape, dtype=None: keras.ops.ones(shape, dtype)),
        lambda: dense(kernel_initializer=keras.initializers.RandomNormal(stddev=0.02)),
    ],
)
def test_start_that_is_the_subject_is_not_made_equal(change):
    first, model = dense(), change()
    before = values(model)
    with pytest.raises(ValueError, match="same_start=False"):
        start_of(model).become(start_of(first), model, "b", 0)
    for weight, expected in zip(values(model), before, strict=True):
        np.testing.assert_array_equal(weight, expected)


def test_values_that_were_set_by_hand_are_not_made_equal():
    first, model = dense(), dense()
    model.layers[1].bias.assign(np.full(2, -2.0))
    with pytest.raises(ValueError, match="bias' of 'b', seed 0, starts from other values.*same_start=False"):
        start_of(model).become(start_of(first), model, "b", 0)
    model = dense()
    model.layers[1].kernel.assign(0.1 * model.layers[1].kernel)
    assert len(start_of(model).changed()) == 1


class Own(layers.Layer):
    def build(self, shape):
        self.kernel = self.add_weight(shape=(shape[-1], 2), initializer="glorot_uniform", name="kernel")

    def call(self, x):
        return x @ self.kernel


def test_weights_of_which_nothing_is_known_must_be_equal():
    def build():
        return compiled(keras.Sequential([keras.Input((4,)), Own()]))

    keras.utils.set_random_seed(0)
    first = build()
    keras.utils.set_random_seed(0)
    model = build()
    start_of(model).become(start_of(first), model, "b", 0)
    other = build()
    with pytest.raises(ValueError, match="WEIGHT_initializer"):
        start_of(other).become(start_of(first), other, "b", 0)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match="cannot start equal.*same_start=False"):
        start_of(dense(layers.Dense(3))).become(start_of(dense()), dense(layers.Dense(3)), "b", 0)


def test_adapted_statistics_are_left_alone_and_named():
    def build(scale):
        normalization = layers.Normalization(name="scaling")
        normalization.adapt(scale * np.random.default_rng(0).normal(size=(100, 4)).astype("float32"))
        return compiled(keras.Sequential([keras.Input((4,)), normalization, layers.Dense(3)]))

    first, model = build(1.0), build(10.0)
    before = np.array(model.layers[0].mean)
    unequal = start_of(model).become(start_of(first), model, "b", 0)
    assert [name.rpartition("/")[2] for name in unequal] == ["mean", "variance"]
    np.testing.assert_array_equal(model.layers[0].mean, before)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, keras.optimizers.LossScaleOptimizer])
def test_optimizer_that_is_built_holds_no_copy_of_the_old_weights(wrap):
    first = dense()
    model = compiled(dense(), wrap(keras.optimizers.ScheduleFreeAdamW(0.01)))
    model.optimizer.build(model.trainable_variables)
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    kernels = [np.array(weight) for weight in values(model) if weight.ndim == 2]

    def copies_of(arrays):
        held = [np.array(keras.ops.convert_to_numpy(variable)) for variable in optimizer.variables]
        return sum(any(np.array_equal(each, array) for array in arrays) for each in held)

    assert copies_of(kernels) > 0
    start_of(model).become(start_of(first), model, "b", 0)
    assert copies_of(kernels) == 0
    assert copies_of([weight for weight in values(first) if weight.ndim == 2]) > 0


def test_fingerprint_is_that_of_what_a_seed_makes():
    def fingerprint(seed, **arguments):
        keras.utils.set_random_seed(seed)
        return start_of(dense(**arguments)).fingerprint()

    assert fingerprint(0) == fingerprint(0) != fingerprint(1)
    assert fingerprint(0, kernel_initializer="zeros") is None
    made = set()
    for _ in range(2):
        generator = keras.random.SeedGenerator(1)
        made.add(fingerprint(len(made), kernel_initializer=keras.initializers.HeNormal(generator)))
    assert len(made) == 1


def test_start_survives_as_text():
    start = start_of(dense(layers.BatchNormalization()))
    loaded = Start.from_text(start.to_text())
    assert len(loaded.weights) == len(start.weights)
    for weight, expected in zip(loaded.weights, start.weights, strict=True):
        np.testing.assert_equal(vars(weight), vars(expected))


def test_weights_that_a_callback_changed_are_seen():
    model = dense()
    start = start_of(model)
    assert start.is_as_it_was(model)
    model.layers[1].bias.assign(np.ones(2))
    assert not start.is_as_it_was(model)


# Data

IMAGES, LABELS = np.zeros((6, 28, 28, 1)), np.array([0, 1, 2, 0, 1, 2])


def test_data_are_described_from_what_they_hold():
    described = describe_data("test", (IMAGES, LABELS))
    digest = described.pop("digest")
    assert described == {"examples": 6, "inputs": "28 × 28 × 1", "classes": 3}
    assert describe_data("test", (IMAGES, LABELS))["digest"] == digest
    assert digest not in [
        describe_data("test", data)["digest"] for data in ((IMAGES + 1, LABELS), (IMAGES, 2 - LABELS))
    ]
    assert describe_data("test", (IMAGES, LABELS[:, None], np.ones(6)))["classes"] == 3
    assert describe_data("test", (IMAGES, LABELS / 2))["classes"] is None
    assert describe_data("test", (IMAGES, np.eye(3)[LABELS]))["classes"] is None
    several = ({"image": IMAGES, "size": np.zeros(6)}, LABELS)
    assert describe_data("test", several)["inputs"] == "28 × 28 × 1, scalars"
    tensors = describe_data("test", (keras.ops.convert_to_tensor(IMAGES), keras.ops.convert_to_tensor(LABELS)))
    assert tensors | {"digest": ""} == described | {"digest": ""}


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    @property
    def num_batches(self):
        return self.batches

    def __getitem__(self, index):
        return IMAGES, LABELS


def test_data_sets_must_have_an_end_and_a_second_reading():
    import tensorflow as tf

    endless = tf.data.Dataset.from_tensor_slices((IMAGES, LABELS)).batch(2)
    assert describe_data("test", endless) == {"batches": 3}
    assert describe_data("test", Batches(4)) == {"batches": 4}
    for data in (endless.repeat(), Batches(None)):
        with pytest.raises(ValueError, match="The test data have no end"):
            describe_data("test", data)
    with pytest.raises(ValueError, match="can be read only once"):
        describe_data("test", iter([(IMAGES, LABELS)]))
    for data in ((IMAGES[:0], LABELS[:0]), endless.take(0)):
        with pytest.raises(ValueError, match="hold no examples"):
            describe_data("test", data)
