"""HDF5 files of named arrays: validated when read, written with checksums and replaced atomically."""

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from elmo_jax.errors import InputError
from elmo_jax.storage.files import check_regular, move, read_bytes

_MAX_EXPANSION = 1000  # of a dataset in memory over its bytes in the file; weights never compress as well


@contextmanager
def open_datasets(path: Path) -> Iterator[dict[str, h5py.Dataset]]:
    """Open every dataset of an HDF5 file, which may be gzipped, by its full name.

    Links to other files are not followed, and data stored in other files is refused.

    Raises:
        InputError: The file is missing or damaged; raised on opening or when a dataset is read.
    """
    check_regular(path)
    source: Any = io.BytesIO(read_bytes(path)) if path.suffix == ".gz" else path
    found: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            _check_storage(item, f"{path}: dataset {name}")
            found[name] = item

    try:
        with h5py.File(source, "r") as file:
            file.visititems(visit)
            yield found
    except InputError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:  # h5py raises all of these
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path}: cannot be read as HDF5 ({reason}); get the file again") from None


def _check_storage(data: h5py.Dataset, name: str) -> None:
    """Refuse a dataset stored in other files, or declared larger than its bytes can hold."""
    if data.external or data.is_virtual:
        raise InputError(f"{name} is stored in another file; give a file that holds its own data")
    if data.nbytes > _MAX_EXPANSION * data.id.get_storage_size() + 2**24:
        raise InputError(f"{name} announces more than it holds; get the file again")


def read_floats(
    datasets: Mapping[str, h5py.Dataset], shapes: Mapping[str, tuple[int, ...]], path: Path
) -> dict[str, np.ndarray]:
    """Read float arrays of exactly these names and shapes as float32; check all shapes before reading.

    Raises:
        InputError: A dataset is missing, unknown, not finite, or of another shape or type.
    """
    for name in sorted(shapes.keys() ^ datasets.keys()):
        found = "no" if name in shapes else "an unknown"
        raise InputError(f"{path}: has {found} dataset {name}; give the options file of this model")
    for name, shape in shapes.items():
        data = datasets[name]
        if data.shape != shape or data.dtype.kind != "f":
            found = f"{data.dtype} {data.shape}, expected float {shape}"
            raise InputError(f"{path}: dataset {name} is {found}; give the options file of this model")
    arrays = {name: np.asarray(datasets[name], np.float32) for name in shapes}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{path}: dataset {name} holds numbers that are not finite; get the file again")
    return arrays


@contextmanager
def create(path: Path) -> Iterator[h5py.File]:
    """Open a new HDF5 file for writing; it replaces an older one when the block ends without error.

    Raises:
        OSError: The file cannot be written, as on a full disk; the older file stays as it was.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with create(Path(folder) / "numbers.h5") as file:
        ...         file["a"] = np.arange(3.0)
        ...     with open_datasets(Path(folder) / "numbers.h5") as datasets:
        ...         datasets["a"][...].tolist()
        [0.0, 1.0, 2.0]
    """
    part = path.with_name(path.name + ".part")
    try:
        with _DeferredErrors(part, "w+") as sink:
            try:
                with h5py.File(sink, "w") as file:
                    yield file
            finally:
                if sink.error is not None:  # the cause, not what HDF5 raised because of it
                    raise sink.error
        move(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


class _DeferredErrors(io.FileIO):
    """File that keeps its first write error; HDF5 itself cannot close a file after one."""

    error: BaseException | None = None

    def write(self, data: Any) -> int:
        remaining = memoryview(data).cast("B")
        while remaining and self.error is None:
            remaining = remaining[self._try(super().write, remaining) :]
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        if self.error is None:
            self._try(super().truncate, size)
        return size or 0

    def _try(self, call: Callable[..., int], *args: Any) -> int:
        try:
            return call(*args)
        except BaseException as error:  # also Ctrl-C, which HDF5 would report as a disk error
            self.error = error
            return 0


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays and lists of strings by name.

    Raises:
        InputError: The file cannot be written; an older one stays as it was.
    """
    try:
        with create(path) as file:
            for name, array in arrays.items():
                dtype = h5py.string_dtype() if isinstance(array, list) else None
                file.create_dataset(name, data=array, dtype=dtype, fletcher32=dtype is None)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: cannot be written ({reason}); make room, or give another path") from None
