"""Flags of a run in several processes."""

from dataclasses import dataclass

from elmo_jax.parallel import start_distributed


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
    """Connect this process to the others of the run, if the flags name any."""
    start_distributed(config.coordinator, config.processes, config.process)
