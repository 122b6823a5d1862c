"""The weights and data of a benchmark's case, drawn once, for all its peers alike.

Nouns: a *weight* goes by its place in this library's parameters, ``lstm_0/input_kernel``.
Axes: B batch, T time, D direction, K steps a dispatch, U steps a window, V vocabulary, N rows.
"""

from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from elmo_jax.data.batching import DIRECTIONS, BatchStream, ContiguousStream, Documents
from elmo_jax.data.characters import character_id_table
from elmo_jax.data.text import SPECIAL
from elmo_jax.models.bilm import BiLM, BiLMConfig
from elmo_jax.models.embedders import CharCNNConfig
from elmo_jax.models.lstm import Kernel
from elmo_jax.ops.softmax import log_uniform_negatives
from elmo_jax.training.objectives import init_params
from experiments.benchmark.cases import TIED, Case
from experiments.benchmark.runner import Arrays, is_weight

_Drawn = tuple[dict[str, np.ndarray], dict[str, Any]]
_FIRST = len(SPECIAL)  # word id
_DOCUMENTS = 78_000  # of the recipe, as many and as long as AG News's
_K = 8  # steps a dispatch by default


def model_of(case: Case, dropout: float = 0.0, kernel: Kernel = "auto") -> BiLM:
    """The language model of a case, the softmax left out where none is needed."""
    config = BiLMConfig(
        input="characters" if case.filters else "words",
        characters=CharCNNConfig(case.filters, case.characters, highway=1)
        if case.filters
        else CharCNNConfig(),
        embedding=case.width,
        cells=case.cells,
        layers=case.layers,
        skip=case.skip,
        cell_clip=case.clip,
        projection_clip=case.clip,
        dropout=dropout,
        tie=case.part in TIED,
        dtype="bfloat16" if case.precision == "bfloat16" else "float32",
    )
    return BiLM(config, 0 if case.part == "embed" else case.vocabulary, kernel)


def make_inputs(case: Case, seed: int) -> _Drawn:
    """What every peer of a case is given.

    Args:
        case: the work.
        seed: of everything drawn.

    Returns:
        The arrays by name, and counts of a unit: ``tokens`` (words of the text, each counted
        once though both directions predict it), and what `phases` needs.
    """
    rng = np.random.default_rng(seed)
    make = {
        "product": _matrix,
        "copy": _matrix,
        "lstm": _lstm,
        "softmax": _softmax,
        "step": _step,
        "recipe": _recipe,
        "fit": _fit,
        "official": _official,
        "embed": _embed,
        "sgns": _sgns,
    }[case.part]
    return make(case, rng)


