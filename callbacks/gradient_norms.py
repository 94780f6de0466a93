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

    Cost: one pass over the gradients at every recorded step (with `LossScaleOptimizer`, at every step), for which the
    training step is compiled once more, and two copies of the weights from the device in each epoch. If `fit` raises,
    steps go on to be recorded until the next `fit` with a `GradientNorms`, or `detach()`.

    Args:
        every: number of steps from one recorded step to the next, a positive integer.

    Raises:
        ValueError: `every` is not a positive integer. From `fit`: the model has no trainable weights; or there are two
            `GradientNorms`, of which `TrainingDoctor` has one.

    Source: Karpathy, notes of Stanford's course CS231n, "Neural Networks Part 3", for the update-to-weight ratio.
    """

    def __init__(self, every=10):
        super().__init__()
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive integer, not {every!r}.")
        self.every = every
        self._replaced = []
        self._optimizer = None

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
        if self._optimizer is None:
            raise ValueError("A fit takes one GradientNorms; TrainingDoctor has one, its attribute gradient_norms.")
        # Not when training begins, because callbacks further down the list may make the training function anew then.
        if self._attached_model.train_function != self._train:
            self._attach_to_training_function()
        if self._iterations_before is None:
            # Not when training begins, because `BackupAndRestore` sets the counter then.
            self._iterations_before = int(keras.ops.convert_to_numpy(self._iterations))
        self._first_of_epoch = len(self.steps)
        self._first_step = self._first_unread = self._steps_made()
        self._weights_before = None

    def on_train_batch_begin(self, batch, logs=None):
        # Everything is done here, because a callback with an `on_train_batch_end` has Keras wait for each step's logs.
        if batch == 0:
            self._weights_before = self._weights()
        else:
            self._compare_weights()
        step = self._first_step + batch
        if step + self._steps_per_execution - self._first_unread > ROWS * self.every:
            self._read()
            self._first_unread = step
        self._is_due = self._may_skip or -step % self.every < self._steps_per_execution

    def on_epoch_end(self, epoch, logs=None):
        self._compare_weights()
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
        """Leave the model and the optimizer as they were before `fit`."""
        for target, name, function, previous in reversed(self._replaced):
            # `compile`, or another callback, may have put something else in its place.
            if vars(target).get(name) == function:
                del vars(target)[name]
                if previous is not None:
                    setattr(target, name, previous)
        if self._optimizer is not None and keras.backend.backend() == "jax":
            # Private: there is no public way to remove an optimizer's variable. Tried on Keras 3.15.
            self._optimizer._untrack_variable(self._table)
        self._replaced, self._table, self._attached_model, self._optimizer = [], None, None, None

    def _attach(self):
        # On JAX, `self.model` synchronises the variables with the device, which must not happen within a step.
        self._attached_model = model = self.model
        self._steps_per_execution = model.steps_per_execution
        outer = model.optimizer
        self._optimizer = optimizer = getattr(outer, "inner_optimizer", outer)
        # After skipped steps the host does not know which steps are due.
        self._may_skip = optimizer is not outer
        # Private: the public `iterations` leaves out accumulated batches. Tried on Keras 3.15.
        self._iterations = optimizer._iterations
        self._iterations_before = None
        left = getattr(vars(optimizer).get("apply"), "__self__", None)
        if isinstance(left, GradientNorms):
            left.detach()
        # The last column takes the step, and the last row those that are not due.
        rows = np.full((ROWS + 1, len(model.trainable_variables) + 1), -1.0)
        if keras.backend.backend() == "jax":
            # On JAX a training step can change only the variables of the model, of the metrics and of the optimizer.
            self._table = optimizer.add_variable(rows.shape, dtype="float32", name="callback_gradient_norms")
            self._table.assign(rows)
            for each in {id(outer): outer, id(optimizer): optimizer}.values():
                self._replace(each, "save_own_variables", lambda store, which=each: _save(which, store))
                self._replace(each, "load_own_variables", lambda store, which=each: _load(which, store))
        else:
            self._table = keras.Variable(rows, dtype="float32", trainable=False)
        self._apply = optimizer.apply
        self._replace(optimizer, "apply", self._record_and_apply)
        self._is_recording = False

    def _attach_to_training_function(self):
        """Have a second training function made, which records, and take it for the steps that are due.

        The other steps run as without this callback: a condition within one function would cost time at every step, and
        would change the rounding of the updates.
        """
        model = self._attached_model
        step, self._plain_function = model.train_step, model.train_function
        self._replace(model, "train_function", self._train)
        if keras.backend.backend() == "jax":
            # The layout of a distributed training function's results has a place for each variable.
            model.make_train_function(force=True)
            self._plain_function = model.train_function
        # A function of its own, because JAX takes what it has traced for an equal one.
        self._replace(model, "train_step", lambda *arguments: step(*arguments))
        model.make_train_function(force=True)
        self._recording_function = model.train_function
        model.train_function = self._train

    def _replace(self, target, name, function):
        self._replaced.append((target, name, function, vars(target).get(name)))
        setattr(target, name, function)

    def _train(self, *arguments):
        if not self._is_due:
            return self._plain_function(*arguments)
        self._is_recording = True
        try:
            return self._recording_function(*arguments)
        finally:
            self._is_recording = False

    def _record_and_apply(self, gradients, trainable_variables=None):
        gradients = list(gradients)
        if self._is_recording:
            ours = self._attached_model.trainable_variables
            variables = ours if trainable_variables is None else list(trainable_variables)
            gradient_of = {id(variable): gradient for variable, gradient in zip(variables, gradients, strict=True)}
            self._record([(variable, gradient_of.get(id(variable))) for variable in ours])
        return self._apply(gradients, trainable_variables)

    def _record(self, variables_and_gradients):
        """On the device, write the sum of each gradient's squares, and the step, into the row of this step."""
        ops = keras.ops
        step = ops.subtract(self._iterations, self._iterations_before)
        is_due = ops.equal(ops.mod(step, self.every), 0)
        row = ops.where(is_due, ops.mod(ops.floor_divide(step, self.every), ROWS), ROWS)
        values = [_sum_of_squares(gradient, variable.shape) for variable, gradient in variables_and_gradients]
        values = ops.stack([*values, ops.cast(step, "float32")])
        row, values = ops.reshape(row, (1, 1)), ops.expand_dims(values, 0)
        self._table.assign(ops.scatter_update(self._table, row, values))

    def _steps_made(self):
        # On JAX, asking for `self.model` brings the variables up to date.
        _ = self.model
        return int(keras.ops.convert_to_numpy(self._iterations)) - self._iterations_before

    def _read(self):
        """Move the recorded steps from the device into the history."""
        first = self.steps[-1] + self.every if self.steps else 0
        due = np.arange(first, self._steps_made(), self.every)
        rows = keras.ops.convert_to_numpy(self._table)[due // self.every % ROWS]
        # A training step of the user's own may apply gradients more or less than once.
        is_recorded = rows[:, -1] == due.astype("float32")
        squares = rows[is_recorded, :-1].astype("float64")
        squares /= float(self._optimizer.loss_scale_factor or 1) ** 2
        self.steps += due[is_recorded].tolist()
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
        """After the first execution of an epoch, append the ratios of the updates to the weights."""
        if self._weights_before is None:
            return
        pairs = list(zip(self._weights(), self._weights_before, strict=True))
        with np.errstate(all="ignore"):
            updates = self._by_layer(np.array([_square(after - before) for after, before in pairs]))
            weights = self._by_layer(np.array([_square(before) for _, before in pairs]))
            for name, ratios in self.update_to_weight_ratios.items():
                ratios.append(float(np.sqrt(updates[name] / weights[name])))
        self._weights_before = None


def _square(vector):
    vector = vector.astype("float32", copy=False)  # NumPy multiplies float16 slowly, and it overflows
    return float(np.dot(vector, vector))


def _sum_of_squares(gradient, shape):
    if gradient is None:
        return keras.ops.zeros((), "float32")
    if keras.backend.backend() == "tensorflow" and hasattr(gradient, "indices"):
        # The gradient of an embedding has a row for each use: the rows of one token are to be added up.
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
