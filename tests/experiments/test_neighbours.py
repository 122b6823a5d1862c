"""The nearest occurrences of a word, by layer."""

import os

import matplotlib.pyplot as plt
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
    call = ["bank", text, "--pretrained", tmp_path / "model", "--picture", picture, "--nearest", "9"]
    monkeypatch.setattr("sys.argv", ["x", *map(str, call)])
    assert neighbours.main() == 0
    said = capsys.readouterr().out
    assert "bank: 5 occurrences" in said and "every occurrence: no context is known here" in said
    layers = elmo.embed([["the", "bank", "rose"], ["the", "bank", "rose", "."]])
    a, b = layers[0][2, 1], layers[1][2, 1]
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert f"{cosine:5.2f}  the [bank] rose .  ({text}:4)" in said
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "-1.00" not in said  # which would be the word's own occurrence
    refused(neighbours.main, call, "is there already; replace it with --overwrite")
    refused(neighbours.main, ["flood", *call[1:4]], "'flood' stands in the texts 0 times")


def test_a_word_that_the_font_cannot_write_is_numbered_and_told(elmo, tmp_path, capsys, monkeypatch):
    elmo.save_pretrained(tmp_path / "model")
    (tmp_path / "in.txt").write_text("the 银行 rose\nthe river 银行\n", "utf-8")
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    call = ["银行", tmp_path / "in.txt", "--pretrained", tmp_path / "model", "--picture", tmp_path / "a.png"]
    monkeypatch.setattr("sys.argv", ["x", *map(str, call)])
    assert neighbours.main() == 0
    monkeypatch.undo()
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["word 1"]
    assert (
        "\nThe plots use a font without these characters and show numbers: word 1 is 银行.\n"
        in capsys.readouterr().out
    )
    plt.close("all")


PICTURES = {
    "no ending": ("q", "--picture must be a file whose name ends in .png, not 'q'"),
    "another ending": ("a.xyz", "ends in .png, not 'a.xyz'"),
    "nothing": ("", "--picture is empty"),
    "an ending alone": (".png", "ends in .png, not '.png'"),
    "a folder": ("folder", "ends in .png, not 'folder'"),
    "a folder of that name": ("folder.png", "folder.png: is a folder"),
    "in no folder": ("none/a.png", "none/a.png: is in no folder"),
    "in a file": ("q.png/a.png", "q.png/a.png: is in no folder"),
    "there already": ("q.png", "q.png: is there already; replace it with --overwrite"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_where_no_picture_can_go_is_said_before_anything_is_computed(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(neighbours.cli, "load_elmo", lambda *_: pytest.fail("it computes"))
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "q.png").write_bytes(b"mine")
    picture, said = PICTURES[name]
    for flags in ([], ["--overwrite"]) if name != "there already" else ([],):
        refused(neighbours.main, ["bank", "--pretrained", "model", "--picture", picture, *flags], said)
    assert (tmp_path / "q.png").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "folder.png", "q.png"]


def test_a_folder_that_may_not_be_written_to_is_said_first(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    call = ["bank", "--pretrained", "none", "--picture", tmp_path / "a.png"]
    refused(neighbours.main, call, "a.png: is in no folder that can be written to")


@pytest.mark.parametrize("picture", ["a.png", "A.PNG", "a.b.png"])
def test_the_picture_is_the_file_that_is_named_whole_or_not_at_all(elmo, picture, tmp_path):
    elmo.save_pretrained(tmp_path / "model")
    (tmp_path / picture).write_bytes(b"old")
    config = NeighboursConfig(
        "bank", pretrained=str(tmp_path / "model"), picture=str(tmp_path / picture), overwrite=True
    )

    def stopped(points, groups, titles, path):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neighbours, "plot_layers", stopped)
        with pytest.raises(KeyboardInterrupt):
            neighbours.neighbours(config)
    assert (tmp_path / picture).read_bytes() == b"old"
    neighbours.neighbours(config)
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["model", picture])


def test_the_embedded_corpus_names_senses(elmo, tmp_path):
    elmo.save_pretrained(tmp_path / "model")
    config = NeighboursConfig("bank", pretrained=str(tmp_path / "model"), picture=str(tmp_path / "a.png"))
    shares = neighbours.neighbours(config)
    assert len(shares) == 3 and shares[0] < 0.6
