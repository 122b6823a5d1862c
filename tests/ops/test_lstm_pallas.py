"""The persistent kernel: interpreted where there is no GPU, it is the plain scan; how it is laid out on one.

Programs that are interpreted follow each other, so that each has all cells of its rows, and
waits for none; what they pass to each other on a GPU is played by threads, see simulated.py.
"""

import cuda
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import simulated
from lstm_cases import LENGTHS, B, D, H, T, close, given, needs_cuda, outputs_and_gradients

from elmo_jax.models.lstm import LSTM
from elmo_jax.ops import lstm_pallas as persistent
from elmo_jax.ops.lstm import Clips, fast_recurrence
from elmo_jax.ops.lstm_pallas import run_persistent

ROUNDED = 1e-5 if jax.default_backend() == "cpu" else 2e-2  # products in TF32


@pytest.fixture
def on_cuda(monkeypatch):
    cuda.pretend(monkeypatch)


@pytest.mark.parametrize("clips", [Clips(), Clips(0.5)], ids=["free", "clipped"])
@pytest.mark.parametrize("lengths", [LENGTHS, jnp.full(B, T, jnp.int32)], ids=["ragged", "full"])
def test_it_is_the_plain_scan_in_values_and_gradients(on_cuda, lengths, clips):
    found = outputs_and_gradients("persistent", lengths, clips=clips)
    close(found, outputs_and_gradients("plain", lengths, clips=clips), ROUNDED)
    assert all(jnp.abs(g).max() > 0.01 for g in jax.tree.leaves(found[0]))
    if clips != Clips():
        free = outputs_and_gradients("persistent", lengths)
        assert not np.allclose(found[1][1].c, free[1][1].c)


def test_in_bfloat16_it_rounds_as_the_plain_scan_does(on_cuda):
    found, exact = (
        outputs_and_gradients(kernel, LENGTHS, dtype="bfloat16") for kernel in ("persistent", "plain")
    )
    close(found, exact, 3e-2)
    assert not np.array_equal(found[1][0], outputs_and_gradients("persistent", LENGTHS)[1][0])


def recurrence_and_gradients(run, rows, cells):
    arguments, shown = given(rows, cells)
    states, back = jax.vjp(lambda *given: run(*given, Clips()), *arguments)
    return states, back(shown)


@pytest.mark.parametrize(("tile", "most"), [(16, 1000), (32, 1000), (16, 24)])
def test_rows_come_out_whole_however_they_are_laid_out(monkeypatch, tile, most):
    """40 rows in three tiles and in two, the last part-filled; and in two launches."""
    monkeypatch.setattr(persistent, "_tile_rows", lambda *_: tile)
    monkeypatch.setattr(persistent, "_max_rows", lambda *_: most)
    found = recurrence_and_gradients(run_persistent, 40, 5)
    close(found, recurrence_and_gradients(fast_recurrence, 40, 5), ROUNDED)


