"""A run in several processes, on one host or many: who they are and where they meet.

Nouns: the *coordinator* is where the first process listens; the others come to it.
"""

import contextlib
import re
import socket
import time
from dataclasses import dataclass

import jax

from elmo_jax.errors import InputError

_PATIENCE = 300.0  # seconds for all processes to come
_HELLO = 64  # bytes of a message, at the most


@dataclass(frozen=True)
class HostsConfig:
    """The processes of a run; each is started with the same command but for its own number."""

    coordinator: str | None = None
    """HOST:PORT of the first of several processes; or auto, under Slurm, Open MPI, Kubernetes or on TPUs."""
    processes: int | None = None
    """How many processes share the run, each with devices of its own."""
    process: int | None = None
    """Which of them this is, from 0; the first one prints and writes."""


def join(config: HostsConfig) -> None:
    """Meet the other processes, if flags say that there are any.

    Raises:
        InputError: a flag lacks its partners, or the others cannot be met.
    """
    address, count, process = config.coordinator, config.processes, config.process
    if address is None or address == "auto":
        if (count, process) != (None, None):
            raise InputError("--processes and --process need --coordinator HOST:PORT; give all three or none")
        if address is None:
            return
    else:
        if not re.fullmatch(r".+:\d{1,5}", address) or int(address.rpartition(":")[2]) >= 2**16:
            raise InputError(f"--coordinator must be HOST:PORT or auto, not {address}")
        if count is None or process is None:
            raise InputError("--coordinator HOST:PORT needs --processes and --process; give all three")
        if process >= count:
            raise InputError(f"--process must be below --processes {count}, not {process}")
        try:
            _meet(address, count, process)
        except OSError as error:
            told = f"--coordinator {address}: cannot be used ({error.strerror or error})"
            raise InputError(f"{told}; give a host and a free port of the first process") from None
    try:
        jax.distributed.initialize(None if address == "auto" else address, count, process)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--coordinator {address}: the processes did not meet ({reason})") from None


def _meet(address: str, count: int, process: int) -> None:
    """See that all processes are there: where one is missing, JAX would end the others with a core dump."""
    host, _, port = address.rpartition(":")
    until = time.monotonic() + _PATIENCE
    if process:
        _come((host.strip("[]"), int(port)), count, process, until)
        return
    missing = set(range(1, count))
    with _listen(int(port)) as door, contextlib.ExitStack() as open_doors:
        guests = []
        while missing:
            guest, said = _next_guest(door, until)
            if guest is None:
                told = f"--process {', '.join(map(str, sorted(missing)))} did not come in {_PATIENCE:.0f} s"
                raise InputError(f"{told}; start all of --processes {count}")
            guests.append(open_doors.enter_context(guest))
            if said and (said[0] != count or said[1] not in missing):
                told = f"--process {said[1]} of --processes {said[0]} came, twice or to {count}"
                raise InputError(f"{told}; give each its own number, and all the same --processes")
            missing -= set(said[1:])
        for guest in guests:
            guest.sendall(b"go")


def _next_guest(door: socket.socket, until: float) -> tuple[socket.socket | None, tuple[int, ...]]:
    """Who comes, if anyone does, and its --processes and --process; none if it is a stranger."""
    door.settimeout(max(until - time.monotonic(), 1e-3))
    try:
        guest = door.accept()[0]
    except TimeoutError:
        return None, ()
    guest.settimeout(1)
    with contextlib.suppress(OSError):
        said = re.fullmatch(rb"elmo_jax (\d+) (\d+)", guest.recv(_HELLO))
        return guest, tuple(map(int, said.groups())) if said else ()
    return guest, ()


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _come(address: tuple[str, int], count: int, process: int, until: float) -> None:
    """Tell the first process that this one is there, and wait until all are."""
    while True:
        try:
            with socket.create_connection(address, timeout=1) as first:
                first.sendall(b"elmo_jax %d %d" % (count, process))
                first.settimeout(max(until - time.monotonic(), 1e-3))
                if first.recv(_HELLO) == b"go":
                    return
            raise InputError("the first process ended before all had come; see what it says")
        except (ConnectionError, TimeoutError) as error:  # it may be about to start
            if time.monotonic() > until:
                raise InputError(
                    f"--coordinator {':'.join(map(str, address))}: no answer in {_PATIENCE:.0f} s "
                    f"({error}); start --process 0 there"
                ) from None
            time.sleep(0.2)
