"""Command that checks that a long pre-training run keeps its memory and open files constant."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta
from tyro.conf import OmitArgPrefixes

from elmo_jax.config import Config, Positive
from elmo_jax.errors import InputError, Interrupted
from experiments.common import cli
from experiments.pretrain import PretrainConfig, pretrain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

BLOCKS = 12  # of `fit_slope`
_WARMUP = (
    0.25  # This first fraction of the time, spent compiling and filling pools, is not used for the slope.
)


@dataclass(frozen=True)
class SoakConfig(Config):
    """Pre-train for some time and report whether memory and open files grow."""

    train: Annotated[PretrainConfig, OmitArgPrefixes] = PretrainConfig(
        epochs=10_000, save_every=100, output="runs/soak"
    )
    minutes: Positive = 60.0
    """Minutes until the run is stopped; it can be continued later."""
    every: Annotated[float, Meta(gt=0, le=100_000)] = 10.0
    """Seconds between two samples; about 50 samples or more are needed."""


def soak(config: SoakConfig) -> dict[str, Any]:
    """Run the command and return the growth of memory and open files."""
    import numpy as np

    if not Path("/proc/self/statm").is_file():
        raise InputError("this system has no /proc to read memory from; run this on Linux")
    samples: list[dict[str, float]] = []
    path, ended = Path(config.train.output), threading.Event()
    args = (config, samples, ended, signal.getsignal(signal.SIGTERM))
    thread = threading.Thread(target=_sample_process, args=args, daemon=True)
    thread.start()
    try:
        with contextlib.suppress(Interrupted):
            pretrain(config.train)
    finally:
        ended.set()
        thread.join()
    table = np.array([list(sample.values()) for sample in samples]).reshape(-1, 3)
    hours, memory, files = (table / [3600, 2**20, 1]).T
    start = int(np.searchsorted(hours, _WARMUP * hours.max(initial=0)))
    if len(samples) - start < 2 * BLOCKS:
        raise InputError(f"{len(samples)} samples are too few; lower --every, or raise --minutes or --epochs")
    fitted = fit_slope(hours[start:], memory[start:])
    plot_soak(hours, memory, files, start, fitted, path / "memory.png")
    (slope, error), fewest, most = fitted, files[start:].min(), files[start:].max()
    cli.say(
        f"memory: {slope:+.2f} ± {error:.2f} MiB an hour (95 %), at {memory[-1]:,.0f} MiB; open files: "
        f"{fewest:.0f} to {most:.0f}; written to {path / 'memory.png'}"
    )
    return {"slope": slope, "error": error, "files": most - fewest}


def _sample_process(
    config: SoakConfig, samples: list[dict[str, float]], ended: threading.Event, handler: Any
) -> None:
    """Sample this process until an event, and stop its training when the time is up."""
    folder, start = Path(config.train.output), time.monotonic()
    while not ended.wait(config.every):
        seconds = time.monotonic() - start
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = len(os.listdir("/proc/self/fd")) - 1  # listing the folder opens one file
        rss = pages * os.sysconf("SC_PAGE_SIZE")
        samples.append({"seconds": round(seconds, 1), "rss_bytes": rss, "open_files": files})
        if (folder / "config.json").is_file():  # earlier, `Run.create` would refuse a folder with files
            (folder / "memory.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
        is_training = signal.getsignal(signal.SIGTERM) != handler  # `fit` saves at this signal
        if is_training and seconds > 60 * config.minutes:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def fit_slope(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Return the slope of a slowly varying measurement and half its 95 % confidence interval.

    Adjacent measurements are correlated, so the line is fitted to the means of `BLOCKS` blocks.

    Examples:
        >>> fit_slope(range(24), [3.0 * x for x in range(24)])
        (3.0, 0.0)
    """
    import numpy as np
    from scipy import stats

    u, v = ([np.mean(part) for part in np.array_split(a, BLOCKS)] for a in (x, y))
    line: Any = stats.linregress(u, v)
    return float(line.slope), float(line.stderr * stats.t.ppf(0.975, BLOCKS - 2))


def plot_soak(
    hours: np.ndarray,
    memory: np.ndarray,
    files: np.ndarray,
    start: int,
    fitted: tuple[float, float],
    path: Path,
) -> None:
    """Plot memory and open files over time with the line fitted from sample `start` on, as a PNG."""
    from experiments.common import report

    (slope, error), x = fitted, hours[start:]
    with report.new_figure(path, 5.2, 4.2) as figure:
        above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
        above.plot(hours, memory, linewidth=1)
        line, label = memory[start:].mean() + slope * (x - x.mean()), f"{slope:+.2f} ± {error:.2f} MiB/h"
        above.plot(x, line, color=report.COLOURS[1], label=label)
        above.set(ylabel="memory (MiB)", ylim=(0, 1.2 * max(memory)))
        above.legend(frameon=False, loc="lower right")
        below.plot(hours, files, linewidth=1, color=report.COLOURS[2])
        below.set(xlabel="hours", ylabel="open files", ylim=(0, 1.3 * max(files)))


def main() -> int:
    """Run the command line and return the exit code."""
    return cli.run(SoakConfig, soak, "soak")


if __name__ == "__main__":
    sys.exit(main())
