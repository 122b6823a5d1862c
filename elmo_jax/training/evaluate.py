"""Evaluation of a model over a stream: summed metrics, predictions, and the figures derived from them."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from elmo_jax._moved import renamed_arguments
from elmo_jax.data.batching import Batch, BatchStream
from elmo_jax.parallel import find_mesh, to_host, use_mesh
from elmo_jax.training.step import Params, feed


@renamed_arguments(sums_fn="metrics_fn")
def evaluate(
    metrics_fn: Callable[[Params, Batch], dict[str, Array]], params: Params, stream: BatchStream
) -> dict[str, np.ndarray]:
    """Return the metrics of one pass over a stream, summed in float64.

    Args:
        metrics_fn: Compiled ``(params, batch) -> metrics``, sums and counts.
        params: Every parameter that the function reads.
        stream: Documents to evaluate on; its `steps_per_call` does not change the result.
    """
    mesh, pending = find_mesh(params), deque[dict[str, Array]]()
    total: dict[str, np.ndarray] = {}

    def add(metrics: dict[str, Array]) -> None:
        for name, value in metrics.items():
            total[name] = total.get(name, 0.0) + to_host(value).astype(np.float64)

    for batch in _batches(stream, mesh):
        with use_mesh(mesh):
            pending.append(metrics_fn(params, batch))
        if len(pending) > 2:  # a short queue keeps the device busy and the memory constant
            add(pending.popleft())
    for metrics in pending:
        add(metrics)
    return total


@renamed_arguments(rows_fn="predict_fn")
def predict(predict_fn: Callable[[Params, Batch], Array], params: Params, stream: BatchStream) -> np.ndarray:
    """Return one value for every document, in the order of the stream's documents.

    Args:
        predict_fn: Compiled ``(params, batch) -> [B, ...]``.
        params: Every parameter that the function reads.
        stream: Documents to predict for; its `steps_per_call` does not change the result.

    Returns:
        ``[N, ...]``.
    """
    mesh, values = find_mesh(params), []
    for batch in _batches(stream, mesh):
        with use_mesh(mesh):
            each = predict_fn(params, batch)
        values.append(to_host(each)[to_host(batch.weight) > 0])
    return np.concatenate(values)[np.argsort(stream.order())]


def _batches(stream: BatchStream, mesh: Mesh | None) -> Iterator[Batch]:
    """Iterate over the single batches of one pass."""
    for batches, count in feed(stream, 0, stream.steps_per_epoch, mesh):
        for i in range(count):
            yield jax.tree.map(itemgetter(i), batches)


def confusion(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Return counts ``[C, C]``, a row for each true class and a column for each predicted one.

    Args:
        labels: True classes ``[N]``.
        predicted: Predicted classes ``[N]``.
        classes: C.
    """
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, predicted), 1)
    return counts


def classification(counts: np.ndarray) -> dict[str, Any]:
    """Return accuracy, and precision, recall and F1 averaged by class frequency.

    The averages are scikit-learn's "weighted" ones. A class that is never predicted has precision 0.

    Args:
        counts: Confusion matrix ``[C, C]``, see `confusion`.

    Returns:
        ``accuracy``, ``f1``, ``precision``, ``recall``, and the ``confusion_matrix`` as integers.

    Examples:
        >>> classification(np.array([[3, 1], [0, 4]]))["accuracy"]
        0.875
    """
    counts = np.asarray(counts, np.float64)
    hits, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    precision = np.divide(hits, predicted, out=np.zeros_like(hits), where=predicted > 0)
    recall = np.divide(hits, true, out=np.zeros_like(hits), where=true > 0)
    f1 = np.divide(2 * hits, true + predicted, out=np.zeros_like(hits), where=true + predicted > 0)
    weights = true / true.sum()
    return {
        "accuracy": float(hits.sum() / true.sum()),
        "f1": float(weights @ f1),
        "precision": float(weights @ precision),
        "recall": float(weights @ recall),
        "confusion_matrix": counts.round().astype(int).tolist(),
    }


def perplexities(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return exp of the mean negative log-likelihood of a token, for each direction and for their mean.

    Args:
        metrics: ``nll_forward`` and ``nll_backward`` in nats, and ``tokens`` predicted in each direction.

    Examples:
        >>> round(perplexities({"nll_forward": 2.0, "nll_backward": 4.0, "tokens": 1.0})["perplexity"], 3)
        20.086
    """
    forward, backward = (float(metrics[f"nll_{d}"] / metrics["tokens"]) for d in ("forward", "backward"))
    return {
        "perplexity": float(np.exp((forward + backward) / 2)),
        "perplexity_forward": float(np.exp(forward)),
        "perplexity_backward": float(np.exp(backward)),
    }
