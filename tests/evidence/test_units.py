"""Units in processes of their own: killed, interrupted, shared out, on this machine and on a Dask cluster."""

import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from callbacks.comparison.result import Result
from evidence import units
from evidence.recipes import ROOT, digest

RECIPE = '''"""Quick: it trains a little.

Symptom: a.

Technique: b.

Change: c.

Look for: d.

Cost: e.

Source: f.
"""

import os
import time
from pathlib import Path

import cyclopts
import keras
import numpy as np
from keras import layers

from callbacks import Comparison

VARIANTS = {"plain": 0.0, "dropout": 0.5}
HEADLINE = "dropout"


def main(*, seeds: int = 1, save: Path | None = None):
    """Train."""
    inputs = np.random.default_rng(0).normal(size=(256, 64)).astype("float32")
    targets = (inputs.sum(axis=1) > 0).astype("int32")
    with Comparison(metric="accuracy", test=(inputs, targets), save=save) as comparison:
        for variant, rate, run in comparison.runs(VARIANTS, seeds):
            model = keras.Sequential(
                [keras.Input((64,)), layers.Dense(128, "relu"), layers.Dropout(rate), layers.Dense(2)]
            )
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile("adam", loss, metrics=["accuracy"])
            model.fit(inputs, targets, epochs=2, verbose=0, callbacks=[run])
            with Path(os.environ.get("LOG", os.devnull)).open("a") as file:
                file.write(f"{os.getpid()} {run.seed} {variant}\\n")
            time.sleep(float(os.environ.get("PAUSE", 0)))
    return comparison


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")
'''


@pytest.fixture
def project(tmp_path):
    """A copy of the project whose only recipe is `numerics/quick`."""
    for folder in ("callbacks", "evidence"):
        shutil.copytree(
            ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.json", "*.svg", "__pycache__", ".*")
        )
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "recipes" / "numerics").mkdir(parents=True)
    (tmp_path / "recipes" / "numerics" / "quick.py").write_text(RECIPE)
    return tmp_path


def begin(project, *arguments, **environment):
    """Start the command in the project, as the leader of a group of processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "evidence", *map(str, arguments)],
        cwd=project,
        env=os.environ | {"PYTHONPATH": str(project), "LOG": str(project / "log"), "COLUMNS": "200"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell starts its background jobs with SIGINT ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def evidence(project, *arguments, **environment):
    """Run the command in the project, and return its exit code and what it printed."""
    process = begin(project, *arguments, **environment)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def result(project):
    return Result.load(project / "evidence" / "numerics" / "quick.json")


def figures(project):
    """Return all that was measured but times."""
    return {(run["variant"], run["seed"]): (run["metrics"], run["curve"]) for run in result(project).runs}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The figures of three seeds, each in a fresh process, one after another."""
    folder = tmp_path_factory.mktemp("reference")
    (folder / "quick.py").write_text(RECIPE)
    figures = {}
    for seed in range(3):
        code = f"import quick; quick.main(seeds=[{seed}], save='{seed}.json')"
        environment = os.environ | {"PYTHONPATH": str(ROOT), **one_thread()}
        subprocess.run([sys.executable, "-c", f"{ONE_THREAD}\n{code}"], cwd=folder, env=environment, check=True)
        runs = Result.load(folder / f"{seed}.json").runs
        figures |= {(run["variant"], run["seed"]): (run["metrics"], run["curve"]) for run in runs}
    return figures


ONE_THREAD = """
import keras
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
"""


