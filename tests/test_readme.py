"""The README's commands and code are run, or checked against the real command lines."""

import importlib
import re
import shlex
import subprocess
import tomllib

import cyclopts
import pytest

from evidence.recipes import ROOT, find_recipes
from tests.conftest import load_module

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
PYTHON = [text for language, text in BLOCKS if language == "python"]


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
@pytest.mark.parametrize("command", sorted({command.rpartition(" && ")[2] for command in COMMANDS}))
def test_command_line_is_understood(command):
    if command.endswith("-m pytest") or command.startswith(("pip install", "tfds build")):
        return
    main, tokens = main_and_tokens(command)
    app = cyclopts.App(default_command=main)
    if tokens != ["--help"]:
        app.parse_args(tokens, exit_on_error=False, print_error=False)


def test_the_two_commands_come_first_and_install():
    install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python "
    assert COMMANDS[0] == install + "recipes/regularization/dropout.py"
    assert COMMANDS[1] == install + "-m pytest"


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep --max-count=1 '(.*?)' README.md", script)[1]
    (command,) = [line for line in README.splitlines() if re.search(pattern, line)]
    assert command == COMMANDS[1]


@pytest.mark.parametrize("code", PYTHON)
def test_code_runs(code, capsys):
    exec(code, {})
    assert "verdict" in capsys.readouterr().out


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_flags_that_the_text_names_exist():
    common = {"--help", *(f"--{name.replace('_', '-')}" for recipe in find_recipes() for name in parameters(recipe))}
    known = common | {"--check", "--full", "--manual-dir"}
    text = re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= known


def parameters(recipe):
    return load_module(recipe).main.__kwdefaults__


def test_gpu_and_jax_versions_are_those_of_the_requirements():
    requirements = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (tensorflow,) = [line for line in requirements if re.match(r"tensorflow\W", line) and "datasets" not in line]
    assert tensorflow.replace("tensorflow", "tensorflow[and-cuda]", 1) in README
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "jax" in metadata["optional-dependencies"]
    assert f"keras{metadata['dependencies'][0].removeprefix('keras')}" in requirements


def test_only_files_of_the_project_are_in_git():
    """No generated or machine-dependent file is committed, and nothing names a folder of one machine."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    allowed = {"README.md", "LICENSE", "requirements.txt", "pyproject.toml", ".gitignore", ".ci"}
    allowed |= {"callbacks", "recipes", "evidence", "data", "tests"}
    assert {name.partition("/")[0] for name in listed.stdout.splitlines()} <= allowed
