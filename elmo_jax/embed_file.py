"""A text file's layers in one HDF5 file, as bilm-tf and AllenNLP lay them out, of any size.

Nouns: a *line* is one sentence; a *part* is a file with the layers of some thousand tokens'
lines, written whole or not at all, so that a stop loses one part's work at the most. The
parts are joined at the end.
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
from elmo_jax.data.text import blocks, raw_lines, read_lines, tokenize
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.models.combiners import Mix
from elmo_jax.storage.files import digest, tree_digest, write_atomically, writer_lock
from elmo_jax.storage.hdf5 import Checked, create

_LONG = 4_096  # tokens from which a line's layers go to the file a window at a time
_CHUNK = 256  # tokens an HDF5 chunk
_INDEX_BYTES = 64 << 20  # of a text's lines in one piece of sentence_to_index
_LOCK = ".lock"  # among the parts, so that it goes with them


class Dump:
    """Writes one text's layers into one HDF5 file; goes on where it was stopped.

    The file holds a dataset a line, named by the line's number from 0, and
    ``sentence_to_index``, a JSON object from each line to its number: one string, as bilm-tf's,
    or, for texts of more than 64 MB, a string for each further 64 MB of lines.

    Args:
        elmo: the model.
        source: the text, a sentence a line.
        target: the HDF5 file.
        config: what to write.
        mix: of the layers, if `config.layers` is "mix".

    Raises:
        InputError: the target is no name of a file, the text cannot be read, or a line is too long
            and is to be refused.
    """

    def __init__(
        self,
        elmo: Elmo,
        source: Path,
        target: Path,
        config: DumpConfig,
        mix: Mix | None = None,
    ):
        self.elmo, self.source, self.target, self.config = elmo, source, target, config
        layers, _, self.features = elmo.shape(0)
        average, top = Mix([1 / layers] * layers), Mix([0.0] * (layers - 1) + [1.0])
        self.mix = {"average": average, "top": top, "mix": mix}.get(config.layers)
        if target.name == ".." or (target.exists() and not target.is_file()):
            raise InputError(f"{target}: is not a regular file; give the HDF5 file to write")
        self.parts = target.with_name(target.name + ".parts")
        self._lock = writer_lock(self.parts / _LOCK)
        self.lines = self.tokens = 0
        for i, line in self._read():
            if config.long == "refuse" and len(line) > config.max_length:
                raise InputError(
                    f"{source}:{i + 1}: has {len(line):,} tokens, more than --max-length "
                    f"{config.max_length:,}; cut the line, or give --long split"
                )
            self.lines, self.tokens = i + 1, self.tokens + len(line)

    @property
    def size(self) -> int:
        """Bytes that the layers will take, without HDF5's own."""
        each = np.dtype(self.config.dtype).itemsize * self.features
        return self.tokens * each * (1 if self.mix is not None else self.elmo.shape(0)[0])

    def begin(self, resume: bool, overwrite: bool) -> None:
        """Make ready to write; no other process can until `write` ends.

        Leave to overwrite is kept with what is written, so `resume` goes on with that too.

        Raises:
            InputError: there is a file or an unfinished one and no word what to do with it, it is
                of another text, model or configuration, another process writes it, or there is not
                room enough.
        """
        if resume and overwrite:
            raise InputError("--resume and --overwrite are two different things; give one")
        if self.target.exists() and self.target.samefile(self.source):
            raise InputError(f"{self.target}: is the text itself; give another file to write")
        settings: dict[str, Any] = {"config": asdict(self.config), "dtype": self.elmo.model.config.dtype}
        settings["mix"] = None if self.mix is None else asdict(self.mix)
        settings |= {"text": digest(self.source), "model": tree_digest(self.elmo.params)}
        try:
            self.parts.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            try:
                self._claim(settings, resume, overwrite)
            except BaseException:
                self._vanish()
                self._lock.release(force=True)
                raise
        except filelock.Timeout:
            told = "another process writes it; wait for it, or give another file"
            raise InputError(f"{self.target}: {told}") from None
        except OSError as error:
            raise InputError(
                f"{self.parts}: cannot be written ({error.strerror}); give another path"
            ) from None

    def _begun(self) -> list[Path]:
        """What a dump, perhaps an earlier one, wrote beside the target."""
        return [path for path in self.parts.iterdir() if path.name != _LOCK]

    def _vanish(self) -> None:
        """Remove the parts' folder, if nothing else is in it; once the lock is gone others may begin."""
        with contextlib.suppress(OSError):
            if not self._begun():
                (self.parts / _LOCK).unlink()
                self.parts.rmdir()

    def _claim(self, settings: dict[str, Any], resume: bool, overwrite: bool) -> None:
        """See that all may be written, and leave word of it."""
        mark, begun = self.parts / "settings.json", self._begun()
        before = _read_json(mark) if resume else {}
        overwrite = before.pop("overwrite", overwrite)
        if self.target.exists() and not overwrite:
            remedy = "move it elsewhere to --resume" if before else "replace it with --overwrite"
            raise InputError(f"{self.target}: is there already; {remedy}")
        if begun and not (resume or overwrite):
            raise InputError(f"{self.parts}: holds an unfinished dump; --resume it or --overwrite it")
        if begun and resume and before != json.loads(json.dumps(settings)):
            raise InputError(f"{self.parts}: is of another text, model or settings; give --overwrite")
        for path in () if resume else begun:  # the old file itself stays until the new one is whole
            path.unlink()
        self._check_room()
        write_atomically(mark, json.dumps(settings | {"overwrite": overwrite}) + "\n")

    def _check_room(self) -> None:
        done = sum(path.stat().st_size for path in self.parts.iterdir())
        need, free = 2 * self.size - done, shutil.disk_usage(self.parts).free
        if need > free:
            raise InputError(
                f"{self.target}: needs {need / 1e9:.1f} GB while it is written, and {free / 1e9:.1f} GB are "
                "free; make room, or give --dtype float16 or --layers top"
            )

    def write(self, on_tokens: Callable[[int], None] = lambda n: None) -> None:
        """Write what is not written yet; `on_tokens` hears how many tokens each step did.

        However it ends, others may write then, and `begin` comes before the next call.

        Raises:
            InputError: the disk is full; what is written stays.
        """
        try:
            for number, part in enumerate(blocks(self._read())):
                path = self.parts / f"{number:06d}.h5"
                if not self._is_whole(path, part):
                    self._write_part(path, part)
                on_tokens(sum(len(line) for _, line in part))
            self._join()
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise InputError(f"{self.target}: cannot be written ({reason}); make room and --resume") from None
        finally:
            self._lock.release(force=True)

    def _read(self) -> Iterator[tuple[int, list[str]]]:
        return read_lines(self.source, tokenize if self.config.tokenize else str.split)

    def _is_whole(self, path: Path, lines: list[tuple[int, list[str]]]) -> bool:
        """Whether a part that an earlier call wrote is there, and all of it can be read."""
        if not path.exists():
            return False
        try:
            with h5py.File(path, "r") as file:
                for i, line in lines:
                    data: Any = file[str(i)]
                    if data.shape != self._shape(len(line)):
                        raise ValueError("another shape")
                    for start in range(0, len(line), _LONG):  # which checks the checksums too
                        data[..., start : start + _LONG, :]
            return True
        except (OSError, KeyError, ValueError, AttributeError, RuntimeError):
            warnings.warn(f"{path}: is damaged, and is made again", stacklevel=3)
            return False

    def _shape(self, tokens: int) -> tuple[int, ...]:
        """Of a line's dataset."""
        return self.elmo.shape(tokens) if self.mix is None else (tokens, self.features)

    def _write_part(self, path: Path, lines: list[tuple[int, list[str]]]) -> None:
        with create(path) as (file, check):
            short = [(i, line) for i, line in lines if len(line) <= _LONG]
            embedded = self.elmo.embed([line for _, line in short], batch_tokens=self.config.batch_tokens)
            for (i, _), layers in zip(short, embedded, strict=True):
                data = layers if self.mix is None else self.mix.apply(layers)
                self._dataset(file, i, layers.shape[1])[...] = data
            for i, line in lines:
                if len(line) > _LONG:
                    self._write_long(line, self._dataset(file, i, len(line)), check)

    def _write_long(self, line: list[str], data: h5py.Dataset, check: Callable[[], None]) -> None:
        """A line that may not fit in memory, a window at a time."""
        if self.mix is None:
            self.elmo.embed_into(line, Checked(data, check))
            return
        # A token's two halves come from different windows, and its mix may need both at once.
        shape = self.elmo.shape(len(line))
        with tempfile.TemporaryFile(dir=self.parts) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk shows here, where there is such a call
                os.posix_fallocate(file.fileno(), 0, 4 * math.prod(shape))
            layers = np.memmap(file, np.float32, "r+", shape=shape)
            self.elmo.embed_into(line, layers)
            for start in range(0, len(line), _LONG):
                check()
                data[start : start + _LONG] = self.mix.apply(layers[:, start : start + _LONG])

    def _dataset(self, file: h5py.File, number: int, tokens: int) -> h5py.Dataset:
        shape = self._shape(tokens)
        if not tokens:  # HDF5 cannot cut nothing into chunks
            return file.create_dataset(str(number), shape, self.config.dtype)
        chunks = (*[1] * (len(shape) - 2), min(tokens, _CHUNK), self.features // 2)
        return file.create_dataset(str(number), shape, self.config.dtype, chunks=chunks, fletcher32=True)

    def _join(self) -> None:
        with create(self.target) as (file, check):
            for path in sorted(self.parts.glob("*.h5")):
                check()
                with h5py.File(path, "r") as part:
                    for name in part:
                        part.copy(name, file)
            small = self.source.suffix != ".gz" and self.source.stat().st_size <= _INDEX_BYTES
            grows = None if small else (None,)
            index = file.create_dataset("sentence_to_index", (1,), h5py.string_dtype(), maxshape=grows)
            for i, piece in enumerate(self._index()):
                if i:
                    index.resize((i + 1,))
                index[i] = json.dumps(piece)
        for path in self._begun():
            path.unlink()
        self._vanish()

    def _index(self) -> Iterator[dict[str, str]]:
        """Each line's number, in pieces that fit in memory; one if there are no lines."""
        numbers: dict[str, str] = {}
        size = 0
        for i, line in enumerate(raw_lines(self.source)):
            if size > _INDEX_BYTES:
                yield numbers
                numbers, size = {}, 0
            numbers[line.rstrip("\r\n")] = str(i)
            size += len(line)
        yield numbers


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}  # like no settings that there can be
    return data if isinstance(data, dict) else {}
