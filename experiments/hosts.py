"""A run in several processes, on one host or many: who they are and where they meet."""

import re
from dataclasses import dataclass

import jax

from elmo_jax.errors import InputError

_PATIENCE = 300  # seconds for all processes to come


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
    numbers = config.processes, config.process
    if config.coordinator is None or config.coordinator == "auto":
        if numbers != (None, None):
            raise InputError("--processes and --process need --coordinator HOST:PORT; give all three or none")
        if config.coordinator is None:
            return
        address = None
    else:
        address = config.coordinator
        if not re.fullmatch(r".+:\d{1,5}", address):
            raise InputError(f"--coordinator must be HOST:PORT or auto, not {address}")
        if config.processes is None or config.process is None:
            raise InputError("--coordinator HOST:PORT needs --processes and --process; give all three")
        if config.process >= config.processes:
            raise InputError(f"--process must be below --processes {config.processes}, not {config.process}")
    try:
        jax.distributed.initialize(address, *numbers, initialization_timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"--coordinator {config.coordinator}: the processes did not meet ({reason})"
        ) from None
