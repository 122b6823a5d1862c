"""Command that checks that a long pre-training run keeps its memory and open files constant."""

from __future__ import annotations

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

from tyro.conf import OmitArgPrefixes

from elmo_jax.config import Positive
from elmo_jax.errors import InputError, Interrupted
from experiments.common import cli
from experiments.pretrain import PretrainConfig, pretrain

SAMPLES = "memory.jsonl"
BLOCKS = 12  # of `fit_slope`
_STUDENT = 2.228  # 97.5 % quantile of Student's t with BLOCKS - 2 degrees of freedom
_WARMUP = 0.25  # fraction of the time spent compiling and filling pools; not used for the slope


@dataclass(frozen=True)
class SoakConfig:
    """Pre-train for some time and report whether memory and open files grow."""

    train: Annotated[PretrainConfig, OmitArgPrefixes] = PretrainConfig(
        epochs=10_000, save_every=100, output="runs/soak"
    )
    minutes: Positive = 60.0
    """Minutes until the run is stopped; it can be continued later."""
    every: Positive = 10.0
    """Seconds between two samples; about 50 samples or more are needed."""


def soak(config: SoakConfig) -> dict[str, Any]:
    """Run the command and return the growth of memory and open files."""
    if not Path("/proc/self/statm").is_file():
        raise InputError("this system has no /proc to read memory from; run this on Linux")
    samples: list[dict[str, float]] = []
    path = Path(config.train.output)
    with _sampled(config, samples, path), contextlib.suppress(Interrupted):
        pretrain(config.train)
    first = _WARMUP * samples[-1]["seconds"] if samples else 0
    start = next((i for i, sample in enumerate(samples) if sample["seconds"] >= first), 0)
    if len(samples) - start < 2 * BLOCKS:
        raise InputError(f"{len(samples)} samples are too few; lower --every, or raise --minutes or --epochs")
    hours = [sample["seconds"] / 3600 for sample in samples]
    megabytes = [sample["rss_bytes"] / 2**20 for sample in samples]
    files = [sample["open_files"] for sample in samples]
    slope, error = fit_slope(hours[start:], megabytes[start:])
    plot_soak(hours, megabytes, files, start, (slope, error), path / "memory.png")
    fewest, most = min(files[start:]), max(files[start:])
    cli.say(
        f"memory: {slope:+.2f} ± {error:.2f} MiB an hour (95 %), at {megabytes[-1]:,.0f} MiB; open files: "
        f"{fewest:.0f} to {most:.0f}; written to {path / 'memory.png'}"
    )
    return {"slope": slope, "error": error, "files": most - fewest}


@contextlib.contextmanager
def _sampled(config: SoakConfig, samples: list[dict[str, float]], path: Path) -> Iterator[None]:
    """Sample this process while the body runs, and stop its training when the time is up."""
    start, ended = time.monotonic(), threading.Event()
    before = signal.getsignal(signal.SIGTERM)

    def watch() -> None:
        while not ended.wait(config.every):
            samples.append({"seconds": round(time.monotonic() - start, 1)} | _sample())
            if (path / "config.json").is_file():  # earlier, `Run.create` would refuse a folder with files
                (path / SAMPLES).write_text("".join(json.dumps(sample) + "\n" for sample in samples))
            is_training = signal.getsignal(signal.SIGTERM) != before  # `fit` saves at this signal
            if is_training and time.monotonic() - start > 60 * config.minutes:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _sample() -> dict[str, float]:
    """Return this process's resident memory in bytes and its number of open files."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd")) - 1  # listing opens one
    return {"rss_bytes": pages * os.sysconf("SC_PAGE_SIZE"), "open_files": files}


def fit_slope(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Return the slope of a slowly varying measurement and half its 95 % confidence interval.

    Adjacent measurements are correlated, so the line is fitted to the means of `BLOCKS` blocks.

    Args:
        x, y: at least `BLOCKS` values each.

    Examples:
        >>> fit_slope(range(24), [3.0 * x for x in range(24)])
        (3.0, 0.0)
    """
    import numpy as np

    u, v = (
        np.array([np.mean(part) for part in np.array_split(np.asarray(a, float), BLOCKS)]) for a in (x, y)
    )
    u, v = u - u.mean(), v - v.mean()
    slope = float(u @ v / (u @ u))
    error = np.sqrt(np.sum((v - slope * u) ** 2) / (BLOCKS - 2) / (u @ u))
    return slope, float(_STUDENT * error)


def plot_soak(
    hours: Sequence[float],
    megabytes: Sequence[float],
    files: Sequence[float],
    start: int,
    fitted: tuple[float, float],
    path: Path,
) -> None:
    """Plot memory and open files over time with the line fitted from sample `start` on, as a PNG."""
    import matplotlib.pyplot as plt
    import numpy as np

    from experiments.common import report

    with plt.rc_context(report.STYLE):
        figure, (above, below) = plt.subplots(2, sharex=True, figsize=(5.2, 4.2), height_ratios=(2, 1))
        above.plot(hours, megabytes, linewidth=1)
        x = np.asarray(hours[start:])
        line = np.mean(megabytes[start:]) + fitted[0] * (x - x.mean())
        label = f"{fitted[0]:+.2f} ± {fitted[1]:.2f} MiB/h"
        above.plot(x, line, color=report.COLOURS[1], label=label)
        above.set(ylabel="memory (MiB)", ylim=(0, 1.2 * max(megabytes)))
        above.legend(frameon=False, loc="lower right")
        below.plot(hours, files, linewidth=1, color=report.COLOURS[2])
        below.set(xlabel="hours", ylabel="open files", ylim=(0, 1.3 * max(files)))
        figure.savefig(path)
        plt.close(figure)


def main() -> int:
    """Run the command line and return the exit code."""
    return cli.run(SoakConfig, soak, "soak")


if __name__ == "__main__":
    sys.exit(main())
