import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix as sklearn_confusion,
    precision_recall_fscore_support,
)

from elmo_jax.metrics import classification, confusion_matrix, perplexities, token_mask

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=25)
@given(pairs, st.integers(0, 3))
def test_figures_are_scikit_learns(rows, fillers):
    true, predicted = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    weight = jnp.array([1.0] * len(rows) + [0.0] * fillers)
    padded = (jnp.pad(jnp.asarray(column), (0, fillers)) for column in (true, predicted))
    counts = confusion_matrix(*padded, weight, 4)
    np.testing.assert_array_equal(counts, sklearn_confusion(true, predicted, labels=range(4)))
    got = classification(np.asarray(counts))
    want = precision_recall_fscore_support(true, predicted, average="weighted", zero_division=0)
    assert [got[n] for n in ("precision", "recall", "f1")] == pytest.approx(want[:3])
    assert got["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert got["confusion_matrix"] == np.asarray(counts).astype(int).tolist()


def test_perplexity_is_the_exponential_of_the_mean():
    got = perplexities({"nll_forward": 6.0, "nll_backward": 2.0, "tokens": 4.0})
    assert got["perplexity_forward"] == pytest.approx(np.exp(1.5))
    assert got["perplexity_backward"] == pytest.approx(np.exp(0.5))
    assert got["perplexity"] == pytest.approx(np.exp(1.0))


def test_mask_is_true_on_real_steps():
    assert token_mask(jnp.array([2, 0]), 3).tolist() == [[True, True, False], [False] * 3]
