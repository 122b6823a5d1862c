"""What a training step is; it knows no model.

Nouns: a *task* is a pure ``loss_fn(params, batch, key) -> (loss, sums)``.

How training steps are compiled and handed to a device, many at a time; it knows no model.

Nouns: a *task* is as in `train`; a *dispatch* is one call of the device that takes several steps.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache, partial
from operator import itemgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh

from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import Batch, BatchStream
from elmo_jax.parallel import everywhere, feed, fetch, find_mesh, on
from elmo_jax.training.optimizers import RowSparse, RowSparseSGD

Params = dict[str, Any]
LossFn = Callable[[Params, Any, Array], tuple[Array, dict[str, Array]]]
SumsFn = Callable[[Params, Batch], dict[str, Array]]
RowsFn = Callable[[Params, Batch], Array]


@dataclass(frozen=True)
class MatmulBound:
    """A task whose time goes into large products that it adds up in a loop, as the full softmax does.

    Compiled for a CPU, such a product adds while it multiplies, and needs no room for what is
    added. Small products, as those of an LSTM's steps, are the slower for it, so a task says
    what it is; what it computes stays the same but for rounding. A function that calls a task
    so marked has to be marked itself.

    Attributes:
        loss_fn: the task.

    Example:
        >>> task = MatmulBound(lambda params, batch, key: (jnp.sum(params["w"] @ batch), {}))
        >>> loss, sums = task({"w": jnp.ones((2, 3))}, jnp.ones(3), jax.random.key(0))
        >>> float(loss)
        6.0
    """

    loss_fn: LossFn

    def __call__(self, params: Params, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        """The task."""
        return self.loss_fn(params, batch, key)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser for a run of that many steps."""
    warmup = max(1, round(config.warmup * steps))
    rest = max(1, steps - warmup)
    top = config.learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(top, rest),
        "linear": optax.linear_schedule(top, 0.0, rest),
        "constant": optax.constant_schedule(top),
    }[config.schedule]
    rate = optax.join_schedules([optax.linear_schedule(top / warmup, top, warmup - 1), after], [warmup])
    # The rate becomes part of the state, where a message about a failed step finds it.
    if config.optimizer != "adagrad":
        step = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))(rate)
    else:
        fixed = {"initial_accumulator_value": 1.0, "eps": 1e-7}
        step = optax.inject_hyperparams(optax.adagrad, static_args=tuple(fixed))(rate, **fixed)
    return optax.chain(optax.scale(config.gradient_scale), _clip_by_global_norm(config.clip_norm), step)


