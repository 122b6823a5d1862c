from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import log_softmax

from elmo_jax.ops import softmax
from elmo_jax.ops.softmax import Negatives, full_nll, log_uniform_negatives, sampled_nll

N, P, V = 7, 3, 20


@pytest.fixture
def case(x64):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (N, P), jnp.float64)
    table = jax.random.normal(keys[1], (V, P), jnp.float64)
    bias = jax.random.normal(keys[2], (V,), jnp.float64)
    targets = jax.random.randint(keys[3], (N,), 0, V, jnp.int32)
    return hidden, table, bias, targets, jnp.array([1.0, 0.5, 0, 1, 2, 1, 0])


def plain(hidden, table, bias, targets, weight):
    logits = hidden @ table.T + bias[None]
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], 1)[:, 0]
    return jnp.sum(each * weight), each


@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_full_is_the_plain_softmax_in_any_chunks(case, chunk_rows, cpu, monkeypatch):
    monkeypatch.setattr(softmax, "_on_cpu", lambda: cpu)
    monkeypatch.setattr(softmax, "_max_chunk_rows", lambda classes: chunk_rows)
    monkeypatch.setattr(softmax, "_ROW_MULTIPLE", 1)
    total, each = full_nll(*case)
    oracle = -log_softmax(np.asarray(case[0] @ case[1].T + case[2][None]))[np.arange(N), case[3]]
    np.testing.assert_allclose(each, oracle, rtol=1e-12)
    np.testing.assert_allclose(total, oracle @ np.asarray(case[4]), rtol=1e-12)
    got, want = (
        jax.grad(lambda *a, f=f: 3 * f(*a, *case[3:])[0], (0, 1, 2))(*case[:3]) for f in (full_nll, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), got, want)


@pytest.mark.parametrize("scaled", [0, 1, 2], ids=["hidden", "table", "bias"])
@pytest.mark.parametrize("scale", [1e-8, 30, 1e4])
def test_full_is_the_plain_softmax_of_logits_however_far_apart(case, scale, scaled):
    case = tuple(a * scale if i == scaled else a for i, a in enumerate(case))
    got, want = (
        jax.value_and_grad(lambda *a, f=f: f(*a, *case[3:])[0], (0, 1, 2))(*case[:3])
        for f in (full_nll, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14 * scale), got, want)


@pytest.mark.parametrize("above", [60, 1000])
def test_a_logit_far_above_the_targets_stays_finite(above):
    table = jnp.array([[0.0], [above], [-above]], jnp.float32)
    f = lambda *a: full_nll(*a, jnp.zeros(1, jnp.int32), jnp.ones(1))[0]  # noqa: E731
    value, (dh, d_table, d_bias) = jax.value_and_grad(f, (0, 1, 2))(jnp.ones((1, 1)), table, jnp.zeros(3))
    np.testing.assert_allclose(value, above, rtol=1e-6)
    np.testing.assert_allclose(dh, [[above]], rtol=1e-6)
    for gradient in (d_table[:, 0], d_bias):
        np.testing.assert_allclose(gradient, [-1, 1, 0], atol=1e-6)
    value, _ = value_and_gradients([[0.0]], np.zeros((2, 1)), [0.0, above])
    np.testing.assert_allclose(value, above, rtol=1e-6)


def value_and_gradients(hidden, table, bias, dtype=jnp.float32, weight=1.0, target=0):
    """Of one position or more of one target, in that dtype."""
    hidden, table, bias = (
        jnp.asarray(a, d) for a, d in ((hidden, dtype), (table, dtype), (bias, jnp.float32))
    )
    targets, weight = jnp.full(len(hidden), target, jnp.int32), jnp.full(len(hidden), weight, jnp.float32)
    return jax.value_and_grad(lambda *a: full_nll(*a, targets, weight)[0], (0, 1, 2))(hidden, table, bias)


