"""Words of several senses where they stand, and how well vectors tell the senses apart.

Axes: N occurrences, L layers, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from elmo_jax.elmo import Elmo
from elmo_jax.sample import Text


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
