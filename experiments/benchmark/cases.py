"""Benchmark cases: their shapes, their input arrays, and the least work that each one needs.

Workers of other libraries import this module, and their memory is measured, so JAX and elmo_jax
are imported inside the functions that need them. Axis letters are those of docs/concepts.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

Part = Literal["machine", "lstm", "softmax", "step", "recipe", "fit", "official", "embed", "sgns", "pretrain"]
Precision = Literal["float32", "tf32", "bfloat16"]
Arrays = Mapping[str, np.ndarray]
Inputs = tuple[dict[str, np.ndarray], dict[str, Any]]

OURS, SCAN, REPLAY, CUDNN = "elmo_jax", "scan", "replay", "cudnn"
DIRECTIONS = 2
LEARNING_RATE = 1e-3
ADAM_B1 = 0.9
STEPS_PER_CALL = 8  # default of the training commands
CHARACTERS = 50  # of a word, its begin and end symbols included
_RESERVED = 4  # ids of padding, BOS, EOS and UNK


@dataclass(frozen=True)
class Case:
    """One piece of work at one shape, done by several implementations; elmo_jax is the first one."""

    name: str
    part: Part  # selects make_PART here and build_PART in the implementations' modules
    implementations: tuple[str, ...] = (OURS, "torch")
    batch: int = 32  # B
    steps: int = 40  # T; the side of the matrix for part "machine"
    cells: int = 150  # H
    width: int = 150  # P; cells are projected where it differs from H
    layers: int = 2  # of each direction
    vocabulary: int = 30_000  # V
    negatives: int | None = None  # S; None computes the full softmax
    precision: Precision = "float32"  # of matmuls
    clip: float | None = None  # bound of cells and projections
    skip: bool = False  # layers above the first add their input
    filters: tuple[tuple[int, int], ...] = ()  # width and number; () looks words up in a table
    characters: int = 16  # width of a character vector
    sentences: int = 0  # to embed; documents of "fit"; thousands of words of "sgns"

    @property
    def tied(self) -> bool:
        """True where the softmax shares the table of token vectors."""
        return self.part in ("recipe", "fit")


_ALL = (OURS, "flax", "torch")
_FILTERS = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
_SMALL: Any = {"cells": 1024, "width": 128, "clip": 3.0, "skip": True, "filters": _FILTERS}
CASES = (
    Case("step", "step", _ALL),
    Case("lstm", "lstm", _ALL),
    Case("softmax", "softmax", _ALL),
    Case("softmax-2048", "softmax", negatives=2048),
    Case("recipe", "recipe", negatives=2048),
    Case("fit", "fit", (OURS, REPLAY), negatives=2048, sentences=4096),
    Case("small", "official", batch=128, steps=20, vocabulary=793_471, negatives=8192, **_SMALL),
    Case("embed", "embed", sentences=64, **_SMALL),
    Case("sgns", "sgns", (OURS, "gensim"), width=300, sentences=300),
)
AG_NEWS = Case("ag-news", "pretrain", (OURS,), negatives=2048)
QUICK = {"step": (OURS, "torch"), "lstm": _ALL, "softmax": (OURS, "torch"), "embed": (OURS, "torch")}
PRECISIONS: dict[Precision, str] = {"float32": "", "tf32": "-tf32", "bfloat16": "-bfloat16"}  # name suffixes


def machine_cases(cuda: bool) -> tuple[Case, ...]:
    """Return the cases that measure the machine's own rates."""
    copy = Case("copy", "machine", steps=8192)
    if not cuda:
        return Case("matmul", "machine", steps=2048), copy
    kinds = PRECISIONS.items()
    return *(Case(f"matmul{end}", "machine", steps=8192, precision=kind) for kind, end in kinds), copy


