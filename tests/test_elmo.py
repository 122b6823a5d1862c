"""Embeddings and surprisal of a small model, and its export."""

import jax
import numpy as np
import pytest
from official import make
from reference import bilm

from elmo_jax.config import TextConfig
from elmo_jax.data.batching import Batch
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.storage.files import read_config, write_config
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.objectives import bilm_sums

SENTENCES = [["the", "bank", "rose", "."], ["bank"], [], ["the", "river", "bank", "of", "the", "river"] * 4]


def test_layers_equal_the_model_without_bos_and_eos(elmo):
    states = jax.jit(elmo.model.apply)
    for sentence, layers in zip(SENTENCES, elmo.embed(SENTENCES), strict=True):
        assert layers.shape == (3, len(sentence), 8)
        assert layers.dtype == np.float32
        batch = Batch.of([elmo.vocabulary.ids(sentence)], shape=(1, 26))
        want = states({"params": elmo.params}, batch)[0][:, 0, 1 : len(sentence) + 1]
        np.testing.assert_allclose(layers, want, atol=1e-6)


def test_batching_and_order_do_not_change_embeddings(elmo):
    together = elmo.embed(SENTENCES)
    backwards = elmo.embed(SENTENCES[::-1], batch_tokens=20)[::-1]
    alone = [elmo.embed([sentence], batch_tokens=1)[0] for sentence in SENTENCES]
    for a, b, c, again in zip(together, backwards, alone, elmo.embed(SENTENCES), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        np.testing.assert_allclose(a, c, atol=1e-6)
        np.testing.assert_array_equal(a, again)


def test_batch_tokens_bound_the_rows_of_a_batch(elmo, monkeypatch):
    rows, contextualize = [], elmo._contextualize

    def count(params, x, *rest):
        rows.append(x.shape[1])
        return contextualize(params, x, *rest)

    monkeypatch.setattr(elmo, "_contextualize", count)
    elmo.embed(SENTENCES, batch_tokens=1)
    assert set(rows) == {1}
    rows.clear()
    elmo.embed(SENTENCES)
    assert rows == [4]


def test_surprisal_sums_to_the_training_loss(elmo):
    windows = Elmo(elmo.model, elmo.params, elmo.vocabulary)
    windows._window = 5
    sums = jax.jit(bilm_sums(elmo.model))
    for sentence, each, again in zip(
        SENTENCES, elmo.surprisal(SENTENCES), windows.surprisal(SENTENCES), strict=True
    ):
        assert each.shape == (2, len(sentence) + 1)
        np.testing.assert_allclose(each, again, rtol=1e-5)
        want = sums(elmo.params, Batch.of([elmo.vocabulary.ids(sentence)], shape=(1, 26)))
        np.testing.assert_allclose(each.sum(1), [want["nll_forward"], want["nll_backward"]], rtol=1e-5)
        np.testing.assert_allclose(
            bilm(elmo.params, ids(elmo, sentence))[1], [each[0], each[1, ::-1]], rtol=1e-4
        )


def ids(elmo, sentence):
    return np.array([1, *elmo.vocabulary.ids(sentence), 2])


def test_context_changes_the_upper_layers_only(elmo):
    river, money = elmo.embed([["river", "bank"], ["the", "bank"]])
    np.testing.assert_array_equal(river[0, 1], money[0, 1])
    assert np.abs(river[1:, 1] - money[1:, 1]).max() > 1e-4


def test_export_then_import_is_identity(elmo, tmp_path):
    elmo.save_pretrained(tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors", "vocab.txt"}
    back = Elmo.from_pretrained(tmp_path / "out")
    assert back.vocabulary == elmo.vocabulary
    jax.tree.map(np.testing.assert_array_equal, back.params, elmo.params)
    np.testing.assert_array_equal(back.embed(SENTENCES)[0], elmo.embed(SENTENCES)[0])


def test_run_is_not_overwritten_by_an_export(elmo, tmp_path):
    elmo.save_pretrained(tmp_path / "out")
    elmo.save_pretrained(tmp_path / "out")  # an export may be replaced
    Run.create(tmp_path / "run", {"model": {}}, monitor="perplexity").close()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()}
    with pytest.raises(InputError, match="run: holds a run that would be lost; give another folder"):
        elmo.save_pretrained(tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.is_file()} == before


def test_sentence_that_is_a_string_is_refused(elmo):
    with pytest.raises(InputError, match="sentence 1 is a string"):
        elmo.embed([["fine"], "not fine"])
    with pytest.raises(InputError, match="sentence 0 holds 3, which is not a string"):
        elmo.surprisal([["fine", 3]])


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("config.json", b"{", r"config\.json: cannot be read"),
        ("config.json", b"{}", r"config\.json: is not what was saved"),
        ("config.json", b"[]", r"config\.json: is not what was saved"),
        ("vocab.txt", b"<S>\n</S>\n<UNK>\n", r"vocab\.txt is not what was saved"),
        ("model.safetensors", b"\x00" * 20, r"model\.safetensors is not what was saved"),
    ],
)
def test_damaged_folder_is_refused(elmo, tmp_path, name, data, message):
    elmo.save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        Elmo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (None, "holds no language model"),
        ("a digest, as a classifier's run has", "holds no language model"),
        ({"width": 3}, "'width' is not known"),
        ({"cells": "five"}, r"Expected `int`, got `str`"),
        ({"embedding": 6, "cells": 5}, r"\[8, 4\], expected float32 \[8, 6\]"),
    ],
)
def test_folder_with_wrong_settings_is_refused(elmo, tmp_path, model, message):
    elmo.save_pretrained(tmp_path)
    config = read_config(tmp_path)
    write_config(tmp_path, {"model": model} if model else {}, config["files"])
    with pytest.raises(InputError, match=message):
        Elmo.from_pretrained(tmp_path)


