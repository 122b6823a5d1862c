"""Interleaved timing of a case's implementations, each in a worker process.

The method: all implementations get the same weights and data, and each has a process, and so memory
and threads, of its own. Before anything is timed, losses and gradients are compared with those of
elmo_jax; an implementation that differs is not timed. Then the workers take turns: a round measures
every worker once, one after the other, so that a slow minute of the machine affects all of them. A case
reports the median over rounds, the spread (half the range over the median), the speedup over each
baseline (the median of the ratios within a round) and the roofline fraction (the time that the
machine's measured matmul and copy rates allow, over the time taken).
"""

import contextlib
import dataclasses
import importlib.util
import multiprocessing
import os
import pkgutil
import statistics
import sys
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmark.cases import CUDNN, OURS, REPLAY, SCAN, Arrays, Case, Phase, Rates, Workload
from experiments.common.cli import configure_malloc, process_peak

BUILDERS = {
    OURS: "workloads:build_{part}",
    SCAN: "workloads:build_{part}_scan",
    REPLAY: "workloads:build_replay",
    "flax": "flax_baseline:build_{part}",
    CUDNN: "flax_baseline:build_{part}_cudnn",
    "gensim": "flax_baseline:build_gensim",
    "torch": "torch_baseline:build_{part}",
}
TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 5e-2}  # relative, of losses and gradients
_SGNS_TOLERANCE = 0.1  # negatives are sampled independently, and gensim's threads race
_JAX_PRECISION = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": None}  # a GPU defaults to TF32
_MAX_WARM_UPS = 5  # an implementation that still compiles after them compiles in every unit


class Worker:
    """A process that runs one implementation of a case; `error` says why it is not timed, or is None."""

    def __init__(self, case: Case, name: str, inputs: Path, min_seconds: float, deadline: float | None):
        self.name, self.deadline = name, deadline
        self.seconds: list[float] = []  # per unit of work, one number for each measurement
        self.info: dict[str, Any] = {}  # peak memory, compile time, difference from elmo_jax
        self.checked: dict[str, np.ndarray] = {}  # arrays that all implementations must agree on
        self.error: str | None = None
        self.process = None
        if name in ("torch", "gensim") and importlib.util.find_spec(name) is None:
            self.error = f"{name} is not installed; run pip install 'elmo_jax[benchmark]'"
            return
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, case, name, inputs, min_seconds)
        self.process = context.Process(target=run_worker, args=arguments, daemon=True)
        self.process.start()
        theirs.close()  # only the worker keeps this end open, so that reading ends with the worker

    def wait_ready(self) -> None:
        """Wait until the worker has compiled, checked and warmed up."""
        self.info, self.checked = self._receive() or ({}, {})

    def measure(self) -> None:
        """Take one measurement, unless the worker has failed."""
        if self.error is None:
            with contextlib.suppress(OSError):  # _receive reports that the worker has ended
                self._connection.send("measure")
            if (seconds := self._receive()) is not None:
                self.seconds.append(seconds)

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self._connection.close()

    def _receive(self) -> Any:
        """Return the worker's answer, or None after setting `error`."""
        if self.error is not None or self.process is None:
            return None
        remaining = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        if not self._connection.poll(remaining):
            self.error = "stopped: out of time"
            self.process.kill()
            return None
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            self.process.join()
            answer = f"ended with code {self.process.exitcode}; is there enough memory?"
        if isinstance(answer, str):
            self.error = answer
            return None
        return answer


def time_case(
    case: Case, inputs: Arrays, folder: Path, rounds: int, min_seconds: float, deadline: float | None = None
) -> list[Worker]:
    """Start a worker for each implementation, compare their results, and time those that agree.

    At the deadline, a time of `time.monotonic`, all workers are killed. With one they start side by side,
    and their compile times are those of a busy machine.
    """
    np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
    workers: list[Worker] = []
    try:
        for name in case.implementations:
            workers.append(Worker(case, name, folder / "inputs.npz", min_seconds, deadline))
            if deadline is None:
                workers[-1].wait_ready()
        for worker in workers if deadline is not None else ():
            worker.wait_ready()
        reject_different(case, workers)
        for _ in range(rounds):
            for worker in workers:
                worker.measure()
    finally:
        for worker in workers:
            worker.close()
    return workers


def reject_different(case: Case, workers: list[Worker]) -> None:
    """Set the error of each worker whose losses or gradients differ from elmo_jax's."""
    bound = _SGNS_TOLERANCE if case.part == "sgns" else TOLERANCE[case.precision]
    ours = workers[0].checked
    for worker in workers[1:] if ours else ():
        if worker.error is None:
            apart = {name: relative_error(worker.checked.get(name), ours[name]) for name in ours}
            name = max(apart, key=lambda n: apart[n])
            worker.info["difference"] = apart[name]
            if not apart[name] <= bound:
                worker.error = f"its {name} differs from elmo_jax's by {apart[name]:.1e} of its norm"


def relative_error(a: np.ndarray | None, b: np.ndarray) -> float:
    """Return |a - b| / |b|, or infinity if `a` is missing or has another shape."""
    if a is None or a.shape != b.shape:
        return float("inf")
    b = b.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


