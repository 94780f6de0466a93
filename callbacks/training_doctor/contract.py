"""What the outputs of a model, its loss and the targets say of one another, read before the first step."""

import warnings

import keras
import numpy as np
from keras import layers, losses

# What each loss expects of outputs and targets.
KINDS = {
    "binary": ("BinaryCrossentropy", "BinaryFocalCrossentropy"),
    "categorical": ("CategoricalCrossentropy", "CategoricalFocalCrossentropy", "KLDivergence"),
    "sparse": ("SparseCategoricalCrossentropy",),
    "squared": ("MeanSquaredError", "Huber", "LogCosh"),
    "absolute": ("MeanAbsoluteError",),
    "percentage": ("MeanAbsolutePercentageError",),
    "logarithmic": ("MeanSquaredLogarithmicError",),
    "counts": ("Poisson",),
}
CLASSES = ("binary", "categorical", "sparse")
NUMBERS = ("squared", "absolute", "percentage", "logarithmic")

# Layers that pass on the values that they receive, all or some of them.
PASS_ON = (layers.Reshape, layers.Flatten, layers.Permute, layers.Identity, layers.Dropout, layers.RepeatVector)

# Activations that do not bound the state of a recurrent layer.
UNBOUNDED = ("linear", "relu", "elu", "selu", "gelu", "softplus", "exponential", "leaky_relu", "swish", "silu")

# Layers that are an activation function.
FUNCTIONS = {
    layers.Softmax: "softmax",
    layers.ReLU: "relu",
    layers.LeakyReLU: "leaky_relu",
    layers.PReLU: "prelu",
    layers.ELU: "elu",
    layers.BatchNormalization: "linear",
}


def kind_of(loss):
    """Return the kind of a Keras loss, a key of `KINDS`, or None for any other."""
    if isinstance(loss, str):
        try:
            loss = losses.get(loss)
        except ValueError:
            return None
    for kind, names in KINDS.items():
        for name in names:
            made = getattr(losses, name)
            if isinstance(loss, made) or loss is getattr(losses, _snake(name)):
                return kind
    return None


def _snake(name):
    """Return the name of the function that a class of `keras.losses` computes."""
    special = {"KLDivergence": "kl_divergence"}
    return special.get(name) or "".join(f"_{each.lower()}" if each.isupper() else each for each in name).lstrip("_")


def outputs_of(model, outputs=None, targets=None):
    """Return {name of an output: what is known of it, of its loss, and of its targets}.

    Args:
        outputs: what the model returns for the probe before training, or None if it was not run.
        targets: the probe's targets, in the form in which `fit` takes them, or None.
    """
    symbolic = _symbolic_outputs(model)
    arrays = None if outputs is None else [_array(each) for each in keras.tree.flatten(outputs)]
    number = len(arrays or symbolic or [None])
    names = _names(model, outputs, number)
    each_loss = by_output(model.loss, names)
    each_target = by_output(targets, names)
    known = {}
    for index, name in enumerate(names):
        loss = each_loss[index]
        facts = {"loss": kind_of(loss), "from_logits": bool(getattr(loss, "from_logits", False))}
        facts |= _activation_facts(model, symbolic[index] if len(symbolic) == number else None)
        if len(symbolic) == number and symbolic[index].shape[-1:] != ():
            facts["units"] = symbolic[index].shape[-1]
        if arrays:
            facts |= _output_facts(arrays[index])
        if each_target[index] is not None:
            target = _array(each_target[index])
            facts |= _target_facts(
                target, facts, arrays[index] if arrays else None, getattr(loss, "ignore_class", None)
            )
        known[name] = facts
    return known


def _symbolic_outputs(model):
    return list(getattr(model, "outputs", None) or [])


def _names(model, outputs, number):
    if isinstance(outputs, dict):
        return sorted(outputs)
    names = getattr(model, "output_names", None)
    return list(names) if names and len(names) == number else [f"output {place}" for place in range(1, number + 1)]


