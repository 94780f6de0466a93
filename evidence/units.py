"""The units of work, one recipe with one seed: which are missing, how they are shared out, and the result they make."""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shutil
import threading
from pathlib import Path

from callbacks.comparison.result import ORDER, Result, write_whole
from evidence.recipes import ROOT, digest


@dataclasses.dataclass(frozen=True)
class Unit:
    """One recipe with one seed, all variants after one another in one process.

    Attributes:
        recipe: path of the recipe, relative to the project's folder.
        flags: those that the recipe is run with, beside the seed.
        result: path of the JSON file that its result becomes a part of, relative to the project's folder.
        seed: the seed.
        digest: digest of the recipe's code.
        versions: texts by "python", "keras", "backend" and "order" (of examples).
    """

    recipe: str
    flags: tuple[str, ...]
    result: str
    seed: int
    digest: str
    versions: tuple[tuple[str, str], ...]

    def path(self, root):
        """Return the path of the file that the finished unit is in: another one for other code and versions."""
        key = hashlib.sha256(json.dumps([self.digest, self.versions]).encode()).hexdigest()[:16]
        return folder_of(root, root / self.result) / key / f"{self.seed}.json"

    def __str__(self):
        return f"{' '.join([self.recipe, *self.flags])}, seed {self.seed}"


def forget(root, result):
    """Delete the finished units of the result at a path."""
    shutil.rmtree(folder_of(root, result), ignore_errors=True)


def folder_of(root, result):
    """Return the folder of the finished units of the result at a path."""
    return root / "evidence" / ".units" / result.parent.name / result.stem


def versions():
    """Return what the figures depend on beside the code, as a `Result` names it, without importing any of it."""
    backend = os.environ.get("KERAS_BACKEND")
    if not backend:
        settings = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "keras.json"
        backend = json.loads(settings.read_text())["backend"] if settings.exists() else "tensorflow"
    try:
        version = importlib.metadata.version(backend)
    except importlib.metadata.PackageNotFoundError:
        # The package has another name, such as tensorflow-cpu.
        (package, *_) = importlib.metadata.packages_distributions()[backend]
        version = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "keras": importlib.metadata.version("keras"),
        "backend": f"{backend} {version}",
        "order": ORDER,
    }


def finished_seeds(recipe, path, flags, begin_anew=False):
    """Return the stored result at `path` if new seeds can be added to it, else None."""
    if begin_anew or not path.exists():
        return None
    stored = Result.load(path)
    is_of_this = stored.digest == digest(recipe, flags) and versions().items() <= stored.environment.items()
    # The first files did not say what data they were of.
    says_data = "data" in json.loads(path.read_text(encoding="utf-8"))
    return stored if is_of_this and says_data else None


def units_of(root, recipe, path, flags, seeds, begin_anew=False):
    """Return the units that the result at `path` lacks for so many seeds, those with a file of their own among them."""
    stored = finished_seeds(recipe, path, flags, begin_anew)
    known = {run["seed"] for run in stored.runs} if stored else set()
    recipe_and_result = str(recipe.relative_to(root)), tuple(flags), str(path.relative_to(root))
    code, software = digest(recipe, flags), tuple(versions().items())
    return [Unit(*recipe_and_result, seed, code, software) for seed in range(seeds) if seed not in known]


def merge(root, recipe, path, flags, units, begin_anew=False):
    """Make the result at `path` of its finished units and what it held: the picture first, then the JSON.

    Raises:
        ValueError: the units are not of one experiment.
    """
    # Only here, because drawing takes a second to import.
    from callbacks.comparison.picture import draw

    stored = finished_seeds(recipe, path, flags, begin_anew)
    parts = [Result.load(unit.path(root)) for unit in units]
    for part in filter(None, [stored, *parts]):
        # It counts docstrings, which the digest does not.
        part.code = None
    first, *others = filter(None, [stored, *parts])
    result = first.merge(*others)
    path.parent.mkdir(exist_ok=True)
    draw(result, path.with_suffix(".svg"))
    result.save(path)
    forget(root, path)


