"""Labelled texts from CSV files, AG News or the sample corpus, as token ids split into three parts."""

import csv
import hashlib
import io
import itertools
import math
import reprlib
import sys
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pooch

from elmo_jax._moved import renamed_arguments
from elmo_jax.config import DataConfig, TextConfig
from elmo_jax.data.batching import Documents
from elmo_jax.data.sample_corpus import CLASSES, sample_corpus
from elmo_jax.data.text import Vocabulary, decode, make_tokenizer, read_text
from elmo_jax.errors import InputError
from elmo_jax.storage.files import read_arrays, read_bytes

_CACHED_ARRAYS = ("codes", "offsets", "lines", "blank")
_CACHED_TEXTS = ("tokens", "labels", "header", "delimiter")  # NUL-separated
_CACHE_VERSION = 5  # increase it when reading, cleaning or tokenizing changes
_AG_NEWS = "https://raw.githubusercontent.com/mhjabreel/CharCnn_Keras/master/data/ag_news_csv/"
_AG_NEWS_MD5 = {
    "train.csv": "b1a00f826fdfbd249f79597b59e1dc12",
    "test.csv": "d52ea96a97a2d943681189a97654912d",
}

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_USUAL_LABEL_NAMES = {"label", "class", "class index", "category", "target"}

_Row = tuple[int, list[str]]  # line number and cells


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test documents with the vocabulary of the training documents."""

    classes: tuple[str, ...]
    vocabulary: Vocabulary
    train: Documents
    validation: Documents
    test: Documents

    @property
    def digest(self) -> str:
        """SHA-256 of the classes, the vocabulary and all documents."""
        hashed = hashlib.sha256("\n".join([*self.classes, "", *self.vocabulary.tokens]).encode())
        for part in (self.train, self.validation, self.test):
            for array in (part.ids, part.lengths, part.labels):
                hashed.update(array.tobytes())
        return hashed.hexdigest()


@renamed_arguments(spelled="with_characters")
def load_dataset(
    config: DataConfig, vocabulary: Vocabulary | None = None, with_characters: bool = False, keep: bool = True
) -> Dataset:
    """Read, tokenize and split labelled texts; the same config gives the same dataset.

    Args:
        config: Data set, and the conversion of its texts into token ids.
        vocabulary: Vocabulary of the token ids; None builds one from the training documents.
        with_characters: Add the character ids of every word.
        keep: Save the tokens of CSV files in the user's cache.

    Raises:
        InputError: A file is missing or wrong; the message names its line.

    Examples:
        >>> data = load_dataset(DataConfig())
        >>> data.classes, len(data.train), len(data.validation), len(data.test)
        (('World', 'Sports', 'Business', 'Sci/Tech'), 2240, 560, 700)
    """
    train_texts, test_texts, names = _read_parts(config, keep)
    _check_labels(train_texts, config)
    class_ids = _number_classes(train_texts.labels, names)
    limit = config.max_length
    train, test = (
        Documents(texts.codes, texts.offsets, _convert_labels(texts, class_ids), max_length=limit)
        for texts in (train_texts, test_texts)
    )
    count = sum(int((np.diff(part.offsets) > limit).sum()) for part in (train, test))
    if count:
        warnings.warn(f"{count} texts are longer than {limit} tokens (max_length) and are cut", stacklevel=3)
    train_indices, validation_indices = _split(train_texts, train.labels, config)
    is_given = vocabulary is not None
    if vocabulary is None:
        counts = np.bincount(train.take(train_indices).ids, minlength=len(train_texts.tokens)).tolist()
        by_token = dict(zip(train_texts.tokens, counts, strict=True))
        vocabulary = Vocabulary.from_counts(by_token, config.min_count, config.max_vocab)
    train = train.with_vocabulary(train_texts.tokens, vocabulary, with_characters)
    test = test.with_vocabulary(test_texts.tokens, vocabulary, with_characters)
    parts = train.take(train_indices), train.take(validation_indices), test.take(np.arange(len(test)))
    if is_given and not with_characters and parts[0].unknown_fraction == 1:
        raise InputError(f"{train_texts.path}: no token is in the vocabulary; check its language and case")
    return Dataset(names or tuple(class_ids), vocabulary, *parts)


@dataclass(frozen=True)
class Examples:
    """Tokenized examples of one file; example n is ``codes[offsets[n]:offsets[n + 1]]``."""

    path: str  # named in messages
    tokens: list[str]  # unique tokens, in the order of their first occurrence
    codes: np.ndarray  # int32 indices into `tokens`, all examples end to end
    offsets: np.ndarray  # int64 [N + 1]
    labels: list[str]  # as written in the file
    lines: np.ndarray  # int64 [N], the line on which each example begins
    blank: np.ndarray  # int64, line numbers of the rows left out because they have no tokens
    header: tuple[str, ...] = ()  # cells of the header; empty if the file has none
    delimiter: str = ","


def _read_parts(config: DataConfig, keep: bool) -> tuple[Examples, Examples, tuple[str, ...] | None]:
    """Return the training texts, the test texts, and the class names or None."""
    if config.data_dir is not None and config.dataset != "ag_news":
        raise InputError("`data_dir` needs `dataset` ag_news; add that, or give the folder as `dataset`")
    if config.dataset == "sample":
        parts = ([(i, CLASSES[t.label], t.text) for i, t in enumerate(part, 1)] for part in sample_corpus())
        train, test = (_tokenize_examples(part, "sample", config.text_config()) for part in parts)
        return train, test, CLASSES
    if config.dataset == "ag_news":
        folder = _download_ag_news() if config.data_dir is None else Path(config.data_dir)
        names: tuple[str, ...] | None = CLASSES
    else:
        folder = Path(config.dataset)
        path = folder / "classes.txt"
        names = _read_class_names(path) if path.is_file() else None
    train_path, test_path = find_parts(folder)
    train = read_csv(train_path, config, keep=keep)
    config = replace(config, delimiter=train.delimiter)
    return train, read_csv(test_path, config, train.header, keep), names


def read_training_texts(config: DataConfig) -> Examples:
    """Return the tokenized training texts of a data set.

    Raises:
        InputError: A file is missing or wrong; the message names its line.
    """
    return _read_parts(config, keep=True)[0]


def _read_class_names(path: Path) -> tuple[str, ...]:
    names = tuple(name.strip() for name in read_text(path).split("\n") if name.strip())
    if not names:
        raise InputError(f"{path}: is empty; write one class name per line, or remove the file")
    if len(set(names)) < len(names):
        raise InputError(f"{path}: names a class twice; remove one of the lines")
    return names


def _download_ag_news() -> Path:
    """Return the folder of AG News in the user's cache, after downloading and checking the files."""
    folder = Path(pooch.os_cache("elmo_jax")) / "ag_news"
    for name, md5 in _AG_NEWS_MD5.items():
        try:
            downloader: Any = pooch.HTTPDownloader(progressbar=True, timeout=30)
            pooch.retrieve(_AG_NEWS + name, f"md5:{md5}", name, folder, downloader=downloader)
        except (OSError, ValueError) as error:
            problem = f"ag_news: {name} could not be downloaded ({' '.join(str(error).split())[:100]})"
            raise InputError(f"{problem}; give a folder with train.csv and test.csv as `data_dir`") from None
    return folder


