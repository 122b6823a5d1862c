"""Drawing the classes that stand for all others in a sampled softmax.

Nouns: a *negative* is a class drawn to stand for all that are not the target; its *expected
count* is how often a draw holds it on average.
Axes: V classes, S negatives.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Negatives(NamedTuple):
    """A draw: the classes ``[S]`` int32, and the log of every class's expected count ``[V]``."""

    classes: Array
    log_expected: Array


def log_uniform_negatives(key: Array, classes: int, count: int) -> Negatives:
    """S classes, those of low number likelier: log-uniform, but none expected above once.

    A log-uniform draw, P(k) = log((k + 2) / (k + 1)) / log(V + 1), fits a vocabulary sorted
    by falling count. Drawn independently it holds the commonest words hundreds of times.
    Here the head of classes that would be expected more than once is taken exactly once
    each, and the rest of the draw is stratified over the log-uniform tail: one uniform
    point in each of equal slices of its distribution. So the expected counts are exact,
    and a draw of all V classes holds each once.

    Args:
        key: PRNG key.
        classes: V.
        count: S <= V.

    Returns:
        The draw.

    Example:
        >>> drawn, log_expected = log_uniform_negatives(jax.random.key(0), 5, 5)
        >>> drawn.tolist(), float(abs(log_expected).max())
        ([0, 1, 2, 3, 4], 0.0)
    """
    if not 0 < count <= classes:
        raise ValueError(f"cannot draw {count} negatives from {classes} classes")
    head = _head(classes, count)
    slices = count - head
    log_expected = np.zeros(classes, np.float32)
    drawn = jnp.arange(head, dtype=jnp.int32)
    if slices:
        k = np.arange(head, classes, dtype=np.float64)
        span = np.log((classes + 1) / (head + 1))
        log_expected[head:] = np.log(slices * np.log1p(1 / (k + 1)) / span)
        u = (jnp.arange(slices, dtype=jnp.float32) + jax.random.uniform(key, (slices,), jnp.float32)) / slices
        tail = jnp.floor((head + 1) * jnp.exp(u * np.float32(span))).astype(jnp.int32) - 1
        drawn = jnp.concatenate([drawn, jnp.clip(tail, head, classes - 1)])
    return Negatives(drawn, jnp.asarray(log_expected))


def _head(classes: int, count: int) -> int:
    """The fewest classes to take for certain so that no other is expected above once."""
    m = np.arange(count, dtype=np.float64)
    expected = (count - m) * np.log1p(1 / (m + 1)) / np.log((classes + 1) / (m + 1))
    enough = np.flatnonzero(expected <= 1)
    return int(enough[0]) if enough.size and count < classes else count
