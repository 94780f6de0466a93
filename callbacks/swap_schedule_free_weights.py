"""SwapScheduleFreeWeights: evaluates and saves the average that `ScheduleFreeAdamW` finds, not where it trains."""

import collections.abc
import contextlib
import copy
import numbers
import warnings

import keras
import numpy as np


class SwapScheduleFreeWeights(keras.callbacks.Callback):
    """Puts the averaged weights x of `ScheduleFreeAdamW` into the model for evaluation and saving, y for training.

    Example:

        >>> model.compile(keras.optimizers.ScheduleFreeAdamW(0.01), "binary_crossentropy", metrics=["accuracy"])
        >>> swapping = SwapScheduleFreeWeights(data=(x, y))
        >>> fitted = model.fit(x, y, validation_split=0.2, epochs=3, verbose=0, callbacks=[swapping])
        >>> loss, accuracy = model.evaluate(x, y, verbose=0)

    The optimizer has three sequences: z, to which the steps are added; x, the equal average of all z, which is the
    result; and y = (1 - β₁) z + β₁ x, where the gradients are taken. Keras leaves the model at y. With this callback
    the model holds y in training, and x = (y - (1 - β₁) z) / β₁ from the end of each epoch to the beginning of the
    next, while it is evaluated or predicts, and when training has ended. The y are kept, and put back to the bit.

    On TensorFlow and PyTorch, the optimizer of Keras 3.15.1 reads z after it has changed it, and so trains at x itself.
    On TensorFlow, `fit` builds it within a graph, where z begins at 0: the first step throws the model's weights away.
    With this callback, z begins at the weights, and the steps of `fit` are those of the paper there too.

    In the list it comes before callbacks that save or evaluate at the end of an epoch, and before
    `EarlyStopping(restore_best_weights=True)`. `BackupAndRestore` comes before it, to save y, with which training goes
    on exactly; saves within an epoch (an integer `save_freq`) have y too. `evaluate` and `predict` take it as well,
    `callbacks=[swapping]`, where a model holds y. Training that goes on takes it again, or `hold_y()` before. If
    `fit` raises, the model holds y, or x if that was between epochs; `hold_x()` puts x there.

    The moving statistics of batch normalisation belong to y. For x they are recomputed by a pass over `data` in
    training mode, which makes the moving mean and variance of each trainable `BatchNormalization` the equal average
    over batches of the batch's moments; x and its statistics are kept until the optimizer has made another step.

    Cost: three copies of the weights in the host's memory, and a few copies from and to the device in each epoch. If
    the model has batch normalisation, one forward pass over `data` in each epoch, run eagerly. A copy or a pickle has
    neither the weights nor the model, and a pickle has `data` only if that is arrays.

    Args:
        data: training data, as for `StochasticWeightAveraging`: an array of inputs, a tuple `(inputs, targets)`, or a
            data set object that yields the batches of one pass. Needed if the model has batch normalisation that is
            trained. Arrays are cut into batches in their order: shuffle them if they are sorted.
        batch_size: examples in a batch where `data` is arrays, a positive integer: that of `fit`.
        start: "x" or "y", which of them the model holds when training goes on with an optimizer that has made steps:
            "x" if the model was loaded from a file that was saved with this callback, "y" if from `BackupAndRestore`;
            if the steps were made without it, "y" on JAX and "x" on TensorFlow and PyTorch. Not needed for steps that
            this callback has seen.
        optimizer: the `ScheduleFreeAdamW`, where a `train_step` of your own uses several; None for the model's.

    Raises:
        ValueError: an argument is out of its range; `data` is a list or an iterator. From `fit`, `evaluate` and
            `predict`: the optimizer is no `ScheduleFreeAdamW`, or has `beta_1=0` or `use_ema=True`; it has made steps,
            and `start` is None; the model has batch normalisation that is trained, and there is no `data`, or it has
            `renorm=True`; `data` gives no batch, or one that the model cannot be run on.

    Source: Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682.
    """

    def __init__(self, data=None, batch_size=32, *, start=None, optimizer=None):
        super().__init__()
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, not {batch_size!r}.")
        if isinstance(data, (list, collections.abc.Iterator)):
            raise ValueError(
                f"data must be an array, a tuple (inputs, targets) or a data set object, not a {type(data).__name__}."
            )
        if start not in (None, "x", "y"):
            raise ValueError(f"start must be 'x', 'y' or None, not {start!r}.")
        self.data = data
        self.batch_size = int(batch_size)
        self.start = start
        self.optimizer = optimizer
        self._corrected = []
        self._forget()

    def __getstate__(self):
        inputs = keras.utils.unpack_x_y_sample_weight(self.data)[0]
        state = vars(self) | {
            "_model": None,
            "optimizer": None,
            "_x": None,
            "_y": None,
            "_attached": None,
            "_corrected": [],
        }
        return state | {"data": self.data if _are_arrays(inputs) else None, "_holds_x": False}

    def __deepcopy__(self, memo):
        copied = type(self).__new__(type(self))
        # Data are not copied, which data sets do not allow.
        vars(copied).update(copy.deepcopy(self.__getstate__() | {"data": None}, memo), data=self.data)
        return copied

    def on_train_begin(self, logs=None):
        self.detach()
        self._attach()
        if _reads_z_late():
            for each in self._members(self._attached):
                vars(each)["update_step"] = _correct(each)
                self._corrected.append(each)
            # The present one, if an earlier `fit` has compiled it, has the update of Keras.
            self.model.make_train_function(force=True)

    def on_epoch_begin(self, epoch, logs=None):
        self.hold_y()

    def on_epoch_end(self, epoch, logs=None):
        self.hold_x()

    def on_train_end(self, logs=None):
        if self._holds_x and not self._is_in_model(self._x):
            warnings.warn(
                "Another callback has put weights into the model when training ended, which are not x. List callbacks "
                "that keep weights, such as EarlyStopping, after SwapScheduleFreeWeights.",
                stacklevel=2,
            )
        self.hold_x()
        self.detach()

    def detach(self):
        """Leave the optimizer as it was before `fit`, in case that raised; the model holds what it holds."""
        for each in self._corrected:
            vars(each).pop("update_step", None)
            self.model.train_function = None
        self._corrected = []

    def on_test_begin(self, logs=None):
        if self._optimizer() is not self._attached:
            self._attach()
        self._returns_to_y = not self._holds_x
        self.hold_x()

    def on_test_end(self, logs=None):
        if self._returns_to_y:
            self.hold_y()

    def on_predict_begin(self, logs=None):
        self.on_test_begin()

    def on_predict_end(self, logs=None):
        self.on_test_end()

    def hold_x(self):
        """Put x, and the batch-norm statistics that belong to it, into the model, as after Ctrl-C."""
        pairs = self._weights_and_z()
        if self._holds_x or not pairs:
            return
        y = self._copy()
        if self._y is None or not all(map(np.array_equal, y, self._y)):
            self._x, self._y = None, y
        if self._x is not None:
            self._assign(self._x)
        else:
            if not self._is_checked:
                # For layers that are made when the first batch builds the model.
                self._check_data()
            for variable, z, beta_1 in pairs:
                variable.assign((_to_float64(variable) - (1 - beta_1) * _to_float64(z)) / beta_1)
            try:
                self._recompute_statistics()
            except Exception:
                self._assign(y)
                raise
            self._x = self._copy()
        self._holds_x = True

    def hold_y(self):
        """Put y, and the batch-norm statistics that belong to it, back into the model."""
        if self._holds_x:
            self._assign(self._y)
            self._holds_x = False

    def _forget(self):
        self._x = self._y = self._attached = None
        self._holds_x = False

    def _attach(self):
        """Take over the optimizer, and let the model hold y."""
        optimizer = self._optimizer()
        members = self._members(optimizer)
        if not members:
            raise ValueError(
                f"SwapScheduleFreeWeights needs the optimizer ScheduleFreeAdamW, not {optimizer.__class__.__name__}."
            )
        for member in members:
            if not member.beta_1 > 0:
                raise ValueError("With beta_1=0 the optimizer does not keep x, the average: choose a positive beta_1.")
            if member.use_ema:
                raise ValueError("With use_ema=True Keras ends training with another average: compile without it.")
        self._check_data()
        left = vars(optimizer).get("_swapping_callback")
        is_known = left is not None
        if is_known and left._holds_x:
            is_known = left._is_in_model(left._x)
            if is_known:
                left.hold_y()
        if left is not None and left is not self:
            left._forget()
        self._forget()
        if not is_known and self._weights_and_z():
            if self.start is None:
                raise ValueError(
                    "The optimizer has made steps, and it cannot be seen whether the model holds x, as in a file that "
                    "was saved with SwapScheduleFreeWeights, or y, as from BackupAndRestore: say start='x' or "
                    "start='y'."
                )
            if self.start == "x":
                self._x = self._copy()
                self._y = list(self._x)
                for index, (variable, z, beta_1) in enumerate(self._weights_and_z()):
                    y = (1 - beta_1) * _to_float64(z) + beta_1 * _to_float64(variable)
                    self._y[index] = y.astype(self._x[index].dtype)
                self._holds_x = True
        # Not by `setattr`, with which the optimizer would track it.
        vars(optimizer)["_swapping_callback"] = self
        self._attached = optimizer

    def _optimizer(self):
        # On JAX, asking for `self.model` brings the variables up to date.
        model = self.model
        outer = model.optimizer if self.optimizer is None else self.optimizer
        return getattr(outer, "inner_optimizer", outer)

    def _members(self, optimizer):
        """Return the optimizers of this kind: one, or those within a `MultiOptimizer`."""
        optimizers = optimizer.optimizers if isinstance(optimizer, keras.optimizers.MultiOptimizer) else [optimizer]
        return [each for each in optimizers if isinstance(each, keras.optimizers.ScheduleFreeAdamW)]

    def _weights_and_z(self):
        """Return [(variable that is trained, its z, beta_1)]; nothing before the first step, when all are equal."""
        # Private: there is no public access to an optimizer's sequences. Tried on Keras 3.15.
        return [
            (variable, z, float(each.beta_1))
            for each in self._members(self._optimizer())
            if each.built and int(keras.ops.convert_to_numpy(each.iterations))
            for variable, z in zip(each._trainable_variables, each._momentums, strict=True)
            if z is not None
        ]

    def _variables(self):
        """Return what differs between x and y: the trained weights, and the statistics of batch normalisation."""
        statistics = [
            statistic
            for layer in _batch_normalisations(self.model)
            for statistic in (layer.moving_mean, layer.moving_variance)
        ]
        return [*(variable for variable, _, _ in self._weights_and_z()), *statistics]

    def _copy(self):
        # Copies, because a backend may train in the memory that convert_to_numpy shows.
        return [np.array(keras.ops.convert_to_numpy(variable)) for variable in self._variables()]

    def _assign(self, values):
        for variable, value in zip(self._variables(), values, strict=True):
            variable.assign(value)

    def _is_in_model(self, values):
        present = self._copy()
        return len(present) == len(values) and all(map(np.array_equal, present, values))

    def _check_data(self):
        """Refuse data that would fail when an epoch is over."""
        self._is_checked = self.model.built
        normalisations = _batch_normalisations(self.model)
        if normalisations and self.data is None:
            raise ValueError(
                f"The model has batch normalisation ({normalisations[0].name!r}), whose moving statistics must be "
                "recomputed for the averaged weights: pass the training data, data=(inputs, targets)."
            )
        for layer in normalisations:
            if layer.renorm:
                raise ValueError(f"{layer.name!r} has renorm=True, whose statistics cannot be recomputed in one pass.")
        if normalisations and self._is_checked:
            inputs = next(_batches(self.data, self.batch_size), None)
            if inputs is None:
                raise ValueError("data gives no batch to recompute the batch-norm statistics from.")
            try:
                # In this scope no variable changes. In inference mode, because in training PyTorch's dropout draws from
                # a generator that everything shares.
                with keras.StatelessScope():
                    self.model(inputs, training=False)
            except Exception as error:
                shapes = [tuple(getattr(array, "shape", ())) for array in keras.tree.flatten(inputs)]
                raise ValueError(
                    f"The model cannot be run on the first batch of data, of shapes {shapes}: {error}"
                ) from error

    def _recompute_statistics(self):
        """Make each moving mean and variance the equal average of the batches' moments over one pass."""
        normalisations = _batch_normalisations(self.model)
        if not normalisations:
            return
        statistics = {id(value) for layer in normalisations for value in (layer.moving_mean, layer.moving_variance)}
        # Trainable weights too: SpectralNormalization changes its kernel when it is called in training mode.
        others = [variable for variable in self.model.variables if id(variable) not in statistics]
        values = [np.array(keras.ops.convert_to_numpy(variable)) for variable in others]
        batches = 0
        with contextlib.ExitStack() as stack:
            if keras.backend.backend() == "torch":
                import torch

                # Dropout draws from the generator that everything shares.
                stack.enter_context(torch.random.fork_rng())
            for layer in normalisations:
                stack.enter_context(_averaging(layer))
            try:
                for inputs in _batches(self.data, self.batch_size):
                    self.model(inputs, training=True)
                    batches += 1
            finally:
                for variable, value in zip(others, values, strict=True):
                    variable.assign(value)
        if not batches:
            raise ValueError("data gives no batch to recompute the batch-norm statistics from.")


