"""What a model starts with: which weights are as their initializers make them, and how two starts become equal."""

import ast
import base64
import dataclasses
import hashlib
import io

import keras
import numpy as np


@dataclasses.dataclass
class Weight:
    """The value of one weight, and what is known of it.

    Attributes:
        name: "LAYER/WEIGHT".
        value: array.
        is_parameter: whether it is made to be trained, also if its layer is frozen.
        initializer: text of the initializer that made it, without its seed, or None if that cannot be found.
        is_random: whether that initializer draws numbers.
        is_fresh: whether that initializer, called again, gives this value; None if it cannot be called again.
    """

    name: str
    value: np.ndarray
    is_parameter: bool
    initializer: str | None
    is_random: bool
    is_fresh: bool | None


@dataclasses.dataclass
class Start:
    """The weights of a model before its training."""

    weights: list[Weight]

    def changed(self):
        """Return the names of the weights that are not as their initializers make them."""
        return [weight.name for weight in self.weights if weight.is_fresh is False]

    def is_as_it_was(self, model):
        """Return whether the model still has these weights."""
        return all(
            np.array_equal(weight.value, _array(variable), equal_nan=True)
            for weight, (variable, *_) in zip(self.weights, _own_weights(model), strict=False)
        )

    def fingerprint(self):
        """Return a digest of the weights that a seed should have made, or None if there are none."""
        made = [
            weight.value.tobytes()
            for weight in self.weights
            # Where no initializer is known, the same number everywhere is not random.
            if weight.is_random or (weight.is_parameter and not weight.initializer and np.ptp(weight.value))
        ]
        return hashlib.sha256(b"".join(made)).hexdigest() if made else None

    def become(self, first, model, variant, seed):
        """Give the model the first variant's start; return the names of the weights in which they remain unequal.

        Weights that were trained before are left as they are, and have to be equal; so are weights that are not made to
        be trained, such as adapted statistics, unless a random initializer has made them.

        Raises:
            ValueError: the two cannot start equal.
        """
        remedy = "If that is what the variants are to differ in, pass same_start=False to Comparison."
        named = f"{variant!r}, seed {seed},"
        mine, others = (
            [weight for weight in start.weights if weight.is_parameter or weight.is_random] for start in (self, first)
        )
        shapes, first_shapes = ([weight.value.shape for weight in weights] for weights in (mine, others))
        if shapes != first_shapes:
            raise ValueError(
                f"The model of {named} has weights of shapes {shapes}, that of the first variant had {first_shapes}: "
                f"they cannot start equal. {remedy}"
            )
        is_trained = bool(self.changed() or first.changed())
        variables = [variable for variable, *_ in _own_weights(model)]
        new_values = {}
        for weight, other in zip(mine, others, strict=True):
            if weight.initializer and other.initializer and weight.initializer != other.initializer:
                raise ValueError(
                    f"{weight.name!r} of {named} has the initializer {weight.initializer}, in the first variant it is "
                    f"{other.initializer}: an equal start would hide the difference. {remedy}"
                )
            if np.array_equal(weight.value, other.value, equal_nan=True):
                continue
            if is_trained and not (weight.is_fresh and other.is_fresh):
                raise ValueError(
                    f"{weight.name!r} of {named} starts from other trained weights than in the first variant. Load the "
                    f"same weights into all variants of a seed. {remedy}"
                )
            if not (weight.is_random and other.is_random):
                raise ValueError(
                    f"{weight.name!r} of {named} starts from other values than in the first variant, and whether they "
                    "are random cannot be told: no random initializer of its layer is known to have made it. Keep the "
                    f"initializer as an attribute of the layer, WEIGHT_initializer. {remedy}"
                )
            new_values[next(place for place, each in enumerate(self.weights) if each is weight)] = other.value
        for place, value in new_values.items():
            variables[place].assign(value)
        if model.optimizer is not None:
            self._renew_copies(model.optimizer, new_values)
        return self._unequal_state(first)

    def _renew_copies(self, optimizer, new_values):
        """Give an optimizer that was built with the old weights, and holds copies of them, the new ones."""
        variables = [*optimizer.variables, *getattr(getattr(optimizer, "inner_optimizer", None), "variables", [])]
        for place, value in new_values.items():
            old = self.weights[place].value
            for variable in variables:
                # A copy of zeros could not be told from a moment that starts with zeros.
                if tuple(variable.shape) == old.shape and old.any() and np.array_equal(_array(variable), old):
                    variable.assign(value)

    def _unequal_state(self, first):
        mine, others = (
            [weight for weight in start.weights if not weight.is_parameter and not weight.is_random]
            for start in (self, first)
        )
        if [weight.value.shape for weight in mine] != [weight.value.shape for weight in others]:
            return []
        return [
            weight.name
            for weight, other in zip(mine, others, strict=True)
            if not np.array_equal(weight.value, other.value, equal_nan=True)
        ]

    def to_text(self):
        """Return the start as text, for a file."""
        memory = io.BytesIO()
        known = [dataclasses.astuple(weight)[2:] for weight in self.weights]
        arrays = [weight.value for weight in self.weights]
        names = [weight.name for weight in self.weights]
        np.savez_compressed(memory, *arrays, names=np.array(names), known=np.array(repr(known)))
        return base64.b64encode(memory.getvalue()).decode()

    @classmethod
    def from_text(cls, text):
        """Return the start that `to_text` has written."""
        with np.load(io.BytesIO(base64.b64decode(text))) as content:
            known = ast.literal_eval(str(content["known"]))
            return cls(
                [
                    Weight(str(name), content[f"arr_{place}"], *about)
                    for place, (name, about) in enumerate(zip(content["names"], known, strict=True))
                ]
            )


