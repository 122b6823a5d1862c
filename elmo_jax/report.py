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
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullLocator, PercentFormatter

Record = Mapping[str, Any]
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLE: Any = {
    "figure.dpi": 150,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.prop_cycle": cycler(color=_COLOURS),
}
logging.getLogger("matplotlib").setLevel(logging.ERROR)


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
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(5.2, 3.2))
        for (name, label), marker in zip(lines.items(), "os^Dv<", strict=False):
            axes.plot(epochs, [record[name] for record in records], marker=marker, markersize=4, label=label)
        axes.set(xlabel="epoch", ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        if len(lines) > 1:
            # Above the axes, where it covers no line.
            axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(lines))
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

    Args:
        curves: by name, each repetition's figure at every x, the same x of all.
        path: of the PNG.
        xlabel, ylabel: with their units.
        log: whether the x axis is logarithmic.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.2, 3.8))
        for (name, runs), marker in zip(curves.items(), "os^Dv<", strict=False):
            x = sorted(runs[0])
            y = np.array([[run[at] for at in x] for run in runs])
            mean, spread = y.mean(0), deviation(y)
            (line,) = axes.plot(x, mean, marker=marker, markersize=4, label=name)
            axes.fill_between(x, mean - spread, mean + spread, color=line.get_color(), alpha=0.18, lw=0)
        if log:
            ticks = sorted({at for runs in curves.values() for at in runs[0]})
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=9)
        figure.savefig(path)
        plt.close(figure)


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
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.2, 0.8 + 0.4 * len(values)))
        for i, runs in enumerate(values.values()):
            mean, spread = float(np.mean(runs)), float(deviation(np.array(runs)))
            axes.errorbar(mean, i, xerr=spread or None, fmt="o", color=_COLOURS[0], capsize=3)
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


def plot_rates(
    panels: Mapping[str, Mapping[str, Mapping[int, Sequence[float]]]], path: Path, xlabel: str, ylabel: str
) -> None:
    """Rates of several competitors against a size, medians within their range, as a PNG.

    Args:
        panels: by title and competitor, each repetition's rate at every size.
        path: of the PNG.
        xlabel, ylabel: with their units.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    looks = {name: (c, m) for name, c, m in zip(names, _COLOURS, "os^Dv<", strict=False)}
    with plt.rc_context(_STYLE):
        size = (1.2 + 4.2 * len(panels), 3.4)
        figure, row = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
        for axes, (title, curves) in zip(row[0], panels.items(), strict=True):
            ticks = sorted({x for runs in curves.values() for x in runs})
            for name, runs in curves.items():
                x = sorted(runs)
                colour, marker = looks[name]
                middle = [float(np.median(runs[at])) for at in x]
                axes.plot(x, middle, marker=marker, markersize=5, color=colour, label=name)
                low, high = ([float(pick(runs[at])) for at in x] for pick in (min, max))
                axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, list(map(str, ticks)))
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter("{x:,.0f}")
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel if axes is row[0, 0] else "")
        lines = {
            name: line
            for axes in row[0]
            for line, name in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(lines.values(), lines, frameon=False, loc="outside upper center", ncols=len(lines))
        figure.savefig(path)
        plt.close(figure)


def plot_shares(shares: Mapping[str, Mapping[str, float]], path: Path, xlabel: str) -> None:
    """Bars of shares in [0, 1] by group and competitor, from top to bottom, as a PNG.

    Args:
        shares: by group and competitor.
        path: of the PNG.
        xlabel: what a share is of.
    """
    names = list(dict.fromkeys(name for group in shares.values() for name in group))
    colours = dict(zip(names, _COLOURS, strict=False))
    most = max(share for group in shares.values() for share in group.values())
    with plt.rc_context(_STYLE | {"axes.grid": False}):
        bars = sum(map(len, shares.values()))
        figure, axes = plt.subplots(figsize=(6.4, 1.1 + 0.2 * bars + 0.12 * len(shares)))
        top, ticks = 0.0, []
        for group in shares.values():
            ticks.append(top + (len(group) - 1) / 2)
            for name, share in group.items():
                drawn = axes.barh(top, share, height=0.82, color=colours[name])
                axes.bar_label(drawn, [f" {share:.0%}" if share >= 0.1 else f" {share:.1%}"], fontsize=8)
                top += 1
            top += 0.6
        axes.set_yticks(ticks, list(shares))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max(1.0, 1.1 * most))
        axes.axvline(1, color="black", linestyle="--", linewidth=1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(xlabel=xlabel)
        handles = [Patch(color=colours[name], label=name) for name in names]
        axes.legend(
            handles=handles, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(names)
        )
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


def plot_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], title: str, path: Path) -> None:
    """A confusion matrix as a PNG: counts, shaded by their share of the true class."""
    matrix = np.array(counts)
    share = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = 1.6 + 0.8 * len(classes)
    with plt.rc_context(_STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(side, side))
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        for (i, j), count in np.ndenumerate(matrix):
            colour = "white" if share[i, j] > 0.5 else "black"
            axes.text(
                j, i, f"{count:,}\n{share[i, j]:.1%}", ha="center", va="center", color=colour, fontsize=8
            )
        ticks = range(len(classes))
        axes.set_xticks(ticks, classes, rotation=30, ha="right")
        axes.set_yticks(ticks, classes)
        axes.set(xlabel="predicted", ylabel="true", title=title)
        figure.savefig(path)
        plt.close(figure)


def confusion_table(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """A confusion matrix as text, a row a true class.

    Example:
        >>> print(confusion_table([[3, 1], [0, 4]], ["World", "Sports"]))
        true \\ predicted   World  Sports
        World                  3       1
        Sports                 0       4
    """
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
