"""How fast this library is beside its peers and the machine: python -m experiments.benchmark.

The benchmark's longest case: pre-training on AG News as a user types it.

The benchmark's picture: shares of what the machine could do.
"""

import dataclasses
import fnmatch
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from elmo_jax.data.csv_dataset import find_parts
from elmo_jax.errors import InputError
from elmo_jax.ops.lstm_pallas import on_cuda
from elmo_jax.storage.files import write_atomically
from elmo_jax.training.checkpoint import METRICS, RESULTS
from elmo_jax.training.loop import ProgressBar
from experiments import BEGAN
from experiments.benchmark.cases import (
    AG_NEWS,
    CASES,
    CUDA_GOALS,
    CUDA_MACHINE,
    GOALS,
    MACHINE,
    OURS,
    QUICK,
    Case,
    Goal,
    cuda_cases,
    judge,
    needed,
    phases,
    rates_of,
)
from experiments.benchmark.inputs import make_inputs
from experiments.benchmark.runner import race, results_of
from experiments.common import cli, report

CASE = Case(AG_NEWS, "pretrain", (OURS,), negatives=2048)


def flags_of(data_dir: str) -> list[str]:
    """What the command is given: the report's sizes, and so 10 epochs."""
    return ["--dataset", "ag_news", "--data-dir", data_dir, "--preset", "report"]


def pretraining(flags: Sequence[str]) -> dict[str, Any]:
    """Run ``experiments.pretrain`` into a folder that is thrown away.

    Args:
        flags: of the command, but for its output.

    Returns:
        The case's figures as `race.results_of` gives them. Seconds are the training's, as the
        run itself reports them; ``whole_seconds`` are those of the process, with reading, compiling
        and evaluating; ``seconds_by_epoch`` and the best ``perplexity`` are beside them.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        began = time.perf_counter()
        command = [sys.executable, "-m", "experiments.pretrain", *flags, "--output", str(run)]
        ended = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - began
        if ended.returncode:
            said = ended.stderr.strip().splitlines()[-1:] or ["it said nothing"]
            record: dict[str, Any] = {"not_timed": f"ended with code {ended.returncode}: {said[0][:200]}"}
        else:
            results = json.loads((run / RESULTS).read_text())
            epochs = [json.loads(line)["seconds"] for line in (run / METRICS).read_text().splitlines()]
            record = {"seconds": [sum(epochs)], "median": sum(epochs), "whole_seconds": seconds}
            record |= {"seconds_by_epoch": epochs, "perplexity": results["perplexity"]}
            record |= {"tokens_per_second": results["tokens_per_second"]}
            record["spread"] = (max(epochs) - min(epochs)) / 2 / statistics.median(epochs)
    return {
        "case": dataclasses.asdict(CASE),
        "counts": {},
        "flops": 0.0,
        "bytes": 0.0,
        "peers": {OURS: record},
    }


_ROW = 6  # names in a row of a legend
_HATCHES = ("", "///", "...", "\\\\\\", "xxx", "ooo")  # as many as make bars alike no sooner than lines


def plot_shares(shares: Mapping[str, Mapping[str, float]], path: Path, xlabel: str) -> None:
    """Bars of shares in [0, 1] by group and competitor, from top to bottom, as a PNG.

    Args:
        shares: by group and competitor.
        path: of the PNG.
        xlabel: what a share is of.
    """
    names = list(dict.fromkeys(name for group in shares.values() for name in group))
    looks = {name: _bar(i) for i, name in enumerate(names)}
    most = max(share for group in shares.values() for share in group.values())
    with plt.rc_context(report.STYLE | {"axes.grid": False}):
        bars = sum(map(len, shares.values()))
        figure, axes = plt.subplots(figsize=(6.4, 1.1 + 0.2 * bars + 0.12 * len(shares)))
        top, ticks = 0.0, []
        for group in shares.values():
            ticks.append(top + (len(group) - 1) / 2)
            for name, share in group.items():
                drawn = axes.barh(top, share, height=0.82, **looks[name])
                axes.bar_label(drawn, [f" {share:.0%}" if share >= 0.1 else f" {share:.1%}"], fontsize=8)
                top += 1
            top += 0.6
        axes.set_yticks(ticks, list(shares))
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlim(0, max(1.0, 1.1 * most))
        axes.axvline(1, color="black", linestyle="--", linewidth=1)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set(xlabel=xlabel)
        handles = [Patch(**looks[name], label=name) for name in names]
        legend: Any = {"frameon": False, "loc": "lower center", "bbox_to_anchor": (0.5, 1)}
        axes.legend(handles=handles, ncols=min(len(names), _ROW), **legend)
        figure.savefig(path)
        plt.close(figure)


def _bar(i: int) -> dict[str, Any]:
    """The look of the i-th bar of several, which has no marker: where colours repeat, a hatch."""
    hatch = _HATCHES[i // len(report.COLOURS) % len(_HATCHES)]
    return {
        "facecolor": report.series_style(i)["color"],
        "hatch": hatch,
        "edgecolor": "white",
        "linewidth": 0,
    }


RESULT = "benchmark.json"
_SHARES = "floors.png"
_QUICK_ROUNDS, _QUICK_SECONDS, _QUICK_END = 3, 0.2, 80.0  # the last leaves time to draw


@dataclass(frozen=True)
class BenchmarkConfig:
    """Time this library beside PyTorch, Flax, cuDNN and gensim, and against the machine's own rates."""

    quick: bool = False
    """Four cases in under 90 seconds on two cores; --only chooses others."""
    only: tuple[str, ...] = ()
    """Names of cases, 'lstm*' for all that begin so."""
    rounds: int = 5
    """Measurements of each peer, by turns."""
    least: float = 1.0
    """Seconds of each measurement, at least."""
    data_dir: str | None = None
    """Folder of AG News: pre-train on it too, the report's 10 epochs; over an hour on two cores."""
    seed: int = 0
    """Of weights and data."""
    output: str = "runs/benchmark"
    """Folder for benchmark.json and the picture."""
    overwrite: bool = False
    """Replace the results in that folder."""


