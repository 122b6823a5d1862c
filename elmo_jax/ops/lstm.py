"""The kernel that runs wherever no other can: loops over the steps, with a hand-written gradient.

Beside the hand-written gradient: a sigmoid is a tanh, sigmoid(x) = (1 + tanh(x/2)) / 2, so all
four gates are one tanh of the whole row, which XLA:CPU runs four times as fast as four
functions of four slices. Whatever the backward pass needs of a step is worked out where the
step is taken, while it lies in the cache, so that the backward loop only multiplies and no
array of all steps is made between the two. And the loops write where they read, the slopes over
the gates and the gates' gradient over the slopes.

What is fastest is chosen for JAX's default backend, when a program is traced; any other runs it too.

Nouns: as in `recurrence`; a *part* is a direction, or several along the first axis of all arrays,
which lie as `layout` says.
Axes: D direction, B batch, T time, H cells, P projection (P = H without one).

The recurrence of a projected LSTM, in several directions at once: one step, and what its kernels share.

Nouns: a *state* is the pair (c, h) carried from one step to the next; the *gates* given to
a step are the input's share of them; a *kernel* is one way to run all the steps.
Axes: D direction, B batch, T time, H cells, P projection (P = H without one).

How arrays lie while an LSTM's steps are taken, and what is done to them that depends on it.

Nouns: a step of an array is ``[B, N]`` for N features, and all steps lie side by side, ``[B, T * N]``;
where they are *turned*, a step is ``[N, B]``, all are ``[N, T * B]``, and a matrix ``[I, O]`` is ``[O, I]``.
Any of them may have an axis of directions before these. What no product over all steps reads lies
a step after the other, ``[T, ...]``, so that a step is read and written without leaps.
Axes: B batch, T time, I and O features before and after a matrix.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

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


# Of a direction's recurrent weights. With fewer, its products are too small to be shared out to cores;
# with more, it is not worth their copy to turn them.
APART_BYTES, TURNED_BYTES = 4 << 20, 32 << 20
TURNED_ROWS = 24  # of a batch; fewer are not the better for lying side by side

_Step: TypeAlias = Callable[[Array, Any], Any]  # (n, what is carried) -> what is carried
_States: TypeAlias = tuple[State, ...]
_Arrays: TypeAlias = tuple[Array, ...]
_Many: TypeAlias = tuple[Weights, ...]

_BIAS = (0.0, 0.0, FORGET_BIAS, 0.0)
_SCALE = (0.5, 1.0, 0.5, 0.5)  # of z before the tanh: 1/2 where the gate is a sigmoid


class _Slopes(NamedTuple):
    """What the backward pass reads of every step beside the gates' slopes, a step after the other.

    ``kept`` is the slope of c by the c before (0 where c was clipped), ``shown`` that of m, which is
    h before its projection, by c; ``inside`` is 1 where h was not clipped, or None without a clip.
    """

    kept: Array
    shown: Array
    inside: Array | None


class _Ahead(NamedTuple):
    """What a part carries from step to step.

    Attributes:
        now: the state after the last step taken.
        states: after every step taken so far.
        by_gate: of steps to come the gates, of those taken the slopes of c by i, j and f, where it
            was not clipped, and of m by o; or all the gates, if no gradient is wanted.
        slopes: `_Slopes` of steps taken; None if no gradient is wanted.
        m: of steps taken h before its projection; None if there is none, or no gradient is wanted.
    """

    now: State
    states: State
    by_gate: Array
    slopes: Any
    m: Array | None


class _Back(NamedTuple):
    """What a part carries from step to step, the last first.

    Attributes:
        dc: the gradient of c before the last step taken.
        now: the gates' gradient of the last step taken.
        by_gate: of steps to come the slopes, of those taken the gates' gradient.
        dh: of every step before its projection's product; None if there is no projection.
    """

    dc: Array
    now: Array
    by_gate: Array
    dh: Array | None


class _Kept(NamedTuple):
    """What the backward pass is given: the first state, h after every step, slopes, m and weights."""

    first: State
    h: Array
    by_gate: Array
    slopes: _Slopes
    m: Array | None
    w: Weights


def _by_gate(values: tuple[float, ...], bias: Array, dtype: DTypeLike) -> Array:
    """A number for each of the gates i, j, f, o, repeated over its cells: as many axes as their bias."""
    repeated = jnp.repeat(jnp.array(values, dtype), bias.shape[-1] // GATES)
    return jnp.expand_dims(repeated, tuple(range(bias.ndim - 1)))


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


def _forward_part(first: State, gates: Array, w: Weights, clips: Clips, layout: Layout, differentiated: bool):
    """What the loop over steps begins with, and its step."""
    cells = first.c.shape[layout.features]
    bias, scale = (_by_gate(values, w.bias, gates.dtype) for values in (_BIAS, _SCALE))
    bias, scale = (jnp.expand_dims(x, layout.rows) for x in (bias + w.bias.astype(gates.dtype), scale))

    def step(n: Array, carry: _Ahead) -> _Ahead:
        before, states, by_gate, slopes, m_all = carry
        t = jnp.tanh((layout.at(by_gate, n) + layout.product(before.h, w.recurrent) + bias) * scale)
        i, j, f, o = jnp.split(t, GATES, layout.features)
        i, f, o = 0.5 * (1 + i), 0.5 * (1 + f), 0.5 * (1 + o)
        c = clip(f * before.c + i * j, clips.cell)
        tanh_c = jnp.tanh(c)
        m = o * tanh_c
        h = clip(m if w.projection is None else layout.product(m, w.projection), clips.projection)
        if slopes is not None:
            inside = _inside(c, clips.cell)
            of_c = (_masked(x, inside) for x in (j * i * (1 - i), i * (1 - j * j), before.c * f * (1 - f)))
            for k, slope in enumerate((*of_c, tanh_c * o * (1 - o))):
                # Each to its place: side by side first is a copy more.
                by_gate = layout.put(by_gate, slope, n, k * cells)
            made = _Slopes(_masked(f, inside), o * (1 - tanh_c * tanh_c), _inside(h, clips.projection))
            slopes = jax.tree.map(lambda every, now: with_nth(every, now, n), slopes, made)
            m_all = None if m_all is None else layout.put(m_all, m, n)
        states = State(layout.put(states.c, c, n), layout.put(states.h, h, n))
        return _Ahead(State(c, h), states, by_gate, slopes, m_all)

    of_all = lambda a: (*a.shape[:-1], layout.steps * a.shape[-1])  # noqa: E731
    states = jax.tree.map(lambda a: jnp.zeros_like(a, shape=of_all(a)), first)
    slopes = m_all = None
    if differentiated:
        c_of, h_of = (jnp.zeros_like(a, shape=(layout.steps, *a.shape)) for a in first)
        slopes = _Slopes(c_of, c_of, None if clips.projection is None else h_of)
        m_all = None if w.projection is None else states.c
    return _Ahead(first, states, gates, slopes, m_all), step


def _forward(
    first: _States, gates: _Arrays, w: _Many, clips: Clips, layout: Layout, differentiated: bool
) -> tuple[_Ahead, ...]:
    parts = zip(first, gates, w, strict=True)
    return _steps_of([_forward_part(*part, clips, layout, differentiated) for part in parts], layout.steps)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _recurrences(first: _States, gates: _Arrays, w: _Many, clips: Clips, layout: Layout) -> _States:
    """Of every part, which has nothing to do with the others, the states after every step; in one loop."""
    return tuple(end.states for end in _forward(first, gates, w, clips, layout, differentiated=False))


def _recurrences_forward(first: _States, gates: _Arrays, w: _Many, clips: Clips, layout: Layout):
    first, gates, w = jax.tree.map(lambda p: p.value, (first, gates, w))
    ends = _forward(first, gates, w, clips, layout, differentiated=True)
    parts = zip(first, ends, w, strict=True)
    kept = [_Kept(began, end.states.h, end.by_gate, end.slopes, end.m, own) for began, end, own in parts]
    return tuple(end.states for end in ends), kept


def _backward_part(kept: _Kept, grads: State, layout: Layout):
    """What the loop over steps, the last first, begins with, and its step.

    The product that takes the gradient to h is made at the beginning of the next step, the last one
    after the loop: XLA:CPU begins a step on one core, and a core goes on with the part whose product it made.
    """
    slopes, w = kept.slopes, kept.w
    to_h, to_m = w.recurrent.mT, None if w.projection is None else w.projection.mT
    # No gradient, no addition in the loop.
    grad_c, grad_h = (None if isinstance(g, SymbolicZero) else g for g in grads)
    cells = kept.first.c.shape[layout.features]

    def step(k: Array, carry: _Back) -> _Back:
        dc, now, by_gate, dhs = carry
        n = layout.steps - 1 - k
        dh = layout.product(now, to_h)
        dh = dh if grad_h is None else dh + layout.at(grad_h, n)
        dh = dh if slopes.inside is None else dh * nth(slopes.inside, n)
        dm = dh if to_m is None else layout.product(dh, to_m)
        dc = dc + dm * nth(slopes.shown, n)
        dc = dc if grad_c is None else dc + layout.at(grad_c, n)
        slope = jnp.split(layout.at(by_gate, n), GATES, layout.features)
        for gate, d in enumerate((dc, dc, dc, dm)):  # each to its place, as the slopes
            now = jax.lax.dynamic_update_slice_in_dim(now, d * slope[gate], gate * cells, layout.features)
        dhs = None if dhs is None else layout.put(dhs, dh, n)
        return _Back(dc * nth(slopes.kept, n), now, layout.put(by_gate, now, n), dhs)

    began = (kept.first.c, layout.at(kept.by_gate, 0), None if to_m is None else kept.h)
    dc, now, dhs = jax.tree.map(jnp.zeros_like, began)
    return _Back(dc, now, kept.by_gate, dhs), step


def _recurrences_backward(clips: Clips, layout: Layout, kept: Sequence[_Kept], grads: _States):
    del clips
    parts = [_backward_part(*part, layout) for part in zip(kept, grads, strict=True)]
    ends: tuple[_Back, ...] = _steps_of(parts, layout.steps)
    both = list(zip(kept, ends, strict=True))
    first = tuple(State(end.dc, layout.product(end.now, own.w.recurrent.mT)) for own, end in both)
    return first, tuple(end.by_gate for end in ends), tuple(_weights_gradient(*p, layout) for p in both)


def _weights_gradient(kept: _Kept, end: _Back, layout: Layout) -> Weights:
    """Of all steps at once, rather than a sum kept through the loop."""
    first, w = kept.first, kept.w
    d_projection = None
    if w.projection is not None:
        assert kept.m is not None and end.dh is not None
        d_projection = layout.matrix_gradient(kept.m, end.dh, w.projection)
    before = jnp.concatenate([first.h, kept.h[..., : -first.h.shape[-1]]], axis=-1)
    d_recurrent = layout.matrix_gradient(before, end.by_gate, w.recurrent)
    return Weights(d_recurrent, layout.bias_gradient(end.by_gate, w.bias), d_projection)


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
    layout = Layout(gates.shape[2], turned=False)
    made: Any = _recurrences((state,), (layout.flat(gates),), (w,), clips, layout)
    return jax.tree.map(layout.unflat, made[0], state)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _alone() -> bool:
    return jax.device_count() == 1


def lstm_scan_vjp(x: Array, state: State, w_x: Array, w: Weights, clips: Clips) -> State:
    """`fast_recurrence` from a layer's input, in as many parts and arranged as is fastest here.

    Args:
        x: ``[D, B, T, I]``.
        state: the first state.
        w_x: ``[D, I, 4H]``, in the dtype of the products.
        w, clips: as `fast_recurrence` has them.

    Returns:
        As `fast_recurrence`.
    """
    _, rows, steps, _ = x.shape
    many = isinstance(rows, int) and rows >= TURNED_ROWS  # exported programs may leave them open
    wide = w.recurrent.dtype.itemsize > 2  # of bfloat16 XLA:CPU may make turned products that it cannot run
    size = math.prod(w.recurrent.shape[1:]) * w.recurrent.dtype.itemsize
    layout = Layout(steps, turned=many and wide and size < TURNED_BYTES and _on_cpu() and _alone())
    if not (layout.turned or (size < APART_BYTES and _on_cpu())):
        return fast_recurrence(state, batched_product(x, w_x), w, clips)
    # Split, not indexed, and turned after that: so XLA sees that layers turn back what others have turned.
    leaves, tree = jax.tree.flatten((x, state, w_x, w))
    by_part = zip(*(jnp.split(a, len(a)) for a in leaves), strict=True)
    parts = [jax.tree.unflatten(tree, [layout.turn(a[0]) for a in part]) for part in by_part]
    gates = tuple(layout.products(layout.flat(x), w_x) for x, _, w_x, _ in parts)
    states, weights = (tuple(part[i] for part in parts) for i in (1, 3))
    made: Any = _recurrences(states, gates, weights, clips, layout)
    made = jax.tree.map(lambda a, first: layout.turn(layout.unflat(a, first)), made, states)
    return jax.tree.map(lambda *every: jnp.stack(every), *made)
