"""What a pre-training run would cost: its memory, arithmetic and time, from a few timed steps."""

import itertools
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from elmo_jax.data import Dispatch
from elmo_jax.dispatch import make_dispatch, shapes_of, takes_all
from elmo_jax.mesh import feed, mesh_of
from elmo_jax.train import LossFn, Optimizer, TrainState, train_step
from experiments import cli

TIMED = 4  # dispatches
_ENOUGH = 10.0  # seconds of timing
PORTION = 1 << 19  # tokens of a corpus that they are taken from, at least


def estimate(
    state: TrainState, loss_fn: LossFn, optimizer: Optimizer, stream: Any, steps: float, seed: int
) -> None:
    """Say what a run would cost.

    Args:
        state: before the first step; it is used up.
        loss_fn: the task.
        optimizer: of the run.
        stream: of the text, or of a portion of it.
        steps: of the whole run.
        seed: of the steps' randomness.
    """
    key = jax.random.key(seed)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    dispatches = list(itertools.islice(feed(stream, 0, stream.steps_per_epoch, mesh_of(state)), TIMED))
    shapes = jax.eval_shape(lambda: state)
    ran, words, seconds = _time(state, loss_fn, optimizer, dispatches, key)
    flops = _flops(shapes, loss_fn, optimizer, ran, key)
    count = sum(part.count for part in ran)
    peak = cli.peak_memory()
    at_most = "" if peak is None else f", {peak / 1e6:,.0f} MB at the peak"
    cli.say(f"memory: {held / 1e6:,.0f} MB of parameters and optimiser{at_most}")
    cli.say(
        f"arithmetic: {flops / words / 1e6:,.2f} million FLOPs a token in matrix products, padding counted"
    )
    cli.say(
        f"speed: {words / seconds:,.0f} tokens/s, {seconds / count * 1e3:,.1f} ms a step, "
        f"{flops / seconds / 1e9:,.1f} GFLOP/s"
    )
    cli.say(
        f"the run: {steps:,.0f} steps in {steps * seconds / count / 3600:.2f} hours, without its evaluations"
    )


def _time(
    state: TrainState, loss_fn: LossFn, optimizer: Optimizer, dispatches: list[Dispatch], key: jax.Array
) -> tuple[list[Dispatch], float, float]:
    """What was run of these dispatches, each compiled before, in how many words and seconds."""
    run = make_dispatch(loss_fn, optimizer, state)
    compiled: set[Any] = set()
    ran: list[Dispatch] = []
    words, seconds = 0.0, 0.0
    for batches, count in dispatches:
        shape = shapes_of(batches)
        if shape not in compiled:
            state, _ = run(state, batches, 1, key)
            compiled.add(shape)
        jax.block_until_ready(state)
        # One step first, which says how many there is time for.
        steps = min(count, 1 + int(_ENOUGH * sum(part.count for part in ran) / seconds)) if ran else 1
        steps = count if takes_all() else steps
        began = time.perf_counter()
        state, sums = jax.block_until_ready(run(state, batches, steps, key))
        seconds += time.perf_counter() - began
        ran.append(Dispatch(batches, steps))
        words += float(np.sum(sums["words"]))
        if seconds > _ENOUGH:
            break
    return ran, words, seconds


def _flops(
    shapes: TrainState, loss_fn: LossFn, optimizer: Optimizer, dispatches: list[Dispatch], key: jax.Array
) -> float:
    """Of the matrix products of all these steps; only the shapes of the state are read."""
    total, of_shape = 0.0, {}
    for batches, count in dispatches:
        shape = shapes_of(batches)
        if shape not in of_shape:
            batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
            step = jax.make_jaxpr(lambda s, b: train_step(s, b, key, loss_fn, optimizer))(shapes, batch)
            of_shape[shape] = matmul_flops(step.jaxpr)
        total += count * of_shape[shape]
    return total


def matmul_flops(jaxpr: Any) -> float:
    """Floating-point operations of a traced function's matrix products, a loop's steps each counted.

    The compiler's own count takes the body of a loop once, and an LSTM is a loop.

    Args:
        jaxpr: as `jax.make_jaxpr` gives it, opened.

    Example:
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
        each = [matmul_flops(inner) for inner in _inside(eqn.params)]
        if each:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            total += times * (max(each) if eqn.primitive.name == "cond" else sum(each))
    return total


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    """The functions that an operation calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
