"""The page of the comparison: methods, their figures, and whether they differ.

Nouns: the *report* is the one whose test accuracies, on AG News, stand beside ours.

What runs came to, read from their files for people to see: of the right form, and of one mind.

Nouns: a run's *records* are the lines of its ``metrics.jsonl``, one an epoch.
Axes: C classes.
"""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from elmo_jax.errors import InputError
from elmo_jax.storage.files import read_arrays
from elmo_jax.training.checkpoint import METRICS, RESULTS
from elmo_jax.training.evaluate import classification
from experiments.common import report
from experiments.common.report import Page
from experiments.compare.stages import Stage
from experiments.downstream import PARTS, PREDICTIONS

T = TypeVar("T")
_ROUNDED = 2e-6  # records hold weights of six digits


class _Scores(msgspec.Struct):
    accuracy: float
    f1: float
    precision: float
    recall: float
    confusion_matrix: list[list[int]]


class _Speed(msgspec.Struct):
    seconds: float
    tokens_per_second: float


class _Results(_Speed):
    train: _Scores
    validation: _Scores
    test: _Scores
    classes: list[str]
    lambdas: list[float] | None


class _Epoch(msgspec.Struct):
    epoch: int
    step: int
    val_accuracy: float
    lambdas: list[float] | None


class _Perplexities(_Speed):
    perplexity: float
    perplexity_forward: float
    perplexity_backward: float


class _PretrainEpoch(_Perplexities):
    epoch: int


class _Pretrained(_Perplexities):
    best_epoch: int


class Classifier(NamedTuple):
    """A finished run of ``experiments.downstream``.

    Attributes:
        results: what its ``results.json`` holds.
        records: its epochs.
        labels, predicted: the class of each test document, int32.
    """

    results: dict[str, Any]
    records: list[dict[str, Any]]
    labels: np.ndarray
    predicted: np.ndarray


def classifier(path: Path, epochs: int) -> Classifier:
    """A classifier's figures, which its predictions must bear out.

    Args:
        path: its run.
        epochs: that it was trained for.

    Raises:
        InputError: a file is missing or damaged, or contradicts another.
    """
    results = read_json(path / RESULTS)
    told = _fitting(_Results, results, path / RESULTS)
    records = read_records(path)
    seen = _fitting(list[_Epoch], records, path / METRICS)
    _count(seen, path, epochs)
    if any(not 0 <= record.val_accuracy <= 1 or record.step < 1 for record in seen):
        raise _refusal(path, METRICS, "a val_accuracy or a step is out of bounds")
    _check_lambdas(told, seen, path)
    arrays = _predictions(path, len(told.classes))
    for part in PARTS:
        counts = np.zeros((len(told.classes),) * 2)
        np.add.at(counts, (arrays[f"{part}_labels"], arrays[part]), 1)
        for name, value in classification(counts).items():
            said = getattr(getattr(told, part), name)
            same = said == value if name == "confusion_matrix" else math.isclose(said, value, abs_tol=1e-9)
            if not same:
                raise _refusal(path, RESULTS, f"{part}'s {name} is not that of {PREDICTIONS}")
    return Classifier(results, records, arrays["test_labels"], arrays["test"])


def language_model_records(path: Path) -> list[dict[str, Any]]:
    """The records of a finished run of ``experiments.pretrain``, with what its results say of them.

    Raises:
        InputError: a file is missing or damaged, or contradicts another.
    """
    told = _fitting(_Pretrained, read_json(path / RESULTS), path / RESULTS)
    records = read_records(path)
    seen = _fitting(list[_PretrainEpoch], records, path / METRICS)
    _count(seen, path)
    for record in seen:
        both = (record.perplexity_forward, record.perplexity_backward)
        if not all(0 < x < math.inf for x in (record.perplexity, *both)):
            raise _refusal(
                path, METRICS, f"epoch {record.epoch} has a perplexity that is not above 0 and finite"
            )
        if not math.isclose(record.perplexity, math.sqrt(both[0]) * math.sqrt(both[1]), rel_tol=1e-6):
            raise _refusal(path, METRICS, f"epoch {record.epoch}'s perplexity is not its directions' mean")
    best = min(seen, key=lambda record: record.perplexity)
    if (told.best_epoch, told.perplexity) != (best.epoch, best.perplexity):
        raise _refusal(path, RESULTS, f"its best epoch is not that of {METRICS}")
    return records


