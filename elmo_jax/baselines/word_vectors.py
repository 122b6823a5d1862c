"""A vector a token: saved, loaded and compared.

The text format is word2vec's: a line ``V F``, then a line a token, its name and F numbers,
between them the ASCII space; names may hold any other space.
Axes: V tokens, F features.
"""

import io
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from elmo_jax.data.text import UNK, Vocabulary, read_text
from elmo_jax.errors import InputError
from elmo_jax.storage.files import read_arrays, write_atomically

# What no token may hold; surrogates are no UTF-8.
_UNFIT, _UNFIT_TEXT = re.compile("[\n\ud800-\udfff]"), re.compile("[\n \0\ud800-\udfff]")


class WordVectors:
    """Tokens and their vectors.

    Args:
        tokens: V distinct names.
        matrix: ``[V, F]``, kept as float32.

    Example:
        >>> vectors = WordVectors(["bank", "rate", "goal"], np.array([[1, 0], [2, 0.1], [0, 1]]))
        >>> [token for token, _ in vectors.nearest("bank", 1)]
        ['rate']
    """

    def __init__(self, tokens: Sequence[str], matrix: np.ndarray):
        self.tokens, self.matrix = tuple(tokens), np.asarray(matrix, np.float32)
        if self.matrix.ndim != 2 or len(self.tokens) != len(self.matrix):
            raise ValueError(f"{len(self.tokens)} tokens do not fit a matrix of shape {self.matrix.shape}")

    def nearest(self, token: str, count: int = 10) -> list[tuple[str, float]]:
        """The other tokens of highest cosine similarity, best first.

        Raises:
            InputError: the token has no vector.
        """
        if token not in self.tokens:
            raise InputError(f"{token!r} has no vector; give a token of the vocabulary")
        unit = self.matrix / np.maximum(np.linalg.norm(self.matrix, axis=1, keepdims=True), 1e-12)
        i = self.tokens.index(token)
        cosine = unit @ unit[i]
        order = [j for j in np.argsort(-cosine, kind="stable").tolist() if j != i]
        return [(self.tokens[j], float(cosine[j])) for j in order[:count]]

    def table(self, vocabulary: Vocabulary) -> np.ndarray:
        """A row an id of the vocabulary, float32 ``[V, F]``.

        A token without a vector gets the unknown token's, or zeros if that has none;
        padding and the markers of a document's ends get zeros.
        """
        rows = dict(zip(self.tokens, self.matrix, strict=True))
        zeros = np.zeros(self.matrix.shape[1], np.float32)
        unknown = rows.get(vocabulary.tokens[UNK], zeros)
        ends = [zeros] * UNK
        return np.stack(ends + [rows.get(token, unknown) for token in vocabulary.tokens[UNK:]])

    def save(self, path: str | Path) -> None:
        """Write ``.npz`` if the path ends so, else word2vec's text format; either is exact.

        Raises:
            InputError: what was written could not be read: a number is not finite, or a token
                stands twice, is empty, holds a line feed, or in the text a space or NUL.
        """
        path = Path(path)
        self._check(path)
        if path.suffix == ".npz":
            names = np.frombuffer("\n".join(self.tokens).encode(), np.uint8)
            file = io.BytesIO()
            np.savez(file, tokens=names, matrix=self.matrix)
            write_atomically(path, file.getvalue())
            return
        lines = [f"{len(self.tokens)} {self.matrix.shape[1]}\n"]
        for token, row in zip(self.tokens, self.matrix.tolist(), strict=True):
            lines.append(f"{token} {' '.join([f'{x:.9g}' for x in row])}\n")  # 9 digits give float32 back
        write_atomically(path, "".join(lines))

    @classmethod
    def load(cls, path: str | Path) -> "WordVectors":
        """Read what `save`, word2vec or gensim wrote.

        Raises:
            InputError: it is missing or malformed, with the line in a text file.
        """
        path = Path(path)
        with np.errstate(over="ignore"):  # what is too large for float32 is refused below
            vectors = _load_npz(path) if path.suffix == ".npz" else _load_text(path)
        vectors._check(path)
        return vectors

    def _check(self, path: Path) -> None:
        """Refuse what the file at `path` must not, or cannot, hold."""
        if not np.isfinite(self.matrix).all():
            token = self.tokens[int(np.flatnonzero(~np.isfinite(self.matrix).all(1))[0])]
            raise InputError(f"{path}: the vector of {token!r} is not finite; make the vectors again")
        if len(set(self.tokens)) < len(self.tokens):
            raise InputError(f"{path}: a token stands twice; make the vectors again")
        if not self.matrix.shape[1]:
            raise InputError(f"{path}: the vectors have no numbers; make the vectors again")
        unfit = _UNFIT if path.suffix == ".npz" else _UNFIT_TEXT
        for token in self.tokens:
            if not token or unfit.search(token):
                told = "leave it out" + " or save as .npz" * bool(token and not _UNFIT.search(token))
                raise InputError(
                    f"{path}: {reprlib.repr(token)} is not a token that such a file can hold; {told}"
                )


def _load_npz(path: Path) -> WordVectors:
    try:
        names, matrix = read_arrays(path, ("tokens", "matrix"))
        tokens = names.tobytes().decode().split("\n") if names.size else []
        return WordVectors(tokens, matrix.astype(np.float32, casting="same_kind"))
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: holds no word vectors ({reason}); make them again") from None


def _load_text(path: Path) -> WordVectors:
    first, *lines = read_text(path).removesuffix("\n").split("\n")
    try:
        count, width = map(int, first.split())
    except ValueError:
        raise InputError(f"{path}:1: is {first[:40]!r}, not the line 'tokens features'; add it") from None
    if count != len(lines):
        raise InputError(f"{path}:1: announces {count} tokens, but {len(lines)} lines follow; mend the line")
    if not 0 < width <= (len(lines[0]) if lines else 2**31):
        raise InputError(f"{path}:1: announces vectors of {width} numbers; mend the line")
    tokens, matrix = [], np.empty((count, width), np.float32)
    for i, line in enumerate(lines):
        # As gensim does: other spaces than these, in any script, may be of the token.
        token, *numbers = line.rstrip(" \t\r\v\f").split(" ", width + 1)
        if not token or len(numbers) != width:
            raise InputError(f"{path}:{i + 2}: is not a token and {width} numbers; mend or remove the line")
        try:
            matrix[i] = numbers
        except ValueError as error:
            raise InputError(f"{path}:{i + 2}: {error}; mend or remove the line") from None
        tokens.append(token)
    return WordVectors(tokens, matrix)
