"""SIGTERM where no training is under way that would save: it ends a command as Ctrl-C does."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raise `Terminated` at SIGTERM while the body runs.

    Example:
        >>> try:
        ...     with terminable():
        ...         signal.raise_signal(signal.SIGTERM)
        ... except Terminated:
        ...     print("stopped")
        stopped
    """

    def stop(_number: int, _frame: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
