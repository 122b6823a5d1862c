"""What was written, proven when it is read: digests, manifests and sealed configurations.

Nouns: a *digest* is a file's size and sha256; a *manifest* holds the digest of every file
of a folder; a configuration is *sealed* by a digest of its own and names those of the files
beside it.
"""

import hashlib
import json
import lzma
import os
import reprlib
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import filelock
import jax
import msgspec
import numpy as np

from elmo_jax.errors import InputError

T = TypeVar("T")
CONFIG = "config.json"
MANIFEST = "manifest.json"
# What NumPy and the archive below it raise at a file's damage, by where it is.
_DAMAGE = (OSError, ValueError, TypeError, SyntaxError, KeyError, EOFError, MemoryError, RuntimeError,
           Warning, zipfile.BadZipFile, zlib.error, lzma.LZMAError, tokenize.TokenError)  # fmt: skip
_MOST_JSON = 2**24  # bytes; a configuration or manifest is never that long

# Settings of a run that may change, or are compared on their own; those of them that no figure
# hangs on; and where it reads and writes.
_RENAMED = {"steps_per_dispatch": "steps_per_call"}  # settings of runs from before the new name
PACING = {"save_every", "steps_per_call"}
_FREE = {"output", "epochs", "files"} | PACING
PLACES = {"output", "data.dataset", "data.data_dir"} | {
    f"source.{name}" for name in ("pretrained", "bilm", "vectors", "dataset", "data_dir")
}
_DIGESTS = {"texts", "model"}


def digest(data: bytes | Path) -> dict[str, Any]:
    """The size and sha256 of bytes, or of a file's."""
    if isinstance(data, bytes):
        return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with data.open("rb") as file:
        hashed = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": hashed}


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write beside and rename: a reader, or a crash, sees the old file or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    move(part, path)


def read_arrays(path: Path, names: Iterable[str]) -> list[np.ndarray]:
    """The arrays of these names from an ``.npz``, without running any code that it may hold.

    Raises:
        ValueError: it is missing, damaged, or lacks one; why, in one line.
    """
    try:
        # Opened here, since a load that fails leaves open what it opened itself.
        with path.open("rb") as file, warnings.catch_warnings(action="error"):
            with np.load(file, allow_pickle=False) as arrays:
                bad = arrays.zip.testzip()  # NumPy reads no further than it must, so not to the checksum
                if bad is not None:
                    raise ValueError(f"{bad} is not what was saved")
                return [arrays[name] for name in names]
    except _DAMAGE as error:
        raise ValueError(" ".join(str(error).split()) or "it ends too early") from None


def tree_digest(tree: Any) -> str:
    """The sha256 of a pytree's arrays, in order."""
    hashed = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        hashed.update(np.asarray(leaf).tobytes())
    return hashed.hexdigest()


def move(part: Path, path: Path) -> None:
    """Rename a file or folder to its final name, and make both outlast a power cut."""
    for below in [part, *part.rglob("*")]:
        _sync(below)
    part.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    if os.name == "posix":  # elsewhere a file must be open for writing, and a folder cannot be
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_manifest(folder: Path) -> None:
    """Write the digest of every file below the folder into its ``manifest.json``."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): digest(path) for path in paths}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))


def damage(folder: Path) -> str | None:
    """What is first found not to be as the folder's manifest has it, or None.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     _ = (Path(name) / "weights").write_text("3.1")
        ...     write_manifest(Path(name))
        ...     _ = (Path(name) / "weights").write_text("3.7")
        ...     damage(Path(name))
        'weights is not what was saved (sha256)'
    """
    try:
        files = json.loads(_read(folder / MANIFEST))
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is not what was saved"
    return _mismatch(folder, files, MANIFEST)


def _mismatch(folder: Path, files: Any, source: str) -> str | None:
    """The first of these digests that the folder's files do not have."""
    if not isinstance(files, dict) or not files:
        return f"{source} lists no files"
    for name, enabled in files.items():
        path = folder / name
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{source} names {name!r}, which is not below it"
        try:
            # The size first: no need to read a file that cannot be right, or has no end.
            if not path.is_file():
                return f"{name} is missing"
            if not isinstance(enabled, dict) or path.stat().st_size != enabled.get("size"):
                return f"{name} is not what was saved (size)"
            if digest(path) != enabled:
                return f"{name} is not what was saved (sha256)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _read(path: Path) -> str:
    if path.stat().st_size > _MOST_JSON:
        raise ValueError(f"longer than {_MOST_JSON:,} bytes")
    return path.read_text(encoding="utf-8")


