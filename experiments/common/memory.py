"""A process's memory: its peak, and that it stays; imports next to nothing, so that a peer's is a peer's."""

import ctypes
import functools
import os
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_M_ARENA_MAX = -8  # of glibc's malloc.h
_LONG = 0.02  # seconds of a compilation that leaves much behind; to look for it takes time too


@functools.cache  # or every command run in a process would listen once more
def tame_malloc() -> bool:
    """Keep this process's memory small and constant, where the C library is glibc.

    Its heaps are shared between threads, as many as there are cores: else every thread of a
    pool has one, eight times as many as cores at most, and each save leaves pieces in others
    of them, some 100 KB a save that nobody can use again. And what a compilation has used,
    often more than 100 MB, goes back to the system at its end.

    Returns:
        Whether that was done; other C libraries have no such heaps.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    mallopt, trim = getattr(libc, "mallopt", None), getattr(libc, "malloc_trim", None)
    if mallopt is None or trim is None or mallopt(_M_ARENA_MAX, os.cpu_count() or 1) != 1:
        return False
    from jax import monitoring

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event.endswith("/backend_compile_duration") and duration_secs > _LONG:
            trim(0)

    monitoring.register_event_duration_secs_listener(listen)
    return True


def process_peak() -> int | None:
    """Bytes of this process at its peak; None where the system does not tell.

    Example:
        >>> process_peak() > 2**20
        True
    """
    own = _told(_STATUS, "VmHWM")
    if own is not None:
        return own
    try:
        import resource  # Windows has none
    except ImportError:
        return None
    # For want of better: on Linux this begins with the peak of the process that started this one.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def free_memory() -> int | None:
    """Bytes that processes can still have; None where the system does not tell.

    Example:
        >>> free_memory() > 2**20
        True
    """
    told = _told(_MEMINFO, "MemAvailable")
    if told is not None:
        return told
    try:  # for want of better: this leaves out the files that the system holds in memory
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _told(path: Path, name: str) -> int | None:
    """Bytes that a file of Linux's /proc gives under that name, if it does."""
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(name)), None)
