"""What the benchmark measures, and how fast it could be at best; plain numbers, so that any worker reads it.

Nouns: a *case* is one piece of work at one shape, done by several *peers*; its *unit* is what
is timed; its *floor* is the time that the machine's measured rates leave for the unit's
products and copies, phase after phase.
Axes: B batch, T time, H cells, P width of states and token vectors, V vocabulary, S negatives.

What the benchmark's figures are to reach, and whether they do.

Nouns: a *goal* bounds a *figure*, a ratio or a time, of one case.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

Part = Literal[
    "product", "copy", "lstm", "softmax", "step", "recipe", "fit", "official", "embed", "sgns",
    "pretrain",
]  # fmt: skip
Precision = Literal["float32", "tf32", "bfloat16"]
TIED = ("recipe", "fit")  # parts whose softmax has the token vectors' table
DIRECTIONS = 2
FLOAT = 4  # bytes
_LETTERS = 50  # of a word, with what marks its ends
OURS = "elmo_jax"
CUDNN, SCAN, REPLAY = (
    "cudnn",
    "scan",
    "replay",
)  # jax.experimental.rnn; ours without it; fit's dispatches bare
AG_NEWS = "ag-news"


@dataclass(frozen=True)
class Case:
    """One piece of work.

    Attributes:
        name: as ``--only`` takes it.
        part: what kind of work.
        peers: who does it, this library first.
        batch, steps: B and T; of a product and a copy, `steps` is the side of the matrix.
        cells, width: H and P; the LSTM is projected where they differ.
        layers: a direction.
        vocabulary: V.
        negatives: S; None is the full softmax.
        precision: of the products.
        clip: bound of cells and projections.
        skip: whether layers above the first add their input.
        filters: width and number of the char-CNN's filters; none reads words.
        characters: width of a character's vector.
        sentences: of a text to embed, documents of `fit`, or a text's thousands of words for SGNS.
    """

    name: str
    part: Part
    peers: tuple[str, ...] = (OURS, "torch")
    batch: int = 32
    steps: int = 40
    cells: int = 150
    width: int = 150
    layers: int = 2
    vocabulary: int = 30_000
    negatives: int | None = None
    precision: Precision = "float32"
    clip: float | None = None
    skip: bool = False
    filters: tuple[tuple[int, int], ...] = ()
    characters: int = 16
    sentences: int = 0


class Phase(NamedTuple):
    """Work that nothing else of the unit overlaps with."""

    flops: float
    bytes: float = 0.0


class Rates(NamedTuple):
    """What the machine was measured to do in a second: operations of products, and bytes copied."""

    flops: float
    bytes: float


def lstm_flops(case: Case) -> float:
    """Of a token's way through all layers in both directions, forward: 2 a weight."""
    projection = case.cells * case.width if case.cells != case.width else 0
    weights = 2 * case.width * 4 * case.cells + projection
    return 2.0 * weights * case.layers * DIRECTIONS


def softmax_flops(case: Case) -> float:
    """Of a token's logits in both directions, forward; sampled ones are S and the target's."""
    classes = case.vocabulary if case.negatives is None else case.negatives + 1
    return 2.0 * case.width * classes * DIRECTIONS


def spelling_flops(case: Case) -> float:
    """Of a word's way through the char-CNN, forward."""
    if not case.filters:
        return 0.0
    wide = sum(number for _, number in case.filters)
    filters = sum(w * case.characters * number * (_LETTERS - w + 1) for w, number in case.filters)
    return 2.0 * (filters + 2 * wide * wide + wide * case.width)


def parameters(case: Case) -> int:
    """Numbers that a training step updates, the two tables apart."""
    projection = case.cells * case.width if case.cells != case.width else 0
    lstm = 4 * case.cells * (2 * case.width + 1) + projection
    tables = case.vocabulary * (2 * case.width + 1)  # token vectors and softmax
    if case.part in TIED:
        tables -= case.vocabulary * case.width  # one table for both
    if case.filters:
        wide = sum(number for _, number in case.filters)
        with_characters = sum(w * case.characters * number + number for w, number in case.filters)
        with_characters += 261 * case.characters + 2 * (wide + 1) * wide + (wide + 1) * case.width
        tables += with_characters - case.vocabulary * case.width
    return DIRECTIONS * case.layers * lstm + tables


