"""Several devices: where a state's arrays lie, and how batches reach them.

Nouns: the *mesh* is all devices of all processes as a grid of two axes. The rows of a batch
are shared out along "data", the rows of a vocabulary's tables along "model", and all else is
everywhere. What is computed stays a function of whole batches, so that a run goes on with
another number of devices as if nothing had changed; a program that knows no mesh becomes one
for many devices by where its arrays lie. On a single device there is no mesh.
Axes: B batch, D direction, V vocabulary.

One run in several processes: what all do alike, and what the first alone does.

Nouns: the *first* process is the one that writes; the others follow what it says.

Arrays inside `jax.shard_map`, where each either differs between devices or is the same on all.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from elmo_jax.data.batching import StepChunk, Stream
from elmo_jax.errors import InputError

T = TypeVar("T")


def is_multiprocess() -> bool:
    """Whether there are others beside this process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes."""
    # Asked in this order, a process that is alone does not start a device to learn that it is.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def max_over_processes(value: int) -> int:
    """The highest of all processes' values; a meeting, so every process must come to it."""
    if not is_multiprocess():
        return value
    from jax.experimental import multihost_utils  # half a second to import, for few

    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def alike(text: str) -> None:
    """Check that every process came with the same text.

    Raises:
        InputError: one did not; in every process.
    """
    number = int(hashlib.sha256(text.encode()).hexdigest()[:7], 16)
    if max_over_processes(number) + max_over_processes(-number):
        raise InputError("the processes of this run differ in flags or texts; start all with the same")


