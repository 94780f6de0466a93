"""Run one unit, a recipe with one seed, in this process: the only part of the runner that imports Keras."""

import contextlib
import gc
import hashlib
import importlib.util
import io
import os
import socket
import sys
import threading
import warnings
from pathlib import Path

THREADS = int(os.environ.get("EVIDENCE_THREADS", "1"))

# Read when the backends are imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
if THREADS == 1:
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import cyclopts  # noqa: E402
import keras  # noqa: E402

from callbacks.comparison.result import Result, write_whole  # noqa: E402
from evidence.recipes import ROOT, digest  # noqa: E402
from evidence.units import versions  # noqa: E402

# Units that share a process, as in a Dask worker with several threads, would share its random numbers.
ALONE = threading.Lock()


def use_threads(threads):
    """Hold the backend, before its first operation, to a number of threads."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # A process that has computed already, as a test's has, keeps the threads that it has.
        with contextlib.suppress(RuntimeError):
            tf.config.threading.set_intra_op_parallelism_threads(threads)
            tf.config.threading.set_inter_op_parallelism_threads(threads)
    elif keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(threads)


use_threads(THREADS)


def run(unit, root=None):
    """Run a unit, write its file, and return the text of it.

    Raises:
        RuntimeError: the code or the versions of this machine are not those that the unit is to be run with.
    """
    root = ROOT if root is None else Path(root)
    recipe = root / unit.recipe
    check_is_same(unit, root)
    with ALONE:
        path = unit.path(root)
        if not path.exists():
            write_whole(path, _measure(unit, recipe, path))
        return path.read_text(encoding="utf-8")


def check_is_same(unit, root=ROOT):
    """Refuse a unit of other code or other versions than this machine's."""
    recipe = root / unit.recipe
    mine = {"digest": digest(recipe, unit.flags) if recipe.exists() else "no such recipe", **versions()}
    others = {"digest": unit.digest, **dict(unit.versions)}
    differing = [name for name in mine if mine[name] != others.get(name)]
    if differing:
        told = ", ".join(
            "the code of the recipe" if name == "digest" else f"{name} {mine[name]}, not {others.get(name)}"
            for name in differing
        )
        raise RuntimeError(
            f"{socket.gethostname()} differs in {told}: bring it to the same commit and requirements, and begin again."
        )


def _measure(unit, recipe, path):
    # Of this very text, because a comparison goes on only with what was begun by it.
    text = hashlib.sha256(recipe.read_bytes()).hexdigest()[:8]
    begun = path.with_name(f"{path.stem}.{text}.begun.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    keras.utils.clear_session()
    gc.collect()
    main = load_recipe(recipe).main
    _, bound, _ = cyclopts.App(default_command=main).parse_args(unit.flags, exit_on_error=False, print_error=False)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main(**bound.kwargs | {"seeds": [unit.seed], "save": begun})
    result = Result.load(begun)
    result.recipe, result.digest = unit.recipe, unit.digest
    begun.unlink()
    return result.to_json()


def load_recipe(recipe):
    """Import a recipe anew."""
    specification = importlib.util.spec_from_file_location(f"recipe_{recipe.stem}", recipe)
    module = importlib.util.module_from_spec(specification)
    # Where dataclasses and the digest of a comparison look for it.
    sys.modules[specification.name] = module
    specification.loader.exec_module(module)
    return module
