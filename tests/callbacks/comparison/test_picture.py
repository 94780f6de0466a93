import re
import xml.etree.ElementTree as ElementTree

import matplotlib.colors
import numpy as np
import pytest

from callbacks.comparison import Result
from callbacks.comparison.picture import as_svg, draw


def new_result(figures, curves=None, **arguments):
    """Return a result of {variant: [figure of seed 0, …]}, each run with the curves {name: values}."""
    result = Result(**{"baseline": "a", "metric": "accuracy", "mode": "max", "margin": 0.01} | arguments)
    for variant, values in figures.items():
        for seed, value in enumerate(values):
            result.add_run(variant, seed, {"test": {result.metric: float(value)}}, curve=dict(curves or {}))
    return result


def add_signal(result, variant, seed, name, values, by="layer", scale="linear", **others):
    entry = {"variant": variant, "seed": seed, "name": name, "by": by, "scale": scale, "values": values}
    result.signals.append(entry | others)


def titles(figure):
    return [axes.get_title().replace("\n", " ") for axes in figure.axes]


def test_accuracies_stay_within_nought_and_one():
    result = new_result({"a": [0.5, 0.6], "b": [0.9, 0.99]})
    for run in result.runs:
        run["curve"] = {"val_accuracy": [0.1, 0.6, 1.0] if run["seed"] else [0.9, 0.99, 0.99]}
    (curve, _) = draw(result).axes
    low, high = curve.get_ylim()
    assert low >= 0 and high <= 1
    for band in curve.collections:
        heights = band.get_paths()[0].vertices[:, 1]
        assert heights.min() >= 0 and heights.max() <= 1


def test_bands_reach_from_the_lowest_to_the_highest_seed_and_no_further():
    result = new_result({"a": [0.5, 0.6, 0.7]})
    values = [[1.0, 1e4], [10.0, 1e4], [100.0, 1e2]]
    for seed, each in enumerate(values):
        add_signal(result, "a", seed, "norm, at most 10⁴", each, by="step", scale="log")
    (axes,) = draw(result).axes
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [10.0, (1e4 * 1e4 * 1e2) ** (1 / 3)])
    heights = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(1.0)
    assert heights.max() == pytest.approx(1e4)


def test_validation_has_an_axis_of_its_own():
    curves = {"accuracy": [0.1, 0.5, 0.9], "val_accuracy": [0.80, 0.81, 0.82]}
    training, validation, _ = draw(new_result({"a": [0.5], "b": [0.6]}, curves)).axes
    assert training.get_ylim()[0] < 0.15
    assert validation.get_ylim()[0] > 0.78


def test_signals_lie_where_they_were_measured():
    result = new_result({"a": [0.5, 0.6]})
    for seed in range(2):
        add_signal(result, "a", seed, "accuracy on test", [0.5, 0.6, 0.7], by="images", at=[500.0, 2000.0, 8000.0])
        add_signal(result, "a", seed, "share", [0.3, 0.7], by="branch", at=["3×3", "1×1"])
        add_signal(result, "a", seed, "deviation", [1.0, 2.0])
        add_signal(result, "a", seed, "loss", [1.0, 2.0], by="learning rate", at=[0.001, 1.0], at_scale="log")
    by_number, by_name, by_count, by_rate = draw(result).axes
    assert [axes.get_xscale() for axes in (by_number, by_rate)] == ["linear", "log"]
    np.testing.assert_allclose(by_number.lines[0].get_xdata(), [500, 2000, 8000])
    np.testing.assert_allclose(by_name.lines[0].get_ydata(), [0.3, 0.7])
    assert [label.get_text() for label in by_name.get_xticklabels()] == ["3×3", "1×1"]
    np.testing.assert_allclose(by_count.lines[0].get_xdata(), [1, 2])


