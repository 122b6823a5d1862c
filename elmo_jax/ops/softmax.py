"""Softmax cross-entropy over a large vocabulary: full, in chunks of positions, and sampled.

The memory layout of the logits and the chunk size depend on JAX's default backend when a function is traced.
Axes: N positions (B, T and D flattened), P features, V classes, S negative samples, R positions of a chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from elmo_jax.parallel import align_varying


class Negatives(NamedTuple):
    """Negative samples: classes ``[S]`` int32, and the log of every class's expected count ``[V]``."""

    classes: Array
    log_expected: Array


def log_uniform_negatives(key: Array, classes: int, count: int) -> Negatives:
    """Sample S negative classes from a log-uniform distribution, none expected more than once.

    The log-uniform distribution P(k) = log((k + 2) / (k + 1)) / log(V + 1) fits a vocabulary sorted by
    falling count, but independent samples contain the most frequent words hundreds of times. Here the classes
    that would be expected more than once are taken exactly once each, and the others are sampled with one
    uniform point in each of equal slices of their distribution. So the expected counts are exact, and V
    samples of V classes contain each class once.

    Args:
        key: PRNG key.
        classes: V.
        count: S, from 1 to V.

    Returns:
        The samples.

    Raises:
        ValueError: count is not between 1 and V.

    Examples:
        >>> samples, log_expected = log_uniform_negatives(jax.random.key(0), 5, 5)
        >>> samples.tolist(), float(abs(log_expected).max())
        ([0, 1, 2, 3, 4], 0.0)
    """
    if not 0 < count <= classes:
        raise ValueError(f"cannot sample {count} negatives from {classes} classes")
    head = _count_certain(classes, count)
    slices = count - head
    log_expected = np.zeros(classes, np.float32)
    sampled = jnp.arange(head, dtype=jnp.int32)
    if slices:
        k = np.arange(head, classes, dtype=np.float64)
        span = np.log((classes + 1) / (head + 1))
        log_expected[head:] = np.log(slices * np.log1p(1 / (k + 1)) / span)
        u = (jnp.arange(slices, dtype=jnp.float32) + jax.random.uniform(key, (slices,), jnp.float32)) / slices
        tail = jnp.floor((head + 1) * jnp.exp(u * np.float32(span))).astype(jnp.int32) - 1
        sampled = jnp.concatenate([sampled, jnp.clip(tail, head, classes - 1)])
    return Negatives(sampled, jnp.asarray(log_expected))


def _count_certain(classes: int, count: int) -> int:
    """Return how many classes to take with certainty so that no other is expected more than once."""
    m = np.arange(count, dtype=np.float64)
    expected = (count - m) * np.log1p(1 / (m + 1)) / np.log((classes + 1) / (m + 1))
    enough = np.flatnonzero(expected <= 1)
    return int(enough[0]) if enough.size and count < classes else count


# A CPU's matmuls are fastest with chunks of this many positions, if their logits take between the next two
# numbers of bytes. An accelerator waits for every launch, so its chunks are as large as the last.
CHUNK_ROWS, LEAST_BYTES, MOST_BYTES, ACCELERATOR_BYTES = 192, 8 << 20, 48 << 20, 1 << 30
_FEATURE_MULTIPLE, _CLASS_MULTIPLE = 8, 128  # matmul sizes that accelerators prefer are multiples of these
_ROW_MULTIPLE = 16  # chunk sizes are multiples of this number
_MAX_EXCESS = 70.0  # If a logit exceeds the true class's by more than this, the maximum must be the shift.
_MASKED = -1e30  # logit of a padded class; finite, so that its gradient is zero and not NaN


