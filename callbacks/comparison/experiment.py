"""Comparison: variants of a model, trained from equal starts over several seeds, judged by their paired differences."""

import ast
import contextlib
import hashlib
import importlib.util
import linecache
import os
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import weakref
from pathlib import Path

import keras
import numpy as np

from . import report
from .order import new_order_each_epoch
from .result import ORDER, Result, usual_margin
from .start import Start, describe_data, example_of, start_of


class Comparison:
    """A fair experiment: new models, equal starting weights, paired seeds, test data used once, a verdict by one rule.

    Example:

        >>> variants = {"plain": 0.0, "dropout": 0.5}
        >>> with Comparison(metric="loss", margin=0.02, test=(x, y)) as comparison:
        ...     for variant, rate, run in comparison.runs(variants, seeds=2):
        ...         model = keras.Sequential([keras.Input((4,)), layers.Dropout(rate), layers.Dense(1)])
        ...         model.compile("sgd", "mse")
        ...         history = model.fit(x, y, verbose=0, callbacks=[run])

    On leaving the `with` block a table is printed. It gives for each variant:

    - the mean of the metric over seeds with its 95 % t-interval;
    - its paired difference from the baseline (same seed, same start) with its 95 % t-interval, Bonferroni-adjusted for
      the number of differences; with two to four seeds, the lowest and the highest difference;
    - the verdict: better or worse when the whole interval lies on that side of zero (slightly, if it is within the
      margin too), the same when it lies across zero and within the margin, else undecided, with the number of seeds
      that would decide. Fewer than five seeds give no verdict;
    - the gap, the training figure minus the test figure, both from `evaluate`; the time per epoch relative to the
      baseline; and what `add_figure` adds.

    While it is open, `fit` on arrays takes the examples in a new order in each epoch. On TensorFlow it otherwise takes
    them in one order in all epochs, once a seed is set (Keras 3.15).

    The intervals cover seeds, not the choice of test examples. A run that diverged (with a figure that is not finite)
    is an outcome: such runs are counted on both sides, and decide where an exact McNemar test says so; else the
    difference is that of the seeds in which neither run diverged.

    With `save` every finished run is in the file before the next begins. After Ctrl-C, or any other exception, what was
    finished is reported; the same experiment, begun again under the same name, skips what is finished.

    Attributes:
        result: the `Result`, which holds all runs as plain data.

    Args:
        metric: name of the figure that decides, as `evaluate` names it: "accuracy", "loss", …
        baseline: name of the variant that the others are compared with; None for the first that is run.
        train, validation, test: data for `Model.evaluate`: `(inputs, targets)`, `(inputs, targets, sample_weights)` or
            a data set object. All are evaluated when a run's training ends, and the test data only then. The metric is
            that of the test data, or of the validation data if there is no test data.
        margin: smallest difference of the metric that matters, declared before measuring; None for one point (0.01)
            where the metric is an accuracy, and for no margin elsewhere, so that nothing is called the same.
        mode: "max" if a higher metric is better, "min" if a lower one is, "auto" to tell by the metric's name.
        same_start: give every variant of a seed the starting weights of the first one. False only for variants that
            differ in shape, or whose starting weights are the subject.
        pretrained: accept models that start from trained weights, on purpose. These weights are left as they are, and
            have to be equal for all variants of a seed, unless `same_start` is False.
        evaluate_batch_size: batch size of `evaluate` for arrays, a positive integer; None for that of `fit`.
        runs: planned number of runs, for the progress line, where the loop is not that of `runs`.
        settings: dict of what a reader must know to repeat the comparison; shown below the table and saved.
        columns: dict from the name of a figure that `add_figure` adds to what it is, in words; shown below the table.
        save: `NAME`, to write `NAME.json`, which grows with every run, and the picture `NAME.svg` at the end;
            `NAME.json` for the first alone.

    Raises:
        ValueError: an argument is outside its range; the metric's name does not tell its direction; a data set has no
            end, no examples, or can be read only once; or `save` names the result of another experiment.
        ModuleNotFoundError: a package that the report or the picture needs is not installed.
        OSError: `save` cannot be written.
    """

    def __init__(
        self,
        *,
        metric,
        baseline=None,
        train=None,
        validation=None,
        test=None,
        margin=None,
        mode="auto",
        same_start=True,
        pretrained=False,
        evaluate_batch_size=None,
        runs=None,
        settings=None,
        columns=None,
        save=None,
    ):
        if margin is not None and not 0 <= margin < np.inf:
            raise ValueError(f"margin must be a number of at least 0, or None, not {margin!r}.")
        if evaluate_batch_size is not None and not _is_positive_integer(evaluate_batch_size):
            raise ValueError(f"evaluate_batch_size must be a positive integer or None, not {evaluate_batch_size!r}.")
        splits = {"train": train, "validation": validation, "test": test}
        self._data = {split: data for split, data in splits.items() if data is not None}
        self.result = Result(
            baseline=None if baseline is None else str(baseline),
            metric=metric,
            mode=_resolve_mode(metric, mode),
            split="validation" if test is None and validation is not None else "test",
            margin=usual_margin(metric) if margin is None else float(margin),
            same_start=same_start,
            pretrained=pretrained,
            settings=dict(settings or {}),
            columns=dict(columns or {}),
            data={split: describe_data(split, data) for split, data in self._data.items()},
            environment=environment() | {"order": ORDER},
            code=_code_digest(sys._getframe(1).f_code.co_filename),
        )
        self._evaluate_batch_size = evaluate_batch_size
        self._planned = runs
        self._is_settled = False
        self._names = {}
        self._iteration = None
        self._checked = set()
        self._missing = set()
        self._starts = {}
        self._own_starts = {}
        self._seen_models = []
        self._console = None
        self._progress = None
        self._ctrl_c = False
        self._draws = save is not None and Path(save).suffix != ".json"
        _check_packages(["rich", "scipy"] + ["matplotlib", "pandas", "seaborn"] * self._draws)
        self._saved = self._stamp = None
        self._path = None if save is None else _result_path(save)
        if self._path:
            _check_writable(self._path)
            self._json = self._path.with_name(f"{self._path.name}.json")
            if self._json.exists():
                self._stamp = _stamp(self._json)
                self._saved = Result.load(self._json)
                self._check_continues(self.result.baseline or self._saved.baseline, self._saved.grid)
                self._take_over(self._saved)

    @property
    def baseline(self):
        return self.result.baseline

    def runs(self, variants, seeds):
        """Give name, value and callback for each variant of each seed; the callback makes one `fit` a run.

        Before each, `keras.utils.set_random_seed` is called; the variants of one seed follow one another, and the first
        variant is the baseline, unless `Comparison` was given another. Runs that `save` has already are skipped.

        Args:
            variants: dict from a variant's name to the one thing that changes.
            seeds: number of seeds, counted from 0, or the seeds themselves, different integers of at least 0.

        Raises:
            ValueError: an argument is outside its range; the baseline is not among the variants; the loop's body made
                no run.
        """
        seeds = _seeds(seeds)
        names = self._begin_loop(variants)
        todo = [(seed, name) for seed in seeds for name in names if not self.finished(name, seed)]
        self._missing = set(todo)
        for seed in dict.fromkeys(seed for seed, _ in todo):
            self._check_start_is_known(seed)
        self._show_plan(len(todo), len(names) * len(seeds))
        for seed, name in todo:
            # The body of another variant may have added it: one training can serve several.
            if not self.finished(name, seed):
                with _Iteration(self, name, seed):
                    yield names[name], variants[names[name]], self.run(names[name], seed)
            self._end_iteration(seed, name)

    def search(self, variants, grid, seeds=3):
        """Give name, value and callback, as `runs` does, for each variant at each rate of a grid.

        A variant's value is its rate or, if it is a tuple, ends in it: in that place is the rate of the grid. Only the
        validation data are evaluated, and `add_figure` and `add_signal` add nothing. The report shows the mean metric
        of each rate, and the best rate of each variant, marked where it is at an edge of the grid.

        Args:
            variants: dict from a variant's name to its rate, or to a tuple that ends in it.
            grid: rates to try, different numbers.
            seeds: number of seeds, or the seeds themselves.

        Raises:
            ValueError: an argument is outside its range; there are no validation data; the loop's body made no run.
        """
        seeds, grid = _seeds(seeds), [float(rate) for rate in grid]
        if not grid or len(set(grid)) < len(grid) or not np.isfinite(grid).all():
            raise ValueError(f"grid must hold different numbers, at least one, not {grid}.")
        if "validation" not in self._data:
            raise ValueError("A search looks at validation data only: pass validation=(inputs, targets) to Comparison.")
        self._data = {"validation": self._data["validation"]}
        names = self._begin_loop(variants, grid)
        todo = [
            (seed, name, rate)
            for seed in seeds
            for name in names
            for rate in grid
            if not self.finished(name, seed, rate)
        ]
        self._missing = set(todo)
        self._show_plan(len(todo), len(names) * len(seeds) * len(grid))
        for seed, name, rate in todo:
            value = variants[names[name]]
            value = (*value[:-1], rate) if isinstance(value, tuple) else rate
            with _Iteration(self, name, seed):
                yield names[name], value, _Run(self, name, seed, rate)
            self._end_iteration(seed, name, rate)

    def run(self, variant, seed):
        """Return the callback that makes one `fit` a run of this comparison; it moves to the end of the callbacks.

        Args:
            variant: name of the variant; what is no string is known by its text.
            seed: the integer that was given to `keras.utils.set_random_seed` before the model was built.

        Raises:
            ValueError: this variant was run with this seed already; or there is no test and no validation data. From
                `fit`: the model was seen before, was trained already, has no weights, differs in shape or initializer
                from the seed's first, starts as it did under another seed, or its weights were changed by another
                callback when training began; or the metric is not among those that the model was compiled with.
        """
        variant = self._name_in_own_loop(variant)
        self._check_is_new(variant, seed)
        if self.result.split not in self._data:
            raise ValueError("There is nothing to compare on: pass test=(inputs, targets) to Comparison.")
        return _Run(self, variant, int(seed))

    def finished(self, variant, seed, rate=None):
        """Return whether there is a run of this variant and seed, also one from the file that `save` names."""
        return any(_key(run) == (str(variant), seed, rate) for run in self.result.runs)

    def add(self, variant, seed, metrics, curve=None):
        """Add a run that no single `fit` produces: an ensemble, Monte Carlo passes, signals by layer.

        Args:
            variant: name of the variant; what is no string is known by its text.
            seed: the integer seed of the run; figures of equal seeds are compared with each other.
            metrics: dict from a figure's name to its value on the test data; the comparison's metric is among them.
            curve: optional dict from a name to a list of values, one for each epoch.

        Raises:
            ValueError: this variant was run with this seed already, the comparison's metric is missing, or this is a
                search.
        """
        variant = self._name_in_own_loop(variant)
        if self.result.grid is not None:
            raise ValueError("A search takes runs by fit only: leave add() out of it.")
        self._check_is_new(variant, seed)
        metrics = _floats(metrics)
        self._check_has_metric(metrics)
        curve = {name: [float(value) for value in values] for name, values in (curve or {}).items()}
        self._finish_run(variant, int(seed), {self.result.split: metrics}, curve, epoch_seconds=[])

    def add_figure(self, variant, seed, name, value):
        """Add a column to the table: a figure of one run beside the metric, such as the number of epochs to a target.

        Args:
            variant, seed: the run, as given to `run` or `add`, which may come before or after.
            name: title of the column, which shows the median over seeds.
            value: a number; it need not be finite.

        Raises:
            ValueError: the run has a figure of this name already.
        """
        if self.result.grid is None:
            entry = {"variant": str(variant), "seed": int(seed), "name": str(name), "value": float(value)}
            self._add_entry(self.result.figures, entry)

    def add_signal(self, variant, seed, name, values, by="layer", scale="linear", at=None, at_scale="linear"):
        """Add a line to the picture whose x-axis is not the epoch: a signal of one run by layer, by step, …

        Args:
            variant, seed: the run, as given to `run` or `add`, which may come before or after.
            name: what is measured, the title of the panel and of its y-axis; signals of one name share a panel.
            values: list of numbers, one for each layer, step, …; those not finite are not drawn.
            by: what the values are counted by, the title of the x-axis.
            scale: "linear" or "log", of the y-axis.
            at: where the values lie on the x-axis: a list of as many numbers or texts; None for 1, 2, 3, …
            at_scale: "linear" or "log", of the x-axis.

        Raises:
            ValueError: the run has a signal of this name already, a scale is neither of the two, or `at` has not as
                many places as there are values.
        """
        for name_of_scale, given in (("scale", scale), ("at_scale", at_scale)):
            if given not in ("linear", "log"):
                raise ValueError(f'{name_of_scale} must be "linear" or "log", not {given!r}.')
        if at is not None and len(at) != len(values):
            raise ValueError(f"at must have a place for each of the {len(values)} values, not {len(at)} places.")
        if self.result.grid is not None:
            return
        values = [float(value) for value in values]
        entry = {"variant": str(variant), "seed": int(seed), "name": str(name), "by": str(by), "scale": scale}
        entry["values"] = values
        if at is not None:
            entry["at"] = [place if isinstance(place, str) else float(place) for place in at]
        if at_scale != "linear":
            entry["at_scale"] = at_scale
        self._add_entry(self.result.signals, entry)

    def summary(self):
        """Return `Result.summary()`: one dict for each variant, the baseline first."""
        return self.result.summary()

    def table(self):
        """Return the summary as a dict from a column's title to its cells, formatted for people."""
        return report.table(self.result)

    def notes(self):
        """Return the sentences that say what the columns of `table()` mean."""
        return report.notes(self.result)

    def report(self):
        """Print the table of what decides, a second one of the other figures, and `notes()`."""
        report.print_report(self.result, self._console)

    def plot(self, path=None):
        """Return the picture as a matplotlib figure: signals, the metric by epoch, and the paired differences.

        Args:
            path: file to write it to as well, in the format that the suffix names.
        """
        # Only here, because drawing takes a second to import, and packages that training does not need.
        from .picture import draw

        return draw(self.result, path)

    def save(self, path):
        """Write the result to `NAME.json`, then the picture to `NAME.svg`; each is written whole or not at all.

        Args:
            path: `NAME`, with or without .json or .svg at its end.
        """
        path = _result_path(path)
        self.result.save(path.with_name(f"{path.name}.json"))
        self.plot(path.with_name(f"{path.name}.svg"))

    def _repr_html_(self):
        from .picture import as_svg

        return report.as_html(self.result, as_svg(self.result)) if self.result.runs else repr(self)

    def __enter__(self):
        from rich import progress

        self._console = report.new_console()
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=12),
            progress.MofNCompleteColumn(),
            progress.TextColumn("runs"),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            # Where the table goes, so that hiding the other stream hides a backend's chatter and nothing else.
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
            # Runs may take long.
            speed_estimate_period=86400,
        )
        self._task = self._progress.add_task("starting", total=self._planned)
        self._order = contextlib.ExitStack()
        self._order.enter_context(new_order_each_epoch())
        self._progress.start()
        self._handler = signal.getsignal(signal.SIGINT)
        if callable(self._handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note_ctrl_c)
        if self.result.runs:
            self._say(f"{len(self.result.runs)} finished runs taken from {self._json}.")
        return self

    def __exit__(self, exception_type, exception, traceback):
        if signal.getsignal(signal.SIGINT) == self._note_ctrl_c:
            signal.signal(signal.SIGINT, self._handler)
        self._order.close()
        self._progress.stop()
        self._progress = None
        self.result.interrupted = exception_type is not None or bool(self._missing) or self._is_taken_over_in_part()
        if not self._is_settled and self._saved and exception is None:
            # All runs of a loop of one's own were finished before.
            self._settle(self._saved.baseline, self._saved.grid)
        if self.result.interrupted and not (self.result.runs and self._is_settled):
            return
        errors = []
        # Each on its own, so that none keeps the next from being tried.
        for part in (self._save, self.report, self._save_picture):
            try:
                part()
            except Exception as error:
                errors.append(error)
        if errors and exception is None:
            if self._path and self._json.exists():
                errors[0].add_note(f"The finished runs are in {str(self._json)!r}.")
            raise errors[0]
        for error in errors:
            exception.add_note(f"What was finished could not be reported: {error}")

    def _save_picture(self):
        if self._path:
            self._say(f"Saved: {self._json}")
        if self._draws:
            picture = self._path.with_name(f"{self._path.name}.svg")
            self.plot(picture)
            self._say(f"Saved: {picture}")

    def _is_taken_over_in_part(self):
        """Return whether the file has seeds that this call does not ask for, and that not all variants have."""
        if not self._saved or self.result.grid is not None:
            return False
        seeds = {}
        for run in self.result.runs:
            seeds.setdefault(run["variant"], set()).add(run["seed"])
        return any(each != seeds.get(self.baseline) for each in seeds.values())

    def _begin_loop(self, variants, grid=None):
        """Return {name as text: name as given} of the variants, having checked all that can be known now."""
        if not isinstance(variants, dict) or not variants:
            raise ValueError(f"variants must be a dict from a name to a value, with at least one, not {variants!r}.")
        names = {self._name_of(variant): variant for variant in variants}
        values = {name: variants[variant] for name, variant in names.items()}
        if grid is not None:
            # Without the rate, in whose place are those of the grid.
            values = {name: value[:-1] if isinstance(value, tuple) else () for name, value in values.items()}
        self.result.variants = {name: _stable_text(value) for name, value in values.items()}
        if self._saved and (lacking := self._saved.variants.keys() - names.keys()):
            raise ValueError(
                f"{str(self._json)!r} holds runs of {sorted(lacking)} too, which this call lacks. Save under another "
                "name, or delete that file."
            )
        if self.baseline is not None and self.baseline not in names:
            raise ValueError(f"The baseline {self.baseline!r} is not among the variants: {list(names)}.")
        if self._is_settled and self.result.grid != grid:
            raise ValueError("This Comparison has made runs of another kind: give a search a Comparison of its own.")
        self._settle(self.baseline or next(iter(names)), grid)
        return names

    def _name_of(self, variant):
        """Return a variant's name as text, as in the file."""
        name = str(variant)
        if self._names.setdefault(name, variant) != variant:
            raise ValueError(
                f"The names {self._names[name]!r} and {variant!r} would be shown alike: give the variants names that "
                "differ as text."
            )
        return name

    def _name_in_own_loop(self, variant):
        """Return a variant's name as text; the first one is the baseline, if no other is."""
        name = self._name_of(variant)
        if not self._is_settled:
            self._settle(self.baseline or (self._saved.baseline if self._saved else name), grid=None)
        return name

    def _settle(self, baseline, grid):
        """Take the baseline and the grid, without which two experiments cannot be told apart."""
        if self._saved:
            self._check_continues(baseline, grid)
        self.result.baseline, self.result.grid = baseline, grid
        if grid is not None:
            self.result.split = "validation"
            self.result.data = {"validation": self.result.data["validation"]}
        self._is_settled = True

    def _check_continues(self, baseline, grid):
        mine = Result(**vars(self.result) | {"baseline": baseline, "grid": grid})
        # Those of the evidence runner, which it adds to what a comparison has saved.
        mine.recipe, mine.digest = self._saved.recipe, self._saved.digest
        if grid is not None:
            mine.split, mine.data = "validation", {"validation": mine.data.get("validation")}
        if differing := self._saved.differences_from(mine):
            raise ValueError(
                f"{str(self._json)!r} holds another experiment, which differs in {'; '.join(differing)}. Save under "
                "another name, or delete that file."
            )

    def _take_over(self, saved):
        self.result.runs.extend(run for run in saved.runs if not run.get("incomplete"))
        finished = {_key(run)[:2] for run in self.result.runs}
        for name in ("figures", "signals"):
            kept = [each for each in getattr(saved, name) if (each["variant"], each["seed"]) in finished]
            getattr(self.result, name).extend(kept)
        self.result.unequal_starts |= saved.unequal_starts
        if saved.start:
            self._starts[saved.start["seed"]] = Start.from_text(saved.start["weights"])
            self.result.start = saved.start

    def _end_iteration(self, seed, *name_and_rate):
        self._missing.discard((seed, *name_and_rate))
        if not any(seed == other for other, *_ in self._missing):
            # The seed is complete: nobody has to start as it did any more.
            self._starts.pop(seed, None)
            self.result.start = None
        self._save()

    def _show_plan(self, todo, total):
        self._planned = total
        if self._progress is not None:
            self._progress.update(self._task, total=total, completed=total - todo)

    def _note_ctrl_c(self, number, frame):
        self._ctrl_c = True
        self._handler(number, frame)

    def _raise_ctrl_c(self):
        """Raise the KeyboardInterrupt that got lost: Python drops those that reach it while it collects garbage."""
        if self._ctrl_c:
            raise KeyboardInterrupt

    def _show_progress(self, text, fraction_of_run=0.0):
        if self._progress is not None:
            self._progress.update(self._task, description=text, completed=len(self.result.runs) + fraction_of_run)

    def _say(self, text):
        if self._console is not None:
            self._console.print(text)

    def _save(self):
        if self._path:
            if self._json.exists() and _stamp(self._json) != self._stamp:
                raise OSError(
                    f"{str(self._json)!r} was written by another process, whose runs are left as they are. Give each "
                    "Comparison that runs at the same time a name of its own, and merge them with Result.merge."
                )
            try:
                has_ended = self._progress is None and not self._missing
                Result(**vars(self.result) | {"interrupted": self.result.interrupted or not has_ended}).save(self._json)
                self._stamp = _stamp(self._json)
            except OSError as error:
                raise OSError(
                    f"The result cannot be saved in {str(self._json)!r} ({error.strerror}); it holds all runs but the "
                    "last. Make room, and run the same again: it goes on from there."
                ) from error

    def _add_entry(self, entries, entry):
        key = entry["variant"], entry["seed"], entry["name"]
        if any((other["variant"], other["seed"], other["name"]) == key for other in entries):
            variant, seed, name = key
            raise ValueError(f"The run of {variant!r} with seed {seed} has a {name!r} already: give each its own name.")
        entries.append(entry)

    def _check_is_new(self, variant, seed, rate=None):
        if self.finished(variant, seed, rate):
            taken_over = self._saved and any(_key(run) == (variant, seed, rate) for run in self._saved.runs)
            where = f" (it is in {str(self._json)!r})" if taken_over else ""
            raise ValueError(
                f"{variant!r} was run with seed {seed} already{where}: a second run would count one seed twice. "
                "Give every run of a variant its own seed, and skip what comparison.finished(variant, seed) knows."
            )

    def _check_has_metric(self, metrics):
        if self.result.metric not in metrics:
            raise ValueError(
                f"The metric {self.result.metric!r} is not among {sorted(metrics)}: compile the model with "
                f"metrics=[{self.result.metric!r}], or compare another metric."
            )

    def _check_compiled_metrics(self, model, variant):
        """Refuse a metric that a variant's model will not have, before training, where that can be known."""
        has_own_steps = any(
            getattr(type(model), step) is not getattr(keras.Model, step) for step in ("train_step", "test_step")
        )
        if variant in self._checked or has_own_steps:
            return
        self._checked.add(variant)
        # Left unbuilt: one that `fit` builds may begin elsewhere, as ScheduleFreeAdamW does on TensorFlow (Keras 3.15).
        optimizer, model.optimizer = model.optimizer, None
        try:
            # Private: TensorFlow builds the metrics with the first step only. Nothing but shapes is used of the
            # example. Tried on Keras 3.15.
            model._symbolic_build(data_batch=example_of(self._data[self.result.split]))
            figures = model.get_metrics_result()
        except Exception:
            # It will be noticed when the run is evaluated.
            return
        finally:
            model.optimizer = optimizer
        if np.ndim(figures.get(self.result.metric, 0.0)):
            raise ValueError(
                f"The metric {self.result.metric!r} is an array, which gives no order: average it (for F1Score, "
                f'average="macro"), or compare one element, "{self.result.metric}[0]".'
            )
        self._check_has_metric(_floats(figures))

    def _check_model(self, model, variant, seed):
        remedy = "Build and compile a new model for every run, inside the loop over variants."
        if not model.built or not model.weights:
            raise ValueError(
                f"The model of {variant!r}, seed {seed}, is not built: it has no weights that a start could be made "
                "from. Begin it with keras.Input(shape), or call model(x[:1]) before fit."
            )
        for seen_model, seen_as in self._seen_models:
            if seen_model() is model:
                raise ValueError(
                    f"The model of {variant!r}, seed {seed}, was trained in this comparison before, as {seen_as}. "
                    f"{remedy}"
                )
        start = start_of(model)
        changed = start.changed()
        if not self.result.pretrained and (_steps_made(model) or changed):
            sign = f"{changed[0]!r} is not as its initializer makes it" if changed else "its optimizer has made steps"
            raise ValueError(
                f"The model of {variant!r}, seed {seed}, has been trained already, for {sign}; compile() does not "
                f"reset weights. {remedy} If trained weights are the start on purpose, pass pretrained=True to "
                "Comparison."
            )
        return start

    def _start(self, model, variant, seed, start):
        """Make the starting weights those of the seed's first variant, where they are known to be starting weights."""
        if _steps_made(model) and not self.result.pretrained or not start.is_as_it_was(model):
            raise ValueError(
                f"When training of {variant!r}, seed {seed}, began, a callback gave the model other weights than it "
                "was built with, as BackupAndRestore does after a crash. A run is trained as a whole: leave that "
                "callback out; a comparison with save=NAME goes on by itself after the runs that are finished."
            )
        # Weak, so that models can be freed.
        self._seen_models.append((weakref.ref(model), f"{variant!r}, seed {seed}"))
        self._check_seed_varies(variant, seed, start)
        if not self.result.same_start:
            return
        if seed in self._starts:
            if unequal := start.become(self._starts[seed], model, variant, seed):
                self.result.unequal_starts[variant] = unequal
        else:
            self._check_start_is_known(seed)
            self._starts[seed] = start
            if self._iteration and self._path:
                self.result.start = {"seed": seed, "weights": start.to_text()}

    def _check_start_is_known(self, seed):
        if self.result.same_start and seed not in self._starts and any(run["seed"] == seed for run in self.result.runs):
            raise ValueError(
                f"Seed {seed} was begun in an earlier call, and the weights that it started from are not known any "
                "more. Save all variants anew, under another name."
            )

    def _check_seed_varies(self, variant, seed, start):
        if self.result.pretrained or not (fingerprint := start.fingerprint()):
            return
        seen_seed = self._own_starts.setdefault((variant, fingerprint), seed)
        if seen_seed != seed:
            raise ValueError(
                f"{variant!r} starts with seed {seed} from the very weights that it started from with seed "
                f"{seen_seed}, so it is no other run. Call keras.utils.set_random_seed(seed) before the model is "
                "built (comparison.runs does), and set no seed in the builder or its initializers."
            )

    def _evaluate(self, model, fit_batch_size):
        """Return the figures of every split. This is the only place where test data is used."""
        metrics = {}
        for split, data in self._data.items():
            inputs, targets, sample_weights = keras.utils.unpack_x_y_sample_weight(data)
            # A data set object has its own.
            batch_size = None if targets is None else self._evaluate_batch_size or fit_batch_size
            figures = model.evaluate(
                inputs, targets, sample_weight=sample_weights, batch_size=batch_size, verbose=0, return_dict=True
            )
            metrics[split] = _floats(figures)
        return metrics

    def _finish_run(self, variant, seed, metrics, curve, epoch_seconds, epochs=None, rate=None):
        self.result.add_run(variant, seed, metrics, curve, epochs, epoch_seconds, rate)
        if self._iteration:
            self._iteration.note(self.result.runs[-1])
        self._save()
        name = f"seed {seed}, {report.display_name(variant)}" + (f", rate {rate:g}" if rate is not None else "")
        self._show_progress(name)
        split, metric = self.result.split, self.result.metric
        figures = metrics[split]
        if metric in figures:
            self._say(f"{name}: {split} {metric} {report.number_in_words(figures[metric])}")
        self._check_has_metric(figures)
        self._raise_ctrl_c()


