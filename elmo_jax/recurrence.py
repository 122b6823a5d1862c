"""The recurrence of a projected LSTM, in several directions at once: one step, and what its kernels share.

Nouns: a *state* is the pair (c, h) carried from one step to the next; the *gates* given to
a step are the input's share of them; a *kernel* is one way to run all the steps.
Axes: D direction, B batch, T time, H cells, P projection (P = H without one).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

GATES = 4  # i, j, f, o: in, new, forget and out, in the official format's order
FORGET_BIAS = 1.0  # added when the cell runs, never stored, as in the official format


class State(NamedTuple):
    """What a layer carries between steps: c ``[D, B, H]`` and h ``[D, B, P]``."""

    c: Array
    h: Array


class Weights(NamedTuple):
    """A layer past its input: h to gates ``[D, P, 4H]``, their bias ``[D, 4H]``, H to P ``[D, H, P]``."""

    recurrent: Array
    bias: Array
    projection: Array | None


class Clips(NamedTuple):
    """Symmetric bounds of the cell and of its projection; None is unbounded."""

    cell: float | None = None
    projection: float | None = None


def batched_product(x: Array, w: Array) -> Array:
    """``[D, ..., I] x [D, I, O] -> [D, ..., O]`` in w's dtype, summed in float32 at least."""
    sums = np.promote_types(w.dtype, np.float32)
    rows = x.reshape(len(x), -1, x.shape[-1]).astype(w.dtype)  # XLA:CPU copies what has more axes
    y = jnp.einsum("dni,dio->dno", rows, w, preferred_element_type=sums)
    return y.reshape(*x.shape[:-1], -1)


def clip(x: Array, bound: float | None) -> Array:
    """x within +-bound, None being no bound."""
    return x if bound is None else jnp.clip(x, -bound, bound)


def lstm_step(state: State, gates: Array, w: Weights, clips: Clips = Clips()) -> State:
    """One step of the projected LSTM of Sak et al. (2014), as bilm-tf runs it.

    z = gates + h W_h + b, split into i, j, f, o;
    c' = clip(sigmoid(f + 1) c + sigmoid(i) tanh(j));
    h' = clip((sigmoid(o) tanh(c')) W_p).

    Args:
        state: c ``[D, B, H]`` and h ``[D, B, P]``.
        gates: ``[D, B, 4H]``, the input's share x W_x of z.
        w: the recurrent weights.
        clips: bounds of c' and h'.

    Returns:
        The next state.
    """
    z = gates + batched_product(state.h, w.recurrent) + w.bias[:, None].astype(gates.dtype)
    i, j, f, o = jnp.split(z, GATES, axis=-1)  # each [D, B, H]
    c = jax.nn.sigmoid(f + FORGET_BIAS) * state.c + jax.nn.sigmoid(i) * jnp.tanh(j)
    c = clip(c, clips.cell)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    if w.projection is not None:
        h = batched_product(h, w.projection)
    return State(c, clip(h, clips.projection))
