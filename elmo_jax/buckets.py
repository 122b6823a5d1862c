"""Where to cut documents into buckets by length."""

import numpy as np

ROUND = 4  # bounds are multiples of it, the longest too
_PRICE = 20_000  # steps an epoch that another bucket must save to be worth its compilation


def filled_batches(documents: np.ndarray, batch_size: int) -> np.ndarray:
    """How many batches the documents up to each bucket fill, if what is left joins the next bucket.

    Args:
        documents: rising, how many there are up to each bucket.
        batch_size: rows a batch.

    Returns:
        Batches up to each bucket; with the last document one more, if it is to be part-filled.

    Example:
        >>> filled_batches(np.array([3, 6, 9, 9]), batch_size=4)
        array([0, 1, 3, 3])
    """
    return np.where(documents < documents[-1], documents, documents[-1] + batch_size - 1) // batch_size


def bucket_bounds(lengths: np.ndarray, batch_size: int = 1, most: int = 12) -> tuple[int, ...]:
    """Where to cut documents into buckets so that steps are fewest, and compilations few.

    Steps are those of all rows of an epoch, as `filled_batches` has them. Each bucket is a shape to
    compile, which counts as much as 20,000 steps. The bounds are the best there are of their
    number, by dynamic programming.

    Args:
        lengths: ``[N]`` steps a document, at least one.
        batch_size: rows a batch.
        most: how many bounds at the most.

    Returns:
        Bounds, rising multiples of 4; the last holds the longest document.

    Example:
        >>> bucket_bounds(np.repeat([3, 4, 20], [9000, 9000, 9000]))
        (4, 20)
    """
    counts = np.bincount(-(-lengths // ROUND))
    bound = np.flatnonzero(counts)  # candidates, in units of ROUND
    below = np.concatenate([[0], np.cumsum(counts[bound])])  # documents up to each
    # span[j, i]: steps of one bucket from candidate i up to j; costs[k][j]: fewest steps of the
    # documents up to candidate j in k + 1 buckets, the last of which begins at cuts[k][j].
    filled = filled_batches(below, batch_size)
    span = (filled[1:, None] - filled[None, :-1]) * (batch_size * bound[:, None] * float(ROUND))
    span = np.where(np.tri(len(bound), dtype=bool), span, np.inf)
    costs, cuts = [span[:, 0]], [np.zeros(len(bound), int)]
    for _ in range(1, min(most, len(bound))):
        total = np.concatenate([[np.inf], costs[-1][:-1]])[None] + span
        costs.append(total.min(1))
        cuts.append(total.argmin(1))
    buckets = int(np.argmin([cost[-1] + _PRICE * k for k, cost in enumerate(costs)]))
    chosen, j = [], len(bound) - 1
    for k in range(buckets, -1, -1):
        chosen.append(int(bound[j]) * ROUND)
        j = int(cuts[k][j]) - 1
    return tuple(reversed(chosen))