class _Iteration:
    """One round of the loop of `runs`, whose runs are marked as incomplete in the file until it has ended."""

    def __init__(self, comparison, variant, seed):
        self.comparison = comparison
        self.variant = variant
        self.seed = seed
        self.runs = []

    def __enter__(self):
        self.comparison._raise_ctrl_c()
        keras.utils.set_random_seed(self.seed)
        self.comparison._iteration = self

    def __exit__(self, exception_type, exception, traceback):
        self.comparison._iteration = None
        if exception_type is not None:
            return
        if not self.runs:
            raise ValueError(
                f"The loop made no run of {self.variant!r} with seed {self.seed}: give the third item to fit, "
                "callbacks=[run], or call comparison.add."
            )
        for run in self.runs:
            del run["incomplete"]

    def note(self, run):
        run["incomplete"] = True
        self.runs.append(run)


class _Clock(keras.callbacks.Callback):
    """The first of the callbacks: with the last, it measures the seconds of an epoch's steps and of its callbacks.

    They reach from the epoch's beginning to the end of its last step, and from the beginning of the callbacks' work at
    the epoch's end to its end. So validation is left out, and so is a wait between the two: on TensorFlow 2.21 the
    iterator that ends with the epoch waits for the thread that tunes it, for up to as long as the epoch took.
    """

    def __init__(self):
        super().__init__()
        self.epoch = None

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch
        self.begin = self.last_step = self.callbacks_begin = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.callbacks_begin = time.perf_counter()

    def end_step(self):
        self.last_step = time.perf_counter()

    def end_epoch(self):
        """Return the seconds of the epoch; called by the last of the callbacks."""
        return self.last_step - self.begin + time.perf_counter() - self.callbacks_begin