def by_output(given, names):
    """Return a list with what is given for each output: one for all, a list or tuple, or a dict by name."""
    if isinstance(given, dict):
        return [given.get(name) for name in names]
    if isinstance(given, (list, tuple)):
        return list(given) if len(given) == len(names) else [None] * len(names)
    return [given] * len(names) if len(names) == 1 or not hasattr(given, "shape") else [None] * len(names)


def _array(tensor):
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def _activation_facts(model, tensor):
    """Return the name of the function that the output comes from, and of the one that is applied just before it."""
    if tensor is None:
        return {"activation": None, "layer": None, "twice": False}
    layer, tensor = _maker(model, tensor)
    activation = _activation(layer)
    twice = False
    if activation == "softmax" and not layer.weights:
        before, _ = _maker(model, _input(layer))
        twice = _activation(before) in ("softmax", "sigmoid")
    return {"activation": activation, "layer": getattr(layer, "name", None), "twice": twice}


def _maker(model, tensor):
    """Return the layer that computes a tensor's values, and the tensor it returns, or (None, None) if it is hidden."""
    while tensor is not None:
        made = [layer for layer in model.layers if any(each is tensor for each in _outputs(layer))]
        if not made:
            return None, None
        layer = made[0]
        if isinstance(layer, keras.Model):
            # A model within the model: its own last layer.
            inner = _symbolic_outputs(layer)
            return _maker(layer, inner[0]) if len(inner) == 1 else (None, None)
        if not isinstance(layer, PASS_ON) and _activation(layer) != "pass":
            return layer, tensor
        tensor = _input(layer)
    return None, None


def _outputs(layer):
    try:
        return keras.tree.flatten(layer.output)
    except (AttributeError, ValueError):
        # Not part of a graph, or of several places of it.
        return []


def _input(layer):
    try:
        tensors = keras.tree.flatten(layer.input)
    except (AttributeError, ValueError):
        return None
    return tensors[0] if len(tensors) == 1 else None


def _activation(layer):
    """Return the name of a layer's activation function, "pass" if it passes its input on, or None if not known."""
    for kind, name in FUNCTIONS.items():
        if isinstance(layer, kind):
            return name
    function = getattr(layer, "activation", None)
    if function is None:
        return None
    name = getattr(function, "__name__", None)
    if name == "linear":
        return "linear" if layer.weights else "pass"
    return name


def _output_facts(values):
    facts = {"units": values.shape[-1] if values.ndim > 1 else 1}
    values = values.astype("float64")
    if np.isfinite(values).all() and values.size:
        sums = values.sum(axis=-1) if values.ndim > 1 else values
        facts |= {"lowest": float(values.min()), "highest": float(values.max())}
        facts |= {"lowest_sum": float(sums.min()), "highest_sum": float(sums.max())}
    return facts


def _target_facts(targets, facts, outputs, ignored):
    """Return the figures of the targets that the rules need; whole targets of few values are taken for classes."""
    if not np.issubdtype(targets.dtype, np.number) and targets.dtype != bool:
        return {}
    targets = targets.astype("float64")
    found = {"targets": len(targets), "not_finite": float(np.mean(~np.isfinite(targets)))}
    if outputs is not None and facts["loss"] != "sparse":
        found["per_example"] = int(np.prod(targets.shape[1:])), int(np.prod(outputs.shape[1:]))
    elif outputs is not None:
        found["per_example"] = int(np.prod(targets.shape[1:])), int(np.prod(outputs.shape[1:-1]))
    finite = targets[np.isfinite(targets)]
    if ignored is not None:
        finite = finite[finite != ignored]
    if not finite.size:
        return found
    values, counts = np.unique(finite, return_counts=True)
    found |= {
        "target_lowest": float(values[0]),
        "target_highest": float(values[-1]),
        "target_mean": float(finite.mean()),
        "target_deviation": float(finite.std()),
        "target_zeros": float(np.mean(finite == 0)),
        "target_not_whole": float(np.mean(finite != np.round(finite))),
        "target_values": len(values),
        "target_rarest": int(counts.min()),
        "below_0": float(np.mean(finite < 0)),
        "above_1": float(np.mean(finite > 1)),
        "below_-1": float(np.mean(finite < -1)),
        # Beyond the ends by more than rounding.
        "out_of_sigmoid": float(np.mean((finite < -1e-6) | (finite > 1 + 1e-6))),
        "out_of_tanh": float(np.mean(np.abs(finite) > 1 + 1e-6)),
    }
    units = facts.get("units", 1)
    if targets.ndim > 1 and targets.shape[-1] == units and units > 1:
        sums = targets.sum(axis=-1)
        found |= {"row_lowest": float(np.nanmin(sums)), "row_highest": float(np.nanmax(sums))}
        found["one_of_units"] = bool(set(values) <= {0, 1} and (sums == 1).all())
        found["several_at_once"] = float(np.mean(sums > 1)) if set(values) <= {0, 1} else 0.0
    if len(targets) == finite.size and (facts["loss"] == "sparse" or (units == 1 and facts["loss"] == "binary")):
        found["most_frequent"] = float(counts.max() / counts.sum())
        found["classes"] = len(values)
    elif found.get("one_of_units"):
        frequencies = targets.reshape(-1, units).mean(axis=0)
        found["most_frequent"] = float(frequencies.max())
        found["classes"] = int((frequencies > 0).sum())
    return found


