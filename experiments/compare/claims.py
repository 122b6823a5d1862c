"""What is said of ELMo, measured: few labels, fast learning, senses in context, worth of pre-training.

Nouns: a *study* is the runs behind one picture and the sentence under it, which says what
the figures show, whichever way they fall.
Axes: S seeds, X points of a curve.

Words of several senses where they stand, and how well vectors tell the senses apart.

Axes: N occurrences, L layers, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.data.csv_dataset import DataConfig
from elmo_jax.data.sample_corpus import Text, sample_corpus
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.training.checkpoint import METRICS
from experiments.common import cli, report
from experiments.common.inputs import VECTORS
from experiments.common.report import Page
from experiments.compare.results import measure, spread
from experiments.compare.stages import Comparison, Stage


@dataclass(frozen=True)
class Occurrences:
    """Where words of several senses stand in texts.

    Attributes:
        texts: tokens of each text.
        places: N pairs of a text's number and a token's.
        words, senses: of each.
    """

    texts: list[list[str]]
    places: list[tuple[int, int]]
    words: list[str]
    senses: list[str]

    @classmethod
    def of(cls, corpus: Sequence[Text]) -> Occurrences:
        """Those of the embedded corpus."""
        texts = [text.text.split() for text in corpus]
        found = [(i, at, sense) for i, text in enumerate(corpus) for at, sense in text.senses]
        words = [texts[i][at] for i, at, _ in found]
        return cls(texts, [(i, at) for i, at, _ in found], words, [sense for *_, sense in found])

    def layers(self, elmo: Elmo) -> np.ndarray:
        """The layer states of each occurrence in its text, ``[L, N, F]``."""
        states = elmo.embed(self.texts)
        return np.stack([states[i][:, at] for i, at in self.places], axis=1)


def probe(train: np.ndarray, senses: Sequence[str], test: np.ndarray, truth: Sequence[str]) -> float:
    """Accuracy of one logistic regression from vectors ``[N, F]`` to senses, on other vectors."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(model.fit(train, senses).score(test, truth))


def commonest(train: Occurrences, test: Occurrences) -> float:
    """Accuracy of guessing the sense that a word has most often in `train`."""
    counts: dict[str, dict[str, int]] = {}
    for word, sense in zip(train.words, train.senses, strict=True):
        of_word = counts.setdefault(word, {})
        of_word[sense] = of_word.get(sense, 0) + 1
    guess = {word: max(of_word, key=lambda sense: of_word[sense]) for word, of_word in counts.items()}
    hits = [guess.get(word) == sense for word, sense in zip(test.words, test.senses, strict=True)]
    return float(np.mean(hits))


ELMO, STATIC = "ELMo, trainable λ", ("SGNS", "SVD")
SHARES = (0.01, 0.03, 0.1, 0.3)  # of the labels, beside all of them


@dataclass(frozen=True)
class Studies:
    """The runs of every study.

    Attributes:
        full: the comparison's own classifiers, by method.
        few: by method and share of the labels.
        untrained: ELMo's classifier on a language model of random parameters.
        context: pre-training, SVD and SGNS on the embedded corpus.
    """

    full: Mapping[str, Sequence[Stage]]
    few: Mapping[str, Mapping[float, Sequence[Stage]]]
    untrained: Sequence[Stage]
    context: Sequence[Stage]


def studies(comparison: Comparison, full: Mapping[str, Sequence[Stage]]) -> Studies:
    """Which runs the claims need, beside the comparison's own."""

    def few(method: str, share: float) -> list[Stage]:
        base = full[method][0].settings.epochs
        epochs = round(base / share**0.5)  # an epoch of few documents is few steps
        return [
            comparison.classifier(method, seed, labels=share, epochs=epochs)
            for seed in range(len(full[method]))
        ]

    shares = distinct_shares(comparison)
    by_share = {method: {share: few(method, share) for share in shares} for method in (ELMO, *STATIC)}
    untrained = [comparison.classifier(ELMO, seed, untrained=True) for seed in range(len(full[ELMO]))]
    context = Comparison(
        comparison.config, DataConfig(), comparison.output / "context", comparison.origins
    ).sources()
    renamed = [replace(s, name=f"context {s.name}", kind=f"context {s.kind}") for s in context]
    return Studies(full, by_share, untrained, renamed)


def distinct_shares(comparison: Comparison) -> list[float]:
    """Those of `SHARES` that come to other documents than the next one; of a small corpus, fewer.

    Each is of the documents of any larger one, and of no others, so seed 0 speaks for all.
    """
    documents = {share: comparison.origins.texts(comparison.data, labels=share) for share in (*SHARES, 1.0)}
    last = {digest: share for share, digest in documents.items()}  # the largest of as many documents
    for share in SHARES:
        if (same := last[documents[share]]) != share:
            cli.say(f"{share:.0%} of the labels are the same documents as {same:.0%} of them, and left out")
    return [share for share in SHARES if last[documents[share]] == share]


