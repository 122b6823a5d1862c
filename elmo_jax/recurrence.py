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


def _weight_gradient(x: Array, g: Array, dtype: DTypeLike) -> Array:
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
# functions of four slices. Whatever the backward pass can work out for all steps at once is
# taken out of its loop. And the loops write where they read, the gates' tanh over the gates
# and the gates' gradient over its factor, rather than fill a new array of that size first.


_TIME = 2
_BIAS = (0.0, 0.0, FORGET_BIAS, 0.0)
_SCALE = (0.5, 1.0, 0.5, 0.5)  # of z before the tanh: 1/2 where the gate is a sigmoid


def _by_gate(values: tuple[float, ...], cells: int, dtype: DTypeLike) -> Array:
    """A number for each of the gates i, j, f, o, repeated over its cells: ``[1, 1, 4H]``."""
    return jnp.repeat(jnp.array(values, dtype), cells)[None, None]


def _at(x: Array, t: Array) -> Array:
    """A step of ``[D, B, T, ...]``."""
    return jax.lax.dynamic_index_in_dim(x, t, _TIME, keepdims=False)


def _put(x: Array, value: Array, t: Array) -> Array:
    """``[D, B, T, ...]`` with one step replaced."""
    return jax.lax.dynamic_update_index_in_dim(x, value, t, _TIME)


def _fast_scan(state: State, gates: Array, w: Weights, clips: Clips) -> tuple[State, Array]:
    """The states after every step, and the tanh of every step's gates ``[D, B, T, 4H]``."""
    cells, steps = state.c.shape[-1], gates.shape[_TIME]
    bias, scale = (_by_gate(values, cells, gates.dtype) for values in (_BIAS, _SCALE))
    bias = bias + w.bias[:, None].astype(gates.dtype)

    def body(n: Array, carry: tuple[State, State, Array]):
        state, states, gates = carry
        t = jnp.tanh((_at(gates, n) + batched_product(state.h, w.recurrent) + bias) * scale)
        i, j, f, o = jnp.split(t, 4, axis=-1)
        c = _clip(0.5 * ((1 + f) * state.c + (1 + i) * j), clips.cell)
        h = 0.5 * (1 + o) * jnp.tanh(c)
        if w.projection is not None:
            h = batched_product(h, w.projection)
        state = State(c, _clip(h, clips.projection))
        states = State(*(_put(every, now, n) for every, now in zip(states, state, strict=True)))
        return state, states, _put(gates, t, n)

    states = jax.tree.map(lambda a: jnp.zeros((*gates.shape[:3], a.shape[-1]), a.dtype), state)
    _, states, t = jax.lax.fori_loop(0, steps, body, (state, states, gates))
    return states, t


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
    return _fast_scan(state, gates, w, clips)[0]


def _fast_forward(state: State, gates: Array, w: Weights, clips: Clips):
    state, gates, w = jax.tree.map(lambda p: p.value, (state, gates, w))
    states, t = _fast_scan(state, gates, w, clips)
    return states, (state, states, t, w)


def _before(first: Array, after: Array) -> Array:
    """What each step began with, of what it left ``[D, B, T, ...]``."""
    return jnp.concatenate([jnp.expand_dims(first, _TIME), after[:, :, :-1]], axis=_TIME)


def _fast_backward(clips: Clips, residuals, grads: State):
    first, states, t, w = residuals
    before = jax.tree.map(_before, first, states)
    to_h = w.recurrent.swapaxes(1, 2)
    to_m = None if w.projection is None else w.projection.swapaxes(1, 2)
    i, j, f, o = jnp.split(t, 4, axis=-1)
    i, f, o, tanh_c = 0.5 * (1 + i), 0.5 * (1 + f), 0.5 * (1 + o), jnp.tanh(states.c)
    dc_dm = o * (1 - tanh_c * tanh_c)
    factor = jnp.concatenate([j, i, before.c, tanh_c], -1) * (1 - t * t)
    factor = factor * jnp.square(_by_gate(_SCALE, tanh_c.shape[-1], t.dtype))[None]  # [D, B, T, 4H]
    dc_dm, factor, f = jax.lax.optimization_barrier((dc_dm, factor, f))  # or XLA puts them in the loop

    def inside(x: Array, bound: float | None) -> Array | None:
        return None if bound is None else (jnp.abs(x) < bound).astype(t.dtype)

    c_inside, h_inside = inside(states.c, clips.cell), inside(states.h, clips.projection)
    # No gradient, no addition in the loop.
    grad_c, grad_h = (None if isinstance(g, SymbolicZero) else g for g in grads)
    steps = t.shape[_TIME]

    def body(k: Array, carry):
        after, dz, dhs = carry
        n = steps - 1 - k
        dh = after.h if grad_h is None else after.h + _at(grad_h, n)
        dh = dh if h_inside is None else dh * _at(h_inside, n)
        dm = dh if to_m is None else batched_product(dh, to_m)
        dc = after.c + dm * _at(dc_dm, n)
        dc = dc if grad_c is None else dc + _at(grad_c, n)
        dc = dc if c_inside is None else dc * _at(c_inside, n)
        now = jnp.concatenate([dc, dc, dc, dm], axis=-1) * _at(dz, n)
        dhs = None if dhs is None else _put(dhs, dh, n)
        return State(dc * _at(f, n), batched_product(now, to_h)), _put(dz, now, n), dhs

    zero = jax.tree.map(jnp.zeros_like, (first, None if to_m is None else states.h))
    d_first, dz, dh = jax.lax.fori_loop(0, steps, body, (zero[0], factor, zero[1]))
    d_projection = None
    if w.projection is not None:
        d_projection = _weight_gradient(o * tanh_c, dh, w.projection.dtype)
    d_recurrent = _weight_gradient(before.h, dz, w.recurrent.dtype)
    return d_first, dz, Weights(d_recurrent, dz.sum((1, 2)).astype(w.bias.dtype), d_projection)


fast_recurrence.defvjp(_fast_forward, _fast_backward, symbolic_zeros=True)
