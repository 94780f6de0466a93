import keras
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("the pictures are drawn on TensorFlow", allow_module_level=True)

import callbacks
from evidence import callback_pictures

# `Comparison` draws results, which the themes' pages show.
WITH_PICTURE = {name for name in callbacks.__all__ if hasattr(getattr(callbacks, name), "plot")} - {"Comparison"}


def test_every_callback_that_can_draw_has_a_stored_picture():
    assert {path.stem for path in callback_pictures.FOLDER.glob("*.svg")} == WITH_PICTURE


def test_pictures_are_the_same_when_drawn_again(tmp_path, capsys):
    for name in ("first", "second"):
        callback_pictures.main(count=256, folder=tmp_path / name)
    files = sorted((tmp_path / "first").iterdir())
    assert {path.stem for path in files} == WITH_PICTURE
    for path in files:
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert f"{WITH_PICTURE.pop()}.svg" in capsys.readouterr().out
