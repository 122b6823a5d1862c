"""Labelled texts from disk, the net or the embedded corpus, split, numbered and ready to batch.

Nouns: a *data set* is three parts of documents (training, validation, test) with one
vocabulary, made from the training part alone.

Labelled rows of text from CSV files, tokenised once and cached by the content's hash.

Nouns: a *row* is a label, a text and the line it began at; *types* are the distinct tokens
of a file and *codes* their numbers, in the order of first use.
"""

import csv
import gzip
import hashlib
import io
import reprlib
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pooch

from elmo_jax.config import DataConfig, TextColumns
from elmo_jax.data.batching import Documents
from elmo_jax.data.characters import character_id_table
from elmo_jax.data.sample_corpus import CLASSES, sample_corpus
from elmo_jax.data.text import UNK, Vocabulary, decode, read_text, tokenize
from elmo_jax.errors import InputError
from elmo_jax.storage.files import read_arrays

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


_AG_NEWS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"
_AG_NEWS_MD5 = {
    "train.csv": "b1a00f826fdfbd249f79597b59e1dc12",
    "test.csv": "d52ea96a97a2d943681189a97654912d",
}


@dataclass(frozen=True)
class Dataset:
    """Three parts of documents, numbered by the training part's vocabulary."""

    classes: tuple[str, ...]
    vocabulary: Vocabulary
    train: Documents
    validation: Documents
    test: Documents

    @property
    def digest(self) -> str:
        """A sha256 of every part's ids, lengths and labels, and of what they number."""
        hashed = hashlib.sha256("\n".join([*self.classes, "", *self.vocabulary.tokens]).encode())
        for part in (self.train, self.validation, self.test):
            for array in (part.ids, part.lengths, part.labels):
                hashed.update(array.tobytes())
        return hashed.hexdigest()


def load_dataset(
    config: DataConfig, vocabulary: Vocabulary | None = None, with_characters: bool = False, keep: bool = True
) -> Dataset:
    """Read, clean, tokenise, split and number a data set.

    Args:
        config: what to read and how.
        vocabulary: the numbering; made from the training part if None.
        spelled: whether documents bring character ids, for models that read them.
        keep: whether tokens may be written to the user's cache.

    Returns:
        The data set; the same config gives the same one.

    Raises:
        InputError: a file is missing or wrong, with its line.

    Example:
        >>> data = load_dataset(DataConfig())
        >>> data.classes, len(data.train), len(data.validation), len(data.test)
        (('World', 'Sports', 'Business', 'Sci/Tech'), 2240, 560, 700)
    """
    train, test, names = _read_parts(config, keep)
    classes, number = _number_classes(train, names)
    train_labels, test_labels = _labels(train, number), _labels(test, number)
    train, test = _truncate((train, test), config.max_length)
    kept, held_out = _split(train, train_labels, config)
    if vocabulary is None:
        vocabulary = _vocabulary(train, kept, config)
    documents = _documents(train, train_labels, vocabulary, with_characters)
    return Dataset(
        classes,
        vocabulary,
        documents.take(kept),
        documents.take(held_out),
        _documents(test, test_labels, vocabulary, with_characters),
    )


def _read_parts(config: DataConfig, keep: bool) -> tuple[Rows, Rows, tuple[str, ...] | None]:
    """Training rows, test rows, and the classes' names if the data set has any."""
    if config.data_dir is not None and config.dataset != "ag_news":
        raise InputError(
            "--data-dir is where --dataset ag_news lies; add that, or name the folder by --dataset"
        )
    if config.dataset == "sample":
        parts = (
            (Row(i, CLASSES[text.label], text.text) for i, text in enumerate(part, 1))
            for part in sample_corpus()
        )
        train, test = (tokenise_rows(part, "sample") for part in parts)
        return train, test, CLASSES
    if config.dataset == "ag_news":
        folder = _ag_news() if config.data_dir is None else Path(config.data_dir)
        names: tuple[str, ...] | None = CLASSES
    else:
        folder = Path(config.dataset)
        listed = folder / "classes.txt"
        names = tuple(read_text(listed).split("\n")) if listed.is_file() else None
        names = None if names is None else tuple(name.strip() for name in names if name.strip())
        if names == ():
            raise InputError(f"{listed}: is empty; write a class's name on each line, or remove the file")
        if names and len(set(names)) < len(names):
            raise InputError(f"{listed}: names a class twice; each line must be another")
    train_path, test_path = find_parts(folder)
    train = read_rows(train_path, config.text, keep=keep)
    return train, read_rows(test_path, config.text, train.header, keep), names


