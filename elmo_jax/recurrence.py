"""The recurrence of a projected LSTM, in several directions at once: one step, and kernels for all.

Nouns: a *state* is the pair (c, h) carried from one step to the next; the *gates* given to
a step are the input's share of them; a *kernel* is one way to run all the steps.
Axes: D direction, B batch, T time, H cells, P projection (P = H without one).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

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
    y = jnp.einsum("dni,dio->dno", _rows(x).astype(w.dtype), w, preferred_element_type=sums)
    return y.reshape(*x.shape[:-1], -1)


def weight_gradient(x: Array, g: Array, dtype: DTypeLike) -> Array:
    """``[D, ..., I] x [D, ..., O] -> [D, I, O]``: the product summed over all steps and rows."""
    sums = np.promote_types(dtype, np.float32)
    x, g = _rows(x).astype(dtype), _rows(g).astype(dtype)
    return jnp.einsum("dni,dno->dio", x, g, preferred_element_type=sums).astype(dtype)


def _rows(x: Array) -> Array:
    """``[D, ..., I]`` to ``[D, N, I]``: XLA:CPU copies what has more axes than a product needs."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


def _clip(x: Array, bound: float | None) -> Array:
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
    i, j, f, o = jnp.split(z, 4, axis=-1)  # each [D, B, H]
    c = jax.nn.sigmoid(f + FORGET_BIAS) * state.c + jax.nn.sigmoid(i) * jnp.tanh(j)
    c = _clip(c, clips.cell)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    if w.projection is not None:
        h = batched_product(h, w.projection)
    return State(c, _clip(h, clips.projection))


# --- the fast kernel --------------------------------------------------------------------
#
# Beside the hand-written gradient: a sigmoid is a tanh, sigmoid(x) = (1 + tanh(x/2)) / 2, so
# all four gates are one tanh of the whole row, which XLA:CPU runs four times as fast as four
# functions of four slices. Whatever the backward pass needs of a step is worked out where the
# step is taken, while it lies in the cache, so that the backward loop only multiplies and no
# array of all steps is made between the two. And the loops write where they read, the slopes
# over the gates and the gates' gradient over the slopes.


_TIME = 2
_BIAS = (0.0, 0.0, FORGET_BIAS, 0.0)
_SCALE = (0.5, 1.0, 0.5, 0.5)  # of z before the tanh: 1/2 where the gate is a sigmoid


class _Slopes(NamedTuple):
    """What the backward pass reads of every step beside the gates' slopes, ``[D, B, T, .]``.

    ``m`` is h before its projection, ``kept`` the slope of c by the c before (0 where c was
    clipped), ``shown`` that of m by c. ``m`` and ``inside``, 1 where h was not clipped, are
    None where there is no projection, or no clip.
    """

    kept: Array
    shown: Array
    m: Array | None
    inside: Array | None


def _by_gate(values: tuple[float, ...], cells: int, dtype: DTypeLike) -> Array:
    """A number for each of the gates i, j, f, o, repeated over its cells: ``[1, 1, 4H]``."""
    return jnp.repeat(jnp.array(values, dtype), cells)[None, None]


def _at(x: Array, t: Array) -> Array:
    """A step of ``[D, B, T, ...]``."""
    return jax.lax.dynamic_index_in_dim(x, t, _TIME, keepdims=False)


def _put(x: Array, value: Array, t: Array, column: int = 0) -> Array:
    """``[D, B, T, N]`` with one step replaced, or as many of its columns as there are values."""
    return jax.lax.dynamic_update_slice(x, jnp.expand_dims(value, _TIME), (0, 0, t, column))


def _inside(x: Array, bound: float | None) -> Array | None:
    return None if bound is None else (jnp.abs(x) < bound).astype(x.dtype)


def _masked(x: Array, mask: Array | None) -> Array:
    return x if mask is None else x * mask


