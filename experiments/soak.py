"""Whether a long run keeps its memory and its files constant: python -m experiments.soak."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
import numpy as np
from tyro.conf import OmitArgPrefixes

from elmo_jax.errors import InputError, Interrupted
from elmo_jax.storage.files import CONFIG, write_atomically
from experiments.common import cli, report
from experiments.pretrain import PretrainConfig, pretrain

SAMPLES = "memory.jsonl"
BLOCKS = 12  # of `slope`
_STUDENT = 2.228  # 97.5 % of Student's t with BLOCKS - 2 degrees of freedom
_WARM_UP = 0.25  # of the time: programs are compiled and pools filled


@dataclass(frozen=True)
class SoakConfig:
    """Pre-train for some time, note memory and open files, and say whether they grow."""

    train: Annotated[PretrainConfig, OmitArgPrefixes] = PretrainConfig(
        epochs=10_000, save_every=100, output="runs/soak"
    )
    minutes: float = 60.0
    """How long; the run is stopped by SIGTERM then, and can be gone on with."""
    every: float = 10.0
    """Seconds between two looks; about 50 or more are needed."""


def soak(config: SoakConfig) -> dict[str, Any]:
    """Run the command; returns the slopes."""
    if not Path("/proc/self/statm").is_file():
        raise InputError("memory is read from /proc, which this system lacks; run this on Linux")
    looks: list[dict[str, float]] = []
    path = Path(config.train.output)
    with _watched(config, looks, path):
        try:
            pretrain(config.train)
        except Interrupted:
            cli.say(f"stopped, as told or after --minutes {config.minutes:g}")
    seconds, memory, files = (
        [look[name] for look in looks] for name in ("seconds", "rss_bytes", "open_files")
    )
    late = next((i for i, t in enumerate(seconds) if t >= _WARM_UP * seconds[-1]), 0) if looks else 0
    if len(looks) - late < 2 * BLOCKS:
        raise InputError(f"{len(looks)} looks are too few; lower --every, or raise --minutes or --epochs")
    hours, megabytes = [t / 3600 for t in seconds], [m / 2**20 for m in memory]
    rise, error = slope(hours[late:], megabytes[late:])
    plot_soak(hours, megabytes, files, late, (rise, error), path / "memory.png")
    spread = max(files[late:]) - min(files[late:])
    cli.say(
        f"memory: {rise:+.2f} ± {error:.2f} MiB an hour (95 %), at {megabytes[-1]:,.0f} MiB; open files: "
        f"{min(files[late:]):.0f} to {max(files[late:]):.0f}; written to {path / 'memory.png'}"
    )
    return {"slope": rise, "error": error, "files": spread}


@contextlib.contextmanager
def _watched(config: SoakConfig, looks: list[dict[str, float]], path: Path) -> Iterator[None]:
    """Look at this process while the body runs, and tell it to stop when its time is up."""
    began, ended = time.monotonic(), threading.Event()
    before = signal.getsignal(signal.SIGTERM)

    def watch() -> None:
        while not ended.wait(config.every):
            looks.append({"seconds": round(time.monotonic() - began, 1)} | _look())
            if (path / CONFIG).is_file():  # before, a run refuses a folder that holds anything
                write_atomically(path / SAMPLES, "".join(json.dumps(look) + "\n" for look in looks))
            training = signal.getsignal(signal.SIGTERM) != before  # and stops in good order
            if training and time.monotonic() - began > 60 * config.minutes:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _look() -> dict[str, float]:
    """Bytes of this process in memory, and how many files it has open."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"),
        "open_files": len(os.listdir("/proc/self/fd")) - 1,  # but for the one that lists them
    }


def slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """The slope of a line through a slowly varying measurement, and half its 95 % interval.

    Neighbouring measurements are alike, so the line goes through the means of `BLOCKS`
    stretches of them, which hardly are.

    Args:
        x, y: at least `BLOCKS` each.

    Example:
        >>> slope(range(24), [3.0 * x for x in range(24)])
        (3.0, 0.0)
    """
    u, v = (
        np.array([np.mean(part) for part in np.array_split(np.asarray(a, float), BLOCKS)]) for a in (x, y)
    )
    u, v = u - u.mean(), v - v.mean()
    rise = float(u @ v / (u @ u))
    error = np.sqrt(np.sum((v - rise * u) ** 2) / (BLOCKS - 2) / (u @ u))
    return rise, float(_STUDENT * error)


def plot_soak(
    hours: Sequence[float],
    megabytes: Sequence[float],
    files: Sequence[float],
    late: int,
    fitted: tuple[float, float],
    path: Path,
) -> None:
    """Memory and open files over time, as a PNG.

    Args:
        hours: of each look.
        megabytes: of memory then.
        files: open then.
        late: the first look that the line is fitted to.
        fitted: what `slope` gave.
        path: of the PNG.
    """
    with plt.rc_context(report.STYLE):
        figure, (above, below) = plt.subplots(2, sharex=True, figsize=(5.2, 4.2), height_ratios=(2, 1))
        above.plot(hours, megabytes, linewidth=1)
        x = np.asarray(hours[late:])
        middle = np.mean(megabytes[late:])
        told = f"{fitted[0]:+.2f} ± {fitted[1]:.2f} MiB/h"
        above.plot(x, middle + fitted[0] * (x - x.mean()), color=report.COLOURS[1], label=told)
        above.set(ylabel="memory (MiB)", ylim=(0, 1.2 * max(megabytes)))
        above.legend(frameon=False, loc="lower right")
        below.plot(hours, files, linewidth=1, color=report.COLOURS[2])
        below.set(xlabel="hours", ylabel="open files", ylim=(0, 1.3 * max(files)))
        figure.savefig(path)
        plt.close(figure)


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(SoakConfig, soak, "experiments.soak")


if __name__ == "__main__":
    sys.exit(main())
