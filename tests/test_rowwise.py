"""Row-wise updates against the dense ones they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elmo_jax.bilm import BiLM, BiLMConfig, zero_state
from elmo_jax.contiguous import ContiguousStream
from elmo_jax.data import Batch
from elmo_jax.negatives import log_uniform_negatives
from elmo_jax.rowwise import Rowwise
from elmo_jax.tasks import (
    bilm_loss,
    bilm_rows,
    bilm_tables,
    bilm_training,
    bilm_window_loss,
    init_params,
)
from elmo_jax.train import OptimizerConfig, TrainState, make_optimizer, train_step

V, S = 60, 7
BATCH = Batch.of([[5, 9, 9], [30, 5]])
KEY = jax.random.key(3)


def after(config, optimizer, rowwise, steps=3, batches=(BATCH,) * 3, dense=False, **more):
    """Training with dense or with row-wise updates; the state after the last step."""
    model = BiLM(config, V)
    inner = make_optimizer(OptimizerConfig(optimizer=optimizer, learning_rate=0.1, **more), 10)
    optimizer = Rowwise(inner, bilm_rows(model, S), dense) if rowwise else inner
    loss = bilm_loss(model, S, rowwise)
    step = jax.jit(lambda state, batch: train_step(state, batch, KEY, loss, optimizer))
    state = TrainState.create(init_params(model, jax.random.key(0)), optimizer)
    for batch in batches[:steps]:
        state, sums = step(state, batch)
        assert float(sums["steps"]) == 1
    return state


@pytest.mark.parametrize("tie", [True, False])
def test_adagrad_by_rows_is_the_dense_one(tie):
    config = BiLMConfig(embedding=4, cells=4, tie=tie)
    dense, rows = (after(config, "adagrad", by_rows) for by_rows in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), dense, rows)
    moved = np.abs(np.asarray(rows.params["embedder"]["table"]) - fresh(config)).max(1) > 0
    assert 0 < moved.sum() < V


def fresh(config):
    return np.asarray(init_params(BiLM(config, V), jax.random.key(0))["embedder"]["table"])


def test_lazy_adam_is_adam_on_the_rows_of_the_first_step():
    config = BiLMConfig(embedding=4, cells=4)
    dense, rows = (after(config, name, name == "lazy_adam", steps=1) for name in ("adam", "lazy_adam"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), dense, rows)


def test_lazy_adam_leaves_the_rows_of_other_steps_alone():
    config = BiLMConfig(embedding=4, cells=4)
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
    config = BiLMConfig(embedding=4, cells=4, tie=tie)
    batches = (BATCH, Batch.of([[40, 41, 42], [43, 44]]), Batch.of([[5, 41, 20], [21]]))
    dense, rows = (after(config, "adam", by, 3, batches, dense=by, clip_norm=most) for by in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), dense, rows)


@pytest.mark.parametrize(
    ("optimizer", "negatives"), [("adam", None), ("adam", S), ("adagrad", S), ("lazy_adam", S)]
)
def test_a_task_and_its_optimiser_fit(optimizer, negatives):
    model = BiLM(BiLMConfig(embedding=4, cells=4), V)
    task, steps = bilm_training(model, OptimizerConfig(optimizer=optimizer), 10, negatives)
    state = TrainState.create(init_params(model, jax.random.key(0)), steps)
    want = jax.jit(bilm_loss(model, negatives))(state.params, BATCH, jax.random.fold_in(KEY, 0))[0]
    _, sums = jax.jit(lambda state: train_step(state, BATCH, KEY, task, steps))(state)
    np.testing.assert_allclose(sums["loss"], want, rtol=1e-6)
    assert isinstance(steps, Rowwise) == (negatives is not None)
    assert not isinstance(steps, Rowwise) or steps.dense == (optimizer == "adam")


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
    model = BiLM(BiLMConfig(embedding=4, cells=4, tie=False), 50)
    stream = ContiguousStream(documents, 2, 4, seed=1)
    inner = make_optimizer(OptimizerConfig(optimizer="adagrad"), 10)
    states = []
    for optimizer in (inner, Rowwise(inner, bilm_rows(model, S))):
        loss = bilm_window_loss(model, S, optimizer is not inner)
        carry = {"state": zero_state(model.config, 2)}
        state = TrainState.create(init_params(model, jax.random.key(0)), optimizer, carry=carry)
        step = jax.jit(lambda s, w, loss=loss, o=optimizer: train_step(s, w, KEY, loss, o))
        sums = {}
        for i in range(2):
            state, sums = step(state, stream.window(i))
        states.append((state, sums))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *states)


@pytest.mark.parametrize("dense", [False, True])
def test_a_step_that_is_not_finite_changes_no_row(dense):
    table = jnp.arange(12.0).reshape(4, 3)
    optimizer = Rowwise(optax.adam(0.1), lambda batch, key: {"t": jnp.array([1, 3, 4])}, dense)
    loss = lambda params, batch, key: (jnp.sum(params["t"]) / batch, {})  # noqa: E731
    state = TrainState.create({"t": table}, optimizer)
    bad, sums = train_step(state, jnp.zeros(()), KEY, loss, optimizer)  # type: ignore
    np.testing.assert_array_equal(bad.params["t"], table)
    assert sums["steps"] == 0 and not np.any(bad.opt_state[0].mu["t"])
    good, _ = train_step(state, jnp.ones(()), KEY, loss, optimizer)  # type: ignore
    assert (np.asarray(good.params["t"] != table).any(1) == [False, True, False, True]).all()


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
    by_rows = Rowwise(OPTIMIZERS[name](), lambda batch, key: {"t": batch}, dense=name == "that go on")

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
    optimizer = Rowwise(optax.sgd(0.1), lambda batch, key: {"u": jnp.array([1])})
    with pytest.raises(ValueError, match="no parameter is called u"):
        optimizer.given({"t": jnp.zeros((2, 2))}, optimizer.rows(None, KEY))
