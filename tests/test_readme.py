"""The README, the docs and the pages: links are followed, commands are parsed, code is run."""

import builtins
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from unittest.mock import MagicMock

import cyclopts
import keras
import numpy as np
import pytest
from keras import layers, ops

import callbacks
from evidence.pages import anchor
from evidence.recipes import ROOT, find_recipes
from tests.conftest import load_module

THEME_PAGES = sorted((ROOT / "recipes").glob("*/README.md"))
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS, ROOT / "callbacks" / "README.md", ROOT / "evidence" / "README.md", *THEME_PAGES]
TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
README = TEXTS[ROOT / "README.md"]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]


def name_of(page):
    return "/".join(page.relative_to(ROOT).parts)


def blocks(text, language):
    """Return the texts between fences of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def without_blocks(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(page):
    return [line for text in blocks(TEXTS[page], "sh") for line in text.splitlines()]


# Links


def targets(text):
    return re.findall(r"\]\(([^)\s]+)\)", without_blocks(text))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert targets(TEXTS[page]), "every page leads on"
    for target in targets(TEXTS[page]):
        if target.startswith("https://"):
            continue
        path, _, fragment = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", without_blocks(file.read_text(encoding="utf-8")), flags=re.MULTILINE)
            assert [anchor(heading) for heading in headings].count(fragment) == 1, target


def test_every_page_is_reached_from_the_readme():
    reached, unread = set(), [ROOT / "README.md"]
    while unread:
        page = unread.pop()
        reached.add(page)
        files = {(page.parent / target.partition("#")[0]).resolve() for target in targets(TEXTS[page])}
        unread += [file for file in files if file in TEXTS and file not in reached]
    assert reached == set(PAGES)


# Commands


def main_and_tokens(command):
    """Return the `main` that a command line calls, and its arguments, or None for other programs."""
    tokens = shlex.split(command.replace("NAME", "dropout"))
    while tokens and "=" in tokens[0]:
        tokens.pop(0)
    if tokens[0].rpartition("/")[2] != "python":
        return None
    if tokens[1] == "-m":
        module = importlib.import_module(tokens[2])
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{tokens[2]}.__main__")
        return module.main, tokens[3:]
    return load_module(ROOT / tokens[1]).main, tokens[2:]


# The last of several commands in a line: the others install, which `.ci/run` does with the very same line.
ALL_COMMANDS = sorted({command.rpartition(" && ")[2] for page in PAGES for command in commands(page)})
# Programs that are not this project's. What they install is looked at below.
OTHERS = (
    r"pip install |tfds build \w+ --data_dir |dask scheduler$|dask worker tcp://HOST:8786 --nworkers \d --nthreads 1$"
)


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_command_line_is_understood(command):
    if re.match(OTHERS, command) or re.search(r"python -m pytest( -m smoke)?$", command):
        return
    main, tokens = main_and_tokens(command)
    if "--scheduler" in tokens and "scheduler" not in main.__kwdefaults__:
        pytest.skip("the runner does not know other machines yet")
    app = cyclopts.App(default_command=main)
    if tokens != ["--help"]:
        app.parse_args(tokens, exit_on_error=False, print_error=False)


def test_lines_that_start_clusters_are_python():
    lines = re.findall(r"`(cluster = [^`]+)`", TEXTS[ROOT / "docs" / "many-machines.md"])
    assert [re.search(r"\w+Cluster", line)[0] for line in lines] == ["SLURMCluster", "KubeCluster", "SSHCluster"]
    for line in lines:
        compile(line, "docs", "exec")


def test_the_two_commands_come_first_and_install():
    install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python "
    assert commands(ROOT / "README.md") == [install + "recipes/regularization/dropout.py", install + "-m pytest"]


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep --max-count=1 '(.*?)' README.md", script)[1]
    (command,) = [line for line in README.splitlines() if re.search(pattern, line)]
    assert command == commands(ROOT / "README.md")[1]


def test_readme_is_short():
    assert len(README.splitlines()) <= 200
    # What is read: not the addresses of links.
    assert len(re.sub(r"\]\([^)]*\)", "]", README).encode()) <= 14_000


def test_flags_that_the_texts_name_exist():
    common = {"--help", *(f"--{name.replace('_', '-')}" for recipe in find_recipes() for name in parameters(recipe))}
    known = common | {"--check", "--full", "--manual-dir", "--scheduler"}
    for page in PAGES:
        assert set(re.findall(r"`(--[a-z-]+)", without_blocks(TEXTS[page]))) <= known, page


def parameters(recipe):
    return load_module(recipe).main.__kwdefaults__


def test_versions_and_extras_are_those_of_the_requirements():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (tensorflow,) = [line for line in requirements if re.match(r"tensorflow\W", line) and "datasets" not in line]
    backends = TEXTS[ROOT / "docs" / "backends.md"]
    assert tensorflow.replace("tensorflow", "tensorflow[and-cuda]", 1) in backends
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"keras{metadata['dependencies'][0].removeprefix('keras')}" in requirements
    extras = {extra for command in ALL_COMMANDS for extra in re.findall(r'pip install -e "\.\[(\w+)\]"', command)}
    assert extras == {"jax", "torch", "cluster"}
    assert extras - {"cluster"} <= set(EXTRAS)


# Code


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a copied recipe, the callbacks and the data, as the docs say to copy them."""
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(ROOT / "recipes" / "regularization" / "dropout.py", folder)
    for name in ("callbacks", "data"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.mark.parametrize("place", range(3))
def test_code_of_the_docs_runs(place, project, capsys):
    code = blocks(TEXTS[ROOT / "docs" / "using-a-recipe.md"], "python")
    assert len(code) == 3
    if "def test_" not in code[place]:
        scope = {}
        exec(code[place], scope)
        if "batches" in scope:
            first, second = [np.concatenate([inputs for inputs, _ in scope["batches"]]) for _ in range(2)]
            assert not np.array_equal(first, second)
        else:
            assert "verdict" in capsys.readouterr().out
        return
    assert sum(bool(line) for line in code[place].splitlines()) == 5, "the docs promise five lines"
    (project / "test_dropout.py").write_text(code[place])
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
    process = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "test_dropout.py"],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert "1 passed" in process.stdout, process.stdout