def _fast_scan(state: State, gates: Array, w: Weights, clips: Clips, differentiated: bool):
    """The states after every step and, if `differentiated`, the slopes.

    Those of c by i, j and f, where it was not clipped, and of m by o take the gates' places.
    """
    cells, steps = state.c.shape[-1], gates.shape[_TIME]
    bias, scale = (_by_gate(values, cells, gates.dtype) for values in (_BIAS, _SCALE))
    bias = bias + w.bias[:, None].astype(gates.dtype)

    def body(n: Array, carry: tuple[State, State, Array, _Slopes | None]):
        before, states, gates, slopes = carry
        t = jnp.tanh((_at(gates, n) + batched_product(before.h, w.recurrent) + bias) * scale)
        i, j, f, o = jnp.split(t, 4, axis=-1)
        i, f, o = 0.5 * (1 + i), 0.5 * (1 + f), 0.5 * (1 + o)
        c = _clip(f * before.c + i * j, clips.cell)
        tanh_c = jnp.tanh(c)
        m = o * tanh_c
        h = _clip(m if w.projection is None else batched_product(m, w.projection), clips.projection)
        if slopes is not None:
            inside = _inside(c, clips.cell)
            by_gate = (j * i * (1 - i), i * (1 - j * j), before.c * f * (1 - f))
            by_gate = (*(_masked(x, inside) for x in by_gate), tanh_c * o * (1 - o))
            for k, slope in enumerate(by_gate):  # each to its place: side by side first is a copy more
                gates = _put(gates, slope, n, k * cells)
            made = _Slopes(
                _masked(f, inside),
                o * (1 - tanh_c * tanh_c),
                None if w.projection is None else m,
                _inside(h, clips.projection),
            )
            slopes = jax.tree.map(lambda every, now: _put(every, now, n), slopes, made)
        states = State(_put(states.c, c, n), _put(states.h, h, n))
        return State(c, h), states, gates, slopes

    states = jax.tree.map(lambda a: jnp.zeros((*gates.shape[:3], a.shape[-1]), a.dtype), state)
    slopes = None
    if differentiated:
        m = None if w.projection is None else states.c
        slopes = _Slopes(states.c, states.c, m, None if clips.projection is None else states.h)
    return jax.lax.fori_loop(0, steps, body, (state, states, gates, slopes))[1:]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def fast_recurrence(state: State, gates: Array, w: Weights, clips: Clips) -> State:
    """All steps of `lstm_step`, equal to it in values and gradients, and faster.

    The backward loop carries only the gradients of the state; the weights' gradient is one
    product over all steps after it, rather than a sum kept through the loop.

    Args:
        state: the first state.
        gates: ``[D, B, T, 4H]``, float32 or float64.
        w: the recurrent weights, in the dtype of the products.
        clips: bounds, static.

    Returns:
        The states after every step: c ``[D, B, T, H]``, h ``[D, B, T, P]``.
    """
    return _fast_scan(state, gates, w, clips, differentiated=False)[0]


def _fast_forward(state: State, gates: Array, w: Weights, clips: Clips):
    state, gates, w = jax.tree.map(lambda p: p.value, (state, gates, w))
    states, by_gate, slopes = _fast_scan(state, gates, w, clips, differentiated=True)
    return states, (state, states.h, by_gate, slopes, w)


def _fast_backward(clips: Clips, residuals, grads: State):
    first, h, by_gate, slopes, w = residuals
    to_h = w.recurrent.swapaxes(1, 2)
    to_m = None if w.projection is None else w.projection.swapaxes(1, 2)
    # No gradient, no addition in the loop.
    grad_c, grad_h = (None if isinstance(g, SymbolicZero) else g for g in grads)
    steps = h.shape[_TIME]

    def body(k: Array, carry):
        after, dz, dhs = carry
        n = steps - 1 - k
        dh = after.h if grad_h is None else after.h + _at(grad_h, n)
        dh = dh if slopes.inside is None else dh * _at(slopes.inside, n)
        dm = dh if to_m is None else batched_product(dh, to_m)
        dc = after.c + dm * _at(slopes.shown, n)
        dc = dc if grad_c is None else dc + _at(grad_c, n)
        now = jnp.concatenate([dc, dc, dc, dm], axis=-1) * _at(dz, n)
        dhs = None if dhs is None else _put(dhs, dh, n)
        return State(dc * _at(slopes.kept, n), batched_product(now, to_h)), _put(dz, now, n), dhs

    zero = jax.tree.map(jnp.zeros_like, (first, None if to_m is None else h))
    d_first, dz, dh = jax.lax.fori_loop(0, steps, body, (zero[0], by_gate, zero[1]))
    d_projection = None
    if slopes.m is not None:
        d_projection = weight_gradient(slopes.m, dh, w.recurrent.dtype)
    before = jnp.concatenate([jnp.expand_dims(first.h, _TIME), h[:, :, :-1]], axis=_TIME)
    d_recurrent = weight_gradient(before, dz, w.recurrent.dtype)
    return d_first, dz, Weights(d_recurrent, dz.sum((1, 2)).astype(w.bias.dtype), d_projection)


fast_recurrence.defvjp(_fast_forward, _fast_backward, symbolic_zeros=True)
