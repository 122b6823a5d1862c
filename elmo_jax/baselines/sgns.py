"""Word vectors from skip-gram with negative sampling (Mikolov et al. 2013), trained by the common loop.

Training reads the text in spans of T neighbouring tokens, the centres. A centre's context is the tokens of
its document up to a sampled reach of at most W to either side, and all centres of a span share S negative
samples. So the scores of a span's pairs are a band of one matrix product ``[T, F] x [F, T + 2W + S]``.
Other axes: G spans of a step, C = T + 2W tokens of a span with its context.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from elmo_jax.config import SGNSConfig
from elmo_jax.data.batching import ALL, Documents, StepChunk
from elmo_jax.data.text import UNK
from elmo_jax.training.optimizers import RowSparseSGD

SPAN = 32  # T: longer spans use less of each product, shorter ones share less
SHARED_NEGATIVES = 32  # S
# Bound on the updates of a row in a step, times the learning rate. With 60 words, 12 diverges.
_MAX_ROW_UPDATE = 5.0


@struct.dataclass
class Spans:
    """Batch of G spans; a JAX pytree.

    Attributes:
        words: int32 ``[G, C]``; the centres are all but the first and last W.
        left, right: int32 ``[G, T]``, number of context tokens before and after each centre.
        negatives: int32 ``[G, S]``.
    """

    words: Any
    left: Any
    right: Any
    negatives: Any
    BATCH_AXIS: ClassVar[int] = 0


class SpanStream:
    """Stream of spans; the batch of a step depends on (seed, step) alone.

    Each epoch shuffles the documents, drops frequent tokens at random and samples the reach of each centre
    from 1 to the window.

    Args:
        documents: At least one document.
        size: V.
        window: Largest reach; W is smaller if no document is that long.
        config: Subsampling.
        seed: Random seed of everything above and of the negative samples.
        spans: G.
        steps_per_call: K.
    """

    def __init__(
        self,
        documents: Documents,
        size: int,
        window: int,
        config: SGNSConfig,
        seed: int,
        spans: int = 32,
        steps_per_call: int = 32,
    ):
        self.documents, self.seed, self.batch_size = documents, seed, spans
        self.steps_per_call, self._max_reach = steps_per_call, window
        self.window = min(window, max(1, int(documents.lengths.max()) - 1))
        counts = np.bincount(documents.ids, minlength=size).astype(np.float64)
        with np.errstate(over="ignore"):
            frequency = np.minimum(counts / counts.sum() / config.subsample, 1e300)
        # Probability to keep a token, by the formula of word2vec.c.
        self._keep = np.minimum(1, (np.sqrt(frequency) + 1) / np.maximum(frequency, 1e-12))
        noise = counts**0.75
        self._noise = np.cumsum(noise / noise.sum())
        # All epochs have the same number of steps, enough for four standard deviations above the mean.
        mean = float(counts @ self._keep)
        most = mean + 4 * np.sqrt(float(counts @ (self._keep * (1 - self._keep))))
        self.steps_per_epoch = max(1, int(np.ceil(most / (spans * SPAN))))
        self.tokens_per_epoch = len(documents.ids)

    def _make_epoch(self, epoch: int) -> Spans:
        """Return all spans of an epoch, leaves ``[steps, G, ...]``."""
        rng = np.random.default_rng([self.seed, epoch])
        w, n = self.window, self.steps_per_epoch * self.batch_size * SPAN
        text = self.documents.take(rng.permutation(len(self.documents)))
        kept = np.flatnonzero(rng.random(len(text.ids), np.float32) < self._keep[text.ids])[:n]
        document = np.repeat(np.arange(len(text)), text.lengths)[kept]
        lengths = np.bincount(document, minlength=len(text))
        position = np.arange(len(kept)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        reach = rng.integers(1, self._max_reach + 1, len(kept))
        left, right = np.zeros((2, n), np.int32)
        left[: len(kept)] = np.minimum(reach, position)
        right[: len(kept)] = np.minimum(reach, lengths[document] - 1 - position)
        words = np.full(n + 2 * w, UNK, np.int32)
        words[w : w + len(kept)] = text.ids[kept]
        windows = np.lib.stride_tricks.sliding_window_view(words, SPAN + 2 * w)[::SPAN]
        shape = (self.steps_per_epoch, self.batch_size)
        negatives = np.searchsorted(self._noise, rng.random((*shape, SHARED_NEGATIVES)), side="right")
        return Spans(
            windows.reshape(*shape, -1),
            left.reshape(*shape, SPAN),
            right.reshape(*shape, SPAN),
            np.minimum(negatives, len(self._noise) - 1).astype(np.int32),
        )

    group_scale = 1  # unused

    def shapes(self) -> list[Any]:
        """Return an empty list: all steps have the same shape."""
        return []

    def document_indices(self, step: int) -> np.ndarray:
        """Return an empty array: a step cannot be attributed to documents."""
        return np.zeros(0, np.int64)

    def chunks(self, first: int, last: int, rows: slice = ALL) -> Iterator[StepChunk]:
        """Yield the batches of steps, see `elmo_jax.data.batching.Stream.chunks`."""
        step, k = first, self.steps_per_call
        while step < last:
            epoch, start = divmod(step, self.steps_per_epoch)
            end = min(self.steps_per_epoch, start + last - step)
            spans = self._make_epoch(epoch)
            for begin in range(start, end, k):
                # An epoch's last chunk is filled up to K steps, which are not run.
                steps = np.minimum(np.arange(begin, begin + k), end - 1)
                chunk = jax.tree.map(lambda a, steps=steps: a[steps, rows], spans)
                yield StepChunk(chunk, min(k, end - begin))
            step += end - start


def sgns_init(size: int, features: int, key: Array) -> dict[str, Array]:
    """Return the initial tables ``[V, F]``: uniform centre vectors in ±1 / 2F, context vectors of zeros."""
    centre = jax.random.uniform(key, (size, features), jnp.float32, -0.5 / features, 0.5 / features)
    return {"centre": centre, "context": jnp.zeros((size, features))}


def sgns_rows(batch: Spans, key: Array) -> dict[str, Array]:
    """Return the rows of each table that a batch uses: centre ``[G, T]`` and context ``[G, C + S]``."""
    words, negatives = jnp.asarray(batch.words), jnp.asarray(batch.negatives)
    window = (words.shape[1] - batch.left.shape[1]) // 2
    return {
        "centre": words[:, window : words.shape[1] - window],
        "context": jnp.concatenate([words, negatives], axis=1),
    }


def sgns_loss(config: SGNSConfig) -> Callable[..., Any]:
    """Return the loss function of SGNS, summed over all pairs of a centre u and a context word v.

    For each pair it is -log σ(u·v) - k mean_s log σ(-u·v_s) over the S negative samples v_s of the span. The
    mean has the expectation of k samples for each pair. As in the paper, v_s may be equal to v.

    Returns:
        A pure function ``(rows, batch, key) -> (loss, metrics)`` of the rows `sgns_rows` of the tables.
    """

    def loss_fn(rows: Any, batch: Spans, key: Array) -> tuple[Array, dict[str, Array]]:
        left, right = jnp.asarray(batch.left)[:, :, None], jnp.asarray(batch.right)[:, :, None]
        t, c, s = batch.left.shape[1], batch.words.shape[1], batch.negatives.shape[1]
        scores = jnp.einsum("gtf,gcf->gtc", rows["centre"], rows["context"])  # [G, T, C + S]
        distance = jnp.arange(c)[None, :] - jnp.arange(t)[:, None] - (c - t) // 2  # [T, C]
        is_pair = (distance != 0)[None] & (distance[None] >= -left) & (distance[None] <= right)
        pairs = (left + right).astype(scores.dtype)  # [G, T, 1]
        positive = jnp.sum(jnp.where(is_pair, jax.nn.softplus(-scores[:, :, :c]), 0))
        negative = config.negatives / s * jnp.sum(pairs * jax.nn.softplus(scores[:, :, c:]))
        return positive + negative, {"pairs": jnp.sum(pairs)}

    return loss_fn


def sgns_optimizer(config: SGNSConfig, window: int, steps: int) -> RowSparseSGD:
    """Return SGD on the rows that a batch uses, with a learning rate that falls to 0 over `steps`.

    An occurrence of a word has window + 1 pairs on average, and each pair 1 + negatives updates.
    """
    max_occurrences = _MAX_ROW_UPDATE / (config.rate * (window + 1) * (1 + config.negatives))
    return RowSparseSGD(optax.linear_schedule(config.rate, 0.0, steps), sgns_rows, max_occurrences)
