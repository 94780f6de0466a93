"""The pages made from cards and results: the README's index, a page a theme, the callbacks, and the measurements.

Nothing here imports Keras or a backend: cards and docstrings are read as text, results as JSON.
"""

import ast
import dataclasses
import functools
import itertools
import json
import math
import re
import statistics
import textwrap

from callbacks.comparison import Result
from callbacks.comparison.report import (
    display_name,
    escape_markdown,
    explanations,
    is_share,
    markdown_table,
    search_table,
    table,
    time_like_the_baseline,
)
from callbacks.comparison.statistics import FEWEST_SEEDS, MOST_SEEDS
from evidence.recipes import EXCLUSIVE, ROOT, find_recipes, measured_figures, measurements, read_card, read_headline
from evidence.tables import (
    costs,
    doctor_note,
    doctor_table,
    overhead_note,
    overhead_table,
    program_table,
    speed_note,
    speed_table,
)

NOT_MEASURED = "Not measured yet: `{}` does it."

# Columns of a table beside the variant, so that it can be read on a phone.
COLUMNS_BESIDE = 4

DASH = "–"

# Seeds of a table of the noise floor, and the variant of it that has the baseline's seed.
GROUP = 10
AGAIN = "A again"


def generated_files(root=ROOT):
    """Return {path: text} of every file that is made from cards, docstrings and results, as it should be now.

    Raises:
        ValueError: a file lacks one of the pairs of markers, or a recipe has no complete card.
    """
    recipes = list(map(_Recipe, find_recipes(root)))
    in_short, noise_floor = _noise_floor(root)
    readme = {"noise floor": in_short, "symptoms": _symptoms(recipes), "recipes": _index(recipes)}
    files = {root / "README.md": readme}
    files[root / "callbacks" / "README.md"] = {"callbacks": _callbacks(root)}
    files[root / "evidence" / "README.md"] = {"noise floor": noise_floor} | _measurements(root)
    texts = {}
    for path, parts in files.items():
        text = path.read_text(encoding="utf-8")
        for name, part in parts.items():
            text = _between_markers(path, text, name, part)
        texts[path] = text
    for theme, of_theme in _by_theme(recipes):
        texts[root / "recipes" / theme / "README.md"] = _theme_page(theme, of_theme)
    return texts


class _Recipe:
    """A recipe's card and results, each read once.

    Attributes:
        path, theme, card: the recipe's file, its folder's name, and what `read_card` gives.
        flags: {path of a result: the flags that make it}, the default run's first.
        measure: the command that measures it, and makes the pages from that.
        page: the address of its section, seen from the root.
    """

    def __init__(self, path):
        self.path, self.theme, self.card = path, path.parent.name, read_card(path)
        self.flags = measurements(path)
        self.measure = f"python -m evidence {path.stem}"
        self.page = f"recipes/{self.theme}/README.md#{anchor(self.card['Name'])}"

    @functools.cached_property
    def results(self):
        """{path: result} of those that there are, but for one of before the headline was another."""
        found = {path: Result.load(path) for path in self.flags if path.exists()}
        if self.default in found:
            stored, (variant, figure) = found[self.default], read_headline(self.path)
            variants = {None, *(run["variant"] for run in stored.runs)}
            figures = {None, *(each["name"] for each in stored.figures)}
            if variant not in variants or figure not in figures:
                del found[self.default]
        return found

    @property
    def default(self):
        """The path of the default run's result."""
        return next(iter(self.flags))

    @functools.cached_property
    def summaries(self):
        """{path: what `summary` gives} of the results that are no searches."""
        return {path: result.summary() for path, result in self.results.items() if result.grid is None}

    @functools.cached_property
    def headline(self):
        """The headline of the default run's result, of the variant and the figure that the recipe names."""
        return self.results[self.default].headline(*read_headline(self.path))


