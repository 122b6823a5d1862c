"""Row-wise updates against the dense ones they stand for."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import Batch, ContiguousStream, Window
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
def fresh(model):
    """The parameters before training."""
    return init_params(model, jax.random.key(0))


def after(config, optimizer, rowwise, steps=3, batches=(BATCH,) * 3, dense=False, **more):
    """Training with dense or with row-wise updates; the state after the last step."""
    model = BiLM(config, V)
    inner = make_optimizer(OptimizerConfig(optimizer=optimizer, learning_rate=0.1, **more), 10)
    optimizer = RowSparse(inner, bilm_rows(model, S), dense) if rowwise else inner
    loss = bilm_loss(model, S, rowwise)
    step = jax.jit(lambda state, batch: train_step(state, batch, KEY, loss, optimizer))
    state = TrainState.create(fresh(model), optimizer)
    for batch in batches[:steps]:
        state, sums = step(state, batch)
        assert float(sums["steps"]) == 1
    return state


@pytest.mark.parametrize("tie", [True, False])
def test_adagrad_by_rows_is_the_dense_one(tie):
    config = BiLMConfig(embedding=4, cells=4, layers=1, tie=tie)
    dense, rows = (after(config, "adagrad", by_rows) for by_rows in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), dense, rows)
    moved = np.abs(rows.params["embedder"]["table"] - fresh(BiLM(config, V))["embedder"]["table"]).max(1) > 0
    assert 0 < moved.sum() < V


def test_lazy_adam_is_adam_on_the_rows_of_the_first_step():
    config = BiLMConfig(embedding=4, cells=4, layers=1)
    dense, rows = (after(config, name, name == "lazy_adam", steps=1) for name in ("adam", "lazy_adam"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), dense, rows)


def test_lazy_adam_leaves_the_rows_of_other_steps_alone():
    config = BiLMConfig(embedding=4, cells=4, layers=1)
    batches = (BATCH, Batch.of([[40, 41, 42], [43, 44]]))
    one = after(config, "lazy_adam", True, 1, batches)
    two = after(config, "lazy_adam", True, 2, batches)
    used = np.asarray(bilm_rows(BiLM(config, V), S)(batches[1], jax.random.fold_in(KEY, 1))["embedder/table"])
    still = np.setdiff1d(np.arange(V), used)
    assert 30 in still
    for tree in (lambda s: s.params, lambda s: optax.tree.get(s.opt_state, "mu")):
        before, now = (np.asarray(tree(s)["embedder"]["table"]) for s in (one, two))
        np.testing.assert_array_equal(before[still], now[still])
        assert (before[used[used < V]] != now[used[used < V]]).any()


@pytest.mark.parametrize(("tie", "most"), [(True, 0.01), (False, 100.0)], ids=["clipped", "not clipped"])
def test_adam_by_rows_moves_the_rows_of_other_steps_too(tie, most):
    config = BiLMConfig(embedding=4, cells=4, layers=1, tie=tie)
    batches = (BATCH, Batch.of([[40, 41, 42], [43, 44]]), Batch.of([[5, 41, 20], [21]]))
    dense, rows = (after(config, "adam", by, 3, batches, dense=by, clip_norm=most) for by in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), dense, rows)


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
def test_who_goes_by_rows(monkeypatch, optimizer, negatives, on, dense):
    monkeypatch.setattr(jax, "default_backend", lambda: on)
    model = BiLM(BiLMConfig(), 8 * ROW_SPARSE_ADAM_RATIO)
    _, steps = bilm_training(model, OptimizerConfig(optimizer=optimizer), 10, negatives)
    assert (steps.dense if isinstance(steps, RowSparse) else None) == dense


@pytest.mark.parametrize("windows", [False, True])
def test_a_task_and_its_optimiser_fit(monkeypatch, windows):
    monkeypatch.setattr(tasks, "ROW_SPARSE_ADAM_RATIO", 1)
    model = BiLM(BiLMConfig(embedding=4, cells=4, layers=1), V)
    params, batch = fresh(model), BATCH
    if windows:
        batch = Window(jnp.array([[[2, 5, 9, 3]], [[3, 9, 5, 2]]]), jnp.ones((2, 1, 3)))
        params = params | {"state": zero_state(model.config, 1)}
    task, steps = bilm_training(model, OptimizerConfig(), 10, S, windows)
    want = (bilm_window_loss if windows else bilm_loss)(model, S)
    given = steps.select(params, steps.rows(batch, KEY))
    assert given["embedder"]["table"].shape != params["embedder"]["table"].shape
    got = (jax.jit(loss)(p, batch, KEY)[0] for loss, p in ((task, given), (want, params)))
    np.testing.assert_allclose(*got, rtol=1e-6)


def test_lazy_adam_with_the_full_softmax_is_refused():
    for negatives in (None, V):
        with pytest.raises(InputError, match='"lazy_adam" needs the sampled softmax'):
            bilm_training(BiLM(BiLMConfig(), V), OptimizerConfig(optimizer="lazy_adam"), 10, negatives)


@pytest.mark.parametrize("words", [[7], [9, 4, 9, 9, 59], list(range(V)), [3] * 99])
def test_the_words_a_step_uses_are_each_there_once(words):
    batch, model = Batch.of([words]), BiLM(BiLMConfig(tie=False), V)
    got = bilm_rows(model, S)(batch, KEY)
    drawn = log_uniform_negatives(jax.random.split(KEY)[1], V, S).classes
    want = np.unique(np.concatenate([np.ravel(batch.words), drawn]))
    assert set(got) == set(bilm_tables(model))
    for rows in got.values():
        np.testing.assert_array_equal(rows[: len(want)], want)
        assert (np.asarray(rows[len(want) :]) == V).all()


def test_windows_by_rows_are_the_dense_ones(documents):
    """The tables of the token vectors and of the softmax, and the state carried on."""
    model = BiLM(BiLMConfig(embedding=4, cells=4, layers=1, tie=False), 50)
    stream = ContiguousStream(documents, 2, 4, seed=1)
    inner = make_optimizer(OptimizerConfig(optimizer="adagrad"), 10)
    states = []
    for optimizer in (inner, RowSparse(inner, bilm_rows(model, S))):
        loss = bilm_window_loss(model, S, optimizer is not inner)
        carry = {"state": zero_state(model.config, 2)}
        state = TrainState.create(fresh(model), optimizer, carry=carry)
        step = jax.jit(lambda s, w, loss=loss, o=optimizer: train_step(s, w, KEY, loss, o))
        sums = {}
        for i in range(2):
            state, sums = step(state, stream.window(i))
        states.append((state, sums))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)


@pytest.mark.parametrize("dense", [False, True])
def test_a_step_that_is_not_finite_or_not_wanted_changes_no_row(dense):
    optimizer = RowSparse(optax.adam(0.1), lambda batch, key: {"t": batch[1]}, dense)
    loss = lambda params, batch, key: (jnp.sum(params["t"]) / batch[0], {})  # noqa: E731
    some, others = jnp.array([1, 3, 4]), jnp.array([0, 3, 4])  # the last is none

    def stepped(state, divisor, rows, enabled=True):
        return train_step(state, (jnp.float32(divisor), rows), KEY, loss, optimizer, enabled)  # type: ignore

    before = TrainState.create({"t": jnp.arange(12.0).reshape(4, 3)}, optimizer)
    state, _ = stepped(before, 1, some)  # so that there are moments to move on by
    assert moved(before, state) == [False, True, False, True]
    for divisor, enabled in ((0, True), (1, False)):
        still, sums = stepped(state, divisor, others, jnp.array(enabled))
        assert sums["steps"] == 0
        of = (state.params, state.opt_state), (still.params, still.opt_state)
        jax.tree.map(np.testing.assert_array_equal, *of)
    after, _ = stepped(state, 1, others)
    assert moved(state, after) == [True, dense, False, True]


def moved(before, after):
    """Of each row of the table, whether it did."""
    return (np.asarray(before.params["t"]) != after.params["t"]).any(1).tolist()


OPTIMIZERS = {
    "masked": lambda: optax.masked(optax.adagrad(0.1), {"t": True, "d": False}),
    "each its own": lambda: optax.multi_transform(
        {"few": optax.adagrad(0.1), "all": optax.sgd(0.1)}, {"t": "few", "d": "all"}
    ),
    "that go on": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(0.1, 0.9)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimisers_of_parts_of_the_parameters_move_them_as_optax_does(name, standard_promotion):
    params = {"t": jnp.arange(12.0).reshape(4, 3), "d": jnp.ones(3)}
    dense = OPTIMIZERS[name]()
    by_rows = RowSparse(OPTIMIZERS[name](), lambda batch, key: {"t": batch}, dense=name == "that go on")

    def loss(params, rows, key):
        table = params["t"] if len(params["t"]) == 2 else jnp.take(params["t"], rows, axis=0)
        return jnp.sum(jnp.sin(table * params["d"][None])), {}

    want, state = params, dense.init(params)
    ours = [TrainState.create(params, optimizer) for optimizer in (dense, by_rows)]
    for rows in map(jnp.array, ([1, 3], [0, 1], [1, 2])):
        gradients = jax.grad(lambda p, rows=rows: loss(p, rows, KEY)[0])(want)
        updates, state = dense.update(gradients, state, want)
        want = optax.apply_updates(want, updates)
        ours = [train_step(s, rows, KEY, loss, o)[0] for s, o in zip(ours, (dense, by_rows), strict=True)]  # type: ignore
    assert (np.asarray(want["t"]) != params["t"]).any(1).all()
    for got in ours:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got.params, want)


def test_a_table_that_is_not_there_is_an_error():
    optimizer = RowSparse(optax.sgd(0.1), lambda batch, key: {"u": jnp.array([1])})
    with pytest.raises(ValueError, match="no parameter is called u"):
        optimizer.select({"t": jnp.zeros((2, 2))}, optimizer.rows(None, KEY))
