import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix as sklearn_confusion,
    precision_recall_fscore_support,
)

from elmo_jax.ops.metrics import classification, confusion_matrix, paired_bootstrap, perplexities

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


@pytest.mark.parametrize(("better", "share"), [(0.5, 0.0), (0.56, 0.3), (0.6, 0.7), (0.75, 0.3)])
def test_the_bootstrap_draws_documents_with_what_all_runs_made_of_them(rng, better, share):
    labels = rng.integers(0, 3, 200)
    hard = rng.random(200)  # documents that one run has wrong are wrong more often in the others
    a, b = (
        np.where(share * hard + (1 - share) * rng.random((3, 200)) < right, labels, (labels + 1) % 3)
        for right in (better, 0.5)
    )
    difference, p = paired_bootstrap(labels, a, b)
    gain = (a == labels).mean(0) - (b == labels).mean(0)
    assert difference == pytest.approx((a == labels).mean() - (b == labels).mean())
    drawn = gain[rng.integers(0, 200, (4000, 200))].mean(1)
    want = min(1, 2 * min((drawn <= 1e-12).mean(), (drawn >= -1e-12).mean()))
    assert p == pytest.approx(want, abs=0.04)
    turned = paired_bootstrap(labels, b, a)
    assert turned == (-difference, pytest.approx(p, abs=0.03))
    assert paired_bootstrap(labels, a, a[[2, 0, 1, 0, 1, 2]]) == (0, 1)
