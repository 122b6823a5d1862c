import numpy as np
import pytest

from experiments.compare.results import paired_bootstrap


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
