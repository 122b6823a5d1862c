"""The official format against a float64 implementation of its definition, and bilm-tf's own fixture."""

import gzip
import json
import os
import shutil
from pathlib import Path

import h5py
import jax
import numpy as np
import pytest
from official import make
from reference import official

from elmo_jax.config import CASED, TextConfig
from elmo_jax.data.batching import Batch
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM, BiLMConfig

SENTENCES = [["The", "bank", "rose", "."], ["naïve", "<UNK>"], [], ["x" * 60, "The", "ﬂood"] * 3]


def read(path) -> dict:
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda n, d: found.update({n: d[...]}) if isinstance(d, h5py.Dataset) else None)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"skip": False, "activation": "tanh", "highway": 1},
        {"cells": 13, "embedding": 13, "layers": 3, "projection_clip": None},  # no projection of either kind
    ],
    ids=["projected", "tanh", "equal widths"],
)
def test_embeddings_equal_the_definition(tmp_path, changes):
    elmo = make(tmp_path, **changes)
    options, file = json.loads((tmp_path / "options.json").read_text()), read(tmp_path / "weights.hdf5")
    assert (options["lstm"]["dim"] == options["lstm"]["projection_dim"]) == ("CNN_proj/W_proj" not in file)
    for sentence, got in zip(SENTENCES, elmo.embed(SENTENCES), strict=True):
        want, _ = official(options, file, sentence)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_stateful_embeddings_equal_the_definition(tmp_path):
    elmo = make(tmp_path)
    options, file = json.loads((tmp_path / "options.json").read_text()), read(tmp_path / "weights.hdf5")
    states = [None] * 4
    for batch in (SENTENCES, SENTENCES[:2], SENTENCES[::-1]):
        for k, got in enumerate(elmo.embed(batch, stateful=True)):
            want, states[k] = official(options, file, batch[k], states[k])
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
    fresh = elmo.embed(SENTENCES)
    elmo.reset_state()
    for a, b in zip(fresh, elmo.embed(SENTENCES, stateful=True), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_window_width_does_not_change_embeddings(tmp_path):
    elmo = make(tmp_path)
    expected = elmo.embed(SENTENCES)
    for window in (1, 2, 5):
        elmo._window = window
        for a, b in zip(expected, elmo.embed(SENTENCES), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_word_cache_does_not_change_embeddings(tmp_path):
    elmo = make(tmp_path)
    expected = elmo.embed(SENTENCES)
    small = Elmo.from_bilm(tmp_path / "options.json", tmp_path / "weights.hdf5")
    small._words._capacity = 3
    for i in (3, 0, 1, 3):
        np.testing.assert_allclose(small.embed([SENTENCES[i]])[0], expected[i], atol=1e-6)


def test_import_then_export_is_identity(tmp_path):
    elmo = make(tmp_path)
    back = Elmo.from_bilm(tmp_path / "options.json", tmp_path / "weights.hdf5")
    jax.tree.map(np.testing.assert_array_equal, back.params, elmo.params)
    (tmp_path / "again").mkdir()
    back.save_bilm(tmp_path / "again/options.json", tmp_path / "again/weights.hdf5")
    before, after = read(tmp_path / "weights.hdf5"), read(tmp_path / "again/weights.hdf5")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    assert (tmp_path / "options.json").read_text() == (tmp_path / "again/options.json").read_text()


def test_kernels_agree_or_are_refused(tmp_path):
    elmo = make(tmp_path)
    plain = Elmo.from_bilm(tmp_path / "options.json", tmp_path / "weights.hdf5", kernel="plain")
    assert plain.model.kernel == "plain"
    for a, b in zip(plain.embed(SENTENCES), elmo.embed(SENTENCES), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    with pytest.raises(InputError, match=r"kernel .persistent. cannot run this layer"):  # it has a projection
        Elmo.from_bilm(tmp_path / "options.json", tmp_path / "weights.hdf5", kernel="persistent")


def test_softmax_is_saved_beside_the_weights(tmp_path):
    vocabulary = Vocabulary.from_counts({"bank": 2, "ﬂood": 1})
    elmo = make(tmp_path, vocabulary=vocabulary)
    assert "softmax" not in " ".join(read(tmp_path / "weights.hdf5"))
    back = Elmo.from_bilm(tmp_path / "options.json", tmp_path / "weights.hdf5")
    assert back.vocabulary == vocabulary
    np.testing.assert_array_equal(back.params["softmax_table"], elmo.params["softmax_table"])
    np.testing.assert_array_equal(back.params["softmax_bias"], elmo.params["softmax_bias"])
    make(tmp_path)  # without a softmax, at the same paths
    assert Elmo.from_bilm(tmp_path / "options.json", tmp_path / "weights.hdf5").vocabulary is None


def test_character_model_is_saved_in_a_folder_too(tmp_path):
    elmo = make(tmp_path)
    elmo.save_pretrained(tmp_path / "out")
    back = Elmo.from_pretrained(tmp_path / "out")
    assert back.model.config == elmo.model.config and back.vocabulary is None
    np.testing.assert_array_equal(back.embed(SENTENCES)[0], elmo.embed(SENTENCES)[0])


def test_official_models_are_cased_and_others_keep_their_preparation(tmp_path):
    make(tmp_path)
    official = Elmo.from_bilm(tmp_path / "options.json", tmp_path / "weights.hdf5")
    assert official.text == CASED
    texts = ["Apple sued IBM", "apple sued ibm"]
    a, b = official.encode(texts)
    assert np.abs(a - b).max() > 1e-3
    official.save_bilm(tmp_path / "o.json", tmp_path / "w.hdf5")
    assert "text" not in json.loads((tmp_path / "o.json").read_text())
    lower = Elmo(official.model, official.params, official.vocabulary)
    lower.save_bilm(tmp_path / "o.json", tmp_path / "w.hdf5")
    again = Elmo.from_bilm(tmp_path / "o.json", tmp_path / "w.hdf5")
    assert again.text == TextConfig()
    a, b = again.encode(texts)
    np.testing.assert_array_equal(a, b)


def test_gzipped_files_and_261_characters_load(tmp_path):
    elmo = make(tmp_path)
    options = json.loads((tmp_path / "options.json").read_text())
    options["char_cnn"]["n_characters"] = 261
    (tmp_path / "o.json.gz").write_bytes(gzip.compress(json.dumps(options).encode()))
    (tmp_path / "w.hdf5.gz").write_bytes(gzip.compress((tmp_path / "weights.hdf5").read_bytes()))
    back = Elmo.from_bilm(tmp_path / "o.json.gz", tmp_path / "w.hdf5.gz")
    np.testing.assert_array_equal(back.embed(SENTENCES)[0], elmo.embed(SENTENCES)[0])


def test_projection_between_equal_widths_is_kept(tmp_path):
    elmo = make(tmp_path, cells=5, embedding=5, project_cells=True)
    assert "RNN_1/RNN/MultiRNNCell/Cell1/LSTMCell/W_P_0" in read(tmp_path / "weights.hdf5")
    back = Elmo.from_bilm(tmp_path / "options.json", tmp_path / "weights.hdf5")
    np.testing.assert_array_equal(back.embed(SENTENCES)[3], elmo.embed(SENTENCES)[3])


def test_bad_file_names_are_refused(tmp_path):
    elmo = make(tmp_path)
    before = (tmp_path / "weights.hdf5").read_bytes()
    with pytest.raises(InputError, match=r"weights\.hdf5: options and weights are two files"):
        elmo.save_bilm(tmp_path / "weights.hdf5", str(tmp_path / "." / "weights.hdf5"))
    with pytest.raises(InputError, match=r"o\.json\.gz: files are written uncompressed"):
        elmo.save_bilm(tmp_path / "o.json.gz", tmp_path / "weights.hdf5")
    assert (tmp_path / "weights.hdf5").read_bytes() == before


def test_model_of_words_is_refused(tmp_path):
    vocabulary = Vocabulary.from_counts({"bank": 2})
    model = BiLM(BiLMConfig(embedding=3, cells=3), len(vocabulary))
    params = model.init(jax.random.key(0), Batch.of([[4]]))["params"]
    with pytest.raises(InputError, match="cannot hold a model that reads words"):
        Elmo(model, params, vocabulary).save_bilm(tmp_path / "o.json", tmp_path / "w.hdf5")
    assert not any(tmp_path.iterdir())


def edit_options(key, value):
    def edit(folder):
        options = json.loads((folder / "options.json").read_text())
        *path, last = key.split(".")
        inner = options
        for name in path:
            inner = inner[name]
        if value is None:
            del inner[last]
        else:
            inner[last] = value
        (folder / "options.json").write_text(json.dumps(options))

    return edit


def edit_weights(action):
    def edit(folder):
        with h5py.File(folder / "weights.hdf5", "r+") as file:
            action(file)

    return edit


def _set(file, name, value):
    del file[name]
    file[name] = value


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edit_options("char_cnn", None), "missing required field `char_cnn`"),
        (edit_options("char_cnn.n_characters", 300), "<= 262 - at .*n_characters"),
        (edit_options("char_cnn.activation", "gelu"), "Invalid enum value 'gelu' - at .*activation"),
        (edit_options("char_cnn.filters", [[1, "x"]]), r"Expected `int`, got `str` - at .*filters\[0\]\[1\]"),
        (edit_options("char_cnn.filters", []), "length >= 1 - at .*filters"),
        (edit_options("char_cnn.max_characters_per_token", 40), ">= 50 - at .*max_characters_per_token"),
        (edit_options("lstm.dim", None), "missing required field `dim` - at .*lstm"),
        (
            edit_options("lstm.dim", 8),
            r"weights\.hdf5: dataset .* is float32 \(10, 28\), expected float \(10, 32\)",
        ),
        (edit_options("lstm.n_layers", 10**9), "<= 64 - at .*n_layers"),
        (edit_options("lstm.n_layers", 3), r"weights\.hdf5: has no dataset RNN_0"),
        (edit_options("lstm.cell_clip", "3"), "got `str` - at .*cell_clip"),
        (edit_options("lstm.use_skip_connections", 1), "got `int` - at .*use_skip_connections"),
        (lambda f: (f / "options.json").write_text("{"), "Input data was truncated"),
        (lambda f: (f / "options.json").write_text("[]"), "Expected `object`, got `array`"),
        (lambda f: (f / "options.json").unlink(), r"options\.json: cannot be read"),
        (lambda f: (f / "weights.hdf5").unlink(), r"weights\.hdf5: cannot be read"),
        (lambda f: (f / "weights.hdf5").write_bytes(b"not HDF5"), "cannot be read as HDF5"),
        (lambda f: os.truncate(f / "weights.hdf5", 6000), "cannot be read as HDF5"),
        (edit_weights(lambda f: f.create_dataset("more", data=[1.0])), "has an unknown dataset more"),
        (edit_weights(lambda f: f.pop("char_embed")), "has no dataset char_embed"),
        (edit_weights(lambda f: _set(f, "CNN/b_cnn_0", np.full(3, np.nan, "f"))), "not finite"),
        (edit_weights(lambda f: _set(f, "CNN/b_cnn_0", np.ones(3, "i"))), "is int32"),
    ],
)
def test_wrong_file_is_refused_in_one_line(tmp_path, edit, message):
    make(tmp_path)
    edit(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        Elmo.from_bilm(tmp_path / "options.json", tmp_path / "weights.hdf5")
    assert "\n" not in str(error.value)


@pytest.fixture
def fixture(tmp_path):
    root = os.environ.get("ELMO_JAX_TEST_DATA")
    if not root:
        pytest.skip("ELMO_JAX_TEST_DATA is not set")
    return Path(root) / "bilm_fixture"


def test_embeddings_equal_the_bilm_tf_fixture(fixture, tmp_path):
    elmo = Elmo.from_bilm(fixture / "options.json", fixture / "lm_weights.hdf5")
    lists = json.loads((fixture / "lm_embeddings_sentences.json").read_text())
    want = [read(fixture / f"lm_embeddings_{k}.hdf5") for k in range(len(lists))]
    for i in range(len(lists[0])):
        for k, layers in enumerate(elmo.embed([part[i].split() for part in lists], stateful=True)):
            halves = np.stack(np.split(layers[-1], 2, axis=-1))
            np.testing.assert_allclose(halves, want[k][str(i)], rtol=1e-5, atol=2e-6)
    shutil.copy(fixture / "options.json", tmp_path)
    elmo.save_bilm(tmp_path / "o.json", tmp_path / "w.hdf5")
    before, after = read(fixture / "lm_weights.hdf5"), read(tmp_path / "w.hdf5")
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "o.json").read_text()) == json.loads((fixture / "options.json").read_text())
