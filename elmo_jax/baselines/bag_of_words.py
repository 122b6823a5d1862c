"""Linear and naive Bayes text classifiers on TF-IDF weighted word counts."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from elmo_jax.data.batching import Documents
from elmo_jax.data.text import SPECIAL, Vocabulary

_BIGRAM_DOCUMENTS = 10_000  # with fewer documents, bigrams make the models worse
# Inverse regularization of logistic regression on words, and on words and bigrams.
_WORDS_C, _BIGRAMS_C = 3.0, 10.0
_SMOOTHING = 0.3  # naive Bayes adds this to the weight of every word in every class
_UNSEEN_CLASS = -100.0  # bias of a class without training documents


@dataclass(frozen=True)
class BagOfWords:
    """Logistic regression and multinomial naive Bayes on TF-IDF vectors of documents.

    A document's vector has (1 + log n_w) idf_w for every word w, scaled to length 1. Both models are
    linear in it. With few documents naive Bayes is the better one, with many logistic regression
    (Ng and Jordan 2001). From 10,000 documents on, the vector of the latter also has the pairs of
    adjacent words that occur in two or more documents.

    Attributes:
        vocabulary: Words of the training documents, rare ones included.
        bigrams: Ids of the words of each pair, int32 ``[B, 2]``, sorted.
        idf: Inverse document frequency of every word and pair, float64 ``[V + B]``.
        weights: float64 ``[2, V + B, C]`` of logistic regression and of naive Bayes, 0 for pairs.
        bias: float64 ``[2, C]``.

    Examples:
        >>> vocabulary = Vocabulary.from_counts({"bank": 2, "goal": 1})
        >>> documents = Documents.of([["bank"], ["goal"], ["bank"]], vocabulary, labels=[0, 1, 0])
        >>> BagOfWords.fit(documents, vocabulary, classes=2).log_probabilities(documents)[0].argmax(-1)
        array([0, 1, 0])
    """

    vocabulary: Vocabulary
    bigrams: np.ndarray
    idf: np.ndarray
    weights: np.ndarray
    bias: np.ndarray

    @classmethod
    def fit(cls, documents: Documents, vocabulary: Vocabulary, classes: int) -> "BagOfWords":
        """Fit both models.

        Args:
            documents: Training documents with labels; their ids are of `vocabulary`.
            vocabulary: Words of the documents.
            classes: C.
        """
        from sklearn.linear_model import LogisticRegression  # imported only here, as it takes 80 MB
        from sklearn.naive_bayes import MultinomialNB

        size, bigrams = len(vocabulary), np.zeros((0, 2), np.int32)
        if len(documents) >= _BIGRAM_DOCUMENTS:
            bigrams = _find_bigrams(documents)
        counts = _count(documents, size, bigrams)
        containing = np.bincount(counts.indices, minlength=size + len(bigrams))
        idf = np.log((1 + len(documents)) / (1 + containing)) + 1
        x, x_words, present = _weigh(counts, idf), _weigh(counts[:, :size], idf), np.unique(documents.labels)
        weights = np.zeros((2, size + len(bigrams), classes))
        bias = np.full((2, classes), _UNSEEN_CLASS)
        if len(present) > 1:
            regularization = _BIGRAMS_C if len(bigrams) else _WORDS_C
            linear = LogisticRegression(C=regularization, max_iter=500).fit(x, documents.labels)
            # With two classes, scikit-learn stores the logit of the second one alone.
            pad = (1, 0) if len(linear.coef_) == 1 else (0, 0)
            weights[0][:, present] = np.pad(linear.coef_, (pad, (0, 0))).T
            bias[0, present] = np.pad(linear.intercept_, pad)
        bayes = MultinomialNB(alpha=_SMOOTHING).fit(x_words, documents.labels)
        # A class without documents must stay below the others for texts of any length.
        weights[1, :size] = bayes.feature_log_prob_.min(0)[:, None]
        weights[1, :size, present], bias[1, present] = bayes.feature_log_prob_, bayes.class_log_prior_
        return cls(vocabulary, bigrams, idf, weights, bias)

    def log_probabilities(self, documents: Documents) -> np.ndarray:
        """Return the log-probabilities of the classes under both models, float64 ``[2, N, C]``."""
        size = len(self.vocabulary)
        counts = _count(documents, size, self.bigrams)
        linear = _weigh(counts, self.idf) @ self.weights[0]
        bayes = _weigh(counts[:, :size], self.idf) @ self.weights[1, :size]
        return log_softmax(np.stack([linear, bayes]) + self.bias[:, None])


def _adjacent_words(documents: Documents) -> tuple[np.ndarray, np.ndarray]:
    """Return the document ``[pairs]`` and the ids ``[pairs, 2]`` of all adjacent known words."""
    document = np.repeat(np.arange(len(documents)), np.diff(documents.offsets))
    pairs = np.stack([documents.ids[:-1], documents.ids[1:]], axis=1)
    is_pair = (document[:-1] == document[1:]) & (pairs >= len(SPECIAL)).all(1)
    return document[:-1][is_pair], pairs[is_pair]


def _find_bigrams(documents: Documents) -> np.ndarray:
    """Return the sorted pairs of adjacent words that occur in two or more documents, int32 ``[B, 2]``."""
    document, pairs = _adjacent_words(documents)
    _, first = np.unique(_encode_pairs(pairs) * len(documents) + document, return_index=True)
    codes, counts = np.unique(_encode_pairs(pairs[first]), return_counts=True)
    codes = codes[counts > 1]
    return np.stack(np.divmod(codes, 2**31), axis=1).astype(np.int32)


def _encode_pairs(pairs: np.ndarray) -> np.ndarray:
    return pairs[:, 0].astype(np.int64) * 2**31 + pairs[:, 1]


def _count(documents: Documents, size: int, bigrams: np.ndarray) -> Any:
    """Return the count of each known word and pair in each document, as a sparse matrix ``[N, V + B]``."""
    from scipy.sparse import csr_matrix, hstack

    is_known = (documents.ids >= len(SPECIAL)).astype(np.float64)
    # A copy, because sum_duplicates sorts the ids in place.
    counts: Any = csr_matrix((is_known, documents.ids, documents.offsets), (len(documents), size), copy=True)
    if len(bigrams):
        document, pairs = _adjacent_words(documents)
        known, codes = _encode_pairs(bigrams), _encode_pairs(pairs)
        index = np.minimum(np.searchsorted(known, codes), len(known) - 1)
        found = known[index] == codes
        positions = document[found], index[found]
        of_pairs = csr_matrix((np.ones(found.sum()), positions), (len(documents), len(bigrams)))
        counts = hstack([counts, of_pairs], format="csr")
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def _weigh(counts: Any, idf: np.ndarray) -> Any:
    """Return TF-IDF vectors of length 1."""
    x = counts.copy()
    x.data = (1 + np.log(x.data)) * idf[x.indices]
    norm = np.sqrt(np.asarray(x.multiply(x).sum(1)).ravel())
    x.data /= np.repeat(np.maximum(norm, 1e-12), np.diff(x.indptr))
    return x


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Normalize logits ``[..., C]`` to log-probabilities, in float64."""
    logits = np.asarray(logits, np.float64)
    return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)


def fit_mixture_weights(log_probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the weights w ≥ 0 of the models in log p = log_softmax(Σ_m w_m log p_m), as in stacking.

    They minimize the negative log-likelihood of held-out documents (Wolpert 1992), with a weak prior
    towards equal weights for the case of few documents.

    Args:
        log_probabilities: ``[M, N, C]`` of M models for documents that none of them was trained on.
        labels: True classes ``[N]``.

    Returns:
        float64 ``[M]``.

    Examples:
        >>> good, useless = np.log([[0.9, 0.1], [0.1, 0.9]]), np.log([[0.5, 0.5], [0.5, 0.5]])
        >>> weights = fit_mixture_weights(np.stack([good, useless]), np.array([0, 1]))
        >>> bool(weights[0] > weights[1])
        True
    """
    from scipy.optimize import minimize

    models, documents, _ = log_probabilities.shape
    equal = np.full(models, 1 / models)

    def loss(weights: np.ndarray) -> float:
        mixed = log_softmax(np.tensordot(weights, log_probabilities, 1))
        prior = np.sum((weights - equal) ** 2) / 2
        return (prior - mixed[np.arange(documents), labels].sum()) / documents

    return minimize(loss, equal, bounds=[(0, None)] * models).x
