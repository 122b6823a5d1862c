"""Labelled rows of text from CSV files, tokenised once and cached by the content's hash.

Nouns: a *row* is a label, a text and the line it began at; *types* are the distinct tokens
of a file and *codes* their numbers, in the order of first use.
"""

import csv
import gzip
import hashlib
import io
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pooch

from elmo_jax.errors import InputError
from elmo_jax.integrity import read_arrays
from elmo_jax.text import decode, tokenize

TextColumns = Literal["title+description", "description"]

_CACHE_VERSION = 2  # of reading, cleaning and tokenising; a change makes old caches unused


class Row(NamedTuple):
    """A text, what it is labelled, and the line of its file it began at."""

    line: int
    label: str
    text: str


@dataclass(frozen=True)
class Rows:
    """Tokenised rows.

    Attributes:
        path: of the file, for messages.
        types: ``[V]`` distinct tokens.
        codes: ``[tokens]`` int32 indices into types, all rows end to end.
        offsets: ``[N + 1]`` int64; row n is ``codes[offsets[n]:offsets[n + 1]]``.
        labels: ``[N]`` as written in the file.
        lines: ``[N]`` int64, where each row began.
        header: the cells of the row that names the columns; none if the file has no such row.
    """

    path: str
    types: list[str]
    codes: np.ndarray
    offsets: np.ndarray
    labels: list[str]
    lines: np.ndarray
    header: tuple[str, ...] = ()

    def truncated(self, longest: int) -> "Rows":
        """The same rows, each cut to its first `longest` tokens."""
        before = np.diff(self.offsets)
        lengths = np.minimum(before, longest)
        place = np.arange(len(self.codes)) - np.repeat(self.offsets[:-1], before)
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return replace(self, codes=self.codes[place < longest], offsets=offsets)


def cache_folder() -> Path:
    """Where tokenised files are kept."""
    return Path(pooch.os_cache("elmo_jax")) / "tokens"


def read_rows(
    path: Path, text: TextColumns, header: tuple[str, ...] | None = None, keep: bool = True
) -> Rows:
    """A CSV file of ``label,text...`` (gzip if it ends in .gz), from the cache if its content is there.

    Args:
        path: the file; a first row that names the columns is left out.
        text: which columns make the text: all behind the label, or the last alone.
        header: the cells of such a row, if they are known, ``()`` for none. If None, it is a
            first row whose label is no number and no other row's.
        keep: whether the tokens may be written to the cache.

    Returns:
        Its rows, cleaned and tokenised.

    Raises:
        InputError: it is missing, not UTF-8, not CSV, empty, or a row has no tokens or
            another number of columns than the first; with the line.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            most = max(2**24, 100 * len(data))  # text shrinks to a fifth
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(most + 1)
            if len(data) > most:
                raise InputError(f"{path}: unpacks to over a hundred times its size; check the file")
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the file") from None
    key = hashlib.sha256(f"{_CACHE_VERSION} {text} {header} ".encode() + data).hexdigest()[:32]
    cache = cache_folder() / f"{key}.npz"
    cached = _load_cache(cache, path)
    if cached is None:
        rows = _csv_rows(data, path)
        if header is None:
            header = _header(rows)
        elif _cells(rows[0]) != header:
            header = ()
        cached = replace(tokenise_rows(_texts(rows[bool(header) :], path, text), str(path)), header=header)
        if keep:
            _save_cache(cached, cache)
    return cached


def _csv_rows(data: bytes, path: Path) -> list[tuple[int, list[str]]]:
    """Every row that is not blank, header and all, and the line it began at; all of one width."""
    csv.field_size_limit(sys.maxsize)  # a text may be long; it is cut later, and said so
    reader = csv.reader(io.StringIO(decode(data, path), newline=""), strict=True)
    rows: list[tuple[int, list[str]]] = []
    start = 1
    try:
        for cells in reader:
            if cells:
                rows.append((start, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{start}: not a row of CSV ({error}); check its quotes") from None
    if not rows:
        raise InputError(f"{path}: holds no rows; each must be label,text")
    width = len(rows[0][1])
    if width < 2:
        raise InputError(f"{path}:{rows[0][0]}: has 1 column, not label,text; check its commas and quotes")
    for line, cells in rows:
        # One more is a comma that should be quoted: which cell is the text cannot be known.
        if len(cells) != width:
            has = f"has {len(cells)} column{'s'[: len(cells) > 1]}, not {width}"
            raise InputError(f"{path}:{line}: {has} as the first row; check its commas and quotes")
    return rows


def _header(rows: list[tuple[int, list[str]]]) -> tuple[str, ...]:
    """The cells of the first row if it names columns, its label being no number and no other row's."""
    label, *others = (cells[0].strip() for _, cells in rows)
    return _cells(rows[0]) if label and not _is_integer(label) and label not in others else ()


def _cells(row: tuple[int, list[str]]) -> tuple[str, ...]:
    return tuple(cell.strip() for cell in row[1])


def _texts(rows: list[tuple[int, list[str]]], path: Path, text: TextColumns) -> Iterator[Row]:
    if not rows:
        raise InputError(f"{path}: holds no rows below its header; each must be label,text")
    for line, cells in rows:
        if not cells[0].strip():
            raise InputError(f"{path}:{line}: the label is empty; mend or remove the row")
        used = cells[1:] if text == "title+description" else cells[-1:]
        yield Row(line, cells[0].strip(), " ".join(used))


def _is_integer(text: str) -> bool:
    return text.lstrip("+-").isdecimal()


def tokenise_rows(rows: Iterable[Row], path: str) -> Rows:
    """Tokenise rows; `path` is for messages.

    Raises:
        InputError: a text has no tokens.
    """
    code: dict[str, int] = {}
    codes: list[np.ndarray] = []
    labels, lines, lengths = [], [], [0]
    for line, label, text in rows:
        tokens = tokenize(text)
        if not tokens:
            raise InputError(f"{path}:{line}: the text has no tokens; remove the row")
        codes.append(np.fromiter((code.setdefault(t, len(code)) for t in tokens), np.int32, len(tokens)))
        labels.append(label)
        lines.append(line)
        lengths.append(len(tokens))
    offsets = np.cumsum(lengths, dtype=np.int64)
    return Rows(path, list(code), np.concatenate(codes), offsets, labels, np.array(lines))


def _save_cache(rows: Rows, cache: Path) -> None:
    """Write beside and rename, so that a reader never sees half a file; no cache, no harm."""
    text = {
        "types": "\n".join(rows.types),
        "labels": "\x00".join(rows.labels),
        "header": "\x00".join(rows.header),
    }
    arrays: Any = {name: np.frombuffer(value.encode(), np.uint8) for name, value in text.items()}
    part = None
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        # A name of its own, since others may be reading the same file.
        with tempfile.NamedTemporaryFile(dir=cache.parent, suffix=".part", delete=False) as file:
            part = Path(file.name)
            np.savez_compressed(file, codes=rows.codes, offsets=rows.offsets, lines=rows.lines, **arrays)
        part.replace(cache)
    except OSError as error:
        warnings.warn(f"{cache.parent}: tokens are not cached ({error.strerror})", stacklevel=2)
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _load_cache(cache: Path, path: Path) -> Rows | None:
    try:
        names = ("codes", "offsets", "lines", "types", "labels", "header")
        codes, offsets, lines, *texts = read_arrays(cache, names)
        types, labels, cells = (text.tobytes().decode() for text in texts)
    except ValueError:
        return None
    header = tuple(cells.split("\x00")) if cells else ()
    return Rows(str(path), types.split("\n"), codes, offsets, labels.split("\x00"), lines, header)
