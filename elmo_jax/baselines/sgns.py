"""Word vectors by skip-gram with negative sampling (Mikolov et al. 2013), as a task of the one loop.

Nouns: a *span* is T neighbouring tokens of the text, of which each is a *centre*; its
*context* are the tokens at most as many steps away as were drawn for it, in its document; a
span's *negatives* are shared by its centres.
So the pairs of a span are a band of the product of two matrices, which touch 2T + 2W + S rows.
Axes: G spans a step, T centres, W window, C = T + 2W context tokens, S negatives, F features,
V tokens of the vocabulary.
"""

from collections.abc import Iterator
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

SPAN = 32  # T: wider spans make products of which less is used, narrower ones share less
SHARED = 32  # S
_MOST = 5.0  # moves of a row a step, times the rate; training a vocabulary of 60 diverges from 12 on


@struct.dataclass
class Spans:
    """G spans; a JAX pytree.

    Attributes:
        words: ``[G, C]`` int32; the centres are W from either end.
        left, right: ``[G, T]`` int32, context tokens of each centre before and behind it.
        negatives: ``[G, S]`` int32.
    """

    words: Any
    left: Any
    right: Any
    negatives: Any
    BATCH_AXIS: ClassVar[int] = 0  # the axis of G


class SpanStream:
    """A text as spans, in an order that seed and step give; frequent tokens are thinned out.

    Every epoch shuffles the documents, drops each token with the probability of its
    frequency, and draws each centre's reach from 1 to W.

    Args:
        documents: at least one.
        size: V.
        window: W; the spans' own is no wider than the longest document.
        config: of the thinning.
        seed: of the order and the draws.
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
        self.documents, self._reach, self.seed, self.batch_size = documents, window, seed, spans
        self.window = min(window, max(1, int(documents.lengths.max()) - 1))
        self.steps_per_call = steps_per_call
        counts = np.bincount(documents.ids, minlength=size).astype(np.float64)
        with np.errstate(over="ignore"):
            share = np.minimum(counts / counts.sum() / config.subsample, 1e300)
        self._keep = np.minimum(1, (np.sqrt(share) + 1) / np.maximum(share, 1e-12))  # word2vec.c's
        noise = counts**0.75
        self._noise = np.cumsum(noise / noise.sum())
        # The tokens an epoch keeps vary, its steps must not: room for four standard deviations.
        mean = float(counts @ self._keep)
        room = mean + 4 * np.sqrt(float(counts @ (self._keep * (1 - self._keep))))
        self.steps_per_epoch = max(1, int(np.ceil(room / (spans * SPAN))))
        self.tokens_per_epoch = len(documents.ids)

    def _epoch(self, epoch: int) -> Spans:
        """The epoch's spans, leaves ``[steps, G, ...]``."""
        rng = np.random.default_rng([self.seed, epoch])
        w, n = self.window, self.steps_per_epoch * self.batch_size * SPAN
        text = self.documents.take(rng.permutation(len(self.documents)))
        kept = np.flatnonzero(rng.random(len(text.ids), np.float32) < self._keep[text.ids])[:n]
        owner = np.repeat(np.arange(len(text)), text.lengths)[kept]
        lengths = np.bincount(owner, minlength=len(text))
        place = np.arange(len(kept)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        reach = rng.integers(1, self._reach + 1, len(kept))
        left = np.zeros(n, np.int32)
        right = np.zeros(n, np.int32)
        left[: len(kept)] = np.minimum(reach, place)
        right[: len(kept)] = np.minimum(reach, lengths[owner] - 1 - place)
        words = np.full(n + 2 * w, UNK, np.int32)
        words[w : w + len(kept)] = text.ids[kept]
        windows = np.lib.stride_tricks.sliding_window_view(words, SPAN + 2 * w)[::SPAN]
        shape = (self.steps_per_epoch, self.batch_size)
        drawn = np.searchsorted(self._noise, rng.random((*shape, SHARED)), side="right")
        return Spans(
            windows.reshape(*shape, -1),
            left.reshape(*shape, SPAN),
            right.reshape(*shape, SPAN),
            np.minimum(drawn, len(self._noise) - 1).astype(np.int32),
        )

    def shapes(self) -> list[Any]:
        """None: there is one alone."""
        return []

    def document_indices(self, step: int) -> np.ndarray:
        """None: a span goes from one document into the next."""
        return np.zeros(0, np.int64)

    def chunks(self, first: int, last: int, rows: slice = ALL) -> Iterator[StepChunk]:
        """See `elmo_jax.data.batching.Stream.chunks`."""
        step, k = first, self.steps_per_call
        while step < last:
            epoch, start = divmod(step, self.steps_per_epoch)
            end = min(self.steps_per_epoch, start + last - step)
            spans = self._epoch(epoch)
            for begin in range(start, end, k):
                # The last dispatch of an epoch is filled up with steps that are never run.
                steps = np.minimum(np.arange(begin, begin + k), end - 1)
                count = min(k, end - begin)
                yield StepChunk(jax.tree.map(lambda a, steps=steps: a[steps, rows], spans), count)
            step += end - start


def sgns_init(size: int, features: int, key: Array) -> dict[str, Array]:
    """Centre vectors drawn from ±1 / 2F and context vectors of zeros, each ``[V, F]``."""
    centre = jax.random.uniform(key, (size, features), jnp.float32, -0.5 / features, 0.5 / features)
    return {"centre": centre, "context": jnp.zeros((size, features))}


def sgns_rows(batch: Spans, key: Array) -> dict[str, Array]:
    """Which rows of which table a batch touches: ``[G, T]`` and ``[G, C + S]``."""
    words, negatives = jnp.asarray(batch.words), jnp.asarray(batch.negatives)
    window = (words.shape[1] - batch.left.shape[1]) // 2
    return {
        "centre": words[:, window : words.shape[1] - window],
        "context": jnp.concatenate([words, negatives], axis=1),
    }


def sgns_loss(config: SGNSConfig):
    """Sum over pairs of -log σ(u·v) - k mean_s log σ(-u·v_s), where s are the span's negatives.

    The mean over S shared negatives has the expectation of k independent draws for every
    pair. As in the equation, a negative may happen to be the pair's own context.

    Returns:
        A pure ``(rows, batch, key) -> (loss, sums)``, `rows` being `sgns_rows` of the tables.
    """

    def loss(rows: Any, batch: Spans, key: Array) -> tuple[Array, dict[str, Array]]:
        left, right = jnp.asarray(batch.left)[:, :, None], jnp.asarray(batch.right)[:, :, None]
        spans, centres = batch.left.shape
        context = batch.words.shape[1]
        window = (context - centres) // 2
        scores = jnp.einsum("gtf,gcf->gtc", rows["centre"], rows["context"])  # [G, T, C + S]
        steps = jnp.arange(context)[None, :] - jnp.arange(centres)[:, None] - window  # [T, C]
        paired = (steps != 0)[None] & (steps[None] >= -left) & (steps[None] <= right)
        pairs = (left + right).astype(scores.dtype)  # [G, T, 1]
        share = config.negatives / batch.negatives.shape[1]
        seen = jnp.sum(jnp.where(paired, jax.nn.softplus(-scores[:, :, :context]), 0))
        noise = share * jnp.sum(pairs * jax.nn.softplus(scores[:, :, context:]))
        total = jnp.sum(pairs)
        return seen + noise, {"pairs": total}

    return loss


def sgns_optimizer(config: SGNSConfig, window: int, steps: int) -> RowSparseSGD:
    """Stochastic gradient descent on the rows that a batch touches, its rate falling to 0.

    A place stands for up to window + 1 pairs in the mean, and a pair for 1 + negatives moves.
    """
    places = _MOST / (config.rate * (window + 1) * (1 + config.negatives))
    return RowSparseSGD(optax.linear_schedule(config.rate, 0.0, steps), sgns_rows, places)
