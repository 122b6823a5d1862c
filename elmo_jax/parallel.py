"""Several devices and several processes: the mesh, where arrays lie on it, and collective calls.

The mesh is a grid of all devices of all processes with the axes "data" and "model". Batch rows are split
along "data", vocabulary tables by rows along "model", and every other array is replicated. Results do
not depend on the number of devices, so a run can be resumed on another number. One device needs no mesh.
"""

import contextlib
import hashlib
import math
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from multiprocessing import util
from typing import Any, Generic, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from elmo_jax._moved import renamed_arguments
from elmo_jax.errors import InputError

T = TypeVar("T")
DATA, MODEL = "data", "model"  # names of the mesh axes


@renamed_arguments(model="model_parallel")
def make_mesh(batch_size: int, model_parallel: int = 1) -> Mesh | None:
    """Return a mesh of all devices of all processes, or None if there is only one device.

    Args:
        batch_size: Rows of a batch, B; split evenly over the "data" axis.
        model_parallel: Size of the "model" axis, over which the rows of vocabulary tables are split.

    Raises:
        InputError: the number of devices or `batch_size` is not divisible.

    Examples:
        >>> make_mesh(batch_size=32) is None or jax.device_count() > 1
        True
    """
    count = jax.device_count()
    if count % model_parallel:
        raise InputError(f"model_parallel {model_parallel} does not divide {count} devices; give a divisor")
    data = count // model_parallel
    if batch_size % data:
        raise InputError(f"batch_size {batch_size} is not a multiple of {data} devices; give a multiple")
    if count == 1:
        return None
    # jax.devices() lists one process after the other, so the rows of each process are adjacent.
    devices = np.array(jax.devices()).reshape(data, model_parallel)
    return Mesh(devices, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def check_memory(shapes: Any, system_bytes: int | None = None) -> None:
    """Refuse arrays that do not fit into the memory of a CPU, where the system would kill the process.

    Args:
        shapes: Pytree of arrays, or of their shapes and dtypes.
        system_bytes: Memory of the system; None looks it up.

    Raises:
        InputError: The arrays take more than all memory.
    """
    if jax.default_backend() != "cpu" or not hasattr(os, "sysconf"):
        return  # other devices report it themselves, and Windows does not kill the process
    needed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    available = system_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > available:
        problem = f"the model and its optimizer take {needed / 1e9:,.0f} GB"
        raise InputError(f"{problem}, this system has {available / 1e9:,.0f} GB; use smaller sizes")


def find_mesh(tree: Any) -> Mesh | None:
    """Return the mesh on which the arrays of a pytree lie, or None."""
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and DATA in sharding.mesh.axis_names:
            return sharding.mesh  # pyright: ignore[reportReturnType]
    return None


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Return a context in which functions are compiled and called for a mesh; see `sum_over_shards`."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is complete on every device."""
    return NamedSharding(mesh, PartitionSpec())


@dataclass(frozen=True)
class Plan(Generic[T]):
    """Sharded initialization: a function that makes a pytree, and where its arrays are to lie.

    Attributes:
        make: Pure function that makes the pytree, often a `TrainState`.
        mesh: Mesh of all devices; None is the default device.
        given: Arguments of `make`, pytrees of arrays; JAX may keep arrays alive that `make` closes over.
        tables: Paths of the parameters whose first axis is split along "model", together with the
            optimizer's state for them. The carry of a `TrainState`, ``[D, B, ...]``, is split along "data".

    Examples:
        >>> zeros = Plan(lambda: jax.numpy.zeros(2))
        >>> zeros.like().shape, zeros().tolist()
        ((2,), [0.0, 0.0])
    """

    make: Callable[..., T]
    mesh: Mesh | None = None
    given: tuple[Any, ...] = ()
    tables: Sequence[str] = ()

    def like(self) -> T:
        """Return the shapes, dtypes and shardings of the pytree without making any array."""
        shapes = jax.eval_shape(self.make, *self.given)
        mesh = self.mesh
        if mesh is None:
            return shapes

        def add_sharding(path: Any, leaf: Any) -> Any:
            name = "/" + jax.tree_util.keystr(path, simple=True, separator="/")
            is_table = any(name.endswith(f"/{table}") for table in self.tables)
            spec = PartitionSpec(MODEL) if is_table else PartitionSpec()
            spec = PartitionSpec(None, DATA) if name.startswith("/carry/") else spec
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree_util.tree_map_with_path(add_sharding, shapes)

    def __call__(self) -> T:
        """Make the arrays."""
        if self.mesh is None:
            return self.make(*self.given)
        # NumPy arrays, because a compiled call can send them to any device.
        given = jax.tree.map(np.asarray, self.given)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.like())
        return jax.jit(self.make, out_shardings=shardings)(*given)


def all_gather(array: Array) -> Array:
    """Inside a compiled function, bring the complete array to every device in one exchange."""
    mesh = jax.sharding.get_abstract_mesh()
    return array if mesh.empty else jax.lax.with_sharding_constraint(array, PartitionSpec())