def test_what_a_sure_model_still_has_to_learn_is_not_rounded_away():
    value, (dh, _, d_bias) = value_and_gradients([[1.0]], [[18.0], [0.0]], np.zeros(2))
    p = np.exp(-18.0)
    np.testing.assert_allclose(value, p, rtol=1e-5)
    np.testing.assert_allclose(dh, [[-18 * p]], rtol=1e-5)
    np.testing.assert_allclose(d_bias, [-p, p], rtol=1e-5)


@pytest.mark.parametrize("below", [30, 69, 1000])
def test_a_true_class_far_below_all_others_keeps_every_gradient(below):
    bias = np.zeros(300)
    bias[0] = -below
    _, (_, d_table, _) = value_and_gradients([[1.0, 1e-6]], np.zeros((300, 2)), bias, weight=1e-3)
    np.testing.assert_allclose(d_table[1], np.array([1, 1e-6]) * 1e-3 / 299, rtol=1e-4)
    table = np.full((300, 1), 2e5)
    table[0] = 0
    value, (dh, *_) = value_and_gradients([[0.0]], table, bias)
    np.testing.assert_allclose(dh, [[2e5]], rtol=1e-5)
    np.testing.assert_allclose(value, below + np.log(299), rtol=1e-5)


def test_float16_has_room_too():
    _, (dh, *_) = value_and_gradients([[1.0]], [[0.0], [12.0]], np.zeros(2), jnp.float16)
    np.testing.assert_allclose(dh, [[12.0]], rtol=1e-2)


@pytest.mark.parametrize("classes", [60_000, 500_000])
def test_sums_of_many_classes_are_exact(classes):
    rng = np.random.default_rng(0)
    h, table = rng.normal(size=(16, 1)).astype(np.float32), rng.normal(size=(classes, 1)).astype(np.float32)
    each = full_nll(h, table, np.zeros(len(table), np.float32), np.arange(16), np.ones(16, np.float32))[1]
    logits = h.astype(np.float64) @ table.T.astype(np.float64)
    oracle = np.log(np.exp(logits).sum(1)) - np.diagonal(logits)
    np.testing.assert_allclose(each, oracle, rtol=2e-6)


def test_targets_may_be_counted_in_bytes():
    h, table, bias = jnp.ones((1, 1)), jnp.zeros((600, 1)), jnp.zeros(600)
    total, _ = full_nll(h, table, bias, jnp.array([5], jnp.uint8), jnp.ones(1))
    np.testing.assert_allclose(total, np.log(600), rtol=1e-6)


