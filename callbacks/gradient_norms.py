"""GradientNorms: the L2 norms of the gradients and the relative size of the updates, by layer, during `fit`."""

import keras
import numpy as np

# Recorded steps that the device holds until they are read.
ROWS = 256


class GradientNorms(keras.callbacks.Callback):
    """Records the norms of the gradients as the optimizer receives them, and the update-to-weight ratio of each layer.

    Example:

        >>> norms = GradientNorms(every=1)
        >>> fitted = model.fit(x, y, epochs=2, verbose=0, callbacks=[norms])
        >>> largest_of_each_epoch = fitted.history["gradient_norm_max"]
        >>> by_step = {layer: norms.history[layer] for layer in norms.layers}

    The norms are those of the gradients before clipping, and after the loss scale of mixed precision is divided out;
    with gradient accumulation they are those of single batches. Every `every`-th step, beginning with the first, is
    recorded on the device, also under `steps_per_execution`, and read at the end of the epoch.

    The `logs` of each epoch receive `gradient_norm_mean` and `gradient_norm_max`, over the recorded steps, of all
    gradients together; the same with the prefixes `first_layer_` and `last_layer_`; and `update_to_weight_ratio`.
    Callbacks that write logs come after this one in the list.

    Attributes, begun anew by each `fit`:
        layers: names of the layers that have trainable weights, in order of execution (in a subclassed model, of
            creation).
        steps: list of the recorded steps, counted from 0 when `fit` begins. Steps that mixed precision skips because a
            gradient is not finite do not count.
        history: dict from a layer's name, or "all", to the list of its norms at these steps.
        update_to_weight_ratios: dict from a layer's name, or "all", to a list with ‖w' - w‖ / ‖w‖ for the first
            execution of the training function (one step, unless `steps_per_execution` is larger) in each epoch. About
            1e-3 is usual for a step.

    Cost: one pass over the gradients at every recorded step; with XLA (`jit_compile=True`, JAX) at every step. If `fit`
    raises, the optimizer goes on to record until the next `fit` with this callback, or `detach()`.

    Args:
        every: number of steps from one recorded step to the next, a positive integer.

    Raises:
        ValueError: `every` is not a positive integer. From `fit`: the model has no trainable weights.

    Source: Karpathy, notes of Stanford's course CS231n, "Neural Networks Part 3", for the update-to-weight ratio.
    """

    def __init__(self, every=10):
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive integer, not {every!r}.")
        self.every = every
        self._replaced = []
        self._variables = []

    def on_train_begin(self, logs=None):
        self.detach()
        if not self.model.trainable_variables:
            raise ValueError("GradientNorms needs a model with trainable weights.")
        self.layers, self._layer_of = _layers_of(self.model)
        self.steps = []
        self.history = {name: [] for name in [*self.layers, "all"]}
        self.update_to_weight_ratios = {name: [] for name in [*self.layers, "all"]}
        self._attach()

    def on_epoch_begin(self, epoch, logs=None):
        self._first_of_epoch = len(self.steps)
        self._weights_before = None
        self._unread_steps = 0

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            self._weights_before = self._weights()

    def on_train_batch_end(self, batch, logs=None):
        if self._weights_before is not None:
            self._compare_weights()
            self._weights_before = None
        self._unread_steps += self._steps_per_execution
        if self._unread_steps + self._steps_per_execution > ROWS * self.every:
            self._read()

    def on_epoch_end(self, epoch, logs=None):
        self._read()
        for prefix, name in (("", "all"), ("first_layer_", self.layers[0]), ("last_layer_", self.layers[-1])):
            norms = self.history[name][self._first_of_epoch :]
            if norms:
                logs[f"{prefix}gradient_norm_mean"] = float(np.mean(norms))
                logs[f"{prefix}gradient_norm_max"] = float(np.max(norms))
        logs["update_to_weight_ratio"] = self.update_to_weight_ratios["all"][-1]

    def on_train_end(self, logs=None):
        self.detach()

    def detach(self):
        """Leave the optimizer as it was before `fit`."""
        for target, name, previous in reversed(self._replaced):
            vars(target).pop(name, None)
            if previous is not None:
                setattr(target, name, previous)
        for variable in self._variables:
            if keras.backend.backend() == "jax":
                # Private: there is no public way to remove an optimizer's variable. Tried on Keras 3.15.
                self._optimizer._untrack_variable(variable)
        if self._variables:
            # The compiled training function still records: have it made anew, as `compile` does.
            self._attached_model.train_function = None
        self._replaced, self._variables, self._attached_model, self._optimizer = [], [], None, None

    def _attach(self):
        # On JAX, `self.model` synchronises the variables with the device, which must not happen within a step.
        self._attached_model = model = self.model
        self._steps_per_execution = model.steps_per_execution
        outer = model.optimizer
        self._optimizer = getattr(outer, "inner_optimizer", outer)
        # A condition changes how XLA fuses the operations around it, and so the rounding of the updates. There, the
        # norms of all steps are computed, and the last row takes those that are not to be recorded.
        self._always_computes = self.every == 1 or model.jit_compile or keras.backend.backend() == "jax"
        shape = (ROWS + 1, len(model.trainable_variables))
        if keras.backend.backend() == "jax":
            # On JAX a training step can change only the variables of the model, of the metrics and of the optimizer.
            self._squares = self._optimizer.add_variable(shape, dtype="float32", name="callback_gradient_squares")
            self._counter = self._optimizer.add_variable((), dtype="int32", name="callback_gradient_steps")
            for optimizer in {id(outer): outer, id(self._optimizer): self._optimizer}.values():
                self._replace(optimizer, "save_own_variables", lambda store, which=optimizer: _save(which, store))
                self._replace(optimizer, "load_own_variables", lambda store, which=optimizer: _load(which, store))
        else:
            self._squares = keras.Variable(np.zeros(shape), dtype="float32", trainable=False)
            self._counter = keras.Variable(0, dtype="int32", trainable=False)
        self._variables = [self._squares, self._counter]
        apply = self._optimizer.apply

        def record_and_apply(gradients, trainable_variables=None):
            gradients = list(gradients)
            variables = model.trainable_variables if trainable_variables is None else list(trainable_variables)
            gradient_of = {id(variable): gradient for variable, gradient in zip(variables, gradients, strict=True)}
            self._record([(variable, gradient_of.get(id(variable))) for variable in model.trainable_variables])
            return apply(gradients, trainable_variables)

        self._replace(self._optimizer, "apply", record_and_apply)
        # `fit` has made its training function already; one from an earlier `fit` would not call the new `apply`.
        model.make_train_function(force=True)

    def _replace(self, target, name, function):
        self._replaced.append((target, name, vars(target).get(name)))
        setattr(target, name, function)

    def _record(self, variables_and_gradients):
        """On the device, write the sum of each gradient's squares into the next row, if this step is to be recorded."""
        ops = keras.ops
        is_due = ops.equal(ops.mod(self._counter, self.every), 0)

        def record():
            squares = [_sum_of_squares(gradient, variable.shape) for variable, gradient in variables_and_gradients]
            row = ops.where(is_due, ops.mod(ops.floor_divide(self._counter, self.every), ROWS), ROWS)
            row, squares = ops.reshape(row, (1, 1)), ops.expand_dims(ops.stack(squares), 0)
            self._squares.assign(ops.scatter_update(self._squares, row, squares))
            return 0

        if self._always_computes:
            record()
        else:
            ops.cond(is_due, record, lambda: 0)
        self._counter.assign_add(1)

    def _read(self):
        """Move the recorded steps from the device into the history."""
        # On JAX, variables are brought up to date when a callback asks for `self.model`.
        optimizer = self.model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self._unread_steps = 0
        table, count = (np.asarray(keras.ops.convert_to_numpy(variable)) for variable in self._variables)
        first = self.steps[-1] + self.every if self.steps else 0
        new_steps = range(first, int(count), self.every)
        squares = table[[step // self.every % ROWS for step in new_steps]].astype("float64")
        squares /= float(optimizer.loss_scale_factor or 1) ** 2
        self.steps += new_steps
        for name, norms in self._by_layer(squares).items():
            self.history[name] += np.sqrt(norms).tolist()

    def _by_layer(self, squares):
        """Return {name of a layer or "all": sums over its variables} of an array of shape (…, variables)."""
        layer_of = np.array(self._layer_of)
        sums = {name: squares[..., layer_of == index].sum(axis=-1) for index, name in enumerate(self.layers)}
        return sums | {"all": squares.sum(axis=-1)}

    def _weights(self):
        return [np.array(keras.ops.convert_to_numpy(variable)).ravel() for variable in self.model.trainable_variables]

    def _compare_weights(self):
        pairs = list(zip(self._weights(), self._weights_before, strict=True))
        updates = self._by_layer(np.array([_square(after - before) for after, before in pairs]))
        weights = self._by_layer(np.array([_square(before) for _, before in pairs]))
        with np.errstate(divide="ignore", invalid="ignore"):
            for name, ratios in self.update_to_weight_ratios.items():
                ratios.append(float(np.sqrt(updates[name] / weights[name])))


def _square(vector):
    vector = vector.astype("float32", copy=False)  # NumPy multiplies float16 slowly, and it overflows
    return float(np.dot(vector, vector))


def _sum_of_squares(gradient, shape):
    if gradient is None:
        return keras.ops.zeros((), "float32")
    if hasattr(gradient, "indices"):
        # On TensorFlow the gradient of an embedding has a row for each use: the rows of one token are to be added up.
        gradient = keras.ops.scatter(keras.ops.expand_dims(gradient.indices, -1), gradient.values, shape)
    return keras.ops.sum(keras.ops.square(keras.ops.cast(gradient, "float32")))


def _layers_of(model):
    """Return the names of the layers that own trainable weights, in order, and each weight's index among them."""
    names, paths, layer_of = [], [], []
    for variable in model.trainable_variables:
        name = variable.path.removeprefix(f"{model.name}/").rpartition("/")[0] or variable.name
        # Weights of one layer follow each other. A path that comes again is that of another layer of the same name.
        if not names or names[-1] != name or variable.path in paths:
            names.append(name)
            paths = []
        paths.append(variable.path)
        layer_of.append(len(names) - 1)
    numbered = [f"{name}_{names[: index + 1].count(name)}" for index, name in enumerate(names)]
    return [name if names.count(name) == 1 else number for name, number in zip(names, numbered, strict=True)], layer_of


def _own_variables(optimizer):
    """Return the optimizer's variables without those that callbacks of this collection add during `fit`."""
    return [variable for variable in optimizer.variables if not variable.name.startswith("callback_")]


def _save(optimizer, store):
    for index, variable in enumerate(_own_variables(optimizer)):
        store[str(index)] = keras.ops.convert_to_numpy(variable)


def _load(optimizer, store):
    variables = _own_variables(optimizer)
    if len(store.keys()) != len(variables):
        raise ValueError(f"The checkpoint has {len(store.keys())} optimizer variables, the optimizer {len(variables)}.")
    for index, variable in enumerate(variables):
        variable.assign(store[str(index)])