def _reads_z_late():
    """Return whether the optimizer reads z after it has changed it, and so makes y the average, as x is."""
    optimizer, y = keras.optimizers.ScheduleFreeAdamW(1.0, beta_1=0.5), keras.Variable([0.0])
    for _ in range(2):
        optimizer.apply([keras.ops.ones(1)], [y])
    # The z are -1 and -2, so that x is -1.5 and y is -1.75.
    return float(keras.ops.convert_to_numpy(y)[0]) > -1.6


def _correct(optimizer):
    """Return the update as it is when z begins at the weights, and is read before it is changed."""
    update_step = optimizer.update_step

    def corrected_update_step(gradient, variable, learning_rate):
        # Private: there is no public access to an optimizer's sequences. Tried on Keras 3.15.
        z = optimizer._momentums[optimizer._get_variable_index(variable)]
        # At the first step, what z should begin at: built within a graph, it would begin at 0.
        z_before = keras.ops.where(optimizer.iterations == 0, variable, z)
        optimizer.assign(z, z_before)
        update_step(gradient, variable, learning_rate)
        step = keras.ops.cast(optimizer.iterations + 1, z.dtype)
        share = (1 - 1 / step) * (1 - keras.ops.cast(optimizer.beta_1, z.dtype))
        optimizer.assign_add(variable, share * (z - z_before))

    return corrected_update_step


