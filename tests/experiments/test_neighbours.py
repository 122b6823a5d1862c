"""The nearest occurrences of a word, by layer."""

import os
from dataclasses import asdict

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from elmo_jax.config import DataConfig
from elmo_jax.data.text import Vocabulary
from elmo_jax.storage.files import read_config, write_config
from experiments import neighbours
from experiments.neighbours import NeighboursConfig, cosine_similarity, principal_components, sense_agreement

# The vocabulary of the `elmo` fixture has only four words.
pytestmark = pytest.mark.filterwarnings("ignore:.*unknown to the vocabulary:UserWarning")


def test_context_makes_neighbours_share_the_sense(rng):
    senses = ["river", "money"] * 6
    word = np.tile(rng.normal(size=5), (12, 1))
    aware = word + np.where(np.array(senses) == "river", 1, -1)[:, None] + 0.01 * rng.normal(size=(12, 5))
    assert sense_agreement(cosine_similarity(word), senses, 3) == pytest.approx(5 / 11)
    assert sense_agreement(cosine_similarity(aware), senses, 3) == 1
    assert np.abs(principal_components(word)).max() < 1e-12
    halves = principal_components(aware)[:, 0] > 0
    assert len({(sense, half) for sense, half in zip(senses, halves.tolist(), strict=True)}) == 2


def test_principal_components_keep_distances_in_a_plane(rng):
    x = rng.normal(size=(9, 2)) @ rng.normal(size=(2, 7))
    apart = lambda a: np.linalg.norm(a[:, None] - a[None], axis=-1)  # noqa: E731
    np.testing.assert_allclose(apart(principal_components(x)), apart(x), atol=1e-9)


def test_command_prints_neighbours_and_writes_the_picture(elmo, tmp_path, capsys, monkeypatch, refused):
    elmo.save_pretrained(tmp_path / "model")
    text, picture = tmp_path / "in.txt", tmp_path / "bank.png"
    text.write_text("the bank rose\nthe river bank\n.\nthe bank rose .\nbank bank\n")
    call = ["bank", text, "--pretrained", tmp_path / "model", "--picture", picture, "--nearest", "9"]
    monkeypatch.setattr("sys.argv", ["x", *map(str, call)])
    assert neighbours.main() == 0
    out = capsys.readouterr().out
    assert "bank: 5 occurrences" in out and "all occurrences: this layer does not depend on context" in out
    layers = elmo.embed([["the", "bank", "rose"], ["the", "bank", "rose", "."]])
    a, b = layers[0][2, 1], layers[1][2, 1]
    cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert f"{cosine:5.2f}  the [bank] rose .  ({text}:4)" in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "-1.00" not in out  # the occurrence itself
    refused(neighbours.main, call, "already exists; replace it with --overwrite")
    refused(neighbours.main, ["flood", *call[1:4]], "'flood' occurs 0 times in the texts")


def test_word_outside_the_font_is_numbered(elmo, tmp_path, capsys, monkeypatch):
    elmo.save_pretrained(tmp_path / "model")
    (tmp_path / "in.txt").write_text("the 银行 rose\nthe river 银行\n", "utf-8")
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    call = ["银行", tmp_path / "in.txt", "--pretrained", tmp_path / "model", "--picture", tmp_path / "a.png"]
    monkeypatch.setattr("sys.argv", ["x", *map(str, call)])
    assert neighbours.main() == 0
    monkeypatch.undo()
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["word 1", "word 2"]
    assert "show numbers: word 1 is like: the [银行] rose; word 2 is like: the river [银行]." in (
        capsys.readouterr().out
    )
    plt.close("all")