def make_weights(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Every parameter of the case's model, float32, of a size that keeps states and logits moderate."""
    shapes: Any = jax.eval_shape(lambda: init_params(model_of(case), jax.random.key(0)))
    out = {}
    flat: dict[str, Any] = flatten_dict(shapes, sep="/")
    for name, leaf in flat.items():
        kernel = leaf.ndim > 1 and name != "embedder/table" and "bias" not in name
        scale = float(np.prod(leaf.shape[-2:-1])) ** -0.5 if kernel and "table" not in name else 0.1
        out[name] = np.float32(scale) * rng.standard_normal(leaf.shape, np.float32)
    return out


def weights_of(arrays: Arrays) -> dict[str, Any]:
    """The parameters among the arrays, as a model takes them, on the device: its own, to be donated."""
    weights = {n: jax.device_put(arrays[n], may_alias=False) for n in arrays if is_weight(n)}
    return unflatten_dict(jax.block_until_ready(weights), sep="/")


def _words(case: Case, rng: np.random.Generator, shape: tuple[int, ...] | int) -> np.ndarray:
    """Word ids, int32, as frequent as in a text: log-uniform over the vocabulary."""
    span = np.log(case.vocabulary - _FIRST)
    return (_FIRST - 1 + np.exp(rng.random(shape) * span)).astype(np.int32)


def _matrix(case: Case, rng: np.random.Generator) -> _Drawn:
    return {"x": rng.standard_normal((case.steps, case.steps), np.float32)}, {}


def _lstm(case: Case, rng: np.random.Generator) -> _Drawn:
    weights = {name: w for name, w in make_weights(case, rng).items() if name.startswith("lstm")}
    shape = (case.steps, DIRECTIONS, case.batch, case.width)
    data = {name: rng.standard_normal(shape, np.float32) for name in ("x", "cotangent")}
    positions = case.steps * case.batch
    return weights | data, {"tokens": positions, "positions": positions}


def _softmax(case: Case, rng: np.random.Generator) -> _Drawn:
    positions = case.batch * case.steps
    n = DIRECTIONS * positions
    data = {
        "hidden": rng.standard_normal((n, case.width), np.float32),
        "table": np.float32(case.width**-0.5)
        * rng.standard_normal((case.vocabulary, case.width), np.float32),
        "bias": np.float32(0.1) * rng.standard_normal(case.vocabulary, np.float32),
        "targets": _words(case, rng, n),
    }
    if case.negatives is not None:  # drawn by this library from key 0, and given to the others
        drawn, expected = log_uniform_negatives(jax.random.key(0), case.vocabulary, case.negatives)
        data |= {"drawn": np.array(drawn), "log_expected": np.array(expected)}
    return data, {"tokens": positions, "positions": positions}


def _step(case: Case, rng: np.random.Generator) -> _Drawn:
    words = _words(case, rng, (case.batch, case.steps + 1))
    words[:, 0], words[:, -1] = 1, 2  # <S>, </S>
    lengths = np.full(case.batch, case.steps + 1, np.int32)
    counts = {"tokens": case.batch * (case.steps - 1), "positions": case.batch * case.steps, "steps": 1}
    return make_weights(case, rng) | {"words": words, "lengths": lengths}, counts


def _recipe(case: Case, rng: np.random.Generator) -> _Drawn:
    """A dispatch of every bucket, and in how many steps of an epoch that bucket is run."""
    stream = BatchStream(_news(case, rng, _DOCUMENTS), case.batch, 0, steps_per_call=_K)
    steps = dict.fromkeys(stream.bounds, 0)
    data: dict[str, np.ndarray] = {}
    for dispatch in stream.chunks(0, stream.steps_per_epoch):
        bound = dispatch.batches.words.shape[2]
        steps[bound] += dispatch.count
        data |= {f"words:{bound}": dispatch.batches.words, f"lengths:{bound}": dispatch.batches.lengths}
    data["bounds"] = np.array(list(steps))
    data["steps"] = np.array(list(steps.values()))
    return make_weights(case, rng) | data, _epoch(stream)


def _news(case: Case, rng: np.random.Generator, count: int) -> Documents:
    """Documents as long as AG News's, of log-uniform words."""
    log_normal = np.exp(np.log(44) + 0.39 * rng.standard_normal(count))  # AG News's median and spread
    offsets = np.concatenate([[0], np.cumsum(np.clip(log_normal, 4, 309).astype(np.int64))])
    return Documents(_words(case, rng, offsets[-1]), offsets, np.zeros(count, np.int32))


def _epoch(stream: BatchStream) -> dict[str, Any]:
    """What is counted of an epoch."""
    tokens, documents = stream.tokens_per_epoch, len(stream.documents)
    return {"tokens": tokens, "positions": tokens + documents, "steps": stream.steps_per_epoch}


def stream_of(case: Case, arrays: Arrays) -> BatchStream:
    """The batches of `fit`."""
    documents = Documents(arrays["ids"], arrays["offsets"], np.zeros(case.sentences, np.int32))
    return BatchStream(documents, case.batch, seed=0, steps_per_call=_K)


def _fit(case: Case, rng: np.random.Generator) -> _Drawn:
    documents = _news(case, rng, case.sentences)
    data = {"ids": documents.ids, "offsets": documents.offsets}
    return make_weights(case, rng) | data, _epoch(stream_of(case, data))


def _letters(rng: np.random.Generator, count: int) -> list[str]:
    """Different words of 2 to 12 letters, the first ones short as frequent words are."""
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words: dict[str, None] = {}
    while len(words) < count:
        n = min(12, 2 + int(np.log2(1 + len(words)) / 2) + int(rng.integers(0, 4)))
        words["".join(letters[rng.integers(0, 26, n)])] = None
    return list(words)


def _official(case: Case, rng: np.random.Generator) -> _Drawn:
    """Windows of running text, spelled; words beyond a few thousand share spellings, which costs the same."""
    lengths = rng.integers(10, 40, case.batch * (case.steps + 1))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    with_characters = character_id_table([*SPECIAL, *_letters(rng, 5000)])
    ids = _words(case, rng, offsets[-1])
    documents = Documents(ids, offsets, np.zeros(len(lengths), np.int32))
    window = ContiguousStream(documents, case.batch, case.steps, seed=0).window(0)
    words, weight = (np.moveaxis(a, 2, 0) for a in (window.words, window.weight))  # [T, D, B]
    read = words[:-1] % len(with_characters)
    data = {"words": words, "weight": weight, "types": read, "chars": with_characters[read]}
    real = int(weight[:, 0].sum())
    ends = int((words[1:, 0] == 2).sum())
    types = len(np.unique(read))
    assert case.negatives is not None
    drawn, _ = log_uniform_negatives(jax.random.key(0), case.vocabulary, case.negatives)
    rows = len(np.union1d(words, drawn))
    counts = {"tokens": real - ends, "positions": case.batch * case.steps, "steps": 1}
    counts |= {"types": types, "rows": rows}
    return make_weights(case, rng) | data, counts


def _embed(case: Case, rng: np.random.Generator) -> _Drawn:
    known = _letters(rng, 8000)
    lengths = np.clip(np.exp(np.log(22) + 0.5 * rng.standard_normal(case.sentences)), 3, 90).astype(int)
    small = Case("words", "embed", vocabulary=len(known) + _FIRST)
    ids = _words(small, rng, int(lengths.sum())) - _FIRST
    text = [known[max(i, 0)] for i in ids]
    tokens = int(lengths.sum())
    counts = {"tokens": tokens, "positions": tokens + 2 * case.sentences, "types": len(set(text)) + 2}
    return make_weights(case, rng) | {"text": np.array(text), "lengths": lengths}, counts


def _sgns(case: Case, rng: np.random.Generator) -> _Drawn:
    ids = _words(case, rng, case.sentences * 1000)
    return {"ids": ids}, {"tokens": len(ids)}