def _batch_normalisations(model):
    """Return the batch normalisations that are trained; frozen ones always normalise with their own statistics."""
    # Private: there is no public way to walk nested layers. Tried on Keras 3.15.
    layers = model._flatten_layers()
    return [layer for layer in layers if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable]


@contextlib.contextmanager
def _averaging(layer):
    """Make the moving statistics of `layer` the equal average over its calls in training mode."""
    call, momentum, calls = layer.call, layer.momentum, 0

    def averaging_call(inputs, training=None, *arguments, **keywords):
        nonlocal calls
        if training:
            calls += 1
            layer.momentum = 1 - 1 / calls
            if calls == 1:
                # The old statistics weigh nothing now, but zero times one that has overflowed would be NaN.
                for statistic in (layer.moving_mean, layer.moving_variance):
                    statistic.assign(keras.ops.zeros(statistic.shape))
        return call(inputs, training, *arguments, **keywords)

    layer.call = averaging_call
    try:
        yield
    finally:
        del layer.call
        layer.momentum = momentum


def _batches(data, batch_size):
    """Yield the inputs of each batch."""
    inputs = keras.utils.unpack_x_y_sample_weight(data)[0]
    if _are_arrays(inputs):
        for start in range(0, len(keras.tree.flatten(inputs)[0]), batch_size):
            part = slice(start, start + batch_size)
            yield keras.tree.map_structure(lambda array, part=part: array[part], inputs)
    else:
        for batch in data:
            yield keras.utils.unpack_x_y_sample_weight(batch)[0]


def _are_arrays(inputs):
    return all(hasattr(array, "shape") for array in keras.tree.flatten(inputs))


def _to_float64(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable), dtype="float64")
