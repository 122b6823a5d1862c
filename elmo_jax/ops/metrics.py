"""Sums counted on the device to the figures people read, divided once, here.

Axes: C classes, S seeds, N documents. A confusion matrix has a row a true class and a column a predicted one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import Array

Sums = Mapping[str, Any]


def confusion_matrix(labels: Array, predicted: Array, weight: Array, classes: int) -> Array:
    """Weighted counts ``[C, C]`` float32 of (true, predicted) pairs.

    Args:
        labels, predicted: ``[B]`` int32 classes.
        weight: ``[B]``, 0 on rows that do not count.
        classes: C, static.
    """
    rows = jax.nn.one_hot(labels, classes) * weight[:, None]
    return rows.T @ jax.nn.one_hot(predicted, classes)


def classification(confusion: np.ndarray) -> dict[str, Any]:
    """Accuracy, and precision, recall and F1 averaged by class frequency, as scikit-learn's "weighted".

    A class that is never predicted has precision 0, as there.

    Args:
        confusion: ``[C, C]`` counts, at least one of them above 0.

    Returns:
        ``accuracy``, ``f1``, ``precision``, ``recall`` and the ``confusion_matrix`` in integers.

    Example:
        >>> classification(np.array([[3, 1], [0, 4]]))["accuracy"]
        0.875
    """
    counts = np.asarray(confusion, np.float64)
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    recall = np.divide(hits, true, out=np.zeros_like(hits), where=true > 0)
    f1 = np.divide(2 * hits, true + predicted, out=np.zeros_like(hits), where=true + predicted > 0)
    share = true / true.sum()
    return {
        "accuracy": float(hits.sum() / true.sum()),
        "f1": float(share @ f1),
        "precision": float(share @ precision),
        "recall": float(share @ recall),
        "confusion_matrix": counts.round().astype(int).tolist(),
    }


def mcnemar(labels: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[int, int, float]:
    """Exact McNemar test of two classifiers on the same documents.

    Where one is right and the other wrong, either should be right half the time if they
    are equally good (McNemar 1947); the rest says nothing of their difference.

    Args:
        labels: ``[N]`` true classes.
        a, b: ``[N]`` predicted classes.

    Returns:
        The documents that a alone has right, those that b alone has right, and the
        two-sided p-value.

    Example:
        >>> labels = np.zeros(12, int)
        >>> mcnemar(labels, labels, np.repeat([1, 0], [6, 6]))
        (6, 0, 0.03125)
    """
    from scipy.stats import binomtest  # 60 MB, for this alone

    only_a, only_b = (int(np.sum((x == labels) & (y != labels))) for x, y in ((a, b), (b, a)))
    p = float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return only_a, only_b, p


def paired_bootstrap(
    labels: np.ndarray, a: np.ndarray, b: np.ndarray, draws: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Whether two classifiers' mean accuracies over seeds differ, on other documents of the kind.

    Documents are drawn anew with replacement, each with what all runs made of it
    (Efron and Tibshirani 1993). Seeds are not drawn anew.

    Args:
        labels: ``[N]`` true classes.
        a, b: ``[S, N]`` predicted classes, a row a seed; each its own S.
        draws: how often.
        seed: of the draws.

    Returns:
        The mean accuracy of a less that of b, and the two-sided p-value: twice the share of
        draws in which the difference is none or turned round.

    Example:
        >>> labels = np.zeros(100, int)
        >>> better, worse = (np.repeat([[0, 1]], [n, 100 - n], axis=1) for n in (90, 60))
        >>> difference, p = paired_bootstrap(labels, better, worse)
        >>> difference, p < 0.001
        (0.3, True)
    """
    right_a, right_b = ((x == labels).sum(0) for x in (a, b))  # [N]
    # In whole numbers, so that equals are equal; documents of the same gain are drawn as one kind.
    gains, counts = np.unique(right_a * len(b) - right_b * len(a), return_counts=True)
    n = len(labels)
    drawn = np.random.default_rng(seed).multinomial(n, counts / n, draws) @ gains  # [draws]
    tail = min(int(np.sum(drawn <= 0)), int(np.sum(drawn >= 0)))
    return float(gains @ counts / (n * len(a) * len(b))), min(1.0, 2 * (tail + 1) / (draws + 1))


def perplexities(sums: Sums) -> dict[str, float]:
    """exp of the mean negative log-likelihood a token: of each direction, and of their mean.

    Args:
        sums: ``nll_forward``, ``nll_backward`` in nats, ``tokens`` predicted a direction.

    Example:
        >>> round(perplexities({"nll_forward": 2.0, "nll_backward": 4.0, "tokens": 1.0})["perplexity"], 3)
        20.086
    """
    forward, backward = (float(sums[f"nll_{d}"] / sums["tokens"]) for d in ("forward", "backward"))
    return {
        "perplexity": float(np.exp((forward + backward) / 2)),
        "perplexity_forward": float(np.exp(forward)),
        "perplexity_backward": float(np.exp(backward)),
    }