def anchor(heading):
    """Return what code hosts append to a page's address to lead to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _by_theme(recipes):
    return [(theme, list(group)) for theme, group in itertools.groupby(recipes, key=lambda recipe: recipe.theme)]


def _between_markers(path, text, name, part):
    begin, end = f"<!-- {name}: made by python -m evidence -->", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{path.name} in {path.parent} must hold the lines {begin!r} and {end!r}, once each.")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}\n\n{part}\n\n{end}{rest.partition(end)[2]}"


# README


def _symptoms(recipes):
    """Return a line for each theme, with a phrase for each recipe, which is the link to it."""
    lines = []
    for theme, of_theme in _by_theme(recipes):
        phrases = [f"[{first_sentence(recipe.card['Symptom'])}]({recipe.page})" for recipe in of_theme]
        # A line of its own for each, but few lines of the file.
        lines.append(f"- **[{theme.capitalize()}](recipes/{theme}/README.md)**<br>{'<br>'.join(phrases)}")
    return "\n".join(lines)


def _index(recipes):
    """Return a table with a line for each recipe: what it does, what came out, what it costs."""
    rows = []
    for theme, of_theme in _by_theme(recipes):
        rows.append([f"**{theme.capitalize()}**", "", ""])
        for recipe in of_theme:
            does = f"[{recipe.card['Name']}]({recipe.page}): {first_clause(recipe.card['Summary'])}"
            rows.append([does, *map(_unbroken, _index_cells(recipe))])
    titles = ("recipe", "answer", "time, a run")
    return markdown_table({title: [row[place] for row in rows] for place, title in enumerate(titles)})


def _index_cells(recipe):
    """Return the answer of a recipe, and its cost in time with the seconds of a run."""
    if recipe.default not in recipe.results:
        return NOT_MEASURED.format(recipe.measure), DASH
    result, headline = recipe.results[recipe.default], recipe.headline
    (row,) = [row for row in recipe.summaries[recipe.default] if row["variant"] == headline["variant"]]
    words = f"{_name(headline['variant'])}: {answer(headline, result)}"
    times = [time for time in (time_in_words(row), seconds_of_a_run(result)) if time != DASH]
    return words, ", ".join(times) or DASH


def first_sentence(text):
    """Return the first sentence of a paragraph, without its full stop, as the end of a line."""
    return re.split(r"\.(?:\s|$)", _one_line(text), maxsplit=1)[0]


def first_clause(summary):
    """Return a card's summary up to the first comma after three words or more."""
    clauses = summary.removesuffix(".").split(", ")
    for count in range(1, len(clauses) + 1):
        clause = ", ".join(clauses[:count])
        if len(clause.split()) >= 3:
            break
    return clause


def answer(headline, result):
    """Return in a few words what the seeds say of a headline: a difference that is decided, or what is missing."""
    verdict, figure = headline["verdict"], headline["figure"]
    if headline["by_divergence"] or headline["short_verdict"] is None:
        return escape_markdown(verdict)
    if verdict == "the same":
        return verdict
    if verdict.startswith("undecided"):
        return f"undecided, needs {_about(headline['seeds_needed'])} seeds"
    if figure is not None:
        return figure_in_words(figure, headline["difference"], headline["difference_half_width"])
    difference = difference_in_words(headline, result)
    if is_share(result):
        return f"{difference} points"
    return f"{verdict}, {result.metric} {difference}"


def figure_in_words(figure, difference, half_width):
    """Return the difference of a figure of which less is better, such as "8.2 ± 1.1 epochs earlier"."""
    unit, _, rest = figure.partition(" ")
    size = f"{_plain(abs(difference), half_width or difference)} ± {_plain(half_width)}"
    if unit in ("epochs", "steps", "seconds"):
        less, more = ("earlier", "later") if rest.startswith("to ") else ("fewer", "more")
        return f"{size} {unit} {less if difference < 0 else more}"
    return f"{figure} {size} {'lower' if difference < 0 else 'higher'}"


def difference_in_words(row, result):
    """Return a row's difference with its interval, of an accuracy in points: "+1.4 ± 0.3"."""
    difference, half_width = row["difference"], row["difference_half_width"]
    if difference is None:
        return DASH
    scale = 100 if is_share(result) else 1
    if row["seeds"] < FEWEST_SEEDS and row["pairs"] > 1:
        return " to ".join(_signed(scale * value, scale * value) for value in row["range"])
    if half_width is None:
        return _signed(scale * difference, scale * difference)
    # One digit of the interval's width is enough for points, of which a hundredth is nothing; two for others.
    width = max(scale * half_width, 0.01) if is_share(result) else half_width / 10
    if abs(difference) > half_width and _plain(scale * abs(difference), width) == _plain(scale * half_width, width):
        # A digit more, without which an interval that leaves zero out would seem to reach it.
        width /= 10
    return f"{_signed(scale * difference, width or scale * difference)} ± {_plain(scale * half_width, width)}"