def start_of(model):
    """Return the `Start` of a built model."""
    weights = []
    for variable, layer, is_parameter in _own_weights(model):
        initializer = _initializer(layer, variable)
        value = _array(variable)
        is_fresh = None
        if isinstance(getattr(initializer, "seed", None), (int, np.integer)):
            # Called again, an initializer with a number for a seed repeats itself; one with a SeedGenerator does not.
            again = _to_numpy(initializer(variable.shape, dtype=variable.dtype))
            # This layer adapts the scale to its axes.
            is_scaled = isinstance(layer, keras.layers.EinsumDense)
            is_fresh = _is_multiple(value, again) if is_scaled else np.array_equal(value, again)
        is_random = hasattr(initializer, "seed")
        weights.append(Weight(variable.path, value, is_parameter, _in_words(initializer), is_random, is_fresh))
    return Start(weights)


def describe_data(split, data):
    """Return a dict with what a split holds, as far as it can be told: `examples`, `inputs`, `classes`, `digest`.

    Raises:
        ValueError: it has no end, no examples, or can be read only once.
    """
    inputs, targets, _ = keras.utils.unpack_x_y_sample_weight(data)
    if targets is not None or hasattr(inputs, "shape"):
        shapes = [np.shape(each) for each in keras.tree.flatten(inputs)]
        examples = shapes[0][0] if shapes and shapes[0] else 0
        if examples == 0:
            raise ValueError(f"The {split} data hold no examples: pass arrays with at least one.")
        labels = None if targets is None else [_labels(each) for each in keras.tree.flatten(targets)]
        classes = len(np.unique(labels[0])) if labels and len(labels) == 1 and labels[0] is not None else None
        shape = ", ".join(" × ".join(map(str, shape[1:])) or "scalars" for shape in shapes)
        return {"examples": int(examples), "inputs": shape, "classes": classes, "digest": _digest((inputs, targets))}
    if hasattr(inputs, "__next__"):
        raise ValueError(
            f"The {split} data are a generator, which can be read only once, and every run reads them: pass arrays, a "
            "tf.data.Dataset, a PyDataset or a DataLoader."
        )
    batches = _number_of_batches(inputs)
    if batches is None or batches == 0:
        what = "have no end" if batches is None else "hold no examples"
        raise ValueError(
            f"The {split} data {what}: evaluate() would not work. Pass a finite data set (without repeat)."
        )
    return {"batches": batches} if batches > 0 else {}