@pytest.mark.parametrize("most", [16, 192, 12_576])
def test_chunks_lose_nothing_and_are_few(most):
    for n in (1, 17, 208, 209, 2560, 3001, 19_998, 10_000_019):
        made = jax.eval_shape(lambda a: softmax._split_into_chunks(most, a)[0], jnp.zeros((n, 1)))
        count, rows, _ = made.shape
        fewest = -(-n // most)
        assert count * rows >= n > (count - 1) * rows and (rows <= most or count == 1)
        assert fewest <= count <= 1.25 * fewest
        assert count * rows - n <= fewest * (-(-n // fewest // 16) * 16) - n or count == 1


@pytest.mark.parametrize("scale", [0.1, 1, 8])
def test_bfloat16_rounds_no_more_however_sure_the_model_is(scale):
    rng = np.random.default_rng(0)
    h, table = (jnp.asarray(rng.normal(size=(64, P)), jnp.bfloat16) for P in (16, 16))
    h, table = h * jnp.bfloat16(scale), table[:40]
    logits = np.asarray(h, np.float64) @ np.asarray(table, np.float64).T
    targets = jnp.asarray(logits.argmax(1), jnp.int32)  # with probabilities of 0.05, 0.6, 0.97 on average
    p = np.exp(log_softmax(logits))
    p[np.arange(64), targets] -= 1
    want = p @ np.asarray(table, np.float64), p.T @ np.asarray(h, np.float64)
    f = lambda h, table: full_nll(h, table, jnp.zeros(40, jnp.float32), targets, jnp.ones(64, jnp.float32))[0]  # noqa: E731
    got = jax.grad(f, (0, 1))(h, table.astype(jnp.float32))
    for a, b in zip(got, want, strict=True):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) < 6e-3 * np.linalg.norm(b)


def test_logits_never_exist_whole(case, monkeypatch):
    monkeypatch.setattr(softmax, "_max_chunk_rows", lambda classes: 2)
    monkeypatch.setattr(softmax, "_ROW_MULTIPLE", 2)
    program = str(jax.make_jaxpr(jax.grad(lambda h: full_nll(h, *case[1:])[0]))(case[0]))
    assert f"[{V},2]" in program
    for rows in (N, N + 1):
        assert f"[{V},{rows}]" not in program and f"[{rows},{V}]" not in program


def test_chunks_hold_what_products_like_but_no_more_than_fits(monkeypatch):
    rows = [softmax._max_chunk_rows(v) for v in (2048, 8192, 30_000, 100_000, 800_000)]
    assert rows == [1024, 256, 192, 112, 16]
    monkeypatch.setattr(softmax, "_on_cpu", lambda: False)
    assert [softmax._max_chunk_rows(v) for v in (30_000, 800_000, 2**30)] == [8944, 320, 16]


@pytest.mark.parametrize("seed", [0, 1])
def test_sampled_over_all_classes_is_full(case, seed):
    key = jax.random.key(seed)
    f = lambda *a: sampled_nll(*a, *case[3:], log_uniform_negatives(key, V, V))[0]  # noqa: E731
    got = jax.value_and_grad(f, (0, 1, 2))(*case[:3])
    want = jax.value_and_grad(lambda *a: full_nll(*a, *case[3:])[0], (0, 1, 2))(*case[:3])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)


@pytest.mark.parametrize("cpu", [True, False], ids=["cpu", "accelerator"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_sampled_has_the_gradients_of_its_formula_in_any_chunks(case, chunk_rows, cpu, monkeypatch):
    monkeypatch.setattr(softmax, "_on_cpu", lambda: cpu)
    monkeypatch.setattr(softmax, "_max_chunk_rows", lambda classes: chunk_rows)
    monkeypatch.setattr(softmax, "_ROW_MULTIPLE", 1)
    targets, weight = case[3:]
    drawn, log_expected = negatives = log_uniform_negatives(jax.random.key(3), V, 6)
    assert np.isin(targets, drawn).any() and not np.isin(targets, drawn).all()

    def formula(hidden, table, bias):
        logits = hidden @ table.T + (bias - log_expected.astype(bias.dtype))[None]
        reached = jnp.take_along_axis(logits, targets[:, None], 1)
        noise = jnp.where(drawn[None] == targets[:, None], -jnp.inf, logits[:, drawn])
        each = jax.nn.logsumexp(jnp.concatenate([reached, noise], 1), axis=1) - reached[:, 0]
        return jnp.sum(3 * weight * each), each

    sampled = lambda *a: jax.tree.map(jnp.multiply, (3.0, 1.0), sampled_nll(*a, targets, weight, negatives))  # noqa: E731
    got, want = (jax.value_and_grad(f, (0, 1, 2), has_aux=True)(*case[:3]) for f in (sampled, formula))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), got, want)


def test_sampled_logits_never_exist_whole(case, monkeypatch):
    monkeypatch.setattr(softmax, "_max_chunk_rows", lambda classes: 2)
    monkeypatch.setattr(softmax, "_ROW_MULTIPLE", 2)
    negatives = log_uniform_negatives(jax.random.key(3), V, 6)
    program = str(jax.make_jaxpr(jax.grad(lambda h: sampled_nll(h, *case[1:], negatives)[0]))(case[0]))
    assert "[6,2]" in program
    for rows in (N, N + 1):
        assert f"[6,{rows}]" not in program and f"[{rows},6]" not in program


def test_sampled_is_the_corrected_softmax_over_target_and_negatives(case):
    hidden, table, bias, targets, weight = case
    key = jax.random.key(3)
    drawn, log_expected = (np.asarray(a) for a in log_uniform_negatives(key, V, 6))
    each = sampled_nll(*case, log_uniform_negatives(key, V, 6))[1]
    logits = np.asarray(hidden @ table.T + bias[None]) - log_expected
    for n, target in enumerate(np.asarray(targets)):
        classes = [target, *(k for k in drawn if k != target)]
        np.testing.assert_allclose(each[n], -log_softmax(logits[n, classes])[0], rtol=1e-6)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("zeros", [slice(0, 1), slice(None)], ids=["a row", "all"])
def test_curvature_is_the_plain_softmax_where_states_are_zero(case, monkeypatch, sampled, zeros):
    monkeypatch.setattr(softmax, "_max_chunk_rows", lambda classes: 4)
    monkeypatch.setattr(softmax, "_ROW_MULTIPLE", 4)  # so that the last chunk is filled with zeros too
    every = Negatives(jnp.arange(V, dtype=jnp.int32), jnp.zeros(V))
    ours = partial(sampled_nll, negatives=every) if sampled else full_nll
    at, along = (case[0].at[zeros].set(0), *case[1:3]), tuple(a + 1 for a in case[:3])
    got, want = (
        jax.jvp(jax.grad(lambda *a, f=f: f(*a, *case[3:])[0], (0, 1, 2)), at, along)[1] for f in (ours, plain)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-13), got, want)