def time_in_words(row):
    """Return the time of an epoch relative to the baseline's, from a row of `summary`, or a dash.

    It is "same" within 5 %, the quartiles if they lie on both sides of 1, and else the median, as "1.30 ×".
    """
    ratio = row["time"]
    if ratio is None:
        return DASH
    words = time_like_the_baseline(row) or (f"{ratio:.2f}" if ratio < 1.95 else f"{ratio:.1f}")
    return words if words == "same" else f"{words} ×"


def seconds_of_a_run(result):
    """Return how long the training of all variants took with one seed, the median over seeds, as "25 s"."""
    by_seed = {}
    for run in result.runs:
        if run["epoch_seconds"]:
            by_seed[run["seed"]] = by_seed.get(run["seed"], 0.0) + sum(run["epoch_seconds"])
    return f"{statistics.median(by_seed.values()):.0f} s" if by_seed else DASH


# Themes


def _theme_page(theme, recipes):
    parts = [
        f"# {theme.capitalize()}",
        "Made by `python -m evidence` from the recipes' cards and results. [All recipes](../../README.md) · "
        "[How the figures are made](../../evidence/README.md) · [Using a recipe](../../docs/using-a-recipe.md)",
    ]
    if len(recipes) > 1:
        names = [recipe.card["Name"] for recipe in recipes]
        parts.append(" · ".join(f"[{name}](#{anchor(name)})" for name in names))
    return "\n\n".join([*parts, *map(_section, recipes)]) + "\n"


def _section(recipe):
    """Return a recipe's part of its theme's page."""
    card, file = recipe.card, recipe.path.name
    first, *further = recipe.flags
    parts = [
        f"## {card['Name']}",
        f"[`{file}`]({file}): {card['Summary']}",
        f"**You see:** {_with_fences(card['Symptom'])}",
        f"**Change:** {_with_fences(card['Change'], 'python')}",
        *_measured_parts(recipe, first),
        *_on_gpu(recipe),
        f"**Cost:** {_with_fences(card['Cost'])}",
    ]
    # Only as long as it holds no figure that a new measurement would contradict.
    if not measured_figures(card["Look for"]):
        parts.append(f"**Look for:** {_with_fences(card['Look for'])}")
    parts += [f"**How it works:** {_with_fences(card['Technique'])}", f"**Source:** {_with_fences(card['Source'])}"]
    for path in further:
        parts += [f"### {card['Name']} {' '.join(recipe.flags[path])}", *_measured_parts(recipe, path)]
    return "\n\n".join(parts)


def _measured_parts(recipe, path):
    """Return the paragraphs about one result: picture, tables, what they mean, and how it was made."""
    if path not in recipe.results:
        return [NOT_MEASURED.format(recipe.measure)]
    result, name = recipe.results[path], recipe.card["Name"]
    if result.grid is not None:
        tables, meaning = [_table(_columns_of_search(result))], _meaning_of_search(result)
        explained = []
        alternative = f"{name}: {result.split} {result.metric} by learning rate"
    else:
        rows = recipe.summaries[path]
        decisive, rest = _columns(result, rows)
        tables = [_table(decisive), *_tables({"variant": decisive["variant"]} | rest)]
        meaning = _meaning(result, rows, recipe.headline if path == recipe.default else None)
        explained = map(escape_markdown, explanations(result, rows))
        curves = "curves of each variant, and " if any(run["curve"] for run in result.runs) else ""
        alternative = f"{name}: {curves}differences in {result.split} {result.metric}"
    return [
        f"![{alternative}](../../evidence/{recipe.theme}/{path.stem}.svg)",
        tables[0],
        " ".join(meaning),
        *tables[1:],
        *filter(None, [" ".join(explained)]),
        _made_by(recipe, path),
    ]


