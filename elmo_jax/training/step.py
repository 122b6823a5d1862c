"""One training step, and compiled calls that take several steps.

A loss function is pure: ``loss_fn(params, batch, key) -> (loss, metrics)``. Metrics are sums and counts.
"""

import inspect
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from elmo_jax._moved import renamed_arguments
from elmo_jax.data.batching import StepChunk, Stream
from elmo_jax.parallel import DATA, find_mesh, replicated, use_mesh
from elmo_jax.training.optimizers import Optimizer, as_step_optimizer

Params = dict[str, Any]
LossFn = Callable[[Params, Any, Array], tuple[Array, dict[str, Array]]]


@dataclass(frozen=True)
class MatmulBound:
    """Marks a loss function dominated by accumulated matmuls, such as the full softmax.

    On a CPU `compile_steps` compiles such a function with fused matmuls that add to their result in place.
    This needs less memory, but slows down the small matmuls of an LSTM step, so it is not the default.
    Results differ only by rounding. A function that calls a marked function has to be marked itself.

    Attributes:
        loss_fn: The loss function.

    Examples:
        >>> loss_fn = MatmulBound(lambda params, batch, key: (jnp.sum(params["w"] @ batch), {}))
        >>> loss, metrics = loss_fn({"w": jnp.ones((2, 3))}, jnp.ones(3), jax.random.key(0))
        >>> float(loss)
        6.0
    """

    loss_fn: LossFn

    def __call__(self, params: Params, batch: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        """Call the loss function."""
        return self.loss_fn(params, batch, key)


@struct.dataclass
class TrainState:
    """Everything that a training step reads and changes.

    Attributes:
        step: int32 count of optimizer steps.
        params: Trained parameters.
        frozen: Parameters that the loss function gets beside `params`, never changed.
        opt_state: State of the optimizer.
        carry: Arrays that the loss function gets beside `params`; its metrics of the same names
            replace them for the next step.
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
        """Return the state before the first step."""
        with jax.numpy_dtype_promotion("standard"):  # see train_step
            opt_state = _init_optimizer(optimizer, params)
        return cls(jnp.zeros((), jnp.int32), params, frozen or {}, opt_state, carry or {})


@partial(jax.jit, static_argnums=0)  # one compiled call instead of one for every array
def _init_optimizer(optimizer: Optimizer, params: Params) -> Any:
    return optimizer.init(params)


@renamed_arguments(wanted="enabled")
def train_step(
    state: TrainState,
    batch: Any,
    key: Array,
    loss_fn: LossFn,
    optimizer: Optimizer,
    enabled: Array | bool = True,
) -> tuple[TrainState, dict[str, Array]]:
    """Take one optimizer step, with the random key ``fold_in(key, state.step)``.

    If the loss or a gradient is not finite, the step counts in ``state.step`` and changes nothing else.

    Args:
        state: State before the step.
        batch: One batch, the second argument of the loss function.
        key: Key of the whole run.
        loss_fn: ``(params, batch, key) -> (loss, metrics)``.
        optimizer: Optimizer that the state was created with.
        enabled: If false, the step changes nothing at all.

    Returns:
        The next state, and the metrics with ``loss`` and the count ``steps`` = 1 added. All metrics
        are 0 if the step changed nothing.

    Examples:
        >>> loss_fn = lambda params, batch, key: (jnp.sum((params["w"] - batch) ** 2), {})
        >>> optimizer = optax.sgd(0.5)
        >>> state = TrainState.create({"w": jnp.zeros(2)}, optimizer)
        >>> state, metrics = train_step(state, jnp.ones(2), jax.random.key(0), loss_fn, optimizer)
        >>> state.params["w"].tolist(), float(metrics["loss"])
        ([1.0, 1.0], 2.0)
    """
    key = jax.random.fold_in(key, state.step)
    others = {**state.frozen, **state.carry}
    step_optimizer = as_step_optimizer(optimizer)
    rows = step_optimizer.rows(batch, key)
    (loss, metrics), gradients = jax.value_and_grad(
        lambda params: loss_fn({**others, **params}, batch, key), has_aux=True
    )(step_optimizer.select(state.params, rows))
    is_finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradients)) & enabled
    with jax.numpy_dtype_promotion("standard"):  # Optax mixes dtypes, which strict promotion forbids
        params, opt_state = step_optimizer.update(
            gradients, state.opt_state, state.params, rows, state.step, is_finite
        )
    new_carry = {name: metrics[name] for name in state.carry}
    carry = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new_carry, state.carry)
    step = state.step + jnp.asarray(enabled, state.step.dtype)
    state = replace(state, step=step, params=params, opt_state=opt_state, carry=carry)
    metrics = {name: value for name, value in metrics.items() if name not in carry}
    metrics |= {"loss": loss, "steps": jnp.ones(())}
    return state, {name: jnp.where(is_finite, value, 0) for name, value in metrics.items()}


def compiler_options(matmul_bound: bool) -> dict[str, Any]:
    """Return the XLA:CPU compiler options that this jaxlib accepts, for `jax.jit`.

    They avoid copies of the arrays that a step overwrites, such as Adam's moments, and select 512-bit
    vectors, of which XLA uses half by default. Options set in ``XLA_FLAGS`` are left out.

    Args:
        matmul_bound: Whether to fuse accumulated matmuls, see `MatmulBound`.

    Returns:
        Names and values; none for other backends.

    Examples:
        >>> step = jax.jit(lambda x: x @ x.T, compiler_options=compiler_options(matmul_bound=True))
        >>> step(jnp.ones((1, 2))).tolist()
        [[2.0]]
    """
    if jax.default_backend() != "cpu":
        return {}
    options: dict[str, Any] = {
        "xla_cpu_copy_insertion_use_region_analysis": True,
        "xla_cpu_prefer_vector_width": 512,
    }
    if matmul_bound:
        fused = "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE"
        options["xla_cpu_experimental_ynn_fusion_type"] = fused
    flags = os.environ.get("XLA_FLAGS", "")
    return {name: value for name, value in options.items() if name not in flags and _is_accepted(name, value)}


@cache  # cached, because it compiles a function
def _is_accepted(option: str, value: Any) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True


def runs_all_steps() -> bool:
    """Return whether the compiled loop always runs K steps and masks the excess.

    An accelerator would ask its host after every step whether a loop of unknown length continues.
    """
    return jax.default_backend() != "cpu"


def compile_steps(
    loss_fn: LossFn, optimizer: Optimizer, like: TrainState | None = None, ahead: Iterable[Any] = ()
) -> Callable[[TrainState, Any, int, Array], tuple[TrainState, dict[str, Array]]]:
    """Compile `train_step` over up to K batches in one call, with the state donated.

    Args:
        loss_fn: ``(params, batch, key) -> (loss, metrics)``.
        optimizer: Optimizer that the state was created with.
        like: A state, or its shapes and shardings; needed with a mesh or with `ahead`.
        ahead: Batches of shapes to compile for now, on an accelerator in the background; other shapes are
            compiled when they occur. Keys of calls must then be of JAX's default type.

    Returns:
        ``(state, batches [K, ...], count, key) -> (state, metrics [K, ...])``. The first `count` metrics
        are valid. Results do not depend on how steps are grouped into calls.
    """
    mesh, shardings, all_steps = find_mesh(like), None, runs_all_steps()
    if like is not None and mesh is not None:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, replace(like, frozen={})), replicated(mesh)
    options = compiler_options(isinstance(loss_fn, MatmulBound))
    optimizer = as_step_optimizer(optimizer)
    take_step = inspect.unwrap(train_step)  # the function itself, without the wrapper for old argument names

    @partial(jax.jit, donate_argnums=0, out_shardings=shardings, compiler_options=options)
    def run_steps(state: TrainState, frozen: Params, batches: Any, count: Array, key: Array):
        state = replace(state, frozen=frozen)

        @partial(jax.jit, inline=True)  # used twice below, but traced once
        def step(state: TrainState, batch: Any, key: Array, enabled: Array | bool):
            return take_step(state, batch, key, loss_fn, optimizer, enabled)

        def is_enabled(i: Array | int) -> Array | bool:
            return i < count if all_steps else True

        def body(i: Array, loop_carry):
            state, filled = loop_carry
            state, metrics = step(state, jax.tree.map(lambda a: a[i], batches), key, is_enabled(i))
            return state, {name: filled[name].at[i].set(value) for name, value in metrics.items()}

        shapes = jax.eval_shape(step, state, jax.tree.map(lambda a: a[0], batches), key, is_enabled(0))[1]
        most = jax.tree.leaves(batches)[0].shape[0]
        filled = {name: jnp.zeros((most, *s.shape), s.dtype) for name, s in shapes.items()}
        state, filled = jax.lax.fori_loop(0, most if all_steps else count, body, (state, filled))
        return replace(state, frozen={}), filled

    compiled: dict[Any, Future[Any]] = {}
    for batches in ahead:  # traced in this thread, because JAX settings are per thread
        assert like is not None
        traced = run_steps.lower(replace(like, frozen={}), like.frozen, batches, 1, jax.random.key(0))
        compiled[shape_key(batches)] = _start(traced.compile, in_background=all_steps)

    def call(state: TrainState, batches: Any, count: int, key: Array):
        program = compiled.get(shape_key(batches)) if compiled else None
        # Frozen parameters are passed on their own so that they are neither donated nor copied.
        with use_mesh(mesh):
            run = program.result() if program else run_steps
            after, metrics = run(replace(state, frozen={}), state.frozen, batches, count, key)
        return replace(after, frozen=state.frozen), metrics

    return call


def _start(work: Callable[[], Any], in_background: bool) -> Future[Any]:
    """Call `work` now or in a daemon thread, which does not delay the end of the process."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    if in_background:
        threading.Thread(target=run, daemon=True).start()
    else:
        run()
    return future


def shape_key(tree: Any) -> tuple[Any, ...]:
    """Return the shapes and dtypes of a pytree's arrays; a compiled call serves one such key."""
    return tuple((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(tree))


def choose_group_scale(stream: Stream) -> None:
    """Let a stream make larger groups of unique words where a kernel launch outlasts a small matmul."""
    stream.group_scale = 1 if jax.default_backend() == "cpu" else 4


def feed(
    stream: Stream, first: int, last: int, mesh: Mesh | None, prefetch: bool = False
) -> Iterator[StepChunk]:
    """Iterate over the chunks of a stream, ready for a compiled call; each process reads its own rows.

    Args:
        stream: The same in every process.
        first: First step.
        last: End of the steps, exclusive.
        mesh: Mesh over which batch rows are split.
        prefetch: Without a mesh, start the copy to the device. Otherwise the arrays stay in NumPy, from
            which a single step is cut without a compiled call.
    """
    choose_group_scale(stream)
    if mesh is None:
        for chunk in stream.chunks(first, last):
            yield chunk._replace(batches=jax.device_put(chunk.batches)) if prefetch else chunk
        return
    size = stream.batch_size
    own = NamedSharding(mesh, PartitionSpec(DATA)).addressable_devices_indices_map((size,)).values()
    parts = [index[0].indices(size) for index in own if index is not None]
    part = slice(min(start for start, _, _ in parts), max(stop for _, stop, _ in parts))
    for chunk in stream.chunks(first, last, part):
        axis = 1 + chunk.batches.BATCH_AXIS
        split = NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))

        def make_global(rows: np.ndarray, axis: int = axis, split: NamedSharding = split) -> Array:
            shape = (*rows.shape[:axis], size, *rows.shape[axis + 1 :])
            return jax.make_array_from_process_local_data(split, rows, shape)

        yield chunk._replace(batches=jax.tree.map(make_global, chunk.batches))
