"""Commands: each parses its flags, calls elmo_jax and prints."""

import os
import signal
import sys
import time

BEGAN = time.monotonic()  # before the imports of a command


def _leave(number: int, _frame: object) -> None:
    """End a command that is still importing, or has done all, without a traceback."""
    os.write(2, b"stopped\n")
    os._exit(128 + number)


if sys.argv[:1] == ["-m"]:  # one of them is about to be run, and imports take seconds
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _leave)
