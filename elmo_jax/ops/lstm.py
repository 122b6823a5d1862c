"""Recurrence of projected LSTMs: one step, and all steps with a hand-written gradient.

`lstm_step` holds the equations. `run_fast` has the values and gradients of a scan over it and is the faster
way to run all steps, most of all on a CPU. Shape comments use the axis letters of docs/concepts.md.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

GATES = 4  # i, j, f, o: input, candidate, forget and output, in the order of the official format
FORGET_BIAS = 1.0  # added to f when the cell runs and never stored, as in the official format


class State(NamedTuple):
    """State that a layer carries between steps: c ``[D, B, H]`` and h ``[D, B, P]``."""

    c: Array
    h: Array


class Weights(NamedTuple):
    """Recurrent weights: W_h ``[D, P, 4H]``, b ``[D, 4H]`` and W_p ``[D, H, P]``, None without projection."""

    recurrent: Array
    bias: Array
    projection: Array | None


class Clips(NamedTuple):
    """Symmetric bounds of the cell and of the projected state; None is unbounded."""

    cell: float | None = None
    projection: float | None = None


def batched_product(x: Array, w: Array) -> Array:
    """Return ``[D, ..., I] x [D, I, O] -> [D, ..., O]`` in w's dtype, accumulated in float32 at least."""
    rows = x.reshape(len(x), -1, x.shape[-1]).astype(w.dtype)  # XLA:CPU copies arrays with more axes
    y = jnp.einsum("dni,dio->dno", rows, w, preferred_element_type=_accumulator(w.dtype))
    return y.reshape(*x.shape[:-1], -1)


def _accumulator(dtype: DTypeLike) -> DTypeLike:
    return np.promote_types(dtype, np.float32)


def _clip(x: Array, bound: float | None) -> Array:
    return x if bound is None else jnp.clip(x, -bound, bound)


def lstm_step(state: State, gates: Array, w: Weights, clips: Clips = Clips()) -> State:
    """Run one step of the projected LSTM of Sak et al. (2014), as bilm-tf computes it.

    z = x W_x + h W_h + b, split into i, j, f, o;
    c' = clip(sigmoid(f + 1) c + sigmoid(i) tanh(j));
    m' = sigmoid(o) tanh(c');
    h' = clip(m' W_p), or m' without a projection.

    Args:
        state: c ``[D, B, H]`` and h ``[D, B, P]``.
        gates: ``[D, B, 4H]``, the term x W_x of z.
        w: recurrent weights.
        clips: bounds of c' and h'.

    Returns:
        The next state.
    """
    z = gates + batched_product(state.h, w.recurrent) + w.bias[:, None].astype(gates.dtype)
    i, j, f, o = jnp.split(z, GATES, axis=-1)  # each [D, B, H]
    c = jax.nn.sigmoid(f + FORGET_BIAS) * state.c + jax.nn.sigmoid(i) * jnp.tanh(j)
    c = _clip(c, clips.cell)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    if w.projection is not None:
        h = batched_product(h, w.projection)
    return State(c, _clip(h, clips.projection))


# Bytes of one direction's recurrent weights. Below the first, a step's products are too small for XLA:CPU to
# spread over cores, so directions are split; above the second, copying the weights to transpose them costs
# more than it gains. Batches with fewer rows gain nothing from the transposed layout.
_SPLIT_MAX_BYTES, _TRANSPOSE_MAX_BYTES, _TRANSPOSE_MIN_ROWS = 4 << 20, 32 << 20, 24


def run_fast(x: Array, state: State, w_x: Array, w: Weights, clips: Clips) -> State:
    """Run all steps of `lstm_step` from a layer's input, in the memory layout that is fastest here.

    Args:
        x: ``[D, B, T, I]``.
        state: first state, float32 or float64.
        w_x: ``[D, I, 4H]``, in the matmul dtype.
        w: recurrent weights, in the matmul dtype.
        clips: bounds, static.

    Returns:
        The states after every step: c ``[D, B, T, H]``, h ``[D, B, T, P]``.
    """
    _, rows, steps, _ = x.shape
    split, transposed = _choose_layout(rows, w.recurrent)
    if not split:
        return fast_recurrence(state, batched_product(x, w_x), w, clips)
    layout = Layout(steps, transposed)
    # jnp.split before the transposition lets XLA cancel the transpositions between two layers.
    leaves, tree = jax.tree.flatten((x, state, w_x, w))
    by_direction = zip(*(jnp.split(a, len(a)) for a in leaves), strict=True)
    lstms = [jax.tree.unflatten(tree, [layout.transpose(a[0]) for a in one]) for one in by_direction]
    gates = tuple(layout.multiply_all(layout.join_steps(x), w_x) for x, _, w_x, _ in lstms)
    states, weights = (tuple(lstm[k] for lstm in lstms) for k in (1, 3))
    every: Any = _run_steps(states, gates, weights, clips, layout)
    every = jax.tree.map(lambda a, first: layout.transpose(layout.unjoin_steps(a, first)), every, states)
    return jax.tree.map(lambda *directions: jnp.stack(directions), *every)


