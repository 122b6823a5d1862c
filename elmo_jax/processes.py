"""One run in several processes: what all do alike, and what the first alone does.

Nouns: the *first* process is the one that writes; the others follow what it says.
"""

import hashlib
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np

from elmo_jax.errors import InputError

T = TypeVar("T")


def several() -> bool:
    """Whether there are others beside this process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
    """Whether this process is the one that writes."""
    # Asked in this order, a process that is alone does not start a device to learn that it is.
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def agree(value: int) -> int:
    """The highest of all processes' values; a meeting, so every process must come to it."""
    if not several():
        return value
    from jax.experimental import multihost_utils  # half a second to import, for few

    return int(np.max(multihost_utils.process_allgather(np.int32(value))))


def alike(text: str) -> None:
    """Check that every process came with the same text.

    Raises:
        InputError: one did not; in every process.
    """
    number = int(hashlib.sha256(text.encode()).hexdigest()[:7], 16)
    if agree(number) + agree(-number):
        raise InputError("the processes of this run differ in flags or texts; start all with the same")


def together(work: Callable[[], T]) -> T:
    """Do what every process does; if it fails in one, it fails in all.

    Raises:
        InputError: it failed in another process; what failed here is raised as it is.
    """
    done, failure = None, None
    try:
        done = work()
    except Exception as error:
        failure = error
    failed = agree(int(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        raise InputError("another process of this run could not go on; see what it says")
    return cast(T, done)


def led(work: Callable[[], T]) -> T | None:
    """Do what the first process alone is to do, while the others wait.

    Returns:
        What the work returned, to the first process; None to the others.

    Raises:
        InputError: the work failed; in every process.

    Example:
        >>> led(lambda: 5)
        5
    """
    return together(lambda: work() if first() else None)
