"""The nearest occurrences of a word, by layer."""

import numpy as np
import pytest

from experiments import neighbours
from experiments.neighbours import NeighboursConfig, _agreement, flat, similarity


def test_a_layer_without_context_has_every_neighbour_and_one_with_it_those_of_the_sense(rng):
    senses = ["river", "money"] * 6
    word = np.tile(rng.normal(size=5), (12, 1))
    aware = word + np.where(np.array(senses) == "river", 1, -1)[:, None] + 0.01 * rng.normal(size=(12, 5))
    assert _agreement(similarity(word), senses, 3) == pytest.approx(5 / 11)
    assert _agreement(similarity(aware), senses, 3) == 1
    assert np.abs(flat(word)).max() < 1e-12
    halves = flat(aware)[:, 0] > 0
    assert len({(sense, half) for sense, half in zip(senses, halves.tolist(), strict=True)}) == 2


def test_components_keep_distances_in_a_plane(rng):
    x = rng.normal(size=(9, 2)) @ rng.normal(size=(2, 7))
    apart = lambda a: np.linalg.norm(a[:, None] - a[None], axis=-1)  # noqa: E731
    np.testing.assert_allclose(apart(flat(x)), apart(x), atol=1e-9)


def test_the_command(elmo, tmp_path, capsys, monkeypatch, refused):
    elmo.save_pretrained(tmp_path / "model")
    text, picture = tmp_path / "in.txt", tmp_path / "bank.png"
    text.write_text("the bank rose\nthe river bank\n.\nthe bank rose .\nbank bank\n")
    call = ["bank", text, "--pretrained", tmp_path / "model", "--picture", picture]
    monkeypatch.setattr("sys.argv", ["x", *map(str, call)])
    assert neighbours.main() == 0
    said = capsys.readouterr().out
    assert "bank: 5 occurrences" in said and "every occurrence: no context is known here" in said
    layers = elmo.embed([["the", "bank", "rose"], ["the", "bank", "rose", "."]])
    a, b = layers[0][2, 1], layers[1][2, 1]
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert f"{cosine:5.2f}  the [bank] rose .  ({text}:4)" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    refused(neighbours.main, call, "is there already; replace it with --overwrite")
    refused(neighbours.main, ["flood", *call[1:4]], "'flood' stands in the texts 0 times")


def test_the_embedded_corpus_names_senses(elmo, tmp_path):
    elmo.save_pretrained(tmp_path / "model")
    config = NeighboursConfig("bank", pretrained=str(tmp_path / "model"), picture=str(tmp_path / "a.png"))
    shares = neighbours.neighbours(config)
    assert len(shares) == 3 and shares[0] < 0.6
