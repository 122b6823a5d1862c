"""Large text corpora, one sentence per line, converted once to memory-mapped token ids.

A shard is one text file of a corpus; a store is the folder with the ids of all its shards. The content of the
shards identifies a store, so a corpus may be moved or copied.
"""

import contextlib
import functools
import glob
import hashlib
import itertools
import json
import os
import shutil
import warnings
from array import array
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pooch
from filelock import FileLock, Timeout

from elmo_jax.config import PRETOKENIZED, TextConfig
from elmo_jax.data.batching import Documents
from elmo_jax.data.characters import character_id_table
from elmo_jax.data.text import UNK, OnBytes, Vocabulary, make_tokenizer, raw_lines
from elmo_jax.errors import InputError
from elmo_jax.storage.files import digest, write_atomically

MAX_HELD_OUT = 20_000  # lines; enough to measure perplexity to a fraction of a percent

_VERSION = 2  # of the store's layout
_CACHE_BYTES = 20 * 10**9
_FILES = ("ids", "offsets", "unknown.txt")
# Maximum number of out-of-vocabulary words with an id and characters of their own; later ones become <UNK>.
_MAX_UNKNOWN = 1 << 20

_used_stores: set[Path] = set()  # by this process; they are not removed from the cache


def _ignore(count: int) -> None:
    """Report no progress."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text files with one sentence per line.

    Attributes:
        pattern: Folder or glob pattern of the shards, for messages.
        shards: Files, sorted by path.
        text: Conversion of a line into tokens.
        lines: For each shard, the lines to read, as bool ``[lines]``; None reads all.
    """

    pattern: str
    shards: tuple[Path, ...]
    text: TextConfig = PRETOKENIZED
    lines: tuple[np.ndarray, ...] | None = None

    @classmethod
    def open(cls, pattern: str, text: TextConfig = PRETOKENIZED) -> "Corpus":
        """Find the shards of a corpus.

        Args:
            pattern: Folder, whose files are all read except hidden ones, or glob pattern. The files are UTF-8
                texts, which may be compressed as ``.gz``.
            text: Conversion of a line into tokens.

        Raises:
            InputError: There is no file.
        """
        path = Path(pattern).expanduser()
        if path.is_dir():
            paths: Iterable[Path] = (file for file in path.iterdir() if not file.name.startswith("."))
            remedy = "give a folder of text files"
        else:
            paths = map(Path, glob.glob(str(path), recursive=True))
            remedy = "quote the pattern and check it"
        shards = tuple(sorted(path for path in paths if path.is_file()))
        if not shards:
            raise InputError(f"{pattern}: matches no file; {remedy}")
        return cls(pattern, shards, text)

    @property
    def size(self) -> int:
        """Bytes of all shards on disk."""
        return sum(path.stat().st_size for path in self.shards)

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the content of the shards, the lines to read and the conversion into tokens."""
        lines = None if self.lines is None else [digest(np.packbits(mask).tobytes()) for mask in self.lines]
        state = [_VERSION, [_shard_digest(path) for path in self.shards], lines, asdict(self.text)]
        return hashlib.sha256(json.dumps(state).encode()).hexdigest()

    def hold_out(self, fraction: float, seed: int) -> tuple["Corpus", "Corpus"]:
        """Split the lines into training and held-out lines, at most `MAX_HELD_OUT` of the latter.

        Args:
            fraction: Fraction of the lines to hold out.
            seed: Random seed of the choice.

        Raises:
            InputError: The corpus has a single line.
        """
        counts = [sum(1 for _ in raw_lines(shard)) for shard in self.shards]
        total = sum(counts)
        if total < 2:
            raise InputError(f"{self.pattern}: holds {total} line, too few to hold some out; give more text")
        count = min(max(1, round(fraction * total)), total - 1, MAX_HELD_OUT)
        is_held_out = np.zeros(total, bool)
        is_held_out[np.random.default_rng(seed).choice(total, count, replace=False)] = True
        parts = np.split(is_held_out, np.cumsum(counts)[:-1])
        return replace(self, lines=tuple(~part for part in parts)), replace(self, lines=tuple(parts))

    def check_disjoint(self, held_out: "Corpus") -> None:
        """Raise InputError if a shard of the held-out corpus is one of this corpus, or a copy of one."""
        shards = {_shard_digest(path): path for path in self.shards}
        for path in held_out.shards:
            if (same := shards.get(_shard_digest(path))) is not None:
                problem = "is" if same.samefile(path) else f"has the same content as {same},"
                raise InputError(f"{path}: {problem} a part of the training corpus; hold out other text")

    def count_words(
        self, on_bytes: OnBytes = _ignore, folder: Path | None = None, keep: bool = True
    ) -> dict[str, int]:
        """Count the tokens, or read the counts of an earlier call.

        Args:
            on_bytes: Called with the number of bytes read since the last call.
            folder: Folder of the saved counts; the user's cache folder if None.
            keep: Save the counts for the next call.

        Raises:
            InputError: A shard cannot be read.
        """
        path = _stores_folder(folder) / f"{self.digest[:32]}.counts"
        with contextlib.ExitStack() as stack:
            if keep:  # another process may be counting the same corpus
                with contextlib.suppress(OSError):  # an unwritable folder gives a warning below
                    path.parent.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(FileLock(f"{path}.lock"))
            with contextlib.suppress(OSError, ValueError):  # missing or damaged
                saved = json.loads(path.read_text(encoding="utf-8"))
                on_bytes(self.size)
                return saved
            counts = Counter(itertools.chain.from_iterable(self._sentences(on_bytes)))
            if keep:
                try:
                    write_atomically(path, json.dumps(counts))
                except OSError as error:
                    warnings.warn(
                        f"{path.parent}: word counts are not cached ({error.strerror})", stacklevel=2
                    )
        return dict(counts)

    def read_beginning(
        self, vocabulary: Vocabulary, with_characters: bool, tokens: int
    ) -> tuple[Documents, float]:
        """Read the first sentences, about `tokens` tokens, into memory.

        Returns:
            The documents, and the fraction of the corpus's bytes that was read.

        Raises:
            InputError: A shard cannot be read, or there is no sentence.
        """
        ids, offsets, unknown = array("i"), array("q", [0]), {}
        bytes_read: list[int] = []
        with contextlib.closing(self._sentences(bytes_read.append)) as sentences:
            for words in sentences:
                ids.extend(_number_words(words, vocabulary, unknown))
                offsets.append(len(ids))
                if len(ids) >= tokens:
                    break
        arrays = np.asarray(ids, np.int32), np.asarray(offsets, np.int64)
        documents = self._make_documents(*arrays, vocabulary, unknown if with_characters else None)
        return documents, sum(bytes_read) / self.size

    def load(
        self,
        vocabulary: Vocabulary,
        with_characters: bool = False,
        on_bytes: OnBytes = _ignore,
        folder: Path | None = None,
    ) -> Documents:
        """Load the sentences as memory-mapped documents.

        The first call writes the store, shard by shard. An interrupted call continues at the shard it
        stopped in; later calls check and open the complete store. If all stores take more than 20 GB, the
        least recently used ones are removed.

        Args:
            vocabulary: Token ids.
            with_characters: Add the character ids of every word.
            on_bytes: Called with the number of bytes read since the last call.
            folder: Folder of all stores; the user's cache if None.

        Raises:
            InputError: A shard cannot be read, there is no sentence, or the store cannot be written.
        """
        root = _stores_folder(folder)
        name = hashlib.sha256("\n".join([self.digest, *vocabulary.tokens]).encode()).hexdigest()[:32]
        store = root / name
        try:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{store}.lock"):  # another process may be converting the same corpus
                self._fill_store(store, vocabulary, on_bytes)
            _used_stores.add(store)
            _limit_cache(root)
        except OSError as error:
            raise InputError(
                f"{store}: cannot be written ({error.strerror}); free space or fix permissions"
            ) from None
        unknown = (store / "unknown.txt").read_text(encoding="utf-8").split("\n")[:-1]
        is_empty = not (store / "ids").stat().st_size  # an empty file cannot be mapped
        ids = np.zeros(0, np.int32) if is_empty else np.memmap(store / "ids", np.int32, "r")
        offsets = np.memmap(store / "offsets", np.int64, "r")
        return self._make_documents(ids, offsets, vocabulary, unknown if with_characters else None)

    def _make_documents(
        self, ids: np.ndarray, offsets: np.ndarray, vocabulary: Vocabulary, unknown: Iterable[str] | None
    ) -> Documents:
        """Return unlabelled documents, with character ids if the out-of-vocabulary words are given."""
        if not len(ids):
            raise InputError(f"{self.pattern}: the corpus holds no sentence; give a text with some")
        characters = None if unknown is None else character_id_table([*vocabulary.tokens, *unknown])
        labels = np.broadcast_to(np.int32(0), len(offsets) - 1)
        documents = Documents(ids, offsets, labels, characters, len(vocabulary))
        if documents.unknown_fraction == 1:
            raise InputError(f"{self.pattern}: no word is in the vocabulary; check its language and case")
        return documents

    def _sentences(self, on_bytes: OnBytes) -> Generator[list[str], None, None]:
        """Yield the tokens of every selected line that has some."""
        for number in range(len(self.shards)):
            yield from self._shard_sentences(number, on_bytes)

    def _shard_sentences(self, number: int, on_bytes: OnBytes) -> Generator[list[str], None, None]:
        tokenizer = make_tokenizer(self.text)
        lines: Iterable[str] = raw_lines(self.shards[number], on_bytes)
        if self.lines is not None:
            lines = itertools.compress(lines, self.lines[number])
        for line in lines:
            if words := tokenizer(line):
                yield words

    def _fill_store(self, store: Path, vocabulary: Vocabulary, on_bytes: OnBytes) -> None:
        """Append the missing shards; ``done.json`` counts what is complete, and at the end holds digests."""
        progress = store / "done.json"
        done = _read_progress(store)
        if done is None:
            store.mkdir(parents=True, exist_ok=True)
            done = {"shards": 0, "ids": 0, "offsets": 1, "unknown": 0}
            np.zeros(1, np.int64).tofile(store / "offsets")
            (store / "ids").touch()
            write_atomically(store / "unknown.txt", "")
        for number, shard in enumerate(self.shards):
            if number < done["shards"]:
                on_bytes(shard.stat().st_size)
                continue
            done = self._append_shard(store, number, vocabulary, done, on_bytes)
            write_atomically(progress, json.dumps(done) + "\n")
        if "files" in done:
            os.utime(progress)  # the time of the last use
        else:
            files = {name: digest(store / name) for name in _FILES}
            write_atomically(progress, json.dumps(done | {"files": files}) + "\n")

    def _append_shard(
        self, store: Path, number: int, vocabulary: Vocabulary, done: dict[str, Any], on_bytes: OnBytes
    ) -> dict[str, Any]:
        for name, width in (("ids", 4), ("offsets", 8)):  # remove what an interrupted call wrote
            os.truncate(store / name, done[name] * width)
        known = (store / "unknown.txt").read_text(encoding="utf-8").split("\n")[: done["unknown"]]
        unknown = {word: len(vocabulary) + i for i, word in enumerate(known)}
        total = done["ids"]
        with (store / "ids").open("ab") as ids_file, (store / "offsets").open("ab") as offsets_file:
            for words in self._shard_sentences(number, on_bytes):
                array("i", _number_words(words, vocabulary, unknown)).tofile(ids_file)
                total += len(words)
                array("q", [total]).tofile(offsets_file)
            for file in (ids_file, offsets_file):  # on disk before done.json counts them
                file.flush()
                os.fsync(file.fileno())
            offsets_written = offsets_file.tell() // 8
        write_atomically(store / "unknown.txt", "".join(f"{word}\n" for word in unknown))
        counts = {"ids": total, "offsets": offsets_written, "unknown": len(unknown)}
        return {"shards": number + 1, **counts}


def _shard_digest(path: Path) -> str:
    state = path.stat()  # a change of the content changes ctime, which no program can set
    return _file_digest(path, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@functools.cache
def _file_digest(path: Path, *state: int) -> str:
    return digest(path)["sha256"]


def _stores_folder(folder: Path | None) -> Path:
    return folder if folder is not None else Path(pooch.os_cache("elmo_jax")) / "corpora"


def _read_progress(store: Path) -> dict[str, Any] | None:
    """Return the content of ``done.json``, or None after removing a store that is damaged."""
    if not (store / "done.json").exists():
        return None
    try:
        done = json.loads((store / "done.json").read_text(encoding="utf-8"))
        files = done.get("files", {})
        if all(digest(store / name) == expected for name, expected in files.items()):
            return done
    except (OSError, ValueError, AttributeError):
        pass
    warnings.warn(f"{store}: is damaged; the corpus is converted again", stacklevel=5)
    shutil.rmtree(store)
    return None


def _limit_cache(root: Path) -> None:
    """Remove the least recently used stores until the others fit in the cache."""
    finished = [path.parent for path in root.glob("*/done.json")]
    sizes = {store: sum(file.stat().st_size for file in store.iterdir()) for store in finished}
    excess = sum(sizes.values()) - _CACHE_BYTES
    for store in sorted(finished, key=lambda store: (store / "done.json").stat().st_mtime_ns):
        if excess <= 0:
            return
        if store in _used_stores:
            continue
        with contextlib.suppress(Timeout), FileLock(f"{store}.lock", timeout=0):  # another process may use it
            shutil.rmtree(store)
            excess -= sizes[store]
            problem = f"holds more than {_CACHE_BYTES / 1e9:.0f} GB of corpora"
            warnings.warn(f"{root}: {problem}; removed the least recently used, {store.name}", stacklevel=4)


def _number_words(words: list[str], vocabulary: Vocabulary, unknown: dict[str, int]) -> Iterator[int]:
    """Yield ids; an out-of-vocabulary word gets the next id after the vocabulary when it first occurs."""
    for i, word in zip(vocabulary.ids(words).tolist(), words, strict=True):
        if i == UNK and (word in unknown or len(unknown) < _MAX_UNKNOWN):
            i = unknown.setdefault(word, len(vocabulary) + len(unknown))
        yield i