def _figure_cell(row, share):
    """Return a variant's figure, or a dash, as where divergence decides: the few seeds that are left would mislead."""
    if row["mean"] is None or row["by_divergence"]:
        return DASH
    return f"{100 * row['mean']:.1f}" if share else f"{row['mean']:.4g}"


def _columns(result, rows):
    """Return the columns that decide, and the others, each as a dict from a title to its cells."""
    share = is_share(result)
    decisive = {
        "variant": [display_name(row["variant"]) for row in rows],
        f"{result.split}, %" if share else f"{result.split} {result.metric}": [
            _figure_cell(row, share) for row in rows
        ],
        f"difference{', points' * share}": [
            DASH if row["by_divergence"] else difference_in_words(row, result) for row in rows
        ],
        "verdict": [verdict_in_words(row) for row in rows],
    }
    rest = table(result)
    for title in ("variant", f"{result.split} {result.metric}", "difference", "verdict"):
        rest.pop(title, None)
    if "gap" in rest:
        scale, title = (100, "gap, points") if share else (1, "gap")
        gaps = [DASH if row["gap"] is None else _signed(scale * row["gap"], scale / 100) for row in rows]
        rest = {title: gaps} | {name: cells for name, cells in rest.items() if name != "gap"}
    return decisive, rest


def _columns_of_search(result):
    """Return the columns of a narrow table: each variant's best rate, the metric there and at the rates beside it."""
    rows, grid = result.search_summary(), sorted(result.grid)

    def beside(row, places):
        place = grid.index(row["best"]) + places if row["best"] is not None else -1
        mean = row["means"][grid[place]] if 0 <= place < len(grid) else None
        return DASH if mean is None else f"{mean:.3f}"

    found = search_table(result)
    return {
        "variant": found["variant"],
        "best rate": found["best rate"],
        f"{result.split} {result.metric}": [beside(row, 0) for row in rows],
        "next lower rate": [beside(row, -1) for row in rows],
        "next higher rate": [beside(row, 1) for row in rows],
    }


def verdict_in_words(row):
    """Return the verdict of a summary's row for a narrow column."""
    if row["verdict"] == "baseline":
        return DASH
    if row["short_verdict"] is None:
        return "no verdict"
    if row["short_verdict"].startswith("undecided"):
        return f"undecided: {_about(row['seeds_needed'])} seeds"
    return row["short_verdict"]


def _tables(columns):
    """Return tables of a few columns each, every one beginning with the first column."""
    (first, cells), *rest = columns.items()
    return [
        _table({first: cells} | dict(some))
        for some in (rest[place : place + COLUMNS_BESIDE] for place in range(0, len(rest), COLUMNS_BESIDE))
    ]


def _table(columns):
    def shown(cell):
        return _unbroken(escape_markdown(cell))

    return markdown_table({escape_markdown(title): list(map(shown, cells)) for title, cells in columns.items()})


def _unbroken(text):
    """Return text with spaces that keep a figure and its interval or unit on one line."""
    return re.sub(r" (?=[±×])|(?<=±) |(?<=\d) (?=s$)", "\N{NO-BREAK SPACE}", text)


def _meaning(result, rows, headline=None):
    """Return sentences, made from the verdicts: of the headline, if there is one, then of the other variants."""
    sentences, start, groups = [], f"Against **{_name(result.baseline)}**, ", {}
    if headline is not None:
        sentences.append(_headline_sentence(result, headline))
        start = "" if headline["figure"] is None else f"In {result.split} {result.metric}, "
    for row in rows:
        is_told = headline is not None and headline["figure"] is None and row["variant"] == headline["variant"]
        if row["variant"] != result.baseline and not is_told:
            groups.setdefault(_kind_of_verdict(row), []).append(row)
    if clauses := [_group_clause(kind, groups[kind], result) for kind in KINDS if kind in groups]:
        sentences.append(f"{start}{'; '.join(clauses)}.")
    return sentences


KINDS = ("better", "slightly better", "the same", "slightly worse", "worse", "undecided", "no verdict")


def _kind_of_verdict(row):
    word = row["verdict"].partition(":")[0]
    return word if word in KINDS else "no verdict"


