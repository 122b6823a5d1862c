"""Arbitrary bytes give a valid value or an InputError, and loading cannot run code."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from exported import WEIGHTS, WORDS, seal, weights
from hypothesis import HealthCheck, given, settings, strategies as st
from official import make

from elmo_jax.config import DataConfig
from elmo_jax.data.csv_dataset import read_csv
from elmo_jax.data.text import Vocabulary, clean, tokenize
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.pretrained.folder import VOCABULARY

FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_fuzzed_vocabulary(tmp_path, data):
    (tmp_path / "v").write_bytes(data)
    try:
        vocabulary = Vocabulary.load(tmp_path / "v")
    except InputError:
        return
    assert vocabulary.ids(vocabulary.tokens[1:]).tolist() == list(range(1, len(vocabulary)))


@FUZZ
@given(data=st.binary(max_size=200) | st.text("ab,\"'\n\r\0é ", max_size=60).map(str.encode))
def test_fuzzed_csv_file(tmp_path, data):
    (tmp_path / "f.csv").write_bytes(data)
    try:
        texts = read_csv(tmp_path / "f.csv", DataConfig())
    except InputError:
        return
    assert len(texts.labels) == len(texts.lines) == len(texts.offsets) - 1
    again = read_csv(tmp_path / "f.csv", DataConfig())  # from the cache
    assert again.header == texts.header and (again.tokens, again.labels) == (texts.tokens, texts.labels)
    np.testing.assert_array_equal(again.codes, texts.codes)


@FUZZ
@given(data=st.binary(max_size=300), at=st.integers(0, 10_000), cut=st.integers(0, 10_000))
def test_fuzzed_weights(tmp_path_factory, data, at, cut):
    folder = tmp_path_factory.mktemp("e")
    valid = weights()
    at, cut = at % len(valid), cut % len(valid)
    raw = valid[:at] + data + valid[at + cut :]
    (folder / WEIGHTS).write_bytes(raw)
    (folder / VOCABULARY).write_text(WORDS.text)
    seal(folder)
    try:
        elmo = Elmo.from_pretrained(folder)
    except InputError:
        return
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(elmo.params))


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Files of a model in the official format, with its softmax."""
    folder = tmp_path_factory.mktemp("official")
    make(folder, vocabulary=WORDS)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@FUZZ
@given(
    name=st.sampled_from(["weights.hdf5", "weights.softmax.hdf5"]),
    data=st.binary(max_size=300),
    at=st.integers(0, 100_000),
    cut=st.integers(0, 300),
)
def test_fuzzed_official_weights(official, tmp_path_factory, name, data, at, cut):
    folder = tmp_path_factory.mktemp("h")
    for file, valid in official.items():
        at %= len(valid)
        raw = valid if file != name else valid[:at] + data + valid[at + cut :]
        (folder / file).write_bytes(raw)
    try:
        elmo = Elmo.from_bilm(folder / "options.json", folder / "weights.hdf5")
    except InputError:
        return
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(elmo.params))


@FUZZ
@given(text=st.text(st.characters(), max_size=200) | st.text("a1_é\u0301<>&#;\\ \n\t\0", max_size=60))
def test_fuzzed_text(text):
    tokens = tokenize(text)
    assert all(token and not any(c.isspace() for c in token) for token in tokens)
    # Only white space and what `clean` removes is lost, and tokens are stable.
    assert "".join(tokens) == "".join(text.lower().split())
    assert "".join(tokenize(text, clean=True)) == "".join(clean(text).lower().split())
    assert tokenize(" ".join(tokens)) == tokens


def test_no_code_that_could_run_loaded_data():
    """No pickle, eval, exec or shell; np.load refuses pickles."""
    root = Path(__file__).parent.parent
    for path in [*(root / "elmo_jax").rglob("*.py"), *(root / "experiments").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
                assert "subprocess" not in names or path.parent.name == "benchmark"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert "shell" not in {keyword.arg for keyword in node.keywords}
                assert called not in {"eval", "exec", "compile", "os.system", "os.popen", "__import__"}
                if called in {"np.load", "numpy.load"}:
                    assert "allow_pickle=False" in ast.unparse(node)
