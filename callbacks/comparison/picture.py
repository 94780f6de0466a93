"""The picture of a result: signals, the metric by epoch and the paired differences."""

import io
import math
import statistics
import textwrap
from pathlib import Path

import matplotlib
import pandas
import seaborn
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .report import display_name, is_share
from .result import replacing
from .statistics import FEWEST_SEEDS

# Told apart by colour and, from the eleventh variant on, by dashes.
DASHES = ["-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1))]
# Two panels side by side with letters that can be read where both are as wide as a phone.
PANEL = 3.7, 3.5

# So many fit into a line of a panel's title, also where the names beside another panel make this one narrower.
LETTERS = 26
RC = {
    "svg.fonttype": "none",
    "svg.hashsalt": "comparison",
    "font.family": "sans-serif",
    "font.size": 13,
    "axes.titlesize": 13,
    "axes.labelsize": 13,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "lines.linewidth": 2,
}


def draw(result, path=None):
    """Return a figure of the result and, if `path` is given, write it there in the format that its suffix names.

    Lines are means over seeds, of the logarithms on a logarithmic axis; bands reach from the lowest to the highest
    seed, and small dots are single seeds.

    Raises:
        ValueError: matplotlib does not know the format.
    """
    with matplotlib.rc_context(RC):
        figure = _figure_of_search(result) if result.grid is not None else _figure_of_comparison(result)
        if path is not None:
            path = Path(path)
            with replacing(path) as temporary:
                # Without a date the same result gives the same file.
                metadata = {"Date": None} if path.suffix == ".svg" else None
                figure.savefig(temporary, format=path.suffix.removeprefix("."), metadata=metadata)
    return figure


def as_svg(result):
    """Return the picture as the text of an SVG element."""
    memory = io.StringIO()
    with matplotlib.rc_context(RC):
        draw(result).savefig(memory, format="svg", metadata={"Date": None})
    return memory.getvalue()[memory.getvalue().index("<svg") :]


def _figure_of_comparison(result):
    runs = result.comparable_runs()
    lines = {
        variant: {"color": color, "linestyle": DASHES[place // 10 % len(DASHES)]}
        for place, (variant, color) in enumerate(
            zip(runs, seaborn.color_palette("colorblind", min(len(runs), 10)) * (1 + len(runs) // 10), strict=False)
        )
    }
    panels = _panels(result, runs)
    has_differences = len(runs) > 1
    count = len(panels) + has_differences
    columns = max(min(count, 2), 1)
    rows = max(math.ceil(count / columns), 1)
    # The last panel, which decides, has a row of its own if its place would be alone there.
    is_alone = columns > 1 and count % columns == 1
    labels = {
        variant: textwrap.fill(display_name(variant), 26 if is_alone else 18)
        for variant in runs
        if variant != result.baseline
    }
    # High enough for the names of all variants, in inches.
    lines_of_labels = len(labels) * max((label.count("\n") + 1 for label in labels.values()), default=0)
    heights = [PANEL[1]] * (rows - 1) + [max(PANEL[1], 2.2 + 0.28 * lines_of_labels)]
    with seaborn.axes_style("whitegrid"):
        # As wide as two panels even if there is one, whose title needs it.
        figure = Figure(figsize=(PANEL[0] * 2, sum(heights) + 0.5), layout="constrained")
        grid = figure.add_gridspec(rows, columns, height_ratios=heights)
        places = [divmod(place, columns) for place in range(count)]
        spans = [grid[row, :] if is_alone and row == rows - 1 else grid[row, column] for row, column in places]
        axes = [figure.add_subplot(span) for span in spans]
    for panel, each in zip(panels, axes, strict=False):
        _draw_lines(panel, each, lines)
    if has_differences:
        letters = 60 if is_alone or count == 1 else LETTERS
        _draw_differences(result, axes[len(panels)], runs, lines, labels, letters)
    drawn = dict.fromkeys(variant for panel in panels for variant, *_ in panel["points"])
    names = {variant: _label(display_name(variant)) for variant in runs if variant in drawn}
    handles = [Line2D([], [], label=label, **lines[variant]) for variant, label in names.items()]
    if handles:
        _add_legend(figure, handles, columns + 1)
    return figure


def _panels(result, runs):
    """Return a dict for each panel with lines: those of the signals, then those of the metric by epoch."""
    panels = {}
    for entry in result.signals:
        if entry["seed"] not in runs.get(entry["variant"], {}):
            continue
        name, by, scale = entry["name"], entry["by"], entry["scale"]
        title = f"{name} by {by}"
        at_scale = entry.get("at_scale", "linear")
        panel = {"title": title, "ylabel": name, "by": by, "scale": scale, "at_scale": at_scale, "points": []}
        places = entry.get("at") or range(1, len(entry["values"]) + 1)
        panels.setdefault(title, panel)["points"] += _points(entry["variant"], places, entry["values"], scale)
    metric = result.metric
    direction = "lower" if result.mode == "min" else "higher"
    for title, name in {f"training {metric}, as logged": metric, f"validation {metric}": f"val_{metric}"}.items():
        points = []
        for variant, by_seed in runs.items():
            for run in by_seed.values():
                values = run["curve"].get(name, [])
                epochs = run.get("epochs", {}).get(name) or range(1, len(values) + 1)
                points += _points(variant, epochs, values, "linear")
        if points:
            panels[title] = {
                "title": title,
                "ylabel": f"{metric} ({direction} is better)",
                "by": "epoch",
                "scale": "linear",
                "points": points,
                "is_share": is_share(result),
            }
    return list(panels.values())


def _points(variant, places, values, scale):
    """Return the values that an axis of this scale can show, as (variant, place, value)."""
    return [
        (variant, place, value)
        for place, value in zip(places, values, strict=True)
        if math.isfinite(value) and (scale == "linear" or value > 0)
    ]


def _draw_lines(panel, axes, lines):
    points = pandas.DataFrame(panel["points"], columns=["variant", "place", "value"])
    # A curve ends where most of its runs have, for the mean and range of the few that go on mislead.
    counts = points.groupby(["variant", "place"])["value"].transform("size")
    points = points[2 * counts >= counts.groupby(points["variant"]).transform("max")]
    names = list(dict.fromkeys(points["place"]))
    is_named = any(isinstance(name, str) for name in names)
    mean = _geometric_mean if panel["scale"] == "log" else statistics.fmean
    for variant, line in lines.items():
        own = points[points["variant"] == variant]
        if own.empty:
            continue
        by_place = own.groupby("place", sort=not is_named)["value"].agg([mean, "min", "max"])
        places = [names.index(place) for place in by_place.index] if is_named else by_place.index
        middle = by_place.iloc[:, 0]
        axes.plot(places, middle, marker="o" if len(middle) == 1 or is_named else None, **line)
        axes.fill_between(places, by_place["min"], by_place["max"], color=line["color"], alpha=0.2, linewidth=0)
    axes.set(
        title=_label(textwrap.fill(panel["title"], LETTERS)),
        xlabel=_label(panel["by"]),
        ylabel=_label(textwrap.fill(panel["ylabel"], 30)),
        yscale=panel["scale"],
    )
    if is_named:
        axes.set_xticks(range(len(names)), [_label(str(name)) for name in names])
    elif panel.get("at_scale") == "log":
        axes.set_xscale("log")
    elif all(float(place).is_integer() for place in names):
        axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.get("is_share"):
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0.0), min(high, 1.0))


def _draw_differences(result, axes, runs, lines, labels, letters):
    """Draw each variant's paired differences from the baseline: dots for seeds, the mean with its interval.

    Where divergence decides, the words stand in their place: the few seeds that are left would tell another story.
    `labels` are the names to show, and `letters` is how many fit into a line of the title and of the axis's label.
    """
    rows = {row["variant"]: row for row in result.summary()}
    scale, unit = (100, " in points") if is_share(result) else (1, "")
    baseline = runs.get(result.baseline, {})
    for position, variant in enumerate(labels):
        row, color = rows[variant], lines[variant]["color"]
        if row["difference"] is None or row["by_divergence"]:
            middle = axes.get_yaxis_transform()
            words = textwrap.fill(row["verdict"], letters - 6)
            axes.text(0.5, position, _label(words), ha="center", va="center", transform=middle)
            continue
        differences = [scale * difference for difference in result.differences(runs[variant], baseline).values()]
        axes.plot(differences, [position] * len(differences), ".", color=color, alpha=0.5)
        # An interval of fewer than five seeds would hide all others.
        width = row["difference_half_width"] if row["seeds"] >= FEWEST_SEEDS else None
        width = None if width is None else scale * width
        axes.errorbar(scale * row["difference"], position, xerr=width, fmt="o", capsize=4, color=color)
    axes.axvline(0, color="black", linewidth=1)
    if result.margin:
        axes.axvspan(-scale * result.margin, scale * result.margin, color="black", alpha=0.06, linewidth=0)
    axes.xaxis.get_major_locator().set_params(nbins=5)
    axes.set_yticks(range(len(labels)), map(_label, labels.values()))
    axes.set_ylim(max(len(labels), 1) - 0.5, -0.5)
    sign = "negative" if result.mode == "min" else "positive"
    title = f"{result.split} {result.metric}: difference from {display_name(str(result.baseline))}"
    better = f"({sign} is better)"
    label = f"difference{unit}{' ' if letters > len(better) + 20 else chr(10)}{better}"
    margin = "\ngrey: within the margin" if result.margin else ""
    axes.set(title=_label(textwrap.fill(title, letters)), xlabel=f"{label}{margin}")


def _figure_of_search(result):
    rows = result.search_summary()
    palette = seaborn.color_palette("colorblind", min(len(rows), 10)) * (1 + len(rows) // 10)
    with seaborn.axes_style("whitegrid"):
        figure = Figure(figsize=(6, 4.2), layout="constrained")
        axes = figure.subplots()
    for place, row in enumerate(rows):
        known = {rate: mean for rate, mean in row["means"].items() if mean is not None}
        line = {"color": palette[place], "linestyle": DASHES[place // 10 % len(DASHES)]}
        axes.plot(list(known), list(known.values()), label=_label(display_name(row["variant"])), marker=".", **line)
        if row["best"] is not None:
            axes.plot(row["best"], known[row["best"]], "o", color=palette[place])
    if all(rate > 0 for rate in result.grid):
        axes.set_xscale("log")
    direction = "lower" if result.mode == "min" else "higher"
    axes.set(xlabel="rate", ylabel=_label(textwrap.fill(f"{result.split} {result.metric} ({direction} is better)", 30)))
    axes.set_title("mean over seeds by rate; large dots: the best")
    _add_legend(figure, axes.get_legend_handles_labels()[0], 3)
    return figure


def _add_legend(figure, handles, columns):
    """Add a legend below all panels, in so many columns at most as the figure is wide enough for."""
    for ncols in range(min(len(handles), columns), 0, -1):
        legend = figure.legend(handles=handles, loc="outside lower center", ncols=ncols, frameon=False)
        if ncols == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()


def _label(text):
    """Return a text that matplotlib shows as it is: a dollar begins mathematics, an underscore hides a label."""
    shown = text.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{shown}" if shown.startswith("_") else shown


def _geometric_mean(values):
    return math.exp(statistics.fmean(map(math.log, values)))
