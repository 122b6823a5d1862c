"""Tests of the vectors command with flags in bounds that are still too large or too small."""

import numpy as np
import pytest

from elmo_jax.baselines.word_vectors import WordVectors
from experiments import vectors

pytestmark = pytest.mark.usefixtures("standard_promotion")
ANEW = "lower --rate and start again with --overwrite"


@pytest.fixture
def flags(tmp_path):
    """Flags for a data set of short texts."""
    for part in ("train", "test"):
        rows = [f"{label},the {word} of the {word}" for label in "sb" for word in ("goal", "rate", "bank")]
        (tmp_path / f"{part}.csv").write_text("\n".join(rows))
    return ["--dataset", tmp_path, "--min-count", "1", "--dimensions", "3", "--output", tmp_path / "run"]


def test_a_rate_that_makes_every_step_diverge_is_refused(flags, tmp_path, refused, monkeypatch):
    # Without this bound a high rate diverges.
    monkeypatch.setattr("elmo_jax.baselines.sgns._MAX_ROW_UPDATE", 1e40)
    refused(vectors.main, [*flags, "--subsample", "1", "--rate", "1e30", "--epochs", "3"], ANEW)
    assert not (tmp_path / "run" / "vectors.npz").exists()


REFUSED = {
    "nearly no tokens": (
        ["--subsample", "1e-320"],
        "subsampling left no pair of neighbouring tokens",
    ),
    "a power that overflows": (["--method", "svd", "--exponent", "1e6"], "exponent 1e+06 gives vectors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_useless_vectors_are_refused(name, flags, tmp_path, refused):
    args, said = REFUSED[name]
    refused(vectors.main, [*flags, *args], said)
    assert not (tmp_path / "run" / "vectors.npz").exists()


@pytest.mark.parametrize("method", ["svd", "sgns"])
def test_a_window_longer_than_every_text_works(flags, tmp_path, monkeypatch, method):
    args = ["--method", method, "--window", 2**31 - 1]
    args += ["--subsample", "1", "--epochs", "40", "--rate", "1"] if method == "sgns" else []
    monkeypatch.setattr("sys.argv", ["prog", *map(str, [*flags, *args])])
    assert vectors.main() == 0
    made = WordVectors.load(tmp_path / "run" / "vectors.npz").matrix
    assert np.abs(made).max() > 0.5 / 3  # beyond where SGNS begins