def phases(case: Case, counts: dict[str, Any]) -> list[Phase]:
    """The unit's work, as few products and bytes as can be.

    Args:
        case: the work.
        counts: of the unit's data: ``positions`` predicted a direction, optimiser ``steps``,
            distinct ``types`` of words with_characters, and of the softmax ``rows`` a step names if no
            others need be moved.

    Returns:
        Phases that follow each other. Training counts a product three times, forward and
        for two gradients. Adam reads parameter, gradient and two moments and writes three of
        them, 28 bytes a parameter, or 24 if only some rows have a gradient; Adagrad one moment
        less, 20 of those rows.
    """
    n = float(counts.get("positions", 0))
    if case.part == "product":
        return [Phase(2.0 * case.steps**3)]
    if case.part == "copy":
        return [Phase(0.0, 2.0 * FLOAT * case.steps**2)]
    if case.part == "lstm":
        return [Phase(3 * n * lstm_flops(case))]
    if case.part == "softmax":
        return [Phase(3 * n * softmax_flops(case))]
    if case.part == "embed":
        return [Phase(counts["types"] * spelling_flops(case)), Phase(n * lstm_flops(case))]
    if case.part in ("sgns", "pretrain"):
        return []  # the latency of rows here and there, or of much beside products, of which no rate tells
    moved = 5.0 if case.part == "official" else 7.0 if case.negatives is None else 6.0
    left = case.vocabulary - counts.get("rows", case.vocabulary)
    update = counts.get("steps", 1) * moved * FLOAT * (parameters(case) - left * (case.width + 1))
    with_characters = counts.get("types", 0) * spelling_flops(case)
    return [
        Phase(3 * (n * lstm_flops(case) + with_characters)),
        Phase(3 * n * softmax_flops(case)),
        Phase(0.0, update),
    ]


def floor_seconds(work: list[Phase], rates: Rates) -> float:
    """The least time for phases that follow each other, each bound by products or by bytes."""
    return sum(max(phase.flops / rates.flops, phase.bytes / rates.bytes) for phase in work)


_RELEASED = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
_PLAIN = (OURS, "flax", "torch")
_SMALL: Any = {"cells": 1024, "width": 128, "clip": 3.0, "skip": True, "filters": _RELEASED}

# How a case's name ends, by precision.
PRECISIONS: tuple[tuple[str, Precision], ...] = (
    ("", "float32"),
    ("-tf32", "tf32"),
    ("-bfloat16", "bfloat16"),
)

MACHINE = (Case("product", "product", steps=2048), Case("copy", "copy", steps=8192))

CASES = (
    Case("step", "step", _PLAIN),
    Case("lstm", "lstm", _PLAIN),
    Case("softmax", "softmax", _PLAIN),
    Case("softmax-2048", "softmax", negatives=2048),
    Case("recipe", "recipe", negatives=2048),
    Case("fit", "fit", (OURS, REPLAY), negatives=2048, sentences=4096),
    Case("small", "official", batch=128, steps=20, vocabulary=793_471, negatives=8192, **_SMALL),
    Case("embed", "embed", sentences=64, **_SMALL),
    Case("sgns", "sgns", (OURS, "gensim"), width=300, sentences=300),
)

# With the peers that time allows.
QUICK = {"step": (OURS, "torch"), "lstm": _PLAIN, "softmax": (OURS, "torch"), "embed": (OURS, "torch")}

CUDA_MACHINE = (
    *(Case(f"product{end}", "product", steps=8192, precision=kind) for end, kind in PRECISIONS),
    MACHINE[1],
)


def cuda_cases(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The same on a GPU: training at B 1024, in TF32 and bf16, and beside cuDNN and the scan alone.

    `jax.experimental.rnn` has no bf16.
    """
    large = Case("step-b1024", "step", (OURS, "torch"), batch=1024)
    more: list[Case] = []
    for case in (*cases, large):
        if case.part not in ("step", "lstm"):
            more.append(case)
            continue
        for end, precision in PRECISIONS:
            beside = (SCAN,) if precision == "bfloat16" else (CUDNN, SCAN)
            beside = () if case is large else beside
            more.append(
                replace(case, name=f"{case.name}{end}", precision=precision, peers=(*case.peers, *beside))
            )
    return tuple(more)


def needed(machine: tuple[Case, ...], cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Those of the machine's rates that the cases are to be measured against."""
    kinds = {case.precision for case in cases}
    return tuple(case for case in machine if case.part == "copy" or case.precision in kinds)


def rates_of(rates: Mapping[str, float], precision: Precision) -> Rates | None:
    """The machine's rates in a precision, from those of its cases by name, if they were measured."""
    product = next(f"product{end}" for end, kind in PRECISIONS if kind == precision)
    return Rates(rates[product], rates["copy"]) if {product, "copy"} <= rates.keys() else None


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