def full_nll(hidden: Array, table: Array, bias: Array, targets: Array, weight: Array) -> tuple[Array, Array]:
    """Weighted sum of -log softmax(h W^T + b)[target] over all V classes.

    Logits and their gradient are computed in one pass, one chunk of positions at a time, so ``[N, V]``
    never exists and nothing is computed twice. On a CPU, compile your own programs with
    `compiler_options(matmul_bound=True)` to save a tenth of the time.

    Args:
        hidden: h ``[N, P]``. Its dtype is the matmul dtype; accumulation is float32.
        table: W ``[V, P]``.
        bias: b ``[V]``.
        targets: ``[N]`` int32, in [0, V).
        weight: ``[N]``, 0 for positions to ignore. It gets no gradient.

    Returns:
        The weighted sum, a scalar, and each position's value ``[N]``, through which no gradient flows.

    Examples:
        >>> h, w = jnp.zeros((3, 4)), jnp.zeros((10, 4))
        >>> total, each = full_nll(h, w, jnp.zeros(10), jnp.array([1, 2, 3]), jnp.ones(3))
        >>> round(float(total), 3)  # 3 ln 10
        6.908
    """
    hidden, table, bias, targets, weight = align_varying((hidden, table, bias, targets, weight))
    targets = targets.astype(jnp.int32)  # a narrower dtype may not hold all classes
    if not _on_cpu():
        columns, rows = (0, -hidden.shape[-1] % _FEATURE_MULTIPLE), (0, -len(table) % _CLASS_MULTIPLE)
        hidden, table = jnp.pad(hidden, ((0, 0), columns)), jnp.pad(table, (rows, columns))
        bias = jnp.pad(bias, rows, constant_values=_MASKED)
    return _full_nll(hidden, table, bias, targets, weight)


class _Candidates(NamedTuple):
    """Table rows ``[C, P]``, the numbers ``[C]`` added to their logits, and their classes ``[C]``."""

    rows: Array
    shift: Array
    classes: Any


@jax.custom_vjp
def _full_nll(hidden: Array, table: Array, bias: Array, targets: Array, weight: Array):
    return _chunked(hidden, *_candidates(hidden, table, bias, targets), weight, with_gradient=False)[0]


def _candidates(hidden: Array, table: Array, bias: Array, targets: Array) -> tuple[_Candidates, _Candidates]:
    """Return the true class of every position, and all classes."""
    table = table.astype(hidden.dtype)
    every = _Candidates(table, bias, jnp.arange(len(table), dtype=jnp.int32))
    return _Candidates(table[targets], bias[targets], targets), every


def _full_forward(hidden: Array, table: Array, bias: Array, targets: Array, weight: Array):
    candidates = _candidates(hidden, table, bias, targets)
    values, made = _chunked(hidden, *candidates, weight, with_gradient=True)
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
    """Sampled softmax (Jean et al. 2015): `full_nll` over each target and S shared negatives.

    The log of the expected count of a class is subtracted from its logit, and a negative that equals a
    position's target is ignored there. With S = V the result equals `full_nll`. Otherwise it is another
    objective, and its value is not a perplexity.

    Args:
        hidden: ``[N, P]``, as in `full_nll`.
        table: ``[V, P]``.
        bias: ``[V]``.
        targets: ``[N]`` int32.
        weight: ``[N]``.
        negatives: Samples of `log_uniform_negatives`.

    Returns:
        The weighted sum and each position's value, as `full_nll`.
    """
    sampled, log_expected = negatives
    shift = bias - log_expected.astype(bias.dtype)
    dtype = hidden.dtype
    true, noise = (_Candidates(table[ids].astype(dtype), shift[ids], ids) for ids in (targets, sampled))
    return _sampled_nll(*align_varying((hidden, true, noise, weight)))


@jax.custom_vjp
def _sampled_nll(hidden: Array, true: _Candidates, noise: _Candidates, weight: Array):
    return _chunked(hidden, true, noise, weight, with_gradient=False)[0]


def _sampled_forward(hidden: Array, true: _Candidates, noise: _Candidates, weight: Array):
    values, made = _chunked(hidden, true, noise, weight, with_gradient=True)
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


