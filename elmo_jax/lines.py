"""A text file's lines as tokens, one at a time or in groups, whatever its size."""

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from elmo_jax.errors import InputError
from elmo_jax.text import decode

PART_TOKENS = 50_000  # of a group: a few seconds' work


def read_lines(path: Path, split: Callable[[str], list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Line numbers from 0 and their tokens, one line in memory at a time; see `raw_lines`."""
    return ((i, split(line)) for i, line in enumerate(raw_lines(path)))


def raw_lines(path: Path) -> Iterator[str]:
    """Lines with what ends them, one in memory at a time; unpacked if the name ends in ``.gz``.

    Raises:
        InputError: the file is missing, damaged or not UTF-8, with the line.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a regular file, and is read more than once; save it as one first")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for i, line in enumerate(file, 1):
                yield decode(line, path, i)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); check the file") from None


def blocks(lines: Iterable[tuple[int, list[str]]]) -> Iterator[list[tuple[int, list[str]]]]:
    """Lines in groups of about `PART_TOKENS` tokens: the same however often it is asked."""
    block: list[tuple[int, list[str]]] = []
    tokens = 0
    for i, line in lines:
        block.append((i, line))
        tokens += len(line) + 1
        if tokens >= PART_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block
