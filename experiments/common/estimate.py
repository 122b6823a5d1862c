"""Memory, arithmetic and time of a pre-training run, estimated from a few timed steps."""

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from elmo_jax.data.batching import StepChunk
from elmo_jax.parallel import find_mesh
from elmo_jax.training.optimizers import Optimizer
from elmo_jax.training.step import (
    LossFn,
    TrainState,
    compile_steps,
    feed,
    runs_all_steps,
    shape_key,
    train_step,
)
from experiments.common.cli import process_peak, say

CALLS = 4  # multi-step calls to time
_SECONDS = 10.0  # time limit for the timed steps


def estimate(
    state: TrainState, loss_fn: LossFn, optimizer: Optimizer, stream: Any, steps: float, seed: int
) -> None:
    """Print the estimated memory, arithmetic and time of a run.

    Args:
        state: State before the first step; its buffers are donated.
        loss_fn: Loss function.
        optimizer: Optimizer.
        stream: Training batches, or a part of them.
        steps: Number of steps of the run.
        seed: Random seed of the steps.
    """
    key = jax.random.key(seed)
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    chunks = list(itertools.islice(feed(stream, 0, stream.steps_per_epoch, find_mesh(state)), CALLS))
    count, words, flops, seconds = _time_steps(state, loss_fn, optimizer, chunks, key)
    device = jax.devices()[0].memory_stats() or {}
    peak = device.get("peak_bytes_in_use") or process_peak()
    at_peak = "" if peak is None else f", {peak / 1e6:,.0f} MB at the peak"
    say(f"memory: {state_bytes / 1e6:,.0f} MB of parameters and optimizer state{at_peak}")
    say(f"arithmetic: {flops / words / 1e6:,.2f} million FLOPs a token in matmuls, padding included")
    say(
        f"speed: {words / seconds:,.0f} tokens/s, {seconds / count * 1e3:,.1f} ms a step, "
        f"{flops / seconds / 1e9:,.1f} GFLOP/s"
    )
    say(f"the run: {steps:,.0f} steps in {steps * seconds / count / 3600:.2f} hours, without evaluation")


def _time_steps(
    state: TrainState, loss_fn: LossFn, optimizer: Optimizer, chunks: list[StepChunk], key: jax.Array
) -> tuple[int, float, float, float]:
    """Run chunks until the time is up; return the steps that ran, their words, FLOPs and seconds."""
    run = compile_steps(loss_fn, optimizer, state)
    flops_by_shape: dict[Any, float] = {}
    total, words, flops, seconds = 0, 0.0, 0.0, 0.0
    for batches, count in chunks:
        shape = shape_key(batches)
        if shape not in flops_by_shape:
            batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
            step = jax.make_jaxpr(lambda s, b: train_step(s, b, key, loss_fn, optimizer))(state, batch)
            flops_by_shape[shape] = matmul_flops(step.jaxpr)
            state, _ = run(state, batches, 1, key)
        jax.block_until_ready(state)
        # The first chunk runs one step; its duration determines how many steps fit into the time limit.
        steps = min(count, 1 + int(_SECONDS * total / seconds)) if total else 1
        steps = count if runs_all_steps() else steps
        start = time.perf_counter()
        state, metrics = jax.block_until_ready(run(state, batches, steps, key))
        seconds += time.perf_counter() - start
        total += steps
        flops += steps * flops_by_shape[shape]
        words += float(np.sum(metrics["words"]))
        if seconds > _SECONDS:
            break
    return total, words, flops, seconds


def matmul_flops(jaxpr: Any) -> float:
    """Count the floating-point operations of a traced function's matmuls, every loop step included.

    XLA's own cost analysis counts the body of a loop once, and an LSTM is a loop.

    Args:
        jaxpr: Attribute `jaxpr` of the result of `jax.make_jaxpr`.

    Examples:
        >>> import jax.numpy as jnp
        >>> product = lambda a, b: jax.lax.scan(lambda x, _: (x @ b, None), a, length=5)[0]
        >>> matmul_flops(jax.make_jaxpr(product)(jnp.ones((2, 3)), jnp.ones((3, 3))).jaxpr)
        180.0
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)
        each = [matmul_flops(inner) for inner in _inner_jaxprs(eqn.params)]
        if each:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            total += times * (max(each) if eqn.primitive.name == "cond" else sum(each))
    return total


def _inner_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