class _Run(keras.callbacks.Callback):
    """One `fit` of a comparison: checks the model, sets its start, keeps logs and times, evaluates at the end."""

    # It only notes the time when a step has ended, so Keras need not wait for each. Not documented; Keras 3.15.
    async_safe = True

    def __init__(self, comparison, variant, seed, rate=None):
        super().__init__()
        self.comparison = comparison
        self.variant = variant
        self.seed = seed
        self.rate = rate

    def set_model(self, model):
        super().set_model(model)
        # Private: only the caller knows the list that this callback has to end, to see what the others leave, and the
        # arguments of `fit`. Tried on Keras 3.15.
        caller = sys._getframe(1)
        callback_list = caller.f_locals.get("self")
        self._clock = _Clock()
        if isinstance(callback_list, keras.callbacks.CallbackList):
            others = [each for each in callback_list.callbacks if each is not self]
            callback_list.callbacks = [self._clock, *others, self]
        while caller and not (caller.f_code.co_name == "fit" and caller.f_locals.get("self") is model):
            caller = caller.f_back
        arguments = caller.f_locals if caller else {}
        self._batch_size = arguments.get("batch_size")
        if arguments.get("initial_epoch") and not self.comparison.result.pretrained:
            raise ValueError(
                f"The run of {self.variant!r}, seed {self.seed}, would begin at epoch {arguments['initial_epoch']}: a "
                "run is trained as a whole. Leave initial_epoch out; with save=NAME a comparison goes on by itself."
            )
        self._built = self.comparison._check_model(model, self.variant, self.seed)

    def on_train_begin(self, logs=None):
        self.comparison._check_is_new(self.variant, self.seed, self.rate)
        self.comparison._check_compiled_metrics(self.model, self.variant)
        self.comparison._start(self.model, self.variant, self.seed, self._built)
        self._built = None
        self.curve, self.epochs = {}, {}
        self.epoch_seconds = []
        self._show_progress("", 0.0)

    def on_epoch_begin(self, epoch, logs=None):
        self.comparison._raise_ctrl_c()
        if self._clock.epoch != epoch:
            # The list of callbacks is the caller's own.
            self._clock.on_epoch_begin(epoch)

    def on_train_batch_end(self, batch, logs=None):
        self._clock.end_step()

    def on_epoch_end(self, epoch, logs=None):
        self.epoch_seconds.append(round(self._clock.end_epoch(), 6))
        for name, value in _floats(logs).items():
            self.curve.setdefault(name, []).append(value)
            self.epochs.setdefault(name, []).append(epoch + 1)
        self._show_progress(f", epoch {epoch + 1}/{self.params['epochs']}", (epoch + 1) / self.params["epochs"])

    def on_train_end(self, logs=None):
        metrics = self.comparison._evaluate(self.model, self._batch_size)
        # A value for every epoch needs no list of them.
        epochs = {name: each for name, each in self.epochs.items() if each != list(range(1, len(each) + 1))}
        self.comparison._finish_run(self.variant, self.seed, metrics, self.curve, self.epoch_seconds, epochs, self.rate)

    def _show_progress(self, text, fraction_of_run):
        rate = f", rate {self.rate:g}" if self.rate is not None else ""
        self.comparison._show_progress(f"seed {self.seed}, {self.variant}{rate}{text}", fraction_of_run)


