"""Linear and naive Bayes text classifiers on TF-IDF weighted word counts."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from elmo_jax.data.batching import Documents
from elmo_jax.data.text import SPECIAL, Vocabulary

_INVERSE_REGULARIZATION = 3.0  # of the logistic regression
_SMOOTHING = 0.3  # added to the weight of every word in every class, for naive Bayes
_UNSEEN_CLASS = -100.0  # bias of a class without training documents


@dataclass(frozen=True)
class BagOfWords:
    """Logistic regression and multinomial naive Bayes on TF-IDF vectors of documents.

    A document's vector has (1 + log n_w) idf_w for every word w, scaled to length 1. Both models are
    linear in it. With few documents naive Bayes is the better one, with many logistic regression
    (Ng and Jordan 2001).

    Attributes:
        vocabulary: Words of the training documents, rare ones included.
        idf: Inverse document frequency of every word, float64 ``[V]``.
        weights: float64 ``[2, V, C]`` of logistic regression and of naive Bayes.
        bias: float64 ``[2, C]``.

    Examples:
        >>> vocabulary = Vocabulary.from_counts({"bank": 2, "goal": 1})
        >>> documents = Documents.of([["bank"], ["goal"], ["bank"]], vocabulary, labels=[0, 1, 0])
        >>> BagOfWords.fit(documents, vocabulary, classes=2).log_probabilities(documents)[0].argmax(-1)
        array([0, 1, 0])
    """

    vocabulary: Vocabulary
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
        from sklearn.linear_model import LogisticRegression  # 80 MB with SciPy, so only where needed
        from sklearn.naive_bayes import MultinomialNB

        counts = _count_words(documents, len(vocabulary))
        containing = np.bincount(counts.indices, minlength=len(vocabulary))
        idf = np.log((1 + len(documents)) / (1 + containing)) + 1
        x, present = _weigh(counts, idf), np.unique(documents.labels)
        weights = np.zeros((2, len(vocabulary), classes))
        bias = np.full((2, classes), _UNSEEN_CLASS)
        if len(present) > 1:
            linear = LogisticRegression(C=_INVERSE_REGULARIZATION, max_iter=500).fit(x, documents.labels)
            # With two classes, scikit-learn stores the logit of the second one alone.
            pad = (1, 0) if len(linear.coef_) == 1 else (0, 0)
            weights[0][:, present] = np.pad(linear.coef_, (pad, (0, 0))).T
            bias[0, present] = np.pad(linear.intercept_, pad)
        bayes = MultinomialNB(alpha=_SMOOTHING).fit(x, documents.labels)
        # A class without documents must stay below the others for texts of any length.
        weights[1] = bayes.feature_log_prob_.min(0)[:, None]
        weights[1][:, present], bias[1, present] = bayes.feature_log_prob_.T, bayes.class_log_prior_
        return cls(vocabulary, idf, weights, bias)

    def log_probabilities(self, documents: Documents) -> np.ndarray:
        """Return the log-probabilities of the classes under both models, float64 ``[2, N, C]``."""
        x = _weigh(_count_words(documents, len(self.vocabulary)), self.idf)
        return log_softmax(np.stack([x @ w + b for w, b in zip(self.weights, self.bias, strict=True)]))


def _count_words(documents: Documents, size: int) -> Any:
    """Return the count of each known word in each document, as a sparse matrix ``[N, V]``."""
    from scipy.sparse import csr_matrix

    is_known = (documents.ids >= len(SPECIAL)).astype(np.float64)
    # A copy, because sum_duplicates sorts the ids in place.
    counts = csr_matrix((is_known, documents.ids, documents.offsets), (len(documents), size), copy=True)
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
