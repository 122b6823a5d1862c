"""Word vectors from a truncated SVD of weighted co-occurrence counts."""

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from elmo_jax.config import SVDConfig
from elmo_jax.data.batching import Documents
from elmo_jax.errors import InputError


def cooccurrence(documents: Documents, size: int, window: int) -> sparse.csr_matrix:
    """Count the pairs of tokens at most `window` positions apart in the same document.

    Args:
        documents: Token ids in [0, size).
        size: Size of the vocabulary, V.
        window: Maximum distance.

    Returns:
        Symmetric counts ``[V, V]`` float64.

    Examples:
        >>> documents = Documents(np.array([0, 1, 2]), np.array([0, 3]), np.array([0]))
        >>> cooccurrence(documents, 3, window=1).toarray().tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    ids = documents.ids
    document = np.repeat(np.arange(len(documents)), documents.lengths)
    counts = sparse.csr_matrix((size, size), dtype=np.float64)
    for distance in range(1, min(window + 1, documents.lengths.max(initial=0))):
        same = document[:-distance] == document[distance:]
        pairs = ids[:-distance][same], ids[distance:][same]
        ones = np.ones(len(pairs[0]))
        counts += sparse.coo_matrix((ones, pairs), shape=(size, size)).tocsr()
    return sparse.csr_matrix(counts + counts.T)


def ppmi(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return positive pointwise mutual information, max(0, log(n_ij n / (n_i n_j))).

    n_i is the sum of row i and n the sum of all counts.

    Args:
        counts: Symmetric n_ij, ``[V, V]``.

    Returns:
        ``[V, V]``, entries that are 0 left out.

    Examples:
        >>> ppmi(sparse.csr_matrix([[0.0, 2.0], [2.0, 0.0]])).toarray().round(3).tolist()
        [[0.0, 0.693], [0.693, 0.0]]
    """
    sums = np.asarray(counts.sum(1)).ravel()
    entries = counts.tocoo()
    pmi = np.log(entries.data * sums.sum() / (sums[entries.row] * sums[entries.col]))
    positive = sparse.csr_matrix((np.maximum(pmi, 0), (entries.row, entries.col)), shape=counts.shape)
    positive.eliminate_zeros()
    return positive


def svd_vectors(
    documents: Documents, size: int, window: int, dimensions: int, config: SVDConfig, seed: int = 0
) -> np.ndarray:
    """Return U_F Σ_F^p of the weighted co-occurrence matrix U Σ V^T (Levy et al. 2015).

    Args:
        documents: Token ids in [0, size).
        size: Size of the vocabulary, V.
        window: Maximum distance of a counted pair.
        dimensions: Number of features of a vector, F.
        config: Weighting and exponent p.
        seed: Random seed of the randomized SVD.

    Returns:
        float32 ``[V, F]``. Tokens without pairs and dimensions beyond V - 1 are zeros.

    Raises:
        InputError: No pair has a positive weight, or the vectors overflow or vanish with this exponent.

    Examples:
        >>> documents = Documents(np.array([0, 1, 2, 1]), np.array([0, 4]), np.array([0]))
        >>> svd_vectors(documents, 3, window=1, dimensions=2, config=SVDConfig()).shape
        (3, 2)
    """
    matrix = cooccurrence(documents, size, window)
    if config.weighting == "ppmi":
        matrix = ppmi(matrix)
    if not matrix.nnz:
        raise InputError("no two tokens occur together more often than by chance; use longer texts")
    svd = TruncatedSVD(min(dimensions, size - 1), random_state=seed)
    scaled = svd.fit_transform(matrix.astype(np.float32))  # U Σ
    sigma = svd.singular_values_
    is_nonzero = sigma > 1e-6 * sigma[0]  # singular vectors beyond the rank of the matrix are noise
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.where(is_nonzero, np.where(is_nonzero, sigma, 1.0) ** (config.exponent - 1), 0.0)
        vectors = (scaled * scale).astype(np.float32)
        norms = np.linalg.norm(vectors, axis=1)
    if not np.isfinite(norms).all() or not norms.any():
        raise InputError(f"exponent {config.exponent:g} gives vectors of infinite or zero length; lower it")
    return np.pad(vectors, ((0, 0), (0, dimensions - vectors.shape[1])))
