"""The tables and notes of a result, for a terminal, for Markdown and for a notebook."""

import html
import os
import re
import sys
import textwrap

from .statistics import FEWEST_SEEDS

WIDTH_OF_HEADING = 15
# Ratios of times that machines and chance make.
SAME_TIME = 0.05
ROW_STYLES = {"better": "green", "slightly better": "green", "worse": "red", "slightly worse": "red"}


def table(result):
    """Return the summary as a dict from a column's title to its cells, formatted for people."""
    rows = result.summary()
    few_seeds = rows[0]["seeds"] < FEWEST_SEEDS
    any_diverged = any(row["diverged"] for row in rows)
    columns = {
        "variant": [display_name(row["variant"]) for row in rows],
        f"{result.split} {result.metric}": [_mean_cell(row, few_seeds) for row in rows],
        "difference": [_difference_cell(row, few_seeds) for row in rows],
        "verdict": [_verdict_cell(row) for row in rows],
        "diverged": [f"{row['diverged']} of {row['seeds']}" if any_diverged else "–" for row in rows],
        "gap": [_number(row["gap"], sign="+") for row in rows],
        "time": [_time_cell(row) for row in rows],
    }
    for name in _figure_names(rows):
        title = f"{name} (figure)" if name in columns else name
        columns[title] = [_figure_cell(row["figures"].get(name)) for row in rows]
    return {title: cells for title, cells in columns.items() if set(cells) != {"–"}}


def search_table(result):
    """Return the search's summary as a dict from a column's title to its cells: the best rate, then every rate."""
    rows = result.search_summary()
    best = ["–" if row["best"] is None else f"{row['best']:g}{' (edge)' * row['at_edge']}" for row in rows]
    return {"variant": [display_name(row["variant"]) for row in rows], "best rate": best} | {
        f"{rate:g}": ["–" if row["means"][rate] is None else f"{row['means'][rate]:.3f}" for row in rows]
        for rate in result.grid
    }


def notes(result):
    """Return the sentences that say what the columns of the table mean."""
    found = _notes_of_search(result) if result.grid is not None else _notes_of_comparison(result)
    if data := _data_in_words(result.data):
        found.append(f"data: {data}.")
    settings = [f"{name} {value}" for name, value in result.settings.items() if value is not None]
    if settings:
        found.append(f"settings: {', '.join(settings)}.")
    return found


def explanations(result, rows):
    """Return the sentences that explain the columns of a result's own, for the rows of its summary."""
    return [f"{name}: {result.columns[name]}." for name in _figure_names(rows) if name in result.columns]


def print_report(result, console=None):
    """Print the table, a second one of what does not decide, and the notes."""
    from rich.text import Text

    console = console or new_console()
    for part in _tables(result, console.width):
        console.print(_rich_table(part))
        console.print()
    for note in notes(result):
        console.print(Text(note, style="dim"))


def markdown(result):
    """Return the table of a result as Markdown."""
    columns = search_table(result) if result.grid is not None else table(result)
    return markdown_table(
        {escape_markdown(title): [escape_markdown(cell) for cell in cells] for title, cells in columns.items()}
    )


