import json

import keras
import numpy as np
import pytest
from keras import layers

if keras.backend.backend() != "tensorflow":
    pytest.skip("the costs are measured on TensorFlow", allow_module_level=True)

from evidence import overhead, tables


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(overhead, "BATCH_SIZE", 4)
    monkeypatch.setattr(overhead, "STEPS", 3)
    network = lambda: keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), layers.Dense(10)])  # noqa: E731
    monkeypatch.setattr(overhead, "NETWORKS", {"dense": network})


def test_contenders_take_turns_at_every_step(small, monkeypatch):
    steps = []

    class Record(keras.callbacks.Callback):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def on_train_batch_end(self, batch, logs=None):
            steps.append((self.name, batch))

    names = [tables.BASELINE, "second", "third"]
    monkeypatch.setattr(overhead, "contenders", lambda *_: {name: ("kind", [Record(name)]) for name in names})
    kinds, seconds, ends = overhead.measure("dense", jit_compile=False, epochs=2)
    assert steps == [(name, batch) for _ in range(3) for batch in range(3) for name in names]
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(names, 2)
    assert all(0 < end < epoch for name in names for end, epoch in zip(ends[name], seconds[name], strict=True))
    assert kinds == dict.fromkeys(names, "kind")


def test_cost_is_the_median_of_the_ratios_epoch_by_epoch():
    seconds = {tables.BASELINE: [1.0, 2.0, 4.0, 8.0, 16.0], "callback": [1.0, 2.2, 4.8, 10.4, 22.4]}
    ratios = np.array(seconds["callback"]) / seconds[tables.BASELINE]
    median, lower, upper = tables.costs(seconds)["callback"]
    assert median == pytest.approx(np.median(ratios))
    assert lower <= np.percentile(ratios, 25)
    assert upper >= np.percentile(ratios, 75)


def test_second_gradient_computation_gives_the_norm_that_gradient_norms_records(small):
    keras.utils.set_random_seed(0)
    inputs = np.random.default_rng(0).normal(size=(4, 28, 28, 1)).astype("float32")
    targets = np.arange(4)
    model = overhead.NETWORKS["dense"]()
    model.compile(keras.optimizers.SGD(0.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    norms, second = overhead.callbacks.GradientNorms(1), overhead.SecondGradientComputation(inputs, targets)
    model.fit(inputs, targets, verbose=0, callbacks=[norms, second])
    assert norms.history["all"][0] == pytest.approx(float(second._norm(*second.batch)), rel=1e-5)


def test_result_is_saved_and_shown(small, tmp_path, capsys):
    overhead.main(epochs=2, save=tmp_path / "overhead.json")
    result = json.loads((tmp_path / "overhead.json").read_text())
    columns = tables.overhead_table(result)
    assert columns["callback"] == list(result["seconds"][0]["epochs"])[1:]
    assert len(columns) == 5
    output = capsys.readouterr().out
    assert all(name in output for name in columns["callback"])
    assert tables.overhead_note(result).startswith("2 epochs of 3 steps of 4 images; Keras")
