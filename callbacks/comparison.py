"""Comparison: variants of a model, trained from equal starts over several seeds, judged by their paired differences."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import sys
import tempfile
import textwrap
import threading
import time
import weakref
from pathlib import Path

import keras


class Comparison:
    """A fair experiment: new models, equal starting weights, paired seeds, test data used once, a verdict by one rule.

    Example:

        >>> with Comparison(baseline="plain", metric="loss", test=(x, y)) as comparison:
        ...     for seed in range(2):
        ...         for variant, rate in {"plain": 0.0, "dropout": 0.5}.items():
        ...             keras.utils.set_random_seed(seed)
        ...             model = keras.Sequential([keras.Input((4,)), layers.Dropout(rate), layers.Dense(1)])
        ...             model.compile("sgd", "mse")
        ...             history = model.fit(x, y, verbose=0, callbacks=[comparison.run(variant, seed)])

    On leaving the `with` block a table is printed. It gives for each variant:

    - the mean of the metric over seeds with its 95 % t-interval;
    - its paired difference from the baseline (same seed, same start) with its 95 % t-interval, Bonferroni-adjusted for
      the number of differences;
    - the gap, the training figure minus the test figure, both from `evaluate`;
    - the time per epoch relative to the baseline;
    - the verdict: "better" or "worse" when the whole interval of the difference lies on that side of zero, else "no
      measurable difference at n seeds". One seed gives no verdict.

    The intervals cover seeds, not the choice of test examples. Runs that diverged (with a figure that is not finite)
    are counted, and their variant has no interval. After Ctrl-C, or any other exception, what was finished is reported.

    Args:
        baseline: name of the variant that the others are compared with.
        metric: name of the figure that decides, as `evaluate` names it: "accuracy", "loss", …
        train, validation, test: data for `Model.evaluate`: `(inputs, targets)`, `(inputs, targets, sample_weights)` or
            a data set object. All are evaluated when a run's training ends, and the test data only then. The metric is
            that of the test data, or of the validation data if there is no test data.
        mode: "max" if a higher metric is better, "min" if a lower one is, "auto" to tell by the metric's name.
        same_start: give every variant of a seed the starting weights of the first one. False only for variants that
            differ in shape, or whose starting weights are the subject.
        pretrained: accept models that start from trained weights, on purpose.
        runs: planned number of runs, so that the progress line can tell how far the comparison is.
        settings: dict of what a reader must know to repeat the comparison; shown below the table and saved.
        save: `NAME`, to write `NAME.json` and `NAME.svg` on leaving the `with` block (after an exception,
            `NAME.partial.json` and `NAME.partial.svg`). A suffix .json or .svg is ignored.

    Raises:
        ValueError: `mode` is not one of the three, or "auto" cannot tell by the metric's name.
        OSError: `save` cannot be written.
    """

    def __init__(
        self,
        *,
        baseline,
        metric,
        train=None,
        validation=None,
        test=None,
        mode="auto",
        same_start=True,
        pretrained=False,
        runs=None,
        settings=None,
        save=None,
    ):
        self.baseline = baseline
        self.metric = metric
        self.mode = _resolve_mode(metric, mode)
        self.same_start = same_start
        self.pretrained = pretrained
        self.settings = dict(settings or {})
        self.runs = []
        self.figures = []
        self.signals = []
        self.interrupted = False
        self.environment = environment()
        self._data = {"train": train, "validation": validation, "test": test}
        self._data = {split: data for split, data in self._data.items() if data is not None}
        self.split = "validation" if test is None and validation is not None else "test"
        self._planned_runs = runs
        self._save_path = None if save is None else _result_path(save)
        self._starting_weights = {}
        self._seen_models = []
        self._progress = None
        self._ctrl_c = False
        if self._save_path:
            _check_writable(self._save_path)

    def run(self, variant, seed):
        """Return the callback that makes one `fit` a run of this comparison; it comes last in the list of callbacks.

        Args:
            variant: name of the variant, a string.
            seed: the integer that was given to `keras.utils.set_random_seed` before the model was built.

        Raises:
            ValueError: this variant was run with this seed already; or there is no test and no validation data. From
                `fit`: the model was seen before, was trained already, is not built, or differs in shape from the
                seed's first; or the metric is not among those that the model was compiled with.
        """
        self._check_is_new(variant, seed)
        if self.split not in self._data:
            raise ValueError("There is nothing to compare on: pass test=(inputs, targets) to Comparison.")
        return _Run(self, variant, seed)

    def add(self, variant, seed, metrics, curve=None):
        """Add a run that no single `fit` produces: an ensemble, Monte Carlo passes, signals by layer.

        Args:
            variant: name of the variant, a string.
            seed: the integer seed of the run; figures of equal seeds are compared with each other.
            metrics: dict from a figure's name to its value on the test data; the comparison's metric is among them.
            curve: optional dict from a name to a list of values, one for each epoch.

        Raises:
            ValueError: this variant was run with this seed already, or the comparison's metric is missing.
        """
        self._check_is_new(variant, seed)
        self._check_has_metric(metrics)
        self._finish_run(variant, seed, {self.split: dict(metrics)}, curve or {}, epoch_seconds=[])

    def add_figure(self, variant, seed, name, value):
        """Add a column to the table: a figure of one run beside the metric, such as the number of epochs to a target.

        Args:
            variant, seed: the run, as given to `run` or `add`, which may come before or after.
            name: title of the column, which shows the median over seeds.
            value: a number; it need not be finite.

        Raises:
            ValueError: the run has a figure of this name already.
        """
        self._check_is_single(self.figures, variant, seed, name)
        self.figures.append({"variant": variant, "seed": int(seed), "name": name, "value": float(value)})

    def add_signal(self, variant, seed, name, values, by="layer", scale="linear"):
        """Add a line to the picture whose x-axis is not the epoch: a signal of one run by layer, by step, …

        Args:
            variant, seed: the run, as given to `run` or `add`, which may come before or after.
            name: what is measured, the title of the panel and of its y-axis; signals of one name share a panel.
            values: list of numbers, one for each layer, step, …, counted from 1; those not finite are not drawn.
            by: what the values are counted by, the title of the x-axis.
            scale: "linear" or "log", of the y-axis.

        Raises:
            ValueError: the run has a signal of this name already, or `scale` is neither of the two.
        """
        if scale not in ("linear", "log"):
            raise ValueError(f'scale must be "linear" or "log", not {scale!r}.')
        self._check_is_single(self.signals, variant, seed, name)
        values = [float(value) for value in values]
        self.signals.append(
            {"variant": variant, "seed": int(seed), "name": name, "by": by, "scale": scale, "values": values}
        )

    def summary(self):
        """Return one dict for each variant, the baseline first, computed from `runs`.

        Keys: `variant`; `seeds` and `diverged`, the numbers of runs and of diverged runs; `mean` and `half_width` of
        the metric and its 95 % interval; `difference` and `difference_half_width` of the paired difference from the
        baseline and its adjusted 95 % interval; `gap`, the training figure minus the test figure; `time`, the seconds
        per epoch relative to the baseline, the median over seeds; `figures`, a dict from each name given to
        `add_figure` to its median over seeds; `verdict`. What does not apply is None.

        Raises:
            ValueError: the baseline was not run, or the variants saw different seeds.
        """
        runs = self._comparable_runs()
        return [self._summarise(variant, runs) for variant in runs]

    def table(self):
        """Return `summary()` as a dict from a column's title to its cells, formatted for people."""
        rows = self.summary()
        columns = {
            "variant": [row["variant"] for row in rows],
            f"{self.split} {self.metric}": [
                f"{row['diverged']} of {row['seeds']} diverged"
                if row["diverged"]
                else _with_interval(row["mean"], row["half_width"])
                for row in rows
            ],
            "difference": [_with_interval(row["difference"], row["difference_half_width"], sign="+") for row in rows],
            "gap": [_number(row["gap"], sign="+") for row in rows],
            **{name: [_figure_cell(row["figures"].get(name)) for row in rows] for name in _figure_names(rows)},
            "time": ["–" if row["time"] is None else f"{row['time']:.2f}" for row in rows],
            "verdict": [(row["verdict"] or "–").removesuffix(f" at {row['seeds']} seeds") for row in rows],
        }
        return {title: cells for title, cells in columns.items() if set(cells) != {"–"}}

    def notes(self):
        """Return the sentences that say what the columns of `table()` mean."""
        rows = self.summary()
        seeds, differences = rows[0]["seeds"], len(rows) - 1
        notes = []
        if self.interrupted:
            notes.append(f"Interrupted. Finished runs: {len(self.runs)}; only seeds that can be compared are shown.")
        if seeds == 1:
            notes.append("One seed: no interval and no verdict. More seeds give both (in a recipe: --seeds 5).")
        else:
            notes.append(
                f"{seeds} paired seeds; ± is a 95 % t-interval over seeds, that of a difference adjusted for "
                f"{differences}. It does not cover the choice of {self.split} examples."
            )
        if any(row["gap"] is not None for row in rows):
            notes.append(f"gap: training minus {self.split} {self.metric}, both by evaluate().")
        if any(row["time"] is not None for row in rows):
            notes.append("time: per epoch, relative to the baseline.")
        if seeds > 1 and (names := _figure_names(rows)):
            notes.append(f"{', '.join(names)}: median over seeds.")
        settings = [f"{name} {value}" for name, value in self.settings.items() if value is not None]
        if settings:
            notes.append(f"settings: {', '.join(settings)}.")
        return notes

    def report(self):
        """Print `table()`, the figures from `add_figure` as a table of their own, and `notes()`."""
        from rich.console import Console

        columns = self.table()
        figures = {name: columns.pop(name) for name in _figure_names(self.summary())}
        console = Console()
        console.print(_rich_table(columns))
        if figures:
            console.print(_rich_table({"variant": columns["variant"]} | figures))
        console.print("\n".join(self.notes()), style="dim", highlight=False)

    def plot(self, path):
        """Draw signals, the metric by epoch and the paired differences, and write them to the SVG file `path`.

        Lines are means over seeds and bands their 95 % t-intervals, both of the logarithms on a logarithmic axis; small
        dots are single seeds.
        """
        import matplotlib

        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "comparison", "font.family": "sans-serif"}):
            figure = self._figure()
            with replacing(Path(path)) as temporary:
                # Without a date the same result gives the same file.
                figure.savefig(temporary, format="svg", metadata={"Date": None})

    def save(self, path):
        """Write the picture to `NAME.svg`, then the result to `NAME.json`; each is written whole or not at all.

        Args:
            path: `NAME`, with or without .json or .svg at its end.
        """
        path = _result_path(path)
        # JSON has no notation for numbers that are not finite: they become the texts "NaN", "Infinity", "-Infinity".
        content = json.loads(json.dumps(self._as_dict(), default=str), parse_constant=str)
        self.plot(path.with_name(path.name + ".svg"))
        write_whole(path.with_name(path.name + ".json"), json.dumps(content, indent=1) + "\n")

    @classmethod
    def load(cls, path):
        """Return the comparison that `save` wrote to the JSON file `path`, without its data."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        comparison = cls(
            baseline=content["baseline"],
            metric=content["metric"],
            mode=content["mode"],
            same_start=content["same_start"],
            settings=content["settings"],
        )
        comparison.split = content["split"]
        comparison.interrupted = content["interrupted"]
        comparison.environment = content["environment"]
        comparison.runs = _with_numbers(content["runs"])
        comparison.figures = _with_numbers(content["figures"])
        comparison.signals = _with_numbers(content["signals"])
        return comparison

    def __enter__(self):
        from rich import progress
        from rich.console import Console

        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=12),
            progress.MofNCompleteColumn(),
            progress.TextColumn("runs"),
            progress.TimeElapsedColumn(),
            # The table goes to the standard output, alone.
            console=Console(stderr=True),
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("starting", total=self._planned_runs)
        self._progress.start()
        self._handler = signal.getsignal(signal.SIGINT)
        if callable(self._handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._note_ctrl_c)
        return self

    def __exit__(self, exception_type, exception, traceback):
        if signal.getsignal(signal.SIGINT) == self._note_ctrl_c:
            signal.signal(signal.SIGINT, self._handler)
        self._progress.stop()
        self._progress = None
        self.interrupted = exception_type is not None
        if self.interrupted and not self.runs:
            return
        self.report()
        if self._save_path:
            suffix = ".partial" if self.interrupted else ""
            self.save(self._save_path.with_name(self._save_path.name + suffix))

    def _note_ctrl_c(self, number, frame):
        self._ctrl_c = True
        self._handler(number, frame)

    def _raise_ctrl_c(self):
        """Raise the KeyboardInterrupt that got lost: Python drops those that reach it while it collects garbage."""
        if self._ctrl_c:
            raise KeyboardInterrupt

    def _show_progress(self, text, fraction_of_run=0.0):
        if self._progress is not None:
            self._progress.update(self._task, description=text, completed=len(self.runs) + fraction_of_run)

    def _check_is_new(self, variant, seed):
        if any(run["variant"] == variant and run["seed"] == seed for run in self.runs):
            raise ValueError(
                f"{variant!r} was run with seed {seed} already: a second run would count one seed twice. "
                "Give every run of a variant its own seed."
            )

    def _check_is_single(self, entries, variant, seed, name):
        if any((entry["variant"], entry["seed"], entry["name"]) == (variant, seed, name) for entry in entries):
            raise ValueError(f"The run of {variant!r} with seed {seed} has a {name!r} already: give each its own name.")

    def _check_has_metric(self, metrics):
        if self.metric not in metrics:
            raise ValueError(
                f"The metric {self.metric!r} is not among {sorted(metrics)}: "
                f"compile the model with metrics=[{self.metric!r}], or compare another metric."
            )

    def _check_model(self, model, variant, seed):
        remedy = "Build and compile a new model for every run, inside the loop over variants."
        if not model.built:
            raise ValueError(
                f"The model of {variant!r}, seed {seed}, is not built, so it has no starting weights to compare from. "
                "Begin it with keras.Input(shape), or call model.build(input_shape) first."
            )
        for seen_model, seen_as in self._seen_models:
            if seen_model() is model:
                raise ValueError(
                    f"The model of {variant!r}, seed {seed}, was trained in this comparison before, as {seen_as}. "
                    f"{remedy}"
                )
        if not self.pretrained and (int(model.optimizer.iterations) > 0 or _is_trained(model)):
            raise ValueError(
                f"The model of {variant!r}, seed {seed}, has been trained already; compile() does not reset weights. "
                f"{remedy} If trained weights are the start on purpose, pass pretrained=True to Comparison."
            )

    def _start(self, model, variant, seed):
        """Make the starting weights those of the seed's first variant."""
        # Weak, so that models can be freed.
        self._seen_models.append((weakref.ref(model), f"{variant!r}, seed {seed}"))
        if not self.same_start:
            return
        weights = model.trainable_variables
        if seed not in self._starting_weights:
            # Copies, because a backend may train in the memory that convert_to_numpy shows.
            self._starting_weights[seed] = [keras.ops.convert_to_numpy(weight).copy() for weight in weights]
        start = self._starting_weights[seed]
        shapes, start_shapes = [tuple(weight.shape) for weight in weights], [weight.shape for weight in start]
        if shapes != start_shapes:
            raise ValueError(
                f"{variant!r} has trainable weights of shapes {shapes}, the first variant of seed {seed} had "
                f"{start_shapes}: they cannot start equal. If the variants are meant to differ in shape, pass "
                "same_start=False to Comparison."
            )
        for weight, value in zip(weights, start, strict=True):
            weight.assign(value)

    def _evaluate(self, model):
        """Return the figures of every split. This is the only place where test data is used."""
        metrics = {}
        for split, data in self._data.items():
            inputs, targets, sample_weights = keras.utils.unpack_x_y_sample_weight(data)
            batch_size = None if targets is None else 256  # a data set object has its own
            metrics[split] = model.evaluate(
                inputs, targets, sample_weight=sample_weights, batch_size=batch_size, verbose=0, return_dict=True
            )
        return metrics

    def _finish_run(self, variant, seed, metrics, curve, epoch_seconds):
        self.runs.append(
            {
                "variant": variant,
                "seed": int(seed),
                "metrics": {split: _floats(figures) for split, figures in metrics.items()},
                "curve": {name: [float(value) for value in values] for name, values in curve.items()},
                "epoch_seconds": epoch_seconds,
            }
        )
        self._show_progress(f"seed {seed} · {variant}")
        if self._progress is not None and not self._progress.console.is_terminal:
            figure = _number(self._figure_of(self.runs[-1]))
            self._progress.console.print(
                f"seed {seed} · {variant}: {self.split} {self.metric} {figure}", highlight=False
            )
        self._raise_ctrl_c()

    def _comparable_runs(self):
        """Return {variant: {seed: run}}, the baseline first, with the same seeds for all."""
        runs = {}
        for run in sorted(self.runs, key=lambda run: run["variant"] != self.baseline):
            runs.setdefault(run["variant"], {})[run["seed"]] = run
        seeds = {variant: sorted(by_seed) for variant, by_seed in runs.items()}
        if self.interrupted:
            # The seeds that every variant finished or, failing that, the variants that finished the first seed.
            shared = set.intersection(*map(set, runs.values())) or {self.runs[0]["seed"]}
            runs = {
                variant: {seed: by_seed[seed] for seed in sorted(shared)}
                for variant, by_seed in runs.items()
                if shared <= set(by_seed)
            }
        elif self.baseline not in runs:
            raise ValueError(f"The baseline {self.baseline!r} is not among the variants that were run: {list(runs)}.")
        elif any(variant_seeds != seeds[self.baseline] for variant_seeds in seeds.values()):
            raise ValueError(
                f"The variants saw different seeds, so they cannot be paired: {seeds}. Run the missing ones."
            )
        return runs

    def _summarise(self, variant, runs):
        by_seed, baseline = runs[variant], runs.get(self.baseline, {})
        row = {
            "variant": variant,
            "seeds": len(by_seed),
            "diverged": sum(map(self._diverged, by_seed.values())),
            "mean": None,
            "half_width": None,
            "difference": None,
            "difference_half_width": None,
            "gap": None,
            "time": _relative_time(by_seed, baseline),
            "figures": self._medians(variant, by_seed),
            "verdict": "baseline" if variant == self.baseline else None,
        }
        if row["diverged"]:
            row["verdict"] = "diverged"
            return row
        figures = [self._figure_of(run) for run in by_seed.values()]
        row["mean"] = statistics.fmean(figures)
        row["half_width"] = _half_width(figures, 0.95)
        if all("train" in run["metrics"] for run in by_seed.values()):
            training_figures = [run["metrics"]["train"][self.metric] for run in by_seed.values()]
            row["gap"] = statistics.fmean(training_figures) - row["mean"]
        if variant == self.baseline or not baseline:
            return row
        if any(map(self._diverged, baseline.values())):
            row["verdict"] = "the baseline diverged"
            return row
        differences = self._differences(by_seed, baseline)
        row["difference"] = statistics.fmean(differences)
        row["difference_half_width"] = _half_width(differences, 1 - 0.05 / (len(runs) - 1))
        row["verdict"] = self._verdict(row["difference"], row["difference_half_width"], row["seeds"])
        return row

    def _medians(self, variant, by_seed):
        """Return {name: median over the seeds} of a variant's figures from `add_figure`."""
        values = {}
        for figure in self.figures:
            if figure["variant"] == variant and figure["seed"] in by_seed:
                values.setdefault(figure["name"], []).append(figure["value"])
        return {name: statistics.median(of_seeds) for name, of_seeds in values.items()}

    def _verdict(self, difference, half_width, seeds):
        if half_width is None:
            return "no verdict"
        gain = difference if self.mode == "max" else -difference
        if gain - half_width > 0:
            return "better"
        if gain + half_width < 0:
            return "worse"
        return f"no measurable difference at {seeds} seeds"

    def _figure_of(self, run):
        return run["metrics"][self.split][self.metric]

    def _differences(self, by_seed, baseline):
        return [self._figure_of(by_seed[seed]) - self._figure_of(baseline[seed]) for seed in by_seed]

    def _diverged(self, run):
        figures = [*run["metrics"][self.split].values(), *run["curve"].get("loss", [])[-1:]]
        return not all(map(math.isfinite, figures))

    def _figure(self):
        import pandas
        import seaborn
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D

        runs = self._comparable_runs()
        palette = dict(zip(runs, seaborn.color_palette("colorblind", len(runs)), strict=True))
        panels = self._panels(runs)
        columns = 2 if len(panels) == 3 else min(len(panels) + 1, 3)
        rows = math.ceil((len(panels) + 1) / columns)
        with seaborn.axes_style("whitegrid"):
            figure = Figure(figsize=(4 * columns, 3.6 * rows + 0.3), layout="constrained")
            axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for position, panel in enumerate(panels):
            table = pandas.DataFrame(panel["points"], columns=["variant", panel["by"], "value"])
            # A curve ends where most of its runs have, for the mean and interval of the few that go on mislead.
            counts = table.groupby(["variant", panel["by"]])["value"].transform("size")
            table = table[2 * counts >= counts.groupby(table["variant"]).transform("max")]
            seaborn.lineplot(
                table,
                x=panel["by"],
                y="value",
                hue="variant",
                palette=palette,
                hue_order=list(runs),
                estimator=_geometric_mean if panel["scale"] == "log" else "mean",
                errorbar=_geometric_band if panel["scale"] == "log" else _band,
                marker="o" if table[panel["by"]].nunique() == 1 else None,
                legend=False,
                ax=axes[position],
            )
            axes[position].set(title=textwrap.fill(panel["title"], 40), ylabel=panel["ylabel"], yscale=panel["scale"])
            axes[position].xaxis.get_major_locator().set_params(integer=True)
        of_metric = [axes[position] for position, panel in enumerate(panels) if panel["ylabel"] == self.metric]
        ends = [end for each in of_metric for end in each.get_ylim()]
        for each in of_metric:
            each.set_ylim(min(ends), max(ends))
        self._draw_differences(axes[len(panels)], runs, palette)
        handles = [Line2D([], [], color=color, label=variant) for variant, color in palette.items()]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
        for unused in axes[len(panels) + 1 :]:
            unused.remove()
        return figure

    def _panels(self, runs):
        """Return a dict for each panel with lines: those of the signals, then those of the metric by epoch."""
        panels = {}
        for entry in self.signals:
            name, by, scale = entry["name"], entry["by"], entry["scale"]
            if entry["seed"] in runs.get(entry["variant"], {}):
                title = f"{name} by {by}"
                panel = {"title": title, "ylabel": name, "by": by, "scale": scale, "points": []}
                panels.setdefault(title, panel)["points"] += _points(entry["variant"], entry["values"], scale)
        metric = self.metric
        curves = {f"training {metric}, as logged": metric, f"validation {metric}": f"val_{metric}"}
        for title, name in curves.items():
            points = [
                point
                for variant, by_seed in runs.items()
                for run in by_seed.values()
                for point in _points(variant, run["curve"].get(name, []), "linear")
            ]
            if points:
                panels[title] = {"title": title, "ylabel": metric, "by": "epoch", "scale": "linear", "points": points}
        return list(panels.values())

    def _draw_differences(self, axes, runs, palette):
        """Draw each variant's paired differences from the baseline: dots for seeds, the mean with its interval."""
        rows = {row["variant"]: row for row in self.summary()}
        variants = [variant for variant in runs if variant != self.baseline]
        for position, variant in enumerate(variants):
            row = rows[variant]
            if row["difference"] is None:
                middle = axes.get_yaxis_transform()
                axes.text(0.5, position, row["verdict"], ha="center", va="center", transform=middle)
                continue
            differences = self._differences(runs[variant], runs[self.baseline])
            color = palette[variant]
            axes.plot(differences, [position] * len(differences), ".", color=color, alpha=0.5)
            axes.errorbar(
                row["difference"], position, xerr=row["difference_half_width"], fmt="o", capsize=4, color=color
            )
        axes.axvline(0, color="black", linewidth=1)
        axes.xaxis.get_major_locator().set_params(nbins=5)
        axes.set_yticks(range(len(variants)), variants)
        axes.set_ylim(max(len(variants), 1) - 0.5, -0.5)
        axes.set(title=f"{self.split} {self.metric}: difference from\n{self.baseline}", xlabel="difference")

    def _as_dict(self):
        return {
            "baseline": self.baseline,
            "metric": self.metric,
            "mode": self.mode,
            "split": self.split,
            "same_start": self.same_start,
            "interrupted": self.interrupted,
            "settings": self.settings,
            "environment": self.environment,
            "runs": self.runs,
            "figures": self.figures,
            "signals": self.signals,
        }