def speedup(baseline: list[float], ours: list[float]) -> float:
    """Return how many times as fast elmo_jax is: the median of the ratios within a round."""
    return statistics.median(b / a for b, a in zip(baseline, ours, strict=True))


def summarize(
    case: Case, workers: list[Worker], counts: Mapping[str, Any], work: list[Phase], rates: Rates | None
) -> dict[str, Any]:
    """Return a case's figures as ``benchmark.json`` holds them, from the phases of its unit of work."""
    least = sum(phase.seconds(rates) for phase in work) if rates and work else None
    flops, moved = sum(phase.flops for phase in work), sum(phase.bytes for phase in work)
    ours, found = workers[0], {}
    for worker in workers:
        if worker.error is not None or not worker.seconds:
            found[worker.name] = {"not_timed": worker.error, **worker.info}
            continue
        median = statistics.median(worker.seconds)
        record: dict[str, Any] = {"seconds": worker.seconds, "median": median, **worker.info}
        record["spread"] = (max(worker.seconds) - min(worker.seconds)) / 2 / median
        if "tokens" in counts:
            record["tokens_per_second"] = counts["tokens"] / median
        # The recipe's baseline has the full softmax, which its roofline does not count.
        if least and not (case.part == "recipe" and worker.name != OURS):
            record["roofline_fraction"] = least / median
        if rates and flops:
            record["matmul_fraction"] = flops / rates.flops / median
        if worker is not ours and len(ours.seconds) == len(worker.seconds):
            record["speedup"] = speedup(worker.seconds, ours.seconds)
            peaks = [each.info.get("peak_bytes", 0) for each in (ours, worker)]
            record |= {"memory": peaks[0] / peaks[1]} if all(peaks) else {}  # 0 stands for unknown
        found[worker.name] = record
    totals = {"roofline_seconds": least, "flops": flops, "bytes": moved}
    return {"case": dataclasses.asdict(case), "counts": dict(counts), **totals, "implementations": found}


def run_worker(connection: Connection, case: Case, name: str, inputs: Path, min_seconds: float) -> None:
    """Build, check and warm up an implementation, then measure it for every message that arrives."""
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)  # a library's output must not break the table
    try:
        watch, *ready = _prepare(case, name, inputs, min_seconds)
        connection.send(ready)
        while True:
            connection.recv()
            connection.send(watch.measure())
    except EOFError:
        pass  # the benchmark has ended
    except Exception as error:
        connection.send(f"{type(error).__name__}: {error}".splitlines()[0][:200])


def _prepare(case: Case, name: str, inputs: Path, min_seconds: float) -> tuple["Stopwatch", dict, dict]:
    """Return a warm stopwatch, the worker's `info` and the arrays to check."""
    if name in (OURS, SCAN):
        configure_malloc()  # as the training commands do
    build = pkgutil.resolve_name(f"experiments.benchmark.{BUILDERS[name].format(part=case.part)}")
    if jax := sys.modules.get("jax"):
        jax.config.update("jax_default_matmul_precision", _JAX_PRECISION[case.precision])
    if torch := sys.modules.get("torch"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.precision == "tf32"
    compilations = record_compilations()
    # Arrays of an NPZ file are read when they are asked for, so that few are in memory at once.
    workload = build(case, np.load(inputs, allow_pickle=False))
    before = len(compilations)
    checked = workload.check()
    if case.part in ("recipe", "official"):
        del compilations[before:]  # their check runs another program than is timed
    watch = Stopwatch(workload, min_seconds, compilations)
    return watch, {"peak_bytes": _peak_memory(), "compile_seconds": sum(compilations)}, checked


class Stopwatch:
    """A timer for a `Workload`; it first warms up until nothing extends the list of compilations."""

    def __init__(self, workload: Workload, min_seconds: float, compilations: list[float]):
        self._timed = []
        for run, weight in workload.timed:
            each = 0.0
            for _ in range(_MAX_WARM_UPS):
                before, start = len(compilations), time.perf_counter()
                run(1)
                each = time.perf_counter() - start
                if len(compilations) == before:
                    break
            n = round(min_seconds / len(workload.timed) / max(each, 1e-9))
            self._timed.append((run, weight, min(1000, max(1, n))))

    def measure(self) -> float:
        """Return the seconds of a unit of work."""
        total = 0.0
        for run, weight, n in self._timed:
            start = time.perf_counter()
            run(n)
            total += weight * (time.perf_counter() - start) / n
        return total


def record_compilations() -> list[float]:
    """Return a list that JAX, if it is imported, extends with the seconds of every compilation."""
    seconds: list[float] = []
    if "jax" in sys.modules:
        events = ("/backend_compile_duration", "/jaxpr_to_mlir_module_duration")

        def listen(event: str, duration: float, **_: Any) -> None:
            if event.endswith(events):
                seconds.append(duration)

        sys.modules["jax"].monitoring.register_event_duration_secs_listener(listen)
    return seconds


def _peak_memory() -> int:
    """Return peak bytes of the GPU if the worker uses one, else of this process; 0 if unknown."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    stats = (jax.devices()[0].memory_stats() if jax is not None else None) or {}
    return int(stats.get("peak_bytes_in_use") or process_peak() or 0)
