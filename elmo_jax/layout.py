"""How arrays lie while an LSTM's steps are taken, and what is done to them that depends on it.

Nouns: a step of an array is ``[B, N]`` for N features, and all steps lie side by side, ``[B, T * N]``;
where they are *turned*, a step is ``[N, B]``, all are ``[N, T * B]``, and a matrix ``[I, O]`` is ``[O, I]``.
Any of them may have an axis of directions before these. What no product over all steps reads lies
a step after the other, ``[T, ...]``, so that a step is read and written without leaps.
Axes: B batch, T time, I and O features before and after a matrix.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Layout(NamedTuple):
    """Static, and the same for all arrays of a layer.

    Attributes:
        steps: T, at least 1.
        turned: whether rows lie side by side, not features. A core is the faster for it, but
            devices cannot share rows out that lie so.

    Example:
        >>> layout = Layout(steps=2, turned=False)
        >>> layout.at(jnp.array([[1, 2, 3, 4]]), 1).tolist()  # of one row, two features
        [[3, 4]]
    """

    steps: int
    turned: bool

    @property
    def features(self) -> int:
        """Their axis in a step."""
        return -2 if self.turned else -1

    @property
    def rows(self) -> int:
        """Their axis in a step."""
        return -3 - self.features

    def turn(self, a: Array) -> Array:
        """From and to ``[B, N]``, ``[B, T, N]``, ``[I, O]`` or a bias ``[N]``, of one direction."""
        return a.T if self.turned else a

    def flat(self, a: Array) -> Array:
        """All steps side by side, from ``[B, T, N]`` or what `turn` makes of it."""
        return a.reshape(*a.shape[:-2], a.shape[-2] * a.shape[-1])

    def unflat(self, a: Array, step: Array) -> Array:
        """`flat` undone, for steps of that shape."""
        return a.reshape(*step.shape[:-1], self.steps, step.shape[-1])

    def at(self, a: Array, n: Array | int) -> Array:
        """Step n of all."""
        width = a.shape[-1] // self.steps
        return jax.lax.dynamic_slice_in_dim(a, n * width, width, axis=-1, allow_negative_indices=False)

    def put(self, a: Array, value: Array, n: Array | int, feature: int = 0) -> Array:
        """All steps with step n replaced, or as many of its features as there are values."""
        begin = n * (a.shape[-1] // self.steps)
        at = (feature, begin) if self.turned else (0, begin + feature)
        at = (0,) * (a.ndim - 2) + at
        return jax.lax.dynamic_update_slice(a, value, at, allow_negative_indices=False)

    def product(self, a: Array, w: Array) -> Array:
        """A step's features times a matrix, in its dtype, summed in float32 at least."""
        pair = (w, a.astype(w.dtype)) if self.turned else (a.astype(w.dtype), w)
        return jnp.matmul(*pair, preferred_element_type=np.promote_types(w.dtype, np.float32))

    def products(self, a: Array, w: Array) -> Array:
        """The same of all steps, side by side."""
        if self.turned:
            return self.product(a, w)
        made = self.product(_by_step(a, w.shape[-2]), w)
        return made.reshape(*a.shape[:-1], self.steps * w.shape[-1])

    def matrix_gradient(self, a: Array, g: Array, w: Array) -> Array:
        """Of a matrix: from all steps' features before it, and the gradient of those after it."""
        a, g = a.astype(w.dtype), g.astype(w.dtype)
        pair = (g, a.mT) if self.turned else (_by_step(a, w.shape[-2]).mT, _by_step(g, w.shape[-1]))
        sums = np.promote_types(w.dtype, np.float32)
        return jnp.matmul(*pair, preferred_element_type=sums).astype(w.dtype)

    def bias_gradient(self, g: Array, bias: Array) -> Array:
        """Of what is added to every step."""
        total = g.sum(-1) if self.turned else _by_step(g, bias.shape[-1]).sum(-2)
        return total.astype(bias.dtype)


def nth(every: Array, n: Array) -> Array:
    """Step n of what lies a step after the other."""
    return jax.lax.dynamic_index_in_dim(every, n, keepdims=False, allow_negative_indices=False)


def with_nth(every: Array, value: Array, n: Array) -> Array:
    """The same with step n replaced."""
    return jax.lax.dynamic_update_index_in_dim(every, value, n, 0, allow_negative_indices=False)


def _by_step(a: Array, features: int) -> Array:
    """``[B, T * N]`` as ``[B * T, N]``."""
    return a.reshape(*a.shape[:-2], a.shape[-2] * a.shape[-1] // features, features)
