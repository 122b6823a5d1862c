"""Large text corpora, one sentence per line, converted once to memory-mapped token ids.

A shard is one text file of a corpus; a store is the folder with the ids of all its shards.
"""

import contextlib
import glob
import hashlib
import itertools
import json
import os
import warnings
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import pooch
from filelock import FileLock

from elmo_jax.data.batching import Documents
from elmo_jax.data.characters import character_id_table
from elmo_jax.data.text import UNK, OnBytes, Vocabulary, raw_lines
from elmo_jax.errors import InputError
from elmo_jax.storage.files import write_atomically

_VERSION = 1  # of the store's layout
# Maximum number of out-of-vocabulary words with an id and characters of their own; later ones become <UNK>.
_MAX_UNKNOWN = 1 << 20


def find_shards(pattern: str) -> list[Path]:
    """Return the files that match a glob pattern, sorted.

    Raises:
        InputError: No file matches.
    """
    paths = map(Path, glob.glob(os.path.expanduser(pattern), recursive=True))
    files = sorted(path for path in paths if path.is_file())
    if not files:
        raise InputError(f"{pattern}: matches no file; quote the pattern and check it")
    return files


def corpus_bytes(pattern: str) -> int:
    """Return the size of all shards on disk."""
    return sum(path.stat().st_size for path in find_shards(pattern))


def count_words(
    pattern: str, on_bytes: OnBytes = lambda n: None, folder: Path | None = None, keep: bool = True
) -> dict[str, int]:
    """Count the tokens of a corpus, or read the counts of an earlier call.

    Args:
        pattern: Glob of text files.
        on_bytes: Called with the number of bytes read.
        folder: Folder of the saved counts; the user's cache folder if None.
        keep: Save the counts for the next call.

    Raises:
        InputError: No file matches, or one cannot be read.
    """
    shards = find_shards(pattern)
    path = _stores_folder(folder) / f"{_hash_inputs(shards, 'JSON counts')}.counts"
    with contextlib.ExitStack() as stack:
        if keep:  # another process may be counting the same corpus
            with contextlib.suppress(OSError):  # an unwritable folder gives a warning below
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(f"{path}.lock"))
        with contextlib.suppress(OSError, ValueError):  # missing or damaged
            saved = json.loads(path.read_text(encoding="utf-8"))
            on_bytes(corpus_bytes(pattern))
            return saved
        sentences = (words for shard in shards for words in _sentences(shard, on_bytes))
        counts = Counter(itertools.chain.from_iterable(sentences))
        if keep:
            try:
                write_atomically(path, json.dumps(counts))
            except OSError as error:
                warnings.warn(f"{path.parent}: word counts are not cached ({error.strerror})", stacklevel=2)
    return dict(counts)


def read_beginning(
    pattern: str, vocabulary: Vocabulary, with_characters: bool, tokens: int
) -> tuple[Documents, float]:
    """Read the first sentences of a corpus, about `tokens` tokens, into memory.

    Returns:
        The documents, and the fraction of the corpus's bytes that was read.

    Raises:
        InputError: No file matches, one cannot be read, or there is no sentence.
    """
    shards = find_shards(pattern)
    ids, offsets, unknown = array("i"), array("q", [0]), {}
    bytes_read: list[int] = []
    sentences = (words for shard in shards for words in _sentences(shard, bytes_read.append))
    with contextlib.closing(sentences):
        for words in sentences:
            ids.extend(_number_words(words, vocabulary, unknown))
            offsets.append(len(ids))
            if len(ids) >= tokens:
                break
    if not ids:
        raise InputError(f"{pattern}: the corpus holds no sentence; give a text with some")
    arrays = np.asarray(ids, np.int32), np.asarray(offsets, np.int64)
    documents = _make_documents(*arrays, vocabulary, unknown if with_characters else None)
    _check_known(documents, pattern)
    return documents, sum(bytes_read) / corpus_bytes(pattern)


