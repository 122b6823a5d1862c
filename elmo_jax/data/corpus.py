"""Large texts, a sentence a line, as memory-mapped ids that are made once.

Nouns: a *shard* is one text file of a corpus, perhaps gzipped; a *store* is the folder that
holds the ids of all its shards, end to end; a *portion* is what the shards begin with.
"""

import contextlib
import glob
import gzip
import hashlib
import json
import os
import warnings
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pooch
from filelock import FileLock

from elmo_jax.data.batching import Documents
from elmo_jax.data.characters import character_id_table
from elmo_jax.data.text import UNK, Vocabulary, decode
from elmo_jax.errors import InputError
from elmo_jax.storage.files import write_atomically

_VERSION = 1  # of the store's layout
_MOST_UNKNOWN = 1 << 20  # unknown words that keep their spelling; the others are read as <UNK>
_BUFFER = 1 << 20  # ids written at once
_TELL = 1000  # lines after which progress is told

OnBytes = Callable[[int], None]
_ignore: OnBytes = lambda n: None  # noqa: E731


def find_shards(pattern: str) -> list[Path]:
    """The files of a glob pattern, sorted.

    Raises:
        InputError: there are none.
    """
    paths = sorted(Path(name) for name in glob.glob(os.path.expanduser(pattern), recursive=True))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise InputError(f"{pattern}: matches no file; quote the pattern and check it")
    return paths


def corpus_bytes(pattern: str) -> int:
    """Bytes of all shards, as they are on disk."""
    return sum(path.stat().st_size for path in find_shards(pattern))


def count_words(
    pattern: str, on_bytes: OnBytes = _ignore, folder: Path | None = None, keep: bool = True
) -> dict[str, int]:
    """How often each token stands in a corpus; counted once, and kept beside the stores.

    Args:
        pattern: a glob of texts, as for `load_corpus`.
        on_bytes: hears how many bytes of the shards were read.
        folder: where stores are kept; the user's cache if None.
        keep: whether to write down what was counted.

    Raises:
        InputError: no file matches, or one cannot be read; with the line.
    """
    shards = find_shards(pattern)
    path = _root(folder) / f"{_key(shards, 'counts')}.counts"
    with contextlib.ExitStack() as held:
        if keep:  # another process may be counting the same corpus
            with contextlib.suppress(OSError):  # told below, if it stays so
                path.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(f"{path}.lock"))
        kept = _read_counts(path)
        if kept is not None:
            on_bytes(corpus_bytes(pattern))
            return kept
        counts: Counter[str] = Counter()
        for shard in shards:
            for words in _sentences(shard, on_bytes):
                counts.update(words)
        if keep:
            _keep_counts(path, counts)
    return dict(counts)


def _keep_counts(path: Path, counts: Counter[str]) -> None:
    lines = "".join(f"{n} {word}\n" for word, n in counts.items())
    seal = hashlib.sha256(lines.encode()).hexdigest()
    try:
        write_atomically(path, f"{seal}\n{lines}")
    except OSError as error:
        warnings.warn(f"{path.parent}: counts of words are not kept ({error.strerror})", stacklevel=3)


def _read_counts(path: Path) -> dict[str, int] | None:
    """What was kept, or None if that is nothing, or damaged."""
    try:
        seal, _, lines = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    if seal.decode(errors="replace") != hashlib.sha256(lines).hexdigest():
        return None
    pairs = (line.split(" ") for line in lines.decode().split("\n")[:-1])
    return {word: int(n) for n, word in pairs}


def read_portion(
    pattern: str, vocabulary: Vocabulary, with_characters: bool, tokens: int
) -> tuple[Documents, float]:
    """The first sentences of a corpus, about that many tokens, in memory; nothing is written.

    Returns:
        The documents, and what share of the corpus they are, by its bytes.

    Raises:
        InputError: no file matches, one cannot be read, or there is no sentence.
    """
    shards = find_shards(pattern)
    ids, offsets, unknown = array("i"), array("q", [0]), {}
    read: list[int] = []
    for shard in shards:
        if len(ids) >= tokens:
            break
        with contextlib.closing(_sentences(shard, read.append)) as sentences:
            for words in sentences:
                ids.extend(_number(words, vocabulary, unknown))
                offsets.append(len(ids))
                if len(ids) >= tokens:
                    break
    if not ids:
        raise InputError(f"{shards[0]}: the corpus holds no sentence; give a text with some")
    made = np.asarray(ids, np.int32), np.asarray(offsets, np.int64)
    share = sum(read) / corpus_bytes(pattern)
    return _documents(*made, vocabulary, unknown if with_characters else None), share


