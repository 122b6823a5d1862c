"""Plots and text tables of a run, and a page that collects them as Markdown and as one HTML file.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

import base64
import contextlib
import html
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any, Literal

import matplotlib.pyplot as plt
import numpy as np
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from elmo_jax.storage.files import write_atomically

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
_LEGEND: Any = {"frameon": False, "fontsize": 9, "ncols": 3, "columnspacing": 1.2, "handletextpad": 0.5}
_LEGEND |= {"loc": "lower center", "bbox_to_anchor": (0.5, 1)}  # above the axes, where it covers no line
_SMALL = (5.2, 3.2)  # inches
_NOTE: Any = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
_MAX_LABELLED_CLASSES = 25  # the cells of a larger confusion matrix are too small for numbers
logging.getLogger("matplotlib").setLevel(logging.ERROR)


def series_style(i: int) -> dict[str, Any]:
    """Return the colour and marker of series i; the pairs repeat after 36 series."""
    n = len(COLOURS)
    return {"color": COLOURS[i % n], "marker": MARKERS[(i + i // n) % n]}


@contextlib.contextmanager
def new_figure(path: Path, width: float, height: float, **style: Any) -> Iterator[Figure]:
    """Yield a figure of this size in inches, then write it as a PNG, completely or not at all."""
    path.parent.mkdir(exist_ok=True)
    with plt.rc_context(STYLE | style):
        figure = plt.figure(figsize=(width, height))
        yield figure
        figure.savefig(png := io.BytesIO())
        plt.close(figure)
    write_atomically(path, png.getvalue())


def plot_curves(
    records: Sequence[Mapping[str, Any]], lines: Mapping[str, str], path: Path, ylabel: str, log: bool = False
) -> None:
    """Plot values of the epoch records as a PNG; `lines` maps names in the records to labels."""
    epochs = [record["epoch"] for record in records]
    values = {label: np.array([[record[name] for record in records]]) for name, label in lines.items()}
    plot_bands(epochs, values, path, "epoch", ylabel, "y" if log else None, _SMALL)


def plot_lambdas(weights: Sequence[Sequence[float]], path: Path) -> None:
    """Plot the weight of each layer as a PNG: against the epoch, or as bars if training does not change it.

    Args:
        weights: λ before training and after each epoch, ``[epochs + 1, L]``.
        path: PNG file to write.
    """
    columns = np.array(weights).T  # [L, X]
    labels = ["token vectors", *(f"LSTM layer {j}" for j in range(1, len(columns)))]
    if np.ptp(columns, axis=1).max() == 0:
        plot_bars(
            {label: column[:1] for label, column in zip(labels, columns, strict=True)}, path, "weight λ"
        )
        return
    values = {label: column[None] for label, column in zip(labels, columns, strict=True)}
    plot_bands(range(len(weights)), values, path, "epoch (0: before training)", "weight λ", size=_SMALL)


def plot_bands(
    x: Sequence[float],
    values: Mapping[str, np.ndarray],
    path: Path,
    xlabel: str,
    ylabel: str,
    log: Literal["x", "y"] | None = None,
    size: tuple[float, float] = (6.2, 3.8),
) -> None:
    """Plot means over repetitions against x, each in a band of one standard deviation, as a PNG.

    A single x has no room for a band; it gets error bars and its values as numbers.

    Args:
        x: X increasing values.
        values: By name, y for each repetition and x, ``[S, X]``.
        path: PNG file to write.
        xlabel, ylabel: Axis labels with their units.
        log: Axis with a logarithmic scale.
        size: Width and height in inches.
    """
    with new_figure(path, *size) as figure:
        axes = figure.subplots()
        for i, (name, y) in enumerate(values.items()):
            mean, spread, style = y.mean(0), deviation(y), {**series_style(i), "markersize": 4, "label": name}
            if len(x) > 1:
                axes.plot(x, mean, **style)
                axes.fill_between(x, mean - spread, mean + spread, color=style["color"], alpha=0.18, lw=0)
            else:  # side by side, so that equal values stay visible
                at = x[0] * (1 + (i - (len(values) - 1) / 2) / 100)
                axes.errorbar(at, mean, yerr=spread if len(y) > 1 else None, capsize=3, **style)
                axes.annotate(f"{mean[0]:.4g}", (at, mean[0]), (0, 7), **_NOTE)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True) if len(x) > 1 else FixedLocator(x))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if log == "x":
            axes.set_xscale("log")
            axes.set_xticks(x, [f"{each:,g}" for each in x])
            axes.xaxis.set_minor_locator(NullLocator())
        if log == "y":
            axes.set_yscale("log")
            # Ticks at powers of ten alone would leave most curves without a number.
            low, high = axes.get_ylim()
            factors = (1, 2, 5) if high < 500 * low else (1,)
            ticks = [factor * 10.0**power for power in range(-6, 12) for factor in factors]
            ticks = MaxNLocator(6).tick_values(low, high) if high < 8 * low else ticks
            axes.set_yticks([tick for tick in ticks if low <= tick <= high])
            axes.yaxis.set_major_formatter("{x:,g}")
            axes.yaxis.set_minor_locator(NullLocator())
        if len(values) > 1:
            axes.legend(**_LEGEND)


def plot_dots(
    values: Mapping[str, Sequence[float]], path: Path, xlabel: str, reference: float | None = None
) -> None:
    """Plot the mean and standard deviation of repetitions, one name per line, as a PNG.

    Args:
        values: By name, one value for each repetition; plotted from top to bottom.
        path: PNG file to write.
        xlabel: Axis label with its unit.
        reference: Value to compare with, plotted as a dashed line.
    """
    with new_figure(path, 6.2, 0.8 + 0.4 * len(values)) as figure:
        axes = figure.subplots()
        if reference is not None:
            axes.axvline(reference, color="black", linestyle="--", linewidth=1)
        for i, runs in enumerate(values.values()):
            mean, spread = float(np.mean(runs)), float(deviation(np.array(runs)))
            axes.errorbar(mean, i, xerr=spread or None, fmt="o", color=COLOURS[0], capsize=3)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # hides the dashed line
            axes.annotate(f"{mean:.3f}", (mean, i), (0, 8), bbox=box, **_NOTE)
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -0.8)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.set(xlabel=xlabel)


def plot_bars(values: Mapping[str, Sequence[float] | np.ndarray], path: Path, xlabel: str) -> None:
    """Plot the mean of repetitions as bars from 0 with error bars, one name per line, as a PNG.

    Args:
        values: By name, one value for each repetition; plotted from top to bottom.
        path: PNG file to write.
        xlabel: Axis label with its unit.
    """
    with new_figure(path, 6.2, 0.8 + 0.4 * len(values)) as figure:
        axes = figure.subplots()
        runs = [np.asarray(each) for each in values.values()]
        means = [float(each.mean()) for each in runs]
        spreads = [float(deviation(each)) for each in runs]
        has_spread = any(spreads)
        bars = axes.barh(range(len(runs)), means, 0.6, color=COLOURS[0], xerr=spreads if has_spread else None)
        axes.bar_label(bars, [f"{mean:.3f}" for mean in means], padding=4, fontsize=9)
        axes.set_yticks(range(len(runs)), list(values))
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.set(xlabel=xlabel)


def deviation(values: np.ndarray) -> Any:
    """Return the sample standard deviation along the first axis; 0 for one repetition."""
    return np.std(values, axis=0, ddof=1) if len(values) > 1 else 0 * values[0]


def plot_layers(
    points: Sequence[np.ndarray], groups: Sequence[str], titles: Sequence[str], path: Path
) -> None:
    """Plot the occurrences of a word in each layer, one panel per layer, as a PNG.

    Args:
        points: For each layer, coordinates ``[N, 2]`` of the occurrences.
        groups: Group of each of the N occurrences; a group has one colour and marker.
        titles: Titles of the panels.
        path: PNG file to write.
    """
    names = list(dict.fromkeys(groups))
    size = max(float(np.abs(xy).max()) for xy in points) * 1.12 or 1.0  # one scale makes spreads comparable
    style: Any = {"axes.spines.left": False, "axes.spines.bottom": False}
    with new_figure(path, 2.9 * len(points), 3.1, **style) as figure:
        panels = figure.subplots(1, len(points), squeeze=False)
        for axes, xy, title in zip(panels[0], points, titles, strict=True):
            for i, name in enumerate(names):
                dots: Any = {**series_style(i), "s": 34, "alpha": 0.75, "linewidths": 0.6}
                axes.scatter(*xy[[group == name for group in groups]].T, edgecolors="white", **dots)
            axes.set(xlim=(-size, size), ylim=(-size, size), xticks=[], yticks=[], aspect="equal")
            axes.set_facecolor("#f5f5f2")
            axes.set_title(title, fontsize=9)
            if np.ptp(xy, axis=0).max() < 1e-3 * size:
                axes.annotate(f"all {len(xy)} in one point", (0, 0), (0, -18), **_NOTE)
        figure.tight_layout(w_pad=1.0)
        legend: Any = {"frameon": False, "loc": "upper center", "bbox_to_anchor": (0.5, 0.04), "fontsize": 9}
        labels = _number_unwritable(names, "word")
        figure.legend(panels[0][0].collections, labels, ncols=2, handletextpad=0.2, **legend)


def plot_confusion(counts: Sequence[Sequence[int]], classes: Sequence[str], title: str, path: Path) -> None:
    """Plot a confusion matrix as a PNG: counts, shaded by their fraction of the true class.

    With more than 25 classes the cells hold no numbers, and evenly spaced ticks name at most 25 classes.
    """
    matrix, n = np.array(counts), len(classes)
    fractions = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(1.6 + 0.8 * n, 12)  # inches; memory grows with its square
    with new_figure(path, side, side, **{"axes.grid": False}) as figure:
        axes = figure.subplots()
        axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
        size = min(8, 12 * side / n)  # points, so that the numbers fit into a cell
        for (i, j), count in np.ndenumerate(matrix) if n <= _MAX_LABELLED_CLASSES else ():
            text, dark = f"{count:,}\n{fractions[i, j]:.1%}", fractions[i, j] > 0.5
            colour = "white" if dark else "black"
            axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=size)
        step = -(-n // _MAX_LABELLED_CLASSES)
        labels = _number_unwritable(classes, "class")[::step]
        axes.set_xticks(range(0, n, step), labels, rotation=30, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(0, n, step), labels)
        axes.set(xlabel="predicted", ylabel="true", title=title)


def _number_unwritable(names: Sequence[str], kind: str) -> list[str]:
    """Replace each name that the font has not all characters of by a number, such as "class 2"."""
    font = get_font(findfont(FontProperties()))
    return [
        name if all(map(font.get_char_index, map(ord, name))) else f"{kind} {i}"
        for i, name in enumerate(names, 1)
    ]


def explain_numbers(names: Sequence[str], kind: str) -> str:
    """Return a sentence that names the classes or words that plots show as numbers, if there are any.

    Examples:
        >>> explain_numbers(["Sports", "体育"], "class")
        'The plots use a font without these characters and show numbers: class 2 is 体育.'
    """
    labels = _number_unwritable(names, kind)
    numbered = [f"{label} is {name}" for label, name in zip(labels, names, strict=True) if label != name]
    prefix = "The plots use a font without these characters and show numbers"
    return f"{prefix}: {'; '.join(numbered)}." if numbered else ""


def confusion_table(counts: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """Return a confusion matrix as text, one row a true class; refer to results.json if it is too large.

    Examples:
        >>> print(confusion_table([[3, 1], [0, 4]], ["World", "Sports"]))
        true \\ predicted   World  Sports
        World                  3       1
        Sports                 0       4
    """
    if len(classes) > _MAX_LABELLED_CLASSES:
        return f"{len(classes)} classes: the confusion matrix is in results.json"
    rows = ([name, *(f"{n:,}" for n in row)] for name, row in zip(classes, counts, strict=True))
    return _align_columns([["true \\ predicted", *classes], *rows])


def metrics_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return accuracy, F1, precision and recall of each part as text."""
    names, parts = ("accuracy", "f1", "precision", "recall"), ("train", "validation", "test")
    rows = ([part, *(f"{results[part][name]:.4f}" for name in names)] for part in parts)
    return _align_columns([["", *names], *rows])