def find_parts(folder: Path) -> tuple[Path, Path]:
    """Return the paths of train.csv and test.csv, or their ``.gz``; raise InputError if one is missing."""
    if not folder.is_dir():
        remedy = "give one that holds train.csv and test.csv, or sample or ag_news"
        raise InputError(f"{folder}: no such folder; {remedy}")
    found = []
    for name in ("train.csv", "test.csv"):
        paths = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        if not paths:
            remedy = "the folder must hold train.csv and test.csv (or .csv.gz)"
            raise InputError(f"{folder / name}: no such file; {remedy}")
        found.append(paths[0])
    return found[0], found[1]


def _check_labels(train: Examples, config: DataConfig) -> None:
    """Raise InputError for a single class, and for labels that look like texts or row numbers."""
    classes, rows = len(set(train.labels)), len(train.labels)
    if classes == 1 < rows:
        problem = f"all rows have the label {reprlib.repr(train.labels[0])}"
        raise InputError(f"{train.path}: {problem}; at least two classes are needed")
    if 2 * classes > rows > 3:
        problem = f"is taken as the label, but has {classes} values in {rows} rows"
        header = f" (header: {', '.join(map(reprlib.repr, train.header))})" if train.header else ""
        remedy = "set `label_column` and `text_columns`"
        raise InputError(f"{train.path}: column {config.label_column or 1} {problem}{header}; {remedy}")


