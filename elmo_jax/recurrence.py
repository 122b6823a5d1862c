"""The recurrence of a projected LSTM, in several directions at once: one step, and kernels for all.

Nouns: a *state* is the pair (c, h) carried from one step to the next; the *gates* given to
a step are the input's share of them; a *kernel* is one way to run all the steps.
Axes: T time, D direction, B batch, H cells, P projection (P = H without one).
"""

from functools import partial
from typing import Any, NamedTuple

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
    """The recurrent half of a layer: h to gates ``[D, P, 4H]``, and H to P ``[D, H, P]``."""

    recurrent: Array
    projection: Array | None


class Clips(NamedTuple):
    """Symmetric bounds of the cell and of its projection; None is unbounded."""

    cell: float | None = None
    projection: float | None = None


def batched_product(x: Array, w: Array) -> Array:
    """``[..., D, B, I] x [D, I, O] -> [..., D, B, O]`` in w's dtype, summed in float32 at least.

    XLA:CPU runs a batched product at half the rate of a plain one, so there each direction
    is a product of its own; accelerators take all of them in one.
    """
    sums = np.promote_types(w.dtype, np.float32)
    x = x.astype(w.dtype)
    if jax.default_backend() != "cpu":
        return jnp.einsum("...dbi,dio->...dbo", x, w, preferred_element_type=sums)
    rows = [w[d] for d in range(len(w))]  # cut here, not in the loop
    parts = [jnp.matmul(x[..., d, :, :], w_d, preferred_element_type=sums) for d, w_d in enumerate(rows)]
    return jnp.stack(parts, axis=-3)


def _weight_gradient(x: Array, g: Array, dtype: DTypeLike) -> Array:
    """``[T, D, B, I] x [T, D, B, O] -> [D, I, O]``: the product summed over all steps and rows."""
    x, g = (a.swapaxes(0, 1).reshape(a.shape[1], -1, a.shape[3]).astype(dtype) for a in (x, g))
    return batched_product(x.swapaxes(1, 2), g).astype(dtype)


def _clip(x: Array, bound: float | None) -> Array:
    return x if bound is None else jnp.clip(x, -bound, bound)


def lstm_step(state: State, gates: Array, w: Weights, clips: Clips = Clips()) -> State:
    """One step of the projected LSTM of Sak et al. (2014), as bilm-tf runs it.

    z = gates + h W_h, split into i, j, f, o;
    c' = clip(sigmoid(f + 1) c + sigmoid(i) tanh(j));
    h' = clip((sigmoid(o) tanh(c')) W_p).

    Args:
        state: c ``[D, B, H]`` and h ``[D, B, P]``.
        gates: ``[D, B, 4H]``, the input's share x W_x + b of z.
        w: the recurrent weights.
        clips: bounds of c' and h'.

    Returns:
        The next state.
    """
    z = gates + batched_product(state.h, w.recurrent)
    i, j, f, o = jnp.split(z, 4, axis=-1)  # each [D, B, H]
    c = jax.nn.sigmoid(f + FORGET_BIAS) * state.c + jax.nn.sigmoid(i) * jnp.tanh(j)
    c = _clip(c, clips.cell)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    if w.projection is not None:
        h = batched_product(h, w.projection)
    return State(c, _clip(h, clips.projection))


# --- the fast kernel --------------------------------------------------------------------
#
# Two ideas beside the hand-written gradient. A sigmoid is a tanh, sigmoid(x) = (1 +
# tanh(x/2)) / 2, so all four gates are one tanh of the whole row, which XLA:CPU runs four
# times as fast as four functions of four slices. And whatever the backward pass can work
# out for all steps at once is taken out of its loop, which keeps 15 instructions.


_BIAS = (0.0, 0.0, FORGET_BIAS, 0.0)
_SCALE = (0.5, 1.0, 0.5, 0.5)  # of z before the tanh: 1/2 where the gate is a sigmoid


def _by_gate(values: tuple[float, ...], cells: int, dtype: DTypeLike) -> Array:
    """A number for each of the gates i, j, f, o, repeated over its cells: ``[1, 1, 4H]``."""
    return jnp.repeat(jnp.array(values, dtype), cells)[None, None]


