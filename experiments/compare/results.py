"""The page of a comparison: metrics of the methods, significance tests, training curves and times.

Axes in shape comments: S seeds, N documents, X epochs.
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elmo_jax.errors import InputError
from elmo_jax.storage.files import read_arrays, read_config
from elmo_jax.training.checkpoint import METRICS, RESULTS, VOCABULARY
from experiments.common import report
from experiments.common.report import Page
from experiments.compare.stages import ELMO, Comparison, Stage
from experiments.downstream import PARTS, PREDICTIONS

REPORT_DATASET = "ag_news"
REPORT = {  # test accuracies of the original report
    "ELMo, learned function": 0.9045,
    "ELMo, trainable λ": 0.8892,
    "SGNS": 0.8892,
    "ELMo, frozen λ": 0.8833,
    "SVD": 0.8595,
}
SIGNIFICANCE_LEVEL = 0.05


def mcnemar(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """Compare two classifiers on the same documents with an exact McNemar test (McNemar 1947).

    Args:
        labels, a, b: ``[N]`` true classes, and those that each classifier predicts.

    Returns:
        The number of documents that only a classifies correctly, the number that only b does, and the
        two-sided p-value.

    Examples:
        >>> labels = np.zeros(12, int)
        >>> mcnemar(labels, labels, np.repeat([1, 0], [6, 6]))
        (6, 0, 0.03125)
    """
    from scipy.stats import binomtest  # imported here, because it loads slowly

    only_a, only_b = (int(np.sum((x == labels) & (y != labels))) for x, y in ((a, b), (b, a)))
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return only_a, only_b, p


def paired_bootstrap(
    labels: np.ndarray, a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Compare mean accuracies over seeds with a paired bootstrap (Efron and Tibshirani 1993).

    Documents are resampled with replacement, each with the predictions of all seeds.

    Args:
        labels: ``[N]`` true classes.
        a, b: ``[S, N]`` predicted classes; S may differ between a and b.
        resamples: Number of resamples.
        seed: Random seed of the resamples.

    Returns:
        The mean accuracy of a minus that of b, and the two-sided p-value: twice the fraction of
        resamples in which the difference is zero or has the opposite sign.

    Examples:
        >>> labels = np.zeros(100, int)
        >>> better, worse = (np.repeat([[0, 1]], [n, 100 - n], axis=1) for n in (90, 60))
        >>> difference, p = paired_bootstrap(labels, better, worse)
        >>> difference, p < 0.001
        (0.3, True)
    """
    correct_a, correct_b = ((x == labels).sum(0) for x in (a, b))  # [N]
    # Integers make equal gains exactly equal, so that documents of equal gain can be sampled together.
    gains, counts = np.unique(correct_a * len(b) - correct_b * len(a), return_counts=True)
    n = len(labels)
    sums = np.random.default_rng(seed).multinomial(n, counts / n, resamples) @ gains  # [resamples]
    tail = min(int(np.sum(sums <= 0)), int(np.sum(sums >= 0)))
    return float(gains @ counts / (n * len(a) * len(b))), min(1.0, 2 * (tail + 1) / (resamples + 1))


class Classifier(NamedTuple):
    """A finished classifier."""

    path: Path
    results: dict[str, Any]
    records: list[dict[str, Any]]  # one record per epoch
    labels: np.ndarray  # [N], true classes of the test documents
    predicted: np.ndarray  # [N]

    @property
    def accuracy(self) -> float:
        """The test accuracy."""
        return self.results["test"]["accuracy"]

    @property
    def is_constant(self) -> bool:
        """True if all test documents get one class, though they are of several."""
        return len(np.unique(self.labels)) > 1 == len(np.unique(self.predicted))


Runs = Mapping[str, Sequence[Classifier]]  # by method, one classifier per seed


def read_classifiers(stages: Mapping[Any, Sequence[Stage]]) -> dict[Any, list[Classifier]]:
    """Read finished runs of ``experiments.downstream``; a missing or damaged file is an InputError."""
    return {name: [_read_classifier(run.path) for run in runs] for name, runs in stages.items()}


def _read_classifier(path: Path) -> Classifier:
    results = _read(path / RESULTS)
    records = _read(path / METRICS) if "seconds" in results else []  # without a network there are no epochs
    return Classifier(path, results, records, *_read(path / PREDICTIONS))


