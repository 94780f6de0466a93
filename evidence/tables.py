"""How the measurements beside the recipes condense their figures and show them."""

import statistics

from rich.table import Table


def median_and_quartiles(values):
    """Return the median, the lower and the upper quartile of two values or more."""
    return statistics.median(values), *statistics.quantiles(values, n=4)[::2]


def rich_table(title, columns):
    """Return a dict from a column's title to its cells as a table for the terminal; the first column is not wrapped."""
    shown = Table(title=title)
    for number, name in enumerate(columns):
        shown.add_column(name, no_wrap=number == 0)
    for cells in zip(*columns.values(), strict=True):
        shown.add_row(*cells)
    return shown
