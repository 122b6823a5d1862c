"""Large texts, a sentence a line, as memory-mapped ids that are made once.

Nouns: a *shard* is one text file of a corpus, perhaps gzipped; a *store* is the folder that
holds the ids of all its shards, end to end.
"""

import glob
import gzip
import hashlib
import json
import os
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pooch
from filelock import FileLock

from elmo_jax.characters import spelling_table
from elmo_jax.data import Documents
from elmo_jax.errors import InputError
from elmo_jax.integrity import write_atomically
from elmo_jax.text import UNK, Vocabulary

_VERSION = 1  # of the store's layout
_MOST_UNKNOWN = 1 << 20  # unknown words that keep their spelling; the others are read as <UNK>
_BUFFER = 1 << 20  # ids written at once


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


def count_words(pattern: str) -> dict[str, int]:
    """How often each token stands in a corpus."""
    counts: Counter[str] = Counter()
    for shard in find_shards(pattern):
        for words in _sentences(shard):
            counts.update(words)
    return dict(counts)


def load_corpus(
    pattern: str,
    vocabulary: Vocabulary,
    spelled: bool = False,
    on_bytes: Callable[[int], None] = lambda n: None,
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
    about = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in shards]
    names = "\n".join(vocabulary.tokens)
    key = hashlib.sha256(json.dumps([_VERSION, about, names]).encode()).hexdigest()[:32]
    root = folder if folder is not None else Path(pooch.os_cache("elmo_jax")) / "corpora"
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
    spellings = spelling_table([*vocabulary.tokens, *unknown]) if spelled else None
    labels = np.broadcast_to(np.int32(0), len(offsets) - 1)
    return Documents(ids, offsets, labels, spellings, len(vocabulary))


def _fill(
    store: Path, shards: list[Path], vocabulary: Vocabulary, on_bytes: Callable[[int], None]
) -> dict[str, Any]:
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
        if number >= done["shards"]:
            done = _append(store, shard, vocabulary, done)
            write_atomically(mark, json.dumps(done) + "\n")
        on_bytes(shard.stat().st_size)
    if not done["ids"]:
        raise InputError(f"{shards[0]}: the corpus holds no sentence; give a text with some")
    return done


def _append(store: Path, shard: Path, vocabulary: Vocabulary, done: dict[str, Any]) -> dict[str, Any]:
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

        for words in _sentences(shard):
            for i, word in zip(vocabulary.ids(words).tolist(), words, strict=True):
                if i == UNK and (word in numbers or len(numbers) < _MOST_UNKNOWN):
                    i = numbers.setdefault(word, len(vocabulary) + len(numbers))
                ids.append(i)
            total += len(words)
            sentences += 1
            offsets.append(total)
            if len(ids) > _BUFFER:
                flush()
        flush()
    write_atomically(store / "unknown.txt", "".join(f"{word}\n" for word in numbers))
    return {"shards": done["shards"] + 1, "ids": total, "offsets": sentences, "unknown": len(numbers)}


def _sentences(shard: Path) -> Iterator[list[str]]:
    """The tokens of every line that has some."""
    number = 0
    try:
        with gzip.open(shard, "rb") if shard.suffix == ".gz" else shard.open("rb") as file:
            for line in file:
                number += 1
                words = line.decode().split()
                if b"\0" in line:
                    raise InputError(f"{shard}:{number}: byte 0x00 is no text; remove it")
                if words:
                    yield words
    except UnicodeDecodeError as error:
        bad = error.object[error.start]
        raise InputError(f"{shard}:{number}: byte 0x{bad:02x} is not UTF-8; convert the file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{shard}:{number}: cannot be read ({error}); check the file") from None