def benchmark(
    config: BenchmarkConfig,
    known: tuple[Case, ...] = CASES,
    machine: tuple[Case, ...] = MACHINE,
    began: float | None = None,
) -> dict[str, Any]:
    """Run the command; returns what ``benchmark.json`` holds. --quick counts from `began`, or from now."""
    output = Path(config.output)
    if (output / RESULT).exists() and not config.overwrite:
        raise InputError(f"{output / RESULT} is there; give another --output, or --overwrite to replace it")
    if config.quick and config.data_dir:
        raise InputError("--data-dir: AG News takes longer than --quick allows; leave out one of the two")
    if config.data_dir is not None:
        find_parts(Path(config.data_dir))
    began = time.monotonic() if began is None else began
    deadline = began + _QUICK_END if config.quick else None
    if on_cuda():
        known, machine = cuda_cases(known), CUDA_MACHINE
    cases = choose(config, (*known, CASE) if config.data_dir else known)
    machine = needed(machine, cases)
    rounds, _ = _pace(config)
    output.mkdir(parents=True, exist_ok=True)
    if config.overwrite:
        (output / _SHARES).unlink(missing_ok=True)
    results: dict[str, Any] = {"machine": _machine(), "rounds": rounds, "rates": {}, "cases": {}}
    cli.say(f"{results['machine']['name']}, {results['machine']['backend']}; {rounds} rounds")
    if not on_cuda():
        cli.say("no CUDA here: jax.experimental.rnn, torch's cuDNN, TF32, bf16 and B 1024 are not run")
    cli.say(header())
    total = sum(len(case.peers) + rounds for case in (*machine, *cases))
    with ProgressBar(total, "piece") as meter:
        for case in (*machine, *cases):
            after = meter.done + len(case.peers) + rounds
            found = _measure(case, config, results["rates"], deadline, lambda: meter.add(1))
            meter.add(after - meter.done)
            _keep(case, found, results, output)
    results["goals"] = [line for goal in _goals() if (line := judge(goal, results["cases"]))]
    for goal in results["goals"]:
        cli.say(goal["line"])
    write_atomically(output / RESULT, json.dumps(results, indent=2) + "\n")
    draw(results, output)
    return results


def _pace(config: BenchmarkConfig) -> tuple[int, float]:
    """Rounds, and the least seconds of a measurement."""
    return (_QUICK_ROUNDS, _QUICK_SECONDS) if config.quick else (config.rounds, config.least)


def _measure(
    case: Case,
    config: BenchmarkConfig,
    machine: Mapping[str, float],
    deadline: float | None,
    tick: Callable[[], None],
) -> dict[str, Any]:
    """A case's figures, or why it has none; `machine` holds the rates measured so far."""
    if case == CASE:
        return pretraining(flags_of(str(config.data_dir)))
    over = {"not_timed": "the time was over"}
    if deadline is not None and time.monotonic() > deadline:
        return over
    rounds, least = _pace(config)
    arrays, counts = make_inputs(case, config.seed)
    if deadline is not None and time.monotonic() > deadline:
        return over
    with tempfile.TemporaryDirectory() as folder:
        lanes = race(case, arrays, Path(folder), rounds, least, tick, deadline)
    return results_of(case, lanes, counts, phases(case, counts), rates_of(machine, case.precision))


