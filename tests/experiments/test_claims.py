"""What is said of the studies' figures, whichever way they fall."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from elmo_jax.data.csv_dataset import DataConfig
from experiments.compare import claims
from experiments.compare.claims import Occurrences, commonest, probe
from experiments.compare.stages import METHODS, CompareConfig, Comparison, Origins

SIZES = (4.0, 12.0, 40.0, 120.0, 400.0)  # labelled documents
NONE = [[0.1] * 5]


def curves(elmo, sgns, svd=NONE, sizes=SIZES):
    """By method and seed, accuracies by labelled documents."""
    every = {claims.ELMO: elmo, "SGNS": sgns, "SVD": svd * len(elmo) if svd is NONE else svd}
    return {m: [dict(zip(sizes, row, strict=False)) for row in rows] for m, rows in every.items()}


@pytest.mark.parametrize(
    ("elmo", "sgns", "said"),
    [
        ([0.5, 0.5, 0.9, 0.9, 0.9], [0.5, 0.7, 0.7, 0.7, 0.8], "It leads at 3 of 5 points. One seed"),
        ([0.9, 0.5, 0.5, 0.5, 0.5], [0.5, 0.7, 0.7, 0.7, 0.8], "It leads at 1 of 5 points. One seed"),
        ([0.9, 0.5, 0.5, 0.5, 0.9], [0.5, 0.7, 0.7, 0.7, 0.8],
         "It leads at 2 of 5 points. With the fewest labels its lead is larger than with all. One seed"),
        ([0.9] * 5, [0.85, 0.7, 0.7, 0.7, 0.6], "5 points. With the fewest labels its lead is smaller than"),
        ([0.9] * 5, [0.8, 0.7, 0.7, 0.7, 0.8], "5 points. With the fewest labels its lead is the same as w"),
        ([0.5001] * 5, [0.5] * 5, "+0.000 with 400. It leads at 0 of 5 points. One seed each"),
        ([0.5], [0.4], "+0.100 with 4. It leads at 1 of 1 points. One seed each"),
    ],
)  # fmt: skip
def test_the_lead_is_counted_wherever_it_is_measured(elmo, sgns, said):
    assert said in claims.efficiency_sentence(curves([elmo], [sgns]))


def test_the_lead_is_over_the_better_of_the_static_vectors_at_each_point():
    said = claims.efficiency_sentence(
        curves([[0.9] * 5], [[0.8, 0.8, 0.5, 0.5, 0.5]], [[0.5, 0.7, 0.7, 0.95, 0.6]])
    )
    assert ": +0.100 with 4, +0.100 with 12, +0.200 with 40, -0.050 with 120, +0.300 with 400." in said


def test_a_lead_is_larger_only_beyond_the_deviation_over_seeds():
    sgns = [[0.5] * 5] * 2
    clear = claims.efficiency_sentence(curves([[0.8, 0.6, 0.6, 0.6, 0.6], [0.82, 0.6, 0.6, 0.6, 0.6]], sgns))
    assert "its lead is larger than with all. Means of 2 seeds." in clear
    noisy = claims.efficiency_sentence(curves([[0.6, 0.6, 0.6, 0.6, 0.6], [0.9, 0.6, 0.6, 0.6, 0.6]], sgns))
    assert "its lead is not shown to differ from that with all, by the deviation over seeds. Means" in noisy
    assert "larger" not in noisy


def test_shares_are_those_of_the_documents_that_were_trained_on(tmp_path, monkeypatch):
    def run(documents, accuracy):
        return {"train": {"confusion_matrix": [[documents, 0], [0, 0]]}, "test": {"accuracy": accuracy}}

    monkeypatch.setattr(claims, "measure", lambda found: SimpleNamespace(results=found))
    drawn = []
    monkeypatch.setattr(claims.report, "plot_bands", lambda curves, *_, **__: drawn.append(curves))
    methods = (claims.ELMO, *claims.STATIC)
    shares = {0.01: [run(5, 0.3)], 0.03: [run(5, 0.4)], 0.1: [run(5, 0.5)], 0.3: [run(12, 0.6)]}
    made = claims.Studies({m: [run(40, 0.7)] for m in methods}, dict.fromkeys(methods, shares), [], [])
    said = claims._efficiency(made, tmp_path / "efficiency.png")
    assert drawn == [{m: [{5.0: 0.5, 12.0: 0.6, 40.0: 0.7}] for m in methods}]
    assert "Test accuracy with 5 labelled documents (12.5%): ELMo, trainable λ 0.500; SGNS 0.500;" in said
    assert "of 3 points" in said


@pytest.mark.parametrize(
    ("rows", "shares", "said"),
    [
        (20, [0.03, 0.1, 0.3], "1% of the labels are the same documents as 3% of them, and left out\n"),
        (2, [], "".join(f"{n}% of the labels are the same documents as 100% of them, and left out\n"
                        for n in (1, 3, 10, 30))),
        (2000, [0.01, 0.03, 0.1, 0.3], ""),
    ],
)  # fmt: skip
def test_shares_that_come_to_the_same_documents_are_trained_once(tmp_path, capsys, rows, shares, said):
    (tmp_path / "data").mkdir()
    for part, count in (("train", rows), ("test", 1)):
        texts = "".join(f"{c},{c} is {i}\n" for c in ("s", "b") for i in range(count))
        (tmp_path / "data" / f"{part}.csv").write_text(texts)
    config = CompareConfig(DataConfig(str(tmp_path / "data"), validation=0.5 if rows == 2 else 0.2))
    comparison = Comparison(config, config.data, tmp_path / "out", Origins())
    made = claims.studies(comparison, {method: [comparison.classifier(method, 0)] for method in METHODS})
    assert capsys.readouterr().out == said
    assert [list(of_method) for of_method in made.few.values()] == [shares] * 3
    digests = [Origins().texts(config.data, labels=share) for share in (*claims.SHARES, 1.0)]
    assert len(set(digests)) == len(shares) + 1


def test_the_sentence_of_convergence():
    leads = {claims.ELMO: (0.8, 0.9), "SGNS": (0.7, 0.88), "SVD": (0.6, 0.87)}
    learned = {name: [dict(zip((1.0, 100.0), values, strict=True))] for name, values in leads.items()}
    said = claims.convergence_sentence(learned)
    assert "ELMo, trainable λ 0.800; SGNS 0.700; SVD 0.600. " in said
    assert "SGNS is at its best, 0.880, after 100 updates; ELMo reaches that after 100" in said
    never = {**learned, "SVD": [{1.0: 0.6, 100.0: 0.99}]}
    assert "ELMo reaches that never" in claims.convergence_sentence(never)


@pytest.mark.parametrize(
    ("pretrained", "untrained", "said"),
    [
        ([0.9, 0.92], [0.8, 0.81], "gains by pre-training by more than the deviation over seeds: 0.9100 ±"),
        ([0.7, 0.8], [0.8, 0.9], "loses by pre-training by more than the deviation over seeds: 0.7500 ±"),
        (
            [0.8, 0.9],
            [0.8, 0.85],
            "is not shown to gain or to lose by pre-training, by the deviation over",
        ),
        (
            [0.8, 0.81],
            [0.85, 0.8],
            "is not shown to gain or to lose by pre-training, by the deviation over",
        ),
        ([0.8, 0.9], [0.8, 0.9], "neither gains nor loses by pre-training: 0.8500 ±"),
    ],
)
def test_what_pre_training_is_worth_is_said_beyond_the_deviation_alone(pretrained, untrained, said):
    sentence = claims.transfer_sentence(pretrained, untrained).replace("\N{NO-BREAK SPACE}", " ")
    assert said in sentence and sentence.endswith("). Means of 2 seeds.")


def test_a_difference_is_shown_with_its_deviation():
    said = claims.transfer_sentence([0.9, 0.92], [0.8, 0.81])
    assert "(+0.1050 ±\N{NO-BREAK SPACE}0.0071)" in said


def test_leads_within_the_deviation_over_seeds_are_none():
    elmo, sgns = [[0.6, 0.5, 0.5, 0.6, 0.62], [0.9, 0.7, 0.5, 0.7, 0.6]], [[0.5] * 5, [0.58] * 5]
    said = claims.efficiency_sentence(curves(elmo, sgns)).replace("\N{NO-BREAK SPACE}", " ")
    assert ": +0.210 ± 0.156 with 4, +0.060 ± 0.085 with 12, -0.040 ± 0.057 with 40, " in said
    assert "It leads at 2 of 5 points by more than the deviation over seeds. Means of 2 seeds." in said


def test_what_is_reached_within_the_deviation_alone_is_told_from_what_is_passed():
    def said(*elmo):
        static = [[0.6, 0.8], [0.6, 0.82]]
        learned = {claims.ELMO: elmo, "SGNS": static, "SVD": static}
        made = {m: [dict(zip((1.0, 100.0), row, strict=True)) for row in rows] for m, rows in learned.items()}
        return claims.convergence_sentence(made).replace("\N{NO-BREAK SPACE}", " ")

    assert "SVD is at its best, 0.810 ± 0.014, after 100 updates; ELMo reaches" in said(
        [0.7, 0.9], [0.7, 0.9]
    )
    told = "ELMo reaches that in the mean after 1, and by more than the deviation over seeds exceeds it"
    assert f"{told} after 100. " in said([0.78, 0.9], [0.88, 0.9])
    assert f"{told} never. " in said([0.78, 0.82], [0.88, 0.82])
    assert "reaches that never in the mean, but comes within the deviation over seeds. " in said(
        [0.7, 0.8], [0.8, 0.8]
    )
    assert "ELMo reaches that never. " in said([0.7, 0.7], [0.7, 0.72])


def test_sentences_about_pictures_of_dots():
    said = claims.transfer_sentence([0.9], [0.8])
    assert "gains by pre-training: 0.9000 with it, 0.8000" in said and "(+0.1000). One seed each" in said
    assert "neither gains nor loses by pre-training: " in claims.transfer_sentence([0.80001], [0.8])
    values = {"ELMo, token vectors": 0.5, "ELMo, LSTM layer 1": 0.75, "SVD": 0.9, "SGNS": 0.5}
    said = claims.context_sentence(values, 0.4, 20)
    assert "75.0% of the senses from the best of ELMo's layers (LSTM layer 1), and 90.0%" in said
    assert "static vectors (SVD)" in said and "gets 40.0%" in said


def test_context_is_told_from_vectors_that_know_it_and_only_from_those(rng):
    words = ["bank", "match"] * 60
    senses = [f"{w}/{rng.integers(2)}" for w in words]
    part = Occurrences([], [], words, senses)
    known = {s: rng.normal(size=8) for s in sorted(set(senses))}
    vectors = rng.normal(size=(120, 8)) * 0.1 + [known[s] for s in senses]
    static = rng.normal(size=(120, 8)) * 0 + [[w == "bank"] * 8 for w in words]
    assert probe(vectors[:60], senses[:60], vectors[60:], senses[60:]) > 0.95
    floor = commonest(
        replace(part, words=words[:60], senses=senses[:60]),
        replace(part, words=words[60:], senses=senses[60:]),
    )
    assert probe(static[:60], senses[:60], static[60:], senses[60:]) == pytest.approx(floor)