def signs_of_model(model):
    """Return what a model's layers tell: what is trained, and what rules know of some kinds of layers."""
    weights = sum(int(np.prod(variable.shape)) for variable in model.weights)
    trainable = sum(int(np.prod(variable.shape)) for variable in model.trainable_variables)
    signs = {"weights": weights, "trainable": trainable}
    flat = list(_layers(model))
    if weights and any(not layer.trainable and layer.weights for layer in flat):
        signs["frozen"] = 1 - trainable / weights
    signs["batch_normalization"] = any(
        isinstance(layer, layers.BatchNormalization) and layer.trainable for layer in flat
    )
    with_weights = [layer for layer in flat if layer.trainable_weights]
    normalizing = (layers.BatchNormalization, layers.LayerNormalization, layers.GroupNormalization)
    signs["normalizes_inputs"] = bool(with_weights) and isinstance(with_weights[0], normalizing)
    rates = {layer.name: layer.rate for layer in flat if isinstance(layer, layers.Dropout)}
    if rates:
        signs["dropout"] = max(rates.items(), key=lambda item: item[1])
    for layer in flat:
        inner = getattr(layer, "forward_layer", layer)
        if isinstance(inner, (layers.LSTM, layers.GRU, layers.SimpleRNN)):
            name = getattr(inner.activation, "__name__", None)
            if name in UNBOUNDED:
                signs["recurrent"] = layer.name, name
    if pair := _linear_pair(model):
        signs["linear_pair"] = pair
    return signs