def _seal(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def write_config(folder: Path, config: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write ``config.json``, sealed, with the digests of files of that folder."""
    config = {**config, "files": dict(files)}
    write_atomically(folder / CONFIG, json.dumps({**config, "sha256": _seal(config)}, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """What `write_config` wrote, "files" among it.

    Raises:
        InputError: there is none, or it was changed since.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            f"{folder}: holds no run (no {CONFIG}); train one with python -m experiments.pretrain"
        )
    try:
        config = json.loads(_read(path))
        whole = isinstance(config, dict) and config.pop("sha256", None) == _seal(config)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it or train again") from None
    if not whole:
        raise InputError(f"{path}: is not what was saved (sha256); restore it or train again")
    return {_RENAMED.get(name, name): value for name, value in config.items()}


def check_files(folder: Path) -> None:
    """Check the files that ``config.json`` names.

    Raises:
        InputError: one is missing or was changed since.
    """
    wrong = _mismatch(folder, read_config(folder).get("files"), CONFIG)
    if wrong:
        raise InputError(f"{folder}: {wrong}; restore it, or save the folder again")


def structure(kind: type[T], data: Any, source: str) -> T:
    """JSON as a dataclass: no field unknown, each of its type, numbers finite and below 2**31.

    Args:
        kind: the dataclass.
        data: what was read.
        source: where, for the message.

    Raises:
        InputError: it does not fit.
    """
    try:
        made: Any = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: {error}; restore it or train again") from None
    _check_fields(made, data, source)
    return made


def _check_fields(made: Any, data: Mapping[str, Any], source: str) -> None:
    for name, value in data.items():
        if name not in made.__dataclass_fields__:
            raise InputError(f"{source}: {name!r} is not known; restore it or train again")
        if isinstance(value, int | float) and not abs(value) < 2**31:  # nor NaN
            raise InputError(f"{source}: {name} is {reprlib.repr(value)}; restore it or train again")
        field = getattr(made, name)
        if isinstance(value, dict) and is_dataclass(field):
            _check_fields(field, value, f"{source}.{name}")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Each setting that differs, as it was and as it is.

    Example:
        >>> changes({"model": {"cells": 4}, "seed": 0}, {"model": {"cells": 8}, "seed": 0})
        {'model.cells': '4 -> 8'}
    """
    found: dict[str, str] = {}
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= {f"{name}.{below}": text for below, text in changes(old, new).items()}
        elif old != new:
            found[name] = f"{old!r} -> {new!r}"
    return found


def binding(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Those `changes` of a run's settings that make it another run.

    Where it reads and writes does not, as long as what lies there has the same digests.

    Example:
        >>> binding({"epochs": 1, "data": {"data_dir": "a"}}, {"epochs": 2, "data": {"data_dir": "b"}})
        {}
    """
    changed = changes(before, now)
    free = _FREE if changed.keys() & _DIGESTS else _FREE | PLACES
    return {name: text for name, text in changed.items() if name not in free}


def difference(path: Path, data: bytes) -> str:
    """How a text differs from the file that is there."""
    if not path.is_file():
        return "is missing, and would be another one now"
    there, now = (raw.decode(errors="replace").splitlines() for raw in (path.read_bytes(), data))
    for line, (old, new) in enumerate(zip(there, now, strict=False), 1):
        if old != new:
            return f"line {line} is {reprlib.repr(old)} there, {reprlib.repr(new)} now"
    return f"has {len(there):,} lines there, {len(now):,} now"


def writer_lock(path: Path) -> filelock.FileLock:
    """What the one writer of a folder holds, a file in it; not to be waited for.

    The kernel lets go of it when the process ends, however that comes about.
    """
    return filelock.FileLock(path, blocking=False, thread_local=False)