def load_corpus(
    pattern: str,
    vocabulary: Vocabulary,
    with_characters: bool = False,
    on_bytes: OnBytes = lambda n: None,
    folder: Path | None = None,
) -> Documents:
    """Load a corpus as memory-mapped documents, one per line.

    The first call writes the store, shard by shard. An interrupted call continues at the shard
    it stopped in; later calls open the complete store.

    Args:
        pattern: Glob pattern of UTF-8 texts, one tokenized sentence per line; ``.gz`` too.
        vocabulary: Token ids.
        with_characters: Add the character ids of every word.
        on_bytes: Called regularly with the number of bytes read since the last call.
        folder: Folder of all stores; the user's cache if None.

    Raises:
        InputError: No file matches, one cannot be read, or the store cannot be written or is damaged.
    """
    shards = find_shards(pattern)
    root = _stores_folder(folder)
    store = root / _hash_inputs(shards, "\n".join(vocabulary.tokens))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{store}.lock"):  # another process may be converting the same corpus
            done = _fill_store(store, shards, vocabulary, on_bytes)
    except OSError as error:
        raise InputError(
            f"{store}: cannot be written ({error.strerror}); free space or fix permissions"
        ) from None
    if not done["ids"]:
        raise InputError(f"{pattern}: the corpus holds no sentence; give a text with some")
    unknown = (store / "unknown.txt").read_text(encoding="utf-8").split("\n")[:-1]
    sizes = [(store / name).stat().st_size for name in ("ids", "offsets")]
    if sizes != [4 * done["ids"], 8 * done["offsets"]]:
        raise InputError(f"{store}: is damaged; remove the folder to convert the corpus again")
    ids = np.memmap(store / "ids", np.int32, "r")
    offsets = np.memmap(store / "offsets", np.int64, "r")
    documents = _make_documents(ids, offsets, vocabulary, unknown if with_characters else None)
    _check_known(documents, pattern)
    return documents


def _check_known(documents: Documents, pattern: str) -> None:
    if documents.unknown_fraction == 1:
        raise InputError(f"{pattern}: no word is in the vocabulary; check its language and case")


def _make_documents(
    ids: np.ndarray, offsets: np.ndarray, vocabulary: Vocabulary, unknown: Iterable[str] | None
) -> Documents:
    """Return unlabelled documents, with character ids if the out-of-vocabulary words are given."""
    characters = None if unknown is None else character_id_table([*vocabulary.tokens, *unknown])
    labels = np.broadcast_to(np.int32(0), len(offsets) - 1)
    return Documents(ids, offsets, labels, characters, len(vocabulary))


def _stores_folder(folder: Path | None) -> Path:
    return folder if folder is not None else Path(pooch.os_cache("elmo_jax")) / "corpora"


def _hash_inputs(shards: list[Path], extra: str) -> str:
    """Return a file name for anything computed from these shards in their current state."""
    states = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in shards]
    return hashlib.sha256(json.dumps([_VERSION, states, extra]).encode()).hexdigest()[:32]


def _fill_store(store: Path, shards: list[Path], vocabulary: Vocabulary, on_bytes: OnBytes) -> dict[str, int]:
    """Append the missing shards; ``done.json`` holds the number of complete shards and of their ids."""
    store.mkdir(parents=True, exist_ok=True)
    progress = store / "done.json"
    if progress.exists():
        done = json.loads(progress.read_text())
    else:
        done = {"shards": 0, "ids": 0, "offsets": 1, "unknown": 0}
        np.zeros(1, np.int64).tofile(store / "offsets")
        (store / "ids").touch()
        write_atomically(store / "unknown.txt", "")
    for number, shard in enumerate(shards):
        if number < done["shards"]:
            on_bytes(shard.stat().st_size)
            continue
        done = _append_shard(store, shard, vocabulary, done, on_bytes)
        write_atomically(progress, json.dumps(done) + "\n")
    return done


def _append_shard(
    store: Path, shard: Path, vocabulary: Vocabulary, done: dict[str, int], on_bytes: OnBytes
) -> dict[str, int]:
    for name, width in (("ids", 4), ("offsets", 8)):  # remove what an interrupted call wrote of this shard
        os.truncate(store / name, done[name] * width)
    known = (store / "unknown.txt").read_text(encoding="utf-8").split("\n")[: done["unknown"]]
    unknown = {word: len(vocabulary) + i for i, word in enumerate(known)}
    total = done["ids"]
    with (store / "ids").open("ab") as ids_file, (store / "offsets").open("ab") as offsets_file:
        for words in _sentences(shard, on_bytes):
            array("i", _number_words(words, vocabulary, unknown)).tofile(ids_file)
            total += len(words)
            array("q", [total]).tofile(offsets_file)
        for file in (ids_file, offsets_file):  # on disk before done.json counts them
            file.flush()
            os.fsync(file.fileno())
        offsets_written = offsets_file.tell() // 8
    write_atomically(store / "unknown.txt", "".join(f"{word}\n" for word in unknown))
    return {"shards": done["shards"] + 1, "ids": total, "offsets": offsets_written, "unknown": len(unknown)}


def _number_words(words: list[str], vocabulary: Vocabulary, unknown: dict[str, int]) -> Iterator[int]:
    """Yield ids; an out-of-vocabulary word gets the next id after the vocabulary when it first occurs."""
    for i, word in zip(vocabulary.ids(words).tolist(), words, strict=True):
        if i == UNK and (word in unknown or len(unknown) < _MAX_UNKNOWN):
            i = unknown.setdefault(word, len(vocabulary) + len(unknown))
        yield i


def _sentences(shard: Path, on_bytes: OnBytes) -> Generator[list[str], None, None]:
    """Yield the tokens of every line that has some."""
    for line in raw_lines(shard, on_bytes):
        if words := line.split():
            yield words