def test_curves_lie_at_the_epochs_at_which_they_were_measured():
    result = new_result({"a": [0.5]}, {"accuracy": [0.1, 0.2, 0.3, 0.4], "val_accuracy": [0.2, 0.4]})
    result.runs[0]["epochs"] = {"val_accuracy": [2, 4]}
    training, validation = draw(result).axes
    np.testing.assert_allclose(training.lines[0].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(validation.lines[0].get_xdata(), [2, 4])


@pytest.mark.parametrize("mode, direction, sign", [("min", "lower", "negative"), ("max", "higher", "positive")])
def test_the_better_direction_is_told(mode, direction, sign):
    result = new_result({"a": [0.5], "b": [0.6]}, {"val_loss": [1.0, 0.5]}, metric="loss", mode=mode)
    curve, differences = draw(result).axes
    assert f"{direction} is better" in curve.get_ylabel()
    assert f"{sign} is better" in differences.get_xlabel()


def test_fourteen_variants_can_be_told_apart():
    names = ["a", *(f"variant {number}" for number in range(13))]
    figure = draw(new_result({name: [0.5] for name in names}, {"val_accuracy": [0.2, 0.4]}))
    legend = figure.legends[0]
    looks = {(matplotlib.colors.to_hex(line.get_color()), line.get_linestyle()) for line in legend.get_lines()}
    assert len(looks) == len(names)
    drawn = {(matplotlib.colors.to_hex(line.get_color()), line.get_linestyle()) for line in figure.axes[0].lines}
    assert drawn == looks


@pytest.mark.parametrize("letters, columns", [(2, 3), (24, 2), (60, 1)])
def test_legend_has_as_many_columns_as_the_figure_is_wide_enough_for(letters, columns):
    names = ["a", *(letter * letters for letter in "bcdef")]
    curves = {"accuracy": [0.1, 0.3], "val_accuracy": [0.2, 0.4]}
    figure = draw(new_result({name: [0.5, 0.6] for name in names}, curves))
    (legend,) = figure.legends
    assert legend._ncols == columns
    figure.draw_without_rendering()
    assert legend.get_window_extent().x0 >= 0
    assert legend.get_window_extent().x1 <= figure.bbox.width


def test_variants_without_a_curve_are_not_in_the_legend():
    result = new_result({"a": [0.5], "b": [0.6], "c": [0.7]}, {"val_accuracy": [0.2, 0.4]})
    result.runs[2]["curve"] = {}
    assert [text.get_text() for text in draw(result).legends[0].get_texts()] == ["a", "b"]
    assert draw(new_result({"a": [0.5], "b": [0.6]})).legends == []


def test_curve_ends_where_most_of_its_runs_have():
    result = new_result({"a": [0.5, 0.6, 0.7, 0.8]})
    for run, length in zip(result.runs, (5, 4, 3, 3), strict=True):
        run["curve"] = {"val_accuracy": [0.1 * run["seed"] + 0.01 * epoch for epoch in range(length)]}
    (curve,) = draw(result).axes
    np.testing.assert_allclose(curve.lines[0].get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(curve.lines[0].get_ydata(), [0.15, 0.16, 0.17, 0.08])


def test_signal_named_like_a_curve_has_a_panel_of_its_own():
    result = new_result({"a": [0.5]}, {"val_accuracy": [0.2, 0.9]})
    add_signal(result, "a", 0, "validation accuracy", [0.3, 0.4, 0.7], by="tenth of a second")
    assert titles(draw(result)) == ["validation accuracy by tenth of a second", "validation accuracy"]


def test_values_that_an_axis_cannot_show_are_left_out():
    result = new_result({"a": [0.5, 0.6]})
    add_signal(result, "a", 0, "norm", [2.0, 0.0, np.inf, 4.0], scale="log")
    add_signal(result, "a", 1, "norm", [8.0, 3.0, np.nan, 1.0], scale="log")
    (axes,) = draw(result).axes
    np.testing.assert_allclose(axes.lines[0].get_xdata(), [1, 2, 4])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [4.0, 3.0, 2.0])


def test_differences_have_dots_for_seeds_and_an_interval_from_five_on():
    base = np.array([0.5, 0.6, 0.7, 0.8, 0.65])
    shift = np.array([0.1, 0.12, 0.11, 0.09, 0.08])
    (axes,) = draw(new_result({"a": base, "b": base + shift})).axes
    np.testing.assert_allclose(np.sort(axes.lines[0].get_xdata()), np.sort(100 * shift))
    assert "difference in points" in axes.get_xlabel()
    (losses,) = draw(new_result({"a": base, "b": base + shift}, metric="loss", mode="min")).axes
    np.testing.assert_allclose(np.sort(losses.lines[0].get_xdata()), np.sort(shift))
    assert losses.get_xlabel().startswith("difference (negative is better)")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b"]
    (few,) = draw(new_result({"a": base[:3], "b": base[:3] + shift[:3]})).axes
    assert len(axes.collections) == len(few.collections) + 1


@pytest.mark.parametrize("signals, own_row", [(0, True), (1, False), (2, True)])
def test_last_panel_has_a_row_of_its_own_where_it_would_be_alone(signals, own_row):
    result = new_result({"a": [0.5, 0.6], "b": [0.9, 0.99]}, {"accuracy": [0.5, 0.6], "val_accuracy": [0.4, 0.5]})
    for name in range(signals):
        add_signal(result, "a", 0, str(name), [1.0, 2.0])
    figure = draw(result)
    figure.draw_without_rendering()
    boxes = [axes.get_tightbbox().transformed(figure.transFigure.inverted()) for axes in figure.axes]
    assert len(boxes) == 3 + signals
    assert (boxes[-1].width > 0.8) == own_row
    assert all(box.x0 < 0.5 < box.x1 for box in boxes[-1:]) == own_row
    assert all(box.x0 >= 0 and box.x1 <= 1 for box in boxes)


def test_letters_can_be_read_on_a_phone():
    result = new_result({"a": [0.5, 0.6], "b": [0.9, 0.99]}, {"accuracy": [0.5, 0.6], "val_accuracy": [0.4, 0.5]})
    svg = ElementTree.fromstring(as_svg(result))
    width = float(svg.get("width").removesuffix("pt"))
    styles = [text.get("style") for text in svg.iter("{http://www.w3.org/2000/svg}text")]
    sizes = [float(re.search(r"([\d.]+)px", style)[1]) for style in styles]
    # A page at 390 pixels has 358 for a picture.
    assert len(sizes) > 20
    assert min(sizes) * 358 / width >= 8


def test_diverged_variants_are_said_to_be():
    (axes,) = draw(new_result({"a": [0.5] * 6, "b": [np.nan] * 6})).axes
    assert [text.get_text() for text in axes.texts] == ["worse: it diverged in 6 of 6"]


def test_seeds_that_are_left_where_divergence_decides_are_not_drawn():
    (axes,) = draw(new_result({"a": [0.5] * 9, "b": [np.nan] * 8 + [0.9]})).axes
    assert [text.get_text() for text in axes.texts] == ["worse: it diverged in 8 of 9"]
    # But the line at zero.
    assert [list(line.get_xdata()) for line in axes.lines] == [[0, 0]]


@pytest.mark.parametrize("signals", [0, 1, 2])
@pytest.mark.parametrize("name", ["no steps per execution", "an average of the last epochs of twenty"])
def test_names_of_many_variants_do_not_overlap(signals, name):
    result = new_result({"a": [0.5]} | {f"{name} {number}": [0.6] for number in range(9)}, {"accuracy": [0.5, 0.6]})
    for number in range(signals):
        add_signal(result, "a", 0, str(number), [1.0, 2.0])
    figure = draw(result)
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[-1].get_yticklabels()]
    assert len(boxes) == 9
    # From the top down.
    assert all(lower.y1 <= upper.y0 for upper, lower in zip(boxes, boxes[1:], strict=False))


