"""Negative log-likelihoods over a large vocabulary: full, in chunks, and sampled; one signature.

How logits lie, and how many at once, is chosen for JAX's default backend when a program is traced; any
other runs it too.

Nouns: the *table* holds a row a class; *negatives* are as in `negatives`.
Axes: N positions (any of B, T and D, flattened), P features, V classes, S negatives.

Drawing the classes that stand for all others in a sampled softmax.

Nouns: a *negative* is a class drawn to stand for all that are not the target; its *expected
count* is how often a draw holds it on average.
Axes: V classes, S negatives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from elmo_jax.parallel import align_varying


class Negatives(NamedTuple):
    """A draw: the classes ``[S]`` int32, and the log of every class's expected count ``[V]``."""

    classes: Array
    log_expected: Array


def log_uniform_negatives(key: Array, classes: int, count: int) -> Negatives:
    """S classes, those of low number likelier: log-uniform, but none expected above once.

    A log-uniform draw, P(k) = log((k + 2) / (k + 1)) / log(V + 1), fits a vocabulary sorted
    by falling count. Drawn independently it holds the commonest words hundreds of times.
    Here the head of classes that would be expected more than once is taken exactly once
    each, and the rest of the draw is stratified over the log-uniform tail: one uniform
    point in each of equal slices of its distribution. So the expected counts are exact,
    and a draw of all V classes holds each once.

    Args:
        key: PRNG key.
        classes: V.
        count: S <= V.

    Returns:
        The draw.

    Example:
        >>> drawn, log_expected = log_uniform_negatives(jax.random.key(0), 5, 5)
        >>> drawn.tolist(), float(abs(log_expected).max())
        ([0, 1, 2, 3, 4], 0.0)
    """
    if not 0 < count <= classes:
        raise ValueError(f"cannot draw {count} negatives from {classes} classes")
    head = _head(classes, count)
    slices = count - head
    log_expected = np.zeros(classes, np.float32)
    drawn = jnp.arange(head, dtype=jnp.int32)
    if slices:
        k = np.arange(head, classes, dtype=np.float64)
        span = np.log((classes + 1) / (head + 1))
        log_expected[head:] = np.log(slices * np.log1p(1 / (k + 1)) / span)
        u = (jnp.arange(slices, dtype=jnp.float32) + jax.random.uniform(key, (slices,), jnp.float32)) / slices
        tail = jnp.floor((head + 1) * jnp.exp(u * np.float32(span))).astype(jnp.int32) - 1
        drawn = jnp.concatenate([drawn, jnp.clip(tail, head, classes - 1)])
    return Negatives(drawn, jnp.asarray(log_expected))


def _head(classes: int, count: int) -> int:
    """The fewest classes to take for certain so that no other is expected above once."""
    m = np.arange(count, dtype=np.float64)
    expected = (count - m) * np.log1p(1 / (m + 1)) / np.log((classes + 1) / (m + 1))
    enough = np.flatnonzero(expected <= 1)
    return int(enough[0]) if enough.size and count < classes else count


# Positions of a chunk on a CPU, whose products are fastest with as many, if their logits are neither fewer
# bytes nor more than these; and those of an accelerator, which waits for every launch.
CHUNK_ROWS, LEAST_BYTES, MOST_BYTES, ACCELERATOR_BYTES = 192, 8 << 20, 48 << 20, 1 << 30
# Numbers of a row, and rows of the table, of which an accelerator's products want multiples.
_ALIGNED, _SPLIT = 8, 128
_ROWS = 16  # of which a chunk is a multiple, as products like it
_NEAR = 70.0  # how far above the true class's another's logit may be, and not be looked for
_MASKED = -1e30  # a logit that takes no part; finite, so that its gradient is zero, not NaN


