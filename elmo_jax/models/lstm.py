"""Projected LSTM layers that run several directions at once over padded batches.

Nouns: a *layer* is D independent LSTMs behind one call. Direction is an axis, not a code
path: a caller stacks a batch and its `reverse_valid`, and both are read left to right.
Axes: B batch, T time, D direction, I input, H cells, P projection (P = H without one).
"""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from elmo_jax.config import Kernel
from elmo_jax.errors import InputError
from elmo_jax.ops.lstm import Clips, State, Weights, batched_product, lstm_scan_vjp, lstm_step
from elmo_jax.ops.lstm_pallas import run_persistent, unsupported_reason
from elmo_jax.parallel import align_varying

# Glorot's fans, with the direction axis left out of them.
_glorot = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform", batch_axis=0)


@jax.custom_vjp
def reverse_valid(x: Array, lengths: Array) -> Array:
    """Reverse the real steps of every row; padding stays where it is.

    ``y[b, t] = x[b, lengths[b] - 1 - t]`` for t < lengths[b], else ``x[b, t]``. It is its
    own inverse and its own transpose, so the gradient is a gather and never a scatter.

    Args:
        x: ``[B, T, ...]``, any dtype.
        lengths: ``[B]`` int32, real steps a row.

    Returns:
        ``[B, T, ...]``, dtype of x.

    Example:
        >>> reverse_valid(jnp.array([[1, 2, 3, 0]]), jnp.array([3])).tolist()
        [[3, 2, 1, 0]]
    """
    t = jnp.arange(x.shape[1])[None, :]
    n = lengths[:, None]
    index = jnp.where(t < n, n - 1 - t, t)  # [B, T]
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


reverse_valid.defvjp(
    lambda x, lengths: (reverse_valid(x, lengths), lengths),
    lambda lengths, g: (reverse_valid(g, lengths), None),
)


def token_mask(lengths: Array, steps: int) -> Array:
    """``[B, T]`` bool, true on real steps."""
    return jnp.arange(steps)[None, :] < lengths[:, None]


def stack_directions(x: Array, lengths: Array) -> Array:
    """``[B, T, ...]`` to ``[D, B, T, ...]``: as it is, and from each row's end."""
    return jnp.stack([x, reverse_valid(x, lengths)])


def join_directions(h: Array, lengths: Array) -> Array:
    """States ``[D, B, T, P]`` of what was read `stack_directions` to ``[B, T, 2P]``, backward turned back."""
    forward, backward = h
    return jnp.concatenate([forward, reverse_valid(backward, lengths)], axis=-1)


class LSTM(nn.Module):
    """One layer of D independent LSTMs, all read in the order they are given.

    Attributes:
        cells: H.
        projection: P, or None for h of H without a projection.
        clips: bounds of the cell and of the projection.
        dtype: of the products; states and sums are float32 at least.
        kernel: what runs the steps, see `choose`; parameters are the same for all.

    Example:
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

    def choose(self) -> Kernel:
        """The kernel that runs here.

        "fast" is `lstm_scan_vjp`, "plain" is `nn.scan` over `lstm_step`, "persistent" is
        `run_persistent`. "auto" is "persistent" where it can run the layer, else "fast";
        "cudnn" is deprecated and means "auto". Second gradients are "fast"'s and "plain"'s alone, and
        `jax.jvp` is "plain"'s.

        Raises:
            InputError: the kernel that is asked for cannot run the layer.
        """
        kernel = self.kernel
        if kernel == "cudnn":
            message = 'kernel "cudnn" was removed and runs as "auto"; its name ends with the next release'
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            kernel = "auto"
        reason = unsupported_reason(self.cells, self.projection, self.dtype)
        if kernel == "auto":
            return "fast" if reason else "persistent"
        if kernel == "persistent" and reason:
            raise InputError(f'kernel "persistent" cannot run this layer: {reason}; use "auto"')
        return kernel

    @nn.compact
    def __call__(self, x: Array, lengths: Array, state: State | None = None) -> tuple[Array, State]:
        """Run the layer over every step.

        Args:
            x: ``[D, B, T, I]``.
            lengths: ``[B]`` int32. What is returned of steps beyond them means nothing; they
                reach neither the real steps nor the returned state.
            state: the first state, c ``[D, B, H]`` and h ``[D, B, P]``; zeros if None.

        Returns:
            h ``[D, B, T, P]``, and the state after each row's last real step.

        Raises:
            InputError: see `choose`.
        """
        kernel = self.choose()
        d, b, steps, inputs = x.shape
        hidden, out = self.cells, self.projection or self.cells
        w_x = self.param("input_kernel", _glorot, (d, inputs, 4 * hidden))
        w_h = self.param("recurrent_kernel", _glorot, (d, out, 4 * hidden))
        bias = self.param("bias", nn.initializers.zeros, (d, 4 * hidden))
        w_p = None
        if self.projection is not None:
            w_p = self.param("projection_kernel", _glorot, (d, hidden, out)).astype(self.dtype)
        w = Weights(w_h.astype(self.dtype), bias, w_p)

        if state is None:
            sums = np.promote_types(w.recurrent.dtype, np.float32)
            state = State(jnp.zeros((d, b, hidden), sums), jnp.zeros((d, b, out), sums))
        x, lengths, state, w_x, w = align_varying((x, lengths, state, w_x, w))
        if 0 in (b, steps):
            return jnp.zeros((d, b, steps, out), state.h.dtype), state
        w_x = w_x.astype(self.dtype)
        if kernel == "persistent":
            states: Any = run_persistent(state, batched_product(x, w_x), w, self.clips)
        elif kernel == "fast":
            states = lstm_scan_vjp(x, state, w_x, w, self.clips)
        else:

            def body(_, state: State, gates: Array):
                state = lstm_step(state, gates, w, self.clips)
                return state, state

            scan = nn.scan(
                body, variable_broadcast="params", split_rngs={"params": False}, in_axes=2, out_axes=2
            )
            carried: Any = scan(self, state, batched_product(x, w_x))
            states = carried[1]
        return states.h, _last(state, states, lengths)


def _last(first: State, states: State, lengths: Array) -> State:
    """The state after each row's last real step; rows without one keep the first."""

    def pick(first: Array, every: Array) -> Array:
        index = jnp.maximum(lengths - 1, 0)[None, :, None, None]
        last = jnp.take_along_axis(every, index, axis=2)[:, :, 0]  # [D, B, H or P]
        return jnp.where((lengths > 0)[None, :, None], last, first)

    return State(pick(first.c, states.c), pick(first.h, states.h))