def test_no_other_page_has_python_that_is_not_run():
    with_python = {page for page in PAGES if blocks(TEXTS[page], "python")}
    assert with_python == {ROOT / "docs" / "using-a-recipe.md", ROOT / "callbacks" / "README.md", *THEME_PAGES}


def classifier():
    keras.utils.set_random_seed(0)
    hidden = [layers.Dense(8, activation="relu"), layers.BatchNormalization()]
    model = keras.Sequential([keras.Input((4,)), *hidden, layers.Dense(1, activation="sigmoid")])
    model.compile("adam", "binary_crossentropy", metrics=["accuracy"])
    return model


@pytest.mark.parametrize("code", blocks(TEXTS[ROOT / "callbacks" / "README.md"], "python"))
def test_code_of_the_callbacks_runs(code):
    x = np.random.default_rng(0).normal(size=(96, 4)).astype("float32")
    y = (x.sum(axis=1) > 0).astype("float32")
    exec(code, {"x": x, "y": y, "model": classifier(), "keras": keras, "layers": layers})


class StandIns(dict):
    """Names that the lines to copy use without saying what they are: those of a training, and a mock for any other."""

    def __missing__(self, name):
        if hasattr(builtins, name):
            raise KeyError(name)
        return MagicMock(name=name)


def stand_ins(recipe):
    # As many as the range test has steps in two epochs.
    count = 51 * 128
    images = np.random.default_rng(0).normal(size=(count, 8, 8, 1)).astype("float32")
    labels = np.random.default_rng(1).integers(0, 3, count)
    model = keras.Sequential([keras.Input((8, 8, 1)), layers.Flatten(), layers.Dropout(0.5), layers.Dense(3)])
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    names = vars(load_module(recipe)) | {name: getattr(callbacks, name) for name in callbacks.__all__}
    names |= {"keras": keras, "layers": layers, "ops": ops, "np": np, "model": model, "block": layers.ReLU()}
    names |= {"images": images, "labels": labels, "train": (images, labels), "validation": (images, labels)}
    names |= {"inputs": keras.Input((8, 8, 1)), "training_images": images, "classes": 3, "filters": 4, "logits": []}
    names |= {"x": images[:8] if recipe.stem == "monte_carlo_dropout" else keras.Input((8, 8, 8))}
    names |= {"optimizer": "adam", "loss": "sparse_categorical_crossentropy", "zeros": 19, "ones": 1}
    names |= {"validation_inputs": images, "validation_labels": labels % 2}
    names |= {"examples": count, "batch_size": 256, "epochs": 2, "epochs_per_cycle": 1, "cycle_steps": count // 32}
    # Those of one epoch with batches of 32.
    return StandIns(names | {"steps": count // 32, "steps_per_epoch": count // 32, "seed": 1, "member": 0})


@pytest.mark.parametrize("recipe", find_recipes(), ids=lambda path: path.stem)
def test_lines_to_copy_run(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = TEXTS[recipe.parent / "README.md"]
    section = page.partition(f"[`{recipe.name}`]({recipe.name}): ")[2].partition("\n## ")[0]
    code = blocks(section, "python")
    assert code
    names = stand_ins(recipe)
    for block in code:
        # What a reader is to fill in.
        block = block.replace("..., ", "images, labels, ")
        exec(block.replace(", ...)", ", loss='sparse_categorical_crossentropy')"), names)


def test_only_files_of_the_project_are_in_git():
    """No generated or machine-dependent file is committed, and nothing names a folder of one machine."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    allowed = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore", ".ci"}
    allowed |= {"callbacks", "recipes", "evidence", "data", "docs", "tests"}
    assert {name.partition("/")[0] for name in listed.stdout.splitlines()} <= allowed