def full_nll(hidden: Array, table: Array, bias: Array, targets: Array, weight: Array) -> tuple[Array, Array]:
    """Weighted sum of -log softmax(h W^T + b)[target] over all V classes.

    The logits are made a chunk of positions at a time and their gradient in the same pass,
    so ``[N, V]`` never exists and nothing is computed twice. The weights must not depend on
    what is trained. Programs of your own for a CPU are a tenth faster if they are compiled with
    `compiler_options(matmul_bound=True)`, as loss functions are that `MatmulBound` marks.

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
    hidden, table, bias, targets, weight = align_varying((hidden, table, bias, targets, weight))
    targets = targets.astype(jnp.int32)  # which counts all classes, whatever counts the targets
    if not _on_cpu():
        columns, rows = (0, -hidden.shape[-1] % _ALIGNED), (0, -len(table) % _SPLIT)
        hidden, table = jnp.pad(hidden, ((0, 0), columns)), jnp.pad(table, (rows, columns))
        bias = jnp.pad(bias, rows, constant_values=_MASKED)
    return _full_nll(hidden, table, bias, targets, weight)


class _Candidates(NamedTuple):
    """Rows of the table ``[C, P]``, what is added to their logits ``[C]``, and their classes ``[C]``."""

    rows: Array
    shift: Array
    classes: Any


@jax.custom_vjp
def _full_nll(hidden: Array, table: Array, bias: Array, targets: Array, weight: Array):
    return _chunked(hidden, *_everything(hidden, table, bias, targets), weight, enabled=False)[0]


def _everything(hidden: Array, table: Array, bias: Array, targets: Array) -> tuple[_Candidates, _Candidates]:
    """The true classes, and all."""
    table = table.astype(hidden.dtype)
    every = _Candidates(table, bias, jnp.arange(len(table), dtype=jnp.int32))
    return _Candidates(table[targets], bias[targets], targets), every


def _full_forward(hidden: Array, table: Array, bias: Array, targets: Array, weight: Array):
    candidates = _everything(hidden, table, bias, targets)
    values, made = _chunked(hidden, *candidates, weight, enabled=True)
    dh, d_true, d_every = made
    d_table, d_bias = (every.at[targets].add(true) for every, true in zip(d_every, d_true, strict=True))
    return values, (dh, d_table.astype(table.dtype), d_bias.astype(bias.dtype))


def _full_backward(gradients: tuple[Array, ...], cotangents: tuple[Array, Array]):
    scaled = (g * cotangents[0].astype(g.dtype) for g in gradients)
    return *scaled, None, None


_full_nll.defvjp(_full_forward, _full_backward)


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
    return _sampled_nll(*align_varying((hidden, true, noise, weight)))


@jax.custom_vjp
def _sampled_nll(hidden: Array, true: _Candidates, noise: _Candidates, weight: Array):
    return _chunked(hidden, true, noise, weight, enabled=False)[0]


def _sampled_forward(hidden: Array, true: _Candidates, noise: _Candidates, weight: Array):
    values, made = _chunked(hidden, true, noise, weight, enabled=True)
    dh, *gradients = made
    typed = [
        (d_rows.astype(of.rows.dtype), d_shift.astype(of.shift.dtype))
        for (d_rows, d_shift), of in zip(gradients, (true, noise), strict=True)
    ]
    return values, (dh, *typed)


def _sampled_backward(gradients: Any, cotangents: tuple[Array, Array]):
    hidden, true, noise = jax.tree.map(lambda g: g * cotangents[0].astype(g.dtype), gradients)
    return hidden, _Candidates(*true, classes=None), _Candidates(*noise, classes=None), None


_sampled_nll.defvjp(_sampled_forward, _sampled_backward)


def _chunked(hidden: Array, true: _Candidates, noise: _Candidates, weight: Array, enabled: bool) -> Any:
    """Each position's own true class among all the noise, of which that class takes no part.

    Args:
        hidden: ``[N, P]``.
        true: of N candidates, a position each.
        noise: of C candidates.
        weight: ``[N]``.
        wanted: whether the gradient is, for a cotangent of one.

    Returns:
        The weighted sum and each position's value ``[N]``; and, if wanted, the gradients: of
        `hidden`, in its dtype, and in that of the sums of the rows and shifts of `true`,
        ``([N, P], [N])``, and of `noise`, ``([C, P], [C])``.
    """
    sums, axes = np.promote_types(hidden.dtype, np.float32), _axes()
    parts, n = _in_chunks(_most_rows(len(noise.rows)), (hidden, true, weight))
    order = _order(*parts[0].shape[1:])
    of_class, classes = noise.shift.astype(sums), axes.index("v")
    # Of what bounds the logits no gradient is asked for: of a norm it is NaN where all numbers are 0.
    longest, highest = _longest(jax.lax.stop_gradient(noise.rows)), jnp.max(of_class)

    def chunk(carry: Any, part: tuple[Array, _Candidates, Array]):
        h, own, w = part
        w = w.astype(sums)
        reached = jnp.einsum("np,np->n", h, own.rows, preferred_element_type=sums) + own.shift.astype(sums)
        products = jnp.einsum(f"rp,vp->{axes}", h, noise.rows, preferred_element_type=sums)

        def logits() -> Array:
            return products + _by_class(of_class)

        shift = _shift(logits, reached, h, longest, highest)
        own_class = _by_class(noise.classes) == _by_row(own.classes)
        exps, own_exp = jnp.where(own_class, 0, jnp.exp(logits() - _by_row(shift))), jnp.exp(reached - shift)
        others = exps.sum(classes)
        total = others + own_exp
        each = jnp.where(own_exp == 1, jnp.log1p(others), jnp.log(total) + (shift - reached))
        if not enabled:
            return None, (each, each * w)
        d_rows, d_shift = carry
        d_reached = -others / total * w  # p - 1, however near to 1 p is
        dh, more_rows, more_shift = _gradients(exps, w / total, h, noise.rows, order)
        dh += jnp.einsum(f"r,rp->{order}", d_reached, own.rows.astype(sums))
        return (d_rows + more_rows, d_shift + more_shift), (each, each * w, dh, d_reached)

    begin = (jnp.zeros_like(noise.rows, sums), jnp.zeros_like(of_class)) if enabled else None
    d_noise, (each, weighted, *made) = jax.lax.scan(chunk, begin, parts)

    def joined(chunks: Array) -> Array:
        return chunks.reshape(-1, *chunks.shape[2:])[:n]

    values = jnp.sum(joined(weighted)), joined(each)
    if not enabled:
        return values, None
    dh, d_reached = made
    dh, d_reached = joined(dh.mT if order == "pr" else dh), joined(d_reached)
    d_true = d_reached[:, None] * hidden.astype(sums), d_reached
    return values, (dh.astype(hidden.dtype), d_true, d_noise)


def _shift(logits: Callable[[], Array], reached: Array, h: Array, longest: Array, highest: Array) -> Array:
    """What is taken from a position's logits ``[R]`` before their exponentials: the largest, or near it."""

    def largest() -> Array:
        return jnp.maximum(logits().max(_axes().index("v")), reached)

    if not _on_cpu() or np.log(float(jnp.finfo(h.dtype).max)) <= _NEAR:  # as float16, which has no room
        return largest()
    # To find the largest takes a pass over all logits. Where a bound says that none is far above the
    # true class's, that will do, or half way up: so neither sums nor their inverses leave float32.
    norm = jnp.linalg.norm(jax.lax.stop_gradient(h).astype(reached.dtype), axis=-1)
    farthest = norm * longest + highest - reached
    half_way = reached + jnp.maximum(0, farthest - _NEAR / 2)
    return jax.lax.cond(jnp.all(farthest < _NEAR), lambda: half_way, largest)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _axes() -> str:
    """Of logits, in einsum's letters: v classes and r positions, of which a CPU's products like v first."""
    return "vr" if _on_cpu() else "rv"


