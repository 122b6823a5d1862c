"""How far a long piece of work is, for people: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

from elmo_jax.processes import first

T = TypeVar("T")


def shown(items: Sequence[T], unit: str) -> Iterator[T]:
    """The items, a `Meter` telling how many are behind, if there are any.

    Example:
        >>> sum(shown([1, 2, 3], "number"))
        6
    """
    if not items:
        return
    with Meter(len(items), unit) as meter:
        for item in items:
            yield item
            meter.add(1)


class Meter:
    """A bar with an ETA on a terminal, a plain line every half minute elsewhere; of the first process.

    Args:
        total: units of work.
        unit: their name.
        done: units that were done before.
        scale: whether the bar shortens large numbers.
    """

    INTERVAL = 30.0

    def __init__(self, total: int, unit: str, done: int = 0, scale: bool = False):
        self.total, self.unit, self.begun, self.done = total, unit, done, done
        self.bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            unit_scale=scale,
            disable=not (first() and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self.began = self.spoke = time.perf_counter()

    def __enter__(self) -> "Meter":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, n: int) -> None:
        """Count n more units as done."""
        self.show(self.done + n, f"{self.done + n:,} of {self.total:,} {self.unit}s")

    def show(self, done: int, line: str) -> None:
        """Say how many units are done; a plain line says it as `line`, and how long is left."""
        self.done = done
        if not self.bar.disable:
            self.bar.update(done - self.bar.n)
        elif first() and done > self.begun and time.perf_counter() - self.spoke > self.INTERVAL:
            self.spoke = time.perf_counter()
            left = (self.total - done) * (self.spoke - self.began) / (done - self.begun)
            print(f"{line}, {left / 60:.1f} min left", file=sys.stderr, flush=True)