def cuda_cases(cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """Return a GPU's cases: steps and LSTMs in every precision, beside cuDNN and the scan, and B = 1024."""
    out: list[Case] = []
    for case in (*cases, Case("step-b1024", "step", batch=1024)):
        for kind, end in PRECISIONS.items() if case.part in ("step", "lstm") else ():
            scans = (SCAN,) if kind == "bfloat16" else (CUDNN, SCAN)  # cuDNN's call has no bfloat16
            names = case.implementations + (scans if case.batch < 1024 else ())
            out.append(replace(case, name=case.name + end, precision=kind, implementations=names))
        out += [case] if case.part not in ("step", "lstm") else []
    return tuple(out)


class Workload(NamedTuple):
    """An implementation of a case, ready to run.

    Attributes:
        check: runs the work and returns the arrays that all implementations must agree on.
        timed: functions that do n units of work and wait for the result, each with its weight; a unit
            takes the weighted sum of their seconds.
    """

    check: Callable[[], dict[str, np.ndarray]]
    timed: list[tuple[Callable[[int], Any], float]]


class Rates(NamedTuple):
    """Measured rates of the machine: floating-point operations of matmuls and bytes copied, per second."""

    flops: float
    bytes: float


class Phase(NamedTuple):
    """Work that does not overlap with another phase: floating-point operations and bytes moved."""

    flops: float
    bytes: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """Return the least time, bound by the slower of matmuls and copies."""
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


def find_rates(rates: Mapping[str, float], precision: Precision) -> Rates | None:
    """Return the machine's rates in a precision from those of its cases, if both were measured."""
    matmul = f"matmul{PRECISIONS[precision]}"
    return Rates(rates[matmul], rates["copy"]) if {matmul, "copy"} <= rates.keys() else None


def least_work(case: Case, counts: Mapping[str, Any]) -> list[Phase]:
    """Return the phases of a unit of work with the fewest operations and bytes; none if neither bounds it.

    Training counts each matmul three times: forward, and for the gradients of both factors. Adam reads
    a parameter, its gradient and two moments and writes three of them: 28 bytes a parameter, or 24
    where only some rows have a gradient. Adagrad keeps one moment less: 20 bytes.
    """
    n, size = float(counts.get("positions", 0)), 4.0  # bytes of a number
    weights = 2 * case.width * 4 * case.cells + case.cells * case.width * (case.cells != case.width)
    lstm = n * 2.0 * weights * case.layers * DIRECTIONS
    classes = case.vocabulary if case.negatives is None else case.negatives + 1
    softmax = n * 2.0 * case.width * classes * DIRECTIONS
    wide = sum(number for _, number in case.filters)
    word = sum(w * case.characters * number * (CHARACTERS - w + 1) for w, number in case.filters)
    words = counts.get("types", 0) * 2.0 * (word + 2 * wide * wide + wide * case.width)
    if case.part == "machine":
        is_copy = case.name == "copy"
        return [Phase(0.0, 2 * size * case.steps**2) if is_copy else Phase(2.0 * case.steps**3)]
    if case.part in ("lstm", "softmax"):
        return [Phase(3 * (lstm if case.part == "lstm" else softmax))]
    if case.part == "embed":
        return [Phase(words), Phase(lstm)]
    if case.part in ("sgns", "pretrain"):
        return []
    moved = 5 if case.part == "official" else 7 if case.negatives is None else 6
    updated = counts["parameters"]
    if "rows" in counts:  # of the softmax, its bias included, that a step updates
        updated -= (case.vocabulary - counts["rows"]) * (case.width + 1)
    update = Phase(0.0, counts["steps"] * moved * size * updated)
    return [Phase(3 * (lstm + words)), Phase(3 * softmax), update]


def make_inputs(case: Case, seed: int) -> Inputs:
    """Return the arrays that every implementation of a case reads, and counts of a unit of work.

    The counts are ``tokens`` of the text, each counted once although both directions predict it, and
    those that `least_work` reads: predicted ``positions`` of a direction, optimizer ``steps``, distinct
    words (``types``) of the character CNN, ``parameters``, and softmax ``rows`` that a step updates.
    """
    rng = np.random.default_rng(seed)
    weights = {} if case.part in ("machine", "softmax", "sgns") else make_weights(case, rng)
    arrays, counts = globals()[f"make_{case.part}"](case, rng)
    return weights | arrays, counts | {"parameters": sum(w.size for w in weights.values())}


def make_weights(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Make the model's float32 parameters, of a size that keeps states and logits moderate."""
    from experiments.benchmark.workloads import weight_shapes

    out = {}
    for name, shape in weight_shapes(case).items():
        is_kernel = name.endswith("_kernel") or (len(shape) == 3 and name.startswith("embedder/"))
        scale = shape[-2] ** -0.5 if is_kernel else 0.1
        out[name] = np.float32(scale) * rng.standard_normal(shape, np.float32)
    return out


def is_weight(name: str) -> bool:
    """Return True if the input of that name is a parameter of the model."""
    return name.startswith(("embedder/", "lstm_", "softmax_"))


def sample_words(vocabulary: int, rng: np.random.Generator, shape: Any) -> np.ndarray:
    """Sample int32 word ids as frequent as in a text: log-uniform over the vocabulary."""
    return (_RESERVED - 1 + np.exp(rng.random(shape) * np.log(vocabulary - _RESERVED))).astype(np.int32)


def sample_negatives(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Sample negatives as elmo_jax does, and return them with the log of all expected counts."""
    import jax

    from elmo_jax.ops.softmax import log_uniform_negatives

    sampled = log_uniform_negatives(jax.random.key(0), case.vocabulary, case.negatives or 1)
    return np.array(sampled[0]), np.array(sampled[1])


def sample_strings(rng: np.random.Generator, count: int) -> list[str]:
    """Sample words of 2 to 12 letters; the first ones are short, as frequent words are."""
    lengths = np.minimum(12, 2 + np.log2(1 + np.arange(count)) / 2 + rng.integers(0, 4, count)).astype(int)
    return ["".join(map(chr, rng.integers(ord("a"), ord("z") + 1, n))) for n in lengths]


def make_machine(case: Case, rng: np.random.Generator) -> Inputs:
    """Make a square matrix."""
    return {"x": rng.standard_normal((case.steps, case.steps), np.float32)}, {}


def make_lstm(case: Case, rng: np.random.Generator) -> Inputs:
    """Make inputs and output gradients of both directions."""
    shape = (case.steps, DIRECTIONS, case.batch, case.width)
    positions = case.steps * case.batch
    data = {name: rng.standard_normal(shape, np.float32) for name in ("x", "cotangent")}
    return data, {"tokens": positions, "positions": positions}


def make_softmax(case: Case, rng: np.random.Generator) -> Inputs:
    """Make hidden states and targets of both directions, a table, and negatives where they are sampled."""
    positions = case.batch * case.steps
    n, v = DIRECTIONS * positions, case.vocabulary
    data = {
        "hidden": rng.standard_normal((n, case.width), np.float32),
        "table": np.float32(case.width**-0.5) * rng.standard_normal((v, case.width), np.float32),
        "bias": np.float32(0.1) * rng.standard_normal(v, np.float32),
        "targets": sample_words(v, rng, n),
    }
    if case.negatives is not None:  # given to all: another program may round to a neighbouring class
        data["negatives"], data["log_expected"] = sample_negatives(case)
    return data, {"tokens": positions, "positions": positions}


def make_step(case: Case, rng: np.random.Generator) -> Inputs:
    """Make a full batch."""
    words = sample_words(case.vocabulary, rng, (case.batch, case.steps + 1))
    words[:, 0], words[:, -1] = 1, 2  # BOS and EOS
    counts = {"tokens": case.batch * (case.steps - 1), "positions": case.batch * case.steps, "steps": 1}
    return {"words": words, "lengths": np.full(case.batch, case.steps + 1, np.int32)}, counts


def make_fit(case: Case, rng: np.random.Generator, documents: int = 0) -> Inputs:
    """Make documents with the lengths of AG News's: log-normal with a median of 44 tokens."""
    lengths = np.exp(np.log(44) + 0.39 * rng.standard_normal(documents or case.sentences))
    offsets = np.concatenate([[0], np.cumsum(np.clip(lengths, 4, 309).astype(np.int64))])
    data = {"ids": sample_words(case.vocabulary, rng, offsets[-1]), "offsets": offsets}
    stream = stream_documents(case, data)
    tokens = stream.tokens_per_epoch
    return data, {"tokens": tokens, "positions": tokens + len(lengths), "steps": stream.steps_per_epoch}


def stream_documents(case: Case, arrays: Arrays) -> Any:
    """Return a `BatchStream` of the documents among the arrays."""
    from elmo_jax.data.batching import BatchStream, Documents

    labels = np.zeros(len(arrays["offsets"]) - 1, np.int32)
    documents = Documents(arrays["ids"], arrays["offsets"], labels)
    return BatchStream(documents, case.batch, seed=0, steps_per_call=STEPS_PER_CALL)


def make_recipe(case: Case, rng: np.random.Generator) -> Inputs:
    """Make one call's batches of each bucket of an epoch as long as AG News's, and the bucket's steps."""
    documents, counts = make_fit(case, rng, documents=78_000)
    stream = stream_documents(case, documents)
    steps = dict.fromkeys(stream.bounds, 0)
    data: dict[str, np.ndarray] = {}
    for chunk in stream.chunks(0, stream.steps_per_epoch):
        bound = chunk.batches.words.shape[2]
        steps[bound] += chunk.count
        data |= {f"words:{bound}": chunk.batches.words, f"lengths:{bound}": chunk.batches.lengths}
    return data | {"bounds": np.array(list(steps)), "steps": np.array(list(steps.values()))}, counts


def make_official(case: Case, rng: np.random.Generator) -> Inputs:
    """Make a window of running text; words beyond 5,000 share character ids, which costs the same."""
    from elmo_jax.data.characters import character_id_table

    text = sample_words(case.vocabulary, rng, (case.steps + 1, case.batch))
    words = np.stack([text, text[::-1]], axis=1)  # [T + 1, D, B]
    table = character_id_table(["<pad>", "<S>", "</S>", "<UNK>", *sample_strings(rng, 5000)])
    types = words[:-1] % len(table)
    data = {"words": words, "weight": np.ones(types.shape, np.float32), "types": types, "chars": table[types]}
    counts = {"tokens": text[1:].size, "positions": text[1:].size, "steps": 1, "types": len(np.unique(types))}
    return data, counts | {"rows": len(np.union1d(words, sample_negatives(case)[0]))}


def make_embed(case: Case, rng: np.random.Generator) -> Inputs:
    """Make sentences of 3 to 90 words: log-normal with a median of 22."""
    lengths = np.clip(np.exp(np.log(22) + 0.5 * rng.standard_normal(case.sentences)), 3, 90).astype(int)
    words, tokens = sample_strings(rng, 8000), int(lengths.sum())
    text = np.array(words)[sample_words(len(words), rng, tokens) - _RESERVED]
    counts = {"tokens": tokens, "positions": tokens + 2 * case.sentences, "types": len(np.unique(text)) + 2}
    return {"text": text, "lengths": lengths}, counts


def split_sentences(arrays: Arrays) -> list[list[str]]:
    """Return the text of an "embed" case as sentences of tokens."""
    return [part.tolist() for part in np.split(arrays["text"], np.cumsum(arrays["lengths"])[:-1])]


def make_sgns(case: Case, rng: np.random.Generator) -> Inputs:
    """Make a text."""
    ids = sample_words(case.vocabulary, rng, case.sentences * 1000)
    return {"ids": ids}, {"tokens": len(ids)}


def skip_gram_loss(ids: np.ndarray, centre: np.ndarray, context: np.ndarray) -> np.ndarray:
    """Return the loss of 4,000 pairs of neighbouring words against five fixed negatives each."""
    rng = np.random.default_rng(0)
    at = rng.integers(0, len(ids) - 1, 4000)
    u = centre[ids[at]]  # [N, F]
    noise = context[ids[rng.integers(0, len(ids), (len(at), 5))]]  # [N, S, F]
    true = np.logaddexp(0, -(u * context[ids[at + 1]]).sum(-1))
    return np.array((true + np.logaddexp(0, np.einsum("nf,nsf->ns", u, noise)).sum(-1)).mean())
