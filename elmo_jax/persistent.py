"""All steps of an LSTM layer in one GPU kernel: no step waits for a launch.

A scan on a GPU launches several small kernels a step, and waits for the launches rather than
for the arithmetic. Here a program is there from the first step to the last, see programs.py.
Programs wait for each other, so all of a launch must be on the GPU at once; `_tile_rows` and
`_most_rows` see to it. Pallas for Triton is what they are written in, which JAX 0.11 calls
deprecated: where a later JAX has it no more, `obstacle` says so, and layers run on the scan.

Nouns: a *tile* is some rows, a *group* some cells; a program has one of each. *Padded* cells,
up to a whole number of groups, have weights of zero and stay zero.
Axes: B batch, T time, D direction, H cells, W padded cells, R rows of a tile.
"""

from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from elmo_jax.cudnn import ROUGH, on_cuda
from elmo_jax.fast import fast_recurrence
from elmo_jax.layout import Layout
from elmo_jax.mesh import DATA, sharers
from elmo_jax.recurrence import GATES, Clips, State, Weights

_ROWS, _MOST_ROWS = 16, 128  # of a tile: the fewest that tensor cores multiply, the most for its registers
_GROUP = 32  # cells
_MOST = 256  # cells of a layer; beyond, a group's weights do not fit into a processor
_PIECE = 8192  # numbers of a factor of a product that a program reads at once


def obstacle(cells: int, projection: int | None, dtype: DTypeLike) -> str | None:
    """What keeps this kernel from a layer, or None.

    Args:
        cells: H.
        projection: P, or None.
        dtype: of the products.

    Example:
        >>> obstacle(4096, 512, "bfloat16")
        'the persistent kernel projects no cells, and these are projected'
    """
    if projection is not None:
        return "the persistent kernel projects no cells, and these are projected"
    if cells > _MOST:
        return f"the persistent kernel runs up to {_MOST} cells, and these are {cells}"
    asked = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    if jnp.dtype(dtype) != jnp.bfloat16 and (jnp.dtype(dtype) != jnp.float32 or asked not in ROUGH):
        return "the persistent kernel multiplies in TF32 or bfloat16, and more exact products are asked for"
    if not on_cuda():
        return "there is no CUDA device here"
    if not _there_is_triton():
        return "this JAX has no Pallas for Triton"
    if _held(cells, dtype) > _memory():
        return f"this GPU's processors hold too little for {cells} cells in {jnp.dtype(dtype)}"
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
    devices = sharers()
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
    layout = Layout(steps, turned=False)
    before = layout.flat(passed[:, :, :-1, :cells])
    d_recurrent = layout.matrix_gradient(before, layout.flat(dz), w.recurrent)
    dz = dz.astype(jnp.float32)  # rounded as every product with it would round it
    return State(dc, dh), dz, Weights(d_recurrent, layout.bias_gradient(layout.flat(dz), w.bias), None)


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

    from elmo_jax.programs import backward_kernel, forward_kernel

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
