"""GradientNorms: the L2 norms of the gradients and the relative size of the updates, by layer, during `fit`."""

import contextlib
import numbers
import warnings
from pathlib import Path

import keras
import numpy as np

# Steps that the device holds until they are read.
ROWS = 256
# The device notes a step's number modulo this one: float32 has all smaller integers.
LIMIT = 2**20
NOT_BUILT = "The model is not built: call `model(x[:1])` first, or begin it with keras.Input(shape)."


class GradientNorms(keras.callbacks.Callback):
    """Records the norms of the gradients as the optimizer receives them, and the update-to-weight ratio of each layer.

    Example:

        >>> norms = GradientNorms(every=1)
        >>> fitted = model.fit(x, y, epochs=2, verbose=0, callbacks=[norms])
        >>> largest_of_each_epoch = fitted.history["gradient_norm_max"]
        >>> by_step = {layer: norms.history[layer] for layer in norms.layers}
        >>> figure = norms.plot()

    The norms are those of the gradients before clipping, and after the loss scale of mixed precision is divided out;
    with gradient accumulation they are those of single batches, and under `tf.distribute` those of the whole batch. The
    device holds those of every `every`-th step, beginning with the first, also under `steps_per_execution`, until they
    are recorded when the epoch ends.

    The `logs` of each epoch receive `gradient_norm_mean` and `gradient_norm_max`, over the recorded steps, of all
    gradients together; the same with the prefixes `first_layer_` and `last_layer_`; and `update_to_weight_ratio`. They
    are NaN in an epoch without a recorded step. Callbacks that write logs come after this one in the list.

    Attributes, begun anew by each `fit`:
        layers: names of the layers that have trainable weights, in order of execution (in a subclassed model, of
            creation); once an epoch has ended, of those whose weights the optimizer trains.
        steps: list of the recorded steps, counted from 0 when `fit` begins. Steps that mixed precision skips because a
            gradient is not finite do not count.
        history: dict from a layer's name, or "all", to the list of its norms at these steps.
        epochs: list of the epochs that have ended.
        update_to_weight_ratios: dict from a layer's name, or "all", to a list with ‖w' - w‖ / ‖w‖ for the first
            execution of the training function (one step, unless `steps_per_execution` is larger) in each of `epochs`;
            NaN for an epoch without a step. About 1e-3 is usual for a step.

    Cost: one pass over the gradients at each recorded step (at each step with TensorFlow's XLA, under `tf.distribute`,
    and where the data have no length), and two copies of the weights from the device in each epoch. The training step
    is compiled anew for each `fit`, and under `tf.distribute` the replicas' gradients are added up once more. If `fit`
    raises, steps go on to be recorded until the next `fit` with one, or `detach()`. A copy or a pickle has what was
    recorded, without the model and the optimizer.

    Args:
        every: number of steps from one recorded step to the next, a positive integer.
        optimizer: the optimizer to watch, where a `train_step` of your own uses several; None for the model's.
        log: whether the `logs` receive the figures.

    Raises:
        ValueError: `every` is not a positive integer. From `fit`: the model is not built; it has no optimizer; or there
            are two `GradientNorms` for one optimizer, of which `TrainingDoctor` has one.

    Source: Karpathy, notes of Stanford's course CS231n, "Neural Networks Part 3", for the update-to-weight ratio.
    """

    def __init__(self, every=10, *, optimizer=None, log=True):
        super().__init__()
        if not isinstance(every, numbers.Integral) or every < 1:
            raise ValueError(f"every must be a positive integer, not {every!r}.")
        self.every = int(every)
        self.optimizer = optimizer
        self.log = log
        self.layers, self.steps, self.history, self.epochs, self.update_to_weight_ratios = [], [], {}, [], {}
        self._replaced = []
        self._optimizer = None

    def __getstate__(self):
        left_out = ("_model", "_attached_model", "optimizer", "_optimizer", "_table", "_variables", "_weights_before")
        functions = ("_apply", "_function", "_previous_function")
        return vars(self) | dict.fromkeys((*left_out, *functions)) | {"_replaced": []}

    def on_train_begin(self, logs=None):
        self.detach()
        model = self.model
        outer = model.optimizer if self.optimizer is None else self.optimizer
        if outer is None:
            raise ValueError("The model has no optimizer to watch: pass the one that trains it, optimizer=...")
        if not model.weights and not model.built:
            raise ValueError(NOT_BUILT)
        self._variables = model.trainable_variables
        if not self._variables:
            warnings.warn("GradientNorms: no weights are trained, so there are no gradients to record.", stacklevel=2)
        self._names, self._layer_of = _layers_of(model.name, self._variables)
        self.layers = list(self._names)
        self.steps, self.epochs = [], []
        self.history = {name: [] for name in [*self.layers, "all"]}
        self.update_to_weight_ratios = {name: [] for name in [*self.layers, "all"]}
        self._attach(model, outer)

    def on_epoch_begin(self, epoch, logs=None):
        if self._optimizer is None:
            raise ValueError(
                "A fit takes one GradientNorms for an optimizer; TrainingDoctor has one, its attribute gradient_norms."
            )
        if self._start is None:
            # Not when training begins, because `BackupAndRestore` sets the counter then.
            self._start = self._unread = self._iterations()
            self._records_all = self._has_to_record_all(self._attached_model)
        self._first_of_epoch = len(self.steps)
        self._first_step = self._iterations()
        self._weights_before = self._ratios = None

    def on_train_batch_begin(self, batch, logs=None):
        # Everything is done here, because a callback with an `on_train_batch_end` has Keras wait for each step's logs.
        if batch == 0:
            self._weights_before = self._weights()
        elif self._ratios is None:
            self._compare_weights()
        step = self._first_step + batch
        if step + self._steps_per_execution - self._unread > ROWS:
            self._read()

    def on_epoch_end(self, epoch, logs=None):
        if self._ratios is None:
            self._compare_weights()
        self._read()
        if not self.epochs:
            self._keep_what_is_trained()
        self.epochs.append(epoch)
        for name, ratios in self.update_to_weight_ratios.items():
            ratios.append(self._ratios[name])
        if not self.log:
            return
        ends = (self.layers[0], self.layers[-1]) if self.layers else ("all", "all")
        for prefix, name in zip(("", "first_layer_", "last_layer_"), ("all", *ends), strict=True):
            norms = self.history[name][self._first_of_epoch :] or [np.nan]
            logs[f"{prefix}gradient_norm_mean"] = float(np.mean(norms))
            logs[f"{prefix}gradient_norm_max"] = float(np.max(norms))
        logs["update_to_weight_ratio"] = self.update_to_weight_ratios["all"][-1]

    def on_train_end(self, logs=None):
        self.detach()

    def detach(self):
        """Leave the model and the optimizer as they were before `fit`."""
        for target, name, function in reversed(self._replaced):
            # Another callback may have put something else in its place.
            if vars(target).get(name) == function:
                del vars(target)[name]
        if self._optimizer is not None:
            # A training function that another callback has had made since records too: have it made anew.
            is_ours = self._attached_model.train_function is self._function
            self._attached_model.train_function = self._previous_function if is_ours else None
            if keras.backend.backend() == "jax":
                # Private: there is no public way to remove an optimizer's variable. Tried on Keras 3.15.
                self._optimizer._untrack_variable(self._table)
        self._replaced = []
        self._table = self._attached_model = self._optimizer = self._start = None
        self._function = self._previous_function = None

    def plot(self, path=None):
        """Draw the norms by step, of each layer and of all together; return the figure.

        Args:
            path: file to write; its suffix tells the format, and without one it is SVG. None for no file.
        """
        import matplotlib
        from matplotlib.figure import Figure

        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "norms", "savefig.format": "svg"}):
            figure = Figure(figsize=(6, 3.6), layout="constrained")
            axes = figure.subplots()
            colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(self.layers)))
            for name, color in zip(self.layers, colors, strict=True):
                axes.plot(self.steps, self.history[name], color=color, linewidth=1, label=name)
            axes.plot(self.steps, self.history.get("all", []), color="C3", label="all")
            axes.set(xlabel="step", ylabel="gradient norm")
            if np.any(np.array(self.history.get("all", [])) > 0):
                axes.set_yscale("log")
            axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=-(-(len(self.layers) + 1) // 16))
            if path is not None:
                # Without a date the same norms give the same file.
                is_svg = Path(path).suffix in ("", ".svg")
                figure.savefig(path, metadata={"Date": None} if is_svg else None)
        return figure

    def _attach(self, model, outer):
        # On JAX, `self.model` synchronises the variables with the device, which must not happen within a step.
        self._attached_model = model
        self._steps_per_execution = model.steps_per_execution
        self._optimizer = optimizer = getattr(outer, "inner_optimizer", outer)
        left = getattr(vars(optimizer).get("apply"), "__self__", None)
        if isinstance(left, GradientNorms):
            left.detach()
        # A row for each step; its last column takes the step.
        rows = np.full((ROWS, len(self._variables) + 1), -1.0)
        if keras.backend.backend() == "jax":
            # On JAX a training step can change only the variables of the model, of the metrics and of the optimizer.
            self._table = optimizer.add_variable(rows.shape, dtype="float32", name="callback_gradient_norms")
            self._table.assign(rows)
            for each in {id(outer): outer, id(optimizer): optimizer}.values():
                # The table must not enter checkpoints.
                for name in ("save_own_variables", "load_own_variables"):
                    self._replace(each, name, self._without_table(getattr(each, name)))
        else:
            with _scope_of(model):
                # Each replica would write the same.
                self._table = keras.Variable(rows, dtype="float32", trainable=False, aggregation="only_first_replica")
        self._trained = set()
        self._apply = optimizer.apply
        self._replace(optimizer, "apply", self._record_and_apply)
        # The present one, if an earlier `fit` has compiled it, does not record.
        self._previous_function = model.train_function
        model.make_train_function(force=True)
        self._function = model.train_function

    def _replace(self, target, name, function):
        self._replaced.append((target, name, function))
        setattr(target, name, function)

    def _without_table(self, function):
        """Return a function that saves or loads the optimizer's variables as if there were no table among them."""
        optimizer, table = self._optimizer, self._table

        def save_or_load(store):
            optimizer._untrack_variable(table)
            try:
                function(store)
            finally:
                optimizer._track_variable(table)

        return save_or_load

    def _record_and_apply(self, gradients, trainable_variables=None):
        gradients = list(gradients)
        # Private: the variables that an optimizer is built for. Tried on Keras 3.15.
        variables = self._optimizer._trainable_variables if trainable_variables is None else list(trainable_variables)
        place = {id(variable): index for index, variable in enumerate(self._variables)}
        given = {place.get(id(each)): gradient for each, gradient in zip(variables, gradients, strict=True)}
        if None in given and len(self._attached_model.trainable_variables) > len(place):
            raise ValueError(NOT_BUILT)
        # Variables that are not the model's have no place.
        given.pop(None, None)
        self._trained |= set(given)
        self._record(given)
        return self._apply(gradients, trainable_variables)

    def _has_to_record_all(self, model):
        # Where the data have no length, only a record tells a step from data that had run out; XLA rounds the training
        # itself in another way beside a condition; and replicas cannot write under one.
        has_no_length = (self.params or {}).get("steps") is None
        is_xla = keras.backend.backend() == "tensorflow" and model.jit_compile
        return self.every == 1 or has_no_length or is_xla or _replicas(model) > 1

    def _record(self, gradients):
        """On the device, if the step is due, write the sum of each gradient's squares, and the step, into its row."""
        ops = keras.ops
        present = {index: gradient for index, gradient in gradients.items() if gradient is not None}
        if present and _replicas(self._attached_model) > 1:
            present = dict(zip(present, _sum_over_replicas(list(present.values())), strict=True))
        # Private: the public `iterations` leaves out accumulated batches. Tried on Keras 3.15.
        step = self._optimizer._iterations

        def with_row():
            squares = [
                _sum_of_squares(present[index]) if index in present else ops.zeros((), "float32")
                for index in range(len(self._variables))
            ]
            values = ops.stack([*squares, ops.cast(ops.mod(step, LIMIT), "float32")])
            # Quicker than an update of one row, which XLA makes a loop of.
            is_row = ops.equal(ops.expand_dims(ops.arange(ROWS), 1), ops.cast(ops.mod(step, ROWS), "int32"))
            return ops.where(is_row, values, ops.convert_to_tensor(self._table))

        if self._records_all:
            self._table.assign(with_row())
        else:
            is_due = ops.equal(ops.mod(step - self._start, self.every), 0)
            self._table.assign(ops.cond(is_due, with_row, lambda: ops.convert_to_tensor(self._table)))

    def _iterations(self):
        # On JAX, asking for `self.model` brings the variables up to date.
        _ = self.model
        return int(keras.ops.convert_to_numpy(self._optimizer._iterations))

    def _read(self):
        """Move the steps that are due from the device into the history."""
        end = self._iterations()
        table = keras.ops.convert_to_numpy(self._table)
        # Those before have been overwritten.
        due = np.arange(max(self._unread, end - ROWS), end)
        due = due[(due - self._start) % self.every == 0]
        rows = table[due % ROWS]
        # A training step of the user's own may apply gradients more or less than once.
        is_recorded = rows[:, -1] == due % LIMIT
        squares = rows[is_recorded, :-1].astype("float64")
        squares /= float(self._optimizer.loss_scale_factor or 1) ** 2
        self.steps += (due[is_recorded] - self._start).tolist()
        sums = self._by_layer(squares)
        for name, norms in self.history.items():
            norms += np.sqrt(sums[name]).tolist()
        if self._records_all and end > self._unread and table[(end - 1) % ROWS, -1] != (end - 1) % LIMIT:
            # TensorFlow counts a step for which the data had run out, too.
            self._start += 1
        self._unread = end

    def _keep_what_is_trained(self):
        """After the first epoch, forget layers that the optimizer was not given, and say if it was not used."""
        trained = {self._layer_of[index] for index in self._trained}
        if trained:
            self.layers = [name for index, name in enumerate(self._names) if index in trained]
            for measured in (self.history, self.update_to_weight_ratios):
                for name in set(self._names) - set(self.layers):
                    del measured[name]
        if self._variables and self._iterations() == self._first_step:
            warnings.warn(
                f"GradientNorms watches the optimizer {self._optimizer.name!r}, which has not made a step in the first "
                "epoch. If another one trains the model, pass that: optimizer=...",
                stacklevel=2,
            )

    def _by_layer(self, squares):
        """Return {name of a layer or "all": sums over its variables} of an array of shape (…, variables)."""
        layer_of = np.array(self._layer_of)
        sums = {name: squares[..., layer_of == index].sum(axis=-1) for index, name in enumerate(self._names)}
        return sums | {"all": squares.sum(axis=-1)}

    def _weights(self):
        # Of the model as `_iterations` has brought it up to date.
        return [variable.numpy().ravel() for variable in self._variables]

    def _compare_weights(self):
        """After the first execution of an epoch, compute the ratios of the updates to the weights."""
        if self._weights_before is None or self._iterations() == self._first_step:
            self._ratios = dict.fromkeys([*self._names, "all"], np.nan)
            return
        pairs = list(zip(self._weights(), self._weights_before, strict=True))
        with np.errstate(all="ignore"):
            updates = self._by_layer(np.array([_square(after - before) for after, before in pairs]))
            weights = self._by_layer(np.array([_square(before) for _, before in pairs]))
            self._ratios = {name: float(np.sqrt(updates[name] / weights[name])) for name in updates}
        self._weights_before = None


def _square(vector):
    vector = vector.astype("float32", copy=False)  # NumPy multiplies float16 slowly, and it overflows
    return float(np.dot(vector, vector))


def _sum_of_squares(gradient):
    ops = keras.ops
    if keras.backend.backend() == "tensorflow" and hasattr(gradient, "indices"):
        # The gradient of an embedding has a row for each use: the rows of one token are to be added up.
        order = ops.argsort(gradient.indices)
        indices = ops.take(gradient.indices, order)
        is_new = ops.cast(ops.not_equal(indices[1:], indices[:-1]), "int32")
        tokens = ops.concatenate([ops.zeros((1,), "int32"), ops.cumsum(is_new)])
        values = ops.take(gradient.values, order, axis=0)
        gradient = ops.segment_sum(values, tokens, num_segments=ops.shape(indices)[0])
    squares = ops.square(ops.cast(gradient, "float32"))
    if len(squares.shape) < 2:
        return ops.sum(squares)
    # In two stages, because XLA adds up a long array number by number; by the root it cannot make one of the two.
    return ops.sum(ops.square(ops.sqrt(ops.sum(squares, axis=tuple(range(len(squares.shape) - 1))))))


def _replicas(model):
    # With TensorFlow, the number of devices that share a batch.
    return getattr(getattr(model, "distribute_strategy", None), "num_replicas_in_sync", 1)


def _sum_over_replicas(gradients):
    """Return the gradients of the whole batch, where each replica has that of its share."""
    import tensorflow as tf

    return tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, gradients)


def _scope_of(model):
    # With TensorFlow, the variables of a distributed model are to be made where its own are.
    strategy = getattr(model, "distribute_strategy", None)
    return contextlib.nullcontext() if strategy is None else strategy.scope()


def _layers_of(model, variables):
    """Return the names of the layers that own trainable weights, in order, and each weight's index among them."""
    names, paths, layer_of = [], [], []
    for variable in variables:
        name = variable.path.removeprefix(f"{model}/").rpartition("/")[0] or variable.name
        # Weights of one layer follow each other. A path that comes again is that of another layer of the same name.
        if not names or names[-1] != name or variable.path in paths:
            names.append(name)
            paths = []
        paths.append(variable.path)
        layer_of.append(len(names) - 1)
    numbered = [f"{name}_{names[: index + 1].count(name)}" for index, name in enumerate(names)]
    return [name if names.count(name) == 1 else number for name, number in zip(names, numbered, strict=True)], layer_of
