"""Peers of a case by turns, each in a process of its own, and what their times say.

Nouns: a *lane* is a peer's process; a *round* is one measurement of every lane, one after
the other, so that a noisy minute falls on all of them.
"""

import contextlib
import dataclasses
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
from typing import Any

import numpy as np

from experiments.cases import OURS, Case, Phase, Rates, floor_seconds

TOLERANCE = {"float32": 1e-3, "tf32": 2e-2, "bfloat16": 5e-2}  # of losses and gradients, relative
_LOOSE = {"sgns": 0.1}  # negatives are drawn apart, and gensim's threads race
_NEEDS = {"torch": "torch", "gensim": "gensim"}
_ROOT = Path(__file__).parent.parent


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
                [sys.executable, "-m", "experiments.worker", str(folder), peer, str(least)],
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
        if "tokens" in counts and case.part != "optimiser":
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