def _ag_news() -> Path:
    """The user's copy of AG News, downloaded if it is not there, checked if it is."""
    folder = Path(pooch.os_cache("elmo_jax")) / "ag_news"
    for name, md5 in _AG_NEWS_MD5.items():
        try:
            downloader: Any = pooch.HTTPDownloader(progressbar=True, timeout=30)
            pooch.retrieve(_AG_NEWS + name, f"md5:{md5}", name, folder, downloader=downloader)
        except (OSError, ValueError) as error:
            reason = str(error).split("\n")[0][:100]
            raise InputError(
                f"ag_news: {name} could not be downloaded ({reason}); "
                "give --data-dir a folder that holds train.csv and test.csv"
            ) from None
    return folder


def find_parts(folder: Path) -> tuple[Path, Path]:
    """The training and the test rows of a folder, packed or not.

    Raises:
        InputError: one is missing.
    """
    if not folder.is_dir():
        raise InputError(
            f"{folder}: no such folder; give one that holds train.csv and test.csv, or sample or ag_news"
        )
    return _find(folder / "train.csv"), _find(folder / "test.csv")


def _find(path: Path) -> Path:
    for there in (path, path.with_name(f"{path.name}.gz")):
        if there.is_file():
            return there
    raise InputError(f"{path}: no such file; the folder must hold train.csv and test.csv (or .csv.gz)")


def _number_classes(train: Rows, names: tuple[str, ...] | None) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes' names, and each written label's number."""
    written = set(train.labels)
    integers = all(label.isdecimal() and len(label) < 19 for label in written)
    if names is None:
        classes = tuple(sorted(written, key=int if integers else None))
        return classes, {label: i for i, label in enumerate(classes)}
    if integers and not written <= set(names):
        base = 0 if "0" in written else 1
        return names, {str(i + base): i for i in range(len(names))}
    return names, {name: i for i, name in enumerate(names)}


def _labels(rows: Rows, number: dict[str, int]) -> np.ndarray:
    for line, label in zip(rows.lines, rows.labels, strict=True):
        if label not in number:
            known = ", ".join(map(reprlib.repr, sorted(number)[:10]))
            told = f"label {reprlib.repr(label)} is not one of {known}"
            raise InputError(f"{rows.path}:{line}: {told}; mend or remove the row")
    return np.array([number[label] for label in rows.labels], np.int32)


def _truncate(parts: tuple[Rows, Rows], longest: int) -> list[Rows]:
    count = sum(int((np.diff(rows.offsets) > longest).sum()) for rows in parts)
    if count:
        warnings.warn(
            f"{count} texts were longer than {longest} tokens and were cut (--max-length)", stacklevel=3
        )
    return [rows.truncated(longest) for rows in parts]


def _split(train: Rows, labels: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """The rows kept for training and those held out, each sorted; both parts have every class."""
    counts = np.bincount(labels)
    if 1 in counts[labels]:
        row = int(np.argmax(counts[labels] == 1))
        told = f"is the only row of class {reprlib.repr(train.labels[row])}; add another, or remove it"
        raise InputError(f"{train.path}:{train.lines[row]}: {told}")
    from sklearn.model_selection import train_test_split  # 80 MB with SciPy, for this alone

    try:
        kept, held_out = train_test_split(
            np.arange(len(labels)),
            test_size=config.validation,
            random_state=config.split_seed,
            stratify=labels,
        )
    except ValueError:  # a part of fewer rows than classes
        raise InputError(
            f"{train.path}: {len(labels)} rows of {np.count_nonzero(counts)} classes are too few to hold "
            f"out {config.validation:g} of each; give more rows, or another --validation"
        ) from None
    return np.sort(kept), np.sort(held_out)


def _vocabulary(train: Rows, kept: np.ndarray, config: DataConfig) -> Vocabulary:
    used = np.repeat(np.isin(np.arange(len(train.labels)), kept), np.diff(train.offsets))
    counts = np.bincount(train.codes[used], minlength=len(train.types)).tolist()
    by_token = dict(zip(train.types, counts, strict=True))
    return Vocabulary.from_counts(by_token, config.min_count, config.max_vocab)


def _documents(rows: Rows, labels: np.ndarray, vocabulary: Vocabulary, with_characters: bool) -> Documents:
    ids = vocabulary.ids(rows.types)
    if not with_characters:
        return Documents(ids[rows.codes], rows.offsets, labels)
    # What is no class of its own is still read by its own characters.
    unknown = np.flatnonzero(ids == UNK)
    ids[unknown] = len(vocabulary) + np.arange(len(unknown), dtype=ids.dtype)
    spellings = character_id_table([*vocabulary.tokens, *(rows.types[i] for i in unknown)])
    return Documents(ids[rows.codes], rows.offsets, labels, spellings, len(vocabulary))
