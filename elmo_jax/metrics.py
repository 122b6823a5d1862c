"""Sums counted on the device to the figures people read, divided once, here.

Axes: C classes. A confusion matrix has a row a true class and a column a predicted one.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
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


def token_mask(lengths: Array, steps: int) -> Array:
    """``[B, T]`` bool, true on real steps."""
    return jnp.arange(steps)[None, :] < lengths[:, None]
