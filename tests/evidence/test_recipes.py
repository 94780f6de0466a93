import json
import shutil

import pytest

from evidence.recipes import LABELS, ROOT, THEMES, digest, find_recipes, read_card, result_path, why_stale

RECIPE = '''"""Name: it does this.

Symptom: a.

Technique: b
over two lines.

Change: c.

Look for: d.

Cost: e.

Source: f.
"""

import keras

RATE = 0.5


def main():
    """Train."""
    return keras.layers.Dropout(RATE)  # the technique
'''


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "recipes" / "numerics" / "name.py"
    path.parent.mkdir(parents=True)
    path.write_text(RECIPE)
    return path


def changed(recipe, old, new):
    """Return the digest after a change of the recipe's text."""
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new))
    return digest(recipe)


def test_recipes_are_found_by_theme_and_name(tmp_path):
    for name in ("new/a", "schedules/b", "numerics/z", "numerics/a"):
        path = tmp_path / "recipes" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    found = [f"{path.parent.name}/{path.stem}" for path in find_recipes(tmp_path)]
    assert found == ["numerics/a", "numerics/z", "schedules/b", "new/a"]


def test_every_theme_in_use_is_known():
    assert {path.parent.name for path in find_recipes()} <= set(THEMES)


def test_card_is_read(recipe):
    card = read_card(recipe)
    assert (card["Name"], card["Summary"]) == ("Name", "it does this.")
    assert [card[label] for label in LABELS] == ["a.", "b\nover two lines.", "c.", "d.", "e.", "f."]


@pytest.mark.parametrize(
    "old, new",
    [
        ("Cost: e.\n", ""),
        ("Name: it does this.", "It does this."),
        ("Symptom: a.", "Source: a."),
        ('"""Name', 'X = """Name'),
    ],
)
def test_incomplete_card_is_refused(recipe, old, new):
    changed(recipe, old, new)
    with pytest.raises(ValueError, match="no complete card"):
        read_card(recipe)


@pytest.mark.parametrize(
    "old, new",
    [
        ("Technique: b", "Technique: another text"),
        ('"""Train."""', '"""Train the network."""'),
        ('    """Train."""\n', ""),
        ("# the technique", "# here"),
        ("keras.layers.Dropout(RATE)", "keras.layers.Dropout( RATE )"),
        ("RATE = 0.5", "# Why.\nRATE = 0.5"),
    ],
)
def test_digest_ignores_docstrings_comments_and_formatting(recipe, old, new):
    before = digest(recipe)
    assert changed(recipe, old, new) == before


@pytest.mark.parametrize(
    "old, new",
    [
        ("0.5", "0.6"),
        ("RATE", "RATES"),
        ("import keras", "import keras as keras"),
        ("Dropout(RATE)", "Dropout(-RATE)"),
        ("def main():", "def main(x=None):"),
        ("return keras.layers.Dropout(RATE)", 'return "text", keras.layers.Dropout(RATE)'),
    ],
)
def test_digest_sees_changes_of_the_code(recipe, old, new):
    before = digest(recipe)
    assert changed(recipe, old, new) != before


def test_digest_is_the_same_for_every_python(recipe):
    # Computed with Python 3.11, 3.12 and 3.13.
    assert digest(recipe) == "4a0caed34ac83888c7fa3ce2bc3bc1eff982a74bd6af639551fb8704d61c61f7"


def test_digest_covers_the_callbacks_that_a_recipe_imports(tmp_path):
    for folder in ("callbacks", "recipes/numerics"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "callbacks" / "__init__.py").write_text(
        "".join(f"from callbacks.{name.lower()} import {name}\n" for name in ("Comparison", "Outer", "Other"))
    )
    for folder in ("comparison", "folder"):
        (tmp_path / "callbacks" / folder).mkdir()
    for name, text in {
        "comparison/__init__": "",
        "outer": "from callbacks.inner import Inner\nfrom callbacks.folder import Room\n",
        "inner": "",
        "folder/__init__": "from .room import Room\n",
        "folder/room": "",
        "other": "",
    }.items():
        (tmp_path / "callbacks" / f"{name}.py").write_text(text)
    recipe = tmp_path / "recipes" / "numerics" / "name.py"
    recipe.write_text("from callbacks import Comparison, Outer\n")
    before = digest(recipe)
    counting = {"comparison/__init__": False, "other": False, "outer": True, "inner": True, "folder/room": True}
    for name, counts in counting.items():
        path = tmp_path / "callbacks" / f"{name}.py"
        text = path.read_text()
        path.write_text(text + "X = 1\n")
        assert (digest(recipe) != before) == counts, name
        path.write_text(text)
        assert digest(recipe) == before


def test_staleness_is_explained(recipe):
    path = result_path(recipe)
    assert path == recipe.parent.parent.parent / "evidence" / "numerics" / "name.json"
    assert why_stale(recipe, path, seeds=2) == "it has no result"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"digest": digest(recipe), "runs": [{"seed": 0}, {"seed": 1}, {"seed": 1}]}))
    assert why_stale(recipe, path, seeds=2) == "its picture is missing"
    path.with_suffix(".svg").touch()
    assert why_stale(recipe, path, seeds=2) is None
    assert why_stale(recipe, path, seeds=3) == "its result has 2 seeds, not 3"
    changed(recipe, "0.5", "0.6")
    assert why_stale(recipe, path, seeds=2) == "its code has changed since it was measured"


def test_real_recipe_can_be_read_in_a_copy(tmp_path):
    (recipe,) = [path for path in find_recipes() if path.stem == "dropout"]
    for folder in ("callbacks", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    assert digest(tmp_path / recipe.relative_to(ROOT)) == digest(recipe)
