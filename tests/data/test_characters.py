import numpy as np
import pytest
from hypothesis import given, strategies as st
from reference import characters

from elmo_jax.data import characters as spelling
from elmo_jax.data.characters import character_ids, unique_words

WORDS = ["bank", "<S>", "</S>", "", "naïve", "語" * 30, "x" * 48, "x" * 49, "\x00", "<s>"]


def test_ids_are_the_official_table():
    ids = character_ids(WORDS)
    assert ids.shape == (len(WORDS), 50) and ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [np.array(characters(word)) + 1 for word in WORDS])


@given(st.lists(st.text(max_size=60), max_size=5))
def test_any_text_is_spelled_within_the_table(words):
    ids = character_ids(words)
    assert ids.shape == (len(words), 50)
    assert ((ids >= 1) & (ids < 262)).all()
    for row, word in zip(ids, words, strict=True):
        alone = character_ids([word])[0]
        np.testing.assert_array_equal(row, alone)


@pytest.mark.parametrize("multiple", [4, 7, 8])
def test_cut_padding_is_nothing_but_padding_and_leaves_a_window_of_it(multiple):
    ids = character_ids(["a", "bank"], multiple)
    whole = character_ids(["a", "bank"])
    np.testing.assert_array_equal(ids, whole[:, : ids.shape[1]])
    assert (whole[:, ids.shape[1] - multiple :] == 261).all()
    assert character_ids(["x" * 60], multiple).shape == (1, 50)


@pytest.mark.parametrize(("shape", "axes"), [((20,), 1), ((3, 5, 4), 2), ((2, 3, 20), 1)])
def test_words_that_differ_are_found_once_each_and_every_word_among_them(rng, monkeypatch, shape, axes):
    monkeypatch.setattr(spelling, "SPELLED", 4)
    ids = rng.integers(0, 9, shape)
    found = unique_words(ids, axes)
    assert found is not None and found.first.dtype == found.place.dtype == np.int32
    assert found.first.shape[:-2] == shape[:-axes] and found.place.shape == shape
    most = 0
    for at in np.ndindex(shape[:-axes]):
        step, first, place = ids[at].ravel(), found.first[at].ravel(), found.place[at].ravel()
        np.testing.assert_array_equal(step[first][place], step)
        assert len(set(place.tolist())) == len(set(step.tolist()))
        most = max(most, len(set(step.tolist())))
    groups, words = found.first.shape[-2:]
    assert words == 4 and groups >= 2 and groups * words >= most
    assert groups == 2 or (groups - 1) * words < most


def test_groups_are_few_to_compile_and_little_is_spelled_in_vain(monkeypatch):
    monkeypatch.setattr(spelling, "SPELLED", 1)
    least = np.arange(1, 200)
    groups = []
    for n in least:
        found = unique_words(np.arange(500) % n, axes=1)
        assert found is not None
        groups.append(len(found.first))
    groups = np.array(groups)
    assert (groups >= least).all() and (groups[1:] <= 1.25 * least[1:]).all()
    assert groups.min() == 2 and len(set(groups)) < 30


def test_of_a_short_step_each_word_is_spelled():
    assert unique_words(np.zeros((2, spelling.SPELLED - 1), int), axes=2) is None
    assert unique_words(np.zeros((2, spelling.SPELLED), int), axes=2) is not None
