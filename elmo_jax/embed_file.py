"""Resumable writer that stores the embeddings of a text file in one HDF5 file.

The text may be of any size. The layout is that of bilm-tf and AllenNLP. Embeddings are written to part files
of about 50,000 tokens, which are joined at the end; an interruption loses at most one part.
"""

import contextlib
import json
import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import filelock
import h5py
import numpy as np

from elmo_jax.config import DumpConfig
from elmo_jax.data.text import blocks, raw_lines, read_lines
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.models.combiners import Mix
from elmo_jax.storage.files import digest, tree_digest, write_atomically, writer_lock
from elmo_jax.storage.hdf5 import create

_LONG = 4_096  # Lines with more tokens are written window by window and need not fit in memory.
_CHUNK = 256  # tokens per HDF5 chunk
_INDEX_BYTES = 64 << 20  # bytes of text that one JSON string of sentence_to_index covers
_LOCK = ".lock"


class Dump:
    """Writer of the embeddings of a text file into an HDF5 file.

    Each line has a dataset named by its number, from 0. ``sentence_to_index`` is a JSON object from each line
    to its number, or several of them for texts above 64 MB.

    Args:
        elmo: Language model.
        source: Text file, one sentence per line.
        target: HDF5 file to write.
        config: Layers, number format and tokenization.
        mix: Weights of the layers if `config.layers` is "mix".

    Raises:
        InputError: The target is not a regular file, the text cannot be read, or a line is too long.
    """

    def __init__(self, elmo: Elmo, source: Path, target: Path, config: DumpConfig, mix: Mix | None = None):
        self.elmo, self.source, self.target, self.config = elmo, source, target, config
        layers, _, self.features = elmo.shape(0)
        fixed = {"average": Mix([1 / layers] * layers), "top": Mix([0.0] * (layers - 1) + [1.0])}
        self.mix = fixed.get(config.layers, mix)
        if target.name == ".." or (target.exists() and not target.is_file()):
            raise InputError(f"{target}: is not a regular file; give the HDF5 file to write")
        self._split = elmo.tokenize if config.tokenize else str.split
        self.parts = target.with_name(target.name + ".parts")
        self._lock = writer_lock(self.parts / _LOCK)
        self.lines = self.tokens = self.unknown = 0
        for i, line in read_lines(self.source, self._split):
            if config.long == "refuse" and len(line) > config.max_length:
                excess = f"has {len(line):,} tokens, more than max_length={config.max_length}"
                raise InputError(f"{source}:{i + 1}: {excess}; cut it, or use long='split'")
            self.lines, self.tokens = i + 1, self.tokens + len(line)
            self.unknown += elmo.count_unknown([line])

    @property
    def size(self) -> int:
        """Bytes of the embeddings in the file."""
        return math.prod(self._shape(self.tokens)) * np.dtype(self.config.dtype).itemsize

    def prepare(self, resume: bool, overwrite: bool) -> None:
        """Lock the target for this process until `write` ends, and check that it may be written.

        Args:
            resume: Continue an interrupted call; if that had overwrite=True, the target is still replaced.
            overwrite: Replace the target and discard the parts of an interrupted call.

        Raises:
            InputError: The target or its parts exist, and neither argument is True; the parts belong to
                another text, model or config; another process writes the target; or the disk is too full.
        """
        if resume and overwrite:
            raise InputError("resume=True and overwrite=True contradict each other; pass one")
        if self.target.exists() and self.target.samefile(self.source):
            raise InputError(f"{self.target}: is the text itself; give another file to write")
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._claim_parts(resume, overwrite)
            except BaseException:
                if not self._existing_files():
                    shutil.rmtree(self.parts, ignore_errors=True)
                self._lock.release(force=True)
                raise
        except filelock.Timeout:
            raise InputError(
                f"{self.target}: another process writes it; wait, or give another file"
            ) from None
        except OSError as error:
            raise InputError(
                f"{self.parts}: cannot be written ({error.strerror}); use another path"
            ) from None

    def write(self, on_tokens: Callable[[int], object] = lambda n: None) -> None:
        """Write the missing parts, call `on_tokens` with the tokens of each, join all and release the lock.

        Raises:
            InputError: The target cannot be written; complete parts stay for another call with `resume`.
        """
        try:
            for number, lines in enumerate(blocks(read_lines(self.source, self._split))):
                path = self.parts / f"{number:06d}.h5"
                if not (path.exists() and self._is_intact(path, lines)):
                    self._write_part(path, lines)
                on_tokens(sum(len(line) for _, line in lines))
            self._join_parts()
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise InputError(
                f"{self.target}: cannot be written ({reason}); make room and pass resume=True"
            ) from None
        finally:
            self._lock.release(force=True)

    def _shape(self, tokens: int) -> tuple[int, ...]:
        return self.elmo.shape(tokens) if self.mix is None else (tokens, self.features)

    def _claim_parts(self, resume: bool, overwrite: bool) -> None:
        """Check that the target and its parts may be used, and write the settings beside the parts."""
        mix = None if self.mix is None else asdict(self.mix)
        settings = {"config": asdict(self.config), "dtype": self.elmo.model.config.dtype, "mix": mix}
        settings |= {"text": digest(self.source), "model": tree_digest(self.elmo.params)}
        settings |= {"preparation": asdict(self.elmo.text) if self.config.tokenize else None}
        path, existing = self.parts / "settings.json", self._existing_files()
        before: dict[str, Any] = {}
        if resume:
            with contextlib.suppress(
                OSError, ValueError, TypeError, RecursionError
            ):  # a damaged file matches no settings
                before = dict(json.loads(path.read_text(encoding="utf-8")))
        overwrite = before.pop("overwrite", overwrite)
        if self.target.exists() and not overwrite:
            advice = "move it away to resume" if before else "pass overwrite=True to replace it"
            raise InputError(f"{self.target}: already exists; {advice}")
        if existing and not (resume or overwrite):
            raise InputError(f"{self.parts}: is unfinished; pass resume=True or overwrite=True")
        if existing and resume and before != json.loads(json.dumps(settings)):
            raise InputError(f"{self.parts}: has another text, model or settings; pass overwrite=True")
        for file in () if resume else existing:
            file.unlink()
        done = sum(file.stat().st_size for file in self.parts.iterdir())
        # Room for the parts and for the file they are copied into.
        need, free = 2 * self.size - done, shutil.disk_usage(self.parts).free
        if need > free:
            advice = "make room, or use dtype=float16 or layers=top"
            raise InputError(f"{self.target}: needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB free; {advice}")
        write_atomically(path, json.dumps(settings | {"overwrite": overwrite}) + "\n")

    def _existing_files(self) -> list[Path]:
        return [path for path in self.parts.iterdir() if path.name != _LOCK]

    def _is_intact(self, path: Path, lines: list[tuple[int, list[str]]]) -> bool:
        """Return whether a part holds all its lines with valid checksums."""
        try:
            with h5py.File(path, "r") as file:
                for i, line in lines:
                    data: Any = file[str(i)]
                    for start in range(0, len(line), _LONG):
                        data[..., start : start + _LONG, :]
            return True
        except (OSError, KeyError, ValueError, AttributeError, RuntimeError):
            warnings.warn(f"{path}: is damaged and is written again", stacklevel=3)
            return False

    def _write_part(self, path: Path, lines: list[tuple[int, list[str]]]) -> None:
        short = [line for _, line in lines if len(line) <= _LONG]
        embedded = iter(self.elmo.embed(short, batch_tokens=self.config.batch_tokens))
        with create(path) as file:
            for i, line in lines:
                shape, options = self._shape(len(line)), {}
                if line:  # HDF5 has no chunks of size 0
                    chunks = (*[1] * (len(shape) - 2), min(len(line), _CHUNK), self.features // 2)
                    options = {"chunks": chunks, "fletcher32": True}
                data = file.create_dataset(str(i), shape, self.config.dtype, **options)
                if len(line) > _LONG:
                    self._write_long_line(line, data)
                else:
                    layers = next(embedded)
                    data[...] = layers if self.mix is None else self.mix.apply(layers)

    def _write_long_line(self, line: list[str], data: h5py.Dataset) -> None:
        if self.mix is None:
            self.elmo.embed_into(line, data)
            return
        # The two directions of a token come from different windows, and the mix needs both.
        shape = self.elmo.shape(len(line))
        with tempfile.TemporaryFile(dir=self.parts) as file:
            # Reserved first, because writing to a mapped file on a full disk kills the process.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
            layers = np.memmap(file, np.float32, "r+", shape=shape)
            self.elmo.embed_into(line, layers)
            for start in range(0, len(line), _LONG):
                data[start : start + _LONG] = self.mix.apply(layers[:, start : start + _LONG])

    def _join_parts(self) -> None:
        with create(self.target) as file:
            for path in sorted(self.parts.glob("*.h5")):
                with h5py.File(path, "r") as part:
                    for name in part:
                        part.copy(name, file)
            small = self.source.suffix != ".gz" and self.source.stat().st_size <= _INDEX_BYTES
            maxshape = None if small else (None,)
            index = file.create_dataset("sentence_to_index", (1,), h5py.string_dtype(), maxshape=maxshape)
            for i, numbers in enumerate(self._number_lines()):
                if i > 0:
                    index.resize((i + 1,))
                index[i] = json.dumps(numbers)
        for path in self._existing_files():  # the lock file goes last, because another process may start then
            path.unlink()
        shutil.rmtree(self.parts, ignore_errors=True)

    def _number_lines(self) -> Iterator[dict[str, str]]:
        """Yield the number of each line, in pieces that fit in memory."""
        numbers, size = {}, 0
        for i, line in enumerate(raw_lines(self.source)):
            if size > _INDEX_BYTES:
                yield numbers
                numbers, size = {}, 0
            numbers[line.rstrip("\r\n")] = str(i)
            size += len(line)
        yield numbers
