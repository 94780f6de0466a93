"""ActivationStatistics: mean, deviation, dead units and saturated values of each layer's output, at every epoch."""

import contextlib
import threading
from pathlib import Path

import keras
import numpy as np

# The range of each function that flattens towards both ends. Softmax is left out, because over many classes its values
# are near 0 without being saturated, and relu6, because its lower end is the zero of a ReLU.
RANGES = {
    getattr(module, name): ends
    for module in (keras.activations, keras.ops)
    for ends, names in {
        (-1, 1): ("tanh", "hard_tanh", "softsign"),
        (0, 1): ("sigmoid", "hard_sigmoid", "sparse_sigmoid"),
    }.items()
    for name in names
}
NOT_EXECUTED = dict.fromkeys(("mean", "std", "dead", "saturated"))


class ActivationStatistics(keras.callbacks.Callback):
    """Measures the output of each layer on a fixed batch of inputs, in inference mode, at the end of each epoch.

    Example:

        >>> statistics = ActivationStatistics(x[:32])
        >>> fitted = model.fit(x, y, epochs=2, verbose=0, callbacks=[statistics])
        >>> before_training = {layer: entries[0] for layer, entries in statistics.history.items()}
        >>> dead_at_the_end = {layer: entries[-1]["dead"] for layer, entries in statistics.history.items()}
        >>> figure = statistics.plot()

    Measured is each layer that has weights or an activation function: `Dense`, `LSTM`, `BatchNormalization`,
    `Activation`, `ReLU`, …, and not `Flatten`, `Dropout`, pooling or `Add`. A model within the model counts by its
    layers, any other layer that is made of layers as a whole. Functions such as `keras.ops.relu`, called on tensors,
    are no layers. Of a layer with several outputs the first is taken. Left out are outputs that are not of a float
    type, and layers within functions that the model itself compiles or, on JAX, rematerialises.

    The statistics, over all examples, positions and units of the output:
        mean, std: the mean and the standard deviation.
        dead: share of the units, 0 to 1, that are exactly zero for every example at every position. Units are the
            places of the last axis (of axis 1 for images with the data format "channels_first").
        saturated: share of the values, 0 to 1, within 1 % of the range's width of an end of the range, such as beyond
            ±0.98 for tanh, or outside 0.01 to 0.99 for sigmoid. None for a layer whose attribute `activation` is none
            of tanh, hard_tanh, softsign, sigmoid, hard_sigmoid and sparse_sigmoid.

    A layer that is used several times has one entry for all uses; each use has units of its own.

    The `logs` of each epoch receive `activation_mean/LAYER`, `activation_std/LAYER`, `activation_dead/LAYER` and, for
    layers that can saturate, `activation_saturated/LAYER`: of the layers that are executed before training, and NaN in
    an epoch in which one of these is not. Callbacks that write logs come after this one in the list.

    Attributes, all but the first begun anew by each `fit`:
        received: in words, what the probe holds: the type, shape and range of each of its arrays.
        epochs: list of the epochs that have ended.
        history: dict from a layer's name, in order of execution, to a list of dicts with the keys `mean`, `std`, `dead`
            and `saturated`. Item 0 of the list was measured before training, item n after the n-th of `epochs`; in one
            in which the layer was not executed, all values are None. In a nested model the name is "MODEL/LAYER".
        first_input: dict with `mean`, `std`, `low` and `high` of what the first layer with trainable weights receives
            before training, after any `Rescaling` or `Normalization`; None if that is not of a float type, as in front
            of an embedding.

    Cost: one eager forward pass of the probe at each epoch, and arithmetic in NumPy on every layer's output. On two CPU
    cores a probe of 128 images of 28 x 28 pixels takes 2 ms in three dense layers of 100, and 40 ms in two convolutions
    of 32 and 64 channels, 1 % of an epoch of 10,000 images.

    Args:
        probe: the inputs, in the form that the model takes in `fit`: an array of shape (examples, …), or a tuple, list
            or dict of such arrays. They pass as one batch: some 32 to 256 examples. A model that is not built yet is
            built by them.
        log: whether the `logs` receive the figures.

    Raises:
        ValueError: `probe` is no array or structure of arrays with equal numbers of examples, at least one. From
            `fit`: the model cannot be run on the probe, or has no layer to measure.

    Source: Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010.
    """

    def __init__(self, probe, *, log=True):
        super().__init__()
        self.probe = keras.tree.map_structure(keras.ops.convert_to_numpy, probe)
        self.log = log
        shapes = self._probe_shapes()
        if len({shape[:1] for shape in shapes}) != 1 or not all(shapes) or shapes[0][0] == 0:
            raise ValueError(
                "probe must be an array of inputs, or a tuple, list or dict of such arrays with equal numbers of "
                f"examples, at least one, not {type(probe).__name__} with the shapes {shapes}."
            )

        self.received = "; ".join(map(_in_words, keras.tree.flatten(self.probe)))
        self.history, self.epochs, self.first_input = {}, [], None
        self._names = {}

    def __getstate__(self):
        # Names are kept by layer, and a copy has no model.
        return vars(self) | {"_model": None, "_names": {}}

    def on_train_begin(self, logs=None):
        self.history, self.epochs = {}, []
        self.first_input = None
        self._names = {}
        try:
            self._measure()
        except Exception as error:
            raise ValueError(f"The model cannot be measured on the probe ({self.received}): {error}") from error
        if not self.history:
            raise ValueError(
                "ActivationStatistics needs a model with layers that have weights or an activation function, and that "
                "are not within a compiled function."
            )

        # Writers of logs want the same columns in each epoch.
        self._columns = [
            (name, statistic)
            for name, (entry,) in self.history.items()
            for statistic, value in entry.items()
            if value is not None
        ]

    def on_epoch_end(self, epoch, logs=None):
        self._measure()
        self.epochs.append(epoch)
        if self.log:
            for name, statistic in self._columns:
                value = self.history[name][-1][statistic]
                logs[f"activation_{statistic}/{name}"] = np.nan if value is None else value

    def plot(self, path=None):
        """Draw each statistic over the epochs, with a line for each layer; return the figure.

        Args:
            path: file to write; its suffix tells the format, and without one it is SVG. None for no file.
        """
        import matplotlib
        from matplotlib.figure import Figure

        values = {
            statistic: {
                name: [np.nan if entry[statistic] is None else entry[statistic] for entry in entries]
                for name, entries in self.history.items()
                if any(entry[statistic] is not None for entry in entries)
            }
            for statistic in NOT_EXECUTED
        }
        titles = {
            "mean": "mean",
            "std": "standard deviation",
            "dead": "share of dead units",
            "saturated": "share of saturated values",
        }
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "activations", "savefig.format": "svg"}):
            figure = Figure(figsize=(8, 5), layout="constrained")
            colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, max(1, len(self.history))))
            color_of = dict(zip(self.history, colors, strict=False))
            for axes, (statistic, title) in zip(figure.subplots(2, 2, sharex=True).flat, titles.items(), strict=True):
                for name, line in values[statistic].items():
                    # Item 0 was measured before the first epoch.
                    trained = [self.epochs[0] if self.epochs else 0, *(epoch + 1 for epoch in self.epochs)]
                    axes.plot(trained, line, marker=".", color=color_of[name], label=name)
                axes.set(title=title)
                if statistic in ("dead", "saturated"):
                    axes.set(ylim=(-0.03, 1.03))
            for axes in figure.axes[2:]:
                axes.set(xlabel="epochs trained")
            lines, names = figure.axes[0].get_legend_handles_labels()
            figure.legend(lines, names, loc="outside right upper", ncols=max(1, -(-len(names) // 20)))
            if path is not None:
                # Without a date the same statistics give the same file.
                is_svg = Path(path).suffix in ("", ".svg")
                figure.savefig(path, metadata={"Date": None} if is_svg else None)
        return figure

    def _probe_shapes(self):
        return [array.shape for array in keras.tree.flatten(self.probe)]

    def _measure(self):
        """Run the probe, add an entry to the history of each layer, and return {name: entry} of those executed."""
        uses = {}
        enclosing = []
        received = {}
        thread = threading.get_ident()
        call = keras.Layer.__call__

        def call_and_measure(layer, *arguments, **keywords):
            in_layer = enclosing and not isinstance(enclosing[-1], keras.Model)
            # Other threads may prepare data with layers.
            if in_layer or threading.get_ident() != thread:
                return call(layer, *arguments, **keywords)
            if arguments and layer.trainable_weights and not isinstance(layer, keras.Model):
                received[layer] = arguments[0]
            enclosing.append(layer)
            outputs = call(layer, *arguments, **keywords)
            if _is_measured(layer) and (values := _float_values(outputs)) is not None:
                name = self._name(layer, [parent.name for parent in enclosing[1:]])
                uses.setdefault(name, []).append(_measure_use(layer, values))
            enclosing.pop()
            return outputs

        # For the class and for one pass only: no layer of the model, and nothing that is compiled, holds a trace of it.
        keras.Layer.__call__ = call_and_measure
        try:
            # In this scope no variable changes: neither seeds nor statistics.
            with keras.StatelessScope(), _in_evaluation(self.model):
                self.model(self.probe, training=False)
        finally:
            keras.Layer.__call__ = call
        if not self.history and received and (values := _float_values(next(iter(received.values())))) is not None:
            self.first_input = {
                "mean": float(values.mean(dtype="float64")),
                "std": float(values.std(dtype="float64")),
                "low": float(values.min(initial=np.inf)),
                "high": float(values.max(initial=-np.inf)),
            }
        entries = {name: _pool(measured) for name, measured in uses.items()}
        items = max(map(len, self.history.values()), default=0)
        for name in entries:
            self.history.setdefault(name, [NOT_EXECUTED] * items)
        for name, history in self.history.items():
            history.append(entries.get(name, NOT_EXECUTED))
        return entries

    def _name(self, layer, path):
        """Return a name that no other layer has, the same in every epoch."""
        if layer not in self._names:
            name = path = "/".join(path)
            number = 1
            while name in self._names.values():
                number += 1
                name = f"{path}_{number}"
            self._names[layer] = name
        return self._names[layer]


def _in_words(array):
    """Return type, shape and range of an array."""
    text = f"{array.dtype} of shape {array.shape}"
    if array.dtype.kind not in "fiu" or not array.size:
        return text
    return (
        f"{text}, {array.min() + 0:.4g} to {array.max() + 0:.4g}, mean {array.mean():.4g}, deviation {array.std():.4g}"
    )


@contextlib.contextmanager
def _in_evaluation(model):
    """With PyTorch, keep no gradients, and have modules of its own within the model know that they are evaluated."""
    if keras.backend.backend() != "torch":
        yield
        return
    import torch

    is_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(is_training)


def _is_measured(layer):
    if isinstance(layer, keras.Model):
        return False
    functions = (keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.ELU, keras.layers.Softmax)
    return bool(layer.weights) or hasattr(layer, "activation") or isinstance(layer, functions)


def _float_values(tensors):
    """Return the first tensor as an array, or None if it is not of a float type or has no value."""
    tensor = keras.tree.flatten(tensors)[0]
    if not keras.backend.is_float_dtype(keras.backend.standardize_dtype(tensor.dtype)):
        return None
    try:
        return np.asarray(keras.ops.convert_to_numpy(tensor)).astype("float32")
    except (NotImplementedError, TypeError, ValueError):
        # A symbolic tensor, as when a layer is built: TensorFlow, JAX and Keras each have their own error for it.
        return None


def _measure_use(layer, values):
    """Return the numbers of values and units of one output, then its mean, variance and shares."""
    if values.ndim > 3 and getattr(layer, "data_format", keras.config.image_data_format()) == "channels_first":
        values = np.moveaxis(values, 1, -1)
    units = values.shape[-1] if values.ndim > 1 else 1
    saturated = None
    if ends := RANGES.get(getattr(layer, "activation", None)):
        low, high = ends
        saturated = np.mean(np.abs(values - (low + high) / 2) >= 0.49 * (high - low))
    with np.errstate(invalid="ignore"):
        mean, variance = values.mean(dtype="float64"), values.var(dtype="float64")
    dead = np.mean(~values.reshape(-1, units).any(axis=0))
    return values.size, units, mean, variance, dead, saturated


def _pool(uses):
    """Return the statistics of all uses of a layer together."""
    sizes, units, means, variances, dead, saturated = zip(*uses, strict=True)
    mean = np.average(means, weights=sizes)
    with np.errstate(invalid="ignore"):
        variance = np.average(variances + np.square(means - mean), weights=sizes)
    return {
        "mean": float(mean),
        "std": float(np.sqrt(variance)),
        "dead": float(np.average(dead, weights=units)),
        "saturated": None if saturated[0] is None else float(np.average(saturated, weights=sizes)),
    }
