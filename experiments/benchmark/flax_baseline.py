"""Other ways to do the benchmark's work in JAX: Flax and Optax as they come, and cuDNN's LSTM.

Axes: B batch, T time, D direction, H cells, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from elmo_jax.models.lstm import reverse_valid
from experiments.benchmark.cases import DIRECTIONS, Case
from experiments.benchmark.inputs import weights_of
from experiments.benchmark.runner import RATE, Arrays, Built
from experiments.benchmark.workloads import (
    first_gradients,
    lstm_gradients,
    softmax_gradients,
)

# One direction's layers: weights, x [T, B, I] -> h [T, B, H].
Stack = Callable[[Any, Array], Array]


def build_flax(case: Case, arrays: Arrays) -> Built:
    """`nn.RNN` of `OptimizedLSTMCell`, logits kept whole, Optax's cross-entropy and Adam."""
    return _build(case, arrays, flax_stack(case))


def build_cudnn(case: Case, arrays: Arrays) -> Built:
    """`jax.experimental.rnn` called for each direction; all else as in `build_flax`."""
    return _build(case, arrays, cudnn_stack(case))


def _build(case: Case, arrays: Arrays, stack: Stack) -> Built:
    if case.part == "lstm":
        cotangent = jnp.asarray(arrays["cotangent"])

        def loss(weights: Any, x: Array) -> Array:
            return sum(
                jnp.sum(stack(_direction(weights, d), x[:, d]).astype(jnp.float32) * cotangent[:, d])
                for d in range(DIRECTIONS)
            )  # type: ignore[return-value]

        return lstm_gradients(loss, case, arrays)
    if case.part == "softmax":
        targets = jnp.asarray(arrays["targets"])
        return softmax_gradients(lambda h, w, b: jnp.sum(_cross_entropy(h, w, b, targets)), arrays)
    if case.part == "step":
        return _step(case, arrays, stack)
    raise ValueError(f"no such peer of {case.part}")


def _direction(weights: Any, d: int) -> Any:
    lstm = {name: layer for name, layer in weights.items() if name.startswith("lstm")}
    return jax.tree.map(lambda w: w[d], lstm)


def _cross_entropy(hidden: Array, table: Array, bias: Array, targets: Array) -> Array:
    logits = hidden @ table.astype(hidden.dtype).T + bias.astype(hidden.dtype)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def flax_stack(case: Case) -> Stack:
    """Layers of Flax's own LSTM, the forget gate's bias of 1 added to its parameter."""
    dtype = jnp.bfloat16 if case.precision == "bfloat16" else jnp.float32
    layer = nn.RNN(nn.OptimizedLSTMCell(case.cells, dtype=dtype), time_major=True)

    def run(weights: Any, x: Array) -> Array:
        h: Any = x
        for i in range(case.layers):
            w = weights[f"lstm_{i}"]
            split = (jnp.split(w[kind], 4, axis=-1) for kind in ("input_kernel", "recurrent_kernel", "bias"))
            cell = {}
            for gate, w_x, w_h, bias in zip("igfo", *split, strict=True):  # Flax's g is bilm-tf's j
                cell[f"i{gate}"] = {"kernel": w_x}
                cell[f"h{gate}"] = {"kernel": w_h, "bias": bias + (1 if gate == "f" else 0)}
            h = layer.apply({"params": {"cell": cell}}, h)
        return h

    return run


def cudnn_stack(case: Case) -> Stack:
    """cuDNN's LSTM through JAX; float32, its products in TF32 if the case says so."""
    from jax.experimental import rnn

    precision = jax.lax.Precision.HIGH if case.precision == "tf32" else jax.lax.Precision.HIGHEST

    def run(weights: Any, x: Array) -> Array:
        steps, rows, width = x.shape
        zero = jnp.zeros((case.layers, rows, case.cells))
        kinds = ("input_kernel", "recurrent_kernel", "bias")
        packed = pack_weights([tuple(weights[f"lstm_{i}"][k] for k in kinds) for i in range(case.layers)])
        lengths = jnp.full(rows, steps, jnp.int32)
        sizes = (width, case.cells, case.layers, 0.0, False, precision)
        out: Any = rnn.lstm(x.swapaxes(0, 1), zero, zero, packed, lengths, *sizes)
        return out[0].swapaxes(0, 1)

    return run


def pack_weights(layers: Sequence[tuple[Array, Array, Array]]) -> Array:
    """Return one direction's layers as cuDNN's weight vector: all matrices, then all biases.

    cuDNN adds two biases: the first is this library's plus 1 at the forget gate, the second is 0.

    Args:
        layers: for each layer, its input kernel ``[I, 4H]``, recurrent kernel ``[H, 4H]`` and bias ``[4H]``.

    Returns:
        ``[sum of 4H (I + H + 2)]``.

    Example:
        >>> pack_weights([(jnp.ones((3, 8)), jnp.ones((2, 8)), jnp.zeros(8))]).shape
        (56,)
    """
    matrices, biases = [], []
    for *kernels, bias in layers:
        forget = jnp.repeat(jnp.array([0, 0, 1, 0], bias.dtype), len(bias) // 4)
        matrices += [_reorder(kernel).T.reshape(-1) for kernel in kernels]
        biases += [_reorder(bias + forget), jnp.zeros_like(bias)]
    return jnp.concatenate(matrices + biases)


def _reorder(w: Array) -> Array:
    """Reorder the gates on the last axis from i, j, f, o to cuDNN's i, f, g, o (its g is j)."""
    i, j, f, o = jnp.split(w, 4, axis=-1)
    return jnp.concatenate([i, f, j, o], axis=-1)


def _step(case: Case, arrays: Arrays, stack: Stack) -> Built:
    lengths = jnp.asarray(arrays["lengths"])
    words = jnp.asarray(arrays["words"])
    dtype = jnp.bfloat16 if case.precision == "bfloat16" else jnp.float32

    def loss(params: Any) -> Array:
        total = jnp.zeros(())
        for d, ids in enumerate((words, reverse_valid(words, lengths))):
            x = jnp.take(params["embedder"]["table"], ids[:, :-1].T, axis=0)  # [T, B, E]
            h = stack(_direction(params, d), x).reshape(-1, case.width).astype(dtype)
            each = _cross_entropy(
                h, params["softmax_table"], params["softmax_bias"], ids[:, 1:].T.reshape(-1)
            )
            total += each.mean() / DIRECTIONS
        return total

    optimizer = optax.adam(RATE)

    def update(params: Any, opt_state: Any):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    step = jax.jit(update, donate_argnums=(0, 1))
    held: Any = weights_of(arrays)
    held = [held, optimizer.init(held)]

    def run(n: int) -> list[Array]:
        losses = []
        for _ in range(n):
            held[0], held[1], value = step(*held)
            losses.append(value)
        return jax.block_until_ready((held, losses))[1]

    def check() -> dict[str, np.ndarray]:
        first = run(1)
        gradients = first_gradients(held[1])
        return {"loss": np.array([*first, *run(2)])} | gradients

    return Built(check, [(run, 1.0)])
