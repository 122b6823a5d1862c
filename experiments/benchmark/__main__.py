"""Benchmark command: choose cases, time them, judge goals, and write a table, benchmark.json and a plot."""

import fnmatch
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from elmo_jax.config import Config, Count, Positive, Seed
from elmo_jax.errors import InputError
from experiments.benchmark import runner
from experiments.benchmark.cases import (
    AG_NEWS,
    CASES,
    OURS,
    PRECISIONS,
    QUICK,
    REPLAY,
    Case,
    cuda_cases,
    find_rates,
    least_work,
    machine_cases,
    make_inputs,
)
from experiments.common import cli

RESULTS, PLOT = "benchmark.json", "roofline.png"
_QUICK_SECONDS = 80.0  # of 90; the rest is for starting and drawing
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class BenchmarkConfig(Config):
    """Time elmo_jax beside PyTorch, Flax, cuDNN and gensim, and against the machine's own rates."""

    quick: bool = False
    """Run four cases (or those of --only) with short measurements, in under 90 seconds on two cores."""
    only: tuple[str, ...] = ()
    """Names of cases; 'lstm*' stands for all that begin with lstm."""
    rounds: Count = 5
    """Number of measurements of each implementation, taken in turns."""
    least: Positive = 1.0
    """Least duration of a measurement, in seconds."""
    data_dir: str | None = None
    """Folder with AG News: also pre-train on it for 10 epochs; this takes over an hour on two cores."""
    seed: Seed = 0
    """Random seed of weights and data."""
    output: str = "runs/benchmark"
    """Folder for benchmark.json and the plot."""
    overwrite: bool = False
    """Replace the results in that folder."""


class Goal(NamedTuple):
    """A bound of one figure of a case: an upper one for "memory" and "median", else a lower one."""

    case: str
    figure: str
    bound: float
    baseline: str = OURS


GOALS = (
    Goal("step", "speedup", 2.2, "torch"),
    Goal("lstm", "speedup", 0.9, "torch"),
    Goal("lstm", "speedup", 1.5, "flax"),
    Goal("softmax", "roofline_fraction", 0.5),
    Goal("recipe", "speedup", 8.0, "torch"),
    Goal("step", "memory", 0.5, "torch"),
    Goal("embed", "speedup", 3.0, "torch"),
    Goal("fit", "speedup", 0.98, REPLAY),  # at most 2% of its time is outside compiled code
)
CUDA_GOALS = (
    *(Goal(f"step{end}", "speedup", 2.0, "torch") for end in PRECISIONS.values()),
    Goal("step-b1024-bfloat16", "matmul_fraction", 0.4),
    Goal("fit", "speedup", 0.98, REPLAY),
    Goal(AG_NEWS.name, "median", 60.0),
)
_FIGURES = {  # formats of a figure's value and bound
    "speedup": ("{:.2f}x as fast as {}", "{:g}x"),
    "roofline_fraction": ("{:.0%} of the roofline", "{:.0%}"),
    "matmul_fraction": ("{:.0%} of the machine's matmul rate", "{:.0%}"),
    "memory": ("{:.2f}x the peak memory of {}", "{:g}x"),
    "median": ("trained in {:.0f} s", "{:g} s"),
}


def benchmark(
    config: BenchmarkConfig,
    known: tuple[Case, ...] = CASES,
    machine: tuple[Case, ...] | None = None,
    cuda: bool | None = None,
    deadline: float | None = None,
) -> dict[str, Any]:
    """Run the command and return what ``benchmark.json`` holds.

    `known` are the cases to choose from, and `machine` those that measure the machine's rates. `cuda` runs
    the cases and goals of a GPU. `deadline` is a time of `time.monotonic` at which everything stops.
    """
    output = _check_output(config)
    if config.quick:
        config = replace(config, rounds=3, least=0.2)
        deadline = deadline or time.monotonic() + _QUICK_SECONDS
    import jax

    cuda = jax.default_backend() == "gpu" if cuda is None else cuda
    known = cuda_cases(known) if cuda else known
    cases = choose(config, (*known, AG_NEWS) if config.data_dir else known)
    used = {case.precision for case in cases}
    machine = tuple(c for c in machine or machine_cases(cuda) if c.name == "copy" or c.precision in used)
    output.mkdir(parents=True, exist_ok=True)
    (output / PLOT).unlink(missing_ok=True)
    results = {"machine": _describe_machine(cuda), "rounds": config.rounds, "rates": {}, "cases": {}}
    cli.say(f"{results['machine']['name']}, {results['machine']['backend']}; {config.rounds} rounds")
    if not cuda:
        cli.say("no CUDA device: cuDNN, TF32, bfloat16 and batch 1024 are not run")
    cli.say(HEADER)
    for case in (*machine, *cases):
        found = measure(case, config, results["rates"], deadline)
        if case.part != "machine":
            results["cases"][case.name] = found
        elif medians := _pick(found, "median"):  # the best implementation measures the machine
            results["rates"][case.name] = (found["flops"] or found["bytes"]) / min(medians.values())
        cli.say("\n".join(table_rows(case, found)))
        _write_json(results, output / RESULTS)
    goals = CUDA_GOALS if cuda else GOALS
    results["goals"] = [judged for goal in goals if (judged := judge(goal, results["cases"]))]
    for judged in results["goals"]:
        cli.say(judged["line"])
    _write_json(results, output / RESULTS)
    fractions = {name: _pick(found, "roofline_fraction") for name, found in results["cases"].items()}
    if any(fractions.values()):
        plot_fractions({name: each for name, each in fractions.items() if each}, output / PLOT)
    cli.say(f"written to {output}")
    return results


