"""Row-sparse updates equal the dense updates that they replace."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import Batch, ContiguousStream
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM, BiLMConfig, zero_state
from elmo_jax.ops.softmax import log_uniform_negatives
from elmo_jax.training import objectives as tasks
from elmo_jax.training.objectives import (
    ROW_SPARSE_ADAM_RATIO,
    bilm_loss,
    bilm_rows,
    bilm_tables,
    bilm_training,
    bilm_window_loss,
    init_params,
)
from elmo_jax.training.optimizers import RowSparse, make_optimizer
from elmo_jax.training.step import TrainState, train_step

V, S = 60, 7
BATCH = Batch.of([[5, 9, 9], [30, 5]])
KEY = jax.random.key(3)


@cache
def initial_params(model):
    return init_params(model, jax.random.key(0))


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), a, b)


def train(model, optimizer, loss, batches, carry=None):
    """Return the state and the metrics after a step on each batch."""
    state, metrics = TrainState.create(initial_params(model), optimizer, carry=carry), {}
    step = jax.jit(lambda state, batch: train_step(state, batch, KEY, loss, optimizer))
    for batch in batches:
        state, metrics = step(state, batch)
        assert float(metrics["steps"]) == 1
    return state, metrics


def train_both_ways(model, config, batches, dense):
    """Return the states after dense and after row-sparse updates."""
    inner = make_optimizer(config, 10)
    row_sparse = RowSparse(inner, bilm_rows(model, S), dense)
    return (
        train(model, inner, bilm_loss(model, S), batches)[0],
        train(model, row_sparse, bilm_loss(model, S, True), batches)[0],
    )


def test_row_sparse_adagrad_equals_dense_adagrad():
    model = BiLM(BiLMConfig(embedding=4, cells=4, layers=1), V)
    config = OptimizerConfig(optimizer="adagrad", learning_rate=0.1)
    dense, row_sparse = train_both_ways(model, config, [BATCH] * 3, dense=False)
    assert_close(dense, row_sparse)
    table = initial_params(model)["embedder"]["table"]
    moved = np.abs(row_sparse.params["embedder"]["table"] - table).max(1) > 0
    assert 0 < moved.sum() < V


def test_row_sparse_adam_equals_adam_when_dense_rows_move_too():
    model = BiLM(BiLMConfig(embedding=4, cells=4, layers=1), V)
    batches = [BATCH, Batch.of([[40, 41, 42], [43, 44]]), Batch.of([[5, 41, 20], [21]])]
    config = OptimizerConfig(learning_rate=0.1, clip_norm=0.01)
    assert_close(*train_both_ways(model, config, batches, dense=True), rtol=1e-4, atol=1e-5)


def test_row_sparse_windows_equal_dense_ones(documents):
    model = BiLM(BiLMConfig(embedding=4, cells=4, layers=1, tie=False), 50)
    stream = ContiguousStream(documents, 2, 4, seed=1)
    inner = make_optimizer(OptimizerConfig(optimizer="adagrad"), 10)
    results = []
    for optimizer in (inner, RowSparse(inner, bilm_rows(model, S))):
        loss = bilm_window_loss(model, S, optimizer is not inner)
        carry = {"state": zero_state(model.config, 2)}
        results.append(train(model, optimizer, loss, [stream.window(0), stream.window(1)], carry))
    assert_close(*results)


@pytest.mark.parametrize(
    ("optimizer", "negatives", "on", "dense"),
    [
        ("adam", 7, "cpu", True),
        ("adam", 7, "gpu", None),
        ("adam", 8, "cpu", None),
        ("adagrad", 8, "gpu", False),
        ("lazy_adam", 8, "cpu", False),
        ("adagrad", 8 * ROW_SPARSE_ADAM_RATIO, "cpu", None),
        ("adam", None, "cpu", None),
    ],
)
def test_training_is_row_sparse_where_it_is_faster(monkeypatch, optimizer, negatives, on, dense):
    monkeypatch.setattr(jax, "default_backend", lambda: on)
    model = BiLM(BiLMConfig(), 8 * ROW_SPARSE_ADAM_RATIO)
    _, steps = bilm_training(model, OptimizerConfig(optimizer=optimizer), 10, negatives)
    assert (steps.dense if isinstance(steps, RowSparse) else None) == dense


def test_row_sparse_loss_of_selected_rows_equals_dense_loss(monkeypatch):
    monkeypatch.setattr(tasks, "ROW_SPARSE_ADAM_RATIO", 1)
    model = BiLM(BiLMConfig(embedding=4, cells=4, layers=1), V)
    params = initial_params(model)
    loss, optimizer = bilm_training(model, OptimizerConfig(), 10, S)
    selected = optimizer.select(params, optimizer.rows(BATCH, KEY))
    assert selected["embedder"]["table"].shape != params["embedder"]["table"].shape
    pairs = ((loss, selected), (bilm_loss(model, S), params))
    np.testing.assert_allclose(*(jax.jit(f)(p, BATCH, KEY)[0] for f, p in pairs), rtol=1e-6)


def test_lazy_adam_with_the_full_softmax_is_refused():
    for negatives in (None, V):
        with pytest.raises(InputError, match='"lazy_adam" needs the sampled softmax'):
            bilm_training(BiLM(BiLMConfig(), V), OptimizerConfig(optimizer="lazy_adam"), 10, negatives)


@pytest.mark.parametrize("words", [[9, 4, 9, 9, 59], list(range(V)), [3] * 99])
def test_rows_of_a_step_are_unique_and_sorted(words):
    batch, model = Batch.of([words]), BiLM(BiLMConfig(tie=False), V)
    got = bilm_rows(model, S)(batch, KEY)
    drawn = log_uniform_negatives(jax.random.split(KEY)[1], V, S).classes
    want = np.unique(np.concatenate([np.ravel(batch.words), drawn]))
    assert set(got) == set(bilm_tables(model))
    for rows in got.values():
        np.testing.assert_array_equal(rows[: len(want)], want)
        assert (np.asarray(rows[len(want) :]) == V).all()


@pytest.mark.parametrize("dense", [False, True])
def test_skipped_step_changes_no_row_and_other_rows_move_only_if_dense(dense):
    optimizer = RowSparse(optax.adam(0.1), lambda batch, key: {"t": batch[1]}, dense)
    loss = lambda params, batch, key: (jnp.sum(params["t"]) / batch[0], {})  # noqa: E731
    some, others = jnp.array([1, 3, 4]), jnp.array([0, 3, 4])  # 4 is beyond the table

    @jax.jit
    def step(state, divisor, rows, enabled):
        return train_step(state, (divisor, rows), KEY, loss, optimizer, enabled)

    before = TrainState.create({"t": jnp.arange(12.0).reshape(4, 3)}, optimizer)
    state, _ = step(before, 1.0, some, True)  # now there are moments
    assert moved_rows(before.params, state.params) == [False, True, False, True]
    for divisor, enabled in ((0.0, True), (1.0, False)):
        same, metrics = step(state, divisor, others, enabled)
        assert metrics["steps"] == 0
        arrays = (state.params, state.opt_state), (same.params, same.opt_state)
        jax.tree.map(np.testing.assert_array_equal, *arrays)
    after, _ = step(state, 1.0, others, True)
    assert moved_rows(state.params, after.params) == [True, dense, False, True]
    mu = [optax.tree.get(s.opt_state, "mu") for s in (state, after)]
    assert moved_rows(*mu) == [True, dense, False, True]


def moved_rows(before, after):
    return (np.asarray(before["t"]) != after["t"]).any(1).tolist()


OPTIMIZERS = {
    "masked": lambda: optax.masked(optax.adagrad(0.1), {"t": True, "d": False}),
    "groups": lambda: optax.multi_transform(
        {"few": optax.adagrad(0.1), "all": optax.sgd(0.1)}, {"t": "few", "d": "all"}
    ),
    "momentum": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, 0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_of_parameter_groups_equal_optax(name, standard_promotion):
    params = {"t": jnp.arange(12.0).reshape(4, 3), "d": jnp.ones(3)}
    dense = OPTIMIZERS[name]()
    row_sparse = RowSparse(OPTIMIZERS[name](), lambda batch, key: {"t": batch}, dense=name == "momentum")

    def loss(params, rows, key):
        table = params["t"] if len(params["t"]) == 2 else jnp.take(params["t"], rows, axis=0)
        return jnp.sum(jnp.sin(table * params["d"][None])), {}

    want, state = params, dense.init(params)
    ours = [TrainState.create(params, optimizer) for optimizer in (dense, row_sparse)]
    steps = [jax.jit(lambda s, rows, o=o: train_step(s, rows, KEY, loss, o)[0]) for o in (dense, row_sparse)]
    for rows in map(jnp.array, ([1, 3], [0, 1], [1, 2])):
        gradients = jax.grad(lambda p, rows=rows: loss(p, rows, KEY)[0])(want)
        updates, state = dense.update(gradients, state, want)
        want = optax.apply_updates(want, updates)
        ours = [step(state, rows) for step, state in zip(steps, ours, strict=True)]
    assert (np.asarray(want["t"]) != params["t"]).any(1).all()
    for got in ours:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got.params, want)


def test_unknown_table_is_an_error():
    optimizer = RowSparse(optax.sgd(0.1), lambda batch, key: {"u": jnp.array([1])})
    with pytest.raises(ValueError, match="no parameter is called u"):
        optimizer.select({"t": jnp.zeros((2, 2))}, optimizer.rows(None, KEY))