def speed(path: Path) -> tuple[float, float]:
    """A finished run's seconds of training, and tokens a second.

    Raises:
        InputError: its results are missing or damaged.
    """
    told = _fitting(_Speed, read_json(path / RESULTS), path / RESULTS)
    if not all(0 <= x < math.inf for x in (told.seconds, told.tokens_per_second)):
        raise _refusal(path, RESULTS, "its times are no such numbers")
    return told.seconds, told.tokens_per_second


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run's folder.

    Raises:
        InputError: they are missing or not JSON.
    """
    try:
        records = [json.loads(line) for line in (path / METRICS).read_text("utf-8").splitlines()]
        if not all(isinstance(record, dict) for record in records):
            raise ValueError("not an object a line")
        return records
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path, METRICS, f"cannot be read ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a run.

    Raises:
        InputError: it is missing or no JSON object.
    """
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(made, dict):
            raise ValueError("not an object")
        return made
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path.parent, path.name, f"cannot be read ({error})") from None


def _refusal(path: Path, name: str, told: str) -> InputError:
    told = " ".join(told.split())
    return InputError(f"{path / name}: {told}; remove {path / RESULTS}, and finish that run again")


def _fitting(kind: type[T], data: Any, path: Path) -> T:
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise _refusal(path.parent, path.name, str(error)) from None


def _count(seen: Sequence[_Epoch | _PretrainEpoch], path: Path, epochs: int | None = None) -> None:
    enabled = max(len(seen), 1) if epochs is None else epochs
    if [record.epoch for record in seen] != list(range(1, enabled + 1)):
        many = f"{enabled} epochs" if epochs else "every epoch"
        raise _refusal(path, METRICS, f"does not hold {many}, a line each in their order")


def _check_lambdas(told: _Results, seen: Sequence[_Epoch], path: Path) -> None:
    """The weights are those of some epoch's end."""
    if told.lambdas is None and all(record.lambdas is None for record in seen):
        return
    every = [told.lambdas or [], *(record.lambdas or [] for record in seen)]
    if not every[0] or {len(weights) for weights in every} != {len(every[0])}:
        raise _refusal(path, METRICS, f"has not the lambdas of {RESULTS}")
    if not np.isfinite(np.array(every)).all():
        raise _refusal(path, METRICS, "a lambda is not finite")
    if not any(np.abs(np.subtract(weights, every[0])).max() < _ROUNDED for weights in every[1:]):
        raise _refusal(path, RESULTS, f"its lambdas are those of no epoch in {METRICS}")


def _predictions(path: Path, classes: int) -> dict[str, np.ndarray]:
    """Each part's predicted and true classes."""
    names = [f"{part}{which}" for part in PARTS for which in ("", "_labels")]
    try:
        arrays = dict(zip(names, read_arrays(path / PREDICTIONS, names), strict=True))
    except ValueError as error:
        raise _refusal(path, PREDICTIONS, f"cannot be read ({error})") from None
    for part in PARTS:
        pair = (arrays[part], arrays[f"{part}_labels"])
        fit = all(a.ndim == 1 and a.dtype.kind == "i" and len(a) == len(pair[0]) > 0 for a in pair)
        if not fit or not all(a.min() >= 0 and a.max() < classes for a in pair):
            raise _refusal(path, PREDICTIONS, f"{part} is not one of {classes} classes for each document")
    return arrays


REPORTED = "ag_news"
REPORT = {
    "ELMo, learned function": 0.9045,
    "ELMo, trainable λ": 0.8892,
    "SGNS": 0.8892,
    "ELMo, frozen λ": 0.8833,
    "SVD": 0.8595,
}
SCORES = ("accuracy", "f1", "precision", "recall")
LEVEL = 0.05  # below it a p-value counts as a difference