def environment():
    """Return the versions, and the processor with the cores that may be used, that the figures depend on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    processor = names[0] if names else platform.processor() or platform.machine()
    backend = keras.backend.backend()
    return {
        "python": platform.python_version(),
        "keras": keras.__version__,
        # Of the module, because the package may have another name, such as tensorflow-cpu.
        "backend": f"{backend} {importlib.import_module(backend).__version__}",
        "processor": f"{processor}, {cores} core{'s' * (cores > 1)}",
    }


def _steps_made(model):
    # A model with a train_step of its own may have no optimizer, or others.
    return 0 if model.optimizer is None else int(model.optimizer.iterations)


def _key(run):
    return run["variant"], run["seed"], run.get("rate")


def _is_positive_integer(value):
    return _is_integer(value) and value > 0


def _is_integer(value):
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _seeds(seeds):
    """Return the seeds as a list of integers."""
    if _is_positive_integer(seeds):
        return list(range(seeds))
    found = list(seeds) if np.iterable(seeds) else []
    is_valid = found and all(_is_integer(seed) and seed >= 0 for seed in found)
    if not is_valid or len(set(found)) < len(found):
        raise ValueError(f"seeds must be a positive integer, or different integers of at least 0, not {seeds!r}.")
    return [int(seed) for seed in found]


def _resolve_mode(metric, mode):
    if mode in ("max", "min"):
        return mode
    if mode != "auto":
        raise ValueError(f'mode must be "auto", "max" or "min", not {mode!r}.')
    name = metric.lower()
    if name.endswith(("accuracy", "auc", "precision", "recall", "f1_score")) or name == "acc":
        return "max"
    if name.endswith(("loss", "error", "crossentropy", "perplexity", "mse", "mae")):
        return "min"
    raise ValueError(f'The name {metric!r} does not tell whether higher is better: pass mode="max" or mode="min".')


def _floats(figures):
    """Return the numbers among the figures; those of an array NAME are NAME[0], NAME[1], …"""
    numbers = {}
    for name, value in figures.items():
        try:
            array = np.asarray(keras.ops.convert_to_numpy(value), "float64")
        except (TypeError, ValueError):
            continue
        if array.ndim == 0:
            numbers[name] = float(array)
        else:
            numbers |= {f"{name}[{place}]": float(number) for place, number in enumerate(array.ravel())}
    return numbers


def _stable_text(value):
    """Return a value as text that is the same in another process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _stamp(path):
    """Return what tells whether a file was written again."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _code_digest(path):
    """Return a digest of the code in a file or notebook cell, without comments and formatting, or None for no code."""
    linecache.checkcache(path)
    text = "".join(linecache.getlines(path))
    try:
        return None if not text else hashlib.sha256(ast.dump(ast.parse(text)).encode()).hexdigest()
    except (SyntaxError, ValueError):
        # A cell with commands of the notebook's own.
        return hashlib.sha256(text.encode()).hexdigest()


def _check_packages(names):
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"The report of a Comparison needs {', '.join(missing)}: run `pip install {' '.join(missing)}`"
            f"{', or leave save out' * ('matplotlib' in names)}."
        )


def _result_path(path):
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(
            f"{str(path)!r} is a folder: name the result to save in it, such as {str(path / 'NAME')!r}."
        )
    return path.with_suffix("") if path.suffix in (".json", ".svg") else path


def _check_writable(path):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(
            f"Nothing can be saved in {str(path.parent)!r} ({error.strerror}): name a folder that you can write to."
        ) from error
