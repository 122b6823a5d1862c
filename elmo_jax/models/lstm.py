"""LSTM layers that run several directions at once over padded batches, and the registry of recurrences.

A caller stacks a batch and its `reverse_valid` along the direction axis D; every direction is then read
from left to right. Shape comments use the axis letters of docs/concepts.md; I is the input width.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from elmo_jax.config import Kernel
from elmo_jax.errors import InputError
from elmo_jax.ops.lstm import Clips, State, Weights, batched_product, lstm_step, run_fast
from elmo_jax.ops.lstm_pallas import run_persistent, unsupported_reason
from elmo_jax.parallel import align_varying

# The direction axis counts as a batch axis, not towards fan-in and fan-out.
_glorot = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", batch_axis=0)


def _run_plain(layer: nn.Module, x: Array, state: State, w_x: Array, w: Weights, clips: Clips) -> State:
    """Scan `lstm_step` over the steps; every other recurrence has the same values and gradients."""

    def body(layer: nn.Module, state: State, gates: Array):
        state = lstm_step(state, gates, w, clips)
        return state, state

    scan = nn.scan(body, variable_broadcast="params", split_rngs={"params": False}, in_axes=2, out_axes=2)
    result: Any = scan(layer, state, batched_product(x, w_x))  # gates [D, B, T, 4H]
    return result[1]


class Recurrence(NamedTuple):
    """Implementation of a layer's steps.

    Attributes:
        run: ``(layer, x, state, w_x, w, clips) -> states``: the module, its input ``[D, B, T, I]``, first
            state, weights in the matmul dtype and bounds; returns the states after every step,
            c ``[D, B, T, H]`` and h ``[D, B, T, P]``.
        unsupported_reason: ``(cells, projection, dtype) ->`` why it cannot run such a layer here, or None.
    """

    run: Callable[[nn.Module, Array, State, Array, Weights, Clips], State]
    unsupported_reason: Callable[[int, int | None, str], str | None] = lambda cells, projection, dtype: None


RECURRENCES = {
    "plain": Recurrence(_run_plain),
    "fast": Recurrence(lambda layer, *arrays: run_fast(*arrays)),
    "persistent": Recurrence(
        lambda layer, x, state, w_x, *rest: run_persistent(state, batched_product(x, w_x), *rest),
        unsupported_reason,
    ),
}
_AUTOMATIC = ("persistent", "fast")  # the first one that can run the layer is used


def reverse_valid(x: Array, lengths: Array) -> Array:
    """Reverse the valid steps of every row; padding keeps its position.

    ``y[b, t] = x[b, lengths[b] - 1 - t]`` for t < lengths[b], else ``x[b, t]``. The function is its own
    inverse.

    Args:
        x: ``[B, T, ...]``, any dtype.
        lengths: ``[B]`` int32, valid steps of each row.

    Returns:
        ``[B, T, ...]``, dtype of x.

    Examples:
        >>> reverse_valid(jnp.array([[1, 2, 3, 0]]), jnp.array([3])).tolist()
        [[3, 2, 1, 0]]
    """
    t = jnp.arange(x.shape[1])[None, :]
    n = lengths[:, None]
    index = jnp.where(t < n, n - 1 - t, t)  # [B, T]
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return jnp.take_along_axis(x, index, axis=1, mode="promise_in_bounds")


def token_mask(lengths: Array, steps: int) -> Array:
    """Return a mask ``[B, T]`` that is True on valid steps."""
    return jnp.arange(steps)[None, :] < lengths[:, None]


def stack_directions(x: Array, lengths: Array) -> Array:
    """Stack ``[B, T, ...]`` and its reversal to ``[D, B, T, ...]``."""
    return jnp.stack([x, reverse_valid(x, lengths)])


def join_directions(h: Array, lengths: Array) -> Array:
    """Join states ``[D, B, T, P]`` of a `stack_directions` input to ``[B, T, 2P]`` in text order."""
    forward, backward = h
    return jnp.concatenate([forward, reverse_valid(backward, lengths)], axis=-1)


class LSTM(nn.Module):
    """Layer of D independent LSTMs (Sak et al. 2014); each reads its input from left to right.

    Attributes:
        cells: H.
        projection: P, or None for P = H without a projection.
        clips: Bounds of the cell state and of the projected state.
        dtype: Matmul dtype. States and accumulation are float32 or wider.
        kernel: Name in `RECURRENCES`, or "auto" for the fastest that can run the layer. Parameters do not
            depend on it. "plain" differentiates in every mode, "fast" in reverse mode to any order, and
            "persistent" once in reverse mode.

    Examples:
        >>> import jax
        >>> layer = LSTM(cells=4)
        >>> x, lengths = jnp.zeros((2, 3, 5, 6)), jnp.array([5, 2, 0])
        >>> (h, state), _ = layer.init_with_output(jax.random.key(0), x, lengths)
        >>> h.shape, state.c.shape
        ((2, 3, 5, 4), (2, 3, 4))
    """

    cells: int
    projection: int | None = None
    clips: Clips = Clips()
    dtype: str = "float32"
    kernel: Kernel = "auto"

    def choose(self) -> str:
        """Return the name of the recurrence that runs this layer here.

        Raises:
            InputError: the requested kernel cannot run the layer.
        """
        name: str = self.kernel
        if name == "cudnn":
            message = 'kernel "cudnn" was removed and runs as "auto"; its name ends with the next release'
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            name = "auto"
        layer = self.cells, self.projection, self.dtype
        if name == "auto":
            return next(each for each in _AUTOMATIC if not RECURRENCES[each].unsupported_reason(*layer))
        if name not in RECURRENCES:
            raise InputError(f"kernel must be one of auto, {', '.join(RECURRENCES)}, not {name!r}")
        if reason := RECURRENCES[name].unsupported_reason(*layer):
            raise InputError(f'kernel "{name}" cannot run this layer: {reason}; use "auto"')
        return name

    @nn.compact
    def __call__(self, x: Array, lengths: Array, state: State | None = None) -> tuple[Array, State]:
        """Run the layer over all steps.

        Args:
            x: ``[D, B, T, I]``.
            lengths: ``[B]`` int32. Outputs beyond them are meaningless, and inputs beyond them affect neither
                the valid outputs nor the returned state.
            state: First state, c ``[D, B, H]`` and h ``[D, B, P]``; zeros if None.

        Returns:
            h ``[D, B, T, P]``, and the state after the last valid step of each row.

        Raises:
            InputError: the requested kernel cannot run the layer.
        """
        recurrence = RECURRENCES[self.choose()]
        d, b, t, i = x.shape
        hidden, out = self.cells, self.projection or self.cells
        w_x = self.param("input_kernel", _glorot, (d, i, 4 * hidden))
        w_h = self.param("recurrent_kernel", _glorot, (d, out, 4 * hidden))
        bias = self.param("bias", nn.initializers.zeros, (d, 4 * hidden))
        w_p = None
        if self.projection is not None:
            w_p = self.param("projection_kernel", _glorot, (d, hidden, out)).astype(self.dtype)
        w = Weights(w_h.astype(self.dtype), bias, w_p)
        if state is None:
            dtype = np.promote_types(w.recurrent.dtype, np.float32)
            state = State(jnp.zeros((d, b, hidden), dtype), jnp.zeros((d, b, out), dtype))
        x, lengths, state, w_x, w = align_varying((x, lengths, state, w_x, w))
        if 0 in (b, t):
            return jnp.zeros((d, b, t, out), state.h.dtype), state
        states = recurrence.run(self, x, state, w_x.astype(self.dtype), w, self.clips)
        return states.h, _last_valid(state, states, lengths)


def _last_valid(first: State, states: State, lengths: Array) -> State:
    """Return the state after each row's last valid step; the first state for rows without one."""

    def pick(first: Array, every: Array) -> Array:
        index = jnp.maximum(lengths - 1, 0)[None, :, None, None]
        last = jnp.take_along_axis(every, index, axis=2)[:, :, 0]  # [D, B, H or P]
        return jnp.where((lengths > 0)[None, :, None], last, first)

    return State(pick(first.c, states.c), pick(first.h, states.h))
