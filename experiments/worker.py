"""One peer's side of one case of the benchmark, in a process of its own: python -m experiments.worker.

The parent says ``run`` a line at a time, so that peers take turns; each has its own memory
and threads. What stands here needs NumPy alone, so that a peer's memory is a peer's.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.cases import CUDNN, OURS, REPLAY, SCAN, Case
from experiments.memory import process_peak, tame_malloc

# JAX's products of float32; left alone, a GPU runs them in TF32.
_PRODUCTS = {"float32": "highest", "tf32": "tensorfloat32", "bfloat16": None}
RATE = 1e-3  # learning rate of every peer
B1 = 0.9  # of Adam's first moment, which every peer has so by default
Arrays = Mapping[str, np.ndarray]  # a case's, by name
_WARM_UPS = 5  # at most; a peer that still compiles after them does so in every unit
# Which function makes a peer's side.
_MAKERS = {
    OURS: ("experiments.ours", "build"),
    SCAN: ("experiments.ours", "build_scan"),
    REPLAY: ("experiments.host", "build_replay"),
    "flax": ("experiments.jax_peers", "build_flax"),
    CUDNN: ("experiments.jax_peers", "build_cudnn"),
    "torch": ("experiments.peers", "build"),
    "gensim": ("experiments.gensim_peer", "build"),
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
