"""Run every recipe once on this machine's GPU, for seconds each: `python -m evidence.gpu` (ten minutes, Keras on JAX).

A recipe is trained with one seed for a few epochs, which tells the time of an epoch and little else. The result is
beside those of the CPU, as NAME.gpu.json, and the theme's page compares the times.

A machine without TensorFlow can neither read the embedded data nor run the recipes that make their batches with it.
Write the data on another machine with `--export FILE`, and read them there with `--arrays FILE`; what then does not run
is told.
"""

import concurrent.futures
import importlib.util
import inspect
import multiprocessing
import os
import sys
import time
import types
from pathlib import Path

import cyclopts
import numpy as np
from cyclopts.types import ExistingFile, PositiveFloat, PositiveInt
from rich.console import Console

from callbacks.comparison.result import Result
from evidence.pages import seconds_an_epoch
from evidence.recipes import ROOT, digest, find_recipes, result_path
from evidence.tables import rich_table

SPLITS = ("training", "validation", "test")


class Missing(types.ModuleType):
    """Stands for a package that is not installed, until it is called."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Missing(f"{self.__name__}.{name}")

    def __call__(self, *arguments, **keywords):
        raise ModuleNotFoundError(f"{self.__name__} is called, and TensorFlow is not installed.")


def export(path):
    """Write the embedded data to an npz file, as the recipes' `load` gives them."""
    from evidence.run import load_recipe

    arrays = {}
    for recipe in find_recipes():
        module = load_recipe(recipe)
        dataset = default_dataset(module)
        if f"{dataset} classes" not in arrays:
            *splits, classes = module.load(dataset, ROOT / "data", None)
            arrays[f"{dataset} classes"] = classes
            for split, pair in zip(SPLITS, splits, strict=True):
                arrays |= {f"{dataset} {split} {part}": array for part, array in enumerate(pair)}
    np.savez_compressed(path, **arrays)


def default_dataset(module):
    """Return the name of the data set that a recipe takes if nothing else is said."""
    return inspect.signature(module.main).parameters["dataset"].default


def run(recipe, epochs, arrays):
    """Run a recipe in this process and keep its result; return the device's name.

    Raises:
        ModuleNotFoundError: the recipe needs TensorFlow, which is not installed.
    """
    # As many threads as there are: it is a GPU that computes.
    os.environ["EVIDENCE_THREADS"] = str(os.cpu_count())
    for name in ("tensorflow", "tensorflow_datasets"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = Missing(name)
    from evidence.run import load_recipe

    module = load_recipe(recipe)
    if arrays is not None:
        stored, dataset = np.load(arrays), default_dataset(module)

        def load(name, data_dir, limit):
            pairs = [[stored[f"{dataset} {split} {part}"][:limit] for part in (0, 1)] for split in SPLITS]
            return *map(tuple, pairs), int(stored[f"{dataset} classes"])

        module.load = load
    path = gpu_path(recipe)
    module.main(epochs=epochs, seeds=[0], save=path)
    result = Result.load(path)
    result.recipe, result.digest = str(recipe.relative_to(ROOT)), digest(recipe)
    result.environment["processor"] = device_name()
    result.save(path)
    path.with_suffix(".svg").unlink(missing_ok=True)
    return result.environment["processor"]


def gpu_path(recipe):
    """Return where a recipe's result of the GPU is."""
    path = result_path(recipe)
    return path.with_name(f"{path.stem}.gpu.json")


def device_name():
    """Return the name of the device that Keras computes on."""
    import keras

    if keras.backend.backend() == "jax":
        import jax

        return jax.devices()[0].device_kind
    return keras.distribution.list_devices()[0]


def main(
    *names: str,
    export_to: Path | None = None,
    arrays: ExistingFile | None = None,
    epochs: PositiveInt = 3,
    minutes: PositiveFloat = 10.0,
):
    """Run recipes on this machine's GPU, one after another, and compare the time of an epoch with that on the CPU.

    Args:
        names: recipes, by name; all by default.
        export_to: only write the embedded data to this npz file.
        arrays: npz file with the embedded data, for a machine without TensorFlow.
        epochs: passes over the training data, of which the first is not timed.
        minutes: time for all recipes together; those that are left then are named.
    """
    if export_to is not None:
        export(export_to)
        return
    known = {recipe.stem: recipe for recipe in find_recipes()}
    if unknown := set(names) - set(known):
        raise SystemExit(f"There is no recipe {sorted(unknown)[0]!r}.")
    console, end = Console(), time.monotonic() + 60 * minutes
    rows = {"recipe": [], "s an epoch": [], "on": [], "on the CPU": []}
    for name in names or known:
        recipe, device = known[name], ""
        process = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            device = process.submit(run, recipe, epochs, arrays).result(timeout=max(0, end - time.monotonic()))
            here = seconds_an_epoch(Result.load(gpu_path(recipe)))
        except concurrent.futures.TimeoutError:
            here = "no time was left"
            for each in multiprocessing.active_children():
                each.kill()
        except Exception as error:  # noqa: BLE001
            here = str(error).strip().splitlines()[-1]
        process.shutdown()
        there = seconds_an_epoch(Result.load(result_path(recipe))) if result_path(recipe).exists() else None
        cells = (name, here if isinstance(here, str) else _seconds(here), device, _seconds(there))
        for column, cell in zip(rows.values(), cells, strict=True):
            column.append(cell)
        console.print(*cells)
    console.print(rich_table("the baseline of each recipe", rows))


def _seconds(value):
    return "–" if value is None else f"{value:.3g}"


if __name__ == "__main__":
    cyclopts.run(main)