def _check_output(config: BenchmarkConfig) -> Path:
    """Return the output folder after refusing flags that would fail later."""
    output = Path(config.output)
    if (output / RESULTS).exists() and not config.overwrite:
        raise InputError(f"{output / RESULTS} already exists; give another --output, or --overwrite")
    if config.quick and config.data_dir:
        raise InputError("--data-dir takes longer than --quick allows; leave out one of the two")
    if config.data_dir:
        from elmo_jax.data.csv_dataset import find_parts

        find_parts(Path(config.data_dir))
    return output


def _write_json(results: Mapping[str, Any], path: Path) -> None:
    from elmo_jax.storage.files import write_atomically  # imports JAX

    write_atomically(path, json.dumps(results, indent=2) + "\n")


def choose(config: BenchmarkConfig, known: tuple[Case, ...]) -> tuple[Case, ...]:
    """Return the cases that the flags name."""
    names = [case.name for case in known]
    patterns = config.only or (tuple(QUICK) if config.quick else names)
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InputError(f"--only {pattern}: no such case; give some of {', '.join(names)}")
    chosen = [case for case in known if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]
    quick = QUICK if config.quick else {}
    return tuple(replace(c, implementations=quick.get(c.name, c.implementations)) for c in chosen)


def measure(
    case: Case, config: BenchmarkConfig, rates: Mapping[str, float], deadline: float | None
) -> dict[str, Any]:
    """Return a case's figures, or the reason why there are none."""
    if case.part == "pretrain":
        flags = ["--dataset", "ag_news", "--data-dir", str(config.data_dir), "--preset", "report"]
        return time_pretraining(flags)
    if deadline is not None and time.monotonic() > deadline:
        return {"not_timed": "out of time"}
    arrays, counts = make_inputs(case, config.seed)
    with tempfile.TemporaryDirectory() as folder:
        settings = config.rounds, config.least, deadline
        workers = runner.time_case(case, arrays, Path(folder), *settings)
    work, machine = least_work(case, counts), find_rates(rates, case.precision)
    return runner.summarize(case, workers, counts, work, machine)


def time_pretraining(flags: list[str]) -> dict[str, Any]:
    """Run ``experiments.pretrain`` with these flags into a temporary folder and return its figures.

    Seconds are those that the run reports for training; ``process_seconds`` include reading, compiling
    and evaluating.
    """
    with tempfile.TemporaryDirectory() as folder:
        run, start = Path(folder) / "run", time.perf_counter()
        command = [sys.executable, "-P", "-m", "experiments.pretrain", *flags, "--output", str(run)]
        path = os.pathsep.join(filter(None, [str(_ROOT), os.getenv("PYTHONPATH")]))
        process = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
        )
        if process.returncode:
            reason = process.stderr.strip().rpartition("\n")[2][:200] or "no message"
            record: dict[str, Any] = {"not_timed": f"ended with code {process.returncode}: {reason}"}
        else:
            record = read_pretraining(run) | {"process_seconds": time.perf_counter() - start}
    counts = {"counts": {}, "flops": 0.0, "bytes": 0.0}
    return {"case": asdict(AG_NEWS), **counts, "implementations": {OURS: record}}


