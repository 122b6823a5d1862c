"""Words to character ids, as the official format numbers them: UTF-8 bytes between markers.

Axes: N words, C characters.
"""

from collections.abc import Sequence

import numpy as np

CHARACTERS = 50  # a word, with the markers of its begin and end
IDS = 262  # 0 is a padding token; the others are the numbers below and a byte's own, plus 1
_SENTENCE_BEGIN, _SENTENCE_END, _BEGIN, _END, _PAD = range(256, 261)
_MARKERS = {"<S>": _SENTENCE_BEGIN, "</S>": _SENTENCE_END}


def spelling_table(tokens: Sequence[str]) -> np.ndarray:
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
    spelled = [b"?" if word in _MARKERS else word.encode("utf-8", "ignore")[:limit] for word in words]
    lengths = np.fromiter(map(len, spelled), np.int64, len(words))
    ids = np.full((len(words), CHARACTERS), _PAD + 1, np.int32)
    ids[:, 0] = _BEGIN + 1
    rows = np.repeat(np.arange(len(words)), lengths)
    starts = np.cumsum(lengths) - lengths
    columns = 1 + np.arange(lengths.sum()) - np.repeat(starts, lengths)
    ids[rows, columns] = np.frombuffer(b"".join(spelled), np.uint8).astype(np.int32) + 1
    ids[np.arange(len(words)), lengths + 1] = _END + 1
    for i, word in enumerate(words):
        if word in _MARKERS:
            ids[i, 1] = _MARKERS[word] + 1
    if multiple is None:
        return ids
    longest = int(lengths.max(initial=0)) + 2
    return ids[:, : min(CHARACTERS, (-(-longest // multiple) + 1) * multiple)]
