import numpy as np
import pytest
from hypothesis import given, strategies as st
from reference import characters

from elmo_jax.characters import character_ids

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
