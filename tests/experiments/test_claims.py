"""Sentences about the studies, whichever way their results turn out."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments.compare import claims
from experiments.compare.__main__ import CompareConfig
from experiments.compare.claims import most_frequent_sense_accuracy, probe_accuracy
from experiments.compare.stages import Comparison

SIZES = (4.0, 12.0, 40.0, 120.0, 400.0)  # labelled documents
LOW = [0.1] * 5
DEVIATION = "one standard deviation over the seeds"


def curves(elmo, sgns, svd=None, x=SIZES):
    """The points and the accuracies of each method and seed."""
    of_method = {claims.ELMO: elmo, "SGNS": sgns, "SVD": svd or [LOW] * len(elmo)}
    n = len(elmo[0])
    return x[:n], {method: np.array([row[:n] for row in rows]) for method, rows in of_method.items()}


def plain(sentence):
    return sentence.replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("elmo", "sgns", "expected"),
    [
        ([0.5, 0.5, 0.9, 0.9, 0.9], [0.5, 0.7, 0.7, 0.7, 0.8], "leads at 3 of 5 points. One seed"),
        ([0.9, 0.5, 0.5, 0.5, 0.5], [0.5, 0.7, 0.7, 0.7, 0.8], "leads at 1 of 5 points. One seed"),
        ([0.9, 0.5, 0.5, 0.5, 0.9], [0.5, 0.7, 0.7, 0.7, 0.8],
         "leads at 2 of 5 points. With the fewest labels its lead is larger than with all labels. One"),
        ([0.9] * 5, [0.85, 0.7, 0.7, 0.7, 0.6], "With the fewest labels its lead is smaller than with all"),
        ([0.9] * 5, [0.8, 0.7, 0.7, 0.7, 0.8], "With the fewest labels its lead is the same as with all"),
        ([0.5001] * 5, [0.5] * 5, "+0.000 with 400. ELMo leads at 0 of 5 points. One seed each"),
        ([0.5], [0.4], "+0.100 with 4. ELMo leads at 1 of 1 points. One seed each"),
    ],
)  # fmt: skip
def test_lead_is_counted_at_every_point(elmo, sgns, expected):
    assert expected in claims.describe_efficiency(*curves([elmo], [sgns]))


def test_lead_is_over_the_better_static_vectors_at_each_point():
    text = claims.describe_efficiency(
        *curves([[0.9] * 5], [[0.8, 0.8, 0.5, 0.5, 0.5]], [[0.5, 0.7, 0.7, 0.95, 0.6]])
    )
    assert ": +0.100 with 4, +0.100 with 12, +0.200 with 40, -0.050 with 120, +0.300 with 400." in text


def test_lead_counts_only_beyond_one_standard_deviation():
    elmo, sgns = [[0.6, 0.5, 0.5, 0.6, 0.62], [0.9, 0.7, 0.5, 0.7, 0.6]], [[0.5] * 5, [0.58] * 5]
    text = plain(claims.describe_efficiency(*curves(elmo, sgns)))
    assert ": +0.210 ± 0.156 with 4, +0.060 ± 0.085 with 12, -0.040 ± 0.057 with 40, " in text
    assert f"ELMo leads at 2 of 5 points by more than {DEVIATION}. " in text


@pytest.mark.parametrize(
    ("first", "expected"),
    [(0.82, "larger than with all labels"), (0.9, f"not clearly different from its lead with all labels "
                                                  f"(within {DEVIATION})")],
)  # fmt: skip
def test_larger_lead_with_few_labels_must_exceed_the_deviation(first, expected):
    elmo = [[0.8 if first == 0.82 else 0.6, *[0.6] * 4], [first, *[0.6] * 4]]
    text = claims.describe_efficiency(*curves(elmo, [[0.5] * 5] * 2))
    assert f"its lead is {expected}. Means of 2 seeds." in text


def test_efficiency_is_plotted_against_the_documents_trained_on(tmp_path, monkeypatch):
    def run(documents, accuracy):
        train = {"confusion_matrix": [[documents, 0], [0, 0]]}
        return SimpleNamespace(results={"train": train}, accuracy=accuracy)

    plotted = []
    monkeypatch.setattr(claims, "read_classifiers", lambda runs: runs)
    monkeypatch.setattr(claims.report, "plot_bands", lambda *args, **_: plotted.append(args[:2]))
    methods = (claims.ELMO, *claims.STATIC)
    few = {0.01: [run(5, 0.3)], 0.03: [run(5, 0.5)], 0.3: [run(12, 0.6)]}
    full = {m: [run(40, 0.7)] for m in methods}
    studies = SimpleNamespace(full=full, few_labels=dict.fromkeys(methods, few))
    text = claims.study_efficiency(studies, tmp_path / "efficiency.png")
    ((x, values),) = plotted
    assert x == [5, 12, 40] and [y.tolist() for y in values.values()] == [[[0.5, 0.6, 0.7]]] * 3
    assert "Test accuracy with 5 labelled documents (12.5%): ELMo, trainable λ 0.500; SGNS 0.500;" in text
    assert "of 3 points" in text


def test_studies_share_no_stage(tmp_path):
    config = CompareConfig(output=str(tmp_path / "out"), seeds=2)
    names = [stage.name for stage in claims.Studies(Comparison(config)).stages]
    assert names[:3] == ["context pretrain", "context svd", "context sgns"]
    assert len(names) == len(set(names)) == 3 + 2 + (1 + 5 * 2) * len(claims.LABEL_FRACTIONS)


def test_convergence_is_when_elmo_reaches_the_best_of_the_static_vectors():
    x = (1.0, 100.0)
    text = claims.describe_convergence(*curves([[0.8, 0.9]], [[0.7, 0.88]], [[0.6, 0.99]], x))
    assert "first measured point: ELMo, trainable λ 0.800; SGNS 0.700; SVD 0.600. " in text
    assert "SGNS is best after 100 updates (0.880); ELMo reaches this after 100 updates. " in text
    assert "SVD is best after 100 updates (0.990); ELMo never reaches this. One seed" in text
    text = plain(claims.describe_convergence(*curves([[0.7, 0.9], [0.9, 0.9]], [[0.7, 0.9]] * 2, x=x)))
    assert "SGNS is best after 100 updates (0.900 ± 0.000); ELMo reaches this after 100 updates. " in text


@pytest.mark.parametrize(
    ("pretrained", "untrained", "expected"),
    [
        ([0.9, 0.92], [0.8, 0.81], f"gains from pre-training by more than {DEVIATION}: 0.9100 ±"),
        ([0.7, 0.8], [0.8, 0.9], f"loses from pre-training by more than {DEVIATION}: 0.7500 ±"),
        ([0.8, 0.9], [0.8, 0.85], "neither clearly gains nor clearly loses from pre-training (the diff"),
        ([0.8, 0.81], [0.85, 0.8], "neither clearly gains nor clearly loses from pre-training (the diff"),
        ([0.8, 0.9], [0.8, 0.9], "neither gains nor loses from pre-training: 0.8500 ±"),
        ([0.9], [0.8], "gains from pre-training: 0.9000 on the pre-trained language model, 0.8000 on"),
        ([0.80001], [0.8], "neither gains nor loses from pre-training: "),
    ],
)
def test_gain_from_pretraining(pretrained, untrained, expected):
    text = plain(claims.describe_transfer(pretrained, untrained))
    seeds = "Means of 2 seeds." if len(pretrained) > 1 else "One seed each, so"
    assert expected in text and f"). {seeds}" in text


def test_difference_has_a_deviation():
    text = plain(claims.describe_transfer([0.9, 0.92], [0.8, 0.81]))
    assert "(difference +0.1050 ± 0.0071)" in text


def test_sentence_about_senses_names_the_better_vectors():
    values = {"ELMo, token vectors": 0.5, "ELMo, LSTM layer 1": 0.75, "SVD": 0.9, "SGNS": 0.5}
    text = claims.describe_context(values, 0.4, 20)
    assert "75.0% of the senses from the best layer of ELMo (LSTM layer 1) and 90.0%" in text
    assert "static vectors (SVD)" in text and "gets 40.0%" in text


def test_probe_finds_senses_only_in_vectors_that_depend_on_them(rng):
    words = ["bank", "match"] * 60
    senses = [f"{w}/{rng.integers(2)}" for w in words]
    of_sense = {s: rng.normal(size=8) for s in sorted(set(senses))}
    contextual = rng.normal(size=(120, 8)) * 0.1 + [of_sense[s] for s in senses]
    static = rng.normal(size=(120, 8)) * 0 + [[w == "bank"] * 8 for w in words]
    assert probe_accuracy(contextual[:60], senses[:60], contextual[60:], senses[60:]) > 0.95
    baseline = most_frequent_sense_accuracy(words[:60], senses[:60], words[60:], senses[60:])
    accuracy = probe_accuracy(static[:60], senses[:60], static[60:], senses[60:])
    assert accuracy == pytest.approx(baseline)