class _Run(keras.callbacks.Callback):
    """One `fit` of a comparison: checks the model, sets its start, keeps logs and times, evaluates at the end."""

    def __init__(self, comparison, variant, seed):
        super().__init__()
        self.comparison = comparison
        self.variant = variant
        self.seed = seed

    def set_model(self, model):
        super().set_model(model)
        self.comparison._check_model(model, self.variant, self.seed)

    def on_train_begin(self, logs=None):
        self.comparison._check_is_new(self.variant, self.seed)
        self.comparison._start(self.model, self.variant, self.seed)
        self.curve = {}
        self.epoch_seconds = []
        self._show_progress("", 0.0)

    def on_epoch_begin(self, epoch, logs=None):
        self.comparison._raise_ctrl_c()
        self._epoch_start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.epoch_seconds.append(time.perf_counter() - self._epoch_start)
        self.comparison._check_has_metric(logs)
        for name, value in logs.items():
            self.curve.setdefault(name, []).append(float(value))
        self._show_progress(f" · epoch {epoch + 1}/{self.params['epochs']}", (epoch + 1) / self.params["epochs"])

    def on_train_end(self, logs=None):
        metrics = self.comparison._evaluate(self.model)
        self.comparison._finish_run(self.variant, self.seed, metrics, self.curve, self.epoch_seconds)

    def _show_progress(self, text, fraction_of_run):
        self.comparison._show_progress(f"seed {self.seed} · {self.variant}{text}", fraction_of_run)