def together(work: Callable[[], T]) -> T:
    """Do what every process does; if it fails in one, it fails in all.

    Raises:
        InputError: it failed in another process; what failed here is raised as it is.
    """
    done, failure = None, None
    try:
        done = work()
    except Exception as error:
        failure = error
    failed = max_over_processes(int(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise InputError("another process of this run could not go on; see what it says")
    return cast(T, done)


def run_on_first(work: Callable[[], T]) -> T | None:
    """Do what the first process alone is to do, while the others wait.

    Returns:
        What the work returned, to the first process; None to the others.

    Raises:
        InputError: the work failed; in every process.

    Example:
        >>> run_on_first(lambda: 5)
        5
    """
    return together(lambda: work() if first() else None)


DATA, MODEL = "data", "model"


def make_mesh(batch_size: int, model: int = 1) -> Mesh | None:
    """All devices of all processes; None if there is one alone.

    Args:
        batch_size: B, to be shared out.
        model: devices that the rows of a vocabulary's tables are split over.

    Raises:
        InputError: devices or rows do not come out even.

    Example:
        >>> make_mesh(batch_size=32) is None or jax.device_count() > 1
        True
    """
    count = jax.device_count()
    if count % model:
        raise InputError(f"--model-parallel {model} does not divide {count} devices; give a divisor")
    data = count // model
    if batch_size % data:
        raise InputError(
            f"--batch-size {batch_size} cannot be shared out evenly to {data} devices; give a multiple"
        )
    if count == 1:
        return None
    # Of one process after the other, so that the rows of each are neighbours.
    return Mesh(np.array(jax.devices()).reshape(data, model), (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def find_mesh(tree: Any) -> Mesh | None:
    """The mesh on which a pytree of arrays lies, or None."""
    for leaf in jax.tree.leaves(tree):
        place = getattr(leaf, "sharding", None)
        if isinstance(place, NamedSharding) and DATA in place.mesh.axis_names:
            return place.mesh  # pyright: ignore[reportReturnType]
    return None


def on(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Where programs are compiled and called that lie on a mesh; see `by_rows`."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def everywhere(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


@dataclass(frozen=True)
class Plan(Generic[T]):
    """A pytree of arrays, perhaps a `TrainState`, that is made when it is called, where it is to lie.

    Attributes:
        make: pure; makes the pytree.
        mesh: of all devices; None makes it as it is.
        given: pytrees of arrays, the arguments of `make`, the same in every process; arrays of
            which it knows otherwise JAX may keep.
        tables: paths of parameters whose first axis is to be split along "model", as is what
            the optimiser keeps of them. What a state carries, ``[D, B, ...]``, is split
            along "data".

    Example:
        >>> zeros = Plan(lambda: jax.numpy.zeros(2))
        >>> zeros.like().shape, zeros().tolist()
        ((2,), [0.0, 0.0])
    """

    make: Callable[..., T]
    mesh: Mesh | None = None
    given: tuple[Any, ...] = ()
    tables: Sequence[str] = ()

    def like(self) -> T:
        """Its shapes, dtypes and places, for which nothing is made."""
        shapes = jax.eval_shape(self.make, *self.given)
        if self.mesh is None:
            return shapes

        def placed(path: Any, leaf: Any) -> Any:
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._place(path))

        return jax.tree_util.tree_map_with_path(placed, shapes)

    def _place(self, path: Any) -> NamedSharding:
        assert self.mesh is not None
        name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
        if name.startswith("/carry/"):
            return NamedSharding(self.mesh, PartitionSpec(None, DATA))
        split = any(name.endswith(f"/{table}") for table in self.tables)
        return NamedSharding(self.mesh, PartitionSpec(MODEL)) if split else everywhere(self.mesh)

    def __call__(self) -> T:
        """The arrays."""
        if self.mesh is None:
            return self.make(*self.given)
        given = jax.tree.map(np.asarray, self.given)  # a program can take these to any device
        places = jax.tree.map(lambda leaf: leaf.sharding, self.like())
        return jax.jit(self.make, out_shardings=places)(*given)


def feed(
    stream: Stream, first: int, last: int, mesh: Mesh | None, ahead: bool = False
) -> Iterator[StepChunk]:
    """A stream's dispatches where programs take them from; each process reads its own rows alone.

    Args:
        stream: the same in every process.
        first, last: steps, as in `Stream.chunks`.
        mesh: of all devices, where they are to lie.
        ahead: without a mesh, send them on their way to the device, which nobody waits for; else
            they stay on the host, where a step is cut out of a dispatch for nothing.
    """
    if mesh is None:
        for batches, count in stream.chunks(first, last):
            yield StepChunk(jax.device_put(batches) if ahead else batches, count)
        return
    size = stream.batch_size
    held = NamedSharding(mesh, PartitionSpec(DATA)).addressable_devices_indices_map((size,)).values()
    parts = [index[0].indices(size) for index in held if index is not None]
    part = slice(min(begin for begin, _, _ in parts), max(end for _, end, _ in parts))
    for batches, count in stream.chunks(first, last, part):
        axis = 1 + batches.ROWS
        split = NamedSharding(mesh, PartitionSpec(*[None] * axis, DATA))

        def share(rows: np.ndarray, axis: int = axis, split: NamedSharding = split) -> Array:
            shape = (*rows.shape[:axis], size, *rows.shape[axis + 1 :])
            return jax.make_array_from_process_local_data(split, rows, shape)

        yield StepChunk(jax.tree.map(share, batches), count)


def gathered(array: Array) -> Array:
    """Inside a program, an array brought whole to every device, at once and not piecemeal."""
    mesh = jax.sharding.get_abstract_mesh()
    return array if mesh.empty else jax.lax.with_sharding_constraint(array, PartitionSpec())


def fetch(array: Array) -> np.ndarray:
    """A whole array on the host of every process."""
    if is_multiprocess() and not array.is_fully_replicated and not array.is_fully_addressable:
        from jax.experimental import multihost_utils  # half a second to import, for few

        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def data_parallel_size() -> int:
    """Devices that rows are still to be shared out to: one without a mesh, or where a caller has done it."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return 1 if kinds.get(DATA, AxisType.Manual) == AxisType.Manual else mesh.shape[DATA]


def by_rows(work: Callable[..., tuple[Array, Array]], rows: Any, whole: Any) -> tuple[Array, Array]:
    """A sum over rows, taken on every device over its own; and what each row has of its own.

    A program is otherwise shared out to devices by the compiler. It cannot where positions
    of all rows are laid end to end and taken a chunk at a time: it would bring all of them
    to all devices. Gradients for `whole` are summed over devices once, behind the last chunk.

    Args:
        work: ``(rows, whole) -> (sum, each [D, B, ...])``, the sum over all rows.
        rows: arrays ``[D, B, ...]``.
        whole: arrays that every row needs.

    Returns:
        What `work` does of all rows. Rows that do not come out even, or that a caller has shared
        out already, are not shared out.
    """
    devices = data_parallel_size()
    if devices == 1 or jax.tree.leaves(rows)[0].shape[1] % devices:
        return work(rows, whole)

    def own(rows: Any, whole: Any) -> tuple[Array, Array]:
        whole = jax.tree.map(lambda a: jax.lax.pcast(a, (DATA,), to="varying"), whole)
        total, each = work(rows, whole)
        return jax.lax.psum(total, DATA), each

    split, everywhere = PartitionSpec(None, DATA), PartitionSpec()
    shared_out = jax.shard_map(
        own, in_specs=(split, everywhere), out_specs=(everywhere, split), axis_names={DATA}
    )
    return shared_out(rows, whole)


def align_varying(tree: T) -> T:
    """Arrays that all differ between the same devices, as what a loop carries has to: it begins as it ends.

    The gradient of what was the same on all devices is summed over them, once. Nothing is
    done outside `jax.shard_map`.

    Args:
        tree: of arrays, which are computed with one another.

    Example:
        >>> align_varying((jax.numpy.ones(2), None))
        (Array([1., 1.], dtype=float32), None)
    """
    axes: frozenset[str] = frozenset().union(*map(_varying, jax.tree.leaves(tree)))

    def cast(a: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _varying(a)))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, tree)


def _varying(a: jax.Array) -> frozenset[str]:
    """The mesh's axes along which an array differs; none where JAX does not keep account of that."""
    return getattr(getattr(jax.typeof(a), "mat", None), "varying", frozenset())
