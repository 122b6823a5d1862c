"""Pictures and tables of a run, of few classes and of hundreds."""

import struct

import matplotlib.pyplot as plt
import numpy as np
import pytest

from experiments.common import report


def pixels(path):
    """A PNG's width and height, which its first chunk begins with."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, by what they say."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    yield figures
    monkeypatch.undo()
    plt.close("all")


@pytest.mark.parametrize(("classes", "cells", "names"), [(2, 4, 2), (25, 625, 25), (26, 0, 13), (600, 0, 25)])
def test_a_confusion_matrix_of_any_number_of_classes(tmp_path, drawn, classes, cells, names):
    named = [f"class {i}" for i in range(classes)]
    report.plot_confusion(np.eye(classes, dtype=int).tolist(), named, "test", tmp_path / "confusion.png")
    assert max(pixels(tmp_path / "confusion.png")) < 12.5 * 150
    (axes,) = drawn[0].axes
    assert len(axes.texts) == cells
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [int(label.get_text().split()[1]) for label in labels] == list(
            range(0, classes, -(-classes // 25))
        )
        assert len(labels) == names


def test_numbers_of_a_confusion_matrix_stay_in_their_cells(tmp_path, drawn):
    for classes in (2, 13, 25):
        named = list(map(str, range(classes)))
        report.plot_confusion(
            (99_999 * np.eye(classes, dtype=int)).tolist(), named, "", tmp_path / "confusion.png"
        )
        (axes,) = drawn[-1].axes
        cell = axes.get_window_extent().width / classes
        assert max(text.get_window_extent().width for text in axes.texts) < cell


def test_a_class_may_be_named_like_mathematics(tmp_path, drawn):
    names = ["$^$", "a $x$ b"]
    report.plot_confusion([[1, 0], [0, 1]], names, "test", tmp_path / "confusion.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())


def test_a_table_of_many_classes_is_one_line():
    few, many = ([f"c{i}" for i in range(n)] for n in (25, 600))
    assert len(report.confusion_table(np.eye(25, dtype=int).tolist(), few).splitlines()) == 26
    said = report.confusion_table(np.eye(600, dtype=int).tolist(), many)
    assert said == "600 classes: the confusion matrix is in results.json"


def test_every_curve_is_drawn_and_told_from_the_others(tmp_path, drawn):
    report.plot_lambdas([{"epoch": i, "lambdas": [j / 36 for j in range(9)]} for i in (1, 2)], tmp_path / "l")
    curves = {f"ELMo, frozen {i}": [{1.0: i / 8, 2.0: 1.0}] for i in range(8)}
    report.plot_bands(curves, tmp_path / "b.png", "epoch", "accuracy")
    for figure, count in zip(drawn, (9, 8), strict=True):
        (axes,) = figure.axes
        assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == count
        legend = axes.get_legend()
        assert len(legend.get_texts()) == count
        assert legend.get_window_extent().width <= axes.get_window_extent().width


@pytest.mark.parametrize(
    "x", [(1,), (2,), (1, 2), range(1, 11), (1960,), range(1960, 9801, 1960), (3 * 10**6,)]
)
def test_epochs_and_updates_are_whole_numbers(tmp_path, drawn, x):
    report.plot_curves([{"epoch": i, "loss": 1.0} for i in x], {"loss": ""}, tmp_path / "c.png", "loss")
    report.plot_bands({"SVD": [{float(i): 0.5 for i in x}]}, tmp_path / "b.png", "updates", "accuracy")
    for figure in drawn:
        (axes,) = figure.axes
        low, high = axes.get_xlim()
        labels = {
            at: label.get_text() for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
        }
        seen = {at: label for at, label in labels.items() if low <= at <= high}
        assert seen and all(float(label.replace(",", "")) == at == round(at) for at, label in seen.items())


@pytest.mark.parametrize("repetitions", [1, 2])
def test_the_deviation_of_a_single_point_is_seen(tmp_path, drawn, repetitions):
    report.plot_bands(
        {"SVD": [{1.0: 0.6}, {1.0: 0.8}][:repetitions]}, tmp_path / "b.png", "epoch", "accuracy"
    )
    (axes,) = drawn[0].axes
    bars = [
        segment for bar in axes.collections if hasattr(bar, "get_segments") for segment in bar.get_segments()
    ]
    deviation = np.std([0.6, 0.8], ddof=1)
    want = [[[1, 0.7 - deviation], [1, 0.7 + deviation]]] if repetitions > 1 else []
    np.testing.assert_allclose(bars, want)


def test_classes_that_the_font_cannot_write_are_numbered_and_told(tmp_path, drawn):
    names = ["Sports", "体育", "Äpfel", "财 经"]
    report.plot_confusion(
        np.eye(4, dtype=int).tolist(), names, "test", tmp_path / "c.png"
    )  # without a warning
    (axes,) = drawn[0].axes
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["Sports", "class 2", "Äpfel", "class 4"]
    assert report.explain_numbers(names, "class").endswith(": class 2 is 体育; class 4 is 财 经.")
    assert report.explain_numbers(["Sports", "Äpfel", "$^$"], "class") == ""