def _figure_names(rows):
    return list(dict.fromkeys(name for row in rows for name in row["figures"]))


def _rich_table(columns):
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in columns:
        words = title in ("variant", "verdict")
        table.add_column(title, justify="left" if words else "right", no_wrap=not words)
    styles = {"better": "green", "worse": "red", "diverged": "red"}
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells, style=styles.get(cells[-1]))
    return table


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


def _is_trained(model):
    """Whether no trainable kernel is as its initializer made it: called again, an initializer repeats itself."""
    kernels = [
        (variable, initializer)
        # Private: there is no public way to walk nested layers and RNN cells. Tried on Keras 3.15.
        for layer in model._flatten_layers()
        for variable in layer.trainable_variables
        if hasattr(initializer := getattr(layer, f"{variable.name}_initializer", None), "seed")
    ]
    return bool(kernels) and not any(
        bool(keras.ops.all(keras.ops.equal(initializer(variable.shape, dtype=variable.dtype), variable.value)))
        for variable, initializer in kernels
    )


def _half_width(values, confidence):
    """Return half the width of the mean's t-interval, or None for a single value."""
    if len(values) < 2:
        return None
    from scipy import stats

    return float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * stats.sem(values))


def _points(variant, values, scale):
    """Return the values that an axis of this scale can show, as (variant, place counted from 1, value)."""
    return [
        (variant, place, value)
        for place, value in enumerate(values, start=1)
        if math.isfinite(value) and (scale == "linear" or value > 0)
    ]


