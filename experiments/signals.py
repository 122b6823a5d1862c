"""SIGINT and SIGTERM at a command: they end it at once, but for the first while training that can save.

What a handler raises is lost if it comes while something is collected or torn down, so the one
here ends the process itself. Python runs handlers between two of its instructions, so whatever
is compiled or waited for delays them; the second signal is seen by a thread, which reads what
the C handler writes.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stoppable(leave: Callable[[int], None]) -> Iterator[None]:
    """Call a function at SIGINT or SIGTERM while the body runs.

    A handler that the body installs, as `fit` does, has the first signal to itself.

    Args:
        leave: gets the signal's number, perhaps in another thread; it is to end the process.

    Example:
        >>> came = []
        >>> with stoppable(came.append):
        ...     signal.raise_signal(signal.SIGTERM)
        >>> came == [signal.SIGTERM]
        True
    """

    def watch() -> None:
        came = 0
        while number := os.read(seen, 1):
            came += number[0] in _STOPS
            if came == 2:
                leave(number[0])

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    seen, tell = os.pipe()
    os.set_blocking(tell, False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    fd = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    before = [signal.signal(number, lambda number, _frame: leave(number)) for number in _STOPS]
    try:
        yield
    finally:
        for number, handler in zip(_STOPS, before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd)
        os.close(tell)  # which ends the thread
        thread.join()
        os.close(seen)
