from dataclasses import replace
from itertools import combinations

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from elmo_jax.data.batching import Batch, BatchStream, ContiguousStream, bucket_bounds
from elmo_jax.data.text import BOS, EOS
from elmo_jax.training.step import feed


def steps(stream, first, last):
    """Return the words of every step's batch, however the steps are divided into chunks."""
    chunks = stream.chunks(first, last)
    return [chunk.batches.words[k].tolist() for chunk in chunks for k in range(chunk.count)]


def sentence(documents, n):
    return documents.ids[documents.offsets[n] : documents.offsets[n + 1]].tolist()


def test_batch_marks_filler_rows():
    batch = Batch.of([[7, 8]], labels=[2], shape=(2, 5))
    assert batch.words.tolist() == [[1, 7, 8, 2, 0], [0, 0, 0, 0, 0]]
    assert batch.lengths.tolist() == [4, 0]
    assert batch.weight.tolist() == [1, 0]
    assert batch.labels.tolist() == [2, 0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(1, 3),
    st.integers(0, 60),
    st.integers(1, 5),
)
def test_bucket_bounds_are_optimal(lengths, max_buckets, bucket_cost, batch_size):
    candidates = sorted({-(-n // 4) * 4 for n in lengths})

    def cost(bounds):
        total, waiting, left = bucket_cost * len(bounds), 0, sorted(lengths)
        for bound in bounds:
            while left and left[0] <= bound:
                left, waiting = left[1:], waiting + 1
            while waiting >= batch_size or (waiting and not left):
                total, waiting = total + batch_size * bound, max(0, waiting - batch_size)
        return total

    choices = (
        (*lower, candidates[-1])
        for k in range(min(max_buckets, len(candidates)))
        for lower in combinations(candidates[:-1], k)
    )
    found = bucket_bounds(np.array(lengths), batch_size, max_buckets, bucket_cost)
    assert cost(found) == min(map(cost, choices))
    assert list(found) == sorted(set(found)) and len(found) <= max_buckets


@pytest.mark.parametrize("with_characters", [False, True])
def test_stacked_batches_equal_single_batches(documents, rng, with_characters):
    documents = replace(
        documents,
        character_ids=rng.integers(1, 9, (50, 3)).astype(np.int32) if with_characters else None,
        vocabulary_size=40,
        max_length=20,
        labels=documents.labels + np.int32(1),
    )
    indices = np.full((3, 5), -1)
    indices[0], indices[1, :2] = rng.integers(0, len(documents), 5), (7, 3)
    stacked = documents.batch(indices, 24)
    assert stacked.unique_words is None
    for k, row in enumerate(indices):
        row = row[row >= 0]
        ids = [documents.ids[documents.offsets[n] :][: documents.lengths[n]] for n in row]
        single = Batch.of(ids, documents.labels[row], (5, 24))
        chars, _ = documents.characters(single.words, axes=2)
        single = replace(single, words=documents.known_words(single.words), chars=chars)
        for got, expected in zip(jax.tree.leaves(stacked), jax.tree.leaves(single), strict=True):
            np.testing.assert_array_equal(got[k], expected)
            assert got.dtype == expected.dtype


def test_take_is_indexing(documents):
    taken = documents.take(np.array([5, 0, 17]))
    assert [sentence(taken, i) for i in range(3)] == [sentence(documents, n) for n in (5, 0, 17)]
    assert taken.labels.tolist() == documents.labels[[5, 0, 17]].tolist()


def test_max_length_truncates_batches_and_taken_documents(documents):
    cut = replace(documents, max_length=5)
    assert cut.lengths.tolist() == np.minimum(documents.lengths, 5).tolist()
    indices = np.array([3, 0, 7])
    for batch in (cut.batch(indices, 7), cut.take(indices).batch(np.arange(3), 7)):
        for words, n in zip(batch.words, indices, strict=True):
            ids = sentence(documents, n)[:5]
            assert words[: len(ids) + 2].tolist() == [BOS, *ids, EOS]
    assert BatchStream(cut, 4).bounds[-1] == 8


def test_groups_of_unique_words_are_larger_on_an_accelerator(documents, monkeypatch):
    character_ids = np.zeros((50, 50), np.int32)
    stream = BatchStream(replace(documents, character_ids=character_ids, group_size=2), 4)
    sizes = []
    for backend in ("cpu", "gpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        sizes.append(next(feed(stream, 0, 1, None)).batches.unique_words.first.shape[-1])
    assert sizes == [2, 8]


@pytest.mark.parametrize(("prefetch", "kind"), [(True, jax.Array), (False, np.ndarray)])
def test_feed_copies_batches_to_the_device_only_with_prefetch(documents, prefetch, kind):
    stream = BatchStream(documents, 8, seed=0, steps_per_call=2)
    fed = list(feed(stream, 1, 5, None, prefetch=prefetch))
    assert all(isinstance(leaf, kind) for chunk in fed for leaf in jax.tree.leaves(chunk.batches))
    for chunk, expected in zip(fed, stream.chunks(1, 5), strict=True):
        assert chunk.count == expected.count
        jax.tree.map(np.testing.assert_array_equal, chunk.batches, expected.batches)


@pytest.mark.parametrize("k", [1, 3])
def test_epoch_contains_every_document_once(documents, k):
    stream = BatchStream(documents, 4, seed=3, bounds=(12, 32), steps_per_call=k)
    found = []
    for batches, count in stream.chunks(0, stream.steps_per_epoch):
        assert batches.words.shape[:2] == (k, 4)
        words, lengths = batches.words[:count].reshape(count * 4, -1), batches.lengths[:count].ravel()
        found += [row[:n].tolist() for row, n in zip(words, lengths, strict=True) if n]
    expected = [[BOS, *sentence(documents, n), EOS] for n in range(len(documents))]
    assert sorted(found) == sorted(expected)


def test_batch_of_a_step_does_not_depend_on_the_first_step(documents):
    stream = BatchStream(documents, 4, seed=3, bounds=(12, 32), steps_per_call=3)
    last = 2 * stream.steps_per_epoch + 1
    batches = steps(stream, 0, last)
    assert len(batches) == last
    for first in range(last):
        assert steps(stream, first, last) == batches[first:]


def test_order_does_not_depend_on_steps_per_call(documents):
    streams = [BatchStream(documents, 2, 3, (12, 32), steps_per_call=k) for k in (1, 3, 8, 20)]
    n = streams[0].steps_per_epoch
    first, *others = (steps(stream, 0, 2 * n) for stream in streams)
    assert n > 8 and all(other == first for other in others)


def test_order_depends_on_seed_and_epoch(documents):
    stream = BatchStream(documents, 4, seed=3, bounds=(12, 32))
    n = stream.steps_per_epoch
    first = steps(stream, 0, n)
    assert first != steps(stream, n, 2 * n)
    assert first != steps(BatchStream(documents, 4, seed=4, bounds=(12, 32)), 0, n)


def test_documents_longer_than_the_bounds_get_a_bound(documents):
    stream = BatchStream(documents, 4, bounds=(8,))
    assert stream.bounds == (8, 32)
    assert stream.steps_per_epoch == len(steps(stream, 0, stream.steps_per_epoch))


@pytest.mark.parametrize("bounds", [(12, 32), (4, 12, 32), (12, 32, 64), (32, 36, 64)])
@pytest.mark.parametrize("seed", [None, 0])
def test_epoch_has_the_fewest_batches_and_the_reported_padding(documents, bounds, seed):
    stream = BatchStream(documents, 6, seed, bounds)
    batches = [chunk.batches for chunk in stream.chunks(0, stream.steps_per_epoch)]
    tokens, positions = sum(b.lengths.sum() for b in batches), sum(b.words.size for b in batches)
    assert stream.padding == pytest.approx(1 - tokens / positions)
    assert len(batches) == -(-len(documents) // 6)
    assert sum((b.weight == 0).any() for b in batches) == 1
    assert max(b.words.shape[-1] for b in batches) == 32  # bounds above the longest document are unused
    assert {b.words.shape for b in stream.shapes()} == {b.words.shape for b in batches}


@pytest.mark.parametrize("unroll", [3, 5])
def test_windows_are_the_sentences_end_to_end(documents, unroll):
    stream = ContiguousStream(documents, 2, unroll, seed=1, steps_per_call=3)
    text = [sentence(documents, n) for n in np.random.default_rng([1, 0]).permutation(len(documents))]
    forward = [i for ids in text for i in (BOS, *ids, EOS)]
    backward = [i for ids in text for i in (EOS, *ids[::-1], BOS)]
    weight = [w for ids in text for w in (*[1.0] * (len(ids) + 1), 0.0)]
    for step in range(stream.steps_per_epoch):
        window = stream.window(step)
        for b in (0, 1):
            start = b * stream.tokens_per_row + step * unroll
            here = slice(start, start + unroll + 1)
            assert window.words[:, b].tolist() == [forward[here], backward[here]]
            assert window.weight[:, b].tolist() == [weight[here][:-1]] * 2
    assert len(forward) - 2 * unroll * stream.steps_per_epoch < 2 * (unroll + 2)


def test_window_of_a_step_does_not_depend_on_the_first_step(documents):
    stream = ContiguousStream(documents, 2, 4, seed=1, steps_per_call=3)
    n = stream.steps_per_epoch
    windows = steps(stream, 0, 2 * n)
    again = steps(ContiguousStream(documents, 2, 4, seed=1, steps_per_call=2), n - 3, n + 4)
    assert windows[n - 3 : n + 4] == again
    assert windows[0] != windows[n]
