"""All steps of an LSTM layer in one GPU kernel: no step waits for a launch.

A scan on a GPU launches several small kernels a step, and waits for the launches rather than
for the arithmetic. Here a program is there from the first step to the last, see programs.py.
Programs wait for each other, so all of a launch must be on the GPU at once; `_tile_rows` and
`_most_rows` see to it. Pallas for Triton is what they are written in, which JAX 0.11 calls
deprecated: where a later JAX has it no more, `unsupported_reason` says so, and layers run on the scan.

Nouns: a *tile* is some rows, a *group* some cells; a program has one of each. *Padded* cells,
up to a whole number of groups, have weights of zero and stay zero.
Axes: B batch, T time, D direction, H cells, W padded cells, R rows of a tile.

What a GPU's program does with its rows and cells of an LSTM layer, in Pallas for Triton.

A program keeps the recurrent weights of its cells on its processor, and its c in registers,
through all steps. Those that share rows pass their part of h to each other through memory
(backward, their part of the gates' gradients), and count in `arrived` how often they were
done with a step: who wants to read waits until all have.

Nouns: a *tile* is some rows, a *group* some cells; a program has one of each.
Axes: B batch, T time, D direction, G matrices, W padded cells, R rows of a tile, C cells of a group.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jax.extend.backend import get_backend
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from elmo_jax.ops.lstm import FORGET_BIAS, GATES, Clips, Layout, State, Weights, fast_recurrence
from elmo_jax.parallel import DATA, data_parallel_size


class _Program:
    """What a program has, and how it reads, writes and waits.

    Args:
        tile, group: R and C.
        rows: B; those of the last tile beyond it are not real.
        arrived: ``[D, tiles]``, how often programs of a tile were done with a step.
        piece: numbers of a factor of a product that are read at once.
        interpreted: whether there is no GPU; programs then follow each other, and each is alone.
    """

    def __init__(self, tile: int, group: int, rows: int, arrived: Any, piece: int, interpreted: bool):
        self.direction, self.tile, number = (pl.program_id(axis) for axis in range(3))
        first, self.first = self.tile * tile, number * group
        self.rows, self.size, self.group = pl.ds(first, tile), tile, group
        self.real = (first + jnp.arange(tile, dtype=jnp.int32) < rows)[:, None]
        self.arrived, self.piece, self.interpreted = arrived, piece, interpreted

    def _cells(self, ref: Any) -> tuple[Any, Array]:
        """The program's cells along the last axis, and which of them there are."""
        cells = self.first + jnp.arange(self.group, dtype=jnp.int32)
        return pl.ds(self.first, self.group), (cells < ref.shape[-1])[None]

    def load(self, ref: Any, *at: Any) -> Array:
        """``ref[d, rows, *at, cells]``, 0 beyond what there is."""
        cells, there = self._cells(ref)
        place = ref.at[(self.direction, self.rows, *map(jnp.int32, at), cells)]
        return triton.load(place, mask=self.real & there, other=0.0)

    def store(self, ref: Any, value: Array, *at: Any, shift: int = 0) -> None:
        """Write ``ref[d, rows, *at, shift + cells]``."""
        cells, there = self._cells(ref)
        place = ref.at[
            (self.direction, self.rows, *map(jnp.int32, at), pl.ds(shift + cells.start, cells.size))
        ]
        triton.store(place, value, mask=self.real & there)

    def bias(self, ref: Any, gate: int) -> Array:
        """``ref[d, gate, cells]`` as a row."""
        cells, there = self._cells(ref)
        return triton.load(ref.at[self.direction, jnp.int32(gate), cells], mask=there[0], other=0.0)[None]

    def weights(self, ref: Any) -> list[list[Array]]:
        """``ref[d, g, :, cells]`` for every g, in pieces; for all steps."""
        _, matrices, terms, _ = ref.shape
        place = lambda g, piece: ref.at[self.direction, jnp.int32(g), piece, pl.ds(self.first, self.group)]  # noqa: E731
        pieces = self.pieces(terms)
        return [[triton.load(place(g, piece)) for piece in pieces] for g in range(matrices)]

    def pieces(self, width: int) -> list[Any]:
        """Slices that make up the whole: powers of two, as Triton's arrays must be, and not too large."""
        slices, first = [], 0
        while first < width:
            size = min(1 << (width - first).bit_length() - 1, self.piece // self.size)
            slices.append(pl.ds(first, size))
            first += size
        return slices

    def products(self, ref: Any, t: Array, weights: list[list[Array]]) -> list[Array]:
        """``ref[d, rows, t, :]`` times each of some weights."""
        sums = [jnp.zeros((self.size, self.group), jnp.float32)] * len(weights)
        for n, piece in enumerate(self.pieces(ref.shape[-1])):
            place = ref.at[self.direction, self.rows, t, piece]
            mask = jnp.broadcast_to(self.real, (self.size, piece.size))
            x = triton.load(place, mask=mask, other=0.0).astype(weights[0][0].dtype)
            sums = [y + triton.dot(x, w[n], allow_tf32=True) for y, w in zip(sums, weights, strict=True)]
        return sums

    def done(self) -> None:
        """Let the other programs of the tile read what this one has written."""
        if not self.interpreted:
            triton.debug_barrier()  # all threads have written
        triton.atomic_add(self.arrived, (self.direction, self.tile), jnp.int32(1))

    def wait(self, times: Any) -> None:
        """Until all programs of the tile were done so many times."""
        if self.interpreted:
            return  # the only program of its tile

        def look(_: Array) -> Array:
            return triton.atomic_add(self.arrived, (self.direction, self.tile), jnp.int32(0))

        jax.lax.while_loop(lambda seen: seen < times * pl.num_programs(2), look, look(jnp.int32(0)))
        triton.debug_barrier()  # no thread reads before one has looked


def _tanh(x: Array) -> Array:
    return 2 * jax.nn.sigmoid(2 * x) - 1


def forward_kernel(
    gates, bias, c_first, h_first, w, _, h_all, passed, c_all, *more, tile, group, clip, piece, interpreted
):
    """All steps of `fast_recurrence`; what it reads and makes is as `persistent` shapes it."""
    *by_gate, arrived = more
    program = _Program(tile, group, gates.shape[1], arrived, piece, interpreted)
    weights = program.weights(w)
    biases = [program.bias(bias, g) for g in range(GATES)]
    c = program.load(c_first)
    program.store(passed, program.load(h_first).astype(passed.dtype), 0)
    program.done()
    program.store(c_all, c, 0)

    def step(t: Array, c: Array) -> Array:
        z = [program.load(gates, t, g) + biases[g] for g in range(GATES)]  # while others finish
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


def backward_kernel(
    by_gate,
    c_all,
    grad_c,
    grad_h,
    w,
    _,
    dz,
    dc_first,
    dh_first,
    arrived,
    *,
    tile,
    group,
    clip,
    piece,
    interpreted,
):
    """The gradients of the gates and the first state, from the last step to the first."""
    _, rows, steps, _ = grad_h.shape
    program = _Program(tile, group, rows, arrived, piece, interpreted)
    weights = program.weights(w)

    def slopes(t: Array) -> tuple[Array, ...]:
        """Of c by i, j, f and the c before, h by o and c; and the gradients of c and h from outside."""
        i, j, f, o = (program.load(by_gate, t, g) for g in range(GATES))
        c, before = program.load(c_all, t + 1), program.load(c_all, t)
        tanh_c = _tanh(c)
        by = j * i * (1 - i), i * (1 - j * j), before * f * (1 - f), f
        if clip is not None:
            by = tuple(jnp.where(jnp.abs(c) < clip, slope, 0.0) for slope in by)
        shown = tanh_c * o * (1 - o), o * (1 - tanh_c * tanh_c)
        return *by, *shown, program.load(grad_c, t), program.load(grad_h, t)

    def step(n: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        dc, dh, (by_i, by_j, by_f, kept, by_o, by_c, more_c, more_h) = carry
        t = steps - 1 - n
        dh = dh + more_h
        dc = dc + more_c + dh * by_c
        for g, slope in enumerate((dc * by_i, dc * by_j, dc * by_f, dh * by_o)):
            program.store(dz, slope.astype(dz.dtype), t, shift=g * w.shape[-1])
        program.done()
        following = slopes(jnp.maximum(t - 1, 0))  # while others finish
        program.wait(n + 1)
        (dh,) = program.products(dz, t, weights)
        return dc * kept, dh, following

    zero = jnp.zeros((tile, group), jnp.float32)
    dc, dh, _ = jax.lax.fori_loop(0, steps, step, (zero, zero, slopes(jnp.int32(steps - 1))))
    program.store(dc_first, dc)
    program.store(dh_first, dh)


_ROWS, _MOST_ROWS = 16, 128  # of a tile: the fewest that tensor cores multiply, the most for its registers
_GROUP = 32  # cells
_MOST = 256  # cells of a layer; beyond, a group's weights do not fit into a processor
_PIECE = 8192  # numbers of a factor of a product that a program reads at once


# Values of jax_default_matmul_precision under which TF32 products are exact enough.
_TF32_PRECISIONS = (None, "default", "fastest", "bfloat16", "bfloat16_3x", "tensorfloat32", "high")


def on_cuda() -> bool:
    """Return whether JAX compiles for CUDA by default."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    backend = device.client if isinstance(device, jax.Device) else get_backend(device)
    return "cuda" in backend.platform_version


def unsupported_reason(cells: int, projection: int | None, dtype: DTypeLike) -> str | None:
    """What keeps this kernel from a layer, or None.

    Args:
        cells: H.
        projection: P, or None.
        dtype: of the products.

    Example:
        >>> unsupported_reason(4096, 512, "bfloat16")
        'it has a projection'
    """
    if projection is not None:
        return "it has a projection"
    if cells > _MOST:
        return f"it has {cells} cells, more than {_MOST}"
    asked = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if jnp.dtype(dtype) != jnp.bfloat16 and (
        jnp.dtype(dtype) != jnp.float32 or asked not in _TF32_PRECISIONS
    ):
        return "the kernel multiplies in TF32 or bfloat16, and higher matmul precision is set"
    if not on_cuda():
        return "there is no CUDA device here"
    if not _there_is_triton():
        return "this JAX has no Pallas for Triton"
    if _held(cells, dtype) > _memory():
        return f"{cells} cells in {jnp.dtype(dtype)} exceed this GPU's shared memory"
    return None


def _there_is_triton() -> bool:
    try:
        return find_spec("jax.experimental.pallas.triton") is not None
    except ModuleNotFoundError:  # of Pallas altogether
        return False


def _held(cells: int, dtype: DTypeLike) -> int:
    """Bytes that a program holds in its processor's memory, as kernels compiled for an H100 do:
    a group's weights, and one piece of what they are multiplied with."""
    width = -(-cells // _GROUP) * _GROUP
    return jnp.dtype(dtype).itemsize * (width * _GROUP * GATES + _PIECE)


def _memory() -> int:
    """Bytes of a processor that a program can have, by NVIDIA's tables of compute capabilities."""
    capability = getattr(jax.devices()[0], "compute_capability", None) or "9.0"
    if float(capability) < 8.0:
        return 0  # Triton's products want at least an A100
    return {"8.0": 163, "8.7": 163, "9.0": 227, "10.0": 227, "10.3": 227}.get(capability, 99) * 1024


def run_persistent(state: State, gates: Array, w: Weights, clips: Clips) -> State:
    """What `fast_recurrence` is, in one kernel a layer; layers are not projected.

    On several devices each runs its own rows. There are first gradients alone, in reverse; who
    wants second ones, or `jax.jvp`, takes another kernel.

    Args:
        state: the first state, float32.
        gates: ``[D, B, T, 4H]`` float32.
        w: the recurrent weights, in the dtype of the products: bfloat16, or float32 for TF32.
        clips: bounds, static.

    Returns:
        The states after every step, c and h ``[D, B, T, H]``.
    """
    devices = data_parallel_size()
    if devices == 1:
        return _own_rows(state, gates, w, clips)
    if gates.shape[1] % devices or set(jax.sharding.get_abstract_mesh().axis_types) != {AxisType.Auto}:
        return fast_recurrence(state, gates, w, clips)  # which any mesh can share out
    rows, everywhere = PartitionSpec(None, DATA), PartitionSpec()
    own: Any = jax.shard_map(
        partial(_own_rows, clips=clips), in_specs=(rows, rows, everywhere), out_specs=rows, check_vma=False
    )
    return own(state, gates, w)


def _own_rows(state: State, gates: Array, w: Weights, clips: Clips) -> State:
    """The rows of one device, as many at a time as it has room for programs."""
    directions, rows, _, cells = gates.shape
    most = _most_rows(directions, _groups(cells // GATES))
    if not most:
        return fast_recurrence(state, gates, w, clips)
    if rows <= most:
        return _recurrence(state, gates, w, clips)
    parts = -(-rows // most)

    def cut(x: Array) -> Array:
        filled = jnp.pad(x, [(0, 0), (0, parts * most - rows)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(filled.reshape(directions, parts, most, *x.shape[2:]), 1, 0)

    def whole(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(directions, parts * most, *x.shape[3:])[:, :rows]

    # A loop, for two launches at once could each hold what the other waits for.
    states = jax.lax.map(lambda part: _recurrence(*part, w, clips), jax.tree.map(cut, (state, gates)))
    return jax.tree.map(whole, states)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _recurrence(state: State, gates: Array, w: Weights, clips: Clips) -> State:
    h, _, c, *_ = _run(state, gates, w, clips, differentiated=False)
    return _states(h, c)


def _forward(state: State, gates: Array, w: Weights, clips: Clips):
    h, passed, c, by_gate = _run(state, gates, w, clips, differentiated=True)
    return _states(h, c), (passed, c, by_gate, w)


def _states(h: Array, c: Array) -> State:
    """Those after every step, of h ``[D, B, T, H]`` and c ``[D, B, T + 1, W]``."""
    return State(c[:, :, 1:, : h.shape[-1]], h)


def _run(state: State, gates: Array, w: Weights, clips: Clips, differentiated: bool) -> tuple[Array, ...]:
    """What the forward kernel makes.

    Returns:
        h ``[D, B, T, H]``; the same as programs pass it on, behind the first, in w's dtype
        ``[D, B, T + 1, W]``; c, behind the first, ``[D, B, T + 1, W]``; and, if
        `differentiated`, the gates' values i, j, f, o ``[D, B, T, 4, W]``.
    """
    directions, rows, steps, _ = gates.shape
    split = lambda x: x.reshape(*x.shape[:-1], GATES, -1)  # noqa: E731
    recurrent = _padded_weights(w)
    width = recurrent.shape[-1]
    made = [
        jax.ShapeDtypeStruct((directions, rows, steps, state.h.shape[-1]), jnp.float32),
        jax.ShapeDtypeStruct((directions, rows, steps + 1, width), w.recurrent.dtype),
        jax.ShapeDtypeStruct((directions, rows, steps + 1, width), jnp.float32),
        jax.ShapeDtypeStruct((directions, rows, steps, GATES, width), jnp.float32),
    ]
    made = made if differentiated else made[:-1]
    return _call("forward", clips, made, split(gates), split(w.bias.astype(gates.dtype)), *state, recurrent)


def _backward(clips: Clips, residuals: Any, grads: State):
    passed, c, by_gate, w = residuals
    directions, rows, steps, _, width = by_gate.shape
    cells = grads.h.shape[-1]
    made = [
        jax.ShapeDtypeStruct((directions, rows, steps, GATES * width), w.recurrent.dtype),
        jax.ShapeDtypeStruct((directions, rows, cells), jnp.float32),
        jax.ShapeDtypeStruct((directions, rows, cells), jnp.float32),
    ]
    to_h = _padded_weights(w).swapaxes(2, 3).reshape(directions, 1, -1, width)
    dz, dc, dh = _call("backward", clips, made, by_gate, c, *grads, to_h)
    dz = dz.reshape(by_gate.shape)[..., :cells].reshape(*by_gate.shape[:3], GATES * cells)
    layout = Layout(steps, transposed=False)
    before = layout.join_steps(passed[:, :, :-1, :cells])
    d_recurrent = layout.matrix_gradient(before, layout.join_steps(dz), w.recurrent)
    dz = dz.astype(jnp.float32)  # rounded as every product with it would round it
    return State(dc, dh), dz, Weights(d_recurrent, layout.bias_gradient(layout.join_steps(dz), w.bias), None)


_recurrence.defvjp(_forward, _backward)


def _interpreted() -> bool:
    """Whether kernels are only played, for there is no GPU: in tests."""
    return jax.default_backend() == "cpu"


def _padded_weights(w: Weights) -> Array:
    """h to each gate ``[D, 4, W, W]``."""
    directions, cells, _ = w.recurrent.shape
    more = 0, _groups(cells) * _cells_of_group(cells) - cells
    by_gate = w.recurrent.reshape(directions, cells, GATES, cells).swapaxes(1, 2)
    return jnp.pad(by_gate, ((0, 0), (0, 0), more, more))


def _processors() -> int:
    """Of a GPU; where kernels are interpreted, one program after the other, there is one."""
    return getattr(jax.devices()[0], "core_count", None) or 1


def _cells_of_group(cells: int) -> int:
    """Programs that are interpreted cannot wait for each other, so that each has all cells."""
    return 1 << (max(cells, _ROWS) - 1).bit_length() if _interpreted() else _GROUP


def _groups(cells: int) -> int:
    return -(-cells // _cells_of_group(cells))


def _most_rows(directions: int, groups: int) -> int:
    """Of a launch, so that there is a processor for each program."""
    tiles = 1 if _interpreted() else _processors() // (directions * groups)
    return tiles * _MOST_ROWS


def _tile_rows(directions: int, rows: int, groups: int) -> int:
    """R, the fewest so that there is a processor for each program."""
    tile = _ROWS
    while directions * -(-rows // tile) * groups > _processors() and tile < _MOST_ROWS:
        tile *= 2
    return tile


def _call(kernel: Literal["forward", "backward"], clips: Clips, made: list[Any], *given: Array) -> Any:
    """Run a kernel, a program for each direction, tile and group."""
    from jax.experimental import pallas as pl  # half a second to import, for those with a GPU
    from jax.experimental.pallas import triton

    pass

    directions, rows = made[0].shape[:2]
    width = given[-1].shape[-1]
    group, groups = _cells_of_group(width), _groups(width)
    tile = _tile_rows(directions, rows, groups)
    tiles = -(-rows // tile)
    arrived = jnp.zeros((directions, tiles), jnp.int32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    *out, _ = pl.pallas_call(
        partial(
            {"forward": forward_kernel, "backward": backward_kernel}[kernel],
            tile=tile,
            group=group,
            clip=clips.cell,
            piece=_PIECE,
            interpreted=_interpreted(),
        ),
        grid=(directions, tiles, groups),
        in_specs=[anywhere] * (len(given) + 1),
        out_specs=[anywhere] * (len(made) + 1),
        out_shape=(*made, jax.ShapeDtypeStruct(arrived.shape, arrived.dtype)),
        input_output_aliases={len(given): len(made)},
        compiler_params=triton.CompilerParams(num_warps=8 if tile > 32 else 4, num_stages=1),
        interpret=_interpreted(),
        name=f"lstm_{kernel}",
    )(*given, arrived)
    return out
