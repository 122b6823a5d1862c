"""All steps of an LSTM layer in one persistent GPU kernel, written in Pallas for Triton.

A scan on a GPU launches several small kernels per step and waits for the launches. Here each program keeps
the recurrent weights of a group of cells in shared memory, and their c in registers, for all steps of a tile
of rows. Programs of one tile exchange h (backward: the gradient of z) through global memory and count their
finished steps in `arrived`; a program reads only after all of its tile have finished the step. So all
programs of a launch must run at once, which `_tile_rows` and `_max_rows` ensure. JAX 0.11 deprecates Pallas
for Triton; without it `unsupported_reason` says so, and layers run as a scan.

Shape comments use the axis letters of docs/concepts.md and: W cells padded to complete groups (padded cells
have zero weights and stay zero), R rows of a tile, C cells of a group, G matrices.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.extend.backend import get_backend
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from elmo_jax.ops.lstm import FORGET_BIAS, GATES, Clips, Layout, State, Weights, fast_recurrence
from elmo_jax.parallel import DATA, data_parallel_size

try:
    from jax.experimental.pallas import triton
except ImportError:  # deprecated since JAX 0.11
    triton: Any = None


class _Program:
    """Rows and cells of one program, and its reads, writes and waits.

    Args:
        tile: R.
        group: C.
        rows: B; rows of the last tile beyond it are masked.
        arrived: ``[D, tiles]``, steps finished by the programs of each tile, added up.
        piece: Number of elements of a matmul operand that are read at once.
        interpreted: Whether the kernel is interpreted, one program after the other, without a GPU.
    """

    def __init__(self, tile: int, group: int, *, rows: int, arrived: Any, piece: int, interpreted: bool):
        self.direction, self.tile, number = (pl.program_id(axis) for axis in range(3))
        first, self.first = self.tile * tile, number * group
        self.rows, self.size, self.group = pl.ds(first, tile), tile, group
        self.row_mask = (first + jnp.arange(tile, dtype=jnp.int32) < rows)[:, None]
        self.arrived, self.piece, self.interpreted = arrived, piece, interpreted

    def _cells(self, ref: Any) -> tuple[Any, Array]:
        """Return the program's cells as a slice of the last axis, and a mask of those that exist."""
        cells = self.first + jnp.arange(self.group, dtype=jnp.int32)
        return pl.ds(self.first, self.group), (cells < ref.shape[-1])[None]

    def load(self, ref: Any, *at: Any) -> Array:
        """Return ``ref[d, rows, *at, cells]``, 0 where rows or cells do not exist."""
        cells, mask = self._cells(ref)
        place = ref.at[(self.direction, self.rows, *map(jnp.int32, at), cells)]
        return triton.load(place, mask=self.row_mask & mask, other=0.0)

    def store(self, ref: Any, value: Array, *at: Any, shift: int = 0) -> None:
        """Write ``ref[d, rows, *at, shift + cells]``."""
        cells, mask = self._cells(ref)
        cells = pl.ds(shift + cells.start, cells.size)
        place = ref.at[(self.direction, self.rows, *map(jnp.int32, at), cells)]
        triton.store(place, value, mask=self.row_mask & mask)

    def bias(self, ref: Any, gate: int) -> Array:
        """Return ``ref[d, gate, cells]`` as a row."""
        cells, mask = self._cells(ref)
        return triton.load(ref.at[self.direction, jnp.int32(gate), cells], mask=mask[0], other=0.0)[None]

    def weights(self, ref: Any) -> list[list[Array]]:
        """Return ``ref[d, g, :, cells]`` for every g, in pieces."""
        _, matrices, terms, _ = ref.shape
        place = lambda g, piece: ref.at[self.direction, jnp.int32(g), piece, pl.ds(self.first, self.group)]  # noqa: E731
        pieces = self.pieces(terms)
        return [[triton.load(place(g, piece)) for piece in pieces] for g in range(matrices)]

    def pieces(self, width: int) -> list[Any]:
        """Return slices that cover the width; Triton's arrays have sizes that are powers of two."""
        slices, first = [], 0
        while first < width:
            size = min(1 << (width - first).bit_length() - 1, self.piece // self.size)
            slices.append(pl.ds(first, size))
            first += size
        return slices

    def products(self, ref: Any, t: Array, weights: list[list[Array]]) -> list[Array]:
        """Return ``ref[d, rows, t, :]`` multiplied by each of the weights."""
        sums = [jnp.zeros((self.size, self.group), jnp.float32)] * len(weights)
        for n, piece in enumerate(self.pieces(ref.shape[-1])):
            place = ref.at[self.direction, self.rows, t, piece]
            mask = jnp.broadcast_to(self.row_mask, (self.size, piece.size))
            x = triton.load(place, mask=mask, other=0.0).astype(weights[0][0].dtype)
            sums = [y + triton.dot(x, w[n], allow_tf32=True) for y, w in zip(sums, weights, strict=True)]
        return sums

    def done(self) -> None:
        """Mark a step as finished, so that the other programs of the tile may read it."""
        if not self.interpreted:
            triton.debug_barrier()  # so that all threads have written
        triton.atomic_add(self.arrived, (self.direction, self.tile), jnp.int32(1))

    def wait(self, times: Any) -> None:
        """Wait until all programs of the tile have finished that many steps."""
        if self.interpreted:
            return  # there is a single program per tile when interpreted

        def read(_: Array) -> Array:
            return triton.atomic_add(self.arrived, (self.direction, self.tile), jnp.int32(0))

        jax.lax.while_loop(lambda seen: seen < times * pl.num_programs(2), read, read(jnp.int32(0)))
        triton.debug_barrier()  # so that no thread reads before the count is reached


def _tanh(x: Array) -> Array:
    return 2 * jax.nn.sigmoid(2 * x) - 1


def forward_kernel(*refs: Any, clip: float | None, make_program: Callable[..., _Program]) -> None:
    """Run all steps of `fast_recurrence`; the references are the inputs and outputs of `_run_forward`."""
    gates, bias, c_first, h_first, w, _, h_all, passed, c_all, *by_gate, arrived = refs
    program = make_program(rows=gates.shape[1], arrived=arrived)
    weights = program.weights(w)
    biases = [program.bias(bias, g) for g in range(GATES)]
    c = program.load(c_first)
    program.store(passed, program.load(h_first).astype(passed.dtype), 0)
    program.done()
    program.store(c_all, c, 0)

    def step(t: Array, c: Array) -> Array:
        z = [program.load(gates, t, g) + biases[g] for g in range(GATES)]  # before the wait
        program.wait(t + 1)
        z = [a + b for a, b in zip(z, program.products(passed, t, weights), strict=True)]
        i, f, o = (jax.nn.sigmoid(x) for x in (z[0], z[2] + FORGET_BIAS, z[3]))
        j = _tanh(z[1])
        c = f * c + i * j
        c = c if clip is None else jnp.clip(c, -clip, clip)
        h = o * _tanh(c)
        program.store(passed, h.astype(passed.dtype), t + 1)
        program.done()
        program.store(h_all, h, t)
        program.store(c_all, c, t + 1)
        for ref in by_gate:
            for g, value in enumerate((i, j, f, o)):
                program.store(ref, value, t, g)
        return c

    jax.lax.fori_loop(0, gates.shape[2], step, c)


def backward_kernel(*refs: Any, clip: float | None, make_program: Callable[..., _Program]) -> None:
    """Compute the gradients of z and of the first state, from the last step to the first."""
    by_gate, c_all, grad_c, grad_h, w, _, dz, dc_first, dh_first, arrived = refs
    _, rows, steps, _ = grad_h.shape
    program = make_program(rows=rows, arrived=arrived)
    weights = program.weights(w)

    def local_derivatives(t: Array) -> tuple[Array, ...]:
        """Return those of c by i, j, f and the previous c, of h by o and c, and the output gradients."""
        i, j, f, o = (program.load(by_gate, t, g) for g in range(GATES))
        c, before = program.load(c_all, t + 1), program.load(c_all, t)
        tanh_c = _tanh(c)
        by = j * i * (1 - i), i * (1 - j * j), before * f * (1 - f), f
        if clip is not None:
            by = tuple(jnp.where(jnp.abs(c) < clip, derivative, 0.0) for derivative in by)
        h_by = tanh_c * o * (1 - o), o * (1 - tanh_c * tanh_c)
        return *by, *h_by, program.load(grad_c, t), program.load(grad_h, t)

    def step(n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        dc, dh, (by_i, by_j, by_f, by_previous, by_o, by_c, out_c, out_h) = carry
        t = steps - 1 - n
        dh = dh + out_h
        dc = dc + out_c + dh * by_c
        for g, value in enumerate((dc * by_i, dc * by_j, dc * by_f, dh * by_o)):
            program.store(dz, value.astype(dz.dtype), t, shift=g * w.shape[-1])
        program.done()
        following = local_derivatives(jnp.maximum(t - 1, 0))  # before the wait
        program.wait(n + 1)
        (dh,) = program.products(dz, t, weights)
        return dc * by_previous, dh, following

    zero = jnp.zeros((program.size, program.group), jnp.float32)
    dc, dh, _ = jax.lax.fori_loop(0, steps, step, (zero, zero, local_derivatives(jnp.int32(steps - 1))))
    program.store(dc_first, dc)
    program.store(dh_first, dh)


# Rows per tile: the minimum for tensor cores, and the maximum that fits into registers.
_MIN_TILE, _MAX_TILE = 16, 128
_GROUP = 32  # cells
_MAX_CELLS = 256  # the weights of a larger group do not fit into shared memory
_PIECE = 8192  # number of elements of a matmul operand that a program reads at once

# Values of jax_default_matmul_precision under which TF32 products are exact enough.
_TF32_PRECISIONS = (None, "default", "fastest", "bfloat16", "bfloat16_3x", "tensorfloat32", "high")


def on_cuda() -> bool:
    """Return whether JAX compiles for CUDA by default."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    backend = device.client if isinstance(device, jax.Device) else get_backend(device)
    return "cuda" in backend.platform_version


def unsupported_reason(cells: int, projection: int | None, dtype: DTypeLike) -> str | None:
    """Return why this kernel cannot run a layer, or None.

    Args:
        cells: H.
        projection: P, or None.
        dtype: Matmul dtype.

    Examples:
        >>> unsupported_reason(4096, 512, "bfloat16")
        'it has a projection'
    """
    if projection is not None:
        return "it has a projection"
    if cells > _MAX_CELLS:
        return f"it has {cells} cells, more than {_MAX_CELLS}"
    precision = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if jnp.dtype(dtype) != jnp.bfloat16 and (
        jnp.dtype(dtype) != jnp.float32 or precision not in _TF32_PRECISIONS
    ):
        return "the kernel multiplies in TF32 or bfloat16, and higher matmul precision is set"
    if not on_cuda():
        return "there is no CUDA device here"
    if triton is None:
        return "this JAX has no Pallas for Triton"
    if _shared_bytes(cells, dtype) > _max_shared_bytes():
        return f"{cells} cells in {jnp.dtype(dtype)} exceed this GPU's shared memory"
    return None


def _shared_bytes(cells: int, dtype: DTypeLike) -> int:
    """Return the shared memory of a program: the weights of a group and one piece of the other operand."""
    width = -(-cells // _GROUP) * _GROUP
    return jnp.dtype(dtype).itemsize * (width * _GROUP * GATES + _PIECE)


def _max_shared_bytes() -> int:
    """Return the shared memory per block, from NVIDIA's table of compute capabilities."""
    capability = getattr(jax.devices()[0], "compute_capability", None) or "9.0"
    if float(capability) < 8.0:
        return 0  # Triton's matmuls need an A100 or newer
    return {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}.get(capability, 99) * 1024


def run_persistent(state: State, gates: Array, w: Weights, clips: Clips) -> State:
    """Run `fast_recurrence` of a layer without projection in one kernel.

    Each of several devices runs its own rows. Only first derivatives in reverse mode are defined.

    Args:
        state: First state, float32.
        gates: ``[D, B, T, 4H]`` float32.
        w: Recurrent weights in the matmul dtype: bfloat16, or float32 for TF32.
        clips: Bounds, static.

    Returns:
        The states after every step, c and h ``[D, B, T, H]``.
    """
    devices = data_parallel_size()
    if devices == 1:
        return _run_local_rows(state, gates, w, clips)
    if gates.shape[1] % devices or set(jax.sharding.get_abstract_mesh().axis_types) != {AxisType.Auto}:
        return fast_recurrence(state, gates, w, clips)  # any mesh can shard the fast kernel
    rows, replicated = PartitionSpec(None, DATA), PartitionSpec()
    own: Any = jax.shard_map(
        partial(_run_local_rows, clips=clips),
        in_specs=(rows, rows, replicated),
        out_specs=rows,
        check_vma=False,
    )
    return own(state, gates, w)


def _run_local_rows(state: State, gates: Array, w: Weights, clips: Clips) -> State:
    """Run the rows of one device, as many at a time as its programs can hold."""
    directions, rows, _, cells = gates.shape
    most = _max_rows(directions, _groups(cells // GATES))
    if not most:
        return fast_recurrence(state, gates, w, clips)
    if rows <= most:
        return _recurrence(state, gates, w, clips)
    parts = -(-rows // most)

    def split(x: Array) -> Array:
        padded = jnp.pad(x, [(0, 0), (0, parts * most - rows)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(padded.reshape(directions, parts, most, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(directions, parts * most, *x.shape[3:])[:, :rows]

    # A loop, because two concurrent launches could each hold processors that the other waits for.
    states = jax.lax.map(lambda part: _recurrence(*part, w, clips), jax.tree.map(split, (state, gates)))
    return jax.tree.map(join, states)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recurrence(state: State, gates: Array, w: Weights, clips: Clips) -> State:
    h, _, c, *_ = _run_forward(state, gates, w, clips, with_gradient=False)
    return _trim_states(h, c)


def _forward(state: State, gates: Array, w: Weights, clips: Clips):
    h, passed, c, by_gate = _run_forward(state, gates, w, clips, with_gradient=True)
    return _trim_states(h, c), (passed, c, by_gate, w)


def _trim_states(h: Array, c: Array) -> State:
    """Return the states after every step from h ``[D, B, T, H]`` and c ``[D, B, T + 1, W]``."""
    return State(c[:, :, 1:, : h.shape[-1]], h)


def _run_forward(
    state: State, gates: Array, w: Weights, clips: Clips, with_gradient: bool
) -> tuple[Array, ...]:
    """Run the forward kernel.

    Returns:
        h ``[D, B, T, H]``; h after the first state as programs exchange it, ``[D, B, T + 1, W]`` in w's
        dtype; c after the first state ``[D, B, T + 1, W]``; and with gradients the activated gates i, j, f
        and o ``[D, B, T, 4, W]``.
    """
    directions, rows, steps, _ = gates.shape
    split = lambda x: x.reshape(*x.shape[:-1], GATES, -1)  # noqa: E731
    recurrent = _padded_weights(w)
    width = recurrent.shape[-1]
    shape = partial(_shape, directions, rows)
    made = [shape(steps, state.h.shape[-1]), shape(steps + 1, width, dtype=w.recurrent.dtype)]
    made += [shape(steps + 1, width)] + [shape(steps, GATES, width)] * with_gradient
    bias = split(w.bias.astype(gates.dtype))
    return _call(forward_kernel, clips, made, split(gates), bias, *state, recurrent)


def _shape(*sizes: int, dtype: DTypeLike = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _backward(clips: Clips, residuals: Any, grads: State):
    passed, c, by_gate, w = residuals
    directions, rows, steps, _, width = by_gate.shape
    cells = grads.h.shape[-1]
    first = _shape(directions, rows, cells)
    made = [_shape(directions, rows, steps, GATES * width, dtype=w.recurrent.dtype), first, first]
    to_h = _padded_weights(w).swapaxes(2, 3).reshape(directions, 1, -1, width)
    dz, dc, dh = _call(backward_kernel, clips, made, by_gate, c, *grads, to_h)
    dz = dz.reshape(by_gate.shape)[..., :cells].reshape(*by_gate.shape[:3], GATES * cells)
    layout = Layout(steps, transposed=False)
    before = layout.join_steps(passed[:, :, :-1, :cells])
    d_recurrent = layout.matrix_gradient(before, layout.join_steps(dz), w.recurrent)
    dz = dz.astype(jnp.float32)  # its values stay rounded to the matmul dtype
    return State(dc, dh), dz, Weights(d_recurrent, layout.bias_gradient(layout.join_steps(dz), w.bias), None)


_recurrence.defvjp(_forward, _backward)


def _is_interpreted() -> bool:
    """Return whether kernels are interpreted, as in tests without a GPU."""
    return jax.default_backend() == "cpu"


def _padded_weights(w: Weights) -> Array:
    """Return the weights from h to each gate, padded, ``[D, 4, W, W]``."""
    directions, cells, _ = w.recurrent.shape
    more = 0, _groups(cells) * _cells_of_group(cells) - cells
    by_gate = w.recurrent.reshape(directions, cells, GATES, cells).swapaxes(1, 2)
    return jnp.pad(by_gate, ((0, 0), (0, 0), more, more))


def _processor_count() -> int:
    """Return the number of streaming multiprocessors; 1 where kernels are interpreted."""
    return getattr(jax.devices()[0], "core_count", None) or 1


def _cells_of_group(cells: int) -> int:
    """Return C; an interpreted program has all cells, because it cannot wait for another."""
    return 1 << (max(cells, _MIN_TILE) - 1).bit_length() if _is_interpreted() else _GROUP


def _groups(cells: int) -> int:
    return -(-cells // _cells_of_group(cells))


def _max_rows(directions: int, groups: int) -> int:
    """Return the largest number of rows for which each program of a launch has a processor."""
    tiles = 1 if _is_interpreted() else _processor_count() // (directions * groups)
    return tiles * _MAX_TILE


def _tile_rows(directions: int, rows: int, groups: int) -> int:
    """Return the smallest R for which each program has a processor."""
    tile = _MIN_TILE
    while directions * -(-rows // tile) * groups > _processor_count() and tile < _MAX_TILE:
        tile *= 2
    return tile


def _call(kernel: Callable[..., None], clips: Clips, made: list[Any], *given: Array) -> Any:
    """Run a kernel with one program for each direction, tile and group; return arrays of the shapes made."""
    directions, rows = made[0].shape[:2]
    width = given[-1].shape[-1]
    group, groups = _cells_of_group(width), _groups(width)
    tile = _tile_rows(directions, rows, groups)
    tiles = -(-rows // tile)
    arrived = jnp.zeros((directions, tiles), jnp.int32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    make_program = partial(_Program, tile, group, piece=_PIECE, interpreted=_is_interpreted())
    *out, _ = pl.pallas_call(
        partial(kernel, clip=clips.cell, make_program=make_program),
        grid=(directions, tiles, groups),
        in_specs=[anywhere] * (len(given) + 1),
        out_specs=[anywhere] * (len(made) + 1),
        out_shape=(*made, jax.ShapeDtypeStruct(arrived.shape, arrived.dtype)),
        input_output_aliases={len(given): len(made)},
        compiler_params=triton.CompilerParams(num_warps=8 if tile > 32 else 4, num_stages=1),
        interpret=_is_interpreted(),
        name=f"lstm_{kernel.__name__}",
    )(*given, arrived)
    return out