def load_corpus(
    pattern: str,
    vocabulary: Vocabulary,
    with_characters: bool = False,
    on_bytes: OnBytes = _ignore,
    folder: Path | None = None,
) -> Documents:
    """A corpus as documents, a line each, on disk rather than in memory.

    The first call writes the store, shard by shard; one that was stopped goes on at the
    shard it was at, and later calls find it whole.

    Args:
        pattern: a glob of UTF-8 texts, a tokenised sentence a line; ``.gz`` too.
        vocabulary: the numbering.
        spelled: whether documents bring character ids.
        on_bytes: hears how many bytes of the shards were read.
        folder: where stores are kept; the user's cache if None.

    Raises:
        InputError: no file matches, or one cannot be read; with the line.
    """
    shards = find_shards(pattern)
    key, root = _key(shards, "\n".join(vocabulary.tokens)), _root(folder)
    store = root / key
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{key}.lock"):  # another process may be numbering the same corpus
            done = _fill(store, shards, vocabulary, on_bytes)
    except OSError as error:
        raise InputError(f"{store}: cannot be written ({error.strerror}); make room and go on") from None
    unknown = (store / "unknown.txt").read_text(encoding="utf-8").split("\n")[:-1]
    sizes = [(store / name).stat().st_size for name in ("ids", "offsets")]
    if sizes != [4 * done["ids"], 8 * done["offsets"]]:
        raise InputError(f"{store}: is damaged; remove that folder, and it is made anew")
    ids = np.memmap(store / "ids", np.int32, "r")
    offsets = np.memmap(store / "offsets", np.int64, "r")
    return _documents(ids, offsets, vocabulary, unknown if with_characters else None)


def _documents(
    ids: np.ndarray, offsets: np.ndarray, vocabulary: Vocabulary, unknown: Iterable[str] | None
) -> Documents:
    """Documents without classes; they bring spellings if the unknown words are given."""
    spellings = None if unknown is None else character_id_table([*vocabulary.tokens, *unknown])
    labels = np.broadcast_to(np.int32(0), len(offsets) - 1)
    return Documents(ids, offsets, labels, spellings, len(vocabulary))


def _root(folder: Path | None) -> Path:
    return folder if folder is not None else Path(pooch.os_cache("elmo_jax")) / "corpora"


def _key(shards: list[Path], more: str) -> str:
    """A name for what is made of these shards as they are now."""
    about = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in shards]
    return hashlib.sha256(json.dumps([_VERSION, about, more]).encode()).hexdigest()[:32]


def _fill(store: Path, shards: list[Path], vocabulary: Vocabulary, on_bytes: OnBytes) -> dict[str, Any]:
    """Append the shards that are missing; after each, say in one atomic write that it is there."""
    store.mkdir(parents=True, exist_ok=True)
    mark = store / "done.json"
    done: dict[str, Any] = {"shards": 0, "ids": 0, "offsets": 1, "unknown": 0}
    if mark.exists():
        done = json.loads(mark.read_text())
    else:
        np.zeros(1, np.int64).tofile(store / "offsets")
        (store / "ids").touch()
        write_atomically(store / "unknown.txt", "")
    for number, shard in enumerate(shards):
        if number < done["shards"]:
            on_bytes(shard.stat().st_size)
            continue
        done = _append(store, shard, vocabulary, done, on_bytes)
        write_atomically(mark, json.dumps(done) + "\n")
    if not done["ids"]:
        raise InputError(f"{shards[0]}: the corpus holds no sentence; give a text with some")
    return done


def _append(
    store: Path, shard: Path, vocabulary: Vocabulary, done: dict[str, Any], on_bytes: OnBytes
) -> dict[str, Any]:
    for name, width in (("ids", 4), ("offsets", 8)):  # what a stop left of this shard
        os.truncate(store / name, done[name] * width)
    unknown = (store / "unknown.txt").read_text(encoding="utf-8").split("\n")[: done["unknown"]]
    numbers = {word: len(vocabulary) + i for i, word in enumerate(unknown)}
    total, sentences = done["ids"], done["offsets"]
    ids, offsets = array("i"), array("q")
    with (store / "ids").open("ab") as ids_file, (store / "offsets").open("ab") as offsets_file:

        def flush() -> None:
            ids.tofile(ids_file)
            offsets.tofile(offsets_file)
            del ids[:], offsets[:]

        for words in _sentences(shard, on_bytes):
            ids.extend(_number(words, vocabulary, numbers))
            total += len(words)
            sentences += 1
            offsets.append(total)
            if len(ids) > _BUFFER:
                flush()
        flush()
        for file in (ids_file, offsets_file):  # on the disk before anything says that they are
            file.flush()
            os.fsync(file.fileno())
    write_atomically(store / "unknown.txt", "".join(f"{word}\n" for word in numbers))
    return {"shards": done["shards"] + 1, "ids": total, "offsets": sentences, "unknown": len(numbers)}


def _number(words: list[str], vocabulary: Vocabulary, unknown: dict[str, int]) -> Iterator[int]:
    """Ids of words; those that are not in the vocabulary get numbers behind it as they are met."""
    for i, word in zip(vocabulary.ids(words).tolist(), words, strict=True):
        if i == UNK and (word in unknown or len(unknown) < _MOST_UNKNOWN):
            i = unknown.setdefault(word, len(vocabulary) + len(unknown))
        yield i


def _sentences(shard: Path, on_bytes: OnBytes) -> Generator[list[str], None, None]:
    """The tokens of every line that has some; `on_bytes` hears of the shard's bytes as it is read."""
    number = told = 0
    try:
        with shard.open("rb") as raw, gzip.open(raw) if shard.suffix == ".gz" else raw as file:
            try:
                for line in file:
                    number += 1
                    if number % _TELL == 0:
                        on_bytes(raw.tell() - told)
                        told = raw.tell()
                    words = decode(line, shard, number).split()
                    if words:
                        yield words
            finally:
                on_bytes(raw.tell() - told)
    except (OSError, EOFError, zlib.error) as error:
        where = f"{shard}:{number}" if number else f"{shard}"
        raise InputError(f"{where}: cannot be read ({error}); check the file") from None
