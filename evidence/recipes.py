"""What the evidence runner knows of a recipe: where it is, its card, its result, and whether that result is stale."""

import ast
import functools
import hashlib
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The order in which a reader meets the themes; a theme that is not named here comes after them.
THEMES = [
    "numerics",
    "initialization",
    "gradients",
    "normalization",
    "regularization",
    "augmentation",
    "losses",
    "averaging",
    "optimizers",
    "schedules",
    "architectures",
    "transfer",
    "efficiency",
    "reproducibility",
    "combined",
]

# What is measured of a recipe beside its default run and its search: the result's name, and the flags that make it.
FURTHER = {
    "bag_of_tricks": {"ablation": ["--ablate"], "full": ["--dataset", "fashion_mnist_full"]},
    "class_imbalance": {
        "thinned": ["--dataset", "fashion_mnist_10k"],
        "thinned.search": ["--dataset", "fashion_mnist_10k", "--search"],
    },
}

# Seeds of a result, and of a search, which compares every rate of a grid, for which fewer do.
SEEDS, SEARCH_SEEDS = 10, 3

# Recipes whose subject is time: each is measured alone, with all cores; its search is not, for it compares no times.
EXCLUSIVE = {
    "bag_of_tricks",
    "data_parallel",
    "fewer_calls",
    "mixed_precision",
    "quantization",
    "rematerialization",
}

# Patterns of what a measured figure looks like.
NUMBER = r"-?\d[\d,]*(?:\.\d+)?"
COUNT = rf"(?:{NUMBER}|two|three|four|five|ten)"
MEASURED = [
    rf"{NUMBER} ± {NUMBER}",
    rf"{NUMBER} (?:to {NUMBER} )?points?\b",
    rf"{COUNT} (?:of \w+ )?(?:seeds|runs)\b",
    r"\d\.\d+ (?:\w+ )?accuracy\b",
    r"\d+\.\d+ (?:%|times\b)",
    # Not the usual settings, such as 0.001, 0.0003 and 0.999.
    r"\b0\.(?!0*[1-9]\b|9+\b)\d{3,}\b",
    rf"\b(?:accuracy|loss|gap|error)(?: \w+){{0,3}} (?:is|was|of|from|to|reaches|rises|falls) (?:about )?{NUMBER}",
]

LABELS = ["Symptom", "Technique", "Change", "Look for", "Cost", "Source"]


def find_recipes(root=ROOT):
    """Return the paths of all recipes below `root`, by theme and name."""

    def order(path):
        theme = path.parent.name
        return THEMES.index(theme) if theme in THEMES else len(THEMES), theme, path.stem

    return sorted((root / "recipes").glob("*/*.py"), key=order)