@pytest.mark.parametrize(
    ("processors", "directions", "rows", "cells", "clip", "dtype"),
    [
        (132, 2, 17, 33, None, "float32"),  # two tiles, two groups
        (132, 3, 3, 150, 0.6, "float32"),
        (10, 2, 20, 65, 0.6, "float32"),  # tiles of 32 rows, for want of processors
        (132, 1, 2, 1, None, "float32"),
        (132, 2, 5, 40, None, "bfloat16"),
    ],
)
def test_programs_that_share_rows_pass_their_cells_on(
    monkeypatch, processors, directions, rows, cells, clip, dtype
):
    monkeypatch.setattr(persistent, "_is_interpreted", lambda: False)
    monkeypatch.setattr(persistent, "_processor_count", lambda: processors)
    monkeypatch.setattr(persistent, "_call", simulated.run)
    (state, gates, w), shown = given(rows, cells, directions, steps=2)
    w = w._replace(recurrent=w.recurrent.astype(dtype))
    states, kept = persistent._forward(state, gates, w, Clips(clip))
    exact, back = jax.vjp(lambda *given: fast_recurrence(*given, Clips(clip)), state, gates, w)
    found, want = (states, persistent._backward(Clips(clip), kept, shown)), (exact, back(shown))
    rtol = ROUNDED if dtype == "float32" else 2e-2
    for a, b in zip(*map(jax.tree.leaves, (found, want)), strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert a.shape == b.shape and np.linalg.norm(a - b) < rtol * np.linalg.norm(b)  # and no NaN
    alone = persistent._run_forward(state, gates, w, Clips(clip), with_gradient=False)
    np.testing.assert_array_equal(alone[0], states.h)


@pytest.mark.parametrize("processors", [16, 108, 132])
@pytest.mark.parametrize("cells", [4, 150, 256])
@pytest.mark.parametrize("rows", [1, 32, 1024, 5000])
def test_there_is_a_processor_for_every_program(monkeypatch, processors, cells, rows):
    monkeypatch.setattr(persistent, "_is_interpreted", lambda: False)
    monkeypatch.setattr(persistent, "_processor_count", lambda: processors)
    groups = persistent._groups(cells)
    assert (groups - 1) * 32 < cells <= groups * 32
    launch = min(rows, persistent._max_rows(D, groups))
    tile = persistent._tile_rows(D, launch, groups)
    assert 16 <= tile <= 128 and D * -(-launch // tile) * groups <= processors
    smaller = D * -(-launch // (tile // 2)) * groups
    assert tile == 16 or smaller > processors  # no larger than need be


def test_a_gpu_without_room_for_its_programs_runs_the_scan(monkeypatch):
    monkeypatch.setattr(persistent, "_is_interpreted", lambda: False)
    monkeypatch.setattr(persistent, "_processor_count", lambda: D - 1)
    found = recurrence_and_gradients(run_persistent, 3, 5)
    jax.tree.map(np.testing.assert_array_equal, found, recurrence_and_gradients(fast_recurrence, 3, 5))


def test_auto_is_the_persistent_kernel_where_it_can_be(monkeypatch):
    cuda.pretend(monkeypatch, False)
    assert LSTM(H).choose() == "fast"
    cuda.pretend(monkeypatch)
    for layer in (LSTM(H), LSTM(H, clips=Clips(3.0)), LSTM(H, dtype="bfloat16"), LSTM(256)):
        assert layer.choose() == "persistent"
    for layer in (LSTM(H, 3), LSTM(H, dtype="float64"), LSTM(257)):
        assert layer.choose() == "fast"
    with jax.default_matmul_precision("highest"):
        assert LSTM(H).choose() == "fast" and LSTM(H, dtype="bfloat16").choose() == "persistent"
    monkeypatch.setattr(persistent, "triton", None)
    assert persistent.unsupported_reason(H, None, "float32") == "this JAX has no Pallas for Triton"
    assert LSTM(H).choose() == "fast"
    for kernel in ("fast", "plain"):
        assert LSTM(H, kernel=kernel).choose() == kernel


@pytest.mark.parametrize(
    ("capability", "cells", "dtype", "fits"),
    [
        ("9.0", 256, "float32", True),
        ("8.0", 256, "float32", True),
        ("8.6", 150, "float32", False),
        ("8.6", 120, "float32", True),
        ("12.0", 256, "bfloat16", True),
        ("7.5", 8, "bfloat16", False),
    ],
)
def test_a_processor_must_hold_what_a_program_needs(monkeypatch, capability, cells, dtype, fits):
    cuda.pretend(monkeypatch)
    device = type("Device", (), {"compute_capability": capability})()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    reason = persistent.unsupported_reason(cells, None, dtype)
    assert reason is None if fits else "exceed this GPU's shared memory" in str(reason)


@needs_cuda
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 3e-3), ("bfloat16", 3e-2)])
@pytest.mark.parametrize(("rows", "cells"), [(70, 150), (1024, 150), (33, 256), (5, 7)])
def test_on_real_cuda_it_is_the_scan_and_the_same_every_time(rows, cells, dtype, rtol):
    def rounded(state, gates, w, clips):
        return run_persistent(state, gates, w._replace(recurrent=w.recurrent.astype(dtype)), clips)

    run = jax.jit(lambda: recurrence_and_gradients(rounded, rows, cells))
    found = run()
    with jax.default_matmul_precision("highest"):
        exact = recurrence_and_gradients(fast_recurrence, rows, cells)
    for a, b in zip(*map(jax.tree.leaves, (found, exact)), strict=True):
        assert np.linalg.norm(a - b) < rtol * np.linalg.norm(b)
    for _ in range(50):
        jax.tree.map(np.testing.assert_array_equal, run(), found)
