"""Peers of a case by turns, each in a process of its own, and what their times say.

Nouns: a *lane* is a peer's process; a *round* is one measurement of every lane, one after
the other, so that a noisy minute falls on all of them.

One peer's side of one case of the benchmark, in a process of its own: python -m experiments.benchmark.runner.

The parent says ``run`` a line at a time, so that peers take turns; each has its own memory
and threads. What stands here needs NumPy alone, so that a peer's memory is a peer's.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmark.cases import CUDNN, OURS, REPLAY, SCAN, Case, Phase, Rates, floor_seconds
from experiments.common.memory import process_peak, tame_malloc

TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 5e-2}  # of losses and gradients, relative
_LOOSE = {"sgns": 0.1}  # negatives are drawn apart, and gensim's threads race
_NEEDS = {"torch": "torch", "gensim": "gensim"}
_ROOT = Path(__file__).parents[2]


class Lane:
    """A peer's process.

    Args:
        case: the work.
        peer: who does it.
        folder: of the case's inputs.
        least: seconds of a measurement.
        deadline: of `time.monotonic`; if it still runs then, it is stopped.
    """

    def __init__(self, case: Case, peer: str, folder: Path, least: float, deadline: float | None):
        self.peer, self.seconds, self.about = peer, [], {}
        self.why: str | None = None  # it is not timed
        self._log = folder / f"{peer}.log"
        package = _NEEDS.get(peer)
        if package and importlib.util.find_spec(package) is None:
            self._process = None
            self.why = f"{package} is not installed (pip install 'elmo_jax[benchmark]')"
            return
        # On a GPU peers share its memory, so none may take all of it.
        env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}
        env["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [env.get("PYTHONPATH")])])
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "experiments.benchmark.runner", str(folder), peer, str(least)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=env,
            )
        left = threading.TIMEOUT_MAX if deadline is None else max(0.0, deadline - time.monotonic())
        self._timer = threading.Timer(left, self._stop)
        self._timer.daemon = True
        self._timer.start()

    def ready(self) -> None:
        """Wait until it has compiled, checked and warmed up."""
        if self._process is not None:
            self.about = self._answer()

    def _stop(self) -> None:
        assert self._process
        self.why = "stopped, the time was over"
        self._process.kill()

    def measure(self) -> None:
        """One measurement, if it can still be had."""
        if self._process is None or self.why is not None:
            return
        assert self._process.stdin
        try:
            self._process.stdin.write("run\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its last words tell why
        answer = self._answer()
        if answer:
            self.seconds.append(answer["seconds"])

    def _answer(self) -> dict[str, Any]:
        assert self._process and self._process.stdout
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        if self.why is not None:
            return {}
        said = self._log.read_text(errors="replace").strip().splitlines()
        last = next((line for line in reversed(said) if line.strip() and not line.startswith(" ")), "")
        self.why = f"ended with code {code}" + (f": {last.strip()[:200]}" if last else " (out of memory?)")
        return {}

    def close(self) -> None:
        """End the process."""
        if self._process is None:
            return
        self._timer.cancel()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what a dead one was not told can no longer be
                if pipe:
                    pipe.close()
        self._process.terminate()
        self._process.wait()


def race(
    case: Case,
    inputs: Mapping[str, np.ndarray],
    folder: Path,
    rounds: int,
    least: float,
    tick: Callable[[], None],
    deadline: float | None = None,
) -> list[Lane]:
    """Start every peer, compare what they compute, and time those that agree.

    Args:
        case: the work.
        inputs: its arrays.
        folder: an empty one, for the case alone.
        rounds: measurements of each peer.
        least: seconds of each.
        tick: called after each piece of work: a peer's start, or a round.
        deadline: of `time.monotonic`, after which nothing runs. To save time, peers then
            start side by side, so that compile times are those of a busy machine.

    Returns:
        A lane a peer: its ``seconds`` a unit by round, or `why` it has none.
    """
    (folder / "case.json").write_text(json.dumps(dataclasses.asdict(case)))
    np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]
    lanes: list[Lane] = []
    try:
        for peer in case.peers:
            lanes.append(Lane(case, peer, folder, least, deadline))
            if deadline is None:
                lanes[-1].ready()
        for lane in lanes:
            if deadline is not None:
                lane.ready()
            tick()
        _compare(case, lanes, folder)
        for _ in range(rounds):
            for lane in lanes:
                lane.measure()
            tick()
    finally:
        for lane in lanes:
            lane.close()
    return lanes


def _compare(case: Case, lanes: list[Lane], folder: Path) -> None:
    """Refuse to time a peer whose losses or gradients are not the first one's."""
    bound = _LOOSE.get(case.part, TOLERANCE[case.precision])
    standing = [lane for lane in lanes if lane.why is None]
    if not standing or standing[0].peer != OURS:
        return
    with np.load(folder / f"{OURS}.npz", allow_pickle=False) as file:
        ours = dict(file)
    for lane in standing[1:]:
        with np.load(folder / f"{lane.peer}.npz", allow_pickle=False) as file:
            apart = {name: difference(file[name], ours[name]) for name in ours if name in file}
        missing = [name for name in ours if name not in apart]
        name = max(apart, key=lambda n: apart[n], default="nothing")
        lane.about["difference"] = apart.get(name, float("inf"))
        if missing or not lane.about["difference"] <= bound:
            lane.why = f"its {name} is not this library's (apart by {lane.about['difference']:.1e} of it)"


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The distance of two arrays over the length of the second."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


