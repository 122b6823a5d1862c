"""HDF5 files of named arrays: read with every check, written with checksums and whole or not at all."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from elmo_jax.errors import InputError
from elmo_jax.storage.files import move

_ANNOUNCED = 1000  # times what a dataset takes in the file; compression comes nowhere near


def read_bytes(path: Path) -> bytes:
    """A whole file, unzipped if its name ends in ``.gz``.

    Raises:
        InputError: it is missing, unreadable, no regular file or no gzip.
    """
    _check_regular(path)
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); check the path and the file") from None


def _check_regular(path: Path) -> None:
    """A pipe or a device may have no end, and a folder has no bytes."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: cannot be read (it is not a regular file); give one")


@contextmanager
def open_datasets(path: Path) -> Iterator[dict[str, h5py.Dataset]]:
    """Every dataset of a file, perhaps gzipped, by its full name; links are not followed.

    Raises:
        InputError: the file is missing or damaged, now or when a dataset is read.
    """
    _check_regular(path)
    source: Any = io.BytesIO(read_bytes(path)) if path.suffix == ".gz" else path
    found: dict[str, h5py.Dataset] = {}

    def take(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            # A file can announce numbers that it does not hold, and that no memory would.
            if item.nbytes > _ANNOUNCED * item.id.get_storage_size() + 2**24:
                raise InputError(f"{path}: dataset {name} announces more than it holds; get the file again")
            found[name] = item

    try:
        with h5py.File(source, "r") as file:
            file.visititems(take)
            yield found
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # what h5py says of damage
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read as HDF5 ({reason}); get the file again") from None


def read_floats(
    datasets: Mapping[str, h5py.Dataset], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, np.ndarray]:
    """Float arrays of exactly these names and shapes; nothing is read before all shapes are right.

    Raises:
        InputError: one is missing, of another shape or kind, not finite, or nobody's.
    """
    for name in sorted(shapes.keys() - datasets.keys()):
        raise InputError(f"{path}: has no dataset {name}; it is of another model than its options")
    for name in sorted(datasets.keys() - shapes.keys()):
        raise InputError(f"{path}: has a dataset {name} that its options do not know; give its own options")
    for name, shape in shapes.items():
        data = datasets[name]
        if data.shape != shape or data.dtype.kind != "f":
            raise InputError(
                f"{path}: dataset {name} is {data.dtype} {data.shape} where float {shape} is asked for; "
                "it is of another model than its options"
            )
    arrays = {name: np.asarray(datasets[name], np.float32) for name in shapes}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{path}: dataset {name} holds numbers that are not finite; get the file again")
    return arrays


class _Sink(io.FileIO):
    """A file that never refuses HDF5 anything: the first error is kept, and what follows it dropped.

    HDF5 cannot let go of a file that it cannot write to: it tries again at every call, and once
    more when the process ends, with a traceback each time.
    """

    error: BaseException | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        while left and self.error is None:
            left = left[self._attempt(super().write, left) or 0 :]
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        if self.error is None:
            self._attempt(super().truncate, size)
        return size or 0

    def _attempt(self, call: Callable[..., int], *args: Any) -> int | None:
        try:
            return call(*args)
        except BaseException as error:  # Ctrl-C too: HDF5 would take it for the disk's
            self.error = error
            return None

    def check(self) -> None:
        """Raise what was kept."""
        if self.error is not None:
            raise self.error


@contextmanager
def create(path: Path) -> Iterator[tuple[h5py.File, Callable[[], None]]]:
    """A file to write, of any size; what was there stays until it is whole.

    Args:
        path: the file.

    Yields:
        The file, and what raises the OSError that writing to it met; called at the end in any
        case, and now and then so that a long piece of work does not go on in vain.

    Raises:
        OSError: the file cannot be written; nothing is left of it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with create(Path(folder) / "numbers.h5") as (file, check):
        ...         file["a"] = np.arange(3.0)
        ...     with open_datasets(Path(folder) / "numbers.h5") as datasets:
        ...         datasets["a"][...].tolist()
        [0.0, 1.0, 2.0]
    """
    part = path.with_name(path.name + ".part")
    try:
        with _Sink(part, "w+") as sink:
            try:
                with h5py.File(sink, "w") as file:
                    yield file, sink.check
            finally:
                sink.check()  # before what HDF5 made of it
        move(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class Checked:
    """A dataset of `create` that says at once that the disk is full.

    Args:
        data: the dataset.
        check: what raises the OSError that writing met.
    """

    def __init__(self, data: h5py.Dataset, check: Callable[[], None]):
        self.data, self.check = data, check

    def __setitem__(self, where: tuple[Any, Any, Any], layers: np.ndarray) -> None:
        self.check()
        self.data[where] = layers


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays, or lists of text, by name; what was there stays until all is written.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with create(path) as (file, _):
            for name, array in arrays.items():
                if isinstance(array, list):
                    file.create_dataset(name, data=array, dtype=h5py.string_dtype())
                else:
                    file.create_dataset(name, data=array, fletcher32=True)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason}); make room, or give another path") from None
