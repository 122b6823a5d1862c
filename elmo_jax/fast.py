"""The kernel that runs wherever no other can: loops over the steps, with a hand-written gradient.

Beside the hand-written gradient: a sigmoid is a tanh, sigmoid(x) = (1 + tanh(x/2)) / 2, so all
four gates are one tanh of the whole row, which XLA:CPU runs four times as fast as four
functions of four slices. Whatever the backward pass needs of a step is worked out where the
step is taken, while it lies in the cache, so that the backward loop only multiplies and no
array of all steps is made between the two. And the loops write where they read, the slopes over
the gates and the gates' gradient over the slopes.

What is fastest is chosen for JAX's default backend, when a program is traced; any other runs it too.

Nouns: as in `recurrence`; a *part* is some of the directions, with arrays of their own.
Axes: D direction, B batch, T time, H cells, P projection (P = H without one).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from elmo_jax.recurrence import FORGET_BIAS, Clips, State, Weights, batched_product, clip, weight_gradient

# Of a direction's recurrent weights; with fewer its products are too small to be shared out to cores.
APART_BYTES = 4 << 20

_Step: TypeAlias = Callable[[Array, Any], Any]  # (n, what is carried) -> what is carried
_States: TypeAlias = tuple[State, ...]
_Arrays: TypeAlias = tuple[Array, ...]
_Many: TypeAlias = tuple[Weights, ...]

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


def _at(x: Array, t: Array | int) -> Array:
    """A step of ``[D, B, T, ...]``."""
    return jax.lax.dynamic_index_in_dim(x, t, _TIME, keepdims=False)


def _put(x: Array, value: Array, t: Array, column: int = 0) -> Array:
    """``[D, B, T, N]`` with one step replaced, or as many of its columns as there are values."""
    return jax.lax.dynamic_update_slice(x, jnp.expand_dims(value, _TIME), (0, 0, t, column))


def _inside(x: Array, bound: float | None) -> Array | None:
    return None if bound is None else (jnp.abs(x) < bound).astype(x.dtype)


def _masked(x: Array, mask: Array | None) -> Array:
    return x if mask is None else x * mask


def _steps_of(parts: Sequence[tuple[Any, _Step]], steps: int) -> tuple[Any, ...]:
    """What the parts carry after as many steps, each step taken by all of them in one loop.

    So XLA:CPU takes the parts' products side by side, each on a core, where the products of one
    array run one after the other on one core if they are as small as a step's.
    """
    carries, step_of = zip(*parts, strict=True)

    def body(n: Array, carries: tuple[Any, ...]):
        return tuple(step(n, carry) for step, carry in zip(step_of, carries, strict=True))

    return jax.lax.fori_loop(0, steps, body, carries)


def _forward_part(state: State, gates: Array, w: Weights, clips: Clips, differentiated: bool):
    """What the loop over steps begins with, and its step; see `_forward`."""
    cells = state.c.shape[-1]
    bias, scale = (_by_gate(values, cells, gates.dtype) for values in (_BIAS, _SCALE))
    bias = bias + w.bias[:, None].astype(gates.dtype)

    def step(n: Array, carry: tuple[State, State, Array, _Slopes | None]):
        before, states, gates, slopes = carry
        t = jnp.tanh((_at(gates, n) + batched_product(before.h, w.recurrent) + bias) * scale)
        i, j, f, o = jnp.split(t, 4, axis=-1)
        i, f, o = 0.5 * (1 + i), 0.5 * (1 + f), 0.5 * (1 + o)
        c = clip(f * before.c + i * j, clips.cell)
        tanh_c = jnp.tanh(c)
        m = o * tanh_c
        h = clip(m if w.projection is None else batched_product(m, w.projection), clips.projection)
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
    return (state, states, gates, slopes), step


def _forward(state: _States, gates: _Arrays, w: _Many, clips: Clips, differentiated: bool):
    """Of every part the states after every step and, if `differentiated`, the slopes.

    The slopes of c by i, j and f, where it was not clipped, and of m by o take the gates' places.
    """
    parts = [_forward_part(*part, clips, differentiated) for part in zip(state, gates, w, strict=True)]
    return [carry[1:] for carry in _steps_of(parts, gates[0].shape[_TIME])]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recurrences(state: _States, gates: _Arrays, w: _Many, clips: Clips) -> _States:
    """Of every part, which has nothing to do with the others, what `fast_recurrence` returns; in one loop."""
    return tuple(states for states, _, _ in _forward(state, gates, w, clips, differentiated=False))


def _recurrences_forward(state: _States, gates: _Arrays, w: _Many, clips: Clips):
    state, gates, w = jax.tree.map(lambda p: p.value, (state, gates, w))
    made = _forward(state, gates, w, clips, differentiated=True)
    kept = [(first, states.h, *saved, ww) for first, (states, *saved), ww in zip(state, made, w, strict=True)]
    return tuple(states for states, _, _ in made), kept


def _backward_part(residuals, grads: State):
    """What the loop over steps, the last first, begins with, and its step."""
    first, h, by_gate, slopes, w = residuals
    to_h = w.recurrent.swapaxes(1, 2)
    to_m = None if w.projection is None else w.projection.swapaxes(1, 2)
    # No gradient, no addition in the loop.
    grad_c, grad_h = (None if isinstance(g, SymbolicZero) else g for g in grads)
    steps, cells = h.shape[_TIME], first.c.shape[-1]

    def step(k: Array, carry):
        after, dz, now, dhs = carry
        n = steps - 1 - k
        dh = after.h if grad_h is None else after.h + _at(grad_h, n)
        dh = dh if slopes.inside is None else dh * _at(slopes.inside, n)
        dm = dh if to_m is None else batched_product(dh, to_m)
        dc = after.c + dm * _at(slopes.shown, n)
        dc = dc if grad_c is None else dc + _at(grad_c, n)
        for gate, d in enumerate((dc, dc, dc, dm)):  # each to its place, as the slopes
            begin = gate * cells
            slope = _at(dz, n)[..., begin : begin + cells]
            now = jax.lax.dynamic_update_slice(now, d * slope, (0, 0, begin))
        dhs = None if dhs is None else _put(dhs, dh, n)
        return State(dc * _at(slopes.kept, n), batched_product(now, to_h)), _put(dz, now, n), now, dhs

    after, now, dhs = jax.tree.map(jnp.zeros_like, (first, _at(by_gate, 0), None if to_m is None else h))
    return (after, by_gate, now, dhs), step


def _recurrences_backward(clips: Clips, residuals, grads: _States):
    del clips
    parts = [_backward_part(*part) for part in zip(residuals, grads, strict=True)]
    after = _steps_of(parts, residuals[0][1].shape[_TIME])
    d_w = []
    for (first, h, _, slopes, w), (_, dz, _, dh) in zip(residuals, after, strict=True):
        d_projection = None
        if slopes.m is not None:
            d_projection = weight_gradient(slopes.m, dh, w.recurrent.dtype)
        before = jnp.concatenate([jnp.expand_dims(first.h, _TIME), h[:, :, :-1]], axis=_TIME)
        d_recurrent = weight_gradient(before, dz, w.recurrent.dtype)
        d_w.append(Weights(d_recurrent, dz.sum((1, 2)).astype(w.bias.dtype), d_projection))
    return tuple(carry[0] for carry in after), tuple(carry[1] for carry in after), tuple(d_w)


_recurrences.defvjp(_recurrences_forward, _recurrences_backward, symbolic_zeros=True)


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
    made: Any = _recurrences((state,), (gates,), (w,), clips)
    return made[0]


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def run_fast(x: Array, state: State, w_x: Array, w: Weights, clips: Clips) -> State:
    """`fast_recurrence` from a layer's input, in as many parts as run fastest here.

    Args:
        x: ``[D, B, T, I]``.
        state: the first state.
        w_x: ``[D, I, 4H]``, in the dtype of the products.
        w, clips: as `fast_recurrence` has them.

    Returns:
        As `fast_recurrence`.
    """
    small = math.prod(w.recurrent.shape[1:]) * w.recurrent.dtype.itemsize < APART_BYTES
    count = len(x) if small and _on_cpu() else 1
    leaves, tree = jax.tree.flatten((x, state, w_x, w))
    parts = [jax.tree.unflatten(tree, p) for p in zip(*(jnp.split(a, count) for a in leaves), strict=True)]
    gates = tuple(batched_product(x, w_x) for x, _, w_x, _ in parts)  # [D, B, T, 4H] in all
    made: Any = _recurrences(
        tuple(state for _, state, _, _ in parts), gates, tuple(w for *_, w in parts), clips
    )
    return jax.tree.map(lambda *every: jnp.concatenate(every), *made)