def stages(made: Studies) -> list[Stage]:
    """All runs that are not the comparison's own."""
    few = [run for by_share in made.few.values() for runs in by_share.values() for run in runs]
    return [*made.context, *made.untrained, *few]


def write(made: Studies, output: Path) -> None:
    """Draw the pictures and write ``claims.md`` and ``claims.html``."""
    figures = output / "figures"
    figures.mkdir(exist_ok=True)
    page = Page("What context is worth, measured", output / "claims")
    for name, kind, study in (
        ("Data efficiency", "Test accuracy by labelled documents", _efficiency),
        ("Convergence", "Validation accuracy by updates", _convergence),
        ("Context", "Senses told apart, by vectors", _context),
        ("Transfer", "Test accuracy with pre-training and without", _transfer),
    ):
        path = figures / f"{study.__name__.removeprefix('_')}.png"
        page.add_heading(name)
        page.add_figures((path, kind, study(made, path)))
    page.write()


def _accuracies(runs: Sequence[Stage]) -> list[float]:
    return [measure(run).results["test"]["accuracy"] for run in runs]


def _seeds(count: int) -> str:
    """What figures are of, to stand behind them."""
    return f"Means of {count} seeds." if count > 1 else "One seed each, so small differences may be chance."


def _efficiency(made: Studies, path: Path) -> str:
    curves = {
        method: [by_documents(runs) for runs in zip(*shares.values(), made.full[method], strict=True)]
        for method, shares in made.few.items()
    }
    report.plot_bands(curves, path, "labelled documents of training", "test accuracy", log=True)
    return efficiency_sentence(curves)


def by_documents(runs: Sequence[Stage]) -> dict[float, float]:
    """A seed's test accuracies by the labelled documents trained on, which are one a class at least.

    Of shares of the labels that come to the same documents the last and largest is kept.
    """
    found = [measure(run).results for run in runs]
    return {float(np.sum(f["train"]["confusion_matrix"])): f["test"]["accuracy"] for f in found}


def efficiency_sentence(curves: Mapping[str, Sequence[Mapping[float, float]]]) -> str:
    """What the curves of `_efficiency` show: accuracies at either end, and who leads by how much."""
    x = sorted(curves[ELMO][0])
    values = {m: np.array([[run[at] for at in x] for run in runs]) for m, runs in curves.items()}  # [S, X]
    parts = []
    for i in sorted({0, len(x) - 1}):
        found = "; ".join(f"{m} {spread(y[:, i], 3)}" for m, y in values.items())
        parts.append(f"with {x[i]:,.0f} labelled documents ({100 * x[i] / x[-1]:.3g}%): {found}.")
    static = np.stack([values[m] for m in STATIC])
    better = static.mean(1).argmax(0)  # [X]
    leads = values[ELMO] - np.take_along_axis(static, better[None, None], 0)[0]  # [S, X]
    told = ", ".join(f"{spread(lead, 3, '+')} with {at:,.0f}" for lead, at in zip(leads.T, x, strict=True))
    signs = [_sign(lead, 3) for lead in leads.T]
    trend = f"It leads at {signs.count(1)} of {len(x)} points{_beyond(len(leads))}."
    if len(x) > 1 and signs[0] == signs[-1] == 1:
        trend += f" With the fewest labels its lead is {_than_with_all(leads[:, 0] - leads[:, -1])}."
    return (
        f"Test accuracy {' Test accuracy '.join(parts)} ELMo against the better static vectors: {told}. "
        f"{trend} {_seeds(len(curves[ELMO]))}"
    )


def _sign(differences: np.ndarray, digits: int) -> int | None:
    """Of a mean difference ``[S]`` as it is shown; None if it is no larger than its deviation over seeds."""
    mean, noise = (round(float(x), digits) for x in (np.mean(differences), report.deviation(differences)))
    return None if mean and abs(mean) <= noise else int(np.sign(mean))


def _beyond(seeds: int) -> str:
    """By how much a difference is shown, if anything tells."""
    return " by more than the deviation over seeds" if seeds > 1 else ""


def _than_with_all(gains: np.ndarray) -> str:
    """How a lead compares, unless its gain ``[S]`` is within its deviation over seeds."""
    return {
        None: "not shown to differ from that with all, by the deviation over seeds",
        1: "larger than with all",
        -1: "smaller than with all",
        0: "the same as with all",
    }[_sign(gains, 3)]


def _convergence(made: Studies, path: Path) -> str:
    curves = {
        method: [{float(r["step"]): r["val_accuracy"] for r in measure(run).records} for run in runs]
        for method, runs in ((m, made.full[m]) for m in (ELMO, *STATIC))
    }
    first = curves[ELMO][0]
    for method, all_steps in curves.items():
        for run, steps in zip(made.full[method], all_steps, strict=True):
            if steps.keys() != first.keys():
                told = f"has other steps than {made.full[ELMO][0].path / METRICS}"
                raise InputError(f"{run.path / METRICS}: {told}; remove both runs, and make them anew")
    report.plot_bands(curves, path, "updates", "validation accuracy")
    return convergence_sentence(curves)


