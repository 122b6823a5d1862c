import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from reference import characters

from elmo_jax.data.characters import GROUP_SIZE, character_ids, find_unique_words

WORDS = ["bank", "<S>", "</S>", "", "naïve", "語" * 30, "x" * 48, "x" * 49, "\x00", "<s>"]


def test_character_ids_equal_the_official_ones():
    ids = character_ids(WORDS)
    assert ids.shape == (len(WORDS), 50) and ids.dtype == np.int32
    np.testing.assert_array_equal(ids, [np.array(characters(word)) + 1 for word in WORDS])


@settings(max_examples=50)
@given(st.lists(st.text(max_size=60), max_size=5))
def test_character_ids_of_any_text_are_in_range_and_independent_of_other_words(words):
    ids = character_ids(words)
    assert ids.shape == (len(words), 50)
    assert ((ids >= 1) & (ids < 262)).all()
    for row, word in zip(ids, words, strict=True):
        alone = character_ids([word])[0]
        np.testing.assert_array_equal(row, alone)


@pytest.mark.parametrize("multiple", [4, 7, 8])
def test_trimmed_padding_keeps_one_filter_width(multiple):
    ids = character_ids(["a", "bank"], multiple)
    untrimmed = character_ids(["a", "bank"])
    np.testing.assert_array_equal(ids, untrimmed[:, : ids.shape[1]])
    assert (untrimmed[:, ids.shape[1] - multiple :] == 261).all()
    assert character_ids(["x" * 60], multiple).shape == (1, 50)


@pytest.mark.parametrize(("shape", "axes"), [((20,), 1), ((3, 5, 4), 2), ((2, 3, 20), 1)])
def test_unique_words_contain_each_word_of_a_step_once(rng, shape, axes):
    ids = rng.integers(0, 9, shape)
    found = find_unique_words(ids, axes, group_size=4)
    assert found is not None and found.first.dtype == found.inverse.dtype == np.int32
    assert found.first.shape[:-2] == shape[:-axes] and found.inverse.shape == shape
    most = 0
    for at in np.ndindex(shape[:-axes]):
        step, first, inverse = ids[at].ravel(), found.first[at].ravel(), found.inverse[at].ravel()
        np.testing.assert_array_equal(step[first][inverse], step)
        assert len(set(inverse.tolist())) == len(set(step.tolist()))
        most = max(most, len(set(step.tolist())))
    groups, words = found.first.shape[-2:]
    assert words == 4 and groups >= 2 and groups * words >= most
    assert groups == 2 or (groups - 1) * words < most


def test_group_counts_are_few_and_little_padded():
    least = np.arange(1, 200)
    found = [find_unique_words(np.arange(500) % n, axes=1, group_size=1) for n in least]
    groups = np.array([len(unique.first) for unique in found if unique is not None])
    assert (groups >= least).all() and (groups[1:] <= 1.25 * least[1:]).all()
    assert groups.min() == 2 and len(set(groups)) < 30


def test_short_steps_have_no_unique_words():
    assert find_unique_words(np.zeros((2, GROUP_SIZE - 1), int), axes=2) is None
    assert find_unique_words(np.zeros((2, GROUP_SIZE), int), axes=2) is not None
