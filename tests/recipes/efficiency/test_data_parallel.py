import json
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

LIMIT, EPOCHS, STEPS = 300, 2, 2


@pytest.fixture(scope="module")
def recipe(import_recipe):
    return import_recipe("efficiency/data_parallel")


@pytest.fixture(scope="module")
def trained(recipe):
    """{(devices, processes): what came of each process} of one task."""
    if keras.backend.backend() != "jax":
        pytest.skip("Keras 3.15 distributes on JAX only")
    task = {"dataset": "fashion_mnist_10k", "data_dir": str(recipe.DATA_DIR), "epochs": EPOCHS, "limit": LIMIT}
    return {
        counts: recipe.train(task | {"seed": 3} | dict(zip(("devices", "processes"), counts, strict=True)))
        for counts in [(1, 1), (2, 1), (1, 2)]
    }


def weights_of(outcome):
    return [outcome[name] for name in outcome if name.startswith("weight")]


def test_losses_of_all_steps_are_those_of_one_device(trained):
    ((expected,), *others) = trained.values()
    assert len(expected["losses"]) == EPOCHS * STEPS
    for processes in others:
        for outcome in processes:
            np.testing.assert_allclose(outcome["losses"], expected["losses"], rtol=0, atol=1e-5)


def test_losses_are_those_of_a_training_in_this_process_on_the_same_batches(recipe, trained):
    keras.utils.set_random_seed(3)
    train, *_, classes = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, LIMIT)
    dataset = recipe.batches(*train, 3)
    model = recipe.build_model(train[0].shape[1:], classes)
    schedule = keras.optimizers.schedules.CosineDecay(0.001, EPOCHS * STEPS)
    model.compile(keras.optimizers.Adam(schedule), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    history = model.fit(dataset, epochs=EPOCHS, verbose=0).history
    ((outcome,), *_) = trained.values()
    np.testing.assert_allclose(outcome["losses"][STEPS - 1 :: STEPS], history["loss"], atol=1e-5)


def test_weights_are_equal_on_all_processes_and_those_of_one_device(trained):
    ((expected,), *_) = trained.values()
    first, second = map(weights_of, trained[1, 2])
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)
    for processes in trained.values():
        for weight, expected_weight in zip(weights_of(processes[0]), weights_of(expected), strict=True):
            # Adam divides by the gradient, which enlarges the rounding of small ones.
            np.testing.assert_allclose(weight, expected_weight, atol=1e-4)


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Keras 3.15 distributes on JAX only")
def test_process_without_data_is_told_and_stops_the_others(recipe, tmp_path):
    task = {"dataset": "fashion_mnist_10k", "data_dir": str(tmp_path), "epochs": 1, "limit": LIMIT, "seed": 0}
    with pytest.raises(RuntimeError, match=r"(?s)Process \d of 2 ended with code 1:.*was not loaded from"):
        recipe.train(task | {"devices": 1, "processes": 2})


def test_process_that_dies_is_told_and_those_that_wait_for_it_are_not_waited_for(recipe, tmp_path):
    with (tmp_path / "0").open("w+") as first, (tmp_path / "1").open("w+") as second:
        waits = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stderr=first)
        dies = subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], stderr=second)
        try:
            with pytest.raises(RuntimeError, match="Process 1 of 2 ended with code -9"):
                recipe.wait_for([waits, dies], [first, second])
            assert waits.poll() is None
        finally:
            waits.kill()
            waits.wait()


def test_task_is_done_on_as_many_devices_and_processes_as_it_says(recipe, monkeypatch):
    started = []

    class Process:
        def __init__(self, command, env, **keywords):
            *_, folder, number = command
            task = json.loads((Path(folder) / "task.json").read_text())
            started.append((number, task["processes"], env["KERAS_BACKEND"], env["XLA_FLAGS"].split()[-1]))
            np.savez(Path(folder) / f"{number}.npz", losses=[float(number)])

        def poll(self):
            return 0

        kill = wait = poll

    monkeypatch.setattr(recipe.subprocess, "Popen", Process)
    outcomes = recipe.train({"devices": 3, "processes": 2})
    flag = "--xla_force_host_platform_device_count=3"
    assert started == [("0", 2, "jax", flag), ("1", 2, "jax", flag)]
    assert [outcome["losses"].item() for outcome in outcomes] == [0, 1]


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="Keras 3.15 distributes on JAX only")
def test_figures_are_those_of_the_first_process(recipe, monkeypatch):
    asked, made = [], {}

    def train(task):
        asked.append((task["devices"], task["processes"], task["seed"]))
        keras.utils.set_random_seed(len(asked))
        model = recipe.build_model((28, 28, 1), 10)
        weights = {f"weight {index}": np.array(weight) for index, weight in enumerate(model.get_weights())}
        losses, seconds = np.array([1.0, 0.5]) + len(asked), np.array([9.0, 0.1, 0.3, 0.2])
        made[len(asked)] = model
        return [{"losses": losses, "seconds": seconds} | weights, None]

    monkeypatch.setattr(recipe, "train", train)
    comparison = recipe.main(limit=LIMIT, epochs=4, devices=4, processes=3)
    assert asked == [(1, 1, 0), (4, 1, 0), (1, 3, 0)]
    figures = {(each["variant"], each["name"]): each["value"] for each in comparison.result.figures}
    assert [figures[variant, "distance"] for variant in recipe.VARIANTS] == [0, 1, 2]
    assert [figures[variant, "ms a step"] for variant in recipe.VARIANTS] == pytest.approx([1000 * 0.2 / STEPS] * 3)
    _, _, (images, labels), _ = recipe.load("fashion_mnist_10k", recipe.DATA_DIR, LIMIT)
    for run, model in zip(comparison.result.runs, made.values(), strict=True):
        right = model.predict(images, verbose=0).argmax(axis=-1) == labels
        assert run["metrics"]["test"]["accuracy"] == pytest.approx(right.mean(), abs=1e-6)


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="it is not refused on JAX")
def test_other_backends_are_refused_with_the_remedy(recipe):
    with pytest.raises(NotImplementedError, match="KERAS_BACKEND=jax"):
        recipe.main(limit=LIMIT)


def test_batches_are_divisible_and_alike_in_each_process(recipe):
    images, labels = np.arange(13), np.arange(13)
    first, second = (list(recipe.batches(images, labels, 5).as_numpy_iterator()) for _ in range(2))
    assert [len(x) for x, _ in first] == [12]
    np.testing.assert_equal(first, second)
    assert not np.array_equal(first[0][0], list(recipe.batches(images, labels, 6).as_numpy_iterator())[0][0])