def _number_classes(labels: Iterable[str], names: tuple[str, ...] | None) -> dict[str, int]:
    """Map each label to a class number, in the order of `names` if given, else of the sorted labels."""
    unique = set(labels)
    integers = all(label.isdecimal() and len(label) < 19 for label in unique)
    if names is None:
        # The second key gives "01" and "1" the same order in every process.
        names = tuple(sorted(unique, key=lambda label: (int(label) if integers else 0, label)))
    elif integers and not unique <= set(names):
        base = 0 if "0" in unique else 1
        names = tuple(str(i + base) for i in range(len(names)))
    return {name: i for i, name in enumerate(names)}


def _convert_labels(texts: Examples, class_ids: dict[str, int]) -> np.ndarray:
    for line, label in zip(texts.lines, texts.labels, strict=True):
        if label not in class_ids:
            known = ", ".join(map(reprlib.repr, sorted(class_ids)[:10]))
            problem = f"label {reprlib.repr(label)} is not one of {known}"
            raise InputError(f"{texts.path}:{line}: {problem}; fix or remove the row")
    return np.array([class_ids[label] for label in texts.labels], np.int32)


def _split(train: Examples, labels: np.ndarray, config: DataConfig) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted indices of training and validation texts, stratified by class."""
    counts = np.bincount(labels)
    if 1 in counts[labels]:
        i = int(np.argmax(counts[labels] == 1))
        problem = f"is the only row of class {reprlib.repr(train.labels[i])}"
        raise InputError(f"{train.path}:{train.lines[i]}: {problem}; add another, or remove it")
    from sklearn.model_selection import train_test_split  # takes 80 MB with SciPy

    indices, options = np.arange(len(labels)), {"random_state": config.split_seed, "stratify": labels}
    try:
        training, validation = train_test_split(indices, test_size=config.validation, **options)
    except ValueError:  # raised if a part has fewer texts than there are classes
        problem = f"{len(labels)} rows of {np.count_nonzero(counts)} classes are too few to split"
        raise InputError(f"{train.path}: {problem}; give more rows, or another `validation`") from None
    return np.sort(training), np.sort(validation)


def read_csv(
    path: Path, config: DataConfig, header: tuple[str, ...] | None = None, keep: bool = True
) -> Examples:
    """Read and tokenize a CSV file of labels and texts, or load its cached tokens.

    Args:
        path: CSV file, which may end in ``.gz``. A header is skipped.
        config: Columns, delimiter, and treatment of markup and blank texts.
        header: Cells of the training file's header, which the first row may repeat. If None, the first row
            is a header if it contains the column names of `config`. If `config` has no names, the first row
            is a header if its label is not an integer and occurs in no other row.
        keep: Save the tokens in the user's cache.

    Raises:
        InputError: The file or a row is wrong; the message names the line.
    """
    data = read_bytes(path)
    columns = config.label_column, config.text_columns, config.text, config.delimiter
    key = f"{_CACHE_VERSION} {columns} {config.text_config()} {header} ".encode() + data
    cache = cache_folder() / f"{hashlib.sha256(key).hexdigest()[:32]}.npz"
    texts = _load_cache(cache, path)
    if texts is None:
        texts = _parse_examples(data, path, config, header)
        if keep:
            _save_cache(texts, cache)
    _check_blank(texts, config.skip_blank)
    if header is None and texts.header and not _column_names(config):
        label = texts.header[_find_columns(texts.header, config, path)[0]]
        if label.lower() not in _USUAL_LABEL_NAMES:
            problem = f"is taken as the header, since no other row has the label {reprlib.repr(label)}"
            warnings.warn(f"{path}:1: {problem}; if it is a text, add a header above it", stacklevel=4)
    return texts


def _parse_examples(data: bytes, path: Path, config: DataConfig, header: tuple[str, ...] | None) -> Examples:
    text = decode(data, path)
    delimiter = find_delimiter(text) if config.delimiter is None else check_delimiter(config.delimiter)
    rows = _parse_csv(text, path, delimiter)
    first = tuple(cell.strip() for cell in rows[0][1])
    names = _column_names(config)
    is_named = bool(names) and names <= set(first)
    label, texts = _find_columns(header if header and names and not is_named else first, config, path)
    if max(label, *texts) >= len(first):
        raise InputError(
            f"{path}:{rows[0][0]}: {len(first)} columns, fewer than in train.csv; add the others"
        )
    if header is None:
        others = {cells[label].strip() for _, cells in rows[1:]}
        is_guessed = bool(first[label]) and not first[label].lstrip("+-").isdecimal()
        is_header = is_named or (is_guessed and first[label] not in others)
    else:
        is_header = is_named or first == header
    if len(rows) == is_header:
        raise InputError(f"{path}: holds no rows below its header; write them as label,text")
    examples = (
        (line, cells[label].strip(), " ".join(cells[i] for i in texts)) for line, cells in rows[is_header:]
    )
    tokenized = _tokenize_examples(examples, str(path), config.text_config())
    return replace(tokenized, header=first if is_header else (), delimiter=delimiter)


def check_delimiter(name: str) -> str:
    """Return a delimiter given as one character or as "tab"; raise InputError for anything else."""
    delimiter = {"tab": "\t", "\\t": "\t"}.get(name, name)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise InputError(f"`delimiter` is {reprlib.repr(name)}; give one character, or tab")
    return delimiter


def find_delimiter(text: str) -> str:
    """Guess the delimiter from the first 100 rows.

    It must give all rows the same number of columns. Among several, choose the one with which some column
    has the fewest distinct values (at least two), then the one with the shortest values.
    """

    def measure_labels(delimiter: str) -> tuple[float, int]:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            rows = [cells for cells in itertools.islice(reader, 100) if cells]
            columns = [set(column) for column in zip(*rows, strict=True)]
        except (csv.Error, ValueError):  # raised if the text is not CSV or its rows differ in width
            return math.inf, 0
        labels = [(len(values), sum(map(len, values))) for values in columns if len(values) > 1]
        return min(labels, default=(math.inf, 0)) if len(columns) > 1 else (math.inf, 0)

    csv.field_size_limit(sys.maxsize)  # long texts are cut later, with a warning
    return min(_DELIMITERS, key=measure_labels)


def _parse_csv(text: str, path: Path, delimiter: str) -> list[_Row]:
    """Return the line number and the cells of each row, without blank rows; check that widths are equal."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[_Row] = []
    line = 1
    try:
        for cells in reader:
            if cells:
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{path}:{line}: not a row of CSV ({error}); check its quotes") from None
    if not rows:
        raise InputError(f"{path}: holds no rows; write them as label,text")
    width = max(2, len(rows[0][1]))
    for line, cells in rows:
        if len(cells) != width:  # probably an unquoted delimiter
            columns = "1 column" if len(cells) == 1 else f"{len(cells)} columns"
            remedy = f"check quoting and {_DELIMITERS.get(delimiter, repr(delimiter))}"
            raise InputError(f"{path}:{line}: {columns}, expected {width}; {remedy}")
    return rows


