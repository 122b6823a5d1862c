"""SGNS against a float64 reference, and the contents of its stream."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import sigmoid

from elmo_jax.baselines.sgns import (
    SPAN,
    SGNSConfig,
    SpanStream,
    sgns_init,
    sgns_loss,
    sgns_optimizer,
    sgns_rows,
)
from elmo_jax.data.batching import Documents
from elmo_jax.parallel import Plan
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.loop import fit
from elmo_jax.training.optimizers import RowSparseSGD
from elmo_jax.training.step import TrainState, compile_steps, train_step

V, F, WINDOW = 50, 6, 2
CONFIG = SGNSConfig(negatives=3, subsample=0.02, rate=0.1)


def make_stream(documents, **more):
    return SpanStream(documents, V, WINDOW, CONFIG, seed=4, spans=2, steps_per_call=3, **more)


def first_batch(stream):
    return jax.tree.map(lambda a: a[0], next(stream.chunks(0, 1)).batches)


def reference_step(centre, context, batch):
    """Return the loss and the gradient of both tables from a loop over pairs."""
    d_centre, d_context, loss = np.zeros_like(centre), np.zeros_like(context), 0.0
    spans, shared = batch.negatives.shape
    for g in range(spans):
        for t in range(batch.left.shape[1]):
            at = t + WINDOW
            u = batch.words[g, at]
            reach = range(at - batch.left[g, t], at + batch.right[g, t] + 1)
            for o in (batch.words[g, j] for j in reach if j != at):
                targets = [(o, 1.0, 1.0)] + [(n, 0.0, CONFIG.negatives / shared) for n in batch.negatives[g]]
                for v, label, weight in targets:
                    p = sigmoid(centre[u] @ context[v])
                    loss -= weight * np.log(p if label else 1 - p)
                    d_centre[u] += weight * (p - label) * context[v]
                    d_context[v] += weight * (p - label) * centre[u]
    return loss, d_centre, d_context


def test_step_equals_reference(documents, rng):
    batch = first_batch(make_stream(documents))
    tables = {name: rng.normal(size=(V, F)).astype(np.float32) for name in ("centre", "context")}
    centre, context = (table.astype(np.float64) for table in tables.values())
    loss, d_centre, d_context = reference_step(centre, context, batch)
    optimizer = RowSparseSGD(lambda step: 0.1, sgns_rows, np.inf)
    state = TrainState.create(jax.tree.map(jnp.asarray, tables), optimizer)
    step = jax.jit(lambda state: train_step(state, batch, jax.random.key(0), sgns_loss(CONFIG), optimizer))
    after, metrics = step(state)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert float(metrics["pairs"]) == batch.left.sum() + batch.right.sum() > 0
    np.testing.assert_allclose(after.params["centre"], centre - 0.1 * d_centre, atol=1e-4)
    np.testing.assert_allclose(after.params["context"], context - 0.1 * d_context, atol=1e-4)


def test_frequent_row_moves_by_a_multiple_of_its_mean_update(rng):
    table = rng.normal(size=(5, F)).astype(np.float32)
    rows = np.array([[3, 0, 3], [3, 3, 1]])
    gradients = rng.normal(size=(*rows.shape, F)).astype(np.float32)
    optimizer = RowSparseSGD(lambda step: 0.1, lambda batch, key: {}, 2.0)
    given = {"t": jnp.asarray(table)}, {"t": jnp.asarray(rows)}
    moved = optimizer.update({"t": jnp.asarray(gradients)}, {}, *given, jnp.zeros(()), jnp.array(True))[0][
        "t"
    ]
    want = table.astype(np.float64)
    want[0] -= 0.1 * gradients[0, 1]
    want[1] -= 0.1 * gradients[1, 2]
    want[3] -= 0.1 * 2 * gradients[rows == 3].mean(0)
    np.testing.assert_allclose(moved, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("size", "window", "negatives"), [(20, 4, 5), (60, 10, 15)])
def test_training_with_a_small_vocabulary_converges(size, window, negatives):
    """Each word is in hundreds of pairs of a step; the nearest words are of the same topic."""
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 4, 1500)
    ids = np.concatenate([t + 4 * rng.integers(0, size // 4, 30) for t in topic]).astype(np.int32)
    config = SGNSConfig(negatives=negatives)
    stream = SpanStream(Documents(ids, np.arange(0, len(ids) + 1, 30), topic), size, window, config, seed=0)
    optimizer = sgns_optimizer(config, window, 4 * stream.steps_per_epoch)
    state = TrainState.create(sgns_init(size, 20, jax.random.key(0)), optimizer)
    run_steps = compile_steps(sgns_loss(config), optimizer)
    for part in stream.chunks(0, 4 * stream.steps_per_epoch):
        state, metrics = run_steps(state, part.batches, part.count, jax.random.key(0))
    assert metrics["steps"][: part.count].min() == 1
    centre = np.asarray(state.params["centre"])
    unit = centre / np.linalg.norm(centre, axis=1, keepdims=True)
    near = (unit @ unit.T - 2 * np.eye(size)).argmax(1)
    assert np.mean(near % 4 == np.arange(size) % 4) > 0.9
    assert np.abs(np.asarray(state.params["context"])).max() < 20


def test_gradients_are_smaller_than_the_tables(documents):
    """The only operations of a step with table-sized results are the updates of the two tables."""
    size = 10_000
    optimizer = sgns_optimizer(CONFIG, WINDOW, 10)
    state = TrainState.create(sgns_init(size, F, jax.random.key(0)), optimizer)
    step = lambda state, batch: train_step(state, batch, jax.random.key(0), sgns_loss(CONFIG), optimizer)  # noqa: E731
    program = jax.make_jaxpr(step)(state, first_batch(make_stream(documents)))
    large = [e.primitive.name for e in program.eqns if any(v.aval.shape == (size, F) for v in e.outvars)]
    assert large == ["scatter-add", "scatter-add"]


def test_contexts_are_neighbours_in_one_document(documents):
    tagged = Documents(np.arange(len(documents.ids), dtype=np.int32), documents.offsets, documents.labels)
    keep_all = SGNSConfig(subsample=1.0)
    stream = SpanStream(tagged, len(tagged.ids), WINDOW, keep_all, seed=0, spans=2)
    owner = np.repeat(np.arange(len(documents)), documents.lengths)
    centres, reaches = [], []
    for chunk in stream.chunks(0, stream.steps_per_epoch):
        for k in range(chunk.count):
            batch = jax.tree.map(lambda a, k=k: a[k], chunk.batches)
            for g, t in np.ndindex(batch.left.shape):
                left, right, at = int(batch.left[g, t]), int(batch.right[g, t]), t + WINDOW
                if left + right == 0:
                    continue
                around = batch.words[g, at - left : at + right + 1]
                np.testing.assert_array_equal(around, np.arange(len(around)) + around[0])
                assert len(set(owner[around])) == 1
                centres.append(int(batch.words[g, at]))
                reaches.append(max(left, right))
    single = documents.offsets[:-1][documents.lengths == 1]
    assert sorted([*centres, *single.tolist()]) == list(range(len(tagged.ids)))
    assert set(reaches) == {1, 2}


def test_subsampling_and_negatives_follow_the_counts(rng):
    ids = np.repeat(np.arange(4, 8), [10, 100, 1000, 10_000]).astype(np.int32)
    documents = Documents(rng.permutation(ids), np.arange(0, len(ids) + 1, 1111), np.zeros(10, int))
    stream = SpanStream(documents, 8, WINDOW, SGNSConfig(subsample=0.01), seed=0, spans=4)
    seen, sampled = np.zeros(8), np.zeros(8)
    for epoch in range(8):
        spans = stream._make_epoch(epoch)
        real = (spans.left + spans.right) > 0
        seen += np.bincount(spans.words[:, :, WINDOW:-WINDOW][real], minlength=8) / 8
        sampled += np.bincount(spans.negatives.ravel(), minlength=8)
    frequency = np.array([10, 100, 1000, 10_000]) / len(ids)
    kept = np.minimum(1, np.sqrt(0.01 / frequency) + 0.01 / frequency) * frequency * len(ids)
    np.testing.assert_allclose(seen[4:], kept, rtol=0.12)
    np.testing.assert_allclose(
        sampled[4:] / sampled.sum(), frequency**0.75 / (frequency**0.75).sum(), rtol=0.25, atol=1e-3
    )
    assert sampled[:4].sum() == 0


def test_window_is_limited_to_the_longest_document(documents):
    longest, every = int(documents.lengths.max()), SGNSConfig(subsample=1.0)

    def spans(window):
        stream = SpanStream(documents, V, window, every, seed=0, spans=2)
        return stream._make_epoch(0), stream.window

    for window in (1, longest - 1):
        made, width = spans(window)
        assert width == window and made.words.shape[-1] == SPAN + 2 * window
    made, width = spans(2**31 - 1)
    assert width == longest - 1
    # The reach covers each document, so every two of its tokens are a pair.
    assert made.left.sum() + made.right.sum() == (documents.lengths * (documents.lengths - 1)).sum()


def test_smallest_subsample_drops_every_token(documents):
    stream = SpanStream(documents, V, WINDOW, SGNSConfig(subsample=5e-324), seed=0)
    assert stream._keep[np.unique(documents.ids)].max() < 1e-9
    assert stream.steps_per_epoch == 1 and not first_batch(stream).left.any()


def run_fit(documents, path, epochs, resume=False):
    stream = make_stream(documents)
    optimizer = sgns_optimizer(CONFIG, WINDOW, 3 * stream.steps_per_epoch)
    plan = Plan(lambda: TrainState.create(sgns_init(V, F, jax.random.key(0)), optimizer))
    run = Run.create(path, {}, monitor="loss", resume=resume)
    on_epoch = lambda state, metrics: {"loss": float(metrics["loss"] / metrics["pairs"])}  # noqa: E731
    return fit(plan, sgns_loss(CONFIG), optimizer, stream, run, epochs=epochs, seed=0, on_epoch=on_epoch)


@pytest.mark.usefixtures("standard_promotion")
def test_resumed_run_equals_uninterrupted_run(documents, tmp_path):
    state, records = run_fit(documents, tmp_path / "uninterrupted", 3)
    run_fit(documents, tmp_path / "resumed", 1)
    again, resumed = run_fit(documents, tmp_path / "resumed", 3, resume=True)
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    assert [r["loss"] for r in resumed] == [r["loss"] for r in records]
    assert records[2]["loss"] < records[0]["loss"]
