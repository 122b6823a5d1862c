"""The page of a comparison: metrics of the methods, significance tests, training curves and times.

Axes in shape comments: S seeds, N documents.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from elmo_jax.errors import InputError
from elmo_jax.storage.files import read_arrays
from elmo_jax.training.checkpoint import METRICS, RESULTS
from experiments.common import report
from experiments.common.report import Page
from experiments.compare.stages import Comparison, Stage
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
    """Compare two classifiers on the same documents with an exact McNemar test.

    If the classifiers are equally good, each is the correct one in half of the documents that exactly
    one of them classifies correctly (McNemar 1947).

    Args:
        labels: ``[N]`` true classes.
        a, b: ``[N]`` predicted classes.

    Returns:
        The number of documents that only a classifies correctly, the number that only b does, and the
        two-sided p-value.

    Examples:
        >>> labels = np.zeros(12, int)
        >>> mcnemar(labels, labels, np.repeat([1, 0], [6, 6]))
        (6, 0, 0.03125)
    """
    from scipy.stats import binomtest  # loads slowly

    only_a, only_b = (int(np.sum((x == labels) & (y != labels))) for x, y in ((a, b), (b, a)))
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return only_a, only_b, p


def paired_bootstrap(
    labels: np.ndarray, a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Compare the mean accuracies of two classifiers over seeds with a paired bootstrap.

    Documents are resampled with replacement, each with the predictions of all seeds (Efron and
    Tibshirani 1993). Seeds are not resampled.

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
    """A finished classifier.

    Attributes:
        path: Run folder.
        results: Contents of ``results.json``.
        records: One record an epoch.
        labels, predicted: ``[N]`` int32 classes of the test documents.
    """

    path: Path
    results: dict[str, Any]
    records: list[dict[str, Any]]
    labels: np.ndarray
    predicted: np.ndarray

    @property
    def accuracy(self) -> float:
        """The test accuracy."""
        return self.results["test"]["accuracy"]


def read_classifier(path: Path) -> Classifier:
    """Read a finished run of ``experiments.downstream``.

    Raises:
        InputError: If a file is missing or damaged.
    """
    arrays = _read(path / PREDICTIONS, lambda file: read_arrays(file, ["test_labels", "test"]))
    return Classifier(path, _read_results(path), read_records(path), *arrays)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of a run, one an epoch.

    Raises:
        InputError: If they are missing or not JSON.
    """
    return _read(
        path / METRICS, lambda file: [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    )


def _read_results(path: Path) -> dict[str, Any]:
    return _read(path / RESULTS, lambda file: json.loads(file.read_text("utf-8")))


def _read(file: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(file)
    except (OSError, ValueError) as error:
        hint = f"remove {file.with_name(RESULTS)} and run this command again"
        raise InputError(f"{file}: cannot be read ({error}); {hint}") from None


def write_page(
    comparison: Comparison, stages: Mapping[str, Sequence[Stage]], seconds: Mapping[str, float], about: str
) -> None:
    """Draw the figures and write ``report.md`` and ``report.html``.

    Args:
        comparison: Comparison whose stages are all finished.
        stages: Classifiers of each method, one a seed.
        seconds: Time by stage name, where it is known.
        about: First paragraph of the page.

    Raises:
        InputError: If a file of a run is missing or damaged, or runs have different test documents.
    """
    found = {method: [read_classifier(run.path) for run in runs] for method, runs in stages.items()}
    ranked = dict(sorted(found.items(), key=lambda item: -_mean_accuracy(item[1])))
    reported = REPORT if comparison.data.dataset == REPORT_DATASET else {}
    figures = comparison.output / "figures"
    figures.mkdir(exist_ok=True)
    page = Page("Comparison of ELMo with static word vectors", comparison.output / "report")
    page.add_text(about)
    add_summary(page, ranked, reported)
    add_metrics(page, ranked, reported)
    add_significance(page, ranked)
    _add_training(page, found, Path(comparison.language_model), figures)
    _add_confusions(page, ranked, figures)
    runs = [*comparison.sources.values(), *(run for runs in stages.values() for run in runs)]
    _add_times(page, runs, seconds)
    page.write()


Found = Mapping[str, Sequence[Classifier]]


def _mean_accuracy(runs: Sequence[Classifier]) -> float:
    return float(np.mean([run.accuracy for run in runs]))


def format_mean(values: Sequence[float] | np.ndarray, digits: int = 4, sign: str = "") -> str:
    """Format the mean, with the standard deviation if there are several values.

    Examples:
        >>> format_mean([0.5, 0.7]), format_mean([0.5]), format_mean([-0.00001], sign="+")
        ('0.6000 ±\\xa00.1414', '0.5000', '+0.0000')
    """
    mean = f"{np.mean(values):{sign}z.{digits}f}"
    # A no-break space keeps the sign and the deviation together in a narrow column.
    return (
        f"{mean} ±\N{NO-BREAK SPACE}{report.deviation(np.array(values)):.{digits}f}"
        if len(values) > 1
        else mean
    )


def add_summary(page: Page, ranked: Found, reported: Mapping[str, float]) -> None:
    """Add the ranking of the methods, compared with that of the report."""
    accuracies = {method: [run.accuracy for run in runs] for method, runs in ranked.items()}
    ranking = "; ".join(f"{method} {format_mean(values)}" for method, values in accuracies.items())
    page.add_text(f"Test accuracy, best first: {ranking}.")
    if reported:
        order = "; ".join(sorted(ranked, key=lambda method: -reported[method]))
        swapped = [
            f"{a} above {b}"
            for a, b in combinations(ranked, 2)
            if reported[a] < reported[b] and np.mean(accuracies[a]) > np.mean(accuracies[b])
        ]
        verdict = (
            f"Here the opposite holds for: {'; '.join(swapped)}." if swapped else "No pair is swapped here."
        )
        page.add_text(f"The original report ranks them on AG News as: {order}. {verdict}")
    seeds = len(next(iter(ranked.values())))
    page.add_text(
        f"Each method was trained with {seeds} random seeds; values are mean ± standard deviation."
        if seeds > 1
        else "Each method was trained with one random seed, so small differences may be chance; see the "
        "significance tests below."
    )


def add_metrics(page: Page, ranked: Found, reported: Mapping[str, float]) -> None:
    """Add a table of the metrics on each part of the data set."""
    rows = []
    for method, runs in ranked.items():
        for part in PARTS:
            cells = [
                format_mean([run.results[part][score] for run in runs])
                for score in ("accuracy", "f1", "precision", "recall")
            ]
            if reported:
                cells.insert(1, f"{reported[method]:.4f}" if part == "test" else "–")
            rows.append([method, part, *cells])
    column = ["original report (AG News)"] if reported else []
    page.add_heading("Metrics")
    page.add_table(["method", "part", "accuracy", *column, "F1", "precision", "recall"], rows)


def add_significance(page: Page, ranked: Found) -> None:
    """Add a test of the difference between each method and the next one in the ranking."""
    page.add_heading("Significance tests")
    _check_documents(ranked)
    seeds = len(next(iter(ranked.values())))
    rows = []
    for better, worse in pairwise(ranked):
        labels = ranked[better][0].labels
        a, b = (np.stack([run.predicted for run in ranked[method]]) for method in (better, worse))  # [S, N]
        if seeds > 1:
            difference, p = paired_bootstrap(labels, a, b)
            cells = [f"{difference:+.4f}"]
        else:
            only_a, only_b, p = mcnemar(labels, a[0], b[0])
            cells = [f"{only_a:,}", f"{only_b:,}"]
        result = f"{better} is better" if p < SIGNIFICANCE_LEVEL else "not significant"
        rows.append([f"{better} – {worse}", *cells, f"{p:.3g}", result])
    if seeds > 1:
        columns = ["difference of accuracy"]
        method = (
            f"a paired bootstrap: 10,000 resamples of the test documents, each document with the predictions "
            f"of all {seeds} seeds. p is twice the fraction of resamples in which the difference of the mean "
            "accuracies is zero or has the opposite sign. It does not include the variation between seeds."
        )
    else:
        columns = ["only first correct", "only second correct"]
        method = (
            "an exact McNemar test. The table shows how many test documents only one of the two methods "
            "classifies correctly; p is the probability of a split at least this uneven if both methods were "
            "equally good."
        )
    level = f"A difference with p below {SIGNIFICANCE_LEVEL} counts as significant."
    page.add_text(f"Each method is compared with the next one in the ranking by {method} {level}")
    page.add_table(["pair", *columns, "p", "result"], rows)


def _check_documents(ranked: Found) -> None:
    """Check that all classifiers have the same test documents."""
    first, *others = (run for runs in ranked.values() for run in runs)
    for run in others:
        if not np.array_equal(run.labels, first.labels):
            message = f"has other test documents than {first.path / PREDICTIONS}"
            raise InputError(
                f"{run.path / PREDICTIONS}: {message}; remove both runs and run this command again"
            )


def _add_training(page: Page, found: Found, language_model: Path, figures: Path) -> None:
    records = read_records(language_model)
    lines = {"perplexity_forward": "forward", "perplexity_backward": "backward", "perplexity": "mean"}
    report.plot_curves(records, lines, figures / "perplexity.png", "held-out perplexity", log=True)
    best = min(record["perplexity"] for record in records)
    caption = f"Pre-training: held-out perplexity with the full softmax; best mean {best:.1f}."
    plots = [(figures / "perplexity.png", "Perplexity by epoch", caption)]
    for method, runs in found.items():
        if "trainable" in method and runs[0].results["lambdas"]:
            report.plot_lambdas(runs[0].records, figures / "lambdas.png")
            last = ", ".join(f"{weight:.2f}" for weight in runs[0].records[-1]["lambdas"])
            caption = f"{method}{_name_seed(runs)}: weight of each layer; after the last epoch {last}."
            plots.append((figures / "lambdas.png", "Layer weights by epoch", caption))
    accuracies = {
        method: [{float(record["epoch"]): record["val_accuracy"] for record in run.records} for run in runs]
        for method, runs in found.items()
    }
    report.plot_bands(accuracies, figures / "validation.png", "epoch", "validation accuracy")
    band = ", mean and standard deviation over the seeds" if len(next(iter(found.values()))) > 1 else ""
    plots.append(
        (
            figures / "validation.png",
            "Validation accuracy by epoch",
            f"Classifiers: validation accuracy{band}.",
        )
    )
    page.add_heading("Training")
    page.add_figures(*plots)


def _name_seed(runs: Sequence[Classifier]) -> str:
    return ", seed 0" if len(runs) > 1 else ""


def _add_confusions(page: Page, ranked: Found, figures: Path) -> None:
    page.add_heading("Confusion matrices")
    classes = next(iter(ranked.values()))[0].results["classes"]
    if numbers := report.explain_numbers(classes, "class"):
        page.add_text(numbers)
    for part in reversed(PARTS):
        plots = []
        for i, (method, runs) in enumerate(ranked.items()):
            path, scores = figures / f"confusion_{i}_{part}.png", runs[0].results[part]
            title = f"{part}: accuracy {scores['accuracy']:.4f}"
            report.plot_confusion(scores["confusion_matrix"], classes, title, path)
            plots.append((path, "Confusion matrix", f"{method}{_name_seed(runs)}, {part} part"))
        page.add_figures(*plots)


def _add_times(page: Page, stages: Sequence[Stage], seconds: Mapping[str, float]) -> None:
    rows = []
    for stage in stages:
        results = _read_results(stage.path)
        total = f"{seconds[stage.name]:,.0f}" if stage.name in seconds else "–"
        rows.append([stage.name, f"{results['seconds']:,.0f}", f"{results['tokens_per_second']:,.0f}", total])
    page.add_heading("Time")
    page.add_text("The total time of a stage includes loading, compilation and evaluation.")
    page.add_table(["stage", "training (s)", "tokens/s", "total (s)"], rows)