def ratio(others: list[float], ours: list[float]) -> float:
    """How many times as long another takes: the median over rounds, so that drift falls on both."""
    return statistics.median(other / our for other, our in zip(others, ours, strict=True))


def results_of(
    case: Case, lanes: list[Lane], counts: Mapping[str, Any], work: list[Phase], rates: Rates | None
) -> dict[str, Any]:
    """A case's figures, as ``benchmark.json`` holds them.

    Args:
        case: the work.
        lanes: as `race` returned them.
        counts: of a unit.
        work: the unit's phases.
        rates: of the machine, if they were measured.

    Returns:
        The case, its floor and, by peer, seconds of each round, their median and spread
        (half the range over the median), ``tokens_per_second``, ``times`` (how many times
        as fast this library is), ``of_products`` (its useful products beside the rate of the
        machine's) and more, or ``not_timed``.
    """
    least = floor_seconds(work, rates) if rates and work else None
    flops, moved = sum(phase.flops for phase in work), sum(phase.bytes for phase in work)
    out: dict[str, Any] = {"case": dataclasses.asdict(case), "counts": dict(counts)}
    out |= {"floor_seconds": least, "flops": flops, "bytes": moved, "peers": {}}
    ours = lanes[0].seconds
    for lane in lanes:
        if lane.why is not None or not lane.seconds:
            out["peers"][lane.peer] = {"not_timed": lane.why, **lane.about}
            continue
        middle = statistics.median(lane.seconds)
        record: dict[str, Any] = {"seconds": lane.seconds, "median": middle, **lane.about}
        record["spread"] = (max(lane.seconds) - min(lane.seconds)) / 2 / middle
        if "tokens" in counts:
            record["tokens_per_second"] = counts["tokens"] / middle
        if case.part == "embed":
            record["sentences_per_second"] = case.sentences / middle
        # With the full softmax the recipe's peer has more to do than the floor counts.
        if least and not (case.part == "recipe" and lane.peer != OURS):
            record["of_floor"] = least / middle
        if rates and flops:
            record["of_products"] = flops / rates.flops / middle
        if lane.peer != OURS and len(ours) == len(lane.seconds):
            record["times"] = ratio(lane.seconds, ours)
        out["peers"][lane.peer] = record
    return out


# JAX's products of float32; left alone, a GPU runs them in TF32.
_PRODUCTS = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": None}
RATE = 1e-3  # learning rate of every peer
B1 = 0.9  # of Adam's first moment, which every peer has so by default
Arrays = Mapping[str, np.ndarray]  # a case's, by name
_WARM_UPS = 5  # at most; a peer that still compiles after them does so in every unit
# Which function makes a peer's side.
_MAKERS = {
    OURS: ("experiments.benchmark.workloads", "build"),
    SCAN: ("experiments.benchmark.workloads", "build_scan"),
    REPLAY: ("experiments.benchmark.workloads", "build_replay"),
    "flax": ("experiments.benchmark.flax_baseline", "build_flax"),
    CUDNN: ("experiments.benchmark.flax_baseline", "build_cudnn"),
    "torch": ("experiments.benchmark.torch_baseline", "build"),
    "gensim": ("experiments.benchmark.gensim_baseline", "build"),
}


