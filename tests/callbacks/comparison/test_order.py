"""In a comparison each epoch takes the examples in an order of its own."""

import keras
import numpy as np
import pytest
from keras import layers

from callbacks import Comparison

on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow needs it")

NUMBERS = np.arange(12, dtype="float32")[:, None]


class Note(layers.Layer):
    """Notes the numbers that a model is trained on."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def call(self, inputs, training=False):
        if training and not isinstance(inputs, keras.KerasTensor):
            self.noted.extend(keras.ops.convert_to_numpy(inputs).ravel().astype(int).tolist())
        return inputs


def build():
    note = Note()
    model = keras.Sequential([keras.Input((1,)), note, layers.Dense(1)])
    model.compile("sgd", "mse", run_eagerly=True)
    return model, note


def fit(model, note, callbacks=(), epochs=3):
    """Train and return a list of the order of each epoch."""
    # What Keras calls to learn of shapes is no training.
    begin = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: None if epoch else note.noted.clear())
    model.fit(NUMBERS, NUMBERS, batch_size=5, epochs=epochs, verbose=0, callbacks=[begin, *callbacks])
    return np.split(np.array(note.noted), epochs)


def compare(seeds):
    """Return {(variant, seed): the order of each epoch} of a comparison of two equal variants."""
    orders = {}
    with Comparison(metric="loss", test=(NUMBERS, NUMBERS)) as comparison:
        for variant, _, run in comparison.runs({"one": 1, "other": 2}, seeds):
            orders[variant, run.seed] = fit(*build(), callbacks=[run])
    return orders


@pytest.fixture(scope="module")
def orders():
    return compare([3, 4])


def test_each_epoch_takes_every_example_in_an_order_of_its_own(orders):
    for each in orders.values():
        for order in each:
            assert sorted(order) == list(range(12))
        assert len({tuple(order) for order in each}) == 3


def test_variants_of_a_seed_have_the_same_orders_and_other_seeds_others(orders):
    np.testing.assert_array_equal(orders["one", 3], orders["other", 3])
    assert not np.array_equal(orders["one", 3], orders["one", 4])


def test_orders_repeat(orders):
    np.testing.assert_equal(compare([4]), {key: orders[key] for key in orders if key[1] == 4})


def test_a_second_fit_of_a_run_goes_on_with_other_orders():
    with Comparison(metric="loss", test=(NUMBERS, NUMBERS)) as comparison:
        for variant, _, run in comparison.runs({"one": 1}, 1):
            first, second = fit(*build()), fit(*build())
            comparison.add(variant, run.seed, {"loss": 0.0})
    assert len({tuple(order) for order in [*first, *second]}) == 6


def test_loop_of_ones_own_has_them_too():
    with Comparison(metric="loss", test=(NUMBERS, NUMBERS)) as comparison:
        keras.utils.set_random_seed(5)
        orders = fit(*build(), callbacks=[comparison.run("one", 5)])
    assert len({tuple(order) for order in orders}) == 3


@on_tensorflow
def test_keras_still_needs_it():
    """If this fails, Keras or TensorFlow has mended it, and callbacks/comparison/order.py can go."""
    keras.utils.set_random_seed(3)
    assert len({tuple(order) for order in fit(*build())}) == 1


@on_tensorflow
@pytest.mark.parametrize("fails", [False, True])
def test_tensorflow_is_afterwards_as_it_was(fails):
    import tensorflow as tf

    before = tf.random.shuffle
    try:
        with Comparison(metric="loss", test=(NUMBERS, NUMBERS)) as comparison:
            assert tf.random.shuffle is not before
            comparison.add("one", 0, {"loss": 1.0})
            if fails:
                raise RuntimeError("stop")
    except RuntimeError:
        pass
    assert tf.random.shuffle is before


@on_tensorflow
def test_shuffle_with_a_seed_of_its_own_is_left_as_it_is():
    import tensorflow as tf

    def shuffled():
        keras.utils.set_random_seed(3)
        return tf.random.shuffle(tf.range(20), seed=1).numpy()

    expected = shuffled()
    with Comparison(metric="loss", test=(NUMBERS, NUMBERS)) as comparison:
        comparison.add("one", 0, {"loss": 1.0})
        np.testing.assert_array_equal(shuffled(), expected)


@on_tensorflow
def test_without_a_seed_orders_are_anybodys():
    import tensorflow as tf

    tf.random.set_seed(None)
    with Comparison(metric="loss", test=(NUMBERS, NUMBERS)) as comparison:
        comparison.add("one", 0, {"loss": 1.0})
        assert len({tuple(order) for order in fit(*build())}) == 3
