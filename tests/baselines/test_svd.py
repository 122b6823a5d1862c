"""SVD vectors against counts and a dense decomposition in float64."""

import numpy as np
import pytest

from elmo_jax.baselines.svd import SVDConfig, cooccurrence, ppmi, svd_vectors
from elmo_jax.data.batching import Documents
from elmo_jax.errors import InputError

WINDOW = 3


@pytest.fixture
def counts(documents):
    """Co-occurrence counts from a loop over pairs."""
    n = np.zeros((50, 50))
    for start, end in zip(documents.offsets[:-1], documents.offsets[1:], strict=True):
        ids = documents.ids[start:end]
        for i in range(len(ids)):
            for j in range(max(0, i - WINDOW), min(len(ids), i + WINDOW + 1)):
                n[ids[i], ids[j]] += i != j
    return n


def dense_ppmi(n):
    rows = n.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nan_to_num(np.maximum(0, np.log(n * n.sum() / np.outer(rows, rows))))


def test_counts_equal_a_loop_over_pairs(documents, counts):
    np.testing.assert_array_equal(cooccurrence(documents, 50, WINDOW).toarray(), counts)


def test_ppmi_equals_its_equation(documents, counts):
    got = ppmi(cooccurrence(documents, 50, WINDOW))
    np.testing.assert_allclose(got.toarray(), dense_ppmi(counts), atol=1e-12)
    assert got.data.min() > 0


@pytest.mark.parametrize(("weighting", "exponent"), [("ppmi", 0.5), ("ppmi", 0.0), ("counts", 1.0)])
def test_vectors_equal_a_dense_svd(documents, counts, weighting, exponent):
    config = SVDConfig(weighting, exponent)
    vectors = svd_vectors(documents, 50, WINDOW, 6, config).astype(np.float64)
    u, sigma, _ = np.linalg.svd(dense_ppmi(counts) if weighting == "ppmi" else counts)
    want = u[:, :6] * sigma[:6] ** exponent
    # The signs of singular vectors are arbitrary, so compare products; the randomized SVD is approximate.
    np.testing.assert_allclose(vectors @ vectors.T, want @ want.T, atol=1e-2 * abs(want @ want.T).max())
    assert not vectors[:4].any()  # never seen


def test_dimensions_beyond_the_rank_are_zeros():
    documents = Documents(np.array([0, 1, 0, 1], np.int32), np.array([0, 4]), np.array([0]))
    vectors = svd_vectors(documents, 5, 1, 4, SVDConfig(exponent=0.0))
    assert np.isfinite(vectors).all()
    assert np.linalg.matrix_rank(vectors, tol=1e-3) == 2


def test_window_beyond_the_longest_document_counts_all_pairs(documents):
    beyond = cooccurrence(documents, 50, 10**9)
    longest = int(documents.lengths.max())
    assert abs(beyond - cooccurrence(documents, 50, longest - 1)).nnz == 0
    assert abs(beyond - cooccurrence(documents, 50, longest - 2)).nnz > 0  # the farthest pair counts
    assert beyond.sum() == (documents.lengths * (documents.lengths - 1)).sum()


@pytest.mark.parametrize("exponent", [200.0, 1e300])
def test_overflowing_exponent_is_an_error(documents, exponent):
    with pytest.raises(InputError, match=r"exponent .* gives vectors of infinite or zero length"):
        svd_vectors(documents, 50, WINDOW, 6, SVDConfig(exponent=exponent))


@pytest.mark.parametrize("weighting", ["ppmi", "counts"])
def test_texts_of_one_token_are_an_error(weighting):
    alone = Documents(np.array([4, 5, 6, 4], np.int32), np.arange(5), np.zeros(4, np.int32))
    with pytest.raises(InputError, match="no two tokens occur together"):
        svd_vectors(alone, 8, WINDOW, 2, SVDConfig(weighting))


def test_dimensions_beyond_the_vocabulary_are_zeros(documents):
    most, more = (svd_vectors(documents, 50, WINDOW, f, SVDConfig()) for f in (49, 60))
    np.testing.assert_array_equal(more[:, :49], most)
    assert more.shape == (50, 60) and not more[:, 49:].any()
