"""What experiments.vectors does with flags that are in bounds and yet too large or too small."""

import numpy as np
import pytest

from elmo_jax.baselines.word_vectors import WordVectors
from experiments import vectors

pytestmark = pytest.mark.usefixtures("standard_promotion")
ANEW = "lower --rate, and begin anew with --overwrite"


@pytest.fixture
def begin(tmp_path):
    """A data set of two short texts and what goes before a test's own flags."""
    for part in ("train", "test"):
        rows = [f"{label},the {word} of the {word}" for label in "sb" for word in ("goal", "rate", "bank")]
        (tmp_path / f"{part}.csv").write_text("\n".join(rows))
    return ["--dataset", tmp_path, "--min-count", "1", "--dimensions", "3", "--output", tmp_path / "run"]


@pytest.mark.parametrize("epochs", [3, 9])
def test_a_rate_that_skips_every_step_ends_in_one_line(begin, tmp_path, refused, epochs, monkeypatch):
    monkeypatch.setattr("elmo_jax.baselines.sgns._MOST", 1e40)  # without this bound a rate can diverge
    refused(vectors.main, [*begin, "--subsample", "1", "--rate", "1e30", "--epochs", epochs], ANEW)
    assert not (tmp_path / "run" / "vectors.npz").exists()


REFUSED = {
    "nearly no share": (
        ["--subsample", "1e-320"],
        "no epoch held two neighbouring tokens; raise",
    ),
    "a power that overflows": (["--method", "svd", "--exponent", "1e6"], "exponent 1e+06 gives vectors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_vectors_of_no_use_are_not_saved(name, begin, tmp_path, refused):
    args, said = REFUSED[name]
    refused(vectors.main, [*begin, *args], said)
    assert not (tmp_path / "run" / "vectors.npz").exists()


@pytest.mark.parametrize("method", ["svd", "sgns"])
def test_a_window_beyond_every_text_is_no_trouble(begin, tmp_path, monkeypatch, method):
    args = ["--method", method, "--window", 2**31 - 1]
    args += ["--subsample", "1", "--epochs", "200"] if method == "sgns" else []
    monkeypatch.setattr("sys.argv", ["prog", *map(str, [*begin, *args])])
    assert vectors.main() == 0
    made = WordVectors.load(tmp_path / "run" / "vectors.npz").matrix
    assert np.abs(made).max() > 0.5 / 3  # beyond where SGNS begins
