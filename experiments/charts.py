"""The benchmark's pictures: rates against sizes, and shares of what the machine could do."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from elmo_jax import report

_ROW = 6  # names in a row of a legend
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo")  # as many as make bars alike no sooner than lines


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
    looks = {name: report.look(i) for i, name in enumerate(names)}
    with plt.rc_context(report.STYLE):
        size = (1.2 + 4.2 * len(panels), 3.4)
        figure, row = plt.subplots(1, len(panels), figsize=size, squeeze=False, layout="constrained")
        for axes, (title, curves) in zip(row[0], panels.items(), strict=True):
            ticks = sorted({x for runs in curves.values() for x in runs})
            for name, runs in curves.items():
                x = sorted(runs)
                middle = [float(np.median(runs[at])) for at in x]
                axes.plot(x, middle, markersize=5, label=name, **looks[name])
                low, high = ([float(pick(runs[at])) for at in x] for pick in (min, max))
                axes.fill_between(x, low, high, color=looks[name]["color"], alpha=0.18, lw=0)
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
        figure.legend(
            lines.values(), lines, frameon=False, loc="outside upper center", ncols=min(len(lines), _ROW)
        )
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
    looks = {name: _bar(i) for i, name in enumerate(names)}
    most = max(share for group in shares.values() for share in group.values())
    with plt.rc_context(report.STYLE | {"axes.grid": False}):
        bars = sum(map(len, shares.values()))
        figure, axes = plt.subplots(figsize=(6.4, 1.1 + 0.2 * bars + 0.12 * len(shares)))
        top, ticks = 0.0, []
        for group in shares.values():
            ticks.append(top + (len(group) - 1) / 2)
            for name, share in group.items():
                drawn = axes.barh(top, share, height=0.82, **looks[name])
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
        handles = [Patch(**looks[name], label=name) for name in names]
        legend: Any = {"frameon": False, "loc": "lower center", "bbox_to_anchor": (0.5, 1)}
        axes.legend(handles=handles, ncols=min(len(names), _ROW), **legend)
        figure.savefig(path)
        plt.close(figure)


def _bar(i: int) -> dict[str, Any]:
    """The look of the i-th bar of several, which has no marker: where colours repeat, a hatch."""
    hatch = _HATCHES[i // len(report.COLOURS) % len(_HATCHES)]
    return {"facecolor": report.look(i)["color"], "hatch": hatch, "edgecolor": "white", "linewidth": 0}