def _read(file: Path) -> Any:
    """Return the contents of a JSON file, the records of a JSON Lines file or the arrays of the test part."""
    try:
        if file.suffix == ".npz":
            return read_arrays(file, ["test_labels", "test"])
        text = file.read_text("utf-8")
        return (
            [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
        )
    except (OSError, ValueError) as error:
        hint = f"remove {file.with_name(RESULTS)} and run this command again"
        raise InputError(f"{file}: cannot be read ({error}); {hint}") from None


def write_page(comparison: Comparison, seconds: Mapping[str, float], about: str) -> None:
    """Write ``report.md`` and ``report.html``, given the times of stages and a first paragraph."""
    runs = read_classifiers(comparison.classifiers)
    ranked = dict(sorted(runs.items(), key=lambda item: -np.mean([run.accuracy for run in item[1]])))
    reported = REPORT if comparison.data.dataset == REPORT_DATASET else {}
    page = Page("Comparison of ELMo with static word vectors", comparison.output / "report")
    page.add_text(about)
    _add_sizes(page, ranked, Path(comparison.language_model))
    add_summary(page, ranked, reported)
    _add_chart(page, ranked)
    add_metrics(page, ranked, reported)
    add_significance(page, ranked)
    _add_training(page, runs, Path(comparison.language_model))
    _add_confusions(page, ranked)
    _add_times(page, comparison.stages, seconds)
    page.write()


def format_mean(values: Sequence[float] | np.ndarray, digits: int = 4, sign: str = "") -> str:
    """Format the mean, with the standard deviation if there are several values.

    Examples:
        >>> format_mean([0.5, 0.7]), format_mean([0.5]), format_mean([-0.00001], sign="+")
        ('0.6000 ±\\xa00.1414', '0.5000', '+0.0000')
    """
    mean = f"{np.mean(values):{sign}z.{digits}f}"
    # A no-break space keeps the sign and the deviation together in a narrow column.
    deviation = f" ±\xa0{report.deviation(np.array(values)):.{digits}f}"
    return mean + deviation * (len(values) > 1)


def _add_sizes(page: Page, runs: Runs, language_model: Path) -> None:
    """Add the numbers of documents, classes and words, and the size of the language model."""
    results = next(iter(runs.values()))[0].results
    counts = [int(np.sum(results[part]["confusion_matrix"])) for part in PARTS]
    sizes = " / ".join(f"{count:,}" for count in counts)
    model = read_config(language_model)["model"]
    words = (language_model / VOCABULARY).read_text("utf-8").count("\n")
    parts, classes = " / ".join(PARTS), len(results["classes"])
    page.add_text(
        f"Data: {sizes} documents ({parts}) in {classes} classes. Language model: {model['layers']} "
        f"bidirectional LSTM layers of {model['cells']} cells, vectors of width {model['embedding']}, a "
        f"vocabulary of {words:,} tokens."
    )


def _add_chart(page: Page, ranked: Runs) -> None:
    path = page.path.parent / "figures" / "accuracy.png"
    report.plot_bars(
        {name: [run.accuracy for run in runs] for name, runs in ranked.items()}, path, "accuracy"
    )
    page.add_figures((path, "Bar chart of the test accuracy of each method", "Test accuracy of each method."))


def add_summary(page: Page, ranked: Runs, reported: Mapping[str, float]) -> None:
    """Add the ranking of the methods, compared with that of the report."""
    accuracies = {method: [run.accuracy for run in runs] for method, runs in ranked.items()}
    ranking = "; ".join(f"{method} {format_mean(values)}" for method, values in accuracies.items())
    page.add_text(f"Test accuracy, best first: {ranking}.")
    for method, runs in ranked.items():
        if any(run.is_constant for run in runs):
            problem = "gives all test documents one class, so its figures are chance and say nothing of it"
            page.add_text(f"Warning: {method} {problem}.")
    if reported:
        known = [method for method in ranked if method in reported]
        order = "; ".join(sorted(known, key=lambda method: -reported[method]))
        swapped = "; ".join(
            f"{a} above {b}"
            for a, b in itertools.combinations(known, 2)
            if reported[a] < reported[b] and np.mean(accuracies[a]) > np.mean(accuracies[b])
        )
        verdict = f"Here the opposite holds for: {swapped}." if swapped else "No pair is swapped here."
        page.add_text(f"The original report ranks them on AG News as: {order}. {verdict}")
    seeds = _count_seeds(ranked)
    page.add_text(
        f"Each method was trained with {seeds} random seeds; values are mean ± standard deviation."
        if seeds > 1
        else "Each method was trained with one random seed, so small differences may be chance; see the "
        "significance tests below."
    )


def _count_seeds(runs: Runs) -> int:
    return len(next(iter(runs.values())))


def add_metrics(page: Page, ranked: Runs, reported: Mapping[str, float]) -> None:
    """Add a table of the metrics on each part of the data set."""
    scores = ("accuracy", "f1", "precision", "recall")
    rows = []
    for (method, runs), part in itertools.product(ranked.items(), PARTS):
        cells = [format_mean([run.results[part][score] for run in runs]) for score in scores]
        if reported:
            is_reported = part == "test" and method in reported
            cells.insert(1, f"{reported[method]:.4f}" if is_reported else "–")
        rows.append([method, part, *cells])
    column = ["original report (AG News)"] if reported else []
    page.add_heading("Metrics")
    page.add_table(["method", "part", "accuracy", *column, "F1", "precision", "recall"], rows)


def add_significance(page: Page, ranked: Runs) -> None:
    """Add a test of the difference between each method and the next one in the ranking."""
    seeds = _count_seeds(ranked)
    if seeds > 1:
        columns = ["difference of accuracy"]
        test = (
            f"a paired bootstrap: 10,000 resamples of the test documents, each document with the predictions "
            f"of all {seeds} seeds. p is twice the fraction of resamples in which the difference of the mean "
            "accuracies is zero or has the opposite sign. It does not include the variation between seeds."
        )
    else:
        columns = ["only first correct", "only second correct"]
        test = (
            "an exact McNemar test. The table shows how many test documents only one of the two methods "
            "classifies correctly; p is the probability of a split at least this uneven if both methods were "
            "equally good."
        )
    rows = []
    for better, worse in itertools.pairwise(ranked):
        labels = ranked[better][0].labels  # all runs have the same test documents
        a, b = (np.stack([run.predicted for run in ranked[method]]) for method in (better, worse))  # [S, N]
        *cells, p = paired_bootstrap(labels, a, b) if seeds > 1 else mcnemar(labels, a[0], b[0])
        result = f"{better} is better" if p < SIGNIFICANCE_LEVEL else "not significant"
        constant = [name for name in (better, worse) if any(run.is_constant for run in ranked[name])]
        if constant:
            result = f"no comparison: {constant[0]} gives one class"
        numbers = [f"{cell:,}" if isinstance(cell, int) else f"{cell:+.4f}" for cell in cells]
        rows.append([f"{better} – {worse}", *numbers, f"{p:.3g}", result])
    level = f"A difference with p below {SIGNIFICANCE_LEVEL} counts as significant."
    page.add_heading("Significance tests")
    page.add_text(f"Each method is compared with the next one in the ranking by {test} {level}")
    page.add_table(["pair", *columns, "p", "result"], rows)


def training_curves(
    runs: Runs, x: str, figure: str = "val_accuracy"
) -> tuple[list[float], dict[str, np.ndarray]]:
    """Return the "epoch" or "step" of each record and a figure ``[S, X]`` of each method that has epochs."""
    networks = {method: each for method, each in runs.items() if each[0].records}
    first = next(iter(networks.values()))[0]
    values = {
        method: np.array([[record[figure] for record in run.records] for run in of_method])
        for method, of_method in networks.items()
    }
    return [float(record[x]) for record in first.records], values


def _add_training(page: Page, runs: Runs, language_model: Path) -> None:
    """Add the plots of pre-training and of the layer weights, and the curves of all classifiers."""
    curves = {"loss": "training loss", "val_loss": "validation loss", "val_accuracy": "validation accuracy"}
    folder = page.path.parent / "figures"
    for name, label in curves.items():
        unit = " (nats)" if "loss" in name else ""
        path = folder / f"{name}.png"
        report.plot_bands(*training_curves(runs, "epoch", name), path, "epoch", label + unit)
    elmo, is_mean = runs[ELMO][0], _count_seeds(runs) > 1
    perplexity = min(record["perplexity"] for record in _read(language_model / METRICS))
    pretraining = f"Pre-training: held-out perplexity with the full softmax; best mean {perplexity:.1f}."
    last = ", ".join(f"{weight:.2f}" for weight in elmo.records[-1]["lambdas"])
    weights = f"{ELMO}{', seed 0' * is_mean}: weight of each layer; after the last epoch {last}."
    band = ", mean and standard deviation over the seeds" * is_mean
    page.add_heading("Training")
    page.add_figures(
        (language_model / "perplexity.png", "Perplexity by epoch", pretraining),
        (elmo.path / "lambdas.png", "Layer weights by epoch", weights),
    )
    alt = "{} of each method by epoch"
    figures = [
        (folder / f"{name}.png", alt.format(label.capitalize()), f"Classifiers: {label}{band}.")
        for name, label in curves.items()
    ]
    page.add_figures(*figures)


def _add_confusions(page: Page, ranked: Runs) -> None:
    page.add_heading("Confusion matrices")
    if numbers := report.explain_numbers(next(iter(ranked.values()))[0].results["classes"], "class"):
        page.add_text(numbers)
    seed = ", seed 0" * (_count_seeds(ranked) > 1)
    for part in reversed(PARTS):
        plots = {method: runs[0].path / f"confusion_{part}.png" for method, runs in ranked.items()}
        page.add_figures(
            *(
                (path, f"Confusion matrix of {method}, {part}", f"{method}{seed}, {part} part")
                for method, path in plots.items()
            )
        )


def _add_times(page: Page, stages: Sequence[Stage], seconds: Mapping[str, float]) -> None:
    rows = []
    for stage in stages:
        results = _read(stage.path / RESULTS)
        total = f"{seconds[stage.name]:,.0f}" if stage.name in seconds else "–"
        cells = [
            f"{results[name]:,.0f}" if name in results else "–" for name in ("seconds", "tokens_per_second")
        ]
        rows.append([stage.name, *cells, total])
    page.add_heading("Time")
    page.add_text("The total time of a stage includes loading, compilation and evaluation.")
    page.add_table(["stage", "training (s)", "tokens/s", "total (s)"], rows)
