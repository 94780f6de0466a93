"""The order of examples: on TensorFlow and with a seed, `fit` would take arrays in one order in all epochs."""

import contextlib

import keras


@contextlib.contextmanager
def new_order_each_epoch():
    """Give each epoch an order of its own, that the seed decides, as without a seed and on the other backends.

    For arrays, Keras 3.15 calls `tf.random.shuffle` in a function that `Dataset.map` runs anew in each epoch. With a
    seed, that operation begins anew, too: https://github.com/tensorflow/tensorflow/issues/35682. Here it takes its
    numbers from a generator, which goes on.
    """
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    shuffle, generator = tf.random.shuffle, tf.random.Generator.from_seed(0)

    def shuffle_anew(value, seed=None, name=None):
        # Outside the function that is being made, which is where `fit` is called.
        with tf.init_scope():
            # What the operation itself would ask for: None where no seed is set.
            seeds = tf.compat.v1.random.get_seed(seed)
            would_repeat = seed is None and None not in seeds
            if would_repeat:
                generator.reset_from_seed(sum(seeds))
        if not would_repeat:
            return shuffle(value, seed, name)
        return tf.random.experimental.stateless_shuffle(value, generator.make_seeds()[:, 0])

    tf.random.shuffle = shuffle_anew
    try:
        yield
    finally:
        tf.random.shuffle = shuffle
