"""BiLSTM text classifier on token features from any source, and its loss function."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from elmo_jax.config import ClassifierConfig, Kernel
from elmo_jax.data.batching import Batch
from elmo_jax.data.characters import character_ids
from elmo_jax.data.text import SPECIAL, UNK
from elmo_jax.models.lstm import LSTM, join_directions, stack_directions, token_mask

# (params, batch, dropout key or None) -> [L, B, T, F]
Features = Callable[[Any, Batch, Array | None], Array]


class BiLSTMClassifier(nn.Module):
    """Layer norm, bidirectional LSTM layers, pooling over tokens, a ReLU layer and a linear layer.

    Attributes:
        config: Sizes and regularization.
        classes: C.
        kernel: LSTM kernel.

    Examples:
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
        """Return the logits ``[B, C]`` of features ``[B, T, F]`` with lengths ``[B]``."""
        c = self.config
        drop = nn.Dropout(c.classifier_dropout, deterministic=not train)
        shared_axes = (1,) if c.variational else ()  # one dropout mask for all tokens
        drop_tokens = nn.Dropout(c.classifier_dropout, shared_axes, deterministic=not train)
        x = nn.LayerNorm(name="norm")(x)  # normalized, because features may have any scale
        for i in range(c.classifier_layers):
            x = stack_directions(drop_tokens(x), lengths)  # [D, B, T, F]
            h, _ = LSTM(c.hidden, kernel=self.kernel, name=f"lstm_{i}")(x, lengths)
            x = join_directions(h, lengths)  # [B, T, 2H]
        scores = nn.Dense(1, name="attention")(x) if "attention" in c.pooling else None
        x = drop(_pool_tokens(x, lengths, c.pooling, scores))
        x = drop(nn.relu(nn.Dense(c.hidden, name="hidden")(x)))
        return nn.Dense(self.classes, name="logits")(x)


def _pool_tokens(x: Array, lengths: Array, pooling: str, scores: Array | None) -> Array:
    """Pool ``[B, T, F]`` over tokens and concatenate the results; rows without tokens give 0.

    Attention pooling is the mean weighted by softmax(scores) over the tokens, scores ``[B, T, 1]``.
    """
    mask = token_mask(lengths, x.shape[1])[:, :, None]
    pooled = []
    if "mean" in pooling:
        count = jnp.maximum(lengths, 1).astype(x.dtype)[:, None]
        pooled.append(jnp.where(mask, x, 0).sum(1) / count)
    if "max" in pooling:
        maximum = jnp.where(mask, x, -jnp.inf).max(1)
        pooled.append(jnp.where(lengths[:, None] > 0, maximum, 0))
    if scores is not None:
        # A finite minimum: with -inf, rows without tokens would give NaN.
        weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(x.dtype).min), axis=1)
        pooled.append(jnp.sum(weights * jnp.where(mask, x, 0), axis=1))
    return jnp.concatenate(pooled, axis=-1)


def classify(
    params: Any, batch: Batch, key: Array | None, features: Features, combiner: Any, model: BiLSTMClassifier
) -> Array:
    """Return the logits ``[B, C]`` of documents; the classifier reads them without ``<S>`` and ``</S>``.

    Args:
        params: "combiner", "classifier", the parameters of the features, and perhaps "standardizer": the
            "mean" and the "scale" ``[L, F]`` of the features, which standardize them and are not trained.
        batch: B documents.
        key: Dropout key; None turns dropout off.
        features: Feature function, ``(params, batch, key) -> [L, B, T, F]``.
        combiner: Module from `elmo_jax.models.combiners`.
        model: The classifier.
    """
    keys = (None, None) if key is None else jax.random.split(key)
    if keys[1] is not None and model.config.word_dropout:
        batch = _drop_words(batch, jax.random.fold_in(keys[1], 1), model.config.word_dropout)
    layers = features(params, batch, keys[0])[:, :, 1:-1]
    if "standardizer" in params:
        layers = standardize(jax.lax.stop_gradient(params["standardizer"]), layers)
    x = combiner.apply({"params": params["combiner"]}, layers)  # [B, T - 2, F]
    rngs: Any = {} if key is None else {"dropout": keys[1]}
    lengths = jnp.maximum(batch.lengths - 2, 0)
    logits: Any = model.apply({"params": params["classifier"]}, x, lengths, key is not None, rngs=rngs)
    return logits


def standardize(statistics: Any, layers: Array) -> Array:
    """Return (h - mean) · scale for layers h ``[L, B, T, F]``, with "mean" and "scale" ``[L, F]``.

    The vectors of a layer share a large common part, beside which tokens hardly differ; an LSTM learns
    slowly from such an input.
    """
    mean, scale = (statistics[name][:, None, None] for name in ("mean", "scale"))
    return ((layers - mean) * scale).astype(layers.dtype)


def _drop_words(batch: Batch, key: Array, rate: float) -> Batch:
    """Replace a random fraction of the words, and their characters, by the unknown token."""
    words, chars = jnp.asarray(batch.words), batch.chars
    # Words outside the vocabulary are candidates too: they have characters of their own.
    dropped = jax.random.bernoulli(key, rate, words.shape) & (words >= UNK)
    if chars is not None:
        unknown = jnp.asarray(character_ids([SPECIAL[UNK]])[0, : chars.shape[-1]])
        chars = jnp.where(dropped[..., None], unknown[None, None], chars)
    return replace(batch, words=jnp.where(dropped, UNK, words), chars=chars, unique_words=None)


def static_features(params: Any, batch: Batch, key: Array | None) -> Array:
    """Return word vectors from the fixed table ``params["vectors"]`` as a single layer ``[1, B, T, F]``."""
    return jax.lax.stop_gradient(jnp.take(params["vectors"], batch.words, axis=0))[None]


def classifier_loss(features: Features, combiner: Any, model: BiLSTMClassifier) -> Callable[..., Any]:
    """Return the loss function of the classifier: mean cross-entropy per document.

    Args:
        features: Function from batches to layers, as in `classify`.
        combiner: Combiner module.
        model: Classifier module.

    Returns:
        A pure function ``(params, batch, key) -> (loss, metrics)``; key None turns regularization off.
    """

    def loss_fn(params: Any, batch: Batch, key: Array | None) -> tuple[Array, dict[str, Array]]:
        logits = classify(params, batch, key, features, combiner, model)
        smoothing = 0.0 if key is None else model.config.label_smoothing
        targets = optax.smooth_labels(jax.nn.one_hot(batch.labels, model.classes), smoothing)
        nll = jnp.sum(optax.softmax_cross_entropy(logits, targets) * batch.weight)
        documents = batch.weight.sum()
        confusion = confusion_matrix(batch.labels, logits.argmax(-1), batch.weight, model.classes)
        return nll / jnp.maximum(documents, 1), {"nll": nll, "documents": documents, "confusion": confusion}

    return loss_fn


def confusion_matrix(labels: Array, predicted: Array, weight: Array, classes: int) -> Array:
    """Return weighted counts ``[C, C]`` float32, a row for each true class, a column for each predicted one.

    Args:
        labels: True classes ``[B]`` int32.
        predicted: Predicted classes ``[B]`` int32.
        weight: Weight of each document ``[B]``, 0 for filler rows.
        classes: C.
    """
    rows = jax.nn.one_hot(labels, classes) * weight[:, None]
    return rows.T @ jax.nn.one_hot(predicted, classes)
