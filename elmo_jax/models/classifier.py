"""A bidirectional LSTM classifier on vectors of any origin, and its loss.

Axes: B batch, T time, D direction, L layers of the features, F features, H cells, C classes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from elmo_jax.config import ClassifierConfig
from elmo_jax.data.batching import Batch
from elmo_jax.data.characters import character_ids
from elmo_jax.data.text import SPECIAL, UNK
from elmo_jax.models.lstm import LSTM, Kernel, join_directions, stack_directions, token_mask

# (params, batch, key or None without dropout) -> [L, B, T, F]
Features = Callable[[Any, Batch, Array | None], Array]


class BiLSTMClassifier(nn.Module):
    """Layer norm, bidirectional LSTM layers, pooling over real tokens, a ReLU layer, a logit a class.

    Attributes:
        config: its sizes.
        classes: C.
        kernel: of the LSTM layers.

    Example:
        >>> model = BiLSTMClassifier(ClassifierConfig(hidden=4), classes=3)
        >>> x, lengths = jnp.zeros((2, 5, 6)), jnp.array([5, 2])
        >>> logits, _ = model.init_with_output(jax.random.key(0), x, lengths)
        >>> logits.shape
        (2, 3)
    """

    config: ClassifierConfig
    classes: int
    kernel: Kernel = "auto"

    @nn.compact
    def __call__(self, x: Array, lengths: Array, train: bool = False) -> Array:
        """Features ``[B, T, F]`` and lengths ``[B]`` to logits ``[B, C]``."""
        c = self.config
        drop = nn.Dropout(c.classifier_dropout, deterministic=not train)
        steps = (1,) if c.variational else ()  # along which one draw serves
        drop_steps = nn.Dropout(c.classifier_dropout, steps, deterministic=not train)
        x = nn.LayerNorm(name="norm")(x)  # features come in any scale; an LSTM wants one near 1
        for i in range(c.classifier_layers):
            x = drop_steps(x)
            h, _ = LSTM(c.hidden, kernel=self.kernel, name=f"lstm_{i}")(stack_directions(x, lengths), lengths)
            x = join_directions(h, lengths)  # [B, T, 2H]
        scores = nn.Dense(1, name="attention")(x) if "attention" in c.pooling else None
        x = drop(_pool(x, lengths, c.pooling, scores))
        x = drop(nn.relu(nn.Dense(c.hidden, name="hidden")(x)))
        return nn.Dense(self.classes, name="logits")(x)


def _pool(x: Array, lengths: Array, pooling: str, scores: Array | None) -> Array:
    """``[B, T, F]`` over real steps to ``[B, F]`` for each way, side by side; 0 on rows without any step.

    Attention is the mean weighted by the softmax of the scores ``[B, T, 1]`` over real steps.
    """
    mask = token_mask(lengths, x.shape[1])[:, :, None]
    pooled = []
    if "mean" in pooling:
        count = jnp.maximum(lengths, 1).astype(x.dtype)[:, None]
        pooled.append(jnp.where(mask, x, 0).sum(1) / count)
    if "max" in pooling:
        top = jnp.where(mask, x, -jnp.inf).max(1)
        pooled.append(jnp.where(lengths[:, None] > 0, top, 0))
    if scores is not None:
        # Fillers, which have no real step, get even weights over zeros instead of NaN.
        weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(x.dtype).min), axis=1)
        pooled.append(jnp.sum(weights * jnp.where(mask, x, 0), axis=1))
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
        combiner: of `elmo_jax.models.combiners`.
        model: the classifier.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    if keys[1] is not None and model.config.word_dropout:
        batch = _hide_words(batch, jax.random.fold_in(keys[1], 1), model.config.word_dropout)
    layers = features(params, batch, keys[0])[:, :, 1:-1]
    x = combiner.apply({"params": params["combiner"]}, layers)
    rngs: Any = {} if key is None else {"dropout": keys[1]}
    lengths = jnp.maximum(batch.lengths - 2, 0)
    logits: Any = model.apply({"params": params["classifier"]}, x, lengths, key is not None, rngs=rngs)
    return logits


def _hide_words(batch: Batch, key: Array, share: float) -> Batch:
    """That share of the words made unknown, in their spelling too; markers and padding stay."""
    words, chars = jnp.asarray(batch.words), batch.chars
    hidden = jax.random.bernoulli(key, share, words.shape) & (words >= UNK)  # an unknown word has a spelling
    if chars is not None:
        unknown = jnp.asarray(character_ids([SPECIAL[UNK]])[0, : chars.shape[-1]])
        chars = jnp.where(hidden[..., None], unknown[None, None], chars)
    return replace(batch, words=jnp.where(hidden, UNK, words), chars=chars, unique_words=None)


def static_features(params: Any, batch: Batch, key: Array | None) -> Array:
    """The rows of a fixed table ``params["vectors"]`` as the one layer ``[1, B, T, F]``."""
    return jax.lax.stop_gradient(jnp.take(params["vectors"], batch.words, axis=0))[None]


def classifier_loss(features: Features, combiner: Any, model: BiLSTMClassifier):
    """The downstream task: mean cross-entropy a document, with dropout.

    Returns:
        A pure ``(params, batch, key) -> (loss, sums)``; without a key there is no dropout.
    """

    def loss(params: Any, batch: Batch, key: Array | None) -> tuple[Array, dict[str, Array]]:
        logits = classify(params, batch, key, features, combiner, model)
        smooth = 0.0 if key is None else model.config.label_smoothing
        targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, model.classes), smooth)
        each = optax.softmax_cross_entropy(logits, targets) * batch.weight
        total, rows = each.sum(), batch.weight.sum()
        confusion = confusion_matrix(batch.labels, logits.argmax(-1), batch.weight, model.classes)
        return total / jnp.maximum(rows, 1), {"nll": total, "documents": rows, "confusion": confusion}

    return loss


def confusion_matrix(labels: Array, predicted: Array, weight: Array, classes: int) -> Array:
    """Return weighted counts ``[C, C]`` float32, a row for each true class, a column for each predicted one.

    Args:
        labels, predicted: Classes ``[B]`` int32.
        weight: ``[B]``, 0 for filler rows.
        classes: Number of classes C, static.
    """
    rows = jax.nn.one_hot(labels, classes) * weight[:, None]
    return rows.T @ jax.nn.one_hot(predicted, classes)
