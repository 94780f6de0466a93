"""StochasticWeightAveraging: the equal average of the weights late in training, with batch-norm statistics to match."""

import collections.abc
import contextlib
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
    epochs 2, 3 and 4. The `logs` of each epoch receive `averaged_models`, the number of models in the average so far.
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

    Raises:
        ValueError: an argument is out of its range; `data` is a list or an iterator, or has no end. From `fit`: the
            model has batch normalisation that is trained, and there is no `data`, or it has `renorm=True`; `data`
            gives no batch; what is saved in `backup_dir` belongs to another model.

    Source: Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better Generalization", arXiv:1803.05407.
    """

    def __init__(self, start_epoch, data=None, backup_dir=None, batch_size=32):
        super().__init__()
        if not isinstance(start_epoch, int) or start_epoch < 0:
            raise ValueError(f"start_epoch must be an integer of at least 0, not {start_epoch!r}.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, not {batch_size!r}.")
        if isinstance(data, (list, collections.abc.Iterator)):
            raise ValueError(
                f"data must be an array, a tuple (inputs, targets) or a data set object, not a {type(data).__name__}."
            )
        if _is_endless(data):
            raise ValueError("data must end after one pass over the training data, without repeat().")
        self.start_epoch = start_epoch
        self.data = data
        self.backup_dir = None if backup_dir is None else Path(backup_dir)
        self.batch_size = batch_size
        self.other_weights = None

    def on_train_begin(self, logs=None):
        self._check_data()
        self.other_weights = None
        self._count, self._sums = 0, None
        self._begun = False

    def on_epoch_begin(self, epoch, logs=None):
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
        if epoch >= self.start_epoch:
            weights = [_to_float64(variable) for variable in self.model.trainable_variables]
            if self._sums is None:
                # Again, for layers that are made when the first batch builds the model.
                self._check_data()
                self._sums = [np.zeros_like(weight) for weight in weights]
            for total, weight in zip(self._sums, weights, strict=True):
                total += weight
            self._count += 1
            self._save(epoch + 1)
        logs["averaged_models"] = self._count

    def on_train_end(self, logs=None):
        if not self._begun:
            # An interruption between the last epoch and the end of training: BackupAndRestore leaves no epoch to run.
            self._resume(self.params["epochs"])
        if self._count:
            self.other_weights = _copy_weights(self.model)
            for variable, total in zip(self.model.trainable_variables, self._sums, strict=True):
                variable.assign(total / self._count)
            self._recompute_statistics()
        else:
            warnings.warn(
                f"Training ended before start_epoch={self.start_epoch} (counted from 0) did: "
                "no weights were averaged, and the model keeps its last weights.",
                stacklevel=2,
            )
        self._sums = None
        self._delete_saves()

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

    def _check_data(self):
        normalisations = _batch_normalisations(self.model)
        if normalisations and self.data is None:
            raise ValueError(
                f"The model has batch normalisation ({normalisations[0].name!r}), whose moving statistics must be "
                "recomputed for the averaged weights: pass the training data, data=(inputs, targets)."
            )
        for layer in normalisations:
            if layer.renorm:
                raise ValueError(f"{layer.name!r} has renorm=True, whose statistics cannot be recomputed in one pass.")

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
    arrays = keras.tree.flatten(inputs)
    if all(hasattr(array, "shape") for array in arrays):
        for start in range(0, len(arrays[0]), batch_size):
            part = slice(start, start + batch_size)
            yield keras.tree.map_structure(lambda array, part=part: array[part], inputs)
    else:
        for batch in data:
            yield keras.utils.unpack_x_y_sample_weight(batch)[0]


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
