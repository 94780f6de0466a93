"""Measure every recipe whose result is stale, and make the pages from the results."""

import contextlib
import functools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import cyclopts
from cyclopts.types import PositiveInt
from rich import progress
from rich.console import Console

from callbacks.comparison.result import Result, write_whole
from evidence import units
from evidence.pages import generated_files
from evidence.recipes import (
    EXCLUSIVE,
    ROOT,
    SEEDS,
    find_recipes,
    measurements,
    seeds_for,
    unprepared_dataset,
    why_stale,
)


def known_recipe(_, name):
    """Validate the name of a recipe, for the command line."""
    known = sorted(recipe.stem for recipe in find_recipes(ROOT))
    if Path(name).stem not in known:
        raise ValueError(f"There is no recipe {name!r}: choose from {', '.join(known)}.")


def main(
    *recipes: Annotated[str, cyclopts.Parameter(validator=known_recipe)],
    seeds: PositiveInt = SEEDS,
    processes: PositiveInt | None = None,
    scheduler: str | None = None,
    check: bool = False,
    force: bool = False,
):
    """Run the recipes whose results are stale, then remake the pages.

    A result is stale when the recipe's code, or that of a callback it imports, has changed since it was measured;
    comments and docstrings do not count. The work is shared out by recipe and seed. What is finished is kept when the
    command is interrupted or killed: the next call goes on from there, also with what `--force` has left to do. Results
    on a data set that has not been prepared are skipped. Recipes whose subject is time are measured here, one after
    another, when nothing else is left.

    Args:
        recipes: names of recipes, such as `dropout`; all of them if none is given.
        seeds: number of paired repetitions; a search over rates takes three at most.
        processes: how many run at a time on this machine, each with one thread; by default one for each core.
        scheduler: address of a Dask scheduler, such as `tcp://HOST:8786`, whose workers do the work.
        check: say what is stale, change nothing, and exit with 1 if anything is.
        force: run the recipes whether their results are stale or not.
    """
    names = {Path(name).stem for name in recipes}
    chosen = [recipe for recipe in find_recipes(ROOT) if not names or recipe.stem in names]
    results = {path: (recipe, flags) for recipe in chosen for path, flags in measurements(recipe).items()}
    # Names of the results that are still to be measured by force, for the next call in case this one is interrupted.
    forced_path = ROOT / "evidence" / ".forced"
    forced = set(forced_path.read_text(encoding="utf-8").split()) if forced_path.exists() else set()
    if force and not check:
        forced |= {path.stem for path in results}
        for path in results:
            units.forget(ROOT, path)
        write_whole(forced_path, "\n".join(sorted(forced)))
    stale = {
        path: "forced" if path.stem in forced else why_stale(recipe, path, flags, seeds_for(flags, seeds))
        for path, (recipe, flags) in results.items()
    }
    stale = {path: reason for path, reason in stale.items() if reason}
    if check:
        return tell_what_is_stale(results, stale)
    skipped = {path: name for path in stale if (name := unprepared_dataset(results[path][1], ROOT))}
    for path, name in skipped.items():
        print(
            f"Skipped: {command(*results[path])}: data/ has no {name}; `python data/fashion_mnist.py --full` makes it."
        )
        del stale[path]

    def finish(path, made_of):
        recipe, flags = results[path]
        units.merge(ROOT, recipe, path, flags, made_of, begin_anew=path.stem in forced)
        forced.discard(path.stem)
        if forced:
            write_whole(forced_path, "\n".join(sorted(forced)))
        else:
            forced_path.unlink(missing_ok=True)

    missing = {}
    for path in stale:
        recipe, flags = results[path]
        missing[path] = units.units_of(ROOT, recipe, path, flags, seeds_for(flags, seeds), path.stem in forced)
    failures = measure(missing, finish, processes or units.cores(), scheduler)
    for path, text in generated_files(ROOT).items():
        write_whole(path, text)
    fresh = len(results) - len(stale) - len(skipped)
    counts = f"{len(stale) - len(failures)} measured, {fresh} fresh" + f", {len(skipped)} skipped" * bool(skipped)
    print(f"{counts}; README.md has the answers.")
    for path, reason in failures.items():
        print(f"Failed: {command(*results[path])}: {reason}; what was finished is kept, and its old result stays.")
    return 1 if failures else 0


