"""How training steps are compiled and handed to a device, many at a time; it knows no model.

Nouns: a *task* is as in `train`; a *dispatch* is one call of the device that takes several steps.
"""

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from elmo_jax.data import Batch
from elmo_jax.mesh import everywhere, mesh_of, on
from elmo_jax.train import LargeProducts, LossFn, Optimizer, Params, TrainState, train_step


def compiler_options(large: bool) -> dict[str, Any]:
    """What XLA:CPU is told of a step's program, as far as it knows the words, for `jax.jit`.

    It is told not to copy what a step writes over, or it copies Adam's moments of every table
    in every step, and they are large; and to take vectors of 512 bits where the processor has
    them, of which it takes half by itself. What ``XLA_FLAGS`` settles is left at that.

    Args:
        large: whether the program is one of large products, see `LargeProducts`.

    Returns:
        Names and values; none for any other compiler.

    Example:
        >>> step = jax.jit(lambda x: x @ x.T, compiler_options=compiler_options(large=True))
        >>> step(jnp.ones((1, 2))).tolist()
        [[2.0]]
    """
    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {
        "xla_cpu_copy_insertion_use_region_analysis": True,
        "xla_cpu_prefer_vector_width": 512,
    }
    if large:  # by default it takes each product by itself
        fused = "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
        options["xla_cpu_experimental_ynn_fusion_type"] = fused
    settled = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in settled and _knows(name, value)}


@cache  # for it compiles a program
def _knows(option: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def takes_all() -> bool:
    """Whether a dispatch takes all of its K steps, those beyond its count in vain.

    Whether a loop of unknown length goes on, an accelerator asks its host at every step; so there
    the length is K, known when it is compiled.
    """
    return jax.default_backend() != "cpu"


def make_dispatch(
    loss_fn: LossFn, optimizer: Optimizer, like: TrainState | None = None, ahead: Iterable[Any] = ()
):
    """Compile `train_step` over up to K batches in one call, the state donated.

    Args:
        loss_fn: the task.
        optimizer: as the state was created with.
        like: a state as every next one will be, or its shapes, if it lies on a mesh or anything is
            given `ahead`.
        ahead: batches of shapes that will come; others are compiled when they come. An accelerator
            works while they are compiled, side by side; a CPU is busy with it, one after the
            other, until this returns. Their key is one of JAX's default kind.

    Returns:
        ``(state, batches [K, ...], count, key) -> (state, sums [K, ...])``; of the sums the
        first `count` were filled. Steps are the same however they are shared out to calls.
    """

    mesh, places = mesh_of(like), None
    known = takes_all()
    if like is not None and mesh is not None:
        places = jax.tree.map(lambda leaf: leaf.sharding, replace(like, frozen={})), everywhere(mesh)

    options = compiler_options(isinstance(loss_fn, LargeProducts))

    @partial(jax.jit, donate_argnums=0, out_shardings=places, compiler_options=options)
    def run(state: TrainState, frozen: Params, batches: Batch, count: Array, key: Array):
        state = replace(state, frozen=frozen)

        @partial(jax.jit, inline=True)  # it comes twice below, and is traced once
        def step(state: TrainState, batch: Batch, key: Array, wanted: Array | bool):
            return train_step(state, batch, key, loss_fn, optimizer, wanted)

        def is_wanted(i: Array | int) -> Array | bool:
            return i < count if known else True

        def body(i: Array, carry):
            state, filled = carry
            batch = jax.tree.map(lambda a: a[i], batches)
            state, sums = step(state, batch, key, is_wanted(i))
            return state, {name: filled[name].at[i].set(value) for name, value in sums.items()}

        first = jax.tree.map(lambda a: a[0], batches)
        shapes = jax.eval_shape(step, state, first, key, is_wanted(0))[1]
        steps = batches.words.shape[0]
        filled = {name: jnp.zeros((steps, *s.shape), s.dtype) for name, s in shapes.items()}
        state, filled = jax.lax.fori_loop(0, steps if known else count, body, (state, filled))
        return replace(state, frozen={}), filled

    programs: dict[Any, Future[Any]] = {}
    for batches in ahead:  # traced here, for a thread has settings of its own
        assert like is not None
        traced = run.lower(replace(like, frozen={}), like.frozen, batches, 1, jax.random.key(0))
        programs[shapes_of(batches)] = (_in_background if known else _now)(traced.compile)

    def dispatch(state: TrainState, batches: Any, count: int, key: Array):
        program = programs.get(shapes_of(batches)) if programs else None
        # What is frozen stays the caller's: it is neither donated nor copied.
        with on(mesh):
            go = program.result() if program else run
            after, sums = go(replace(state, frozen={}), state.frozen, batches, count, key)
        return replace(after, frozen=state.frozen), sums

    return dispatch


def _now(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(work())
    return future


def _in_background(work: Callable[[], Any]) -> Future[Any]:
    """What `work` returns or raises; a process that ends does not wait for it, as a pool's would."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def shapes_of(tree: Any) -> tuple[Any, ...]:
    """The shapes and dtypes of a pytree's arrays, by which programs for it differ."""
    return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))
