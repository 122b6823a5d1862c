"""Pictures and tables of a run: curves, layer weights, confusion matrices.

Colours are Okabe and Ito's, told apart by colour-blind readers too.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

Record = Mapping[str, Any]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv<"
STYLE: Any = {
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": cycler(color=COLOURS),
    "text.parse_math": False,  # a class may be named $^$
}
CENTRED: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
# Above the axes, where it covers no line, and no wider than they are.
ABOVE: Any = {"frameon": False, "loc": "lower center", "bbox_to_anchor": (0.5, 1), "fontsize": 9}
ABOVE |= {"ncols": 3, "columnspacing": 1.2, "handletextpad": 0.5}
MANY = 25  # classes of a confusion matrix above which its cells hold no legible number
logging.getLogger("matplotlib").setLevel(logging.ERROR)


def look(i: int) -> dict[str, Any]:
    """The colour and the marker of the i-th of several; they repeat together only after 36."""
    n = len(COLOURS)
    return {"color": COLOURS[i % n], "marker": MARKERS[(i + i // n) % n]}


def plot_curves(
    records: Sequence[Record], lines: Mapping[str, str], path: Path, ylabel: str, log: bool = False
) -> None:
    """Figures of the records against the epoch, as a PNG.

    Args:
        records: one an epoch.
        lines: each figure's name in the records and in the legend.
        path: of the PNG.
        ylabel: with its unit.
        log: whether the y axis is logarithmic.
    """
    epochs = [record["epoch"] for record in records]
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.2))
        for i, (name, label) in enumerate(lines.items()):
            axes.plot(epochs, [record[name] for record in records], markersize=4, label=label, **look(i))
        axes.set(xlabel="epoch", ylabel=ylabel)
        _whole_ticks(axes, epochs)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        if len(lines) > 1:
            axes.legend(**ABOVE)
        figure.savefig(path)
        plt.close(figure)


def plot_bands(
    curves: Mapping[str, Sequence[Mapping[float, float]]],
    path: Path,
    xlabel: str,
    ylabel: str,
    log: bool = False,
) -> None:
    """The mean over repetitions against x, within a band of their standard deviation, as a PNG.

    Where there is one x, a band has no width: bars stand in its place, side by side.

    Args:
        curves: by name, each repetition's figure at every x, the same x of all.
        path: of the PNG.
        xlabel, ylabel: with their units.
        log: whether the x axis is logarithmic.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.2, 3.8))
        for i, (name, runs) in enumerate(curves.items()):
            x, style = sorted(runs[0]), look(i)
            y = np.array([[run[at] for at in x] for run in runs])
            mean, spread = y.mean(0), deviation(y)
            if len(x) > 1:
                axes.plot(x, mean, markersize=4, label=name, **style)
                axes.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.18, lw=0)
            else:
                at = x[0] * (1 + (i - (len(curves) - 1) / 2) / 100)
                bars = spread if len(runs) > 1 else None
                axes.errorbar(at, mean, yerr=bars, markersize=4, capsize=3, label=name, **style)
        if log:
            ticks = sorted({at for runs in curves.values() for at in runs[0]})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            _whole_ticks(axes, sorted(next(iter(curves.values()))[0]))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend(**ABOVE)
        figure.savefig(path)
        plt.close(figure)


