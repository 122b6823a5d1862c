"""What the benchmark's figures are to reach, and whether they do.

Nouns: a *goal* bounds a *figure*, a ratio or a time, of one case.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from experiments.cases import AG_NEWS, OURS, PRECISIONS, REPLAY


class Goal(NamedTuple):
    """What a ratio is to reach.

    Attributes:
        case: the work in which this library is measured.
        peer: whom it is compared with, None for the floor.
        figure: "speed", or "products" (the share of the machine's product rate that useful products
            reach), at least; "memory", "host" (the share of `fit`'s time outside compiled code) or
            "seconds", at most.
        bound: of the ratio.
    """

    case: str
    peer: str | None
    bound: float
    figure: Literal["speed", "products", "memory", "host", "seconds"] = "speed"


GOALS = (
    Goal("step", "torch", 2.2),
    Goal("lstm", "torch", 0.9),
    Goal("lstm", "flax", 1.5),
    Goal("softmax", None, 0.5),
    Goal("recipe", "torch", 8.0),
    Goal("step", "torch", 0.5, "memory"),
    Goal("embed", "torch", 3.0),
    Goal("fit", REPLAY, 0.02, "host"),
)

CUDA_GOALS = (
    *(Goal(f"step{end}", "torch", 2.0) for end, _ in PRECISIONS),
    Goal("step-b1024-bfloat16", None, 0.4, "products"),
    Goal("fit", REPLAY, 0.02, "host"),
    Goal(AG_NEWS, None, 60.0, "seconds"),
)


def judge(goal: Goal, cases: Mapping[str, Any]) -> dict[str, Any] | None:
    """What became of a goal, or None where it was not measured."""
    peers = cases.get(goal.case, {}).get("peers", {})
    both = peers.get(OURS, {}), peers.get(goal.peer, {})
    value = _figure(goal, *both)
    if value is None:
        return None
    low = goal.figure in ("memory", "host", "seconds")
    met = value <= goal.bound if low else value >= goal.bound
    said = {
        "speed": f"{value:.0%} of the floor" if goal.peer is None else f"{value:.2f}x as fast as {goal.peer}",
        "products": f"{value:.0%} of the machine's product rate",
        "memory": f"peak memory {value:.2f}x {goal.peer}'s",
        "host": f"{max(0.0, value):.1%} of fit's time outside compiled code",
        "seconds": f"trained in {value:.0f} s",
    }[goal.figure]
    ratio = goal.figure == "memory" or (goal.figure == "speed" and goal.peer is not None)
    bound = (
        f"{goal.bound:g}x"
        if ratio
        else f"{goal.bound:g} s"
        if goal.figure == "seconds"
        else f"{goal.bound:.0%}"
    )
    least = "at most" if low else "at least"
    line = f"{goal.case}: {said}, goal {least} {bound}: {'met' if met else 'missed'}"
    if _within_noise(goal, value, *both):
        line += " (within the noise)"
    return {**goal._asdict(), "value": value, "met": met, "line": line}


def _figure(goal: Goal, ours: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """The number that a goal bounds, of what was measured of this library and the peer."""
    if goal.figure == "memory":
        peaks = [record.get("peak_bytes", 0) for record in (ours, other) if "median" in record]
        return peaks[0] / peaks[1] if len(peaks) == 2 and all(peaks) else None  # 0 is not known
    if goal.figure == "host":
        return 1 - other["times"] if "times" in other else None
    if goal.peer is not None:
        return other.get("times")
    return ours.get({"products": "of_products", "seconds": "median"}.get(goal.figure, "of_floor"))


def _within_noise(goal: Goal, value: float, ours: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the bound lies no further from a ratio of times than the two were apart from themselves."""
    if goal.figure in ("memory", "seconds"):
        return False
    times = 1 - value if goal.figure == "host" else value
    return abs(value - goal.bound) <= times * (ours.get("spread", 0.0) + other.get("spread", 0.0))
