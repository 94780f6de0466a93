"""Result: the runs of a comparison as plain data, with their summary and verdicts; nothing here needs Keras."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import statistics
from pathlib import Path

from .statistics import MOST_SEEDS, half_width, judge

# What must be equal for two results to be of the same experiment.
IDENTITY = (
    "baseline",
    "metric",
    "mode",
    "split",
    "margin",
    "same_start",
    "pretrained",
    "settings",
    "variants",
    "grid",
    "data",
    "code",
    "recipe",
    "digest",
)
VERSIONS = ("python", "keras", "backend", "order")

# The order of examples, which results say so that they are not mixed with those of before `comparison.order` was made.
ORDER = "new in each epoch"

NO_VERDICT = "no verdict"
REPEATED = "no verdict: seeds repeat each other"

TEXTS = ("variant", "name", "by", "scale", "at", "at_scale")


@dataclasses.dataclass
class Result:
    """The runs of a comparison, and what a reader must know to repeat them.

    Example:

        >>> result = Result(baseline="plain", metric="loss", mode="min")
        >>> for seed, (plain, dropout) in enumerate([(0.50, 0.40), (0.60, 0.50)]):
        ...     result.add_run("plain", seed, {"test": {"loss": plain}})
        ...     result.add_run("dropout", seed, {"test": {"loss": dropout}})
        >>> difference = result.summary()[1]["difference"]

    Attributes:
        baseline: name of the variant that the others are compared with.
        metric, mode, split: name of the figure that decides, "max" or "min", and "test" or "validation".
        margin: smallest difference that matters, or None.
        same_start, pretrained: whether the variants of a seed start equal, and whether from trained weights.
        settings: dict of what a reader must know to repeat the experiment.
        columns: dict from the name of a figure of its own to the sentence that explains it.
        variants: dict from a variant's name to its value, as text.
        grid: list of the rates of a search, or None for a comparison.
        data: dict from a split to what it holds: numbers of examples, shapes, number of classes.
        environment: dict with the versions, the order of examples and the processor.
        code: digest of the file that made the comparison, or None.
        recipe, digest: those of the evidence runner, or None.
        interrupted: whether runs are missing, because the comparison has not ended, or was interrupted.
        unequal_starts: dict from a variant to the names of the weights whose start is not that of the first variant.
        runs: list of dicts with `variant`, `seed`, `metrics` (by split), `curve` (by name, a value for each epoch),
            `epochs` (by name, where not every epoch has a value), `epoch_seconds` (of steps and callbacks, without
            validation) and, in a search, `rate`.
        figures: list of dicts with `variant`, `seed`, `name` and `value`.
        signals: list of dicts with `variant`, `seed`, `name`, `by`, `scale`, `values` and, if not 1, 2, …, `at`, which
            may have its `at_scale`.
        start: dict with `seed` and `weights` (text) of an unfinished seed, for those who go on with it, or None.
    """

    baseline: str | None
    metric: str
    mode: str
    split: str = "test"
    margin: float | None = None
    same_start: bool = True
    pretrained: bool = False
    settings: dict = dataclasses.field(default_factory=dict)
    columns: dict = dataclasses.field(default_factory=dict)
    variants: dict = dataclasses.field(default_factory=dict)
    grid: list | None = None
    data: dict = dataclasses.field(default_factory=dict)
    environment: dict = dataclasses.field(default_factory=dict)
    code: str | None = None
    recipe: str | None = None
    digest: str | None = None
    interrupted: bool = False
    unequal_starts: dict = dataclasses.field(default_factory=dict)
    runs: list = dataclasses.field(default_factory=list)
    figures: list = dataclasses.field(default_factory=list)
    signals: list = dataclasses.field(default_factory=list)
    start: dict | None = None

    @classmethod
    def load(cls, path):
        """Return the result in the JSON file `path`.

        Raises:
            OSError: the file cannot be read.
            ValueError: it holds no result.
        """
        path = Path(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = {field.name for field in dataclasses.fields(cls)}
            # The first files had no margin, for none was declared but the usual one.
            content = {"margin": usual_margin(content["metric"])} | content
            loaded = cls(**{name: value for name, value in content.items() if name in names})
            for name in ("runs", "figures", "signals"):
                entries = [
                    # A variant may well be called "NaN".
                    {key: value if key in TEXTS else _with_numbers(value) for key, value in entry.items()}
                    for entry in getattr(loaded, name)
                ]
                setattr(loaded, name, entries)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{str(path)!r} holds no result of a comparison: {error}. Name the JSON of one."
            ) from error
        return loaded

    def save(self, path):
        """Write the JSON file `path`, whole or not at all."""
        write_whole(Path(path), self.to_json())

    def to_json(self):
        """Return the text of the JSON file; numbers that are not finite become "NaN", "Infinity" and "-Infinity"."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content = _as_json({name: value for name, value in content.items() if value is not None})
        return json.dumps(content, indent=1) + "\n"

    def merge(self, *others):
        """Return one result of this one and of others that hold other seeds of the same experiment.

        Raises:
            ValueError: they are not of one experiment (other settings, data, code, versions, …), or two of them hold
                the same seed.
        """
        merged = copy.deepcopy(self)
        merged.start = None
        for result in others:
            if differing := merged.differences_from(result):
                raise ValueError(
                    f"The results are not of one experiment, for they differ in {'; '.join(differing)}. "
                    "Merge only what was made with one code, one set of settings, and one version of everything."
                )
            if twice := {run["seed"] for run in merged.runs} & {run["seed"] for run in result.runs}:
                raise ValueError(
                    f"Two of the results hold seed {min(twice)}, which would count twice. Give each seed once."
                )
            merged.interrupted |= result.interrupted
            merged.unequal_starts |= result.unequal_starts
            merged.variants = result.variants | merged.variants
            processors = [each.environment.get("processor") for each in (merged, result)]
            if processors[0] != processors[1] and all(processors):
                known = processors[0].split("; ")
                merged.environment["processor"] = "; ".join(dict.fromkeys([*known, *processors[1].split("; ")]))
            for name in ("runs", "figures", "signals"):
                getattr(merged, name).extend(copy.deepcopy(getattr(result, name)))
        variants = list(dict.fromkeys(run["variant"] for run in merged.runs))
        for name in ("runs", "figures", "signals"):
            getattr(merged, name).sort(key=lambda entry: (entry["seed"], variants.index(entry["variant"])))
        return merged

    def differences_from(self, other):
        """Return in words what tells this experiment from another one's result; versions count, processors do not."""

        pairs = {name: (getattr(self, name), getattr(other, name)) for name in IDENTITY}
        pairs |= {name: (self.environment.get(name), other.environment.get(name)) for name in VERSIONS}
        differing = []
        for name, (mine, others) in pairs.items():
            if _as_json(mine) == _as_json(others):
                continue
            if name in ("settings", "data", "variants"):
                mine, others = _as_json(mine), _as_json(others)
                # Another call may have further variants.
                keys = mine.keys() & others.keys() if name == "variants" else mine | others
                differing += [
                    f"{name}: {key} {mine.get(key)!r} and {others.get(key)!r}"
                    for key in keys
                    if mine.get(key) != others.get(key)
                ]
            elif name in ("code", "digest"):
                differing.append(f"{name} (it was changed)")
            else:
                differing.append(f"{name}: {mine!r} and {others!r}")
        return differing

    def add_run(self, variant, seed, metrics, curve=None, epochs=None, epoch_seconds=(), rate=None):
        """Add a run; `metrics` maps a split to a dict of figures."""
        run = {
            "variant": variant,
            "seed": seed,
            "metrics": metrics,
            "curve": curve or {},
            "epoch_seconds": list(epoch_seconds),
        }
        run |= {name: value for name, value in (("epochs", epochs), ("rate", rate)) if value}
        self.runs.append(run)

    def comparable_runs(self):
        """Return {variant: {seed: run}}, the baseline first, with the same seeds for all.

        Raises:
            ValueError: the baseline was not run, or the variants saw different seeds, unless it was interrupted; or
                this is a search.
        """
        if self.grid is not None:
            raise ValueError("This is the result of a search: call search_summary().")
        baseline = self.baseline
        runs = {}
        for run in sorted(self.runs, key=lambda run: run["variant"] != baseline):
            runs.setdefault(run["variant"], {})[run["seed"]] = run
        seeds = {variant: sorted(by_seed) for variant, by_seed in runs.items()}
        if self.interrupted and runs:
            # The seeds that every variant finished or, failing that, the variants that finished the first seed.
            shared = set.intersection(*map(set, runs.values())) or {self.runs[0]["seed"]}
            return {
                variant: {seed: by_seed[seed] for seed in sorted(shared)}
                for variant, by_seed in runs.items()
                if shared <= set(by_seed)
            }
        if baseline not in runs:
            raise ValueError(f"The baseline {baseline!r} is not among the variants that were run: {list(runs)}.")
        if any(variant_seeds != seeds[baseline] for variant_seeds in seeds.values()):
            raise ValueError(
                f"The variants saw different seeds, so they cannot be paired: {seeds}. Run the missing ones."
            )
        return runs

    def summary(self):
        """Return one dict for each variant, the baseline first, computed from `runs`.

        Keys: `variant`; `seeds` and `diverged`, the numbers of runs and of diverged runs; `mean` and `half_width` of
        the metric and its 95 % interval, over the runs that did not diverge; `difference`, `difference_half_width` and
        `range`, the mean of the paired differences from the baseline, its adjusted 95 % interval and the lowest and
        highest, over the `pairs` seeds in which neither diverged; `gap`, the training figure minus the test figure;
        `time` and `time_quartiles`, the seconds per epoch relative to the baseline, the median over seeds and its
        quartiles; `figures`, a dict from each name given to `add_figure` to its median over seeds; `repeats`, the seeds
        whose figures equal another seed's to the bit; `verdict`, "baseline", "no verdict" or in words, `short_verdict`,
        `by_divergence` and `seeds_needed`. What does not apply is None.

        Raises:
            ValueError: the baseline was not run, the variants saw different seeds, or this is a search.
        """
        runs = self.comparable_runs()
        repeats = {variant: self._repeated_seeds(by_seed) for variant, by_seed in runs.items()}
        return [self._summarise(variant, runs, repeats) for variant in runs]

    def headline(self, variant=None, figure=None):
        """Return what the seeds say of one variant against the baseline, in the metric or in another figure.

        Keys, as in `summary`: `variant`, `seeds`, `pairs`, `difference`, `difference_half_width`, `range`, `verdict`,
        `short_verdict`, `by_divergence` and `seeds_needed`; and `figure`, its name, None for the metric. The interval
        is adjusted for the number of differences in the table, so that it is the one that the table shows. A figure
        that is missing or not finite, such as the epochs to an accuracy that was never reached, counts as divergence
        does, and no margin applies to it.

        Args:
            variant: the last one if None.
            figure: name of a figure that `add_figure` added and of which less is better; None for the metric.

        Raises:
            ValueError: there is no such variant beside the baseline, or no such figure; or as for `summary`.
        """
        runs = self.comparable_runs()
        others = [name for name in runs if name != self.baseline]
        variant = others[-1] if variant is None and others else variant
        if variant not in others:
            raise ValueError(f"There is no variant {variant!r} beside the baseline: choose from {others}.")
        keys = ("variant", "seeds", "pairs", "difference", "difference_half_width", "range", "verdict")
        keys += ("short_verdict", "by_divergence", "seeds_needed")
        repeats = {name: self._repeated_seeds(runs[name]) for name in (variant, self.baseline) if name in runs}
        row = self._summarise(variant, runs, repeats)
        if figure is not None:
            values = {(each["variant"], each["seed"]): each["value"] for each in self.figures if each["name"] == figure}
            if not values:
                names = list(dict.fromkeys(each["name"] for each in self.figures))
                raise ValueError(f"There is no figure {figure!r}: choose from {names}.")
            pairs = [(values.get((variant, seed)), values.get((self.baseline, seed))) for seed in runs[variant]]
            judged = self._judge_pairs(pairs, len(others), margin=None, lower_is_better=True, lack=f"has no {figure}")
            row |= judged | ({"verdict": REPEATED, "short_verdict": None} if row["verdict"] == REPEATED else {})
        return {"figure": figure} | {key: row[key] for key in keys}

    def search_summary(self):
        """Return one dict for each variant of a search: `variant`, `means`, `best`, `at_edge` and `alike`.

        `means` maps each rate to the mean over seeds of the metric, or None where a run diverged or none was made;
        `best` is the rate with the best mean, among equal ones the middle one, as where nothing is learned at any rate,
        and None if there is none; `alike` tells whether all means lie within the margin, as at chance, so that the rate
        is not what matters; `at_edge` whether it is not so, and the best rate is the lowest or the highest of the grid:
        a better one may lie beyond.
        """
        figures = {}
        for run in self.runs:
            value = math.nan if self.has_diverged(run) else self.figure_of(run)
            figures.setdefault(run["variant"], {}).setdefault(run["rate"], []).append(value)
        rows = []
        for variant, by_rate in figures.items():
            means = {rate: statistics.fmean(by_rate.get(rate, [math.nan])) for rate in self.grid}
            known = {rate: mean for rate, mean in means.items() if math.isfinite(mean)}
            top = (max if self.mode == "max" else min)(known.values(), default=None)
            best = statistics.median_high(rate for rate in known if known[rate] == top) if known else None
            alike = len(known) > 1 and max(known.values()) - min(known.values()) < (self.margin or 0.0)
            rows.append(
                {
                    "variant": variant,
                    "means": {rate: known.get(rate) for rate in means},
                    "best": best,
                    "at_edge": best is not None and not alike and best in (min(self.grid), max(self.grid)),
                    "alike": alike,
                }
            )
        return rows

    def figure_of(self, run):
        figures = run["metrics"][self.split]
        if self.metric not in figures:
            raise ValueError(f"The metric {self.metric!r} is not among {sorted(figures)} of {run['variant']!r}.")
        return figures[self.metric]

    def has_diverged(self, run):
        figures = [self.figure_of(run), *run["metrics"][self.split].values(), *run["curve"].get("loss", [])[-1:]]
        return not all(map(math.isfinite, figures))

    def differences(self, by_seed, baseline):
        """Return {seed: difference from the baseline} of the seeds in which neither run diverged."""
        return {
            seed: self.figure_of(run) - self.figure_of(baseline[seed])
            for seed, run in by_seed.items()
            if not self.has_diverged(run) and not self.has_diverged(baseline[seed])
        }

    def _summarise(self, variant, runs, repeats):
        by_seed, baseline = runs[variant], runs.get(self.baseline, {})
        finite = [run for run in by_seed.values() if not self.has_diverged(run)]
        figures = [self.figure_of(run) for run in finite]
        row = {
            "variant": variant,
            "seeds": len(by_seed),
            "diverged": len(by_seed) - len(finite),
            "mean": statistics.fmean(figures) if figures else None,
            "half_width": half_width(figures),
            "pairs": None,
            "difference": None,
            "difference_half_width": None,
            "range": None,
            "gap": None,
            "time": None,
            "time_quartiles": None,
            "figures": self._medians(variant, by_seed),
            "repeats": repeats[variant],
            "verdict": "baseline" if variant == self.baseline else NO_VERDICT,
            "short_verdict": None,
            "by_divergence": False,
            "seeds_needed": None,
        }
        if ratios := _relative_times(by_seed, baseline):
            row["time"] = statistics.median(ratios)
            row["time_quartiles"] = _quartiles(ratios)
        if finite and all(self.metric in run["metrics"].get("train", {}) for run in finite):
            row["gap"] = statistics.fmean(run["metrics"]["train"][self.metric] for run in finite) - row["mean"]
        if variant != self.baseline and baseline:
            row |= self._judge(by_seed, baseline, len(runs) - 1)
            repeated = any(repeats[name] and _figures_of_a_run(runs[name]) > 1 for name in (variant, self.baseline))
            if repeated and row["verdict"] != NO_VERDICT:
                row |= {"verdict": REPEATED, "short_verdict": None}
        return row

    def _judge(self, by_seed, baseline, differences_in_table):
        pairs = [
            [None if self.has_diverged(run) else self.figure_of(run) for run in (own, baseline[seed])]
            for seed, own in by_seed.items()
        ]
        return self._judge_pairs(pairs, differences_in_table, self.margin, self.mode == "min", "diverged")

    def _judge_pairs(self, pairs, differences_in_table, margin, lower_is_better, lack):
        """Return the part of a summary's row that judges pairs of the variant's figure and the baseline's.

        `lack` says in words what it means that a figure is None or not finite.
        """
        lacking = [tuple(value is None or not math.isfinite(value) for value in pair) for pair in pairs]
        judged = judge(
            [own - other for (own, other), lacks in zip(pairs, lacking, strict=True) if not any(lacks)],
            margin=margin,
            differences_in_table=differences_in_table,
            lower_is_better=lower_is_better,
            diverged=(lacking.count((True, False)), lacking.count((False, True))),
            both_diverged=lacking.count((True, True)),
        )
        row = {
            "pairs": judged.pairs,
            "difference": judged.difference,
            "difference_half_width": judged.half_width,
            "range": judged.range,
            "verdict": NO_VERDICT,
            "short_verdict": None,
            "by_divergence": judged.by_divergence,
            "seeds_needed": judged.seeds_needed,
        }
        if judged.verdict is None:
            return row
        verdict = short = judged.verdict
        if judged.by_divergence:
            which, place = ("the baseline", 1) if verdict == "better" else ("it", 0)
            verdict += f": {which} {lack} in {sum(each[place] for each in lacking)} of {len(pairs)}"
        elif verdict == "undecided":
            count = judged.seeds_needed
            verdict += (
                f": about {count} seeds would decide" if count else f": more than {MOST_SEEDS} seeds would be needed"
            )
            short += f", ~{count}" if count else f", >{MOST_SEEDS}"
        return row | {"verdict": verdict, "short_verdict": short}

    def _repeated_seeds(self, by_seed):
        """Return the seeds with the figures of another seed, to the bit, which is no chance where there are several."""
        seen, repeated = {}, set()
        for seed, run in by_seed.items():
            if not self.has_diverged(run):
                figures = json.dumps([run["metrics"], run["curve"]], sort_keys=True)
                repeated |= {seed, seen[figures]} if figures in seen else set()
                seen.setdefault(figures, seed)
        # One figure alone, such as an accuracy, may well be equal for two seeds, but hardly for all.
        is_chance = _figures_of_a_run(by_seed) == 1 and (len(seen) > 1 or len(by_seed) < 3)
        return [] if is_chance else sorted(repeated)

    def _medians(self, variant, by_seed):
        """Return {name: median over the seeds} of a variant's figures from `add_figure`."""
        values = {}
        for figure in self.figures:
            if figure["variant"] == variant and figure["seed"] in by_seed:
                values.setdefault(figure["name"], []).append(figure["value"])
        return {name: statistics.median(of_seeds) for name, of_seeds in values.items()}


