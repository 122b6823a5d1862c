"""A bidirectional LSTM classifier on vectors of any origin, and its loss.

Axes: B batch, T time, D direction, L layers of the features, F features, H cells, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from elmo_jax.data import Batch
from elmo_jax.lstm import LSTM, reverse_valid
from elmo_jax.metrics import confusion_matrix, token_mask

# (params, batch, key or None without dropout) -> [L, B, T, F]
Features = Callable[[Any, Batch, Array | None], Array]


@dataclass(frozen=True)
class ClassifierConfig:
    """The sizes of the classifier."""

    hidden: int = 128
    """LSTM cells a layer and direction, and units of the ReLU layer."""
    classifier_layers: int = 2
    """Bidirectional LSTM layers."""
    pooling: Literal["mean", "max", "mean+max"] = "mean+max"
    """How the states of a document's tokens become one vector."""
    classifier_dropout: float = 0.2
    """Share of each layer's input set to 0 in training."""


class BiLSTMClassifier(nn.Module):
    """Layer norm, bidirectional LSTM layers, pooling over real tokens, a ReLU layer, a logit a class.

    Attributes:
        config: its sizes.
        classes: C.

    Example:
        >>> model = BiLSTMClassifier(ClassifierConfig(hidden=4), classes=3)
        >>> x, lengths = jnp.zeros((2, 5, 6)), jnp.array([5, 2])
        >>> logits, _ = model.init_with_output(jax.random.key(0), x, lengths)
        >>> logits.shape
        (2, 3)
    """

    config: ClassifierConfig
    classes: int

    @nn.compact
    def __call__(self, x: Array, lengths: Array, train: bool = False) -> Array:
        """Features ``[B, T, F]`` and lengths ``[B]`` to logits ``[B, C]``."""
        c = self.config
        drop = nn.Dropout(c.classifier_dropout, deterministic=not train)
        x = nn.LayerNorm(name="norm")(x)  # features come in any scale; an LSTM wants one near 1
        for i in range(c.classifier_layers):
            x = drop(x)
            both = jnp.stack([x, reverse_valid(x, lengths)]).transpose(2, 0, 1, 3)  # [T, D, B, F]
            h, _ = LSTM(c.hidden, name=f"lstm_{i}")(both, lengths)
            forward, backward = h.transpose(1, 2, 0, 3)
            x = jnp.concatenate([forward, reverse_valid(backward, lengths)], axis=-1)  # [B, T, 2H]
        x = drop(_pool(x, lengths, c.pooling))
        x = drop(nn.relu(nn.Dense(c.hidden, name="hidden")(x)))
        return nn.Dense(self.classes, name="logits")(x)


def _pool(x: Array, lengths: Array, pooling: str) -> Array:
    """``[B, T, F]`` over real steps to ``[B, F]``, or ``[B, 2F]`` for both ways; 0 on rows without any."""
    mask = token_mask(lengths, x.shape[1])[:, :, None]
    pooled = []
    if "mean" in pooling:
        count = jnp.maximum(lengths, 1).astype(x.dtype)[:, None]
        pooled.append(jnp.where(mask, x, 0).sum(1) / count)
    if "max" in pooling:
        top = jnp.where(mask, x, -jnp.inf).max(1)
        pooled.append(jnp.where(lengths[:, None] > 0, top, 0))
    return jnp.concatenate(pooled, axis=-1)


def classify(
    params: Any, batch: Batch, key: Array | None, features: Features, combiner: Any, model: BiLSTMClassifier
) -> Array:
    """Logits ``[B, C]`` of documents; ``<S>`` and ``</S>`` are features' business, not the classifier's.

    Args:
        params: with at least "combiner" and "classifier"; features may look for others.
        batch: B documents.
        key: of dropout; None is none.
        features: params and batch to ``[L, B, T, F]``.
        combiner: of `elmo_jax.combiners`.
        model: the classifier.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    layers = features(params, batch, keys[0])[:, :, 1:-1]
    x = combiner.apply({"params": params["combiner"]}, layers)
    rngs: Any = {} if key is None else {"dropout": keys[1]}
    lengths = jnp.maximum(batch.lengths - 2, 0)
    logits: Any = model.apply({"params": params["classifier"]}, x, lengths, key is not None, rngs=rngs)
    return logits


def classifier_loss(features: Features, combiner: Any, model: BiLSTMClassifier):
    """The downstream task: mean cross-entropy a document, with dropout.

    Returns:
        A pure ``(params, batch, key) -> (loss, sums)``; without a key there is no dropout.
    """

    def loss(params: Any, batch: Batch, key: Array | None) -> tuple[Array, dict[str, Array]]:
        logits = classify(params, batch, key, features, combiner, model)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels) * batch.weight
        total, rows = each.sum(), batch.weight.sum()
        confusion = confusion_matrix(batch.labels, logits.argmax(-1), batch.weight, model.classes)
        return total / jnp.maximum(rows, 1), {"nll": total, "documents": rows, "confusion": confusion}

    return loss
