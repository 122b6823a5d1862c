"""What a GPU's program does with its rows and cells of an LSTM layer, in Pallas for Triton.

A program keeps the recurrent weights of its cells on its processor, and its c in registers,
through all steps. Those that share rows pass their part of h to each other through memory
(backward, their part of the gates' gradients), and count in `arrived` how often they were
done with a step: who wants to read waits until all have.

Nouns: a *tile* is some rows, a *group* some cells; a program has one of each.
Axes: B batch, T time, D direction, G matrices, W padded cells, R rows of a tile, C cells of a group.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from elmo_jax.recurrence import FORGET_BIAS, GATES


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
