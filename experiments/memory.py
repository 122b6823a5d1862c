"""How much memory a process took at most; it imports next to nothing, so that a peer's memory is a peer's."""

import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def process_peak() -> int | None:
    """Bytes of this process at its peak; None where the system does not tell.

    Example:
        >>> process_peak() > 2**20
        True
    """
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    own = [int(line.split()[1]) for line in lines if line.startswith("VmHWM")]
    if own:
        return 1024 * own[0]
    try:
        import resource  # Windows has none
    except ImportError:
        return None
    # For want of better: on Linux this begins with the peak of the process that started this one.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