def _align_columns(rows: Sequence[Sequence[str]]) -> str:
    """Return a table as text: the first column left-aligned, the others right-aligned in one width."""
    first = max(len(row[0]) for row in rows)
    width = max(len(cell) for row in rows for cell in row[1:])
    return "\n".join(row[0].ljust(first) + "".join(f"  {cell:>{width}}" for cell in row[1:]) for row in rows)


class Page:
    """A page of text, tables and figures, filled from top to bottom and written at the end.

    Args:
        title: Title of the page.
        path: Files to write, without a suffix: ``path.md`` links to its figures, ``path.html`` holds them.
    """

    def __init__(self, title: str, path: Path):
        self.title, self.path = title, path
        self._markdown, self._html = [f"# {title}"], [f"<h1>{html.escape(title)}</h1>"]

    def add_heading(self, text: str) -> None:
        """Start a section."""
        self._markdown.append(f"## {text}")
        self._html.append(f"<h2>{html.escape(text)}</h2>")

    def add_text(self, text: str) -> None:
        """Add a paragraph; backticks enclose code."""
        self._markdown.append(text)
        self._html.append(f"<p>{_format_code(text)}</p>")

    def add_table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Add a table whose first column names the rows."""
        lines = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
        lines.insert(1, ["---", *["---:"] * (len(head) - 1)])
        self._markdown.append("\n".join(f"| {' | '.join(row)} |" for row in lines))
        top = "".join(f'<th scope="col">{_format_code(cell)}</th>' for cell in head)
        body = "".join(f"<tr>{''.join(f'<td>{_format_code(c)}</td>' for c in row)}</tr>\n" for row in rows)
        table = f"<table><thead><tr>{top}</tr></thead>\n<tbody>\n{body}</tbody></table>"
        self._html.append(f'<div class="table">{table}</div>')

    def add_figures(self, *figures: tuple[Path, str, str]) -> None:
        """Add PNG files side by side, each with its alternative text and its caption."""
        inline = []
        for path, alt, caption in figures:
            target = Path(os.path.relpath(path, self.path.parent)).as_posix()
            self._markdown.append(f"![{alt}](<{target}>)\n\n{caption}")
            source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            caption = f"<figcaption>{html.escape(caption)}</figcaption>"
            inline.append(f'<figure><img src="{source}" alt="{html.escape(alt)}">{caption}</figure>')
        self._html.append(f'<div class="figures">{"".join(inline)}</div>')

    def write(self) -> None:
        """Write the Markdown and the HTML file."""
        self.path.with_suffix(".md").write_text("\n\n".join(self._markdown) + "\n", encoding="utf-8")
        template = Template(Path(__file__).with_name("page.html").read_text("utf-8"))
        page = template.substitute(title=html.escape(self.title), body="\n".join(self._html))
        self.path.with_suffix(".html").write_text(page, encoding="utf-8")


def _format_code(text: str) -> str:
    """Escape text for HTML and mark the code between backticks."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))