def read_card(recipe):
    """Return a recipe's card as a dict: its `Name`, its `Summary`, and the text of each label.

    Raises:
        ValueError: the docstring does not begin with "Name: summary.", or its labels are not LABELS, in that order.
    """
    docstring = ast.get_docstring(_parse(recipe.read_text(encoding="utf-8"))) or ""
    first_line, _, rest = docstring.partition("\n")
    parts = re.split(rf"^({'|'.join(LABELS)}): ", rest, flags=re.MULTILINE)
    if parts[1::2] != LABELS or not re.fullmatch(r"[^:]+: .+\.", first_line):
        raise ValueError(
            f'{recipe} has no complete card: its docstring must begin with "Name: one sentence." and go on with '
            f"paragraphs labelled {', '.join(LABELS)}, in this order; it has {parts[1::2]}."
        )
    name, _, summary = first_line.partition(": ")
    return {"Name": name, "Summary": summary} | {
        label: text.strip() for label, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def read_headline(recipe):
    """Return (variant, figure) that carry a recipe's story, as its constant `HEADLINE` names them.

    The figure is None where the metric carries it; both are None for a recipe without the constant.
    """
    for statement in _parse(recipe.read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.Assign) and [ast.unparse(target) for target in statement.targets] == ["HEADLINE"]:
            headline = ast.literal_eval(statement.value)
            return (headline, None) if isinstance(headline, str) else headline
    return None, None


def measured_figures(text):
    """Return the phrases of prose that look like measured figures, which belong into results.

    Prose may name settings ("start with a rate of 0.5"). What is looked for is how measurements sound: ±, points,
    seeds, decimals of a percentage or of "times", a figure of three digits or more behind the point, and what an
    accuracy, a loss or a gap is.
    """
    # Code holds settings, be it indented, fenced or between backticks.
    prose = re.sub(r"^```.*?^```|^    .*?$|`[^`]*`", " ", text, flags=re.MULTILINE | re.DOTALL)
    return [match[0] for match in re.finditer("|".join(MEASURED), " ".join(prose.split()))]


def prose_of_card(card):
    """Return a card's text without its `Source`, which may have figures of its own."""
    return "\n".join([card["Summary"], *(card[label] for label in LABELS if label != "Source")])


@functools.cache
def _parse(text):
    """Return the syntax tree of a Python file's text, made once."""
    return ast.parse(text)


def result_path(recipe):
    """Return the path of the JSON file that holds the result of a recipe's default run; the picture is beside it."""
    root = recipe.parent.parent.parent
    return root / "evidence" / recipe.parent.name / f"{recipe.stem}.json"


def measurements(recipe):
    """Return {path of the JSON file that holds a result: the flags that make it}, with the default run's first."""
    path = result_path(recipe)
    further = FURTHER.get(recipe.stem, {})
    if "comparison.search(" in recipe.read_text(encoding="utf-8"):
        further = {"search": ["--search"]} | further
    return {path: []} | {path.with_name(f"{path.stem}.{name}.json"): flags for name, flags in further.items()}


def seeds_for(flags, seeds):
    """Return the number of seeds of a result that is made with these flags."""
    return min(seeds, SEARCH_SEEDS) if "--search" in flags else seeds


def digest(recipe, flags=()):
    """Return a digest of the code that a recipe's result depends on: its own, and that of the callbacks it imports.

    Comments, docstrings and formatting are left out, and so is `callbacks/comparison`, which measures but does not
    train; of a search the rates in `VARIANTS`, too, which are what it finds. The digest is the same for every version
    of Python that runs the recipes.
    """
    codes = [_code(recipe.read_text(encoding="utf-8"), "--search" in flags)]
    codes += [_code(file.read_text(encoding="utf-8")) for file in _imported_callbacks(recipe)]
    return hashlib.sha256("\n".join(codes).encode()).hexdigest()


def why_stale(recipe, path, flags, seeds):
    """Return in words why the result at `path`, made with flags, must be measured again for `seeds` seeds, or None."""
    if not path.exists():
        return "it has no result"
    if not path.with_suffix(".svg").exists():
        return "its picture is missing"
    result = json.loads(path.read_text(encoding="utf-8"))
    if result["digest"] != digest(recipe, flags):
        return "its code has changed since it was measured"
    measured = len({run["seed"] for run in result["runs"]})
    if measured < seeds:
        return f"its result has {measured} seeds, not {seeds}"
    return None


def unprepared_dataset(flags, root=ROOT):
    """Return the name of the data set that a recipe's flags ask for if `root`/data does not hold it, else None."""
    name = dict(zip(flags, flags[1:], strict=False)).get("--dataset")
    return None if name is None or (root / "data" / name).is_dir() else name


def _imported_callbacks(recipe):
    """Return the files of the callbacks that a recipe imports, directly or through another callback, in order."""
    folder = recipe.parent.parent.parent / "callbacks"
    files, unread = set(), [recipe]
    while unread:
        for module, name in _imports_from_callbacks(unread.pop()):
            if module == "callbacks":
                module = {name: module for module, name in _imports_from_callbacks(folder / "__init__.py")}[name]
            name = module.split(".")[1]
            if name == "comparison":
                continue
            # A callback is a file, or a folder with several.
            for file in [folder / f"{name}.py"] if (folder / f"{name}.py").exists() else (folder / name).glob("*.py"):
                if file not in files:
                    files.add(file)
                    unread.append(file)
    return sorted(files)


def _imports_from_callbacks(file):
    """Return (module, name) for every `from callbacks… import name` in a Python file."""
    return [
        (node.module, alias.name)
        for node in ast.walk(_parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("callbacks.")
        for alias in node.names
    ]


@functools.cache
def _code(text, is_search=False):
    """Return the syntax tree of a Python file's text, without docstrings, as the text of nested lists.

    `ast.dump` and `ast.unparse` would do, if their output did not differ between versions of Python.
    """

    def reduce_variant(value):
        # A rate, or a tuple that ends in one.
        return reduce(value.elts[:-1]) if isinstance(value, ast.Tuple) else []

    def reduce(node):
        if isinstance(node, list):
            return [reduce(item) for item in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        is_variants = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VARIANTS"
        if is_search and is_variants and isinstance(node.value, ast.Dict):
            return [reduce(node.value.keys), [reduce_variant(value) for value in node.value.values]]
        fields = dict(ast.iter_fields(node))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            fields["body"] = node.body[ast.get_docstring(node) is not None :]
        # Empty fields are left out because new versions of Python add some.
        return [
            type(node).__name__,
            *([name, reduce(value)] for name, value in fields.items() if value not in (None, [])),
        ]

    return repr(reduce(_parse(text)))