def _layers(model):
    """Yield the layers of a model, and of the models in it."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _layers(layer)
        else:
            yield layer


def _linear_pair(model):
    """Return the names of two layers that are linear functions and follow one another, or None."""
    kinds = (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D)
    for layer in model.layers:
        if isinstance(layer, kinds):
            before, _ = _maker(model, _input(layer))
            if isinstance(before, kinds) and _activation(before) == "linear":
                return before.name, layer.name
    return None


def signs_of_predictions(outputs, targets, facts):
    """Return how the outputs vary over the probe, and whether they give the most frequent class to all examples."""
    values = _array(keras.tree.flatten(outputs)[0]).astype("float64")
    if values.ndim == 0 or len(values) < 2 or not np.isfinite(values).all():
        return {}
    deviation = float(values.std(axis=0).max())
    scale = facts.get("target_deviation", 0.0) if facts["loss"] in NUMBERS else 0.0
    scale = scale or float(np.abs(values).max())
    signs = {"output_deviation": deviation / scale if scale else 0.0}
    if targets is not None and "most_frequent" in facts:
        units = values.shape[-1] if values.ndim > 1 else 1
        given = _array(targets)
        if units > 1:
            predicted = values.argmax(axis=-1).ravel()
            given = given.argmax(axis=-1).ravel() if facts["loss"] != "sparse" else given.ravel().astype(int)
        else:
            predicted = (values.ravel() > (0.0 if facts["from_logits"] else 0.5)).astype(int)
            given = given.ravel().astype(int)
        frequent = np.bincount(given[given >= 0]).argmax()
        signs["one_prediction"] = bool((predicted == frequent).all())
    return signs


def loss_of_equal_probabilities(loss, units):
    """Return the loss of equal probabilities for all classes, or None if the loss is not a cross-entropy."""
    kind = kind_of(loss)
    if kind not in CLASSES or (kind != "binary" and units < 2):
        return None
    function = losses.get(loss) if isinstance(loss, str) else loss
    share = 0.5 if kind == "binary" else 1 / units
    predicted = np.full((1, units), _logits(kind, share) if getattr(function, "from_logits", False) else share)
    targets = np.zeros((1, 1)) if kind == "sparse" else np.eye(1, units)
    value = per_example(function, targets.astype("float32"), predicted.astype("float32"))
    return None if value is None else float(value.mean())


def constant_loss(loss, targets, units):
    """Return the loss of the best constant prediction, or None if it cannot be told.

    Of candidates: the mean, the median, and for cross-entropies the classes' frequencies. Frequencies and means of few
    targets are nearer to these than to all others: the loss is corrected for that, as Miller and Madow do.
    """
    kind = kind_of(loss)
    function = losses.get(loss) if isinstance(loss, str) else loss
    targets = _array(targets).astype("float64")
    if kind is None or not np.isfinite(targets).all() or not len(targets):
        return None
    number = len(targets)
    if kind == "sparse":
        classes = targets.astype(int).ravel()
        if classes.min() < 0 or classes.max() >= units:
            return None
        candidates = [np.bincount(classes, minlength=units) / classes.size]
        width = units
    else:
        width = targets.shape[-1] if targets.ndim > 1 else 1
        if targets.ndim == 1:
            targets = targets[:, None]
        rows = targets.reshape(-1, width)
        candidates = [rows.mean(axis=0)]
        if kind not in CLASSES:
            candidates.append(np.median(rows, axis=0))
    if kind in CLASSES and getattr(function, "from_logits", False):
        candidates = [_logits(kind, candidate) for candidate in candidates]
    values = []
    for candidate in candidates:
        shape = (
            (*targets.shape, units) if kind == "sparse" and targets.shape[-1:] != (1,) else (*targets.shape[:-1], -1)
        )
        predicted = np.broadcast_to(candidate, (*shape[:-1], len(candidate))).astype("float32")
        value = per_example(function, targets.astype("float32"), predicted)
        if value is None:
            return None
        values.append(float(value.mean()))
    best = min(values)
    if kind == "categorical" or kind == "sparse":
        used = int(np.count_nonzero(candidates[0] > 0)) if not getattr(function, "from_logits", False) else width
        return best + (used - 1) / (2 * number)
    if kind == "binary":
        return best + 1 / (2 * number) * (best > 0)
    return best * number / max(number - 1, 1)


def _logits(kind, shares):
    shares = np.clip(shares, 1e-7, 1 - 1e-7)
    return np.log(shares) - (np.log1p(-shares) if kind == "binary" else 0)


def per_example(loss, targets, outputs):
    """Return the loss of each example as an array, or None if the loss does not tell it."""
    function = losses.get(loss) if isinstance(loss, str) else loss
    targets, outputs = _array(targets), _array(outputs)
    if targets.ndim == 1 and outputs.ndim > 1 and kind_of(loss) != "sparse":
        targets = targets[:, None]
    try:
        with warnings.catch_warnings():
            # Training gives the same warnings.
            warnings.simplefilter("ignore")
            values = _array((getattr(function, "call", None) or function)(targets, outputs))
    except Exception:
        # Whatever a loss does not like in these shapes, training will tell.
        return None
    if values.ndim == 0 or len(values) != len(outputs):
        return None
    return values.reshape(len(values), -1).mean(axis=1).astype("float64")