def _band(values):
    mean, half_width = statistics.fmean(values), _half_width(list(values), 0.95) or 0.0
    return mean - half_width, mean + half_width


def _geometric_mean(values):
    return math.exp(statistics.fmean(map(math.log, values)))


def _geometric_band(values):
    low, high = _band([math.log(value) for value in values])
    return math.exp(low), math.exp(high)


def _relative_time(by_seed, baseline):
    """Return the ratio of the median epoch times, the median over seeds, or None where there are no times."""
    if not baseline or not all(run["epoch_seconds"] for runs in (by_seed, baseline) for run in runs.values()):
        return None

    def epoch_time(run):
        # The first epoch compiles the model, so it counts only if it is the only one.
        return statistics.median(run["epoch_seconds"][1:] or run["epoch_seconds"])

    return statistics.median(epoch_time(run) / epoch_time(baseline[seed]) for seed, run in by_seed.items())


def _number(value, sign="-"):
    if value is None:
        return "–"
    precision = ".4f" if value == 0 or 1e-3 <= abs(value) < 1e3 else ".3g"
    return format(value, sign + precision)


def _figure_cell(value):
    is_whole = value is not None and abs(value) < 1e6 and value == int(value)
    return f"{value:.0f}" if is_whole else _number(value)


def _with_interval(value, half_width, sign="-"):
    if value is None or half_width is None:
        return _number(value, sign)
    precision = ".4f" if 1e-3 <= max(abs(value), half_width) < 1e3 else ".3g"
    return f"{value:{sign}{precision}} ± {half_width:{precision}}"


def _floats(figures):
    return {name: float(value) for name, value in figures.items()}


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
        "backend": f"{backend} {importlib.metadata.version(backend)}",
        "processor": f"{processor}, {cores} core{'s' * (cores > 1)}",
    }


def _with_numbers(value):
    """Return `value` with numbers in the place of the texts that stand for those that are not finite."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


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


@contextlib.contextmanager
def replacing(path):
    """Give a temporary path beside `path` to write to; when the block ends well, it takes the place of `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path, text):
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