@pytest.mark.parametrize("sampled", [False, True])
def test_an_exported_program_takes_any_number_of_positions(case, monkeypatch, sampled):
    monkeypatch.setattr(softmax, "_max_chunk_rows", lambda classes: 4)
    every = Negatives(jnp.arange(V, dtype=jnp.int32), jnp.zeros(V))
    f = partial(sampled_nll, negatives=every) if sampled else full_nll
    step = jax.jit(jax.value_and_grad(lambda *a: f(*a)[0], (0, 1, 2)))
    (n,) = jax.export.symbolic_shape("n")
    kinds = [jax.ShapeDtypeStruct(a.shape if len(a) == V else (n, *a.shape[1:]), a.dtype) for a in case]
    program = jax.export.export(step)(*kinds)
    for count in (1, 4, N):
        given = [a if len(a) == V else a[:count] for a in case]
        got, want = program.call(*given), step(*given)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), got, want)


@pytest.mark.parametrize("count", [1, 6, 19])
def test_expected_counts_are_what_draws_hold(count):
    keys = jax.random.split(jax.random.key(0), 4000)
    drawn = jax.vmap(lambda k: log_uniform_negatives(k, V, count)[0])(keys)
    assert drawn.shape == (4000, count)
    expected = np.exp(log_uniform_negatives(keys[0], V, count)[1])
    np.testing.assert_allclose(np.bincount(drawn.ravel(), minlength=V) / 4000, expected, atol=0.03)
    np.testing.assert_allclose(expected.sum(), count, rtol=1e-5)
    assert expected.max() <= 1 + 1e-6
    assert (np.diff(expected) <= 1e-6).all()


def test_more_negatives_than_classes_is_an_error():
    with pytest.raises(ValueError, match="cannot sample 21 negatives from 20"):
        log_uniform_negatives(jax.random.key(0), V, V + 1)


def test_bfloat16_products_keep_float32_sums():
    keys = jax.random.split(jax.random.key(0), 2)
    hidden, table = (jax.random.normal(k, (n, P)) for k, n in zip(keys, (N, V), strict=True))
    rest = table, jnp.zeros(V), jnp.arange(N), jnp.ones(N)
    half, full = (full_nll(hidden.astype(d), *rest)[0] for d in (jnp.bfloat16, jnp.float32))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, rtol=0.02)