def read_pretraining(run: Path) -> dict[str, Any]:
    """Return the figures of a finished pre-training run."""
    epochs = [json.loads(line)["seconds"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((run / "results.json").read_text())
    record = {"seconds": [sum(epochs)], "median": sum(epochs), "seconds_by_epoch": epochs}
    record["spread"] = (max(epochs) - min(epochs)) / 2 / statistics.median(epochs)
    return record | {name: results[name] for name in ("perplexity", "tokens_per_second")}


HEADER = (
    f"{'case':<19} {'baseline':<9} {'a unit':>10} {'spread':>6} {'tokens/s':>11} {'roofline':>8} "
    f"{'peak MB':>8} {'compile':>8} {'speedup':>7}"
)


def table_rows(case: Case, found: Mapping[str, Any]) -> list[str]:
    """Return a case's lines of the table."""
    if "not_timed" in found:
        return [f"{case.name:<19} not timed: {found['not_timed']}"]
    lines = []
    for name, record in found["implementations"].items():
        if "median" not in record:
            lines.append(f"{case.name:<19} {name:<9} not timed: {record['not_timed']}")
            continue
        shown = lambda key, form, record=record: form.format(record[key]) if record.get(key) else ""  # noqa: E731
        median, rate = record["median"], shown("tokens_per_second", "{:,.0f}")
        if case.part == "machine":
            unit = "GFLOP/s" if found["flops"] else "GB/s"
            rate = f"{(found['flops'] or found['bytes']) / median / 1e9:,.0f} {unit}"
        seconds = f"{median * 1e3:,.2f} ms" if median < 1 else f"{median:,.2f} s"
        memory = f"{record['peak_bytes'] / 1e6:,.0f}" if record.get("peak_bytes") else ""
        line = f"{case.name:<19} {name:<9} {seconds:>10} {shown('spread', '±{:.0%}'):>6} {rate:>11} "
        line += f"{shown('roofline_fraction', '{:.1%}'):>8} {memory:>8} "
        line += f"{shown('compile_seconds', '{:.1f} s'):>8} {shown('speedup', '{:.2f}x'):>7}"
        lines.append(line.rstrip())
    return lines


def _pick(found: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return one figure of all implementations that have it."""
    records = found.get("implementations", {}).items()
    return {name: record[key] for name, record in records if key in record}


def judge(goal: Goal, cases: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a goal with its value, whether it is met and a line for the user; None if not measured."""
    records = cases.get(goal.case, {}).get("implementations", {})
    ours, baseline = records.get(OURS, {}), records.get(goal.baseline, {})
    value, is_upper = baseline.get(goal.figure), goal.figure in ("memory", "median")
    if value is None:
        return None
    met = value <= goal.bound if is_upper else value >= goal.bound
    text, bound = _FIGURES[goal.figure]
    line = f"{goal.case}: {text.format(value, goal.baseline)}, goal at {'most' if is_upper else 'least'} "
    line += f"{bound.format(goal.bound)}: {'met' if met else 'missed'}"
    noise = value * (ours.get("spread", 0.0) + baseline.get("spread", 0.0))
    if goal.figure == "speedup" and abs(value - goal.bound) <= noise:
        line += " (within the noise)"
    return {**goal._asdict(), "value": value, "met": met, "line": line}


def plot_fractions(fractions: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Plot the roofline fraction of each case and implementation as a horizontal bar."""
    import matplotlib.pyplot as plt

    from experiments.common import report

    bars = [(case, name, value) for case, group in fractions.items() for name, value in group.items()]
    names = list(dict.fromkeys(name for _, name, _ in bars))
    colours = [report.COLOURS[names.index(name) % len(report.COLOURS)] for _, name, _ in bars]
    with plt.rc_context(report.STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(figsize=(6.4, 1.1 + 0.25 * len(bars)))
        patches = axes.barh(range(len(bars)), [value for *_, value in bars], height=0.82, color=colours)
        axes.bar_label(patches, [f" {value:.1%}" for *_, value in bars], fontsize=8)
        axes.set_yticks(range(len(bars)), [f"{case}: {name}" for case, name, _ in bars])
        axes.invert_yaxis()
        axes.axvline(1, color="black", linestyle="--", linewidth=1)
        axes.set(xlabel="fraction of the roofline", xlim=(0, 1.1))
        figure.savefig(path)
        plt.close(figure)


def _describe_machine(cuda: bool) -> dict[str, Any]:
    import jax

    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in info.splitlines() if "model name" in line]
    name = models[0] if models else platform.processor() or platform.machine()
    packages = ("elmo_jax", "jax", "flax", "optax", "torch", "gensim", "numpy")
    versions = {each.name: each.version for each in metadata.distributions() if each.name in packages}
    return {
        "name": jax.devices()[0].device_kind if cuda else name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "backend": jax.default_backend(),
        "load": os.getloadavg()[0],
        "packages": {package: versions.get(package) for package in packages},
    }


def main() -> int:
    """Run the command and return its exit code."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # workers share a GPU's memory
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", ".9")
    return cli.run(BenchmarkConfig, benchmark, "benchmark")


if __name__ == "__main__":
    sys.exit(main())