Found = Mapping[str, Sequence[Classifier]]


def write(
    classifiers: Mapping[str, Sequence[Stage]],
    sources: Sequence[Stage],
    language_model: Path,
    seconds: Mapping[str, float],
    about: str,
    dataset: str,
    output: Path,
) -> None:
    """Draw the figures and write ``report.md`` and ``report.html``.

    Args:
        classifiers: each method's runs, a seed each; all finished.
        sources: the stages that made their features.
        language_model: the run of the language model.
        seconds: each stage's time, where known.
        about: how the page came about, a paragraph.
        dataset: its name; the report's figures are of one alone.
        output: the folder.

    Raises:
        InputError: a run's files are damaged, or contradict each other.
    """
    found = {method: [measure(run) for run in runs] for method, runs in classifiers.items()}
    results = {method: [run.results for run in runs] for method, runs in found.items()}
    order = sorted(results, key=lambda method: -np.mean(_scores(results[method], "test", "accuracy")))
    reported = REPORT if dataset == REPORTED else {}
    figures = output / "figures"
    figures.mkdir(exist_ok=True)
    page = Page("Word vectors with and without context: the comparison", output / "report")
    page.add_text(about)
    _summary(page, results, order, reported)
    page.add_heading("All figures")
    page.add_table(*_table(results, order, reported))
    _difference(page, {m: [run.path for run in classifiers[m]] for m in order}, found)
    _curves(page, found, language_model, figures)
    _confusions(page, {m: results[m] for m in order}, figures)
    _times(page, [*sources, *(run for runs in classifiers.values() for run in runs)], seconds)
    page.write()


def measure(run: Stage) -> Classifier:
    """A finished classifier's figures.

    Raises:
        InputError: its files are damaged, or contradict each other.
    """
    return classifier(run.path, run.settings.epochs)


def spread(values: Sequence[float] | np.ndarray, digits: int = 4, sign: str = "") -> str:
    """Mean, and standard deviation if there are several; a difference with the sign "+".

    Example:
        >>> spread([0.5, 0.7]), spread([0.5]), spread([-0.00001], sign="+")
        ('0.6000 ±\\xa00.1414', '0.5000', '+0.0000')
    """
    mean = f"{np.mean(values):{sign}z.{digits}f}"
    # A narrow column breaks the line before the sign alone.
    return (
        mean
        if len(values) == 1
        else f"{mean} ±\N{NO-BREAK SPACE}{report.deviation(np.array(values)):.{digits}f}"
    )


def _scores(runs: Sequence[Mapping], part: str, score: str) -> list[float]:
    return [run[part][score] for run in runs]


def _summary(page: Page, results: Mapping, order: Sequence[str], reported: Mapping[str, float]) -> None:
    seeds = len(next(iter(results.values())))
    said = "; ".join(f"{m} {spread(_scores(results[m], 'test', 'accuracy'))}" for m in order)
    page.add_text(f"Test accuracy, best first: {said}.")
    if ours := [m for m in order if m in reported]:
        theirs = "; ".join(sorted(ours, key=lambda m: -reported[m]))
        mean = {m: np.mean(_scores(results[m], "test", "accuracy")) for m in ours}
        pairs = ((a, b) for i, a in enumerate(ours) for b in ours[i + 1 :])
        gaps = [f"{a} above {b}" for a, b in pairs if reported[a] < reported[b] and mean[a] > mean[b]]
        told = (
            f"These stand the other way round here: {'; '.join(gaps)}."
            if gaps
            else "No two stand against it."
        )
        page.add_text(f"The report's order, on AG News, is: {theirs}. {told}")
    page.add_text(
        f"{seeds} seeds a method; figures are mean ± standard deviation."
        if seeds > 1
        else "One seed a method, so small differences may be chance; see the test below."
    )