def _order(rows: int, features: int) -> str:
    """Of the gradient of hidden states, in einsum's letters: a CPU's sums like the longer axis last."""
    return "pr" if _on_cpu() and features <= rows else "rp"


def _by_class(x: Array) -> Array:
    """``[V]`` beside logits."""
    return jnp.expand_dims(x, _axes().index("r"))


def _by_row(x: Array) -> Array:
    """``[R]`` beside logits."""
    return jnp.expand_dims(x, _axes().index("v"))


def _longest(table: Array) -> Array:
    """The norm of the longest row."""
    table = table.astype(np.promote_types(table.dtype, np.float32))
    return jnp.sqrt(jnp.max(jnp.einsum("vp,vp->v", table, table)))


def _most_rows(classes: int) -> int:
    """Positions of a chunk at most, whose float32 logits are alive at once."""
    least, most, accelerators = (
        size // (4 * classes) for size in (LEAST_BYTES, MOST_BYTES, ACCELERATOR_BYTES)
    )
    rows = max(least, min(CHUNK_ROWS, most)) if _on_cpu() else accelerators
    return max(_ROWS, rows // _ROWS * _ROWS)


def _in_chunks(most: int, arrays: Any) -> tuple[Any, int]:
    """Arrays ``[N, ...]`` cut into equal chunks of no more positions, the last filled with zeros; and N."""
    n = jax.tree.leaves(arrays)[0].shape[0]

    def rows_of(count: int) -> int:
        return -(-n // count // _ROWS) * _ROWS

    if isinstance(n, int):
        # A few chunks more may leave less to be filled; each costs about as much as so many rows.
        fewest = max(1, -(-n // most))
        few = range(fewest, fewest + fewest // 4 + 1)
        count = min(few, key=lambda count: count * (rows_of(count) + _ROWS))
        rows = n if count == 1 else rows_of(count)
    else:  # exported programs may leave it open
        count, rows = -(-n // most), most

    def cut(a: Array) -> Array:
        filled = jnp.pad(a, [(0, count * rows - n)] + [(0, 0)] * (a.ndim - 1))
        return filled.reshape(count, rows, *a.shape[1:])

    return jax.tree.map(cut, arrays), n


def _gradients(
    d_logits: Array, scale: Array, h: Array, rows: Array, order: str
) -> tuple[Array, Array, Array]:
    """Of h, in that `_order`, the classes' rows and their bias, from the logits' but for a factor ``[R]``.

    The factor goes into the small side of each product, so that the logits are passed over once less.
    """
    sums, axes = scale.dtype, _axes()
    g, scaled = d_logits.astype(h.dtype), (h.astype(sums) * scale[:, None]).astype(h.dtype)
    dh = jnp.einsum(f"vp,{axes}->{order}", rows, g, preferred_element_type=sums)
    d_rows = jnp.einsum(f"{axes},rp->vp", g, scaled, preferred_element_type=sums)
    # A sum over rows, which XLA:CPU is slow at.
    d_bias = jnp.einsum(f"{axes},r->v", d_logits, scale, precision="highest")
    return dh * jnp.expand_dims(scale, order.index("p")), d_rows, d_bias