def one_thread():
    return {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1", "OMP_NUM_THREADS": "1"}


def test_units_side_by_side_give_the_figures_of_one_after_another(project, reference):
    code, output = evidence(project, "--seeds", 3, "--processes", 2, PAUSE="1")
    assert code == 0, output
    assert figures(project) == reference
    lines = [line.split() for line in (project / "log").read_text().splitlines()]
    # Each unit has a process of its own, and the first two run at the same time.
    assert len({(process, seed) for process, seed, _ in lines}) == len({process for process, _, _ in lines}) == 3
    assert len({process for process, _, _ in lines[:3]}) == 2


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_result(project, reference):
    generator = random.Random(0)
    kills = 3
    for _ in range(kills):
        process = begin(project, "--seeds", 3, PAUSE="1")
        time.sleep(generator.uniform(1, 12))
        process.kill()
        process.communicate()
    code, output = evidence(project, "--seeds", 3)
    assert code == 0, output
    assert figures(project) == reference
    lines = (project / "log").read_text().splitlines()
    trained = [line.partition(" ")[2] for line in lines]
    assert len(trained) <= 6 + kills * 2, "more was trained again than was in work when the command was killed"
    assert not list((project / "evidence" / ".units").glob("*/*"))


def test_process_that_is_killed_takes_nothing_with_it_but_its_unit(project, reference):
    log = project / "log"
    process = begin(project, "--seeds", 3, "--processes", 2, PAUSE="1")
    wait_until(lambda: log.exists())
    os.kill(int(log.read_text().split()[0]), signal.SIGKILL)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert figures(project) == reference


def test_ctrl_c_keeps_what_was_finished(project):
    process = begin(project, "--seeds", 3, "--processes", 1, PAUSE="1")
    wait_until(lambda: list((project / "evidence").glob(".units/numerics/quick/*/?.json")))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    trained = len((project / "log").read_text().splitlines())
    assert evidence(project, "--seeds", 3)[0] == 0
    assert len((project / "log").read_text().splitlines()) <= trained + 6 - 2


def test_units_end_with_the_command(project):
    process = begin(project, "--seeds", 1, PAUSE="60")
    wait_until(lambda: (project / "log").exists())
    worker = int((project / "log").read_text().split()[0])
    process.kill()
    process.communicate()
    wait_until(lambda: not is_running(worker), seconds=10)


def is_running(process):
    try:
        # A process that nobody has waited for is a zombie.
        return ") Z" not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_check_imports_neither_keras_nor_a_backend():
    code = """
import sys
from evidence.__main__ import main
try:
    main(check=True)
finally:
    print(sorted({"keras", "tensorflow", "jax", "torch", "matplotlib"} & set(sys.modules)))
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.stdout.splitlines()[-1] == "[]", process.stdout + process.stderr


def test_versions_are_those_of_a_result():
    from callbacks import Comparison

    assert units.versions().items() <= Comparison(metric="loss").result.environment.items()


def unit(recipe="recipes/numerics/quick.py", seed=0, **changes):
    facts = {"digest": "a", "versions": tuple(units.versions().items())} | changes
    return units.Unit(recipe, (), "evidence/numerics/quick.json", seed, **facts)


def test_file_of_a_unit_is_another_for_other_code_versions_and_seeds(tmp_path):
    others = [unit(seed=1), unit(digest="b"), unit(versions=(("python", "2.7"),))]
    paths = {each.path(tmp_path) for each in [unit(), unit(), *others]}
    assert len(paths) == 4


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"digest": "b"}, "the code of the recipe"),
        ({"versions": (*list(units.versions().items())[:2], ("backend", "abacus 1"))}, "backend"),
        ({"recipe": "recipes/numerics/other.py"}, "the code of the recipe"),
    ],
)
def test_unit_of_other_code_or_versions_is_refused(project, changes, told):
    from evidence.run import run

    code = digest(project / "recipes" / "numerics" / "quick.py")
    with pytest.raises(RuntimeError, match=told):
        run(unit(**{"digest": code} | changes), project)


@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="needs the extra cluster")
class TestCluster:
    """A real scheduler and two workers, on this machine."""

    @pytest.fixture
    def cluster(self, project):
        """Return the address of a scheduler, and its processes: the scheduler and two workers."""
        environment = os.environ | {"PYTHONPATH": str(project), "LOG": str(project / "log")}
        environment |= {"PAUSE": "1", "DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "2s"}
        processes = []

        def start(*command):
            process = subprocess.Popen(
                [sys.executable, "-m", "dask", *command],
                cwd=project,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=(project / "scheduler.log").open("a"),
                start_new_session=True,
            )
            processes.append(process)

        start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        wait_until(lambda: re.search(r"tcp://127.0.0.1:\d+", (project / "scheduler.log").read_text()))
        address = re.search(r"tcp://127.0.0.1:\d+", (project / "scheduler.log").read_text())[0]
        for _ in range(2):
            start("worker", address, "--nthreads", "1", "--no-dashboard", "--host", "127.0.0.1")
        wait_until(lambda: (project / "scheduler.log").read_text().count("Registered to") >= 2)
        yield address, processes
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def test_figures_are_those_of_one_machine_also_when_a_worker_dies(self, project, cluster, reference):
        address, _ = cluster
        log = project / "log"
        process = begin(project, "--seeds", 3, "--scheduler", address)
        wait_until(log.exists)
        killed = int(log.read_text().split()[0])
        os.kill(killed, signal.SIGKILL)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert figures(project) == reference
        lines = [line.split() for line in log.read_text().splitlines()]
        assert len({each for each, _, _ in lines}) >= 2

    def test_scheduler_that_goes_is_told_and_what_was_finished_is_kept(self, project, cluster):
        address, (scheduler, *_) = cluster
        process = begin(project, "--seeds", 3, "--scheduler", address)
        wait_until(lambda: list((project / "evidence").glob(".units/numerics/quick/*/?.json")))
        os.killpg(scheduler.pid, signal.SIGKILL)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 1
        assert "scheduler" in output.splitlines()[-1], output
        assert list((project / "evidence").glob(".units/numerics/quick/*/?.json"))
        assert evidence(project, "--seeds", 3)[0] == 0

    def test_worker_of_other_code_is_refused(self, project, cluster):
        address, _ = cluster
        other = project / "other"
        shutil.copytree(project, other, ignore=shutil.ignore_patterns("other", "log", "*.log"))
        recipe = other / "recipes" / "numerics" / "quick.py"
        recipe.write_text(recipe.read_text().replace("0.5", "0.6"))
        code, output = evidence(other, "--seeds", 1, "--scheduler", address)
        assert code == 1
        assert "the code of the recipe" in output.splitlines()[-1], output


@pytest.mark.skipif(importlib.util.find_spec("distributed") is None, reason="needs the extra cluster")
def test_scheduler_that_does_not_answer_is_named(project):
    code, output = evidence(project, "--scheduler", "tcp://127.0.0.1:9")
    assert code == 1
    assert "tcp://127.0.0.1:9" in output.splitlines()[-1]
    assert "dask scheduler" in output.splitlines()[-1]
