"""Studies of the claims about ELMo: few labels, convergence, word senses and pre-training.

Each study has a plot and a sentence that states the result, whichever way it turns out.
Axes in shape comments: S seeds, X points of a curve, L layers, N occurrences of words, F features.
"""

import csv
import io
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.config import DataConfig
from elmo_jax.data.csv_dataset import load_dataset
from elmo_jax.data.sample_corpus import Text, sample_corpus
from elmo_jax.elmo import Elmo
from elmo_jax.storage.files import write_atomically
from experiments.common import report
from experiments.common.inputs import VECTORS, keep_labels
from experiments.compare.results import format_mean, read_classifiers, training_curves
from experiments.compare.stages import ELMO, TFIDF, Comparison

STATIC = ("SGNS", "SVD")
FEW_TEXTS = "ELMo, few texts"
LABEL_FRACTIONS = (0.01, 0.03, 0.1, 0.3)  # compared with all labels


class Studies:
    """Runs of the studies: with few labels, on an untrained language model and on the sample corpus."""

    def __init__(self, comparison: Comparison):
        self.full, seeds = comparison.classifiers, range(comparison.config.seeds)
        all_epochs = self.full[ELMO][0].settings.epochs
        # With fewer documents an epoch has fewer steps, so there are more epochs.
        epochs = {fraction: round(all_epochs / fraction**0.5) for fraction in LABEL_FRACTIONS}
        self.few_labels = {
            method: {
                f: [comparison.classifier(method, seed, f, n) for seed in seeds] for f, n in epochs.items()
            }
            for method in (ELMO, *STATIC, TFIDF)
        }
        self.few_texts = [FewTexts(comparison, fraction, epochs[fraction]) for fraction in LABEL_FRACTIONS]
        self.few_labels[FEW_TEXTS] = {few.fraction: few.classifiers for few in self.few_texts}
        self.untrained = [comparison.classifier(ELMO, seed, untrained=True) for seed in seeds]
        output = str(comparison.output / "context")
        config = replace(comparison.config, data=DataConfig(), output=output, pretrained=None)
        sources = Comparison(config).sources
        self.context = [replace(stage, name=f"context {name}") for name, stage in sources.items()]
        few = (runs for of_method in self.few_labels.values() for runs in of_method.values())
        models = [few.language_model for few in self.few_texts]
        self.stages = [*self.context, *self.untrained, *models, *itertools.chain(*few)]


class FewTexts:
    """ELMo with few texts: it is pre-trained only on the documents that are labelled.

    Args:
        comparison: The comparison with all texts.
        fraction: Fraction of its training and validation documents.
        epochs: Epochs of pre-training and of the classifiers.
    """

    def __init__(self, comparison: Comparison, fraction: float, epochs: int):
        self.fraction = fraction
        output = comparison.output / f"texts-{fraction:g}"
        self._all, self._folder = comparison.data, output / "data"
        length = comparison.data.max_length
        data = DataConfig(dataset=str(self._folder), tokens="whitespace", max_length=length)
        config = replace(comparison.config, data=data, output=str(output), pretrained=None)
        few = Comparison(config)
        model = few.sources["pretrain"]
        model = replace(model, name=f"texts-{fraction:g} pretrain")
        self.language_model = model
        self.classifiers = [
            replace(stage, name=f"texts-{fraction:g} {stage.name}")
            for stage in (few.classifier(ELMO, seed, epochs=epochs) for seed in range(config.seeds))
        ]

    def write_data(self) -> None:
        """Write the documents, and all test documents, as a data set of their own."""
        dataset = load_dataset(replace(self._all, min_count=1, max_vocab=None))
        few = keep_labels(dataset, self.fraction, seed=0)
        self._folder.mkdir(parents=True, exist_ok=True)
        for name, parts in (("train.csv", (few.train, few.validation)), ("test.csv", (few.test,))):
            text = io.StringIO(newline="")
            for part in parts:
                tokens = [dataset.vocabulary.tokens[i] for i in part.ids.tolist()]
                spans = zip(part.labels.tolist(), part.offsets, part.offsets[1:], strict=False)
                csv.writer(text).writerows([dataset.classes[c], " ".join(tokens[i:j])] for c, i, j in spans)
            write_atomically(self._folder / name, text.getvalue())


def write_page(studies: Studies, output: Path) -> None:
    """Draw the plots and write ``claims.md`` and ``claims.html``."""
    page = report.Page("Claims about ELMo, measured", output / "claims")
    for heading, name, alt, study in (
        ("Data efficiency", "efficiency", "Test accuracy by labelled documents", study_efficiency),
        ("Convergence", "convergence", "Validation accuracy by updates", _study_convergence),
        ("Context", "context", "Accuracy of predicted word senses, by vectors", _study_context),
        ("Transfer", "transfer", "Test accuracy with and without pre-training", _study_transfer),
    ):
        path = output / "figures" / f"{name}.png"
        page.add_heading(heading)
        page.add_figures((path, alt, study(studies, path)))
    page.write()


