import ast
import io
import json
import re
import shutil
import tokenize

import pytest

from evidence.recipes import (
    LABELS,
    ROOT,
    THEMES,
    digest,
    find_recipes,
    measured_figures,
    measurements,
    prose_of_card,
    read_card,
    read_headline,
    result_path,
    why_stale,
)

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


@pytest.mark.parametrize(
    "new, counts",
    [
        ('{"a": ("x", 0.3), "b": 0.1}', False),
        ('{"a": ("x", 0.1), "b": 0.3}', False),
        ('{"a": ("y", 0.1), "b": 0.1}', True),
        ('{"a": ("x", 0.1), "c": 0.1}', True),
        ('{"a": ("x", 0.1)}', True),
        ('{"a": ("x", 0.1), "b": 0.1}\nOTHER = 0.1', True),
    ],
)
def test_digest_of_a_search_leaves_out_the_rates_that_it_finds(recipe, new, counts):
    variants = '{"a": ("x", 0.1), "b": 0.1}'
    digests = []
    for text in (variants, new):
        recipe.write_text(RECIPE.replace("RATE = 0.5", f"RATE = 0.5\nVARIANTS = {text}"))
        digests.append((digest(recipe), digest(recipe, ["--search"])))
    assert digests[0][0] != digests[1][0]
    assert (digests[0][1] != digests[1][1]) == counts


def test_recipe_with_a_search_has_its_result(recipe):
    assert [path.name for path in measurements(recipe)] == ["name.json"]
    recipe.write_text(RECIPE.replace("RATE = 0.5", "RATE = 0.5  # comparison.search(VARIANTS, GRID)"))
    path = recipe.parent.parent.parent / "evidence" / "numerics" / "name.search.json"
    assert measurements(recipe)[path] == ["--search"]


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
    assert why_stale(recipe, path, [], seeds=2) == "it has no result"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"digest": digest(recipe), "runs": [{"seed": 0}, {"seed": 1}, {"seed": 1}]}))
    assert why_stale(recipe, path, [], seeds=2) == "its picture is missing"
    path.with_suffix(".svg").touch()
    assert why_stale(recipe, path, [], seeds=2) is None
    assert why_stale(recipe, path, [], seeds=3) == "its result has 2 seeds, not 3"
    changed(recipe, "0.5", "0.6")
    assert why_stale(recipe, path, [], seeds=2) == "its code has changed since it was measured"


@pytest.mark.parametrize(
    "line, headline",
    [
        ("RATE = 0.5", (None, None)),
        ('HEADLINE = "dropout 0.5"', ("dropout 0.5", None)),
        ('HEADLINE = ("before, rate 0.1", "epochs to 0.8")', ("before, rate 0.1", "epochs to 0.8")),
    ],
)
def test_headline_is_read_without_running_the_recipe(line, headline, recipe):
    recipe.write_text(RECIPE.replace("RATE = 0.5", f"raise SystemExit\n{line}"))
    assert read_headline(recipe) == headline


@pytest.mark.parametrize(
    "text, found",
    [
        ("the loss is 0.446 after 13 epochs", ["loss is 0.446"]),
        ("it gains 1.4 ± 0.9 points", ["1.4 ± 0.9"]),
        ("9 points at once, or 2 to 4 points", ["9 points", "2 to 4 points"]),
        ("an epoch takes 1.4 times as long", ["1.4 times"]),
        ("no difference is measurable at five seeds", ["five seeds"]),
        ("the loss is NaN in all five runs", ["five runs"]),
        ("test accuracy, 0.822 and 0.825", ["0.822", "0.825"]),
        ("validation accuracy after one epoch was 0.66", ["accuracy after one epoch was 0.66"]),
        ("ends at 0.26 test accuracy", ["0.26 test accuracy"]),
        ("93.25 % of them", ["93.25 %"]),
        ("the share\nis 0.123", ["0.123"]),
    ],
)
def test_measured_figures_are_seen(text, found):
    assert measured_figures(text) == found


@pytest.mark.parametrize(
    "text",
    [
        "Start with 0.5 for wide dense layers, 0.1 to 0.3 elsewhere",
        "rates of 0.001, 0.0003 and 0.01, a momentum of 0.999",
        "a hundred steps of 128 images; twice the time; 10 % of the steps",
        "`keras.losses.Huber(delta=0.125)` has a loss of its own",
        "use it:\n\n    accuracy = 0.446  # five seeds\n\nand so on",
        "the loss starts at about log(classes), one epoch in 32",
        "an example:\n```python\naccuracy = 0.446  # five seeds\n```\n",
    ],
)
def test_settings_are_no_measured_figures(text):
    assert measured_figures(text) == []


def test_a_source_may_have_figures_of_its_own():
    card = dict.fromkeys(["Summary", *LABELS], "It gains.") | {"Source": "It reports 93.59 ± 0.16 points."}
    assert measured_figures(prose_of_card(card)) == []


@pytest.mark.parametrize("path", find_recipes(), ids=lambda path: path.stem)
def test_card_holds_no_measured_figure(path):
    assert not measured_figures(prose_of_card(read_card(path))), "figures belong into results, and the pages show them"


def prose_of_code(path):
    """Return the comments of a Python file, and its docstrings but that of the module, which is a recipe's card."""
    text = path.read_text(encoding="utf-8")
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT]
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    return " ".join(comments + [ast.get_docstring(node) or "" for node in nodes])


@pytest.mark.parametrize("path", find_recipes(), ids=lambda path: path.stem)
def test_comments_hold_no_measured_figure(path):
    assert not measured_figures(prose_of_code(path)), "figures belong into results, and the pages show them"


@pytest.mark.parametrize(
    "path",
    [ROOT / "README.md", ROOT / "evidence" / "README.md", *sorted((ROOT / "docs").glob("*.md"))],
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_what_is_written_by_hand_in_markdown_holds_no_measured_figure(path):
    text = path.read_text(encoding="utf-8")
    by_hand = re.sub(r"<!-- ([\w ]+): made .*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    assert not measured_figures(by_hand)


def test_real_recipe_can_be_read_in_a_copy(tmp_path):
    (recipe,) = [path for path in find_recipes() if path.stem == "dropout"]
    for folder in ("callbacks", "recipes"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    assert digest(tmp_path / recipe.relative_to(ROOT)) == digest(recipe)