def tell_what_is_stale(results, stale):
    """Print what `--check` found, and return its exit code."""
    outdated = [
        path for path, text in generated_files(ROOT).items() if not path.exists() or path.read_text("utf-8") != text
    ]
    for path, reason in stale.items():
        recipe, flags = results[path]
        print(f"{command(recipe, flags)}: {reason}. Run: python -m evidence {recipe.stem}")
    for path in outdated:
        print(f"{path.relative_to(ROOT)}: its text differs from the results and cards. Run: python -m evidence")
    if stale or outdated:
        return 1
    recipes = {recipe for recipe, _ in results.values()}
    print(f"All is fresh: {len(recipes)} {'recipe' if len(recipes) == 1 else 'recipes'}.")
    return 0


def measure(missing, finish, processes, scheduler=None):
    """Run all units, and call `finish(path of a result, its units)` as soon as all of a result are there.

    Args:
        missing: dict from the path of a result to the units that it lacks.
        finish: function that makes the result.
        processes: how many units run at a time on this machine.
        scheduler: address of a Dask scheduler, or None.

    Returns:
        dict from the path of a result that could not be made to the reason.
    """
    failures = {}
    left = {path: {unit for unit in made_of if not unit.path(ROOT).exists()} for path, made_of in missing.items()}

    def finish_if_complete(path):
        if not left[path] and path not in failures:
            try:
                finish(path, missing[path])
            except (OSError, ValueError) as error:
                failures[path] = error

    for path in list(missing):
        finish_if_complete(path)
    todo = [(path, unit) for path in missing for unit in sorted(left[path], key=lambda unit: unit.seed)]
    paths = {unit: path for path, unit in todo}
    seconds = expected_seconds(paths)
    # The longest first, so that no process is left with a long one at the end.
    order = sorted(paths, key=seconds.get, reverse=True)
    alone = [unit for unit in order if Path(unit.recipe).stem in EXCLUSIVE and "--search" not in unit.flags]
    shared = [unit for unit in order if unit not in alone]
    with Progress(seconds) as shown, contextlib.ExitStack() as stack:

        def note(unit, text, error):
            path = paths[unit]
            if error is not None:
                failures.setdefault(path, f"{unit}: {in_one_line(error)}")
            else:
                units.keep(ROOT, unit, text)
            left[path].discard(unit)
            shown.advance(unit, error)
            finish_if_complete(path)

        if shared and scheduler:
            units.run_all(shared, stack.enter_context(units.cluster(scheduler, shared)), units.run_unit, note)
        elif shared:
            units.run_all(shared, ThreadPoolExecutor(processes), units.run_in_new_process, note)
        if alone:
            with_all_cores = functools.partial(units.run_in_new_process, threads=units.cores())
            units.run_all(alone, ThreadPoolExecutor(1), with_all_cores, note)
    return failures


def expected_seconds(paths):
    """Return {unit: seconds that it is expected to take}, from the times of stored results."""
    known = {}
    for path in set(paths.values()):
        if path.exists():
            by_seed = {}
            for run in Result.load(path).runs:
                by_seed[run["seed"]] = by_seed.get(run["seed"], 0.0) + sum(run["epoch_seconds"])
            known[path] = statistics.median(by_seed.values()) + 5
    usual = statistics.median(known.values()) if known else 30
    return {unit: known.get(path, usual) for unit, path in paths.items()}


class Progress:
    """How far the work is: a bar on a terminal, else a line for each unit, with the time that is left."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.console = Console()
        self.done, self.start = 0, time.monotonic()
        self.bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=20),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal or not seconds,
            # What is left is told by the speed so far, of units that take minutes.
            speed_estimate_period=86400,
        )
        self.task = self.bar.add_task(f"0 of {len(seconds)} units", total=sum(seconds.values()))

    def __enter__(self):
        self.bar.start()
        return self

    def __exit__(self, *_):
        self.bar.stop()

    def advance(self, unit, error):
        self.done += 1
        self.bar.update(self.task, advance=self.seconds[unit], description=f"{self.done} of {len(self.seconds)} units")
        if error is not None:
            self.console.print(f"{unit} failed: {in_one_line(error)}", markup=False, highlight=False, soft_wrap=True)
        if self.console.is_terminal:
            return
        task = self.bar.tasks[0]
        elapsed = time.monotonic() - self.start
        left = elapsed * (task.total / task.completed - 1) / 60
        print(f"[{self.done}/{len(self.seconds)}, about {left:.0f} min left] {unit}", flush=True)


def in_one_line(error):
    """Return an exception as text: its last note, or its message, or its kind."""
    text = [str(error), *getattr(error, "__notes__", [])][-1].strip().partition("\n")[0]
    return text or type(error).__name__


def command(recipe, flags):
    """Return what to type after `python` to run a recipe."""
    return " ".join([str(recipe.relative_to(ROOT)), *flags])


if __name__ == "__main__":
    cyclopts.run(main)