def study_efficiency(studies: Studies, path: Path) -> str:
    """Plot the test accuracy against the number of labelled documents and describe it."""
    x, columns, values = [], [], {}
    for method, few_labels in studies.few_labels.items():
        full = studies.full[ELMO if method == FEW_TEXTS else method]  # with all texts, both are the same
        runs = read_classifiers({**few_labels, 1.0: full})
        if method == ELMO:
            parts = [each[0].results["train"] for each in runs.values()]
            documents = [float(np.sum(part["confusion_matrix"])) for part in parts]
            # Two small fractions may round to the same number of documents.
            unique = {count: i for i, count in enumerate(documents)}
            x, columns = list(unique), list(unique.values())
        values[method] = np.array([[run.accuracy for run in each] for each in runs.values()]).T[:, columns]
    report.plot_bands(x, values, path, "labelled training documents", "test accuracy", "x")
    return describe_efficiency(x, values)


def describe_efficiency(x: Sequence[float], values: Mapping[str, np.ndarray]) -> str:
    """Describe the accuracies ``[S, X]`` at both ends and the lead of ELMo at each point."""
    parts = []
    for i in sorted({0, len(x) - 1}):
        labels = f"{x[i]:,.0f} labelled documents ({100 * x[i] / x[-1]:.3g}%)"
        parts.append(f"Test accuracy with {labels}: {_list_means(values, i)}.")
    if FEW_TEXTS in values:
        parts.append(
            f"{ELMO} is pre-trained on all texts and has few labels; {FEW_TEXTS} has few texts too, and is "
            "pre-trained on these alone."
        )
    static = np.stack([values[method] for method in STATIC])
    better = static.mean(1).argmax(0)  # [X]
    leads = values[ELMO] - np.take_along_axis(static, better[None, None], 0)[0]  # [S, X]
    points = ", ".join(
        f"{format_mean(lead, 3, '+')} with {at:,.0f}" for lead, at in zip(leads.T, x, strict=True)
    )
    signs = [_find_sign(lead, 3) for lead in leads.T]
    parts.append(
        f"Lead of ELMo over the better static vectors: {points}. "
        f"ELMo leads at {signs.count(1)} of {len(x)} points{_beyond_deviation(leads)}."
    )
    if len(x) > 1 and signs[0] == signs[-1] == 1:
        trend = {
            None: f"not clearly different from its lead with all labels ({_WITHIN})",
            1: "larger than with all labels",
            -1: "smaller than with all labels",
            0: "the same as with all labels",
        }[_find_sign(leads[:, 0] - leads[:, -1], 3)]
        parts.append(f"With the fewest labels its lead is {trend}.")
    return " ".join([*parts, _describe_seeds(leads)])


_DEVIATION = "one standard deviation over the seeds"
_WITHIN = f"within {_DEVIATION}"


def _list_means(values: Mapping[str, np.ndarray], i: int) -> str:
    return "; ".join(f"{method} {format_mean(y[:, i], 3)}" for method, y in values.items())


def _find_sign(differences: np.ndarray, digits: int) -> int | None:
    """Return the sign of the rounded mean over seeds, or None if it is within one standard deviation."""
    mean, noise = (round(float(x), digits) for x in (np.mean(differences), report.deviation(differences)))
    return None if mean and abs(mean) <= noise else int(np.sign(mean))


def _beyond_deviation(seeds: Sequence[Any] | np.ndarray) -> str:
    return f" by more than {_DEVIATION}" if len(seeds) > 1 else ""


def _describe_seeds(seeds: Sequence[Any] | np.ndarray) -> str:
    single = "One seed each, so small differences may be chance."
    return f"Means of {len(seeds)} seeds." if len(seeds) > 1 else single


def _study_convergence(studies: Studies, path: Path) -> str:
    runs = read_classifiers({method: studies.full[method] for method in (ELMO, *STATIC)})
    steps, values = training_curves(runs, "step")
    report.plot_bands(steps, values, path, "updates", "validation accuracy")
    return describe_convergence(steps, values)


def describe_convergence(steps: Sequence[float], values: Mapping[str, np.ndarray]) -> str:
    """Describe after how many updates ELMo reaches the best accuracies ``[S, X]`` of the static vectors."""
    parts = [f"After {steps[0]:,.0f} updates, the first measured point: {_list_means(values, 0)}."]
    for method in STATIC:
        at = int(values[method].mean(0).argmax())
        best, mean = format_mean(values[method][:, at], 3), values[method][:, at].mean()
        reached = [
            step for step, y in zip(steps, values[ELMO].mean(0), strict=True) if round(y - mean, 3) >= 0
        ]
        when = f"reaches this after {reached[0]:,.0f} updates" if reached else "never reaches this"
        parts.append(f"{method} is best after {steps[at]:,.0f} updates ({best}); ELMo {when}.")
    return " ".join([*parts, _describe_seeds(values[ELMO])])