def _chunked(hidden: Array, true: _Candidates, noise: _Candidates, weight: Array, with_gradient: bool) -> Any:
    """Compute the values, and their gradients, one chunk of positions at a time.

    Args:
        hidden: ``[N, P]``.
        true: True class of each position.
        noise: C classes shared by all positions; a position ignores its true class among them.
        weight: ``[N]``.
        with_gradient: Whether to compute the gradients of the weighted sum.

    Returns:
        The weighted sum and each position's value ``[N]``, and the gradients or None: of `hidden` in its
        dtype, of the rows and shifts of `true` and of `noise` in the accumulation dtype.
    """
    sums, axes = np.promote_types(hidden.dtype, np.float32), _axes()
    parts, n = _split_into_chunks(_max_chunk_rows(len(noise.rows)), (hidden, true, weight))
    order = _gradient_axes(*parts[0].shape[1:])
    of_class, classes = noise.shift.astype(sums), axes.index("v")
    # The gradient of a norm is NaN at 0, and these bounds need none.
    max_norm, max_shift = _max_row_norm(jax.lax.stop_gradient(noise.rows)), jnp.max(of_class)

    def chunk(carry: Any, part: tuple[Array, _Candidates, Array]):
        h, position, w = part
        w = w.astype(sums)
        true_logit = jnp.einsum("np,np->n", h, position.rows, preferred_element_type=sums)
        true_logit += position.shift.astype(sums)
        products = jnp.einsum(f"rp,vp->{axes}", h, noise.rows, preferred_element_type=sums)

        logits = lambda: products + _along_classes(of_class)  # noqa: E731
        shift = _choose_shift(logits, true_logit, h, max_norm, max_shift)
        is_true = _along_classes(noise.classes) == _along_rows(position.classes)
        exps = jnp.where(is_true, 0, jnp.exp(logits() - _along_rows(shift)))
        true_exp = jnp.exp(true_logit - shift)
        others = exps.sum(classes)
        total = others + true_exp
        each = jnp.where(true_exp == 1, jnp.log1p(others), jnp.log(total) + (shift - true_logit))
        if not with_gradient:
            return None, (each, each * w)
        d_rows, d_shift = carry
        d_true_logit = -others / total * w  # p - 1, exact also where p is near 1
        dh, add_rows, add_shift = _logit_gradients(exps, w / total, h, noise.rows, order)
        dh += jnp.einsum(f"r,rp->{order}", d_true_logit, position.rows.astype(sums))
        return (d_rows + add_rows, d_shift + add_shift), (each, each * w, dh, d_true_logit)

    begin = (jnp.zeros_like(noise.rows, sums), jnp.zeros_like(of_class)) if with_gradient else None
    d_noise, (each, weighted, *made) = jax.lax.scan(chunk, begin, parts)

    def join_chunks(chunks: Array) -> Array:
        return chunks.reshape(-1, *chunks.shape[2:])[:n]

    values = jnp.sum(join_chunks(weighted)), join_chunks(each)
    if not with_gradient:
        return values, None
    dh, d_true_logit = made
    dh, d_true_logit = join_chunks(dh.mT if order == "pr" else dh), join_chunks(d_true_logit)
    d_true = d_true_logit[:, None] * hidden.astype(sums), d_true_logit
    return values, (dh.astype(hidden.dtype), d_true, d_noise)


def _choose_shift(
    logits: Callable[[], Array], true_logit: Array, h: Array, max_norm: Array, max_shift: Array
) -> Array:
    """Return the shift ``[R]`` subtracted before exp (log-sum-exp stabilization): the maximum or near it.

    The maximum takes a pass over all logits. If the bound |h| max |w| + max b shows that no logit is far
    above the true class's, a shift between the two is safe: sums and their inverses stay within float32.
    """

    def maximum() -> Array:
        return jnp.maximum(logits().max(_axes().index("v")), true_logit)

    # Float16 overflows before a logit exceeds the bound.
    if not _on_cpu() or np.log(float(jnp.finfo(h.dtype).max)) <= _MAX_EXCESS:
        return maximum()
    norm = jnp.linalg.norm(jax.lax.stop_gradient(h).astype(true_logit.dtype), axis=-1)
    excess = norm * max_norm + max_shift - true_logit
    midpoint = true_logit + jnp.maximum(0, excess - _MAX_EXCESS / 2)
    return jax.lax.cond(jnp.all(excess < _MAX_EXCESS), lambda: midpoint, maximum)


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def _axes() -> str:
    """Return the axes of logits as einsum letters; a CPU's matmuls are faster with the classes v first."""
    return "vr" if _on_cpu() else "rv"


