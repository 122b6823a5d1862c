"""Arrays read from a file that may be damaged anywhere."""

import io
import zipfile

import archives
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from elmo_jax.storage.files import read_arrays

ARRAYS = {"a": np.arange(3000), "b": np.zeros((2, 1), np.float32)}  # "a" is read in several parts
FUZZ = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])


def archive(method, header=lambda data: data):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as members:
        for name, array in ARRAYS.items():
            data = io.BytesIO()
            np.save(data, array)
            members.writestr(f"{name}.npy", header(data.getvalue()))
    return file.getvalue()


def read_or_refused(path, data):
    """Whether it was read; if so, as it was written."""
    path.write_bytes(data)
    got, told = [], None
    try:
        got = read_arrays(path, ARRAYS)
    except ValueError as error:
        told = str(error)
    if told is not None:
        assert told.splitlines() == [told]
        return False
    for array, want in zip(got, ARRAYS.values(), strict=True):
        np.testing.assert_array_equal(array, want)
    return True


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@FUZZ
@given(data=st.data())
def test_a_byte_changed_anywhere_is_no_matter_or_an_error(tmp_path, method, data):
    whole = archive(method)
    assert read_or_refused(tmp_path / "f", whole)
    # Headers, a member's first bytes and the directory at the end, or anywhere.
    place = st.integers(0, 300) | st.integers(-300, -1) | st.integers(0, len(whole) - 1)
    copy = bytearray(whole)
    copy[data.draw(place)] = data.draw(st.integers(0, 255))
    read_or_refused(tmp_path / "f", bytes(copy))


@FUZZ
@given(text=st.text("()[]{}',:0123456789Lfdescr ", max_size=40))
@example(text="{'descr': '<i8', 'fortran_order': False, 'shape': (3L,)}")
@example(text="{'descr': ',f4', 'fortran_order': False, 'shape': (3,)}")
@example(text="(")
def test_any_header_of_an_array_is_an_error(tmp_path, text):
    head = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.encode().ljust(117) + b"\n"
    assert not read_or_refused(tmp_path / "f", archive(zipfile.ZIP_STORED, lambda data: head + data[128:]))


def test_a_smaller_shape_is_an_error_though_numpy_could_read_it(tmp_path):
    whole = archive(zipfile.ZIP_STORED)
    assert not read_or_refused(tmp_path / "f", whole.replace(b"(3000,)", b"(1000,)"))


def test_each_damage_of_the_archive_is_an_error(tmp_path):
    for data in archives.damaged(archive(zipfile.ZIP_DEFLATED)).values():
        assert not read_or_refused(tmp_path / "f", data)
    assert not read_or_refused(tmp_path / "f", b"")
