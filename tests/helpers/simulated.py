"""The persistent kernel's programs as threads, where there is no GPU: with groups, waiting and passing on.

`run` stands in for `persistent._call`. What Pallas and Triton are to the kernels is played on
NumPy's arrays. Outputs begin as NaN, so that what is read before it is written shows, and a
place beyond an array is an error. The kernels' loops are Python's, and what is given must be
arrays: no program is traced.
"""

import random
import threading
import time
from functools import partial
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from elmo_jax.ops import lstm_pallas as persistent, lstm_pallas as programs

PATIENCE = 30  # seconds until programs that wait for each other are given up
_program = threading.local()
_memory = threading.Lock()


class _Slice:
    def __init__(self, start, size):
        self.start, self.size = int(start), int(size)


class _Ref:
    """An array in memory; ``ref.at[index]`` is a place in it."""

    def __init__(self, array):
        self.array, self.shape, self.dtype, self.at = array, array.shape, array.dtype, self

    def __getitem__(self, index):
        return self.array, index


def _places(array, index, mask):
    """The index of every number of a place, and which are meant; all of those must be there."""
    axes = [
        np.arange(i.start, i.start + i.size) if isinstance(i, _Slice) else np.array(int(i)) for i in index
    ]
    wide = [k for k, axis in enumerate(axes) if axis.ndim]
    shaped = [
        axis.reshape([-1 if k == j else 1 for j in wide]) if axis.ndim else axis
        for k, axis in enumerate(axes)
    ]
    grid = np.broadcast_arrays(*shaped)
    meant = np.broadcast_to(True if mask is None else np.asarray(mask), grid[0].shape)
    for axis, length in zip(grid, array.shape, strict=True):
        assert ((axis[meant] >= 0) & (axis[meant] < length)).all(), f"{index} is beyond {array.shape}"
    return [np.clip(axis, 0, length - 1) for axis, length in zip(grid, array.shape, strict=True)], meant


def _load(place, mask=None, other=0.0):
    array, index = place
    grid, meant = _places(array, index, mask)
    with _memory:
        return jnp.asarray(np.where(meant, array[tuple(grid)], np.asarray(other, array.dtype)))


def _store(place, value, mask=None):
    array, index = place
    grid, meant = _places(array, index, mask)
    assert value.dtype == array.dtype
    with _memory:
        array[tuple(axis[meant] for axis in grid)] = np.asarray(value)[meant]


def _atomic_add(ref, index, value):
    with _memory:
        place = tuple(map(int, index))
        before = int(ref.array[place])
        ref.array[place] += int(value)
    return before


def _fori_loop(first, last, body, carry):
    for i in range(int(first), int(last)):
        carry = body(jnp.int32(i), carry)
    return carry


def _while_loop(goes_on, body, carry):
    given_up = time.monotonic() + PATIENCE
    while goes_on(carry):
        assert time.monotonic() < given_up, "programs wait for each other for ever"
        time.sleep(random.uniform(0, 1e-3))
        carry = body(carry)
    return carry


_PALLAS = SimpleNamespace(
    ds=_Slice,
    program_id=lambda axis: _program.number[axis],
    num_programs=lambda axis: _program.grid[axis],
)
_TRITON = SimpleNamespace(
    load=_load,
    store=_store,
    atomic_add=_atomic_add,
    debug_barrier=lambda: None,
    dot=lambda a, b, allow_tf32: jnp.matmul(a, b, preferred_element_type=jnp.float32),
)
_JAX = SimpleNamespace(
    lax=SimpleNamespace(fori_loop=_fori_loop, while_loop=_while_loop), nn=jax.nn, Array=jax.Array
)


def run(kernel, clips, made, *given):
    """`persistent._call`, its programs started in a random order."""
    directions, rows = made[0].shape[:2]
    width = given[-1].shape[-1]
    groups = persistent._groups(width)
    tile = persistent._tile_rows(directions, rows, groups)
    grid = directions, -(-rows // tile), groups
    refs = [_Ref(np.asarray(array)) for array in given]
    out = [_Ref(np.full(kind.shape, np.nan).astype(kind.dtype)) for kind in made]
    arrived, failed = _Ref(np.zeros(grid[:2], np.int32)), []
    make_program = partial(
        persistent._Program,
        tile,
        persistent._cells_of_group(width),
        piece=persistent._PIECE,
        interpreted=False,
    )

    def program(number):
        _program.number, _program.grid = number, grid
        try:
            kernel(*refs, arrived, *out, arrived, clip=clips.cell, make_program=make_program)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=program, args=(n,), daemon=True) for n in np.ndindex(*grid)]
    with mock.patch.multiple(programs, pl=_PALLAS, triton=_TRITON, jax=_JAX):
        for thread in random.sample(threads, len(threads)):
            thread.start()
        for thread in threads:
            thread.join(2 * PATIENCE)
    if failed:
        raise failed[0]
    return [jnp.asarray(ref.array) for ref in out]