def _table(
    results: Mapping, order: Sequence[str], reported: Mapping[str, float]
) -> tuple[list[str], list[list[str]]]:
    beside = ["the report's (AG News)"] if reported else []
    head = ["method", "part", "accuracy", *beside, "F1", "precision", "recall"]
    rows = []
    for method in order:
        for part in PARTS:
            cells = [spread(_scores(results[method], part, score)) for score in SCORES]
            known = f"{reported[method]:.4f}" if part == "test" and method in reported else "–"
            rows.append([method, part, cells[0], *([known] if reported else []), *cells[1:]])
    return head, rows


def _difference(page: Page, paths: Mapping[str, Sequence[Path]], found: Found) -> None:
    """A test of each method against the next worse one, of the very figures that rank them."""
    page.add_heading("Do neighbours differ?")
    _check_documents(paths, found)
    seeds = len(next(iter(found.values())))
    rows = []
    for better, worse in pairwise(paths):
        labels = found[better][0].labels
        one, other = (np.stack([run.predicted for run in found[m]]) for m in (better, worse))  # [S, N]
        if seeds > 1:
            difference, p = paired_bootstrap(labels, one, other)
            told = [f"{difference:+.4f}"]
        else:
            only_better, only_worse, p = mcnemar(labels, one[0], other[0])
            told = [f"{only_better:,}", f"{only_worse:,}"]
        rows.append(
            [f"{better} – {worse}", *told, shown(p), f"{better} is better" if p < LEVEL else "not shown"]
        )
    if seeds > 1:
        columns = ["first above second"]
        said = (
            f"Paired bootstrap of the difference of mean accuracies over {seeds} seeds: p is twice the share "
            "of 10,000 draws of the test documents in which it is none or turned round. What other seeds "
            "would change is not in it."
        )
    else:
        columns = ["only first right", "only second right"]
        said = (
            "Exact McNemar test on the test documents, of the one seed: those that only one of the two has "
            "right, and the probability p of so uneven a split if both were equally good."
        )
    page.add_text(f"{said} Below {LEVEL} counts as a difference.")
    page.add_table(["pair", *columns, "p", "differ"], rows)


def _check_documents(paths: Mapping[str, Sequence[Path]], found: Found) -> None:
    """All runs are of the same test documents."""
    every = [(path, run.labels) for m in paths for path, run in zip(paths[m], found[m], strict=True)]
    first, labels = every[0]
    for path, other in every[1:]:
        if not np.array_equal(labels, other):
            told = f"is of other test documents than {first / PREDICTIONS}"
            raise InputError(f"{path / PREDICTIONS}: {told}; remove both runs, and make them anew")


def shown(p: float) -> str:
    """A p-value of three digits, or of more where these would put it on the other side of `LEVEL`.

    Example:
        >>> shown(0.0498), shown(0.04999), shown(0.75)
        ('0.0498', '0.04999', '0.75')
    """
    said = (f"{p:.{digits}g}" for digits in range(3, 18))
    return next(text for text in said if (float(text) < LEVEL) == (p < LEVEL))


def _curves(page: Page, found: Found, language_model: Path, figures: Path) -> None:
    page.add_heading("Training")
    records = language_model_records(language_model)
    lines = {"perplexity_forward": "forward", "perplexity_backward": "backward", "perplexity": "mean"}
    report.plot_curves(records, lines, figures / "perplexity.png", "held-out perplexity", log=True)
    best = min(record["perplexity"] for record in records)
    told = f"Pre-training: held-out perplexity, full softmax; best {best:.1f}."
    drawn = [(figures / "perplexity.png", "Perplexity by epoch", told)]
    for method, runs in found.items():
        if "trainable" in method and runs[0].results["lambdas"]:
            records, which = runs[0].records, _first(runs)
            report.plot_lambdas(records, figures / "lambdas.png")
            last = ", ".join(f"{x:.2f}" for x in records[-1]["lambdas"])
            told = f"{method}{which}: the weight of each layer; after the last epoch {last}."
            drawn.append((figures / "lambdas.png", "Layer weights by epoch", told))
    accuracies = {
        method: [{float(r["epoch"]): r["val_accuracy"] for r in run.records} for run in runs]
        for method, runs in found.items()
    }
    report.plot_bands(accuracies, figures / "validation.png", "epoch", "validation accuracy")
    band = ", the mean within one deviation" if len(next(iter(found.values()))) > 1 else ""
    told = f"Classifiers: validation accuracy{band}."
    drawn.append((figures / "validation.png", "Validation accuracy by epoch", told))
    page.add_figures(*drawn)