def markdown_table(columns):
    """Return a dict from a column's title to its cells, which are Markdown, as a Markdown table."""
    lines = [list(columns), ["---"] * len(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(text):
    """Return text as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_\[\]<>&|$#~])", r"\\\1", text)


def as_html(result, picture=""):
    """Return the tables, the notes and an SVG picture as HTML, for a notebook."""
    parts = []
    for columns in _tables(result, width=120):
        heads = "".join(f"<th>{html.escape(title)}</th>" for title in columns)
        rows = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in cells)}</tr>"
            for cells in zip(*columns.values(), strict=True)
        )
        parts.append(f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>")
    parts += [f"<p>{html.escape(note)}</p>" for note in notes(result)]
    return "\n".join([*parts, picture])


def new_console():
    """Return a console on the standard output that can be lost without harm: closed, or read by nobody any more."""
    from rich.console import Console

    class Output(Console):
        def print(self, *arguments, **keywords):
            try:
                super().print(*arguments, **keywords)
            except OSError:
                # A full disk, perhaps. The file of the result is another matter.
                self.quiet = True

        def on_broken_pipe(self):
            self.quiet = True
            # For the flush at the interpreter's end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    is_closed = sys.stdout is None or sys.stdout.closed
    if not is_closed and hasattr(sys.stdout, "reconfigure"):
        # Else "±" would raise where the encoding lacks it.
        sys.stdout.reconfigure(errors="replace")
    return Output(quiet=is_closed, highlight=False, markup=False, emoji=False)


def display_name(name):
    """Return a name as it is printed: as it is, or in quotes where it would look like another or like nothing."""
    is_plain = name.isprintable() and name == " ".join(name.split()) and name[:1] not in ("", "'", '"')
    return name if is_plain else repr(name)


def number_in_words(value):
    """Return a figure as text, with four digits."""
    return _number(value)


def _time_cell(row):
    if row["time"] is None:
        return "–"
    if row["verdict"] == "baseline":
        return "1"
    lower, upper = row["time_quartiles"]
    return time_like_the_baseline(row) or f"{row['time']:.2f}" + f" ({lower:.2f}–{upper:.2f})" * (row["seeds"] > 1)


def time_like_the_baseline(row):
    """Return what to say of a ratio of times that is not known to differ from 1, and None for one that is.

    It is "same" within SAME_TIME of 1, and the quartiles where they lie on both sides of 1: the median would look like
    a difference, of which the seeds know nothing.
    """
    if abs(row["time"] - 1) <= SAME_TIME:
        return "same"
    lower, upper = row["time_quartiles"]
    return f"{lower:.2f}–{upper:.2f}" if lower < 1 < upper else None


def is_share(result):
    """Return whether the metric lies between 0 and 1 by its name, such as an accuracy."""
    return result.metric.lower().endswith(("accuracy", "acc", "auc", "precision", "recall", "f1_score"))


def _notes_of_comparison(result):
    rows = result.summary()
    seeds, differences = rows[0]["seeds"], len(rows) - 1
    found = []
    if result.interrupted:
        found.append(f"Interrupted. Finished runs: {len(result.runs)}; only seeds that can be compared are shown.")
    if seeds == 1:
        found.append("One seed: no interval and no verdict. More seeds give both (in a recipe: --seeds 10).")
    elif seeds < FEWEST_SEEDS:
        found.append(
            f"{seeds} paired seeds: differences from the lowest to the highest; a verdict takes {FEWEST_SEEDS} or more."
        )
    else:
        margin = f", the margin is {result.margin:g}" if result.margin else ""
        found.append(
            f"{seeds} paired seeds; ± is a 95 % t-interval over seeds, that of a difference adjusted for "
            f"{differences}{margin}. It does not cover the choice of {result.split} examples."
        )
    if any((row["short_verdict"] or "").startswith("undecided") for row in rows):
        found.append("undecided, ~N: about N seeds would decide.")
    if any((row["short_verdict"] or "").startswith("slightly") for row in rows):
        found.append("slightly: certainly less than the margin.")
    incomplete = [row for row in rows if row["pairs"] is not None and row["pairs"] < row["seeds"]]
    if any(row["diverged"] for row in rows):
        found.append("* over the seeds that did not diverge; of a difference, in neither run.")
    for row in incomplete:
        if row["by_divergence"]:
            found.append(f"† {display_name(row['variant'])}: {row['verdict']}.")
    for row in rows:
        if row["repeats"]:
            found.append(
                f"{display_name(row['variant'])}: seeds {', '.join(map(str, row['repeats']))} gave equal figures to "
                "the bit. Does the builder set a seed of its own?"
            )
    for variant, names in result.unequal_starts.items():
        found.append(f"{display_name(variant)} does not start as the first variant in {', '.join(names)}.")
    if any(row["gap"] is not None for row in rows):
        found.append(f"gap: training minus {result.split} {result.metric}, both by evaluate().")
    if any(row["time"] is not None for row in rows):
        quartiles = ", median (quartiles) over seeds" if seeds > 1 else ""
        same = f"same: within {100 * SAME_TIME:.0f} % of it" + "; quartiles alone: on both sides of it" * (seeds > 1)
        found.append(f"time: per epoch, relative to the baseline{quartiles}; {same}.")
    names = _figure_names(rows)
    found += explanations(result, rows)
    if seeds > 1 and names:
        found.append(f"{', '.join(names)}: median over seeds.")
    return found


def _notes_of_search(result):
    found = []
    if result.interrupted:
        found.append(f"Interrupted. Finished runs: {len(result.runs)}.")
    seeds = len({run["seed"] for run in result.runs})
    found.append(f"{result.split} {result.metric} by rate, mean over {seeds} seed{'s' * (seeds > 1)}; – diverged.")
    if any(row["at_edge"] for row in result.search_summary()):
        found.append("(edge): the best rate is the grid's last, a better one may lie beyond. Widen the grid.")
    return found


def _data_in_words(data):
    """Return the numbers of examples, and the shapes and classes where they are the same for all splits."""
    counts = [f"{held['examples']} {split}" for split, held in data.items() if held.get("examples") is not None]
    words = f"{', '.join(counts)} examples" if counts else ""
    for name, form in (("inputs", "inputs of shape {}"), ("classes", "{} classes")):
        values = [held[name] for held in data.values() if held.get(name) is not None]
        if name == "classes":
            values = [max(values)] if values else []
        if values and all(value == values[0] for value in values):
            words += f"{', ' * bool(words)}{form.format(values[0])}"
    return words


def _tables(result, width):
    """Return the columns to print, as dicts each of which fits `width`: what decides first, then the rest."""
    if result.grid is not None:
        columns = search_table(result)
        return _split({"variant": columns.pop("variant")}, columns, width)
    columns = table(result)
    decisive = {
        title: columns.pop(title)
        for title in list(columns)
        if title in ("variant", f"{result.split} {result.metric}", "difference", "verdict")
    }
    parts = [decisive]
    if columns:
        parts += _split({"variant": decisive["variant"]}, columns, width)
    return parts


def _split(head, columns, width):
    parts = [dict(head)]
    for title, cells in columns.items():
        wider = parts[-1] | {title: cells}
        if len(parts[-1]) > len(head) and sum(map(_width, wider, wider.values())) > width:
            wider = head | {title: cells}
            parts.append(wider)
        parts[-1] = wider
    return parts


def _width(title, cells):
    return 1 + max(len(text) for text in [*_heading(title).split("\n"), *cells])


def _heading(title):
    """Return a title in short lines, broken at its spaces and underscores."""
    words = textwrap.wrap(title.replace("_", "_ "), WIDTH_OF_HEADING, break_long_words=False)
    return "\n".join(line.replace("_ ", "_") for line in words)


def _rich_table(columns):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for title in columns:
        is_words = title in ("variant", "verdict")
        # A name that is too long is wrapped, for its end may be what tells it from another.
        shown.add_column(
            Text(_heading(title)), justify="left" if is_words else "right", no_wrap=title != "variant", overflow="fold"
        )
    verdicts = columns.get("verdict", [""] * len(columns["variant"]))
    for verdict, *cells in zip(verdicts, *columns.values(), strict=True):
        shown.add_row(*map(Text, cells), style=ROW_STYLES.get(verdict.removesuffix("†")))
    return shown


def _figure_names(rows):
    return list(dict.fromkeys(name for row in rows for name in row["figures"]))


def _mean_cell(row, few_seeds):
    cell = _with_interval(row["mean"], None if few_seeds else row["half_width"])
    return cell + "*" * (row["diverged"] > 0 and row["mean"] is not None)


def _difference_cell(row, few_seeds):
    if row["difference"] is None or row["by_divergence"]:
        return "–"
    mark = "*" * (row["pairs"] < row["seeds"])
    if few_seeds and row["pairs"] > 1:
        low, high = row["range"]
        return f"{_number(low, '+')} to {_number(high, '+')}{mark}"
    return _with_interval(row["difference"], row["difference_half_width"], sign="+") + mark


def _verdict_cell(row):
    if row["verdict"] == "baseline":
        return "–"
    return f"{row['short_verdict'] or 'no verdict'}{'†' * row['by_divergence']}"


def _number(value, sign="-"):
    if value is None:
        return "–"
    precision = ".4f" if value == 0 or 1e-3 <= abs(value) < 1e3 else ".3g"
    return format(value, sign + precision)


def _figure_cell(value):
    if value is not None and abs(value) < 1e6 and (value == int(value) or abs(value) >= 1e3):
        return f"{value:.0f}"
    # Four digits are enough of seconds.
    return f"{value:#.4g}" if value is not None and 1 <= abs(value) < 1e3 else _number(value)


def _with_interval(value, half_width, sign="-"):
    if value is None or half_width is None:
        return _number(value, sign)
    precision = ".4f" if 1e-4 <= max(abs(value), half_width) < 1e3 else ".3g"
    return f"{value:{sign}{precision}} ± {half_width:{precision}}"