def fast_recurrence(state: State, gates: Array, w: Weights, clips: Clips) -> State:
    """Run all steps of `lstm_step` from the gates ``[D, B, T, 4H]``; all else as in `run_fast`."""
    layout = Layout(gates.shape[2], transposed=False)
    every: Any = _run_steps((state,), (layout.join_steps(gates),), (w,), clips, layout)
    return jax.tree.map(layout.unjoin_steps, every[0], state)


def _choose_layout(rows: Any, recurrent: Array) -> tuple[bool, bool]:
    """Return whether to run each direction on its own arrays, and whether to transpose these."""
    if jax.default_backend() != "cpu":
        return False, False
    size = math.prod(recurrent.shape[1:]) * recurrent.dtype.itemsize
    many = isinstance(rows, int) and rows >= _TRANSPOSE_MIN_ROWS  # sizes are symbolic in exported programs
    # XLA:CPU cannot run some transposed products in bfloat16, and a mesh cannot shard rows on a last axis.
    transposable = recurrent.dtype.itemsize > 2 and jax.sharding.get_abstract_mesh().empty
    transposed = many and transposable and size < _TRANSPOSE_MAX_BYTES
    return transposed or size < _SPLIT_MAX_BYTES, transposed


class Layout(NamedTuple):
    """Memory layout of an LSTM's arrays, with all steps side by side on the last axis.

    One step is ``[B, N]``, all steps are ``[B, T * N]`` and a matrix is ``[I, O]``. Transposed, these are
    ``[N, B]``, ``[N, T * B]`` and ``[O, I]``. There may be a leading axis of directions.
    """

    steps: int
    transposed: bool

    @property
    def feature_axis(self) -> int:
        return -2 if self.transposed else -1

    @property
    def row_axis(self) -> int:
        return -1 if self.transposed else -2

    def transpose(self, a: Array) -> Array:
        """Convert ``[B, N]``, ``[B, T, N]``, ``[I, O]`` or ``[N]`` of one direction to the layout or back."""
        return a.T if self.transposed else a

    def join_steps(self, a: Array) -> Array:
        """Merge the last two axes, ``[B, T, N]`` or ``[N, T, B]``."""
        return a.reshape(*a.shape[:-2], a.shape[-2] * a.shape[-1])

    def unjoin_steps(self, a: Array, step: Array) -> Array:
        """Undo `join_steps` for steps of the shape of `step`."""
        return a.reshape(*step.shape[:-1], self.steps, step.shape[-1])

    def get(self, a: Array, t: Array | int) -> Array:
        """Return step t."""
        width = a.shape[-1] // self.steps
        return jax.lax.dynamic_slice_in_dim(a, t * width, width, axis=-1, allow_negative_indices=False)

    def set(self, a: Array, value: Array, t: Array | int, feature: int = 0) -> Array:
        """Return a with step t replaced by value, from the given feature on."""
        begin = t * (a.shape[-1] // self.steps)
        start = (feature, begin) if self.transposed else (0, begin + feature)
        start = (0,) * (a.ndim - 2) + start
        return jax.lax.dynamic_update_slice(a, value, start, allow_negative_indices=False)

    def multiply(self, a: Array, w: Array) -> Array:
        """Multiply one step by a matrix, in its dtype."""
        a = a.astype(w.dtype)
        pair = (w, a) if self.transposed else (a, w)
        return jnp.matmul(*pair, preferred_element_type=_accumulator(w.dtype))

    def multiply_all(self, a: Array, w: Array) -> Array:
        """Multiply all steps by a matrix."""
        if self.transposed:
            return self.multiply(a, w)
        y = self.multiply(_stack_steps(a, w.shape[-2]), w)
        return y.reshape(*a.shape[:-1], self.steps * w.shape[-1])

    def matrix_gradient(self, a: Array, g: Array, w: Array) -> Array:
        """Return the gradient of matrix w from all steps a before it and the gradient g behind it."""
        a, g = a.astype(w.dtype), g.astype(w.dtype)
        if self.transposed:
            pair = g, a.mT
        else:
            pair = _stack_steps(a, w.shape[-2]).mT, _stack_steps(g, w.shape[-1])
        return jnp.matmul(*pair, preferred_element_type=_accumulator(w.dtype)).astype(w.dtype)

    def bias_gradient(self, g: Array, bias: Array) -> Array:
        """Return the gradient of a bias that is added at every step."""
        total = g.sum(-1) if self.transposed else _stack_steps(g, bias.shape[-1]).sum(-2)
        return total.astype(bias.dtype)


def _stack_steps(a: Array, features: int) -> Array:
    """Reshape ``[B, T * N]`` to ``[B * T, N]``."""
    return a.reshape(*a.shape[:-2], a.shape[-2] * a.shape[-1] // features, features)


# The recurrence of `fast_recurrence` and `run_fast`, with its gradient.
#
# A sigmoid is a tanh, sigmoid(x) = (1 + tanh(x / 2)) / 2, so one tanh makes all four gates. The forward loop
# also computes the local derivatives of each step, while the step is in the cache, and writes them over its
# gates. The backward loop only multiplies, and writes the gradient of z over the derivatives. With i, j, f
# and o after their activations, and every dc and dh set to 0 where c or h was clipped, it computes
#
#     dh  = dz(t + 1) W_h^T + gradient of the output h
#     dm  = dh W_p^T
#     dc  = dc(t + 1) f(t + 1) + dm o (1 - tanh(c)^2) + gradient of the output c
#     dz  = dc j i (1 - i), dc i (1 - j^2), dc c(t - 1) f (1 - f), dm tanh(c) o (1 - o)
#
# Each weight's gradient is one product over all steps after the loop, not a sum carried through it.

_BIASES = (0.0, 0.0, FORGET_BIAS, 0.0)
_SCALES = (0.5, 1.0, 0.5, 0.5)  # factor of z before the tanh: 1/2 for a sigmoid

_Step: TypeAlias = Callable[[Array, Any], Any]  # (t, carry) -> carry
_States: TypeAlias = tuple[State, ...]
_Arrays: TypeAlias = tuple[Array, ...]


class _Derivatives(NamedTuple):
    """Local derivatives of all steps beside those by gate, time-major ``[T, ...]``.

    Attributes:
        c_by_c: derivative of c by the previous c, 0 where c was clipped.
        m_by_c: derivative of m by c.
        unclipped: 1 where h was not clipped, else 0; None without a bound.
    """

    c_by_c: Array
    m_by_c: Array
    unclipped: Array | None


class _ForwardCarry(NamedTuple):
    """Carry of one LSTM's forward loop.

    Attributes:
        state: state after the last step.
        states: states after every step.
        by_gate: gates of the steps ahead; with gradients, the steps done hold the derivatives of c by i, j
            and f, and of m by o.
        derivatives: None without gradients.
        m: m of every step; None without gradients or projection.
    """

    state: State
    states: State
    by_gate: Array
    derivatives: Any
    m: Array | None


class _BackwardCarry(NamedTuple):
    """Carry of one LSTM's backward loop.

    Attributes:
        dc: gradient of c before the last step done.
        dz: gradient of z of the last step done.
        by_gate: derivatives by gate of the steps ahead, and dz of the steps done.
        dh: gradient of every step's m W_p; None without projection.
    """

    dc: Array
    dz: Array
    by_gate: Array
    dh: Array | None


class _Residuals(NamedTuple):
    """Arrays of one LSTM for the backward pass; `h`, `by_gate`, `derivatives` and `m` hold all steps."""

    first: State
    h: Array
    by_gate: Array
    derivatives: _Derivatives
    m: Array | None
    w: Weights


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _run_steps(
    first: _States, gates: _Arrays, w: tuple[Weights, ...], clips: Clips, layout: Layout
) -> _States:
    """Return the states after every step of several independent LSTMs, run in one loop."""
    lstms = zip(first, gates, w, strict=True)
    return tuple(end.states for end in _run_forward(lstms, clips, layout, with_gradient=False))


def _run_steps_forward(
    first: _States, gates: _Arrays, w: tuple[Weights, ...], clips: Clips, layout: Layout
) -> tuple[_States, list[_Residuals]]:
    lstms = list(zip(*jax.tree.map(lambda p: p.value, (first, gates, w)), strict=True))
    ends = _run_forward(lstms, clips, layout, with_gradient=True)
    residuals = [
        _Residuals(first, end.states.h, end.by_gate, end.derivatives, end.m, w)
        for (first, _, w), end in zip(lstms, ends, strict=True)
    ]
    return tuple(end.states for end in ends), residuals


def _run_steps_backward(clips: Clips, layout: Layout, residuals: Sequence[_Residuals], grads: _States):
    del clips  # the derivatives are 0 where a bound was reached
    lstms = [_backward_loop(*lstm, layout) for lstm in zip(residuals, grads, strict=True)]
    pairs = list(zip(residuals, _loop_together(lstms, layout.steps), strict=True))
    d_first = tuple(State(end.dc, layout.multiply(end.dz, r.w.recurrent.mT)) for r, end in pairs)
    d_weights = tuple(_weights_gradient(r, end, layout) for r, end in pairs)
    return d_first, tuple(end.by_gate for _, end in pairs), d_weights


_run_steps.defvjp(_run_steps_forward, _run_steps_backward, symbolic_zeros=True)


def _run_forward(
    lstms: Iterable[tuple[State, Array, Weights]], clips: Clips, layout: Layout, with_gradient: bool
) -> tuple[_ForwardCarry, ...]:
    loops = [_forward_loop(*lstm, clips, layout, with_gradient) for lstm in lstms]
    return _loop_together(loops, layout.steps)


def _loop_together(lstms: Sequence[tuple[Any, _Step]], steps: int) -> tuple[Any, ...]:
    """Run several loops, each a first carry and a step function, as one, and return their last carries.

    XLA:CPU runs the products of different arrays in parallel, but those of one small array on one core.
    """
    carries, step_fns = zip(*lstms, strict=True)

    def body(t: Array, carries: tuple[Any, ...]):
        return tuple(step(t, carry) for step, carry in zip(step_fns, carries, strict=True))

    return jax.lax.fori_loop(0, steps, body, carries)


def _forward_loop(
    first: State, gates: Array, w: Weights, clips: Clips, layout: Layout, with_gradient: bool
) -> tuple[_ForwardCarry, _Step]:
    """Return the first carry and the step function of one LSTM's forward loop."""
    cells = first.c.shape[layout.feature_axis]
    bias, scale = (_repeat_by_gate(values, w.bias, gates.dtype) for values in (_BIASES, _SCALES))
    bias, scale = (jnp.expand_dims(x, layout.row_axis) for x in (bias + w.bias.astype(gates.dtype), scale))

    def step(t: Array, carry: _ForwardCarry) -> _ForwardCarry:
        before, states, by_gate, derivatives, m_all = carry
        z = layout.get(by_gate, t) + layout.multiply(before.h, w.recurrent) + bias
        i, j, f, o = jnp.split(jnp.tanh(z * scale), GATES, layout.feature_axis)
        i, f, o = 0.5 * (1 + i), 0.5 * (1 + f), 0.5 * (1 + o)
        c = _clip(f * before.c + i * j, clips.cell)
        tanh_c = jnp.tanh(c)
        m = o * tanh_c
        h = _clip(m if w.projection is None else layout.multiply(m, w.projection), clips.projection)
        if derivatives is not None:
            mask = _unclipped(c, clips.cell)
            c_by_ijf = (j * i * (1 - i), i * (1 - j * j), before.c * f * (1 - f))
            m_by_o = tanh_c * o * (1 - o)
            for gate, value in enumerate((*(_apply_mask(x, mask) for x in c_by_ijf), m_by_o)):
                by_gate = layout.set(by_gate, value, t, gate * cells)  # concatenating first would copy
            now = _Derivatives(
                _apply_mask(f, mask), o * (1 - tanh_c * tanh_c), _unclipped(h, clips.projection)
            )
            derivatives = jax.tree.map(lambda every, one: _set_time_major(every, one, t), derivatives, now)
            m_all = None if m_all is None else layout.set(m_all, m, t)
        states = State(layout.set(states.c, c, t), layout.set(states.h, h, t))
        return _ForwardCarry(State(c, h), states, by_gate, derivatives, m_all)

    zeros = lambda a: jnp.zeros_like(a, shape=(*a.shape[:-1], layout.steps * a.shape[-1]))  # noqa: E731
    states = jax.tree.map(zeros, first)
    derivatives = m_all = None
    if with_gradient:
        c_zeros, h_zeros = (jnp.zeros_like(a, shape=(layout.steps, *a.shape)) for a in first)
        derivatives = _Derivatives(c_zeros, c_zeros, None if clips.projection is None else h_zeros)
        m_all = None if w.projection is None else states.c
    return _ForwardCarry(first, states, gates, derivatives, m_all), step


def _backward_loop(residuals: _Residuals, grads: State, layout: Layout) -> tuple[_BackwardCarry, _Step]:
    """Return the first carry and the step function of one LSTM's backward loop.

    The product dz W_h^T is made at the beginning of the next step, and the last one after the loop: XLA:CPU
    begins a step on one core, and each core goes on with the LSTM whose product it made.
    """
    derivatives, w = residuals.derivatives, residuals.w
    w_h, w_p = w.recurrent.mT, None if w.projection is None else w.projection.mT
    grad_c, grad_h = (None if isinstance(g, SymbolicZero) else g for g in grads)
    cells = residuals.first.c.shape[layout.feature_axis]

    def step(k: Array, carry: _BackwardCarry) -> _BackwardCarry:
        dc, dz, by_gate, dh_all = carry
        t = layout.steps - 1 - k
        dh = layout.multiply(dz, w_h)
        dh = dh if grad_h is None else dh + layout.get(grad_h, t)
        dh = dh if derivatives.unclipped is None else dh * _get_time_major(derivatives.unclipped, t)
        dm = dh if w_p is None else layout.multiply(dh, w_p)
        dc = dc + dm * _get_time_major(derivatives.m_by_c, t)
        dc = dc if grad_c is None else dc + layout.get(grad_c, t)
        by_ijfo = jnp.split(layout.get(by_gate, t), GATES, layout.feature_axis)
        for gate, d in enumerate((dc, dc, dc, dm)):  # concatenating first would copy
            dz = jax.lax.dynamic_update_slice_in_dim(dz, d * by_ijfo[gate], gate * cells, layout.feature_axis)
        dh_all = None if dh_all is None else layout.set(dh_all, dh, t)
        dc = dc * _get_time_major(derivatives.c_by_c, t)
        return _BackwardCarry(dc, dz, layout.set(by_gate, dz, t), dh_all)

    like = (residuals.first.c, layout.get(residuals.by_gate, 0), None if w_p is None else residuals.h)
    dc, dz, dh_all = jax.tree.map(jnp.zeros_like, like)
    return _BackwardCarry(dc, dz, residuals.by_gate, dh_all), step


def _weights_gradient(residuals: _Residuals, end: _BackwardCarry, layout: Layout) -> Weights:
    first, w = residuals.first, residuals.w
    d_projection = None
    if w.projection is not None:
        assert residuals.m is not None and end.dh is not None
        d_projection = layout.matrix_gradient(residuals.m, end.dh, w.projection)
    h_before = jnp.concatenate([first.h, residuals.h[..., : -first.h.shape[-1]]], axis=-1)
    d_recurrent = layout.matrix_gradient(h_before, end.by_gate, w.recurrent)
    return Weights(d_recurrent, layout.bias_gradient(end.by_gate, w.bias), d_projection)


def _repeat_by_gate(values: tuple[float, ...], bias: Array, dtype: DTypeLike) -> Array:
    """Return one number per gate, repeated over its cells, with as many axes as the bias."""
    repeated = jnp.repeat(jnp.array(values, dtype), bias.shape[-1] // GATES)
    return jnp.expand_dims(repeated, tuple(range(bias.ndim - 1)))


def _unclipped(x: Array, bound: float | None) -> Array | None:
    """Return 1 where the clipped x is within its bound, else 0."""
    return None if bound is None else (jnp.abs(x) < bound).astype(x.dtype)


def _apply_mask(x: Array, mask: Array | None) -> Array:
    return x if mask is None else x * mask


def _get_time_major(every: Array, t: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(every, t, keepdims=False, allow_negative_indices=False)


def _set_time_major(every: Array, value: Array, t: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(every, value, t, 0, allow_negative_indices=False)
