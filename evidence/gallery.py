"""The texts made from the results: the gallery (`evidence/README.md`) and the tables in the project's README."""

import importlib
import inspect
import json
from pathlib import Path

import callbacks
from callbacks.comparison import Result
from callbacks.comparison.report import escape_markdown, markdown, markdown_table, table
from evidence.recipes import ROOT, find_recipes, measurements, read_card

INTRODUCTION = """# Measured effects

Made by `python -m evidence` from the results beside this file; nothing here is typed by hand.

Every variant of a recipe is trained from the same starting weights, once for each seed, and evaluated on the test data
once, when its training has ended. A *difference* is the mean over seeds of the variant's figure minus the baseline's at
the same seed, with its 95 % t-interval, Bonferroni-adjusted for the number of differences in the table. The verdict is
"better" or "worse" when that whole interval lies on one side of zero ("slightly", when it is within the margin, the
smallest difference that matters, as well), "the same" when it lies across zero and within the margin, and else
"undecided", with the number of seeds that would decide. The intervals cover the seeds, not the choice of the test
images: with other test images the figures would differ by more than the intervals say. The *gap* is the training figure
minus the test figure; the *time* is that of an epoch, relative to the baseline.
"""


def generated_files(root=ROOT):
    """Return {path: text} of every file that is made from the results, as it should be now.

    Raises:
        ValueError: the README lacks one of the pairs of markers, or a recipe has no complete card.
    """
    recipes = find_recipes(root)
    readme = (root / "README.md").read_text(encoding="utf-8")
    readme = _between_markers(readme, "symptoms", _symptoms(recipes))
    readme = _between_markers(readme, "effects", _effects(recipes))
    readme = _between_markers(readme, "callbacks", _callbacks())
    for name in ("overhead", "speed"):
        readme = _between_markers(readme, name, _measured(root / "evidence" / f"{name}.json"))
    doctor = _training_doctor(root / "evidence" / "training_doctor.json")
    gallery = "\n".join([INTRODUCTION, *map(_section, recipes), doctor])
    return {root / "README.md": readme, root / "evidence" / "README.md": gallery}


def _between_markers(readme, name, text):
    begin, end = f"<!-- {name}: made by python -m evidence -->", f"<!-- end of {name} -->"
    if readme.count(begin) != 1 or readme.count(end) != 1:
        raise ValueError(f"README.md must hold the lines {begin!r} and {end!r}, once each.")
    before, _, rest = readme.partition(begin)
    return f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"


def _symptoms(recipes):
    rows = []
    for recipe in recipes:
        card = read_card(recipe)
        symptom = _one_line(card["Symptom"]).replace("|", r"\|")
        rows.append([symptom[0].upper() + symptom[1:], f"[{card['Name']}]({_relative(recipe)})"])
    return markdown_table({"What you see": [row[0] for row in rows], "What to try": [row[1] for row in rows]})


def _effects(recipes):
    rows, pictures = [], []
    for recipe, path, flags in _results(recipes):
        name, result = read_card(recipe)["Name"], Result.load(path)
        if result.grid is not None:
            continue
        summary, columns = result.summary(), table(result)
        for index, row in enumerate(summary[1:], start=1):
            rows.append(
                {
                    "recipe": " ".join([f"[{name}]({_relative(recipe)})", *flags]),
                    "variant": escape_markdown(row["variant"]),
                    "against": escape_markdown(result.baseline),
                    "figure": f"{result.split} {result.metric}",
                    "difference": columns.get("difference", ["–"] * len(summary))[index],
                    "verdict": row["verdict"] or "–",
                }
            )
        pictures.append(f"![{' '.join([name, *flags])}: curves and differences]({_relative(path.with_suffix('.svg'))})")
    if not rows:
        return "Nothing has been measured yet."
    return "\n\n".join([markdown_table({title: [row[title] for row in rows] for title in rows[0]}), *pictures])


def _callbacks():
    lines = []
    for name in callbacks.__all__:
        callback = getattr(callbacks, name)
        sentence = inspect.getdoc(callback).partition("\n")[0]
        # A callback is a file or, like Comparison, a folder.
        path = Path(*callback.__module__.split(".")[:2])
        lines.append(f"- [`{name}`]({path if (ROOT / path).is_dir() else path.with_suffix('.py')}): {sentence}")
    return "\n".join(lines)


def _measured(path):
    if not path.exists():
        return "Nothing has been measured yet."
    # Here, because it imports TensorFlow.
    module = importlib.import_module(f"evidence.{path.stem}")
    result = json.loads(path.read_text(encoding="utf-8"))
    return f"{markdown_table(module.table(result))}\n\n{module.note(result)}"


def _training_doctor(path):
    head = "## What TrainingDoctor finds\n\n"
    if not path.exists():
        return f"{head}Not measured yet.\n"
    from evidence import training_doctor

    result = json.loads(path.read_text(encoding="utf-8"))
    if not all("group" in run for run in result["runs"]):
        # Of an earlier kind of measurement.
        return f"{head}Not measured yet.\n"
    return f"""{head}    python -m evidence.training_doctor

Healthy runs, and runs that were made sick. Several findings can hold of one run.

{markdown_table(training_doctor.table(result))}

Programs that people asked about in public, and their repairs.

{markdown_table(training_doctor.program_table(result))}

{training_doctor.note(result)}
"""


def _section(recipe):
    card = read_card(recipe)
    parts = [f"## {card['Name']}", f"{card['Name']} {card['Summary']}", f"*Symptom:* {_one_line(card['Symptom'])}"]
    for _, path, flags in _results([recipe]):
        result = Result.load(path)
        seeds = len({run["seed"] for run in result.runs})
        settings = ", ".join(f"{name} {value}" for name, value in result.settings.items() if value is not None)
        environment = result.environment
        parts += [
            f"    python {' '.join([_relative(recipe), *flags])} --seeds {seeds}",
            markdown(result),
            f"![{card['Name']}: curves and differences]({path.parent.name}/{path.stem}.svg)",
            f"{seeds} seeds; {settings}.\nKeras {environment['keras']} on {environment['backend']}, "
            f"Python {environment['python']}; {environment['processor']}.",
        ]
    return "\n\n".join(parts if len(parts) > 3 else [*parts, "Not measured yet."]) + "\n"


def _results(recipes):
    """Return (recipe, path of the JSON file, flags that made it) for each result that there is."""
    return [
        (recipe, path, flags) for recipe in recipes for path, flags in measurements(recipe).items() if path.exists()
    ]


def _one_line(text):
    return " ".join(text.split())


def _relative(path):
    return "/".join(path.parts[-3:])
