"""Tokens with word vectors, and their files in the formats of NumPy, word2vec and GloVe.

In word2vec's text format the first line holds the number of tokens V and of features F. Each further line
holds a token and its F numbers. GloVe's format has no first line.
"""

import io
import re
import reprlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from elmo_jax.data.text import UNK, Vocabulary, read_text
from elmo_jax.errors import InputError
from elmo_jax.storage.files import read_arrays, read_bytes, write_atomically

_PADDING = " \t\r\v\f"  # ignored at the end of a line
# Characters that a token must not contain, in .npz and in text files; surrogates are not valid UTF-8.
_FORBIDDEN, _FORBIDDEN_IN_TEXT = re.compile("[\n\ud800-\udfff]"), re.compile("[\n \0\ud800-\udfff]")


class WordVectors:
    """Tokens and their vectors.

    Args:
        tokens: V unique tokens.
        matrix: Vectors ``[V, F]``, converted to float32.

    Examples:
        >>> vectors = WordVectors(["bank", "rate", "goal"], np.array([[1, 0], [2, 0.1], [0, 1]]))
        >>> [token for token, _ in vectors.nearest("bank", 1)]
        ['rate']
    """

    def __init__(self, tokens: Sequence[str], matrix: np.ndarray):
        self.tokens, self.matrix = tuple(tokens), np.asarray(matrix, np.float32)
        if self.matrix.ndim != 2 or len(self.tokens) != len(self.matrix):
            raise ValueError(f"{len(self.tokens)} tokens do not fit a matrix of shape {self.matrix.shape}")
        self._rows = {token: i for i, token in enumerate(self.tokens)}

    def __repr__(self) -> str:
        return f"WordVectors(tokens={len(self.tokens):,}, features={self.matrix.shape[1]})"

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._rows

    def __getitem__(self, token: str) -> np.ndarray:
        """Return the vector of a token, float32 ``[F]``; raise `KeyError` if it has none."""
        return self.matrix[self._rows[token]]

    def nearest(self, token: str, count: int = 10) -> list[tuple[str, float]]:
        """Return the other tokens of highest cosine similarity and these similarities, best first.

        Raises:
            InputError: The token has no vector.
        """
        if token not in self:
            raise InputError(f"{token!r} has no vector; use a token of the vocabulary")
        unit = self.matrix / np.maximum(np.linalg.norm(self.matrix, axis=1, keepdims=True), 1e-12)
        i = self._rows[token]
        cosine = unit @ unit[i]
        order = [j for j in np.argsort(-cosine, kind="stable").tolist() if j != i]
        return [(self.tokens[j], float(cosine[j])) for j in order[:count]]

    def table(self, vocabulary: Vocabulary) -> np.ndarray:
        """Return float32 ``[V, F]``, one row for each id of a vocabulary.

        Tokens without a vector get that of ``<UNK>``, or else zeros. Padding, ``<S>`` and ``</S>`` get zeros.
        """
        rows = dict(zip(self.tokens, self.matrix, strict=True))
        zeros = np.zeros(self.matrix.shape[1], np.float32)
        unknown = rows.get(vocabulary.tokens[UNK], zeros)
        return np.stack([zeros] * UNK + [rows.get(token, unknown) for token in vocabulary.tokens[UNK:]])

    def save(self, path: str | Path) -> None:
        """Write ``.npz`` if the path ends in it, otherwise word2vec's text format; both are lossless.

        Raises:
            InputError: A number is not finite, or a token occurs twice or cannot be stored in the file.
        """
        path = Path(path)
        self._check(path)
        if path.suffix == ".npz":
            file = io.BytesIO()
            text = "\n".join(self.tokens).encode()
            np.savez(file, tokens=np.frombuffer(text, np.uint8), matrix=self.matrix)
            write_atomically(path, file.getvalue())
            return
        lines = [f"{len(self.tokens)} {self.matrix.shape[1]}\n"]
        for token, row in zip(self.tokens, self.matrix.tolist(), strict=True):
            lines.append(f"{token} {' '.join([f'{x:.9g}' for x in row])}\n")  # 9 digits identify a float32
        write_atomically(path, "".join(lines))

    @classmethod
    def load(cls, path: str | Path) -> "WordVectors":
        """Load a file written by `save`, word2vec, gensim or GloVe.

        Args:
            path: ``.npz``, word2vec's binary format as ``.bin``, or text with or without word2vec's header.
                The latter two may be compressed as ``.gz``.

        Raises:
            InputError: The file is missing or malformed.
        """
        path = Path(path)
        with np.errstate(over="ignore"):  # _check reports numbers too large for float32
            is_binary = path.name.removesuffix(".gz").endswith(".bin")
            load = _load_binary if is_binary else _load_npz if path.suffix == ".npz" else _load_text
            vectors = load(path)
        vectors._check(path)
        return vectors

    def _check(self, path: Path) -> None:
        """Raise InputError for numbers that are not finite and for tokens that the format cannot hold."""
        if not np.isfinite(self.matrix).all():
            token = self.tokens[int(np.flatnonzero(~np.isfinite(self.matrix).all(1))[0])]
            raise InputError(f"{path}: the vector of {token!r} is not finite; make the vectors again")
        for i, token in enumerate(self.tokens):
            if self._rows[token] != i:
                raise InputError(f"{path}: the token {reprlib.repr(token)} occurs twice; remove one")
        if not self.matrix.shape[1]:
            raise InputError(f"{path}: the vectors have 0 features; make the vectors again")
        forbidden = _FORBIDDEN if path.suffix == ".npz" else _FORBIDDEN_IN_TEXT
        for token in self.tokens:
            if not token or forbidden.search(token):
                remedy = "remove it" + " or save as .npz" * bool(token and not _FORBIDDEN.search(token))
                raise InputError(f"{path}: the file cannot hold the token {reprlib.repr(token)}; {remedy}")


