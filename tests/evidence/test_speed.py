import json

import keras
import numpy as np
import pytest
from keras import layers

if keras.backend.backend() != "tensorflow":
    pytest.skip("the speeds are measured on TensorFlow", allow_module_level=True)

from evidence import speed, tables


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(speed, "BATCH_SIZE", 4)
    monkeypatch.setattr(speed, "STEPS", 3)
    monkeypatch.setattr(speed, "EPOCHS", 2)
    network = lambda: keras.Sequential([keras.Input((28, 28, 1)), layers.Flatten(), layers.Dense(10)])  # noqa: E731
    monkeypatch.setattr(speed, "NETWORKS", {"dense": network})


def test_ways_take_turns_after_one_that_compiles(small, monkeypatch):
    turns = []
    ways = {name: lambda epochs, name=name: turns.append((name, epochs)) for name in (tables.OURS, "second", "third")}
    monkeypatch.setattr(speed, "contenders", lambda *_: ways)
    speeds = speed.measure("dense", rounds=3)
    assert turns == [(name, epochs) for epochs in (1, 2, 2, 2) for name in ways]
    assert {name: len(values) for name, values in speeds.items()} == dict.fromkeys(ways, 3)


@pytest.mark.parametrize("network", speed.NETWORKS)
def test_all_ways_do_the_same_training(network, monkeypatch):
    # One batch an epoch, so that the order of the images does not matter, and no dropout.
    monkeypatch.setattr(speed, "BATCH_SIZE", 8)
    monkeypatch.setattr(speed, "STEPS", 1)
    monkeypatch.setattr(layers.Dropout, "call", lambda self, inputs, training=None: inputs)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (8, 28, 28, 1), dtype=np.uint8)
    labels = generator.integers(0, 10, 8)
    models, make = [], speed.NETWORKS[network]

    def make_and_keep():
        keras.utils.set_random_seed(0)
        models.append(make())
        return models[-1]

    monkeypatch.setitem(speed.NETWORKS, network, make_and_keep)
    for train in speed.contenders(network, images, labels).values():
        train(5)
    keras.utils.set_random_seed(0)
    start = make().get_weights()
    for first, *others, before in zip(*(model.get_weights() for model in models), start, strict=True):
        assert len(others) == 3
        for other in others:
            np.testing.assert_allclose(other, first, rtol=1e-4, atol=1e-5)
        assert not np.allclose(first, before, atol=1e-4)


def test_hand_written_loop_trains_on_all_images_shuffled_anew(monkeypatch):
    seen = []

    class Watch(layers.Layer):
        def call(self, inputs):
            speed.tf.numpy_function(lambda batch: seen.append(batch[:, 0, 0, 0].tolist()), [inputs], [])
            return inputs

    monkeypatch.setattr(speed, "BATCH_SIZE", 4)
    images = np.zeros((12, 28, 28, 1), np.uint8) + np.arange(12, dtype=np.uint8).reshape(-1, 1, 1, 1)
    model = keras.Sequential([keras.Input((28, 28, 1), dtype="uint8"), Watch(), layers.Flatten(), layers.Dense(10)])
    data = speed.batches(images, np.zeros(12, int))
    assert not data.options().autotune.enabled
    speed.by_hand(model, data)(2)
    assert [len(batch) for batch in seen] == [4] * 6
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_ratio_is_the_median_of_the_ratios_round_by_round():
    speeds = {tables.OURS: [10, 22, 48, 104, 224], "other": [10, 20, 40, 80, 160]}
    median, lower, upper = tables.speed_ratios(speeds)["other"]
    assert median == pytest.approx(1.2)
    assert 1 <= lower < median < upper <= 1.4


def test_result_is_saved_and_shown(small, tmp_path, capsys):
    speed.main(rounds=2, save=tmp_path / "speed.json")
    result = json.loads((tmp_path / "speed.json").read_text())
    columns = tables.speed_table(result)
    assert columns["network"] == ["dense"]
    others = ["one step an execution", "loop by hand", "fit on arrays, default settings"]
    assert list(columns)[2:] == [f"relative to {name}" for name in others]
    output = capsys.readouterr().out
    assert "dense" in output
    assert tables.speed_note(result).startswith(
        "Medians (quartiles) of 2 rounds of 2 epochs of 3 steps of 4 images; Keras"
    )
