"""Statistics and sentences of the comparison's page, on given results."""

from pathlib import Path

import numpy as np
import pytest

from experiments.compare import results
from experiments.compare.results import Classifier, paired_bootstrap


class RecordedPage(results.Page):
    """A page that keeps its paragraphs and tables as they were added."""

    def __init__(self):
        super().__init__("title", Path("page"))
        self.texts, self.tables = [], []

    def add_text(self, text):
        self.texts.append(text)

    def add_table(self, head, rows):
        self.tables.append((head, rows))


@pytest.fixture
def page():
    return RecordedPage()


def run(accuracy=0.5, predicted=None):
    """A classifier of this accuracy, with these predictions of documents of class 0."""
    scores = dict.fromkeys(("f1", "precision", "recall"), 0.5) | {"accuracy": accuracy}
    predicted = np.zeros(1, np.int32) if predicted is None else predicted
    return Classifier(
        Path("run"), dict.fromkeys(results.PARTS, scores), [], np.zeros_like(predicted), predicted
    )


def compare_counts(page, first, second):
    """Test methods a and b, given each seed's number of correct documents among the first of 100."""
    ranked = {
        name: [run(predicted=(np.arange(100) >= correct).astype(np.int32)) for correct in counts]
        for name, counts in (("a", first), ("b", second))
    }
    results.add_significance(page, ranked)
    head, (row,) = page.tables[-1]
    return head, row


def test_equal_accuracies_are_not_swapped(page):
    results.add_summary(page, {"SVD": [run(0.5)], "SGNS": [run(0.5)]}, results.REPORT)
    order = "The original report ranks them on AG News as: SGNS; SVD."
    assert f"{order} No pair is swapped here." in page.texts
    results.add_summary(page, {"SVD": [run(0.6)], "SGNS": [run(0.5)]}, results.REPORT)
    assert f"{order} Here the opposite holds for: SVD above SGNS." in page.texts


def test_method_names_with_commas_are_separated_by_semicolons(page):
    names = ("ELMo, learned function", "ELMo, trainable λ")
    results.add_summary(page, {name: [run()] for name in names}, results.REPORT)
    ranking = "Test accuracy, best first: ELMo, learned function 0.5000; ELMo, trainable λ 0.5000."
    assert page.texts[0] == ranking
    assert "as: ELMo, learned function; ELMo, trainable λ. " in page.texts[1]


@pytest.mark.parametrize("reported", [results.REPORT, {}])
def test_accuracies_of_the_report_are_shown_for_its_data_set_only(page, reported):
    results.add_metrics(page, {"SVD": [run()]}, reported)
    results.add_summary(page, {"SVD": [run()]}, reported)
    head, rows = page.tables[0]
    assert ("original report (AG News)" in head) == ("0.8595" in rows[-1]) == bool(reported)
    assert any("report" in text for text in page.texts) == bool(reported)
    assert {len(row) for row in rows} == {len(head)}


def test_several_seeds_are_compared_by_their_mean(page):
    head, row = compare_counts(page, (80, 80, 80), (90, 50, 50))  # in seed 0 alone, b is better
    assert head == ["pair", "difference of accuracy", "p", "result"]
    assert row[1] == "+0.1667" and row[3] == "a is better" and "bootstrap" in page.texts[-1]
    assert compare_counts(page, (80, 80), (90, 70))[1][1:] == ["+0.0000", "1", "not significant"]


def test_one_seed_is_compared_by_mcnemar(page):
    assert compare_counts(page, (80,), (74,))[1] == ["a – b", "6", "0", "0.0312", "a is better"]
    assert compare_counts(page, (80,), (76,))[1][3:] == ["0.125", "not significant"]
    assert "McNemar" in page.texts[-1]


@pytest.mark.parametrize(("better", "correlation"), [(0.5, 0.0), (0.56, 0.3), (0.6, 0.7), (0.75, 0.3)])
def test_bootstrap_equals_resampling_document_by_document(rng, better, correlation):
    labels = rng.integers(0, 3, 200)
    difficulty = correlation * rng.random(200)  # shared by all runs
    a, b = (
        np.where(difficulty + (1 - correlation) * rng.random((3, 200)) < correct, labels, (labels + 1) % 3)
        for correct in (better, 0.5)
    )
    difference, p = paired_bootstrap(labels, a, b)
    gain = (a == labels).mean(0) - (b == labels).mean(0)
    assert difference == pytest.approx((a == labels).mean() - (b == labels).mean())
    resampled = gain[rng.integers(0, 200, (4000, 200))].mean(1)
    expected = min(1, 2 * min((resampled <= 1e-12).mean(), (resampled >= -1e-12).mean()))
    assert p == pytest.approx(expected, abs=0.04)
    assert paired_bootstrap(labels, b, a) == (-difference, pytest.approx(p, abs=0.03))
    assert paired_bootstrap(labels, a, a[[2, 0, 1, 0, 1, 2]]) == (0, 1)