def _digest(arrays):
    """Return a digest of up to a thousand examples."""
    found = hashlib.sha256()
    for array in keras.tree.flatten(arrays):
        if array is not None:
            array = np.asarray(keras.ops.convert_to_numpy(array) if hasattr(array, "dtype") else array)
            found.update(np.ascontiguousarray(array[:: max(1, len(array) // 1000)]).tobytes())
    return found.hexdigest()


def example_of(data):
    """Return (inputs, targets, sample weights) of one example or, of a data set object, of one batch."""
    inputs, targets, sample_weights = keras.utils.unpack_x_y_sample_weight(data)
    if targets is None and not hasattr(inputs, "shape"):
        batch = inputs[0] if isinstance(inputs, keras.utils.PyDataset) else next(iter(inputs))
        return keras.utils.unpack_x_y_sample_weight(tuple(batch))
    return keras.tree.map_structure(
        lambda array: None if array is None else array[:1], (inputs, targets, sample_weights)
    )


def _number_of_batches(data):
    """Return the number of batches of a data set object: None if it has no end, -1 if it cannot be told."""
    if hasattr(data, "cardinality"):
        cardinality = int(data.cardinality())
        return {-1: None, -2: -1}.get(cardinality, cardinality)
    if isinstance(data, keras.utils.PyDataset):
        try:
            return data.num_batches
        except NotImplementedError:
            return None
    try:
        return len(data)
    except TypeError:
        return -1


def _labels(targets):
    """Return the targets as an array if they are class numbers, else None."""
    array = np.asarray(keras.ops.convert_to_numpy(targets))
    is_column = array.ndim == 1 or array.ndim == 2 and array.shape[1] == 1
    return array if array.dtype.kind in "iub" and is_column else None


def _own_weights(model):
    """Return (variable, its layer, whether it is made to be trained) for every weight, each once."""
    found = {}
    # Private: there is no public way to walk nested layers and RNN cells, nor to tell a weight that is frozen from one
    # that is never trained. Tried on Keras 3.15.
    for layer in model._flatten_layers():
        for is_parameter, variables in ((True, layer._trainable_variables), (False, layer._non_trainable_variables)):
            for variable in variables:
                found.setdefault(id(variable), (variable, layer, is_parameter))
    return list(found.values())


def _initializer(layer, variable):
    """Return the initializer of a weight, or None if its layer has none under one of the usual names."""
    name = variable.name
    # A depthwise convolution keeps its kernel's as `depthwise_initializer`, a recurrent cell its recurrent kernel's as
    # `recurrent_initializer`.
    names = [name, name.removesuffix("_kernel"), *["depthwise"] * (name == "kernel")]
    for each in names:
        if (initializer := getattr(layer, f"{each}_initializer", None)) is not None:
            return initializer
    return None


def _in_words(initializer):
    if initializer is None:
        return None
    if not hasattr(initializer, "get_config"):
        return getattr(initializer, "__qualname__", type(initializer).__name__)
    settings = {name: value for name, value in initializer.get_config().items() if name != "seed"}
    return f"{type(initializer).__name__}({', '.join(f'{name}={value}' for name, value in settings.items())})"


def _is_multiple(value, drawn):
    """Return whether an array is the drawn one times a number."""
    if not drawn.any():
        return np.array_equal(value, drawn)
    largest = np.unravel_index(np.argmax(np.abs(drawn)), drawn.shape)
    # Rounding is that of the largest values, from which a uniform initializer subtracts.
    rounding = 1e-6 * np.abs(value).max()
    return bool(value.any() and np.allclose(value, drawn * (value[largest] / drawn[largest]), rtol=0, atol=rounding))


def _array(variable):
    return _to_numpy(variable.value)


def _to_numpy(tensor):
    """Return a copy, because a backend may train in the memory that convert_to_numpy shows."""
    array = np.array(keras.ops.convert_to_numpy(tensor))
    return array.astype("float32") if array.dtype.kind == "V" or array.dtype.name == "bfloat16" else array