def to_host(array: Array) -> np.ndarray:
    """Return the complete array as NumPy, in every process."""
    if is_multiprocess() and not (array.is_fully_replicated or array.is_fully_addressable):
        from jax.experimental import multihost_utils  # takes half a second to import

        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def data_parallel_size() -> int:
    """Return the size of the "data" axis, or 1 without a mesh or inside a `jax.shard_map` over it."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return 1 if types.get(DATA, AxisType.Manual) == AxisType.Manual else mesh.shape[DATA]


def sum_over_shards(work: Callable[..., tuple[Array, Array]], rows: Any, shared: Any) -> tuple[Array, Array]:
    """Compute a sum over batch rows, each device over its own rows, and a result for every row.

    The compiler cannot split a loop over chunks of positions from all rows; it would bring every row to
    every device. Gradients for `shared` are summed over the devices once, after the last chunk.

    Args:
        work: ``(rows, shared) -> (sum over all rows, results [D, B, ...])``.
        rows: Pytree of arrays ``[D, B, ...]``.
        shared: Pytree of arrays that every row needs.

    Returns:
        The result of `work` for all rows. If B is not divisible by the devices, or a caller has
        split the rows already, the rows are not split.
    """
    devices = data_parallel_size()
    if devices == 1 or jax.tree.leaves(rows)[0].shape[1] % devices:
        return work(rows, shared)

    def sum_own_rows(rows: Any, shared: Any) -> tuple[Array, Array]:
        shared = jax.tree.map(lambda a: jax.lax.pcast(a, (DATA,), to="varying"), shared)
        total, each = work(rows, shared)
        return jax.lax.psum(total, DATA), each

    split, same = PartitionSpec(None, DATA), PartitionSpec()
    specs: Any = {"in_specs": (split, same), "out_specs": (same, split)}
    return jax.shard_map(sum_own_rows, **specs, axis_names={DATA})(rows, shared)


def align_varying(tree: T) -> T:
    """Mark all arrays of a pytree as varying over the same mesh axes, as the carry of a loop has to be.

    The gradient of an array that was the same on all devices is summed over them once. Outside
    `jax.shard_map` the arrays are returned unchanged.

    Examples:
        >>> align_varying((jax.numpy.ones(2), None))
        (Array([1., 1.], dtype=float32), None)
    """
    axes: frozenset[str] = frozenset().union(*map(_varying_axes, jax.tree.leaves(tree)))

    def add_axes(a: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _varying_axes(a)))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(add_axes, tree)


def _varying_axes(a: jax.Array) -> frozenset[str]:
    """Return the mesh axes over which an array varies; none if JAX does not track them here."""
    return getattr(getattr(jax.typeof(a), "mat", None), "varying", frozenset())


def is_multiprocess() -> bool:
    """Return whether this run has more than one process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first_process() -> bool:
    """Return whether this is the process that prints and writes files."""
    # This order of checks keeps a single process from starting a device.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def max_over_processes(value: int) -> int:
    """Return the largest value of all processes; every process must call this."""
    if not is_multiprocess():
        return value
    from jax.experimental import multihost_utils  # takes half a second to import

    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def check_same_on_all_processes(text: str) -> None:
    """Check that every process calls this with the same text.

    Raises:
        InputError: in every process, if one text differs.
    """
    number = int(hashlib.sha256(text.encode()).hexdigest()[:7], 16)
    if max_over_processes(number) + max_over_processes(-number):
        raise InputError("the processes of this run differ in settings or texts; start all with the same")


def run_on_all(work: Callable[[], T]) -> T:
    """Call a function that every process calls; if it fails in one process, raise in all of them.

    Raises:
        InputError: it failed in another process. An error in this process is raised unchanged.
    """
    try:
        result = work()
    except Exception:
        max_over_processes(1)
        raise
    if max_over_processes(0):
        raise InputError("another process of this run failed; see its message")
    return result


def run_on_first(work: Callable[[], T]) -> T | None:
    """Call a function in the first process while the others wait.

    Returns:
        The result of `work` in the first process, None in the others.

    Raises:
        InputError: in every process, if the work failed.

    Examples:
        >>> run_on_first(lambda: 5)
        5
    """
    return run_on_all(lambda: work() if is_first_process() else None)


START_TIMEOUT = 300.0  # seconds to wait for all processes
_MESSAGE_BYTES = 64  # maximum size of a message
_GO, _FAREWELL = b"go", b"bye"


