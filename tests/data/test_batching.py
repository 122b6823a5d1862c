from dataclasses import replace
from itertools import combinations

import jax
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from elmo_jax.data.batching import Batch, BatchStream, bucket_bounds
from elmo_jax.parallel import feed


def rows(batches) -> list[tuple[int, ...]]:
    """The documents of a dispatch's batches, each with <S> and </S>."""
    return [
        tuple(w[:n])
        for words, lengths in zip(batches.words, batches.lengths, strict=True)
        for w, n in zip(words.tolist(), lengths.tolist(), strict=True)
        if n
    ]


def steps(stream, first, last):
    """Every step's batch alone, however it was shared out to dispatches."""
    for dispatch in stream.chunks(first, last):
        for k in range(dispatch.count):
            yield dispatch.batches.words[k].tobytes(), dispatch.batches.weight[k].tobytes()


def test_a_batch_marks_its_filler_rows():
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
def test_bounds_are_the_best_there_are(lengths, most, price, rows):
    array = np.array(lengths)
    candidates = sorted({-(-n // 4) * 4 for n in lengths})

    def cost(bounds):
        total, waiting, left = price * len(bounds), 0, sorted(lengths)
        for bound in bounds:
            while left and left[0] <= bound:
                left, waiting = left[1:], waiting + 1
            while waiting >= rows or (waiting and not left):
                total, waiting = total + rows * bound, max(0, waiting - rows)
        return total

    every = (
        (*lower, candidates[-1])
        for k in range(min(most, len(candidates)))
        for lower in combinations(candidates[:-1], k)
    )
    found = bucket_bounds(array, rows, most, price)
    assert cost(found) == min(map(cost, every))
    assert list(found) == sorted(set(found)) and len(found) <= most


@pytest.mark.parametrize("with_characters", [False, True])
def test_batches_are_made_at_once_as_one_by_one(documents, rng, with_characters):
    documents = replace(
        documents,
        character_ids=rng.integers(1, 9, (50, 3)).astype(np.int32) if with_characters else None,
        vocabulary_size=40,
        max_length=20,
        labels=documents.labels + np.int32(1),
    )
    rows = np.full((3, 5), -1)
    rows[0], rows[1, :2] = rng.integers(0, len(documents), 5), (7, 3)
    made = documents.batch(rows, 24)
    for k, each in enumerate(rows):
        each = each[each >= 0]
        sentences = [documents.ids[documents.offsets[n] :][: documents.lengths[n]] for n in each]
        want = Batch.of(sentences, documents.labels[each], (5, 24))
        for name in ("lengths", "labels", "weight"):
            got = getattr(made, name)[k]
            np.testing.assert_array_equal(got, getattr(want, name))
            assert got.dtype == getattr(want, name).dtype
        words, (chars, _) = documents.known_words(want.words), documents.characters(want.words, axes=None)
        np.testing.assert_array_equal(made.words[k], words)
        assert made.words.dtype == words.dtype == np.int32
        assert (made.chars is None) == (chars is None)
        if made.chars is not None:
            np.testing.assert_array_equal(made.chars[k], chars)
    assert made.unique_words is None  # who takes some of the rows had else to mind it


@pytest.mark.parametrize(("ahead", "kind"), [(True, jax.Array), (False, np.ndarray)])
def test_batches_are_sent_ahead_for_training_and_stay_on_the_host_for_all_else(documents, ahead, kind):
    stream = BatchStream(documents, 8, seed=0, steps_per_call=2)
    fed = list(feed(stream, 1, 5, None, prefetch=ahead))
    assert all(isinstance(leaf, kind) for made in fed for leaf in jax.tree.leaves(made.batches))
    for made, want in zip(fed, stream.chunks(1, 5), strict=True):
        assert made.count == want.count
        jax.tree.map(np.testing.assert_array_equal, made.batches, want.batches)


@pytest.mark.parametrize("k", [1, 3])
def test_an_epoch_holds_every_document_once(documents, k):
    stream = BatchStream(documents, 4, seed=3, bounds=(12, 32), steps_per_call=k)
    got = []
    for dispatch in stream.chunks(0, stream.steps_per_epoch):
        assert dispatch.batches.words.shape[:2] == (k, 4)
        for batch in range(dispatch.count):
            part = Batch(
                *(getattr(dispatch.batches, f)[batch : batch + 1] for f in ("words", "lengths")), None, 0
            )
            got += rows(part)
    want = [
        (1, *documents.ids[a:b].tolist(), 2)
        for a, b in zip(documents.offsets[:-1], documents.offsets[1:], strict=True)
    ]
    assert sorted(got) == sorted(want)


def test_a_step_has_its_batch_wherever_the_stream_begins(documents):
    stream = BatchStream(documents, 4, seed=3, bounds=(12, 32), steps_per_call=3)
    last = 2 * stream.steps_per_epoch + 1
    whole = list(steps(stream, 0, last))
    assert len(whole) == last
    for first in range(last):
        assert list(steps(stream, first, last)) == whole[first:]


def test_order_does_not_depend_on_how_steps_share_a_dispatch(documents):
    streams = [BatchStream(documents, 2, 3, (12, 32), steps_per_call=k) for k in (1, 3, 8, 20)]
    n = streams[0].steps_per_epoch
    first, *others = ([*steps(stream, 0, 2 * n)] for stream in streams)
    assert n > 8 and all(other == first for other in others)


def test_order_depends_on_seed_and_epoch(documents):
    stream = BatchStream(documents, 4, seed=3, bounds=(12, 32))
    n = stream.steps_per_epoch
    first, second = list(steps(stream, 0, n)), list(steps(stream, n, 2 * n))
    assert first != second
    assert first != list(steps(BatchStream(documents, 4, seed=4, bounds=(12, 32)), 0, n))


def test_longer_documents_than_the_bounds_get_a_bucket(documents):
    stream = BatchStream(documents, 4, bounds=(8,))
    assert stream.bounds == (8, 32)
    assert stream.steps_per_epoch == len(list(steps(stream, 0, stream.steps_per_epoch)))


@pytest.mark.parametrize("bounds", [(12, 32), (4, 12, 32), (12, 32, 64), (32, 36, 64)])
@pytest.mark.parametrize("seed", [None, 0])
def test_an_epoch_has_the_fewest_batches_and_pads_as_much_as_it_says(documents, bounds, seed):
    stream = BatchStream(documents, 6, seed, bounds)
    made = [d.batches for d in stream.chunks(0, stream.steps_per_epoch)]
    real, all_steps = sum(b.lengths.sum() for b in made), sum(b.words.size for b in made)
    assert stream.padding == pytest.approx(1 - real / all_steps)
    assert len(made) == -(-len(documents) // 6)
    assert sum((b.weight == 0).any() for b in made) == 1
    assert max(b.words.shape[-1] for b in made) == 32  # longer than any document is none
    assert {b.words.shape for b in stream.shapes()} == {b.words.shape for b in made}


def test_take_is_indexing(documents):
    part = documents.take(np.array([5, 0, 17]))
    for got, n in enumerate((5, 0, 17)):
        a, b = documents.offsets[n : n + 2]
        assert part.ids[part.offsets[got] : part.offsets[got + 1]].tolist() == documents.ids[a:b].tolist()
    assert part.labels.tolist() == documents.labels[[5, 0, 17]].tolist()