def run_all(units, executor, run, note):
    """Give units to an executor, in this order, and call `note(unit, text, error)` as each ends.

    Args:
        executor: a `concurrent.futures.Executor`; it is shut down at the end.
        run: function of a unit that runs it and returns the text of its file. Where its process was killed, it is
            called again, three times in all.

    Raises:
        ConnectionError: the executor is a cluster's, whose scheduler has gone.
    """
    pending, kills = {}, dict.fromkeys(units, 0)
    try:
        pending |= {executor.submit(run, unit): unit for unit in units}
        while pending:
            done, _ = concurrent.futures.wait(pending, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in done:
                unit = pending.pop(future)
                try:
                    note(unit, future.result(), None)
                except concurrent.futures.BrokenExecutor:
                    kills[unit] += 1
                    if kills[unit] < 3:
                        pending[executor.submit(run, unit)] = unit
                    else:
                        told = "its process was killed three times: is there memory? See evidence/.units/stderr.log"
                        note(unit, None, MemoryError(told))
                except concurrent.futures.CancelledError:
                    # Nobody here cancels any.
                    raise ConnectionError(
                        "The scheduler has gone, or does not answer any more. What was finished is kept: start it "
                        "again, and give the same command."
                    ) from None
                except (Exception, SystemExit) as error:
                    note(unit, None, error)
    except BaseException:
        for future in pending:
            future.cancel()
        executor.shutdown(wait=False)
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    executor.shutdown()


def run_unit(unit, root=None):
    """Run a unit in this process, and return the text of its file; see `evidence.run`, which imports Keras."""
    from evidence.run import run

    return run(unit, root)


def run_in_new_process(unit, threads=1):
    """Run a unit in a process of its own, started afresh, that computes with so many threads.

    With one thread the figures are the same on machines with few cores and with many. A process that served many units
    would keep some of the memory of each, about 50 MB on TensorFlow.
    """
    with concurrent.futures.ProcessPoolExecutor(
        1,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_process,
        initargs=(threads,),
    ) as process:
        return process.submit(run_unit, unit).result()


def _begin_process(threads):
    os.environ["EVIDENCE_THREADS"] = str(threads)
    # What backends say of themselves would bury the progress. Exceptions reach the caller in another way.
    log = ROOT / "evidence" / ".units" / "stderr.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), 2)

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def cores():
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def keep(root, unit, text):
    """Write the file of a unit, whole; on this machine the process that ran it has done so already."""
    path = unit.path(root)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)


@contextlib.contextmanager
def cluster(address, units):
    """Connect to a Dask scheduler, and give the executor of its workers.

    Raises:
        ModuleNotFoundError: Dask's package `distributed` is not installed.
        ConnectionError: the scheduler does not answer, or has no workers.
        RuntimeError: a worker has other code or other versions than this machine.
    """
    try:
        from distributed import Client
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "--scheduler needs Dask's package distributed: run `pip install -e '.[cluster]'`, here and on the workers."
        ) from error
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"No Dask scheduler answers at {address!r} ({type(error).__name__}): start one with `dask scheduler`, and "
            "give the address that it prints, such as tcp://HOST:8786."
        ) from error
    with client:
        if not client.scheduler_info()["workers"]:
            raise ConnectionError(
                f"The scheduler at {address!r} has no workers: start some in the project's folder with "
                f"`dask worker {address} --nworkers 4 --nthreads 1`."
            )
        one_of_each_recipe = list({unit.recipe: unit for unit in units}.values())
        for worker, told in client.run(_say_what_differs, one_of_each_recipe).items():
            if told:
                raise RuntimeError(f"The worker at {worker} cannot do this work. {told}")
        yield client.get_executor()


def _say_what_differs(units):
    """On a worker, return why the units cannot be run there, or None."""
    from evidence.run import check_is_same

    try:
        for unit in units:
            check_is_same(unit)
    except RuntimeError as error:
        return str(error)
    return None