def _load_npz(path: Path) -> WordVectors:
    try:
        tokens, matrix = read_arrays(path, ("tokens", "matrix"))
        tokens = tokens.tobytes().decode().split("\n") if tokens.size else []
        return WordVectors(tokens, matrix.astype(np.float32, casting="same_kind"))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: holds no word vectors ({error}); make them again") from None


def _load_text(path: Path) -> WordVectors:
    lines = read_text(path).removesuffix("\n").split("\n")
    try:
        count, width = map(int, lines[0].split())
    except ValueError:  # GloVe's files have no header
        count, width, first = len(lines), len(lines[0].rstrip(_PADDING).split(" ")) - 1, 0
    else:
        first = 1
        if count != len(lines) - 1 or not 0 < width <= (len(lines[1]) if count else 2**31):
            problem = f"does not fit the {len(lines) - 1} lines below"
            raise InputError(f"{path}:1: {lines[0]!r} {problem}; correct the line")
    line_of: dict[str, int] = {}
    matrix = np.empty((count, width), np.float32)
    for i, line in enumerate(lines[first:]):
        number = i + first + 1
        # As in gensim, an ASCII space separates fields; other Unicode spaces belong to the token.
        token, *numbers = line.rstrip(_PADDING).split(" ", width + 1)
        if not token or not width or len(numbers) != width:
            wanted = f"{width} numbers" if width else "numbers"
            raise InputError(f"{path}:{number}: not a token and {wanted}; correct or remove the line")
        try:
            matrix[i] = numbers
        except ValueError as error:
            raise InputError(f"{path}:{number}: {error}; correct or remove the line") from None
        if line_of.setdefault(token, number) != number:
            problem = f"the token {reprlib.repr(token)} occurs in line {line_of[token]} already"
            raise InputError(f"{path}:{number}: {problem}; remove one")
    return WordVectors(list(line_of), matrix)


def _load_binary(path: Path) -> WordVectors:
    data = read_bytes(path)
    end = data.find(b"\n")
    try:
        count, width = map(int, data[: max(end, 0)].split())
    except ValueError:
        count, width = -1, 0
    if count < 0 or width < 1 or 4 * count * width > len(data):
        raise InputError(f"{path}: is not in word2vec's binary format; give such a file, or name it .txt")
    tokens, matrix, position = [], np.empty((count, width), np.float32), end + 1
    for i in range(count):
        end = data.find(b" ", position)
        if end < 0 or end + 1 + 4 * width > len(data):
            raise InputError(f"{path}: ends after {i} of {count} vectors; get the file again")
        try:
            tokens.append(data[position:end].lstrip(b"\n").decode())
        except UnicodeDecodeError:
            raise InputError(f"{path}: token {i + 1} is not UTF-8; convert the file") from None
        matrix[i] = np.frombuffer(data, "<f4", width, end + 1)
        position = end + 1 + 4 * width
    return WordVectors(tokens, matrix)