def _column_names(config: DataConfig) -> set[str]:
    """Return the columns of `config` that are given by name, not by number."""
    given = (config.label_column, *(config.text_columns or ()))
    return {name for name in given if name is not None and not name.isdecimal()}


def find_column(name: str, cells: Sequence[str], path: str | Path) -> int:
    """Return the index of a column.

    Args:
        name: Name in the header, or number from 1.
        cells: Header, or any row if `name` is a number.
        path: File that messages name.

    Raises:
        InputError: There is no such column, or more than one.
    """
    numbers = [str(i + 1) for i in range(len(cells))]
    if name in numbers:
        return numbers.index(name)
    if cells.count(name) != 1:
        problem, known = "more than one" if name in cells else "no", ", ".join(map(reprlib.repr, cells))
        problem = f"{problem} column {reprlib.repr(name)} in {known}"
        raise InputError(f"{path}:1: {problem}; give a name, or a number from 1 to {len(cells)}")
    return cells.index(name)


def _find_columns(cells: Sequence[str], config: DataConfig, path: Path) -> tuple[int, list[int]]:
    """Return the index of the label column and the indices of the text columns."""
    label = find_column(config.label_column or "1", cells, path)
    others = [i for i in range(len(cells)) if i != label]
    texts = others if config.text == "title+description" else others[-1:]
    if config.text_columns is not None:
        texts = [find_column(name, cells, path) for name in config.text_columns]
    if label in texts or not texts:
        raise InputError(f"{path}: column {label + 1} is the label; give other columns as `text_columns`")
    return label, texts


