"""cuDNN's LSTM in place of a layer's scan, where its equations and precision are this library's.

Nouns: the *packed* weights are the one vector that cuDNN reads; its gates are i, f, g, o,
where g is our j.
Axes: B batch, T time, D direction, I input, H cells.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.backend import get_backend
from jax.typing import DTypeLike

from elmo_jax.ops.lstm import FORGET_BIAS, Clips, State, Weights

# Settings of jax_default_matmul_precision that leave products at least as rough as TF32.
ROUGH = (None, "default", "fastest", "bfloat16", "bfloat16_3x", "tensorfloat32", "high")


def on_cuda() -> bool:
    """Whether programs are compiled for CUDA unless told otherwise."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    backend = device.client if isinstance(device, jax.Device) else get_backend(device)
    return "cuda" in backend.platform_version


def unsupported_reason(projection: int | None, clips: Clips, dtype: DTypeLike) -> str | None:
    """What keeps cuDNN from a layer, or None.

    Args:
        projection: P, or None.
        clips: of the cells and the projection.
        dtype: of the products.

    Example:
        >>> unsupported_reason(None, Clips(), "bfloat16")
        'cuDNN here computes in float32 or TF32, not in bfloat16'
    """
    if projection is not None:
        return "cuDNN projects no cells, and these are projected"
    if clips != Clips():
        return "cuDNN clips no cells here, and these are clipped"
    if jnp.dtype(dtype) != jnp.float32:
        return f"cuDNN here computes in float32 or TF32, not in {jnp.dtype(dtype)}"
    return None if on_cuda() else "there is no CUDA device here"


def pack_weights(layers: Sequence[tuple[Array, Array, Array]]) -> Array:
    """One direction's layers as the vector that cuDNN reads: all matrices, then all biases.

    cuDNN adds two biases; ours is the first, with the forget gate's 1, and the second is 0.

    Args:
        layers: of each, x to gates ``[I, 4H]``, h to gates ``[H, 4H]`` and their bias ``[4H]``.

    Returns:
        ``[sum of 4H (I + H + 2)]``.

    Example:
        >>> pack_weights([(jnp.ones((3, 8)), jnp.ones((2, 8)), jnp.zeros(8))]).shape
        (56,)
    """
    matrices, biases = [], []
    for *kernels, bias in layers:
        forget = jnp.repeat(jnp.array([0, 0, FORGET_BIAS, 0], bias.dtype), len(bias) // 4)
        matrices += [_reorder(kernel).T.reshape(-1) for kernel in kernels]
        biases += [_reorder(bias + forget), jnp.zeros_like(bias)]
    return jnp.concatenate(matrices + biases)


def _reorder(w: Array) -> Array:
    """Our gates i, j, f, o along the last axis as i, f, j, o."""
    i, j, f, o = jnp.split(w, 4, axis=-1)
    return jnp.concatenate([i, f, j, o], axis=-1)


def run_cudnn(x: Array, lengths: Array, state: State, w_x: Array, w: Weights) -> tuple[Array, State]:
    """A layer without projection and clips, direction after direction.

    Each is a call of its own: a bidirectional one would feed both directions to the next layer.

    Args:
        x: ``[D, B, T, I]`` float32.
        lengths: ``[B]`` int32.
        state: the first state, c and h ``[D, B, H]``.
        w_x: ``[D, I, 4H]``.
        w: the recurrent weights.

    Returns:
        h ``[D, B, T, H]``, 0 beyond the lengths, and the state after each row's last real
        step; rows without one keep the first.
    """
    from jax.experimental import rnn  # most runs have no use for it

    asked = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    precision = jax.lax.Precision.HIGH if asked in ROUGH else jax.lax.Precision.HIGHEST
    directions, _, _, inputs = x.shape
    sizes = inputs, w.recurrent.shape[1], 1, 0.0, False, precision  # one layer, no dropout, one direction
    some = jnp.maximum(lengths, 1)  # cuDNN refuses rows without a step
    each = []
    for d in range(directions):
        packed = pack_weights([(w_x[d], w.recurrent[d], w.bias[d])])
        each.append(rnn.lstm(x[d], state.h[d][None], state.c[d][None], packed, some, *sizes))
    h, last_h, last_c = (jnp.stack(part) for part in zip(*each, strict=True))
    real = (lengths > 0)[None, :, None]
    return h, State(jnp.where(real, last_c[:, 0], state.c), jnp.where(real, last_h[:, 0], state.h))