PICTURES = {
    "no ending": ("q", "--picture must name a .png file, not 'q'"),
    "another ending": ("a.xyz", "name a .png file, not 'a.xyz'"),
    "nothing": ("", "--picture is empty"),
    "an ending alone": (".png", "name a .png file, not '.png'"),
    "a folder": ("folder", "name a .png file, not 'folder'"),
    "a folder of that name": ("folder.png", "folder.png: is a folder"),
    "in no folder": ("none/a.png", "none/a.png: its folder is missing"),
    "in a file": ("q.png/a.png", "q.png/a.png: its folder is missing"),
    "there already": ("q.png", "q.png: already exists; replace it with --overwrite"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_bad_picture_path_is_refused_before_computing(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(neighbours.cli, "load_elmo", lambda *_: pytest.fail("it computes"))
    for folder in ("folder", "folder.png"):
        (tmp_path / folder).mkdir()
    (tmp_path / "q.png").write_bytes(b"mine")
    picture, message = PICTURES[name]
    for flags in ([], ["--overwrite"]) if name != "there already" else ([],):
        refused(neighbours.main, ["bank", "--pretrained", "model", "--picture", picture, *flags], message)
    assert (tmp_path / "q.png").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "folder.png", "q.png"]


def test_read_only_folder_is_refused_first(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)  # root may write anywhere
    call = ["bank", "--pretrained", "none", "--picture", tmp_path / "a.png"]
    refused(neighbours.main, call, "a.png: its folder is missing or not writable")


@pytest.mark.parametrize("picture", ["a.png", "A.PNG", "a.b.png"])
def test_picture_is_written_completely_or_not_at_all(elmo, picture, tmp_path):
    elmo.save_pretrained(tmp_path / "model")
    (tmp_path / picture).write_bytes(b"old")
    (tmp_path / "in.txt").write_text("the bank rose\nthe river bank\n")
    text, folder = str(tmp_path / "in.txt"), str(tmp_path / "model")
    config = NeighboursConfig(
        "bank", (text,), pretrained=folder, picture=str(tmp_path / picture), overwrite=True
    )

    def stop(figure, file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", stop)
        with pytest.raises(KeyboardInterrupt):
            neighbours.neighbours(config)
    assert (tmp_path / picture).read_bytes() == b"old"
    neighbours.neighbours(config)
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["in.txt", "model", picture])


def test_training_texts_of_the_run_are_searched(pretrained, capsys, refused, elmo, tmp_path):
    elmo.save_pretrained(tmp_path / "model")
    refused(neighbours.main, ["bank", "--pretrained", tmp_path / "model"], "give a TEXT to search")
    word = Vocabulary.load(pretrained / "vocab.txt").tokens[4]
    neighbours.neighbours(NeighboursConfig(word, pretrained=str(pretrained)))
    assert "train.csv:" in capsys.readouterr().out


def test_many_unknown_words_give_a_warning(elmo, tmp_path):
    elmo.save_pretrained(tmp_path / "model")
    (tmp_path / "in.txt").write_text("The BANK Rose\nThe BANK Fell\n")
    options = {"texts": (str(tmp_path / "in.txt"),), "pretrained": str(tmp_path / "model")}
    unknown = elmo.count_unknown([["The", "BANK", "Rose"], ["The", "BANK", "Fell"]])
    assert unknown == (6 if elmo.model.config.input == "words" else 0)
    if unknown:
        with pytest.warns(UserWarning, match=r"100\.0% of the tokens are unknown.*--tokenize for raw text"):
            neighbours.neighbours(NeighboursConfig("BANK", **options))
    neighbours.neighbours(NeighboursConfig("bank", tokenize=True, **options))


def test_sample_corpus_names_senses(elmo, tmp_path):
    elmo.save_pretrained(tmp_path / "model")
    saved = read_config(tmp_path / "model")
    write_config(tmp_path / "model", saved | {"data": asdict(DataConfig())}, saved.pop("files"))
    config = NeighboursConfig("bank", pretrained=str(tmp_path / "model"), picture=str(tmp_path / "a.png"))
    shares = neighbours.neighbours(config)
    assert len(shares) == 3 and shares[0] < 0.6