def _fast_scan(state: State, gates: Array, w: Weights, clips: Clips) -> tuple[State, Array]:
    """The states after every step, and the tanh of every step's gates ``[T, D, B, 4H]``."""
    cells = state.c.shape[-1]
    bias, scale = (_by_gate(values, cells, gates.dtype) for values in (_BIAS, _SCALE))

    def body(state: State, gates: Array):
        t = jnp.tanh((gates + bias + batched_product(state.h, w.recurrent)) * scale)
        i, j, f, o = jnp.split(t, 4, axis=-1)
        c = _clip(0.5 * ((1 + f) * state.c + (1 + i) * j), clips.cell)
        h = 0.5 * (1 + o) * jnp.tanh(c)
        if w.projection is not None:
            h = batched_product(h, w.projection)
        state = State(c, _clip(h, clips.projection))
        return state, (state, t)

    return jax.lax.scan(body, state, gates, unroll=4)[1]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def fast_recurrence(state: State, gates: Array, w: Weights, clips: Clips) -> State:
    """All steps of `lstm_step`, equal to it in values and gradients, and faster.

    The backward loop carries only the gradients of the state; the weights' gradient is one
    product over all steps after it, rather than a sum kept through the loop.

    Args:
        state: the first state.
        gates: ``[T, D, B, 4H]``, float32 or float64.
        w: the recurrent weights, in the dtype of the products.
        clips: bounds, static.

    Returns:
        The states after every step: c ``[T, D, B, H]``, h ``[T, D, B, P]``.
    """
    return _fast_scan(state, gates, w, clips)[0]


def _fast_forward(state: State, gates: Array, w: Weights, clips: Clips):
    state, gates, w = jax.tree.map(lambda p: p.value, (state, gates, w))
    states, t = _fast_scan(state, gates, w, clips)
    return states, (state, states, t, w)


def _fast_backward(clips: Clips, residuals, grads: State):
    first, states, t, w = residuals
    before = State(*(jnp.concatenate([a[None], s[:-1]]) for a, s in zip(first, states, strict=True)))
    transposed = jax.tree.map(lambda a: a.swapaxes(1, 2), w)
    i, j, f, o = jnp.split(t, 4, axis=-1)
    i, f, o, tanh_c = 0.5 * (1 + i), 0.5 * (1 + f), 0.5 * (1 + o), jnp.tanh(states.c)
    dc_dm = o * (1 - tanh_c * tanh_c)
    dz = jnp.concatenate([j, i, before.c, tanh_c], -1) * (1 - t * t)
    dz = dz * jnp.square(_by_gate(_SCALE, tanh_c.shape[-1], t.dtype))[None]  # [T, D, B, 4H]
    dc_dm, dz, f = jax.lax.optimization_barrier((dc_dm, dz, f))  # or XLA puts them in the loop

    def given(g: Array | SymbolicZero) -> Array | None:  # no gradient, no addition in the loop
        return None if isinstance(g, SymbolicZero) else g

    def inside(x: Array, bound: float | None) -> Array | None:
        return None if bound is None else (jnp.abs(x) < bound).astype(t.dtype)

    def body(carry: State, step):
        grad_c, grad_h, c_inside, h_inside, dc_dm, dz, f = step
        dh = carry.h if grad_h is None else carry.h + grad_h
        dh = dh if h_inside is None else dh * h_inside
        dm = dh if transposed.projection is None else batched_product(dh, transposed.projection)
        dc = carry.c + dm * dc_dm if grad_c is None else carry.c + grad_c + dm * dc_dm
        dc = dc if c_inside is None else dc * c_inside
        dz = jnp.concatenate([dc, dc, dc, dm], axis=-1) * dz
        return State(dc * f, batched_product(dz, transposed.recurrent)), (dz, dh)

    zero = jax.tree.map(jnp.zeros_like, first)
    masks = inside(states.c, clips.cell), inside(states.h, clips.projection)
    steps: Any = (given(grads.c), given(grads.h), *masks, dc_dm, dz, f)
    d_first, (dz, dh) = jax.lax.scan(body, zero, steps, reverse=True)
    d_projection = None
    if w.projection is not None:
        d_projection = _weight_gradient(o * tanh_c, dh, w.projection.dtype)
    return d_first, dz, Weights(_weight_gradient(before.h, dz, w.recurrent.dtype), d_projection)


fast_recurrence.defvjp(_fast_forward, _fast_backward, symbolic_zeros=True)
