"""Negative log-likelihoods over a large vocabulary: full, in chunks, and sampled; one signature.

Nouns: the *table* holds a row a class; *negatives* are as in `negatives`.
Axes: N positions (any of B, T and D, flattened), P features, V classes, S negatives.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from elmo_jax.negatives import Negatives

# Of float32 logits alive at once. Larger is hardly faster on a CPU; a GPU waits for every launch.
CHUNK_BYTES, SAMPLED_CHUNK_BYTES, ACCELERATOR_CHUNK_BYTES = 24 << 20, 8 << 20, 1 << 30
# Numbers of a row, and rows of the table, of which an accelerator's products want multiples.
_ALIGNED, _SPLIT = 8, 128
_ROWS = 16  # of which a chunk is a multiple, as products like it
_NEAR = 70.0  # a logit so far above the shift, and a million classes beside it, stay finite in float32
_MASKED = -1e30  # a logit that takes no part; finite, so that its gradient is zero, not NaN


def full_nll(hidden: Array, table: Array, bias: Array, targets: Array, weight: Array) -> tuple[Array, Array]:
    """Weighted sum of -log softmax(h W^T + b)[target] over all V classes.

    The logits are made a chunk of positions at a time and their gradient in the same pass,
    so ``[N, V]`` never exists and nothing is computed twice. The weights must not depend on
    what is trained.

    Args:
        hidden: ``[N, P]``; its dtype is that of the products, sums are float32.
        table: ``[V, P]``.
        bias: ``[V]``.
        targets: ``[N]`` int32, in [0, V).
        weight: ``[N]``, 0 where a position does not count.

    Returns:
        The weighted sum, a scalar, and every position's own value ``[N]``, through which
        no gradient flows.

    Example:
        >>> h, w = jnp.zeros((3, 4)), jnp.zeros((10, 4))
        >>> total, each = full_nll(h, w, jnp.zeros(10), jnp.array([1, 2, 3]), jnp.ones(3))
        >>> round(float(total), 3)  # 3 ln 10
        6.908
    """
    if not _on_cpu():
        columns, rows = (0, -hidden.shape[-1] % _ALIGNED), (0, -len(table) % _SPLIT)
        hidden, table = jnp.pad(hidden, ((0, 0), columns)), jnp.pad(table, (rows, columns))
        bias = jnp.pad(bias, rows, constant_values=_MASKED)
    return _full_nll(hidden, table, bias, targets, weight)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _axes() -> str:
    """Of logits, in einsum's letters: v classes and r positions, of which a CPU's products like v first."""
    return "vr" if _on_cpu() else "rv"


def _by_class(x: Array) -> Array:
    """``[V]`` beside logits."""
    return jnp.expand_dims(x, _axes().index("r"))


def _by_row(x: Array) -> Array:
    """``[R]`` beside logits."""
    return jnp.expand_dims(x, _axes().index("v"))


def _sum_of_classes(exps: Array) -> Array:
    """``[R]``: a product, or XLA:CPU would work the exponentials out a second time for it.

    An accelerator is not to round their terms.
    """
    axes = _axes()
    ones = jnp.ones(exps.shape[axes.index("v")], exps.dtype)
    return jnp.einsum(f"{axes},v->r", exps, ones, precision="highest")


@jax.custom_vjp
def _full_nll(hidden: Array, table: Array, bias: Array, targets: Array, weight: Array):
    longest = _longest(table)

    def chunk(_, part):
        h, t, w = part
        each = _chunk_nll(h, table, bias, t, longest)[0]
        return None, (each, each * w)

    parts, n = _in_chunks(table.shape[0], CHUNK_BYTES, (hidden, targets, weight))
    each, weighted = jax.lax.scan(chunk, None, parts)[1]
    return jnp.sum(weighted), each.reshape(-1)[:n]


def _longest(table: Array) -> Array:
    """The norm of the longest row."""
    table = table.astype(np.promote_types(table.dtype, np.float32))
    return jnp.sqrt(jnp.max(jnp.einsum("vp,vp->v", table, table)))


def _chunk_nll(h: Array, table: Array, bias: Array, targets: Array, longest: Array) -> tuple[Array, ...]:
    """Of a chunk of R positions: values ``[R]``, exp(logit - shift) along `_axes`, and its sums ``[R]``."""
    sums, axes = np.promote_types(h.dtype, np.float32), _axes()
    table, bias = table.astype(h.dtype), bias.astype(sums)
    reached = jnp.einsum("rp,rp->r", h, table[targets], preferred_element_type=sums) + bias[targets]
    products = jnp.einsum(f"rp,vp->{axes}", h, table, preferred_element_type=sums)

    def largest() -> Array:
        return jnp.max(products + _by_class(bias), axes.index("v"))

    # To find the largest is a pass over all logits; where none can lie far above the target's, that does.
    farthest = jnp.linalg.norm(h.astype(sums), axis=-1) * longest + jnp.max(bias) - reached
    shift = jax.lax.cond(jnp.all(farthest < _NEAR), lambda: reached, largest) if _on_cpu() else largest()
    exps = jnp.exp(products + _by_class(bias) - _by_row(shift))
    total = _sum_of_classes(exps)
    return jnp.log(total) + shift - reached, exps, total


def _in_chunks(classes: int, alive: int, arrays: Any) -> tuple[Any, int]:
    """Arrays ``[N, ...]`` cut into equal chunks of positions, the last filled with zeros; and N.

    Of the chunks' logits so many bytes may be alive at once, if this is a CPU.
    """
    n = jax.tree.leaves(arrays)[0].shape[0]
    alive = alive if _on_cpu() else ACCELERATOR_CHUNK_BYTES
    most = max(_ROWS, alive // (4 * classes) // _ROWS * _ROWS)

    def rows_of(count: int) -> int:
        return -(-n // count // _ROWS) * _ROWS

    fewest = max(1, -(-n // most))  # chunks, of which a few more may leave less to be filled
    count = min(range(fewest, 2 * fewest), key=lambda count: (count * rows_of(count), count))
    rows = n if count == 1 else rows_of(count)

    def cut(a: Array) -> Array:
        filled = jnp.pad(a, [(0, count * rows - n)] + [(0, 0)] * (a.ndim - 1))
        return filled.reshape(count, rows, *a.shape[1:])

    return jax.tree.map(cut, arrays), n


def _gradients(d_logits: Array, scale: Array, h: Array, rows: Array) -> tuple[Array, Array, Array]:
    """Of h, the classes' rows and their bias, from the logits' along `_axes` but for a factor ``[R]``.

    The factor goes into the small side of each product, so that the logits are passed over once less.
    """
    sums, axes = scale.dtype, _axes()
    g, scaled = d_logits.astype(h.dtype), (h.astype(sums) * scale[:, None]).astype(h.dtype)
    dh = jnp.einsum(f"{axes},vp->rp", g, rows.astype(h.dtype), preferred_element_type=sums)
    d_rows = jnp.einsum(f"{axes},rp->vp", g, scaled, preferred_element_type=sums)
    # A sum over rows, which XLA:CPU is slow at.
    d_bias = jnp.einsum(f"{axes},r->v", d_logits, scale, precision="highest")
    return dh * scale[:, None], d_rows, d_bias


def _full_forward(hidden: Array, table: Array, bias: Array, targets: Array, weight: Array):
    """The value, and the gradient for a cotangent of one.

    That of the logits is (exp - sum at the target) times weight / sum.
    """
    sums, longest = np.promote_types(hidden.dtype, np.float32), _longest(table)

    def chunk(carry, part):
        d_table, d_bias = carry
        h, t, w = part
        each, exps, total = _chunk_nll(h, table, bias, t, longest)
        scale = w.astype(sums) / total
        if _on_cpu():
            d_logits = exps.at[t, jnp.arange(len(t))].add(-total, unique_indices=True)
        else:  # which writes no exponentials down, but works them out where they are wanted
            reached = jnp.arange(exps.shape[1], dtype=t.dtype)[None] == t[:, None]
            d_logits = jnp.where(reached, exps - total[:, None], exps)
        dh, more_table, more_bias = _gradients(d_logits, scale, h, table)
        return (d_table + more_table, d_bias + more_bias), (each, each * w, dh)

    parts, n = _in_chunks(table.shape[0], CHUNK_BYTES, (hidden, targets, weight))
    zeros = jnp.zeros_like(table, sums), jnp.zeros_like(bias, sums)
    (d_table, d_bias), (each, weighted, dh) = jax.lax.scan(chunk, zeros, parts)
    dh = dh.reshape(-1, hidden.shape[1])[:n].astype(hidden.dtype)
    gradients = dh, d_table.astype(table.dtype), d_bias.astype(bias.dtype)
    return (jnp.sum(weighted), each.reshape(-1)[:n]), gradients


def _full_backward(gradients: tuple[Array, ...], cotangents: tuple[Array, Array]):
    scaled = (g * cotangents[0].astype(g.dtype) for g in gradients)
    return *scaled, None, None


_full_nll.defvjp(_full_forward, _full_backward)


# --- sampled ----------------------------------------------------------------------------


def sampled_nll(
    hidden: Array, table: Array, bias: Array, targets: Array, weight: Array, negatives: Negatives
) -> tuple[Array, Array]:
    """`full_nll` over each target and S shared negatives: sampled softmax (Jean et al. 2015).

    Every logit is corrected by the log of its class's expected count, and a negative that
    is a position's own target takes no part there. With S = V it equals `full_nll`. It is
    another objective than the full one: its value is no perplexity.

    Args:
        hidden, table, bias, targets, weight: as in `full_nll`.
        negatives: the draw, as `log_uniform_negatives` makes it.

    Returns:
        As `full_nll`.
    """
    drawn, log_expected = negatives
    shift = bias - log_expected.astype(bias.dtype)
    dtype = hidden.dtype
    true, noise = (_Candidates(table[ids].astype(dtype), shift[ids], ids) for ids in (targets, drawn))
    return _sampled_nll(hidden, true, noise, weight)


class _Candidates(NamedTuple):
    """Rows of the table ``[C, P]``, what is added to their logits ``[C]``, and their classes ``[C]``."""

    rows: Array
    shift: Array
    classes: Any


@jax.custom_vjp
def _sampled_nll(hidden: Array, true: _Candidates, noise: _Candidates, weight: Array):
    """Of each position its own true class, and of all the noise."""
    return _sampled_forward(hidden, true, noise, weight)[0]


def _sampled_forward(hidden: Array, true: _Candidates, noise: _Candidates, weight: Array):
    """The value, and the gradient for a cotangent of one; see `_full_forward`."""
    sums, axes = np.promote_types(hidden.dtype, np.float32), _axes()

    def chunk(carry, part):
        d_rows, d_shift = carry
        h, own, w = part
        reached = jnp.einsum("np,np->n", h, own.rows, preferred_element_type=sums) + own.shift.astype(sums)
        logits = jnp.einsum(f"rp,vp->{axes}", h, noise.rows, preferred_element_type=sums)
        logits = logits + _by_class(noise.shift.astype(sums))
        logits = jnp.where(_by_class(noise.classes) == _by_row(own.classes), _MASKED, logits)
        largest = jnp.maximum(logits.max(axes.index("v")), reached)
        exps, own_exp = jnp.exp(logits - _by_row(largest)), jnp.exp(reached - largest)
        total = _sum_of_classes(exps) + own_exp
        each = jnp.log(total) + largest - reached
        scale = w.astype(sums) / total
        d_reached = own_exp * scale - w.astype(sums)
        dh, more_rows, more_shift = _gradients(exps, scale, h, noise.rows)
        dh += d_reached[:, None] * own.rows.astype(sums)
        return (d_rows + more_rows, d_shift + more_shift), (each, each * w, dh, d_reached)

    parts, n = _in_chunks(len(noise.rows), SAMPLED_CHUNK_BYTES, (hidden, true, weight))
    zeros = jnp.zeros_like(noise.rows, sums), jnp.zeros_like(noise.shift, sums)
    (d_rows, d_shift), made = jax.lax.scan(chunk, zeros, parts)
    each, weighted, dh, d_reached = (x.reshape(-1, *x.shape[2:])[:n] for x in made)
    d_true = (d_reached[:, None] * hidden.astype(sums)).astype(true.rows.dtype)
    gradients = (
        dh.astype(hidden.dtype),
        (d_true, d_reached.astype(true.shift.dtype)),
        (d_rows.astype(noise.rows.dtype), d_shift.astype(noise.shift.dtype)),
    )
    return (jnp.sum(weighted), each), gradients


def _sampled_backward(gradients: Any, cotangents: tuple[Array, Array]):
    hidden, true, noise = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients)
    return hidden, _Candidates(*true, classes=None), _Candidates(*noise, classes=None), None


_sampled_nll.defvjp(_sampled_forward, _sampled_backward)