def _headline_sentence(result, headline):
    seeds, verdict = headline["seeds"], headline["verdict"]
    against = f"**{_name(headline['variant'])}** against **{_name(result.baseline)}**"
    kind = _kind_of_verdict(headline)
    subject = headline["figure"] or f"{result.split} {result.metric}"
    if kind == "no verdict":
        return f"{against}: {_seeds(seeds)} give no verdict."
    if headline["by_divergence"]:
        return f"{against}: {escape_markdown(verdict)} seeds."
    if kind == "undecided":
        needed = _about(headline["seeds_needed"])
        return f"{against}: {seeds} seeds do not decide on {subject}; {needed} would."
    if kind == "the same":
        margin = f" by less than {_margin(result)}" if result.margin and headline["figure"] is None else " by nothing"
        return f"{against}: the same, {subject} differs{margin}."
    difference, half_width = headline["difference"], headline["difference_half_width"]
    if headline["figure"] is not None:
        words = figure_in_words(headline["figure"], difference, half_width)
        reached = f" at {rest}" if (rest := headline["figure"].partition(" to ")[2]) else ""
        return f"{against}: {words}{reached}, which is {verdict}."
    size = difference_in_words(headline, result).lstrip("+−") + " points" * is_share(result)
    certainly = f", certainly by less than {_margin(result)}" if kind.startswith("slightly") else ""
    return f"{against}: {subject} is {size} {'lower' if difference < 0 else 'higher'}, which is {verdict}{certainly}."


def _group_clause(kind, rows, result):
    names = _enumerated([f"**{_name(row['variant'])}**" for row in rows])
    verb = "is" if len(rows) == 1 else "are"
    if kind == "undecided":
        needed = [row["seeds_needed"] for row in rows]
        fewest, most = (choose(needed, key=lambda count: count or math.inf) for choose in (min, max))
        how_many = _about(fewest) + (f" to {most or _about(most)}" if fewest != most else "")
        return f"{names} {verb} undecided ({how_many} seeds would decide)"
    if kind == "no verdict":
        return f"{names} {'has' if len(rows) == 1 else 'have'} no verdict"
    within = f" within {_margin(result)}" if kind == "the same" and result.margin else ""
    diverged = [row for row in rows if row["by_divergence"]]
    if diverged:
        words = [f"{_name(row['variant'])}: {row['verdict'].partition(': ')[2]}" for row in diverged]
        within += f" ({'; '.join(words)})"
    return f"{names} {verb} {kind}{within}"


def _meaning_of_search(result):
    sentences = [f"Means on {result.split} data; {DASH}: diverged, or not in the grid."]
    rows = result.search_summary()
    if edges := [f"**{_name(row['variant'])}**" for row in rows if row["at_edge"]]:
        sentences.append(f"A better rate may lie beyond the grid for {_enumerated(edges)}.")
    if alike := [f"**{_name(row['variant'])}**" for row in rows if row["alike"]]:
        sentences.append(f"No rate stands out for {_enumerated(alike)}: all means lie within the margin.")
    return sentences


def _made_by(recipe, path):
    """Return how a result was made: seeds, settings, data, versions, machine and command."""
    result, environment = recipe.results[path], recipe.results[path].environment
    seeds = len({run["seed"] for run in result.runs})
    settings = ", ".join(f"{name} {value}" for name, value in result.settings.items() if value is not None)
    command = ["python", f"recipes/{recipe.theme}/{recipe.path.name}", *recipe.flags[path], "--seeds", str(seeds)]
    return (
        f"{_seeds(seeds)}; {escape_markdown(settings)}. Keras {environment['keras']} on {environment['backend']}, "
        f"Python {environment['python']}; {environment['processor']}.\n\n```sh\n{' '.join(command)}\n```"
    )


