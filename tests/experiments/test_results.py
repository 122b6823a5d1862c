"""What the comparison's page says of figures that are given."""

import numpy as np
import pytest

from experiments.compare import results
from experiments.compare.results import Classifier

SCORE = dict.fromkeys(("f1", "precision", "recall"), 0.5)


@pytest.fixture
def page(monkeypatch):
    """A page that keeps its text and its tables as they were given."""
    made = results.Page("x", results.Path("x"))
    made.said, made.tables = [], []
    monkeypatch.setattr(made, "add_text", made.said.append)
    monkeypatch.setattr(made, "add_table", lambda head, rows: made.tables.append((head, rows)))
    return made


def scores(accuracy):
    return [{part: {"accuracy": accuracy, **SCORE} for part in results.PARTS}]


def differences(page, first, second):
    """The table's head and row, of which of 100 documents each seed of two methods has right."""
    labels = np.zeros(100, np.int32)
    found = {
        name: [Classifier({}, [], labels, (np.arange(100) >= n).astype(np.int32)) for n in rights]
        for name, rights in (("a", first), ("b", second))
    }
    results._difference(page, {name: [results.Path(name)] * len(runs) for name, runs in found.items()}, found)
    head, (row,) = page.tables[-1]
    return head, row


def test_equal_methods_do_not_stand_the_other_way_round(page):
    order = ["SVD", "SGNS"]  # the report has them the other way round
    results._summary(page, {"SVD": scores(0.5), "SGNS": scores(0.5)}, order, results.REPORT)
    assert "The report's order, on AG News, is: SGNS; SVD. No two stand against it." in page.said
    results._summary(page, {"SVD": scores(0.6), "SGNS": scores(0.5)}, order, results.REPORT)
    assert any(text.endswith("other way round here: SVD above SGNS.") for text in page.said)


def test_methods_whose_names_hold_commas_are_told_apart(page):
    order = ["ELMo, learned function", "ELMo, trainable λ"]
    results._summary(page, {method: scores(0.5) for method in order}, order, results.REPORT)
    assert (
        page.said[0] == "Test accuracy, best first: ELMo, learned function 0.5000; ELMo, trainable λ 0.5000."
    )
    assert "AG News, is: ELMo, learned function; ELMo, trainable λ." in page.said[1]


def test_the_reports_figures_are_of_one_data_set(page):
    known, other = (results._table({"SVD": scores(0.5)}, ["SVD"], told) for told in (results.REPORT, {}))
    assert known[0][3] == "the report's (AG News)" and known[1][-1][3] == "0.8595"
    assert len(other[0]) == len(other[1][0]) == len(known[0]) - 1
    results._summary(page, {"SVD": scores(0.5)}, ["SVD"], {})
    assert not any("report" in text for text in page.said)


def test_the_better_of_many_seeds_is_never_said_to_be_the_worse(page):
    head, row = differences(page, (80, 80, 80), (90, 50, 50))  # the first seed alone has it the other way
    assert head == ["pair", "first above second", "p", "differ"]
    assert row[1] == "+0.1667" and row[3] == "a is better" and "bootstrap" in page.said[-1]
    assert differences(page, (80, 80), (90, 70))[1][1:] == ["+0.0000", "1", "not shown"]


def test_the_one_seed_has_an_exact_test(page):
    assert differences(page, (80,), (74,))[1] == ["a – b", "6", "0", "0.0312", "a is better"]
    assert differences(page, (80,), (76,))[1][3:] == ["0.125", "not shown"]
    assert "McNemar" in page.said[-1]


def test_a_probability_stands_on_its_own_side_of_the_threshold():
    for p in (0.0498, 0.04996, 0.05 - 1e-9, 0.05, 0.0502, 1.0, 1e-5):
        assert (float(results.shown(p)) < results.LEVEL) == (p < results.LEVEL)
    assert results.shown(0.0498) == "0.0498"