def usual_margin(metric):
    """Return one point for a metric that is an accuracy, else None."""
    return 0.01 if metric.lower().endswith(("accuracy", "acc")) else None


def _figures_of_a_run(by_seed):
    """Return the largest number of figures that a run has, those of its curves among them."""
    return max(
        sum(map(len, run["metrics"].values())) + sum(map(len, run["curve"].values())) for run in by_seed.values()
    )


def _relative_times(by_seed, baseline):
    """Return the ratio of the median epoch times for each seed, or [] where there are no times."""
    if not baseline or not all(run["epoch_seconds"] for runs in (by_seed, baseline) for run in runs.values()):
        return []

    def epoch_time(run):
        # The first epoch compiles the model, so it counts only if it is the only one.
        return statistics.median(run["epoch_seconds"][1:] or run["epoch_seconds"])

    return [epoch_time(run) / epoch_time(baseline[seed]) for seed, run in by_seed.items()]


def _quartiles(values):
    """Return the lower and the upper quartile, of one value the value itself."""
    return tuple(statistics.quantiles(values, n=4, method="inclusive")[::2]) if len(values) > 1 else (values[0],) * 2


def _as_json(value):
    """Return a value as a file gives it back, with texts for numbers that are not finite."""
    return json.loads(json.dumps(value, default=str), parse_constant=str)


def _with_numbers(value):
    """Return `value` with numbers in the place of the texts that stand for those that are not finite."""
    if isinstance(value, dict):
        return {key: _with_numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


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