class Built(NamedTuple):
    """A peer's side of a case.

    Attributes:
        check: runs the work on the given weights, and returns what all peers must agree on.
        runs: functions that do n units of work and wait for the result, and how often each
            counts; the unit's seconds are their weighted sum.
    """

    check: Callable[[], dict[str, np.ndarray]]
    runs: list[tuple[Callable[[int], Any], float]]


def is_weight(name: str) -> bool:
    """Whether an input of that name is a parameter of the model."""
    return ("/" in name and ":" not in name) or name in ("softmax_table", "softmax_bias")


def sentences_of(arrays: Arrays) -> list[list[str]]:
    """The text of a case as sentences of tokens."""
    ends = np.cumsum(arrays["lengths"])
    return [part.tolist() for part in np.split(arrays["text"], ends[:-1])]


def pair_loss(ids: np.ndarray, centre: np.ndarray, context: np.ndarray) -> np.ndarray:
    """The skip-gram loss of neighbouring words against five fixed negatives: how far training got."""
    rng = np.random.default_rng(0)
    at = rng.integers(0, len(ids) - 1, 4000)
    u = centre[ids[at]]  # [N, F]
    noise = context[ids[rng.integers(0, len(ids), (len(at), 5))]]  # [N, 5, F]
    true = np.logaddexp(0, -(u * context[ids[at + 1]]).sum(-1))
    return np.array((true + np.logaddexp(0, np.einsum("nf,nsf->ns", u, noise)).sum(-1)).mean())


class Stopwatch:
    """Times a `Built`, each measurement at least a given time long.

    Args:
        built: what to time, once checked.
        least: seconds.
        spent: grows when something is compiled, which is not to be timed.
    """

    def __init__(self, built: Built, least: float, spent: list[float]):
        self.built, self.counts = built, []
        for run, _ in built.runs:
            each = -1.0
            for _ in range(_WARM_UPS):
                before, began = len(spent), time.perf_counter()
                run(1)
                each = time.perf_counter() - began
                if len(spent) == before:
                    break
            self.counts.append(min(1000, max(1, round(least / len(built.runs) / max(each, 1e-9)))))

    def measure(self) -> float:
        """Seconds a unit."""
        total = 0.0
        for (run, weight), n in zip(self.built.runs, self.counts, strict=True):
            began = time.perf_counter()
            run(n)
            total += weight * (time.perf_counter() - began) / n
        return total


def _count_compilation() -> list[float]:
    """The seconds of every compilation of JAX from now on; none if JAX was not imported."""
    spent: list[float] = []
    if "jax" in sys.modules:
        events = ("/backend_compile_duration", "/jaxpr_to_mlir_module_duration")

        def listen(event: str, seconds: float, **_: Any) -> None:
            if event.endswith(events):
                spent.append(seconds)

        sys.modules["jax"].monitoring.register_event_duration_secs_listener(listen)
    return spent


def _peak_memory() -> int:
    """Bytes at the peak: of the GPU if the peer uses one, else of this process; 0 if not known."""
    torch, jax = sys.modules.get("torch"), sys.modules.get("jax")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    stats = (jax.devices()[0].memory_stats() if jax is not None else None) or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    return process_peak() or 0


def main(folder: Path, peer: str, least: float) -> None:
    """Build, check, warm up, say so, and measure for every line that comes in."""
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not look like an answer
    settings = json.loads((folder / "case.json").read_text())
    settings |= {"peers": tuple(settings["peers"]), "filters": tuple(map(tuple, settings["filters"]))}
    case = Case(**settings)
    if peer in (OURS, SCAN):
        tame_malloc()  # as this library's commands do
    module, name = _MAKERS[peer]
    make = getattr(importlib.import_module(module), name)
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_default_matmul_precision", _PRODUCTS[case.precision])
    spent = _count_compilation()
    # Each array is read when a peer asks for it, and no sooner.
    built = make(case, np.load(folder / "inputs.npz", allow_pickle=False))
    known = len(spent)
    checked = built.check()
    if case.part in ("recipe", "official"):
        del spent[known:]  # what is checked there is not what is timed
    watch = Stopwatch(built, least, spent)
    memory = _peak_memory()
    np.savez(folder / f"{peer}.npz", **checked)  # type: ignore[arg-type]
    answer: dict[str, Any] = {"peak_bytes": memory, "compile_seconds": sum(spent)}
    said.write(json.dumps(answer) + "\n")
    for _ in sys.stdin:
        said.write(json.dumps({"seconds": watch.measure()}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]))