def _on_gpu(recipe):
    """Return what `evidence.gpu` has found: the time of an epoch, and all figures if time is the recipe's subject."""
    path = recipe.default.with_name(f"{recipe.path.stem}.gpu.json")
    if not path.exists() or recipe.default not in recipe.results:
        return []
    here, there = recipe.results[recipe.default], Result.load(path)
    seconds, seconds_there = map(seconds_an_epoch, (here, there))
    parts = []
    if seconds and seconds_there:
        parts.append(
            f"**On a GPU**, {there.environment['processor']} with {there.environment['backend']}, an epoch of "
            f"**{_name(here.baseline)}** takes {seconds_there:.2g} s, and {seconds:.2g} s on the processor above."
        )
    if recipe.path.stem in EXCLUSIVE:
        _, rest = _columns(there, there.summary())
        parts += _tables({"variant on the GPU": [display_name(row["variant"]) for row in there.summary()]} | rest)
    return parts


def seconds_an_epoch(result):
    """Return the median time of an epoch of the baseline, but for the first, in which it is compiled, or None."""
    runs = [run["epoch_seconds"][1:] for run in result.runs if run["variant"] == result.baseline]
    return statistics.median(sum(runs, [])) if any(runs) else None


# Callbacks


def read_callbacks(root=ROOT):
    """Return {name: (file, docstring)} of every callback of the package, without importing it."""
    package = ast.parse((root / "callbacks" / "__init__.py").read_text(encoding="utf-8"))
    (names,) = [
        ast.literal_eval(statement.value)
        for statement in package.body
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
    ]
    found = {}
    for path in sorted((root / "callbacks").rglob("*.py")):
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(statement, ast.ClassDef) and statement.name in names:
                found[statement.name] = path, ast.get_docstring(statement)
    return {name: found[name] for name in names}


def example_of(docstring):
    """Return the code of a docstring's example, without the prompts, or None."""
    match = re.search(r"^Example:\n((?:    .*\n?|\n)+)", docstring, flags=re.MULTILINE)
    lines = textwrap.dedent(match[1]).splitlines() if match else []
    return "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... "))) or None


def _callbacks(root):
    overhead = _read(root / "evidence" / "overhead.json")
    parts = []
    for name, (path, docstring) in read_callbacks(root).items():
        relative = path.relative_to(root / "callbacks")
        # A callback is a file or, like Comparison, a folder.
        place = f"{relative.parts[0]}/" if len(relative.parts) > 1 else str(relative)
        sentence = docstring.partition("\n")[0]
        parts.append(f"## {name}\n\n[`{place}`]({place}): {sentence}")
        if example := example_of(docstring):
            parts.append(f"```python\nfrom callbacks import {name}\n\n{example}\n```")
        picture = root / "evidence" / "callbacks" / f"{name}.svg"
        if picture.exists():
            parts.append(f"![What {name} shows](../evidence/callbacks/{name}.svg)")
        if overhead and name in overhead["kinds"]:
            parts.append(_cost_of_callback(name, overhead))
    return "\n\n".join(parts)


def _cost_of_callback(name, overhead):
    ratios = {
        measured["network"]: costs(measured["epochs"])[name][0]
        for measured in overhead["seconds"]
        if not measured["jit_compile"]
    }
    words = [f"{_percent(ratio - 1)} with the {network} network" for network, ratio in ratios.items()]
    return f"**Cost:** an epoch's time changes by {_enumerated(words)}."


# Measurements that are no recipes


def _measurements(root):
    folder = root / "evidence"
    doctor = _read(folder / "training_doctor.json")
    if doctor and not all("group" in run for run in doctor["runs"]):
        # Of an earlier kind of measurement.
        doctor = None
    parts = {"overhead": (overhead_table, overhead_note), "speed": (speed_table, speed_note)}
    shown = {}
    for name, (columns, note) in parts.items():
        result = _read(folder / f"{name}.json")
        shown[name] = (
            f"{markdown_table(columns(result))}\n\n{note(result)}"
            if result
            else NOT_MEASURED.format(f"python -m evidence.{name}")
        )
    shown["training_doctor"] = (
        f"Healthy runs, and runs that were made sick. Several findings can hold of one run.\n\n"
        f"{markdown_table(doctor_table(doctor))}\n\n"
        f"Programs that people asked about in public, and their repairs.\n\n"
        f"{markdown_table(program_table(doctor))}\n\n{doctor_note(doctor)}"
        if doctor
        else NOT_MEASURED.format("python -m evidence.training_doctor")
    )
    return shown


