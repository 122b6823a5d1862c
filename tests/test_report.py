"""Pictures and tables of a run, of few classes and of hundreds."""

import struct

import matplotlib.pyplot as plt
import numpy as np
import pytest

from elmo_jax import report


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
