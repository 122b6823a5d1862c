"""Reading arrays from damaged `.npz` files."""

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
    """Return whether the file can be read; if so, check that the arrays are those written."""
    path.write_bytes(data)
    got, message = [], None
    try:
        got = read_arrays(path, ARRAYS)
    except ValueError as error:
        message = str(error)
    if message is not None:
        assert message.splitlines() == [message]
        return False
    for array, want in zip(got, ARRAYS.values(), strict=True):
        np.testing.assert_array_equal(array, want)
    return True


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@FUZZ
@given(data=st.data())
def test_a_changed_byte_has_no_effect_or_is_an_error(tmp_path, method, data):
    whole = archive(method)
    assert read_or_refused(tmp_path / "f", whole)
    # Positions in the headers, in a member's first bytes, in the directory at the end, or anywhere.
    place = st.integers(0, 300) | st.integers(-300, -1) | st.integers(0, len(whole) - 1)
    copy = bytearray(whole)
    copy[data.draw(place)] = data.draw(st.integers(0, 255))
    read_or_refused(tmp_path / "f", bytes(copy))


@FUZZ
@given(text=st.text("()[]{}',:0123456789Lfdescr ", max_size=40))
@example(text="{'descr': '<i8', 'fortran_order': False, 'shape': (3L,)}")
@example(text="{'descr': ',f4', 'fortran_order': False, 'shape': (3,)}")
@example(text="(")
def test_an_array_with_a_wrong_header_is_an_error(tmp_path, text):
    head = b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.encode().ljust(117) + b"\n"
    assert not read_or_refused(tmp_path / "f", archive(zipfile.ZIP_STORED, lambda data: head + data[128:]))


def test_a_header_with_a_smaller_shape_is_an_error(tmp_path):
    whole = archive(zipfile.ZIP_STORED)
    assert not read_or_refused(tmp_path / "f", whole.replace(b"(3000,)", b"(1000,)"))


def test_a_damaged_archive_is_an_error(tmp_path):
    for data in archives.damaged(archive(zipfile.ZIP_DEFLATED)).values():
        assert not read_or_refused(tmp_path / "f", data)
    assert not read_or_refused(tmp_path / "f", b"")
