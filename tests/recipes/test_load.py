"""What `load` says of data that it cannot load: tested once for each text of it, for recipes repeat it."""

import ast
import inspect
import shutil

import keras
import pytest

from evidence.recipes import ROOT, find_recipes
from tests.conftest import ANOTHER, load_module

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "tensorflow", reason="it is the same on all backends, and tested on TensorFlow"
)


def different_loads():
    """Return {text of a function `load`: the first recipe that has it}."""
    recipes = {}
    for recipe in find_recipes():
        text = recipe.read_text(encoding="utf-8")
        (load,) = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == "load"]
        recipes.setdefault(ast.get_source_segment(text, load), recipe)
    return recipes


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory):
    """A folder with copies of the embedded data sets, in each of which one byte is another."""
    folder = tmp_path_factory.mktemp("corrupted")
    for name in ANOTHER:
        shutil.copytree(ROOT / "data" / name, folder / name)
        (file,) = (folder / name / "1.0.0").glob("*train.tfrecord*")
        contents = bytearray(file.read_bytes())
        contents[100] ^= 0xFF
        file.write_bytes(contents)
    return folder


def test_copies_of_the_present_text_are_equal():
    """Those that give float32 in 0 to 1; the texts of before do not."""
    assert len([text for text in different_loads() if "values 0 to 1." in text]) == 1


@pytest.mark.parametrize("recipe", [pytest.param(path, id=path.stem) for path in different_loads().values()])
@pytest.mark.parametrize(
    "case, cause",
    [
        ("nonsense", "not found"),
        ("mnist", "could not find data"),
        ("missing folder", "there is no folder"),
        ("another kind", "does not support a supervised structure"),
        ("corrupted", "corrupted record"),
    ],
)
def test_data_that_cannot_be_loaded_is_explained_in_the_last_line(recipe, case, cause, other_data, corrupted, tmp_path):
    module = load_module(recipe)
    default = inspect.signature(module.main).parameters["dataset"].default
    if case == "another kind" and default == "shakespeare":
        # Texts need no labels.
        cause = "Unknown split 'validation'"
    dataset, data_dir = {
        "missing folder": (ANOTHER[default], tmp_path / "missing"),
        "corrupted": (default, corrupted),
        "another kind": ("unlabelled", other_data),
    }.get(case, (case, other_data))
    with pytest.raises(Exception) as caught:  # noqa: PT011, B017
        module.main(dataset=dataset, data_dir=data_dir, epochs=1)
    note = caught.value.__notes__[-1]
    assert cause in note
    assert repr(dataset) in note
    assert str(data_dir) in note
    assert "\n" not in note
