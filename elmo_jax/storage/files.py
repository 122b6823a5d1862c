"""Files that survive crashes and show damage: atomic writes, digests, configurations and locks.

A digest is the size and SHA-256 of a file. A manifest holds the digest of every file of a folder. A
``config.json`` holds its own SHA-256 and the digests of the files beside it.
"""

import gzip
import hashlib
import io
import json
import os
import reprlib
import warnings
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
_MAX_JSON_BYTES = 2**24
_RENAMED_SETTINGS = {"steps_per_dispatch": "steps_per_call"}


def read_bytes(path: Path) -> bytes:
    """Return the content of a file, decompressed if its name ends in ``.gz``.

    Raises:
        InputError: The file is missing, unreadable, not a regular file or not gzip, or it unpacks to over a
            hundred times its size, as files made to exhaust memory do.
    """
    check_regular(path)
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            limit = max(2**24, 100 * len(data))
            data = gzip.GzipFile(fileobj=io.BytesIO(data)).read(limit + 1)
            if len(data) > limit:
                raise InputError(f"{path}: unpacks to over a hundred times its size; check the file")
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); check the path and the file") from None
    return data


def check_regular(path: Path) -> None:
    """Raise InputError for folders, and for pipes and devices, since reading these may never end."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a regular file; save it as one first")


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a temporary file, then rename it, so that `path` always holds the old or the new content."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    move(part, path)


def move(part: Path, path: Path) -> None:
    """Rename a file or folder to its final name after flushing it to disk."""
    for written in [part, *part.rglob("*")]:
        _flush(written)
    part.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    if os.name == "posix":  # other systems can flush neither folders nor files that are open for reading
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def writer_lock(path: Path) -> filelock.FileLock:
    """Return a lock that admits one writer to a folder; acquiring a held lock raises `filelock.Timeout`.

    The operating system releases the lock when the process ends, even if it is killed.

    Args:
        path: Lock file in the folder.
    """
    return filelock.FileLock(path, blocking=False, thread_local=False)


def digest(data: bytes | Path) -> dict[str, Any]:
    """Return the size and SHA-256 of bytes or of a file."""
    if isinstance(data, bytes):
        return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    with data.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": sha256}


def tree_digest(tree: Any) -> str:
    """Return the SHA-256 of all arrays of a pytree, in order."""
    sha256 = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        sha256.update(np.asarray(leaf).tobytes())
    return sha256.hexdigest()


def write_manifest(folder: Path) -> None:
    """Write the digest of every file of a folder into its ``manifest.json``."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): digest(path) for path in paths}
    (folder / MANIFEST).write_text(json.dumps(files, indent=1))


def find_damage(folder: Path) -> str | None:
    """Return the first difference between a folder and its manifest, or None.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     _ = (Path(name) / "weights").write_text("3.1")
        ...     write_manifest(Path(name))
        ...     _ = (Path(name) / "weights").write_text("3.7")
        ...     find_damage(Path(name))
        'weights is not what was saved (sha256)'
    """
    try:
        files = json.loads(_read_json_text(folder / MANIFEST))
    except OSError as error:
        return f"{MANIFEST} cannot be read ({error.strerror})"
    except (ValueError, RecursionError):
        return f"{MANIFEST} is not what was saved"
    return _compare_digests(folder, files, MANIFEST)


def _compare_digests(folder: Path, files: Any, source: str) -> str | None:
    """Return the first difference between the files and their recorded digests, or None."""
    if not isinstance(files, dict) or not files:
        return f"{source} lists no files"
    for name, expected in files.items():
        path = folder / name
        if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{source} names {name!r}, which is not in the folder"
        try:
            # The size is compared first, so that a device without an end is never read.
            if not path.is_file():
                return f"{name} is missing"
            if not isinstance(expected, dict) or path.stat().st_size != expected.get("size"):
                return f"{name} is not what was saved (size)"
            if digest(path) != expected:
                return f"{name} is not what was saved (sha256)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return None


def _read_json_text(path: Path) -> str:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"longer than {_MAX_JSON_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def read_arrays(path: Path, names: Iterable[str]) -> list[np.ndarray]:
    """Read arrays from an ``.npz`` file without running code that it may contain.

    Raises:
        ValueError: The file or an array is missing or damaged; the message is one line.
    """
    try:
        # NumPy does not close a file that it opened itself if loading fails.
        with path.open("rb") as file, warnings.catch_warnings(action="error"):
            with np.load(file, allow_pickle=False) as arrays:
                damaged = arrays.zip.testzip()  # NumPy does not always read far enough to verify the checksum
                if damaged is not None:
                    raise ValueError(f"{damaged} is not what was saved")
                return [arrays[name] for name in names]
    except Exception as error:  # NumPy and zipfile raise a dozen exception types
        raise ValueError(" ".join(str(error).split()) or "it ends too early") from None


def write_config(folder: Path, config: Mapping[str, Any], files: Mapping[str, Any]) -> None:
    """Write ``config.json`` with its own SHA-256 and the digests of files in the folder."""
    config = {**config, "files": dict(files)}
    text = json.dumps({**config, "sha256": _config_sha256(config)}, indent=2)
    write_atomically(folder / CONFIG, text + "\n")


def _config_sha256(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration that `write_config` wrote, with the digests as "files".

    Raises:
        InputError: The configuration is missing or was changed.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(f"{folder}: holds no run or saved model (no {CONFIG}); check the path")
    try:
        config = json.loads(_read_json_text(path))
        is_valid = isinstance(config, dict) and config.pop("sha256", None) == _config_sha256(config)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore it or train again") from None
    if not is_valid:
        raise InputError(f"{path}: is not what was saved (sha256); restore it or train again")
    return {_RENAMED_SETTINGS.get(name) or name: value for name, value in config.items()}


def check_files(folder: Path) -> None:
    """Check the files whose digests ``config.json`` holds.

    Raises:
        InputError: A file is missing or was changed.
    """
    difference = _compare_digests(folder, read_config(folder).get("files"), CONFIG)
    if difference:
        raise InputError(f"{folder}: {difference}; restore it, or save the folder again")


def structure(kind: type[T], data: Any, source: str) -> T:
    """Convert JSON to a dataclass, checking types, bounds and unknown fields.

    Args:
        kind: Dataclass to create.
        data: Parsed JSON.
        source: File that messages name.

    Raises:
        InputError: A field is unknown, of another type, not finite, or 2**31 or more.
    """
    try:
        result: Any = msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{source}: {error}; restore it or train again") from None
    _check_fields(result, data, source)
    return result


def _check_fields(result: Any, data: Mapping[str, Any], source: str) -> None:
    for name, value in data.items():
        if name not in result.__dataclass_fields__:
            raise InputError(f"{source}: {name!r} is not known; restore it or train again")
        if isinstance(value, int | float) and not abs(value) < 2**31:  # the comparison is false for NaN too
            raise InputError(f"{source}: {name} is {reprlib.repr(value)}; restore it or train again")
        field = getattr(result, name)
        if isinstance(value, dict) and is_dataclass(field):
            _check_fields(field, value, f"{source}.{name}")
