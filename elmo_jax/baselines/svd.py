"""Word vectors by counting: co-occurrence in a window, its weighting, and a truncated SVD.

Axes: V tokens of the vocabulary, F dimensions kept.
"""

import numpy as np
from scipy import sparse
from sklearn.decomposition import TruncatedSVD

from elmo_jax.config import SVDConfig
from elmo_jax.data.batching import Documents
from elmo_jax.errors import InputError


def cooccurrence(documents: Documents, size: int, window: int) -> sparse.csr_matrix:
    """How often two tokens stand at most `window` apart in one document.

    Args:
        documents: token ids.
        size: V.
        window: steps to either side.

    Returns:
        Symmetric counts ``[V, V]`` float64.

    Example:
        >>> documents = Documents(np.array([0, 1, 2]), np.array([0, 3]), np.array([0]))
        >>> cooccurrence(documents, 3, window=1).toarray().tolist()
        [[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    ids = documents.ids
    owner = np.repeat(np.arange(len(documents)), documents.lengths)
    counts = sparse.csr_matrix((size, size), dtype=np.float64)
    for distance in range(1, min(window + 1, documents.lengths.max(initial=0))):
        together = owner[:-distance] == owner[distance:]
        pairs = ids[:-distance][together], ids[distance:][together]
        ones = np.ones(len(pairs[0]))
        counts += sparse.coo_matrix((ones, pairs), shape=(size, size)).tocsr()
    return sparse.csr_matrix(counts + counts.T)


def ppmi(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """max(0, log(n_ij n / (n_i n_j))), where n_i and n are the sums of row i and of all.

    Args:
        counts: symmetric ``[V, V]``.

    Returns:
        ``[V, V]``, without the entries that are 0.
    """
    rows = np.asarray(counts.sum(1)).ravel()
    entries = counts.tocoo()
    pmi = np.log(entries.data * rows.sum() / (rows[entries.row] * rows[entries.col]))
    cells = np.maximum(pmi, 0), (entries.row, entries.col)
    weighted = sparse.csr_matrix(cells, shape=counts.shape)
    weighted.eliminate_zeros()
    return weighted


def svd_vectors(
    documents: Documents, size: int, window: int, dimensions: int, config: SVDConfig, seed: int = 0
) -> np.ndarray:
    """U_F Σ_F^p of the weighted co-occurrence matrix U Σ V^T (Levy et al. 2015).

    Args:
        documents: token ids in [0, size).
        size: V.
        window: steps to either side.
        dimensions: F.
        config: weighting and p.
        seed: of the randomised decomposition.

    Returns:
        float32 ``[V, F]``; a token that was never seen has a vector of zeros, and so has what is
        beyond the V - 1 dimensions of so few tokens.

    Raises:
        InputError: the vectors would be of no use: of infinite length, or all 0.

    Example:
        >>> documents = Documents(np.array([0, 1, 2, 1]), np.array([0, 4]), np.array([0]))
        >>> svd_vectors(documents, 3, window=1, dimensions=2, config=SVDConfig()).shape
        (3, 2)
    """
    matrix = cooccurrence(documents, size, window)
    if config.weighting == "ppmi":
        matrix = ppmi(matrix)
    if not matrix.nnz:
        raise InputError("no two tokens stand together, or none more often than by chance; give longer texts")
    svd = TruncatedSVD(min(dimensions, size - 1), random_state=seed)
    scaled = svd.fit_transform(matrix.astype(np.float32))  # U Σ
    sigma = svd.singular_values_
    kept = sigma > 1e-6 * sigma[0]  # a matrix of lower rank has no further directions
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.where(kept, np.where(kept, sigma, 1.0) ** (config.exponent - 1), 0.0)
        vectors = (scaled * scale).astype(np.float32)
        lengths = np.linalg.norm(vectors, axis=1)  # by which the vectors are compared
    if not np.isfinite(lengths).all() or not lengths.any():
        raise InputError(
            f"--exponent {config.exponent:g} makes vectors of infinite length, or of 0; lower it"
        )
    return np.pad(vectors, ((0, 0), (0, dimensions - vectors.shape[1])))
