"""StochasticWeightAveraging: the equal average of the weights late in training, with batch-norm statistics to match."""

import collections.abc
import contextlib
import copy
import numbers
import warnings
from pathlib import Path

import keras
import numpy as np


class StochasticWeightAveraging(keras.callbacks.Callback):
    """Averages the trainable weights at the ends of the last epochs, and ends training with the average in the model.

    Example:

        >>> averaging = StochasticWeightAveraging(start_epoch=2, data=(x, y))
        >>> fitted = model.fit(x, y, epochs=5, verbose=0, callbacks=[averaging])
        >>> loss_of_the_average, accuracy_of_the_average = model.evaluate(x, y, verbose=0)
        >>> averaging.swap()
        >>> loss_of_the_last_weights, accuracy_of_the_last_weights = model.evaluate(x, y, verbose=0)

    Epochs count from 0, as in `on_epoch_end`: with `epochs=5` and `start_epoch=2` three models are averaged, those of
    epochs 2, 3 and 4. An epoch without a step, because the data had run out, gives no model. The `logs` of each epoch
    receive `averaged_models`, the number of models in the average so far.
    Until training ends the model is as without this callback; validation figures and checkpoints are those of the
    weights being trained.

    At the end the averaged weights do not fit the moving statistics of batch normalisation, which belong to other
    weights. One pass over `data` in training mode, dropout active as in training and in the paper, makes the moving
    mean and variance of each trainable `BatchNormalization` the equal average over batches of the batch's moments. A
    smaller last batch counts like the others; a layer that is called several times in the model has the average over
    all its calls. Everything else stays as it was: seeds, other non-trainable weights, frozen batch normalisation.

    Callbacks that change weights at the end of training (`EarlyStopping(restore_best_weights=True)`) come before this
    one in the list; those that evaluate then (`Comparison`), and those that write logs, after it. With `use_ema` in the
    optimizer it is the trained weights that are averaged, and the last weights are the exponential average.

    To resume an interrupted training, pass `backup_dir` and put this callback before
    `keras.callbacks.BackupAndRestore`. Each averaged epoch is saved, whole or not at all, and the saves of the latest
    two are kept. A `fit` that begins at an epoch goes on from the average saved when training came to that epoch. If
    there is none, it deletes what lies in the folder from another training, begins a new average, and warns if epochs
    from `start_epoch` on are missing in it. When training ends normally the saves are deleted.

    A training that is not to be resumed, stopped by Ctrl-C or an error, leaves the weights being trained in the model;
    `model.set_weights(averaging.average())` puts the average so far there. A copy or a pickle has the average without
    the model, and a pickle has `data` only if that is arrays.

    Attributes:
        other_weights: list of NumPy arrays, as `model.get_weights()` gives it, that `swap()` puts into the model: when
            training has ended, the last weights with their batch-norm statistics. None before, and if no weights were
            averaged. The next `fit` begins anew.

    Cost: 8 bytes a parameter in the host's memory, for sums in float64, and at the end two copies of the weights; one
    copy from the device each averaged epoch, and with `backup_dir` 8 bytes a parameter written. If the model has batch
    normalisation, one forward pass over `data` at the end, run eagerly: for three convolutions on two CPU cores 0.6 of
    the time of an epoch on TensorFlow, 1.2 on JAX.

    Args:
        start_epoch: first epoch whose weights are averaged, an integer of at least 0.
        data: training data: an array of inputs, a tuple `(inputs, targets)`, or a data set object that yields the
            batches of one pass (`tf.data.Dataset`, `keras.utils.PyDataset`). Needed if the model has batch
            normalisation that is trained. Arrays are cut into batches in their order: shuffle them if they are sorted.
        backup_dir: folder of its own for resuming; None for no saves.
        batch_size: examples in a batch where `data` is arrays, a positive integer: that of `fit`.
        log: whether the `logs` receive the number of models.

    Raises:
        ValueError: an argument is out of its range; `data` is a list or an iterator, or has no end. From `fit`: the
            model has batch normalisation that is trained, and there is no `data`, or it has `renorm=True`; `data`
            gives no batch, or one that the model cannot be run on (the first is tried when training begins); what is
            saved in `backup_dir` belongs to another model.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407.
    """

    # Has Keras call `on_train_batch_end` in a thread of its own, while training goes on, where the backend allows it.
    # Not documented, and tried on Keras 3.15.
    async_safe = True

    def __init__(self, start_epoch, data=None, backup_dir=None, batch_size=32, *, log=True):
        super().__init__()
        if not isinstance(start_epoch, numbers.Integral) or start_epoch < 0:
            raise ValueError(f"start_epoch must be an integer of at least 0, not {start_epoch!r}.")
        if not isinstance(batch_size, numbers.Integral) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, not {batch_size!r}.")
        if isinstance(data, (list, collections.abc.Iterator)):
            raise ValueError(
                f"data must be an array, a tuple (inputs, targets) or a data set object, not a {type(data).__name__}."
            )
        if _is_endless(data):
            raise ValueError("data must end after one pass over the training data, without repeat().")
        self.start_epoch = int(start_epoch)
        self.data = data
        self.backup_dir = None if backup_dir is None else Path(backup_dir)
        self.batch_size = int(batch_size)
        self.log = log
        self.other_weights = None
        self._count, self._sums = 0, None

    def __getstate__(self):
        are_arrays = self.data is None or _are_arrays(keras.utils.unpack_x_y_sample_weight(self.data)[0])
        return vars(self) | {"_model": None, "data": self.data if are_arrays else None}

    def __deepcopy__(self, memo):
        copied = type(self).__new__(type(self))
        # Data are not copied, which data sets do not allow.
        vars(copied).update(copy.deepcopy(vars(self) | {"_model": None, "data": None}, memo), data=self.data)
        return copied

    def on_train_begin(self, logs=None):
        self._check_data()
        self.other_weights = None
        self._count, self._sums = 0, None
        self._begun = False

    def on_train_batch_end(self, batch, logs=None):
        self._has_steps = True

    def on_epoch_begin(self, epoch, logs=None):
        self._has_steps = False
        # Only here is it known at which epoch this `fit` begins: BackupAndRestore decides it after `on_train_begin`.
        if self._begun:
            return
        self._begun = True
        if not self._resume(epoch) and epoch > self.start_epoch:
            warnings.warn(
                f"Training begins at epoch {epoch}, after start_epoch={self.start_epoch}, and no average of the epochs "
                f"between is saved (backup_dir: {self.backup_dir}): the average begins at epoch {epoch}.",
                stacklevel=2,
            )

    def on_epoch_end(self, epoch, logs=None):
        if not self._is_checked:
            # For layers that are made when the first batch builds the model.
            self._check_data()
        if epoch >= self.start_epoch and self._has_steps:
            weights = [_to_float64(variable) for variable in self.model.trainable_variables]
            if self._sums is None:
                self._sums = [np.zeros_like(weight) for weight in weights]
            for total, weight in zip(self._sums, weights, strict=True):
                total += weight
            self._count += 1
            self._save(epoch + 1)
        if self.log:
            logs["averaged_models"] = self._count

    def on_train_end(self, logs=None):
        if not self._begun:
            # An interruption between the last epoch and the end of training: BackupAndRestore leaves no epoch to run.
            self._resume(self.params["epochs"])
        if self._count:
            self.other_weights = _copy_weights(self.model)
            self._assign_average()
        else:
            warnings.warn(
                f"Training ended before start_epoch={self.start_epoch} (counted from 0) did: "
                "no weights were averaged, and the model keeps its last weights.",
                stacklevel=2,
            )
        self._delete_saves()

    def average(self):
        """Return the average so far, as `model.get_weights()` gives it, and leave the model as it is.

        Where the model has batch normalisation, its statistics are recomputed for the average, by a pass over `data`.

        Raises:
            ValueError: no weights have been averaged.
        """
        if not self._count:
            raise ValueError(
                f"No weights have been averaged: no epoch from start_epoch={self.start_epoch} on has ended."
            )
        weights = _copy_weights(self.model)
        try:
            self._assign_average()
            return _copy_weights(self.model)
        finally:
            self.model.set_weights(weights)

    def swap(self):
        """Exchange the weights of the model, batch-norm statistics included, with `other_weights`.

        Raises:
            ValueError: no training with this callback has ended with an average.
        """
        if self.other_weights is None:
            raise ValueError("There are no weights to swap: no training with this callback has ended with an average.")
        weights = _copy_weights(self.model)
        self.model.set_weights(self.other_weights)
        self.other_weights = weights

    def _assign_average(self):
        for variable, total in zip(self.model.trainable_variables, self._sums, strict=True):
            variable.assign(total / self._count)
        self._recompute_statistics()

    def _check_data(self):
        """Refuse data that would fail when training is over."""
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

    def _save_path(self, epoch):
        """Return the path of the sums over the epochs from `start_epoch` to that before `epoch`."""
        return self.backup_dir / f"average_{self.start_epoch}_to_{epoch}.npz"

    def _save(self, epoch):
        if self.backup_dir is None:
            return
        self.backup_dir.mkdir(parents=True, exist_ok=True)
        path = self._save_path(epoch)
        temporary = path.with_name(f"{path.name}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, *self._sums, count=self._count)
        temporary.replace(path)
        # An interruption can come before BackupAndRestore has saved this epoch; then training resumes from the last.
        self._delete_saves(keep=(path, self._save_path(epoch - 1)))

    def _resume(self, epoch):
        """Go on from the average saved when training came to `epoch`; return whether there is one."""
        if self.backup_dir is None:
            return False
        path = self._save_path(epoch)
        self._delete_saves(keep=(path,))
        if not path.exists():
            return False
        with np.load(path) as saved:
            self._count = int(saved["count"])
            self._sums = [saved[f"arr_{position}"] for position in range(len(saved.files) - 1)]
        shapes = [tuple(variable.shape) for variable in self.model.trainable_variables]
        if [total.shape for total in self._sums] != shapes:
            raise ValueError(f"The average in {str(path)!r} belongs to another model: delete it to train this one.")
        return True

    def _delete_saves(self, keep=()):
        if self.backup_dir is None:
            return
        for path in self.backup_dir.glob("average_*_to_*.npz*"):
            if path not in keep:
                path.unlink()
        with contextlib.suppress(OSError):
            # Only an empty folder can be removed.
            self.backup_dir.rmdir()


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


def _is_endless(data):
    if isinstance(data, keras.utils.PyDataset):
        return data.num_batches is None
    # -1 is the cardinality of a tf.data.Dataset that repeats without end.
    return hasattr(data, "cardinality") and int(data.cardinality()) == -1


def _to_float64(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable), dtype="float64")


def _copy_weights(model):
    # Copies, because a backend may train in the memory that get_weights shows.
    return [np.array(weight) for weight in model.get_weights()]