def choose(config: BenchmarkConfig, known: tuple[Case, ...]) -> tuple[Case, ...]:
    """The cases that the flags name."""
    enabled = config.only or (tuple(QUICK) if config.quick else tuple(case.name for case in known))
    for name in enabled:
        if not fnmatch.filter([case.name for case in known], name):
            raise InputError(f"--only {name}: no such case; there are {', '.join(c.name for c in known)}")
    chosen = tuple(case for case in known if any(fnmatch.fnmatch(case.name, name) for name in enabled))
    if config.quick:
        chosen = tuple(replace(case, peers=QUICK.get(case.name, case.peers)) for case in chosen)
    return chosen


def _keep(case: Case, found: dict[str, Any], results: dict[str, Any], output: Path) -> None:
    """Write down a case's figures and print them; of the machine's the best peer's median is its rate."""
    timed = [peer["median"] for peer in found.get("peers", {}).values() if "median" in peer]
    if case.part not in ("product", "copy"):
        results["cases"][case.name] = found
    elif timed:
        results["rates"][case.name] = (found["flops"] or found["bytes"]) / min(timed)
    for line in rows(case, found):
        cli.say(line)
    write_atomically(output / RESULT, json.dumps(results, indent=2) + "\n")


def header() -> str:
    """The table's first line."""
    return (
        f"{'case':<15} {'peer':<9} {'a unit':>10} {'spread':>6} {'tokens/s':>11} {'of floor':>8} "
        f"{'peak MB':>8} {'compile':>8} {'faster':>7}  goal"
    )


def rows(case: Case, found: Mapping[str, Any]) -> list[str]:
    """A case's lines of the table."""
    if "not_timed" in found:
        return [f"{case.name:<15} not timed: {found['not_timed']}"]
    lines = []
    for peer, record in found["peers"].items():
        start = f"{case.name:<15} {peer:<9}"
        if "median" not in record:
            lines.append(f"{start} not timed: {record['not_timed']}")
            continue
        rate = f"{record['tokens_per_second']:,.0f}" if "tokens_per_second" in record else ""
        if case.part in ("product", "copy"):
            unit = "GFLOP/s" if found["flops"] else "GB/s"
            rate = f"{(found['flops'] or found['bytes']) / record['median'] / 1e9:,.0f} {unit}"
        share = f"{record['of_floor']:.1%}" if "of_floor" in record else ""
        times = f"{record['times']:.2f}x" if "times" in record else ""
        compiled = f"{record['compile_seconds']:.1f} s" if record.get("compile_seconds") else ""
        spread = f"±{record['spread']:.0%}"
        memory = f"{record['peak_bytes'] / 1e6:,.0f}" if record.get("peak_bytes") else ""
        goals = [g for g in _goals() if g.case == case.name and g.figure == "speed"]
        said = [f"at least {g.bound:g}x" for g in goals if g.peer == peer]
        said += [f"at least {g.bound:.0%} of the floor" for g in goals if g.peer is None and peer == OURS]
        if "sentences_per_second" in record:
            said.append(f"({record['sentences_per_second']:,.1f} sentences/s)")
        lines.append(
            f"{start} {_duration(record['median']):>10} {spread:>6} {rate:>11} {share:>8} {memory:>8} "
            f"{compiled:>8} {times:>7}  {', '.join(said)}".rstrip()
        )
    return lines


def _goals() -> tuple[Goal, ...]:
    return CUDA_GOALS if on_cuda() else GOALS


def _duration(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def draw(results: Mapping[str, Any], output: Path) -> None:
    """Draw each case against its floor."""
    timed = {name: case for name, case in results["cases"].items() if "peers" in case}
    shares = {
        name: {peer: r["of_floor"] for peer, r in found["peers"].items() if "of_floor" in r}
        for name, found in timed.items()
    }
    shares = {name: share for name, share in shares.items() if share}
    if shares:
        plot_shares(shares, output / _SHARES, "share of what the machine could do (floor / time)")
    drawn = " and its picture" if shares else ""
    cli.say(f"written to {output / RESULT}{drawn}")


def _machine() -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        name = models[0] if models else name
    if on_cuda():
        name = jax.devices()[0].device_kind
    return {
        "name": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backend": jax.default_backend(),
        "load": os.getloadavg()[0],
        "packages": _versions(("elmo_jax", "jax", "flax", "optax", "torch", "gensim", "numpy")),
    }


def _versions(names: Sequence[str]) -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in names}


def main() -> int:
    """The command; returns its exit code."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a GPU's memory is the peers'
    return cli.run(BenchmarkConfig, lambda config: benchmark(config, began=BEGAN), "experiments.benchmark")


if __name__ == "__main__":
    sys.exit(main())