def _study_transfer(studies: Studies, path: Path) -> str:
    runs = {"ELMo, pre-trained": studies.full[ELMO], "ELMo, random parameters": studies.untrained}
    runs |= {method: studies.full[method] for method in STATIC}
    values = {name: [run.accuracy for run in each] for name, each in read_classifiers(runs).items()}
    report.plot_dots(values, path, "test accuracy")
    return describe_transfer(*list(values.values())[:2])


def describe_transfer(pretrained: Sequence[float], untrained: Sequence[float]) -> str:
    """Describe the gain in test accuracy from pre-training, given one accuracy for each seed."""
    gains = np.subtract(pretrained, untrained)
    verdict = {
        None: f"neither clearly gains nor clearly loses from pre-training (the difference is {_WITHIN})",
        1: f"gains from pre-training{_beyond_deviation(gains)}",
        -1: f"loses from pre-training{_beyond_deviation(gains)}",
        0: "neither gains nor loses from pre-training",
    }[_find_sign(gains, 4)]
    return (
        f"The same classifier {verdict}: {format_mean(pretrained)} on the pre-trained language model, "
        f"{format_mean(untrained)} on one with random parameters "
        f"(difference {format_mean(gains, sign='+')}). {_describe_seeds(gains)}"
    )


def _study_context(studies: Studies, path: Path) -> str:
    language_model, *static = studies.context
    elmo, corpus = Elmo.from_pretrained(language_model.path), sample_corpus()
    assert elmo.vocabulary is not None  # this language model reads words
    (layers, words, senses), (test_layers, test_words, test_senses) = (
        embed_ambiguous_words(elmo, part) for part in (corpus.train, corpus.test)
    )
    values: dict[str, float] = {}
    for j, (x, y) in enumerate(zip(layers, test_layers, strict=True)):
        name = "ELMo, token vectors" if j == 0 else f"ELMo, LSTM layer {j}"
        values[name] = probe_accuracy(x, senses, y, test_senses)
    for stage, name in zip(static, ("SVD", "SGNS"), strict=True):
        table = WordVectors.load(stage.path / VECTORS).table(elmo.vocabulary)
        x, y = (table[elmo.vocabulary.ids(each)] for each in (words, test_words))
        values[name] = probe_accuracy(x, senses, y, test_senses)
    baseline = most_frequent_sense_accuracy(words, senses, test_words, test_senses)
    report.plot_dots({name: [y] for name, y in values.items()}, path, "accuracy of word senses", baseline)
    return describe_context(values, baseline, len(test_senses))


def describe_context(values: Mapping[str, float], baseline: float, occurrences: int) -> str:
    """Describe the accuracy of word senses from ELMo's best layer, static vectors and the baseline."""
    best = max((name for name in values if name not in STATIC), key=lambda name: values[name])
    static = max(STATIC, key=lambda name: values[name])
    return (
        f"The sample corpus records the sense of each of the {occurrences:,} ambiguous words in its test "
        f"texts. A linear probe predicts {values[best]:.1%} of the senses from the best layer of ELMo "
        f"({best.removeprefix('ELMo, ')}) and {values[static]:.1%} from the better static vectors "
        f"({static}). Always predicting a word's most frequent sense (dashed line) gets {baseline:.1%}. "
        f"{_describe_seeds([0])}"
    )


def embed_ambiguous_words(elmo: Elmo, corpus: Sequence[Text]) -> tuple[np.ndarray, list[str], list[str]]:
    """Return the layers ``[L, N, F]``, the word and the sense of each ambiguous word in its text."""
    texts = [text.text.split() for text in corpus]
    found = [(i, at, sense) for i, text in enumerate(corpus) for at, sense in text.senses]
    states = elmo.embed(texts)
    layers = np.stack([states[i][:, at] for i, at, _ in found], axis=1)
    return layers, [texts[i][at] for i, at, _ in found], [sense for *_, sense in found]


def probe_accuracy(
    x: np.ndarray, senses: Sequence[str], x_test: np.ndarray, test_senses: Sequence[str]
) -> float:
    """Return the test accuracy of a logistic regression from vectors ``[N, F]`` to senses."""
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return float(model.fit(x, senses).score(x_test, test_senses))


def most_frequent_sense_accuracy(
    words: Sequence[str], senses: Sequence[str], test_words: Sequence[str], test_senses: Sequence[str]
) -> float:
    """Return the test accuracy of predicting each word's most frequent sense in the training texts."""
    pairs = Counter(zip(words, senses, strict=True)).most_common()
    predicted = dict(
        pair for pair, _ in reversed(pairs)
    )  # reversed, so that the most frequent sense of a word is set last
    return float(np.mean([predicted.get(w) == s for w, s in zip(test_words, test_senses, strict=True)]))