def _gradient_axes(rows: int, features: int) -> str:
    """Return the axes of the gradient of h as einsum letters; a CPU sums faster with the longer axis last."""
    return "pr" if _on_cpu() and features <= rows else "rp"


def _along_classes(x: Array) -> Array:
    """Expand ``[V]`` to broadcast against logits."""
    return jnp.expand_dims(x, _axes().index("r"))


def _along_rows(x: Array) -> Array:
    """Expand ``[R]`` to broadcast against logits."""
    return jnp.expand_dims(x, _axes().index("v"))


def _max_row_norm(table: Array) -> Array:
    table = table.astype(np.promote_types(table.dtype, np.float32))
    return jnp.sqrt(jnp.max(jnp.einsum("vp,vp->v", table, table)))


def _max_chunk_rows(classes: int) -> int:
    """Return the largest number of positions whose float32 logits may exist at once."""
    sizes = LEAST_BYTES, MOST_BYTES, ACCELERATOR_BYTES
    least, most, accelerators = (size // (4 * classes) for size in sizes)
    rows = max(least, min(CHUNK_ROWS, most)) if _on_cpu() else accelerators
    return max(_ROW_MULTIPLE, rows // _ROW_MULTIPLE * _ROW_MULTIPLE)


def _split_into_chunks(max_rows: int, arrays: Any) -> tuple[Any, int]:
    """Split arrays ``[N, ...]`` into equal chunks, the last one zero-padded, and return them with N."""
    n = jax.tree.leaves(arrays)[0].shape[0]

    def rows_of(count: int) -> int:
        return -(-n // count // _ROW_MULTIPLE) * _ROW_MULTIPLE

    if isinstance(n, int):
        # More chunks may need less padding; each chunk costs about as much time as that many rows.
        fewest = max(1, -(-n // max_rows))
        counts = range(fewest, fewest + fewest // 4 + 1)
        count = min(counts, key=lambda count: count * (rows_of(count) + _ROW_MULTIPLE))
        rows = n if count == 1 else rows_of(count)
    else:  # the size is symbolic in exported programs
        count, rows = -(-n // max_rows), max_rows

    def cut(a: Array) -> Array:
        filled = jnp.pad(a, [(0, count * rows - n)] + [(0, 0)] * (a.ndim - 1))
        return filled.reshape(count, rows, *a.shape[1:])

    return jax.tree.map(cut, arrays), n


def _logit_gradients(
    d_logits: Array, scale: Array, h: Array, rows: Array, order: str
) -> tuple[Array, Array, Array]:
    """Return the gradients of h, of the table rows and of the bias.

    The gradient of the logits is d_logits times scale ``[R]``. The scale is multiplied into the smaller
    operand of each matmul, which saves a pass over the logits.
    """
    sums, axes = scale.dtype, _axes()
    g, scaled = d_logits.astype(h.dtype), (h.astype(sums) * scale[:, None]).astype(h.dtype)
    dh = jnp.einsum(f"vp,{axes}->{order}", rows, g, preferred_element_type=sums)
    d_rows = jnp.einsum(f"{axes},rp->vp", g, scaled, preferred_element_type=sums)
    # XLA:CPU is slower at a sum over rows than at this product.
    d_bias = jnp.einsum(f"{axes},r->v", d_logits, scale, precision="highest")
    return dh * jnp.expand_dims(scale, order.index("p")), d_rows, d_bias
