"""Implementations of the benchmark cases by Flax and Optax, by cuDNN through JAX, and by gensim."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from elmo_jax.models.lstm import reverse_valid
from experiments.benchmark import cases
from experiments.benchmark.cases import DIRECTIONS, Arrays, Case, Workload
from experiments.benchmark.workloads import (
    first_gradients,
    load_weights,
    time_lstm_gradients,
    time_softmax_gradients,
)

# pyright: reportMissingImports=false

# One direction's layers: weights, x [T, B, E] -> h [T, B, H].
Stack = Callable[[Any, Array], Array]


def _make_flax_stack(case: Case) -> Stack:
    """Return layers of Flax's LSTM, with 1 added to the bias of the forget gate."""
    dtype = jnp.bfloat16 if case.precision == "bfloat16" else jnp.float32
    layer = nn.RNN(nn.OptimizedLSTMCell(case.cells, dtype=dtype), time_major=True)

    def run(weights: Any, x: Array) -> Array:
        h: Any = x
        for i in range(case.layers):
            w = weights[f"lstm_{i}"]
            split = (jnp.split(w[kind], 4, axis=-1) for kind in ("input_kernel", "recurrent_kernel", "bias"))
            cell = {}
            for gate, w_x, w_h, bias in zip("igfo", *split, strict=True):  # Flax's g is elmo_jax's j
                cell[f"i{gate}"] = {"kernel": w_x}
                cell[f"h{gate}"] = {"kernel": w_h, "bias": bias + (1 if gate == "f" else 0)}
            h = layer.apply({"params": {"cell": cell}}, h)
        return h

    return run


def _make_cudnn_stack(case: Case) -> Stack:
    """Return cuDNN's LSTM layers in float32, or with matmuls in TF32."""
    from jax.experimental import rnn

    precision = jax.lax.Precision.HIGH if case.precision == "tf32" else jax.lax.Precision.HIGHEST

    def run(weights: Any, x: Array) -> Array:
        steps, rows, width = x.shape
        zero = jnp.zeros((case.layers, rows, case.cells))
        packed = pack_weights([weights[f"lstm_{i}"] for i in range(case.layers)])
        lengths = jnp.full(rows, steps, jnp.int32)
        sizes = (width, case.cells, case.layers, 0.0, False, precision)
        out: Any = rnn.lstm(x.swapaxes(0, 1), zero, zero, packed, lengths, *sizes)
        return out[0].swapaxes(0, 1)

    return run


def pack_weights(layers: Sequence[Any]) -> Array:
    """Return one direction's layers as cuDNN's vector: all matrices, then all biases, of gates i, f, g, o.

    cuDNN adds two biases: the first one here includes the forget gate's 1, and the second one is 0.
    """
    matrices, biases = [], []
    for layer in layers:
        for kind in ("input_kernel", "recurrent_kernel", "bias"):
            i, j, f, o = jnp.split(layer[kind], 4, axis=-1)
            if kind == "bias":
                biases += [jnp.concatenate([i, f + 1, j, o]), jnp.zeros_like(layer[kind])]
            else:
                matrices.append(jnp.concatenate([i, f, j, o], axis=-1).T.reshape(-1))
    return jnp.concatenate(matrices + biases)


def _take_direction(weights: Any, d: int) -> Any:
    return {n: jax.tree.map(lambda w: w[d], layer) for n, layer in weights.items() if n.startswith("lstm")}


def build_lstm(
    case: Case, arrays: Arrays, make_stack: Callable[[Case], Stack] = _make_flax_stack
) -> Workload:
    """Time forward and backward passes of a stack for each direction."""
    stack, cotangent = make_stack(case), jnp.asarray(arrays["cotangent"])

    def loss(weights: Any, x: Array) -> Array:
        total = jnp.zeros(())
        for d in range(DIRECTIONS):
            h = stack(_take_direction(weights, d), x[:, d])
            total += jnp.sum(h.astype(jnp.float32) * cotangent[:, d])
        return total

    return time_lstm_gradients(loss, case, arrays, jnp.asarray(arrays["x"]))


def _cross_entropy(hidden: Array, table: Array, bias: Array, targets: Array) -> Array:
    logits = hidden @ table.astype(hidden.dtype).T + bias.astype(hidden.dtype)
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)


def build_softmax(case: Case, arrays: Arrays) -> Workload:
    """Time Optax's cross-entropy of logits that are all in memory."""
    targets = jnp.asarray(arrays["targets"])
    return time_softmax_gradients(lambda h, w, b: jnp.sum(_cross_entropy(h, w, b, targets)), arrays)


def build_step(
    case: Case, arrays: Arrays, make_stack: Callable[[Case], Stack] = _make_flax_stack
) -> Workload:
    """Time training steps with the full softmax and Optax's Adam."""
    stack = make_stack(case)
    lengths, words = jnp.asarray(arrays["lengths"]), jnp.asarray(arrays["words"])
    dtype = jnp.bfloat16 if case.precision == "bfloat16" else jnp.float32

    def loss(params: Any) -> Array:
        total = jnp.zeros(())
        for d, ids in enumerate((words, reverse_valid(words, lengths))):
            x = jnp.take(params["embedder"]["table"], ids[:, :-1].T, axis=0)  # [T, B, E]
            h = stack(_take_direction(params, d), x).reshape(-1, case.width).astype(dtype)
            targets = ids[:, 1:].T.reshape(-1)
            total += _cross_entropy(h, params["softmax_table"], params["softmax_bias"], targets).mean()
        return total / DIRECTIONS

    optimizer = optax.adam(cases.LEARNING_RATE)

    def update(params: Any, opt_state: Any):
        value, gradients = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    step = jax.jit(update, donate_argnums=(0, 1))
    held: Any = load_weights(arrays)
    held = [held, optimizer.init(held)]

    def run(n: int) -> list[Array]:
        losses = []
        for _ in range(n):
            *held[:], value = step(*held)
            losses.append(value)
        return jax.block_until_ready((held, losses))[1]

    def check() -> dict[str, np.ndarray]:
        first = run(1)
        gradients = first_gradients(held[1])
        return {"loss": np.array([*first, *run(2)])} | gradients

    return Workload(check, [(run, 1.0)])


build_lstm_cudnn = partial(build_lstm, make_stack=_make_cudnn_stack)
build_step_cudnn = partial(build_step, make_stack=_make_cudnn_stack)


def build_gensim(case: Case, arrays: Arrays) -> Workload:
    """Time an epoch of gensim's skip-gram with elmo_jax's settings, after its vocabulary is counted."""
    from gensim.models import Word2Vec

    ids = arrays["ids"]
    words = [str(i) for i in ids.tolist()]
    text = [words[i : i + 1000] for i in range(0, len(words), 1000)]
    settings: dict[str, Any] = {"sg": 1, "negative": 5, "window": 4, "sample": 1e-3, "min_count": 1}
    settings |= {"alpha": 0.025, "min_alpha": 0.0, "vector_size": case.width}
    model = Word2Vec(workers=os.cpu_count() or 1, **settings)
    model.build_vocab(text)

    def run(n: int) -> None:
        for _ in range(n):
            model.train(text, total_examples=model.corpus_count, epochs=1)

    def check() -> dict[str, np.ndarray]:
        run(1)
        centre, context = (np.zeros((case.vocabulary, case.width), np.float32) for _ in range(2))
        known = np.array([int(word) for word in model.wv.index_to_key])
        centre[known], context[known] = model.wv.vectors, model.syn1neg
        return {"loss": cases.skip_gram_loss(ids, centre, context)}

    return Workload(check, [(run, 1.0)])
