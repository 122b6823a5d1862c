"""Words to character ids, as the official format numbers them: UTF-8 bytes between markers.

Axes: N words, C characters, G groups of S words that differ.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from elmo_jax.config import CHARACTERS

IDS = 262  # 0 is a padding token; the others are the numbers below and a byte's own, plus 1
_SENTENCE_BEGIN, _SENTENCE_END, _BEGIN, _END, _PAD = range(256, 261)
_MARKERS = {"<S>": _SENTENCE_BEGIN, "</S>": _SENTENCE_END}
# Words through the character CNN at once, on a CPU. XLA:CPU compiles loops over less than a kilobyte
# otherwise; of this many words none is so small, and how many groups there are changes no bit.
SPELLED = 128
_MORE = 4  # times as many where beginning a product takes longer than a small one


class UniqueWords(NamedTuple):
    """The words of a step that differ, each of which is to be spelled once; a JAX pytree.

    It is of just these words in this order: who takes some rows of a batch, or changes characters,
    must put None in its place.

    Attributes:
        first: ``[G, S]`` int32, where among the step's words each is found first; filled up with
            0, the first word, whose copies no `place` names.
        place: ``[*step]`` int32, which of these every word of the step is.
    """

    first: Any
    place: Any


def unique_words(ids: np.ndarray, axes: int) -> UniqueWords | None:
    """The words that differ, step by step; None of steps too short for it to be worth while.

    Args:
        ids: a number for each spelling, ``[..., *step]``.
        axes: of a step.

    Returns:
        Of every step, with one G for all, at least 2 and above 7 a round number, for each G is a
        program to compile; S is `SPELLED`, or more on an accelerator.

    Example:
        >>> found = unique_words(np.arange(2000).reshape(2, 1000) % 7, axes=2)
        >>> found.first[0, :8].tolist(), found.place[0, :9].tolist()
        ([0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 2, 3, 4, 5, 6, 0, 1])
    """
    leading, step = ids.shape[:-axes], ids.shape[-axes:]
    size = SPELLED if jax.default_backend() == "cpu" else _MORE * SPELLED
    if np.prod(step) < 2 * size:
        return None
    made = [np.unique(one, return_index=True, return_inverse=True) for one in ids.reshape(-1, np.prod(step))]
    # A loop of one step is no loop to XLA, which then rounds bfloat16 elsewhere.
    groups = max(2, -(-max(len(types) for types, _, _ in made) // size))
    unit = 1 << max(0, groups.bit_length() - 3)  # 8, 10, 12, 14, 16, 20, ...
    groups = -(-groups // unit) * unit
    first = np.zeros((len(made), groups * size), np.int32)
    for row, (_, found, _) in zip(first, made, strict=True):
        row[: len(found)] = found
    place = np.array([which for _, _, which in made], np.int32)
    return UniqueWords(first.reshape(*leading, groups, size), place.reshape(ids.shape))


def character_id_table(tokens: Sequence[str]) -> np.ndarray:
    """Character ids ``[V, C]`` of a vocabulary, the first of which is padding: a row of zeros."""
    ids = character_ids(tokens)
    ids[0] = 0
    return ids


def character_ids(words: Sequence[str], multiple: int | None = None) -> np.ndarray:
    """Character ids of whole words at once.

    A word is begin, its first 48 UTF-8 bytes, end, then padding; ``<S>`` and ``</S>`` have
    one character of their own in place of the bytes.

    Args:
        words: N words.
        multiple: cut the padding that all words share down to the next such multiple, and
            keep `multiple` characters of it: no maximum over a word changes while no filter
            is wider. None keeps all 50.

    Returns:
        int32 ``[N, C]``, in [1, 262).

    Example:
        >>> character_ids(["no", "<S>"])[:, :5].tolist()
        [[259, 111, 112, 260, 261], [259, 257, 260, 261, 261]]
        >>> character_ids(["no"], multiple=8).shape
        (1, 16)
    """
    limit = CHARACTERS - 2
    with_characters = [b"?" if word in _MARKERS else word.encode("utf-8", "ignore")[:limit] for word in words]
    lengths = np.fromiter(map(len, with_characters), np.int64, len(words))
    ids = np.full((len(words), CHARACTERS), _PAD + 1, np.int32)
    ids[:, 0] = _BEGIN + 1
    rows = np.repeat(np.arange(len(words)), lengths)
    starts = np.cumsum(lengths) - lengths
    columns = 1 + np.arange(lengths.sum()) - np.repeat(starts, lengths)
    ids[rows, columns] = np.frombuffer(b"".join(with_characters), np.uint8).astype(np.int32) + 1
    ids[np.arange(len(words)), lengths + 1] = _END + 1
    for i, word in enumerate(words):
        if word in _MARKERS:
            ids[i, 1] = _MARKERS[word] + 1
    if multiple is None:
        return ids
    longest = int(lengths.max(initial=0)) + 2
    return ids[:, : min(CHARACTERS, (-(-longest // multiple) + 1) * multiple)]