def _whole_ticks(axes: Axes, x: Sequence[float]) -> None:
    """Ticks at whole numbers, for what is counted; of one x, there alone."""
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True) if len(x) > 1 else FixedLocator(x))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def plot_dots(
    values: Mapping[str, Sequence[float]], path: Path, xlabel: str, floor: float | None = None
) -> None:
    """The mean of repetitions by name, with their standard deviation, as a PNG.

    Args:
        values: by name, a figure a repetition; drawn from top to bottom.
        path: of the PNG.
        xlabel: with its unit.
        floor: a value to compare with, drawn as a broken line.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(6.2, 0.8 + 0.4 * len(values)))
        for i, runs in enumerate(values.values()):
            mean, spread = float(np.mean(runs)), float(deviation(np.array(runs)))
            axes.errorbar(mean, i, xerr=spread or None, fmt="o", color=COLOURS[0], capsize=3)
            axes.annotate(
                f"{mean:.3f}",
                (mean, i),
                (0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # the broken line ends there
            )
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -0.8)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.set(xlabel=xlabel)
        if floor is not None:
            axes.axvline(floor, color="black", linestyle="--", linewidth=1)
        figure.savefig(path)
        plt.close(figure)


def deviation(values: np.ndarray) -> Any:
    """The sample standard deviation along the first axis, 0 of one repetition."""
    return np.std(values, axis=0, ddof=1) if len(values) > 1 else 0 * values[0]


def plot_lambdas(records: Sequence[Record], path: Path) -> None:
    """The weight of each layer against the epoch, as a PNG."""
    layers = len(records[0]["lambdas"])
    names = {f"λ{j}": "token vectors" if j == 0 else f"LSTM layer {j}" for j in range(layers)}
    rows = [
        {"epoch": record["epoch"], **{f"λ{j}": record["lambdas"][j] for j in range(layers)}}
        for record in records
    ]
    plot_curves(rows, names, path, "weight λ")


def plot_layers(
    points: Sequence[np.ndarray], groups: Sequence[str], titles: Sequence[str], path: Path
) -> None:
    """Where each layer puts every occurrence of a word, a panel a layer, as a PNG.

    Args:
        points: of each layer, ``[N, 2]``.
        groups: what kind each of the N is, for the legend: a colour and a marker a kind. For
            those that the font cannot write see `key`.
        titles: of the panels.
        path: of the PNG.
    """
    names = list(dict.fromkeys(groups))
    size = max(float(np.abs(xy).max()) for xy in points) * 1.12 or 1.0  # one scale, so that spread is seen
    with plt.rc_context(STYLE | {"axes.spines.left": False, "axes.spines.bottom": False}):
        figure, panels = plt.subplots(1, len(points), figsize=(2.9 * len(points), 3.1), squeeze=False)
        for axes, xy, title in zip(panels[0], points, titles, strict=True):
            for i, name in enumerate(names):
                chosen = [g == name for g in groups]
                style: Any = {**look(i), "s": 34, "alpha": 0.75, "linewidths": 0.6}
                axes.scatter(*xy[chosen].T, edgecolors="white", **style)
            axes.set(xlim=(-size, size), ylim=(-size, size), xticks=[], yticks=[], aspect="equal")
            axes.set_facecolor("#f5f5f2")
            axes.set_title(title, fontsize=9)
            if np.ptp(xy, axis=0).max() < 1e-3 * size:
                axes.annotate(f"all {len(xy)} in one point", (0, 0), (0, -18), **CENTRED)
        figure.tight_layout(w_pad=1.0)
        unwritable = _unwritable(names, "word")
        labels = [unwritable.get(i, name) for i, name in enumerate(names)]
        legend: Any = {"frameon": False, "loc": "upper center", "bbox_to_anchor": (0.5, 0.04)}
        figure.legend(panels[0][0].collections, labels, ncols=2, handletextpad=0.2, fontsize=9, **legend)
        figure.savefig(path)
        plt.close(figure)


def plot_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], title: str, path: Path) -> None:
    """A confusion matrix as a PNG: counts, shaded by their share of the true class.

    Of more than `MANY` classes the shades alone, and names of at most `MANY`, evenly spaced. For
    names that the font cannot write see `key`.
    """
    matrix = np.array(counts)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(1.6 + 0.8 * len(classes), 12)  # inches; its square is memory
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(side, side))
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        size = min(8, 12 * side / len(classes))  # points, so that a cell's numbers fit into it
        for (i, j), count in np.ndenumerate(matrix) if len(classes) <= MANY else ():
            colour = "white" if share[i, j] > 0.5 else "black"
            said = f"{count:,}\n{share[i, j]:.1%}"
            axes.text(j, i, said, ha="center", va="center", color=colour, fontsize=size)
        ticks = range(0, len(classes), -(-len(classes) // MANY))
        unwritable = _unwritable(classes, "class")
        names = [unwritable.get(i, classes[i]) for i in ticks]
        axes.set_xticks(ticks, names, rotation=30, ha="right")
        axes.set_yticks(ticks, names)
        axes.set(xlabel="predicted", ylabel="true", title=title)
        figure.savefig(path)
        plt.close(figure)


def _unwritable(names: Sequence[str], kind: str) -> dict[int, str]:
    """What stands in a picture for each name that the font has not all characters of."""
    font = get_font(findfont(FontProperties()))
    return {
        i: f"{kind} {i + 1}"
        for i, name in enumerate(names)
        if not all(font.get_char_index(ord(character)) for character in name)
    }


def key(names: Sequence[str], kind: str) -> str:
    """What the numbers in a picture stand for, a sentence; empty if there are none.

    Args:
        names: of classes in a confusion matrix, or of the groups of `plot_layers`.
        kind: "class", or "word".

    Example:
        >>> key(["Sports", "体育"], "class")
        'In pictures, whose font lacks these characters: class 2 is 体育.'
    """
    told = "; ".join(f"{number} is {names[i]}" for i, number in _unwritable(names, kind).items())
    return told and f"In pictures, whose font lacks these characters: {told}."


def confusion_table(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """A confusion matrix as text, a row a true class; of more than `MANY` classes, where it is.

    Example:
        >>> print(confusion_table([[3, 1], [0, 4]], ["World", "Sports"]))
        true \\ predicted   World  Sports
        World                  3       1
        Sports                 0       4
    """
    if len(classes) > MANY:
        return f"{len(classes)} classes: the confusion matrix is in results.json"
    corner = "true \\ predicted"
    first = max(len(corner), *map(len, classes))
    width = max(*map(len, classes), *(len(f"{n:,}") for row in counts for n in row))
    lines = [corner.ljust(first) + "".join(f"  {name:>{width}}" for name in classes)]
    for name, row in zip(classes, counts, strict=True):
        lines.append(name.ljust(first) + "".join(f"  {n:>{width},}" for n in row))
    return "\n".join(lines)


def metrics_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Accuracy, F1, precision and recall of each part, as text."""
    names = ("accuracy", "f1", "precision", "recall")
    lines = [" " * 10 + "".join(f"  {name:>9}" for name in names)]
    for part in ("train", "validation", "test"):
        lines.append(f"{part:10}" + "".join(f"  {results[part][name]:9.4f}" for name in names))
    return "\n".join(lines)