def start_distributed(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    on_lost: Callable[[int], None] = lambda process: None,
) -> None:
    """Start `jax.distributed` once all processes have answered.

    Args:
        coordinator: HOST:PORT of the first process; "auto" under Slurm, Open MPI, Kubernetes or on
            TPUs; None for a run in one process, which starts nothing.
        processes: Number of processes; only with HOST:PORT.
        process: Number of this process, from 0; only with HOST:PORT.
        on_lost: Called in a thread with the number of the first process that is killed; only with HOST:PORT.
            JAX itself aborts the others, at once if that was process 0, else after a missed heartbeat.

    Raises:
        InputError: an argument is wrong or missing, or a process does not answer within `START_TIMEOUT`.
    """
    address = None if coordinator == "auto" else coordinator
    if address is None and (processes, process) != (None, None):
        raise InputError("processes and process need a coordinator HOST:PORT; give all three or none")
    if coordinator is None:
        return
    connections: dict[int, socket.socket] = {}
    if address is not None:
        if not re.fullmatch(r".+:\d{1,5}", address) or int(address.rpartition(":")[2]) >= 2**16:
            raise InputError(f"coordinator must be HOST:PORT or auto, not {address}")
        if processes is None or process is None:
            raise InputError("a coordinator HOST:PORT needs processes and process; give all three")
        if process >= processes:
            raise InputError(f"process must be below the {processes} processes, not {process}")
        try:
            connections = _wait_for_all(address, processes, process)
        except OSError as error:
            raise InputError(
                f"coordinator {address} cannot be used ({error.strerror or error}); "
                "give a host and a free port of the first process"
            ) from None
    try:
        jax.distributed.initialize(address, processes, process)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"coordinator {coordinator}: the processes could not connect ({reason})") from None
    _watch(connections, on_lost)


def _wait_for_all(address: str, count: int, process: int) -> dict[int, socket.socket]:
    """Wait until every process has started; JAX would abort the others if one were missing.

    Returns:
        Connections by process: to every other one from the first, and to the first from the others.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + START_TIMEOUT
    if process:
        return {0: _report_to_first((host.strip("[]"), int(port)), count, process, deadline)}
    missing = set(range(1, count))
    dualstack = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dualstack else socket.AF_INET
    with (
        socket.create_server(("", int(port)), family=family, dualstack_ipv6=dualstack) as server,
        contextlib.ExitStack() as opened,
    ):
        clients: dict[int, socket.socket] = {}
        while missing:
            server.settimeout(max(deadline - time.monotonic(), 1e-3))
            try:
                client = opened.enter_context(server.accept()[0])
            except TimeoutError:
                absent = f"process {', '.join(map(str, sorted(missing)))}"
                raise InputError(
                    f"{absent} did not start within {START_TIMEOUT:.0f} s; start all {count} processes"
                ) from None
            numbers = _read_numbers(client)
            if numbers and (numbers[0] != count or numbers[1] not in missing):
                raise InputError(
                    f"process {numbers[1]} of {numbers[0]} started twice, or expects other than {count} "
                    "processes; give each its own number, and all the same number of processes"
                )
            if numbers:
                missing.remove(numbers[1])
                clients[numbers[1]] = client
        for client in clients.values():
            client.sendall(_GO)
        opened.pop_all()
    return clients


def _read_numbers(client: socket.socket) -> tuple[int, ...]:
    """Return the numbers that a process sends, (processes, process); () for another program."""
    client.settimeout(1)
    with contextlib.suppress(OSError):
        numbers = re.fullmatch(rb"elmo_jax (\d+) (\d+)", client.recv(_MESSAGE_BYTES))
        return tuple(map(int, numbers.groups())) if numbers else ()
    return ()


def _report_to_first(address: tuple[str, int], count: int, process: int, deadline: float) -> socket.socket:
    """Tell the first process that this one has started, wait until all have, and return the connection."""
    while True:
        try:
            with contextlib.ExitStack() as opened:
                first = opened.enter_context(socket.create_connection(address, timeout=1))
                first.sendall(b"elmo_jax %d %d" % (count, process))
                first.settimeout(max(deadline - time.monotonic(), 1e-3))
                if first.recv(len(_GO)) == _GO:
                    opened.pop_all()
                    return first
            raise InputError("the first process ended before all had started; see its message")
        except (ConnectionError, TimeoutError) as error:  # because the first process may start later
            if time.monotonic() > deadline:
                raise InputError(
                    f"coordinator {':'.join(map(str, address))}: no answer within {START_TIMEOUT:.0f} s "
                    f"({error}); start process 0 there"
                ) from None
            time.sleep(0.2)


def _watch(connections: Mapping[int, socket.socket], on_lost: Callable[[int], None]) -> None:
    """Call `on_lost` once a connection ends without the farewell that a process sends when it exits.

    The first process, which alone is connected to all, passes the number of the lost process on.
    """

    def send(message: bytes) -> None:
        for connection in connections.values():
            with contextlib.suppress(OSError):
                connection.sendall(message)

    def wait(process: int, connection: socket.socket) -> None:
        message = b""
        with contextlib.suppress(OSError):
            message = connection.recv(_MESSAGE_BYTES)
        if message == _FAREWELL:
            return
        if not message:
            send(b"%d" % process)
        on_lost(int(message or process))

    # Unlike functions of atexit, this runs at the end of a process that multiprocessing started too.
    util.Finalize(None, send, (_FAREWELL,), exitpriority=0)
    for process, connection in connections.items():
        connection.settimeout(None)
        threading.Thread(target=wait, args=(process, connection), daemon=True).start()