def convergence_sentence(curves: Mapping[str, Sequence[Mapping[float, float]]]) -> str:
    """After how many updates ELMo is first where the others are at their best."""
    steps = sorted(curves[ELMO][0])
    values = {m: np.array([[run[x] for x in steps] for run in runs]) for m, runs in curves.items()}  # [S, X]
    said = []
    for method in STATIC:
        at = int(values[method].mean(0).argmax())
        best = values[method][:, at]
        said.append(
            f"{method} is at its best, {spread(best, 3)}, after {steps[at]:,.0f} updates; "
            f"ELMo reaches that {_when(values[ELMO] - best[:, None], steps)}"
        )
    return (
        f"After {steps[0]:,.0f} updates, the first point measured: "
        + "; ".join(f"{m} {spread(y[:, 0], 3)}" for m, y in values.items())
        + f". {'. '.join(said)}. {_seeds(len(curves[ELMO]))}"
    )


def _when(leads: np.ndarray, steps: Sequence[float]) -> str:
    """After how many updates a lead ``[S, X]`` is there: as shown, in the mean, and beyond its deviation."""
    first = next((x for x, lead in zip(steps, leads.T, strict=True) if lead.mean().round(3) >= 0), None)
    if first is None:
        near = _sign(leads[:, leads.mean(0).argmax()], 3) is None
        return "never in the mean, but comes within the deviation over seeds" if near else "never"
    if len(leads) == 1:
        return f"after {first:,.0f}"
    clear = next((x for x, lead in zip(steps, leads.T, strict=True) if _sign(lead, 3) == 1), None)
    told = "never" if clear is None else f"after {clear:,.0f}"
    return f"in the mean after {first:,.0f}, and{_beyond(len(leads))} exceeds it {told}"


def _transfer(made: Studies, path: Path) -> str:
    values = {
        "ELMo, pre-trained": _accuracies(made.full[ELMO]),
        "ELMo, random parameters": _accuracies(made.untrained),
        **{method: _accuracies(made.full[method]) for method in STATIC},
    }
    report.plot_dots(values, path, "test accuracy")
    return transfer_sentence(*list(values.values())[:2])


def transfer_sentence(pretrained: Sequence[float], untrained: Sequence[float]) -> str:
    """What pre-training is worth, in test accuracy, seeds apart."""
    gains = np.subtract(pretrained, untrained)
    verdict = {
        None: "is not shown to gain or to lose by pre-training, by the deviation over seeds",
        1: f"gains by pre-training{_beyond(len(gains))}",
        -1: f"loses by pre-training{_beyond(len(gains))}",
        0: "neither gains nor loses by pre-training",
    }[_sign(gains, 4)]
    return (
        f"The same classifier {verdict}: "
        f"{spread(pretrained)} with it, {spread(untrained)} on a language model of random parameters "
        f"({spread(gains, sign='+')}). {_seeds(len(pretrained))}"
    )


def _context(made: Studies, path: Path) -> str:
    language_model, *static = made.context
    corpus = sample_corpus()
    elmo = Elmo.from_pretrained(language_model.path)
    assert elmo.vocabulary is not None  # it reads words
    train, test = (Occurrences.of(part) for part in (corpus.train, corpus.test))
    values: dict[str, float] = {}
    layers = [part.layers(elmo) for part in (train, test)]  # each [L, N, F]
    for j in range(len(layers[0])):
        name = "ELMo, token vectors" if j == 0 else f"ELMo, LSTM layer {j}"
        values[name] = probe(layers[0][j], train.senses, layers[1][j], test.senses)
    for stage, name in zip(static, ("SVD", "SGNS"), strict=True):
        table = WordVectors.load(stage.path / VECTORS).table(elmo.vocabulary)
        rows = [table[elmo.vocabulary.ids(part.words)] for part in (train, test)]
        values[name] = probe(rows[0], train.senses, rows[1], test.senses)
    floor = commonest(train, test)
    report.plot_dots({name: [v] for name, v in values.items()}, path, "senses told apart, test texts", floor)
    return context_sentence(values, floor, len(test.senses))


def context_sentence(values: Mapping[str, float], floor: float, occurrences: int) -> str:
    """Which share of the senses is told apart by ELMo's best layer, by static vectors, and by neither."""
    best = max((name for name in values if name not in STATIC), key=lambda name: values[name])
    static = max(STATIC, key=lambda name: values[name])
    return (
        f"On the embedded corpus, whose grammar knows the sense of each of {occurrences:,} occurrences of "
        f"ambiguous words, one linear probe tells {values[best]:.1%} of the senses from the best of ELMo's "
        f"layers ({best.removeprefix('ELMo, ')}), and {values[static]:.1%} from the better static vectors "
        f"({static}); always guessing a word's commonest sense (broken line) gets {floor:.1%}. {_seeds(1)}"
    )