def test_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        Elmo.from_pretrained(tmp_path / "none")


def test_text_config_is_saved_and_a_custom_tokenizer_is_not(elmo, tmp_path):
    cased = Elmo(elmo.model, elmo.params, elmo.vocabulary, TextConfig("whitespace", lowercase=False))
    cased.save_pretrained(tmp_path / "cased")
    assert Elmo.from_pretrained(tmp_path / "cased").tokenize("The bank.") == ["The", "bank."]
    custom = Elmo(elmo.model, elmo.params, elmo.vocabulary, tokenizer=lambda text: text.split("-"))
    expected = custom.encode([["the", "bank"]])
    np.testing.assert_array_equal(custom.encode(["the-bank"]), expected)
    custom.save_pretrained(tmp_path / "custom")
    again = Elmo.from_pretrained(tmp_path / "custom")
    np.testing.assert_array_equal(again.encode([["the", "bank"]]), expected)
    with pytest.raises(InputError, match="needs the `tokenizer` used in training; pass it"):
        again.encode(["the-bank"])
    given = Elmo.from_pretrained(tmp_path / "custom", tokenizer=lambda text: text.split("-"))
    np.testing.assert_array_equal(given.encode(["the-bank"]), expected)


def test_statistics_standardize_every_feature(elmo):
    sentences = [["the", "bank", "."], [], ["river"], ["the", "river"]]
    statistics = elmo.layer_statistics(sentences)
    tokens = np.concatenate(elmo.embed(sentences), 1).astype(np.float64)  # [L, tokens, F]
    np.testing.assert_allclose(statistics["mean"], tokens.mean(1), rtol=1e-5, atol=1e-7)
    expected = 1 / np.sqrt(tokens.var(1) + 1e-6 * tokens.mean(1) ** 2 + 1e-8)
    np.testing.assert_allclose(statistics["scale"], expected, rtol=1e-4)
    got = elmo.encode(sentences[:1], "top", "mean", statistics)[0]
    want = (tokens[-1, :3] - tokens[-1].mean(0)) / tokens[-1].std(0)
    np.testing.assert_allclose(got, want.mean(0), rtol=1e-2, atol=1e-3)


def test_unknown_tokens_are_counted_for_models_that_read_words(elmo, tmp_path):
    assert elmo.count_unknown([["the", "goal"], ["Bank"], []]) == 2
    assert make(tmp_path).count_unknown([["the", "goal"]]) == 0