def _clip_by_global_norm(most: float) -> optax.GradientTransformation:
    """Optax's, by a factor: of its choice between two divisions XLA:CPU makes one more array a table."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm <= most, 1, most / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


Optimizer = optax.GradientTransformation | RowSparse | RowSparseSGD


@struct.dataclass
class TrainState:
    """What training changes, and what it reads.

    Attributes:
        step: int32, optimiser steps taken.
        params: trained.
        frozen: given to the task beside params, never changed.
        opt_state: of the optimiser.
        carry: given to the task beside params too; what its sums hold under the same names
            takes their place for the next step.
    """

    step: Array
    params: Params
    frozen: Params
    opt_state: Any
    carry: dict[str, Any]

    @classmethod
    def create(
        cls,
        params: Params,
        optimizer: Optimizer,
        frozen: Params | None = None,
        carry: dict[str, Any] | None = None,
    ) -> "TrainState":
        """The state before the first step."""
        with jax.numpy_dtype_promotion("standard"):  # see train_step
            opt_state = _first_state(optimizer, params)
        return cls(jnp.zeros((), jnp.int32), params, frozen or {}, opt_state, carry or {})


@partial(jax.jit, static_argnums=0)  # one program, or each leaf would be one
def _first_state(optimizer: Optimizer, params: Params) -> Any:
    return optimizer.init(params)


def train_step(
    state: TrainState,
    batch: Batch,
    key: Array,
    loss_fn: LossFn,
    optimizer: Optimizer,
    enabled: Array | bool = True,
) -> tuple[TrainState, dict[str, Array]]:
    """One step; its randomness is ``fold_in(key, state.step)``.

    If the loss or a gradient is not finite, the step is skipped: it is counted in
    ``state.step``, and changes nothing else. One that is not wanted changes nothing at all.

    Returns:
        The next state, and the task's sums with the ``loss`` among them, and ``steps``,
        which is 1; all are 0 if the step was skipped.
    """
    key = jax.random.fold_in(key, state.step)
    given = {**state.frozen, **state.carry}
    task = lambda params: loss_fn({**given, **params}, batch, key)  # noqa: E731
    by_rows = optimizer if isinstance(optimizer, RowSparse | RowSparseSGD) else RowSparse(optimizer)
    rows = by_rows.rows(batch, key)
    given_params = by_rows.given(state.params, rows)
    (loss, sums), gradients = jax.value_and_grad(task, has_aux=True)(given_params)
    is_finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradients)) & enabled
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes; a caller may be strict
        params, opt_state = by_rows.update(
            gradients, state.opt_state, state.params, rows, state.step, is_finite
        )
    after = {name: sums[name] for name in state.carry}
    carry = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, state.carry)
    counted = state.step + jnp.asarray(enabled, state.step.dtype)
    state = replace(state, step=counted, params=params, opt_state=opt_state, carry=carry)
    sums = {name: value for name, value in sums.items() if name not in carry}
    sums |= {"loss": loss, "steps": jnp.ones(())}
    return state, {name: jnp.where(is_finite, value, 0) for name, value in sums.items()}


def evaluate(sums_fn: SumsFn, params: Params, stream: BatchStream) -> dict[str, np.ndarray]:
    """The task's sums over one pass of a stream, added up in float64.

    Args:
        sums_fn: compiled ``(params, batch) -> sums``.
        params: all the task needs.
        stream: what it is of; of how many steps a dispatch does not matter.
    """
    mesh, waiting = find_mesh(params), deque[dict[str, Array]]()
    total: dict[str, np.ndarray] = {}

    def add(sums: dict[str, Array]) -> None:
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + fetch(value).astype(np.float64)

    for batch in _batches(stream, mesh):
        with on(mesh):
            waiting.append(sums_fn(params, batch))
        if len(waiting) > 2:  # the device stays busy, and memory flat
            add(waiting.popleft())
    for sums in waiting:
        add(sums)
    return total


def predict(rows_fn: RowsFn, params: Params, stream: BatchStream) -> np.ndarray:
    """A value for every document, in the order in which the stream's documents stand.

    Args:
        rows_fn: compiled ``(params, batch) -> [B, ...]``.
        params: all the task needs.
        stream: as for `evaluate`.

    Returns:
        ``[N, ...]``.
    """
    mesh, values = find_mesh(params), []
    for batch in _batches(stream, mesh):
        with on(mesh):
            rows = rows_fn(params, batch)
        values.append(fetch(rows)[fetch(batch.weight) > 0])
    return np.concatenate(values)[np.argsort(stream.order())]


def _batches(stream: BatchStream, mesh: Mesh | None) -> Iterator[Batch]:
    """Every batch of one pass, however many a dispatch holds."""
    for batches, count in feed(stream, 0, stream.steps_per_epoch, mesh):
        for i in range(count):
            yield jax.tree.map(itemgetter(i), batches)


def compiler_options(large: bool) -> dict[str, Any]:
    """What XLA:CPU is told of a step's program, as far as it knows the words, for `jax.jit`.

    It is told not to copy what a step writes over, or it copies Adam's moments of every table
    in every step, and they are large; and to take vectors of 512 bits where the processor has
    them, of which it takes half by itself. What ``XLA_FLAGS`` settles is left at that.

    Args:
        large: whether the program is one of large products, see `MatmulBound`.

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


def runs_all_steps() -> bool:
    """Whether a dispatch takes all of its K steps, those beyond its count in vain.

    Whether a loop of unknown length goes on, an accelerator asks its host at every step; so there
    the length is K, known when it is compiled.
    """
    return jax.default_backend() != "cpu"


def compile_steps(
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

    mesh, places = find_mesh(like), None
    known = runs_all_steps()
    if like is not None and mesh is not None:
        places = jax.tree.map(lambda leaf: leaf.sharding, replace(like, frozen={})), everywhere(mesh)

    options = compiler_options(isinstance(loss_fn, MatmulBound))

    @partial(jax.jit, donate_argnums=0, out_shardings=places, compiler_options=options)
    def run(state: TrainState, frozen: Params, batches: Batch, count: Array, key: Array):
        state = replace(state, frozen=frozen)

        @partial(jax.jit, inline=True)  # it comes twice below, and is traced once
        def step(state: TrainState, batch: Batch, key: Array, enabled: Array | bool):
            return train_step(state, batch, key, loss_fn, optimizer, enabled)

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
        programs[shape_key(batches)] = (_in_background if known else _now)(traced.compile)

    def dispatch(state: TrainState, batches: Any, count: int, key: Array):
        program = programs.get(shape_key(batches)) if programs else None
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


def shape_key(tree: Any) -> tuple[Any, ...]:
    """The shapes and dtypes of a pytree's arrays, by which programs for it differ."""
    return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))
