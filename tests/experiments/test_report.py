"""Plots and tables of a run, with few and with many classes, and the page of results."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments.common import report


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test plots; none is rendered to a file."""
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file: None)
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    plt.close("all")


def diagonal(classes, count=1):
    return (count * np.eye(classes, dtype=int)).tolist()


def tick_labels(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@pytest.mark.parametrize(("classes", "cells", "names"), [(2, 4, 2), (25, 625, 25), (26, 0, 13), (600, 0, 25)])
def test_confusion_matrix_with_many_classes_labels_some(tmp_path, figures, classes, cells, names):
    report.plot_confusion(diagonal(classes), [f"class {i}" for i in range(classes)], "test", tmp_path / "a")
    (axes,) = figures[0].axes
    assert figures[0].get_size_inches().max() <= 12 and len(axes.texts) == cells
    expected = [f"class {i}" for i in range(0, classes, -(-classes // 25))]
    assert tick_labels(axes.xaxis) == tick_labels(axes.yaxis) == expected and len(expected) == names


@pytest.mark.parametrize("classes", [2, 25])
def test_numbers_of_confusion_matrix_fit_into_their_cells(tmp_path, figures, classes):
    report.plot_confusion(diagonal(classes, 99_999), list(map(str, range(classes))), "", tmp_path / "a")
    (axes,) = figures[-1].axes
    cell = axes.get_window_extent().width / classes
    assert max(text.get_window_extent().width for text in axes.texts) < cell


def test_class_may_be_named_like_a_formula(tmp_path):
    report.plot_confusion([[1, 0], [0, 1]], ["$^$", "a $x$ b"], "test", tmp_path / "confusion.png")
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")


def test_classes_that_the_font_cannot_write_are_numbered(tmp_path, figures):
    names = ["Sports", "体育", "Äpfel", "财 经"]
    report.plot_confusion(diagonal(4), names, "test", tmp_path / "c.png")
    (axes,) = figures[0].axes
    expected = ["Sports", "class 2", "Äpfel", "class 4"]
    assert tick_labels(axes.xaxis) == tick_labels(axes.yaxis) == expected
    assert report.explain_numbers(names, "class").endswith(": class 2 is 体育; class 4 is 财 经.")
    assert report.explain_numbers(["Sports", "Äpfel", "$^$"], "class") == ""


def test_table_of_many_classes_is_one_line():
    few, many = ([f"c{i}" for i in range(n)] for n in (25, 600))
    assert len(report.confusion_table(diagonal(25), few).splitlines()) == 26
    text = "600 classes: the confusion matrix is in results.json"
    assert report.confusion_table(diagonal(600), many) == text


def test_constant_weights_are_bars_and_a_single_epoch_shows_its_values(tmp_path, figures):
    report.plot_lambdas([[0.25, -0.5, 1.0]] * 3, tmp_path / "lambdas.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [0.25, -0.5, 1.0]
    assert [text.get_text() for text in axes.texts] == ["0.250", "-0.500", "1.000"]
    report.plot_curves([{"epoch": 1, "loss": 1.25}], {"loss": "training"}, tmp_path / "loss.png", "loss")
    assert [text.get_text() for text in figures[1].axes[0].texts] == ["1.25"]


@pytest.mark.parametrize(("low", "high"), [(88.2, 130.4), (1.01, 1.09), (90, 4_000), (3, 5e5)])
def test_logarithmic_axis_has_a_few_labelled_ticks(tmp_path, figures, low, high):
    records = [{"epoch": 1, "p": high}, {"epoch": 2, "p": low}]
    report.plot_curves(records, {"p": "p"}, tmp_path / "p.png", "perplexity", log=True)
    (axes,) = figures[0].axes
    figures[0].canvas.draw()
    labels = [label for label in axes.get_yticklabels() if label.get_text()]
    boxes = sorted(label.get_window_extent().bounds[1::2] for label in labels)
    assert 2 <= len(labels) <= 20
    assert all(y + height <= above for (y, height), (above, _) in itertools.pairwise(boxes))


def test_curves_have_different_styles_and_a_legend_within_the_axes(tmp_path, figures):
    report.plot_lambdas([[i + j / 36 for j in range(9)] for i in (0, 1)], tmp_path / "lambdas.png")
    curves = {f"ELMo, frozen {i}": np.array([[i / 8, 1.0]]) for i in range(8)}
    report.plot_bands([1, 2], curves, tmp_path / "bands.png", "epoch", "accuracy")
    for figure, count in zip(figures, (9, 8), strict=True):
        (axes,) = figure.axes
        assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == count
        legend = axes.get_legend()
        assert len(legend.get_texts()) == count
        assert legend.get_window_extent().width <= axes.get_window_extent().width


@pytest.mark.parametrize("x", [(1,), (1, 2), range(1, 11), range(1960, 9801, 1960), (3 * 10**6,)])
def test_ticks_of_epochs_and_updates_are_integers(tmp_path, figures, x):
    report.plot_curves([{"epoch": i, "loss": 1.0} for i in x], {"loss": ""}, tmp_path / "c.png", "loss")
    report.plot_bands(x, {"SVD": np.full((1, len(x)), 0.5)}, tmp_path / "b.png", "updates", "accuracy")
    for figure in figures:
        (axes,) = figure.axes
        low, high = axes.get_xlim()
        ticks = zip(axes.get_xticks(), tick_labels(axes.xaxis), strict=True)
        visible = {at: label for at, label in ticks if low <= at <= high}
        assert visible and all(float(label.replace(",", "")) == at for at, label in visible.items())


@pytest.mark.parametrize("repetitions", [1, 2])
def test_single_point_has_error_bars_over_repetitions(tmp_path, figures, repetitions):
    y = np.array([[0.6], [0.8]][:repetitions])
    report.plot_bands([1.0], {"SVD": y}, tmp_path / "b.png", "epoch", "accuracy")
    (axes,) = figures[0].axes
    bars = [bar for lines in axes.collections for bar in lines.get_segments()]
    deviation = np.std([0.6, 0.8], ddof=1)
    expected = [[[1, 0.7 - deviation], [1, 0.7 + deviation]]] if repetitions > 1 else []
    np.testing.assert_allclose(bars, expected)


def test_dots_have_error_bars_and_a_reference_line(tmp_path, figures):
    report.plot_dots({"a": [0.5, 0.7], "b": [0.8]}, tmp_path / "d.png", "accuracy", reference=0.4)
    (axes,) = figures[0].axes
    assert [text.get_text() for text in axes.texts] == ["0.600", "0.800"]
    assert len(axes.collections) == 1 and list(axes.lines[0].get_xdata()) == [0.4, 0.4]


def test_page_holds_its_figures_and_escapes_its_text(tmp_path):
    (tmp_path / "figures").mkdir()
    figure = tmp_path / "figures" / "a b.png"
    figure.write_bytes(b"\x89PNG")
    page = report.Page("A < B", tmp_path / "page")
    page.add_text("run `x --y` & wait")
    page.add_table(["name", "n|m"], [["<b>", "1"]])
    page.add_figures((figure, "a curve", 'the "caption"'))
    page.write()
    html, markdown = ((tmp_path / f"page.{kind}").read_text() for kind in ("html", "md"))
    assert 'src="data:image/png;base64,iVBORw=="' in html and "http" not in html
    assert "<title>A &lt; B</title>" in html and "<code>x --y</code> &amp; wait" in html
    assert "<td>&lt;b&gt;</td>" in html and 'name="viewport"' in html
    assert 'alt="a curve"' in html and html.count("&quot;caption&quot;") == 1
    assert '![a curve](<figures/a b.png>)\n\nthe "caption"' in markdown
    assert "| name | n\\|m |" in markdown
