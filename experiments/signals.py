"""SIGINT and SIGTERM at a command: SIGTERM ends it as Ctrl-C does, and a second signal ends it at once.

Python runs its handlers between two of its instructions, so whatever compiles or waits for a
device delays them, for minutes perhaps. The second signal is therefore seen by a thread, which
reads what the C handler writes.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

_STOPS = {signal.SIGINT, signal.SIGTERM}


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextlib.contextmanager
def stoppable(at_second: Callable[[int], None]) -> Iterator[None]:
    """Raise `Terminated` at SIGTERM while the body runs, and call a function at the second signal.

    Args:
        at_second: gets the number of the second SIGINT or SIGTERM, in another thread, whatever
            the main one is doing; it is to end the process.

    Example:
        >>> try:
        ...     with stoppable(os._exit):
        ...         signal.raise_signal(signal.SIGTERM)
        ... except Terminated:
        ...     print("stopped")
        stopped
    """

    def stop(_number: int, _frame: object) -> None:
        raise Terminated

    def watch() -> None:
        came = 0
        while number := os.read(seen, 1):
            came += number[0] in _STOPS
            if came == 2:
                at_second(number[0])

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    seen, tell = os.pipe()
    os.set_blocking(tell, False)
    thread = threading.Thread(target=watch, daemon=True)
    before = signal.signal(signal.SIGTERM, stop), signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before[1])
        signal.signal(signal.SIGTERM, before[0])
        os.close(tell)  # which ends the thread
        thread.join()
        os.close(seen)
