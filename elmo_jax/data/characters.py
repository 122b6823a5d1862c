"""Character ids of words in the official ELMo format: UTF-8 bytes between begin and end markers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from elmo_jax.config import CHARACTERS

IDS = 262  # 0 pads a sentence; all other ids are a byte or a marker, plus 1
_SENTENCE_BEGIN, _SENTENCE_END, _WORD_BEGIN, _WORD_END, _WORD_PAD = range(256, 261)
_SENTENCE_MARKERS = {"<S>": _SENTENCE_BEGIN, "</S>": _SENTENCE_END}
# XLA:CPU compiles loops below a kilobyte differently; with groups of this size none is that small.
GROUP_SIZE = 128


class UniqueWords(NamedTuple):
    """Unique words of a step, so that the character CNN reads each word once; a JAX pytree.

    Valid for these words in this order only: set it to None after changing or selecting words.

    Attributes:
        first: int32 ``[G, S]``, position of each unique word's first occurrence, padded with 0.
        inverse: int32 ``[*step]``, index into the flattened `first` for every word of the step.
    """

    first: Any
    inverse: Any


def find_unique_words(ids: np.ndarray, axes: int, group_size: int = GROUP_SIZE) -> UniqueWords | None:
    """Find the unique words of each step, with one G for all; return None if steps are too short.

    G is rounded up, because every G compiles another program.

    Args:
        ids: Integer ``[..., *step]``, equal for equal words.
        axes: Number of axes of a step.
        group_size: S, words that the character CNN reads at once.

    Examples:
        >>> found = find_unique_words(np.arange(2000).reshape(2, 1000) % 7, axes=2)
        >>> found.first[0, :8].tolist(), found.inverse[0, :9].tolist()
        ([0, 1, 2, 3, 4, 5, 6, 0], [0, 1, 2, 3, 4, 5, 6, 0, 1])
    """
    leading, words = ids.shape[:-axes], int(np.prod(ids.shape[-axes:]))
    if words < 2 * group_size:
        return None
    steps = [np.unique(step, return_index=True, return_inverse=True)[1:] for step in ids.reshape(-1, words)]
    # XLA unrolls a loop of one group and then rounds bfloat16 at other places.
    groups = max(2, -(-max(len(index) for index, _ in steps) // group_size))
    unit = 1 << max(0, groups.bit_length() - 3)  # 8, 10, 12, 14, 16, 20, ...
    groups = -(-groups // unit) * unit
    first = np.array([np.pad(index, (0, groups * group_size - len(index))) for index, _ in steps], np.int32)
    inverse = np.array([inverse for _, inverse in steps], np.int32)
    return UniqueWords(first.reshape(*leading, groups, group_size), inverse.reshape(ids.shape))


def character_id_table(tokens: Sequence[str]) -> np.ndarray:
    """Return character ids ``[V, C]`` of a vocabulary; row 0, padding, is zero."""
    ids = character_ids(tokens)
    ids[0] = 0
    return ids


def character_ids(words: Sequence[str], multiple: int | None = None) -> np.ndarray:
    """Return the character ids of words.

    A word is a begin marker, its first 48 UTF-8 bytes, an end marker and padding. ``<S>`` and
    ``</S>`` have one special character in place of the bytes.

    Args:
        words: N words.
        multiple: Trim the padding that all words share to a multiple, and keep one more multiple, so
            that no filter of at most this width sees a difference. None keeps C = 50.

    Returns:
        int32 ``[N, C]`` in [1, 262).

    Examples:
        >>> character_ids(["no", "<S>"])[:, :5].tolist()
        [[259, 111, 112, 260, 261], [259, 257, 260, 261, 261]]
        >>> character_ids(["no"], multiple=8).shape
        (1, 16)
    """
    most = CHARACTERS - 2
    encoded = [b"?" if w in _SENTENCE_MARKERS else w.encode("utf-8", "ignore")[:most] for w in words]
    lengths = np.fromiter(map(len, encoded), np.int64, len(words))
    t, n = np.arange(CHARACTERS), lengths[:, None]
    ids = np.full((len(words), CHARACTERS), _WORD_PAD + 1, np.int32)
    ids[:, 0] = _WORD_BEGIN + 1
    ids[(t > 0) & (t <= n)] = np.frombuffer(b"".join(encoded), np.uint8).astype(np.int32) + 1
    ids[t == n + 1] = _WORD_END + 1
    for i, word in enumerate(words):
        if word in _SENTENCE_MARKERS:
            ids[i, 1] = _SENTENCE_MARKERS[word] + 1
    if multiple is None:
        return ids
    longest = int(lengths.max(initial=0)) + 2
    return ids[:, : min(CHARACTERS, (-(-longest // multiple) + 1) * multiple)]