@pytest.mark.parametrize("signals", [0, 1, 2, 3])
def test_titles_stay_within_the_picture_beside_long_names(signals):
    curves = {"accuracy": [0.5, 0.6], "val_accuracy": [0.4, 0.5]}
    result = new_result({"a": [0.5, 0.5], "eighteen letters 1": [0.6, 0.7]}, curves)
    for number in range(signals):
        add_signal(result, "a", 0, f"loss on the training images {number}", [1.0, 2.0])
    figure = draw(result)
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.title.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width


def test_title_and_label_of_a_panel_without_curves_beside_it_stay_within_the_picture():
    figure = draw(new_result({"float32": [0.5, 0.5], "int4, no groups": [0.6, 0.7]}, baseline="float32"))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    for text in (axes.title, axes.xaxis.label):
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width


def test_search_is_drawn_by_rate():
    result = Result(baseline="a", metric="accuracy", mode="max", split="validation", grid=[0.01, 0.1, 1.0])
    for rate, value in zip(result.grid, (0.5, 0.7, np.nan), strict=True):
        result.add_run("a", 0, {"validation": {"accuracy": value}}, rate=rate)
    (axes,) = draw(result).axes
    assert axes.get_xscale() == "log"
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [[0.01, 0.5], [0.1, 0.7]])
    np.testing.assert_allclose(axes.lines[1].get_xydata(), [[0.1, 0.7]])


def test_names_are_no_mathematics_and_none_is_hidden():
    names = ["a", "$x_1$", "_private", "[/relu]", "$\\frac{", "50 % of $"]
    text = as_svg(new_result({name: [0.5] for name in names}, {"val_accuracy": [0.2, 0.4]}))
    texts = {
        "".join(element.itertext()).strip("\N{ZERO WIDTH SPACE}") for element in ElementTree.fromstring(text).iter()
    }
    assert set(names) <= texts


@pytest.mark.parametrize("suffix, beginning", [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_picture_is_saved_in_the_format_of_the_suffix_and_repeats_itself(suffix, beginning, tmp_path):
    result = new_result({"a": [0.5, 0.6], "b": [0.7, 0.9]}, {"val_accuracy": [0.2, 0.4]})
    for name in ("first", "second"):
        draw(result, tmp_path / f"{name}.{suffix}")
    content = (tmp_path / f"first.{suffix}").read_bytes()
    assert content.startswith(beginning)
    if suffix == "svg":
        assert content == (tmp_path / "second.svg").read_bytes()


def test_unknown_format_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="docx"):
        draw(new_result({"a": [0.5]}), tmp_path / "name.docx")
    assert list(tmp_path.iterdir()) == []