def _tokenize_examples(examples: Iterable[tuple[int, str, str]], path: str, text: TextConfig) -> Examples:
    """Tokenize examples of (line number, label, text); messages name `path`."""
    tokenizer = make_tokenizer(text)
    code_of: dict[str, int] = {}
    codes: list[np.ndarray] = []
    labels, lines, blank, unlabelled = [], [], [], []
    for line, label, example in examples:
        tokens = tokenizer(example)
        if not tokens:
            blank.append(line)
            continue
        if not label:
            unlabelled.append(line)
        codes.append(np.array([code_of.setdefault(token, len(code_of)) for token in tokens], np.int32))
        labels.append(label)
        lines.append(line)
    if unlabelled:
        problem = "the label is empty; fix or remove the row"
        raise InputError(f"{path}:{_join_lines(unlabelled)}: {problem}{'s' * (len(unlabelled) > 1)}")
    offsets = np.cumsum([0, *map(len, codes)], dtype=np.int64)
    joined = np.concatenate([np.zeros(0, np.int32), *codes])
    return Examples(path, list(code_of), joined, offsets, labels, np.array(lines), np.array(blank, np.int64))


def _check_blank(texts: Examples, skip: bool) -> None:
    """Raise InputError for texts without tokens, or warn that they are left out."""
    count = len(texts.blank)
    if count and not skip:
        problem = "the text has no tokens" if count == 1 else f"{count} texts have no tokens"
        remedy = f"remove the row{'s' * (count > 1)}, or pass skip_blank=True"
        raise InputError(f"{texts.path}:{_join_lines(texts.blank)}: {problem}; {remedy}")
    if not texts.labels:
        raise InputError(f"{texts.path}: no row has a text; write them as label,text")
    if count:
        where = f"{texts.path}:{_join_lines(texts.blank)}"
        warnings.warn(
            f"{where}: {count} of {count + len(texts.labels)} texts are blank and left out", stacklevel=5
        )


def _join_lines(lines: Sequence[int] | np.ndarray) -> str:
    """Join up to ten line numbers, and count the others."""
    more = f" and {len(lines) - 10} more" if len(lines) > 10 else ""
    return ", ".join(map(str, lines[:10])) + more


def cache_folder() -> Path:
    """Return the folder of cached tokens."""
    return Path(pooch.os_cache("elmo_jax")) / "tokens"


def _save_cache(texts: Examples, cache: Path) -> None:
    joined = {name: "\0".join(getattr(texts, name)).encode() for name in _CACHED_TEXTS}
    arrays: dict[str, Any] = {name: np.frombuffer(text, np.uint8) for name, text in joined.items()}
    arrays |= {name: getattr(texts, name) for name in _CACHED_ARRAYS}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache.parent) as folder:  # no reader sees a partial file
            part = Path(folder) / cache.name
            np.savez_compressed(part, **arrays)
            part.replace(cache)
    except OSError as error:
        warnings.warn(f"{cache.parent}: tokens are not cached ({error.strerror})", stacklevel=2)


def _load_cache(cache: Path, path: Path) -> Examples | None:
    """Return cached tokens, or None if they are missing or damaged."""
    try:
        codes, offsets, lines, blank, *joined = read_arrays(cache, (*_CACHED_ARRAYS, *_CACHED_TEXTS))
        tokens, labels, header, (delimiter,) = (text.tobytes().decode().split("\0") for text in joined)
    except ValueError:
        return None
    cells = () if header == [""] else tuple(header)
    labels = labels if len(lines) else []
    return Examples(str(path), tokens, codes, offsets, labels, lines, blank, cells, delimiter)
