"""Strict promotion everywhere, a cache of its own for every test, and the small fixtures."""

import contextlib
import io
import os
import resource
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# Tests compile much and compute little. Before JAX is imported, and for subprocesses too.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_backend_optimization_level=0"
if version("jaxlib").startswith(
    "0.10."
):  # whose emitters take most of compilation; later ones know no such flag
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
if "PYTEST_XDIST_WORKER" not in os.environ:  # a place for what a run's processes compile
    _programs = tempfile.TemporaryDirectory(prefix="elmo_jax_programs")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
else:  # each worker its own: what another writes could be read half written
    os.environ["JAX_COMPILATION_CACHE_DIR"] += os.sep + os.environ["PYTEST_XDIST_WORKER"]

import jax
import numpy as np
import pytest
import tiny
from lines import LINES

from elmo_jax.data.batching import Documents
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Elmo
from elmo_jax.models.bilm import BiLM, BiLMConfig
from elmo_jax.training.objectives import init_params
from experiments import pretrain

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def x64():
    """Double precision inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def standard_promotion():
    """Optax mixes dtypes on purpose; so does a test that trains."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def documents(rng) -> Documents:
    """Forty documents of 1 to 30 tokens of a vocabulary of 50, in 3 classes."""
    lengths = rng.integers(1, 31, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(4, 50, offsets[-1]).astype(np.int32)
    return Documents(ids, offsets, (np.arange(40) % 3).astype(np.int32))


@pytest.fixture
def refused(monkeypatch, capsys):
    """Return a check that a command ends with a one-line error, exit code 2 and bounded memory."""
    in_use = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # noqa: E731

    def check(main, args, message):
        before = in_use()
        code, err = tiny.call(main, monkeypatch, *args), capsys.readouterr().err
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1, err[:2000]
        assert message in err and len(err) < 1000, err[:2000]
        assert in_use() - before < 1.5e9  # for inputs of up to 50 MB

    return check


@pytest.fixture
def corpus(tmp_path) -> Path:
    """Return the folder of a data set with two classes."""
    tiny.write_corpus(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> tuple[Path, str]:
    """Return a finished run on a tiny data set, which tests copy, and the output of the command."""
    folder, output = tmp_path_factory.mktemp("trained"), io.StringIO()
    tiny.write_corpus(folder / "data")
    flags = ["--dataset", folder / "data", "--output", folder / "lm", *tiny.TINY]
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        with contextlib.redirect_stdout(output):
            assert tiny.call(pretrain.main, patch, *flags) == 0
    return folder / "lm", output.getvalue()


@pytest.fixture
def pretrained(trained, tmp_path) -> Path:
    """The run."""
    return Path(shutil.copytree(trained[0], tmp_path / "lm"))


@pytest.fixture
def ag_news() -> Path:
    """The folder of AG News, if the environment names one."""
    root = os.environ.get("ELMO_JAX_TEST_DATA")
    if not root:
        pytest.skip("ELMO_JAX_TEST_DATA is not set")
    return Path(root) / "ag_news"


@pytest.fixture(scope="session")
def elmo() -> Elmo:
    """A language model of a few words, cells apart in number from the width of its states."""
    vocabulary = Vocabulary.from_counts({"the": 3, "bank": 2, "river": 1, ".": 1})
    model = BiLM(BiLMConfig(embedding=4, cells=5), len(vocabulary))
    return Elmo(model, init_params(model, jax.random.key(0)), vocabulary)


@pytest.fixture
def text(tmp_path) -> Path:
    """A text file of `LINES`."""
    path = tmp_path / "in.txt"
    path.write_text("\n".join(LINES) + "\n")
    return path