def _noise_floor(root):
    """Return how often the verdict's rule was wrong where there was nothing to find: in a sentence, and at length."""
    path = root / "evidence" / "reproducibility" / "noise_floor.json"
    if not path.exists():
        return (NOT_MEASURED.format("python -m evidence noise_floor --seeds 200"),) * 2
    result = Result.load(path)
    names, tables, wrong_tables, differences, wrong = _mistakes(result)
    deviation, lasting = spreads(result)
    return (
        f"The rule itself is tested on trainings that differ in nothing but the seed: it saw a difference in "
        f"{wrong_tables} of {tables} tables ([noise floor](recipes/reproducibility/README.md#noise-floor)).",
        f"**Its mistakes** were counted where there is nothing to find: one training under {names} names, each with "
        f"seeds of its own ([noise floor](../recipes/reproducibility/README.md#noise-floor)). In {wrong_tables} of "
        f"{tables} tables of {GROUP} seeds it said better or worse, of {wrong} of {differences} differences; it allows "
        f"itself one table in twenty. From seed to seed, accuracy has a deviation of {100 * deviation:.2f} points "
        f"there. With a test set without end it would be {100 * lasting:.2f}.",
    )


def _mistakes(result):
    """Return the numbers of names, of tables, of those that say better or worse, of differences, and of those so."""
    tables = list(verdicts_of_groups(result))
    wrong = [sum("better" in verdict or "worse" in verdict for verdict in table) for table in tables]
    return len(tables[0]) + 1, len(tables), sum(map(bool, wrong)), sum(map(len, tables)), sum(wrong)


def verdicts_of_groups(result):
    """Give, for each ten seeds of the noise floor, the verdicts on the names that differ in nothing but the seed."""
    seeds = sorted({run["seed"] for run in result.runs})
    for first in range(0, len(seeds) - GROUP + 1, GROUP):
        chosen = seeds[first : first + GROUP]
        group = dataclasses.replace(result, runs=[run for run in result.runs if run["seed"] in chosen], figures=[])
        yield [row["verdict"] for row in group.summary() if row["variant"] not in (result.baseline, AGAIN)]


def spreads(result):
    """Return the standard deviation of test accuracy between trainings, and that which a larger test set would leave.

    The latter is the root of the covariance of the accuracies on two halves of the test images: what they share is no
    luck of the images.
    """
    accuracies = [result.figure_of(run) for run in result.runs if run["variant"] != AGAIN]
    halves = {
        name: [each["value"] for each in result.figures if each["name"] == name and each["variant"] != AGAIN]
        for name in result.columns
    }
    return statistics.stdev(accuracies), math.sqrt(max(0, statistics.covariance(*halves.values())))


def _read(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# Words


def _one_line(text):
    return " ".join(text.split())


def _name(variant):
    return escape_markdown(display_name(variant))


def _enumerated(names):
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _seeds(count):
    return f"{count} seed{'s' * (count != 1)}"


def _about(seeds_needed):
    return f"about {seeds_needed}" if seeds_needed else f"more than {MOST_SEEDS}"


def _margin(result):
    if is_share(result):
        points = 100 * result.margin
        return f"{points:g} point{'s' * (points != 1)}"
    return f"{result.margin:g}"


def _signed(value, size):
    """Return a number with its sign and as many decimals as a figure of this size needs."""
    text = _plain(abs(value), size)
    return f"{'−' if value < 0 else '+'}{text}"


def _plain(value, size=None):
    size = abs(value if size is None else size)
    decimals = min(max(1, -math.floor(math.log10(size))), 4) if size else 1
    return f"{value:.{decimals}f}"


def _percent(share):
    return f"{'−' if round(share, 3) < 0 else '+'}{abs(100 * share):.1f} %"


def _with_fences(text, language="text"):
    """Return a card's paragraphs, with the indented lines between fences, so that code hosts let readers copy them."""
    blocks = itertools.groupby(text.split("\n\n"), key=lambda block: block.startswith("    "))
    return "\n\n".join(
        f"```{language}\n{textwrap.dedent(part).rstrip()}\n```" if is_code else part
        for is_code, group in blocks
        for part in (["\n\n".join(group)] if is_code else map(_one_line, group))
    )