def _first(runs: Sequence) -> str:
    return ", seed 0" if len(runs) > 1 else ""


def _confusions(page: Page, results: Mapping[str, Sequence[Mapping]], figures: Path) -> None:
    page.add_heading("Confusion matrices")
    first = next(iter(results.values()))[0]
    if key := report.explain_numbers(first["classes"], "class"):
        page.add_text(key)
    for part in reversed(PARTS):
        drawn = []
        for i, (method, runs) in enumerate(results.items()):
            path, found = figures / f"confusion_{i}_{part}.png", runs[0]
            title = f"{part}: accuracy {found[part]['accuracy']:.4f}"
            report.plot_confusion(found[part]["confusion_matrix"], found["classes"], title, path)
            drawn.append((path, "Confusion matrix", f"{method}, {part}{_first(runs)}"))
        page.add_figures(*drawn)


def _times(page: Page, stages: Sequence[Stage], seconds: Mapping[str, float]) -> None:
    page.add_heading("Time")
    rows = []
    for stage in stages:
        training, rate = speed(stage.path)
        whole = f"{seconds[stage.name]:,.0f}" if stage.name in seconds else "–"
        rows.append([stage.name, f"{training:,.0f}", f"{rate:,.0f}", whole])
    page.add_text("Training alone, and the whole stage with loading, compiling and evaluation.")
    page.add_table(["stage", "training (s)", "tokens/s", "whole stage (s)"], rows)


def mcnemar(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """Exact McNemar test of two classifiers on the same documents.

    Where one is right and the other wrong, either should be right half the time if they
    are equally good (McNemar 1947); the rest says nothing of their difference.

    Args:
        labels: ``[N]`` true classes.
        a, b: ``[N]`` predicted classes.

    Returns:
        The documents that a alone has right, those that b alone has right, and the
        two-sided p-value.

    Example:
        >>> labels = np.zeros(12, int)
        >>> mcnemar(labels, labels, np.repeat([1, 0], [6, 6]))
        (6, 0, 0.03125)
    """
    from scipy.stats import binomtest  # 60 MB, for this alone

    only_a, only_b = (int(np.sum((x == labels) & (y != labels))) for x, y in ((a, b), (b, a)))
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return only_a, only_b, p


def paired_bootstrap(
    labels: np.ndarray, a: np.ndarray, b: np.ndarray, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Whether two classifiers' mean accuracies over seeds differ, on other documents of the kind.

    Documents are drawn anew with replacement, each with what all runs made of it
    (Efron and Tibshirani 1993). Seeds are not drawn anew.

    Args:
        labels: ``[N]`` true classes.
        a, b: ``[S, N]`` predicted classes, a row a seed; each its own S.
        draws: how often.
        seed: of the draws.

    Returns:
        The mean accuracy of a less that of b, and the two-sided p-value: twice the share of
        draws in which the difference is none or turned round.

    Example:
        >>> labels = np.zeros(100, int)
        >>> better, worse = (np.repeat([[0, 1]], [n, 100 - n], axis=1) for n in (90, 60))
        >>> difference, p = paired_bootstrap(labels, better, worse)
        >>> difference, p < 0.001
        (0.3, True)
    """
    right_a, right_b = ((x == labels).sum(0) for x in (a, b))  # [N]
    # In whole numbers, so that equals are equal; documents of the same gain are drawn as one kind.
    gains, counts = np.unique(right_a * len(b) - right_b * len(a), return_counts=True)
    n = len(labels)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, draws) @ gains  # [draws]
    tail = min(int(np.sum(drawn <= 0)), int(np.sum(drawn >= 0)))
    return float(gains @ counts / (n * len(a) * len(b))), min(1.0, 2 * (tail + 1) / (draws + 1))
