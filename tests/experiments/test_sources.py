"""A classifier on a language model that brings no data set: an official one, or one of a corpus."""

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from official import make
from tiny import SMALL, TINY, call

from elmo_jax.elmo import Elmo
from elmo_jax.models.combiners import CombinerConfig
from elmo_jax.storage.files import tree_digest
from elmo_jax.training.checkpoint import Run
from experiments import downstream, embed, pretrain
from experiments.common.features import SourceConfig, open_source

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def official(tmp_path):
    make(tmp_path)
    return ["--bilm", tmp_path / "options.json", tmp_path / "weights.hdf5"]


def scores(run):
    return json.loads((run / "results.json").read_text())["test"]


def test_an_official_model_feeds_a_classifier(official, corpus, tmp_path, monkeypatch, capsys):
    given, run = [*official, "--dataset", corpus, "--finetune", *SMALL], tmp_path / "run"
    assert call(downstream.main, monkeypatch, *given, "--output", run) == 0
    assert sum(map(sum, scores(run)["confusion_matrix"])) == 10
    params = Elmo.from_bilm(*official[1:]).params
    assert json.loads((run / "config.json").read_text())["model"] == tree_digest({"bilm": params})
    saved = Run.open(run)
    trained = saved.restore_best(("params",))["params"]["bilm"]
    saved.close()
    moved = np.abs(trained["lstm_1"]["recurrent_kernel"] - params["lstm_1"]["recurrent_kernel"])
    assert moved.max() > 0

    shutil.move(tmp_path / "weights.hdf5", tmp_path / "moved.hdf5")  # a run is of what is in its files
    given[2] = tmp_path / "moved.hdf5"
    assert call(downstream.main, monkeypatch, *given, "--epochs", "2", "--resume", "--output", run) == 0
    (tmp_path / "in.txt").write_text("the bank\n")
    mixing = [tmp_path / "in.txt", tmp_path / "out.h5", *given[:3], "--layers", "mix", "--mix-from", run]
    assert call(embed.main, monkeypatch, *mixing) == 0
    options = json.loads(given[1].read_text())
    options["lstm"]["cell_clip"] = 3.0
    given[1].write_text(json.dumps(options))
    again = [*given, "--epochs", "3", "--resume", "--output", run]
    assert call(downstream.main, monkeypatch, *again) == 2
    assert "options.cell_clip 0.3 -> 3.0" in capsys.readouterr().err
    assert call(embed.main, monkeypatch, *mixing, "--overwrite") == 2
    assert "another language model" in capsys.readouterr().err
    make(tmp_path, seed=1)
    again[2] = tmp_path / "weights.hdf5"
    assert call(downstream.main, monkeypatch, *again) == 2


def test_a_model_of_a_corpus_feeds_a_classifier(corpus, tmp_path, monkeypatch, refused):
    (tmp_path / "text.txt").write_text("the goal of 3\nthe bank of 4\n" * 20)
    text, model = tmp_path / "text.txt", tmp_path / "model"
    flags = ["--corpus", text, "--valid-corpus", text, *TINY, "--output", model]
    assert call(pretrain.main, monkeypatch, *flags) == 0
    given = ["--pretrained", model, *SMALL, "--output", tmp_path / "run"]
    refused(downstream.main, given, "model: was not made from a labelled data set; give one by --dataset")
    assert call(downstream.main, monkeypatch, *given, "--dataset", corpus) == 0
    assert sum(map(sum, scores(tmp_path / "run")["confusion_matrix"])) == 10


def test_a_run_whose_data_set_has_moved_finds_it(corpus, tmp_path, monkeypatch, refused):
    model = tmp_path / "model"
    assert call(pretrain.main, monkeypatch, "--dataset", corpus, *TINY, "--output", model) == 0
    given = ["--pretrained", model, *SMALL, "--output", tmp_path / "run"]
    shutil.move(corpus, tmp_path / "elsewhere")
    refused(downstream.main, given, "data: no such folder; give one that holds train.csv and test.csv")
    assert call(downstream.main, monkeypatch, *given, "--dataset", tmp_path / "elsewhere") == 0


def test_another_data_set_is_read_by_its_own_rules(corpus, tmp_path, monkeypatch, refused):
    model, other = tmp_path / "model", shutil.copytree(corpus, tmp_path / "other")
    flags = ["--dataset", corpus, "--max-length", "2", *TINY, "--output", model]
    with warnings.catch_warnings(action="ignore"):  # that texts are cut
        assert call(pretrain.main, monkeypatch, *flags) == 0
    config = SourceConfig(pretrained=str(model))

    def longest(**given):
        source = open_source(replace(config, **given), CombinerConfig(), 0, "auto")
        return source.data.train.lengths.max()

    with pytest.warns(UserWarning, match="longer than 2"):
        assert longest() == longest(dataset=str(corpus)) == 2
    assert longest(dataset=str(other)) > 3
    with pytest.warns(UserWarning, match="longer than 3"):
        assert longest(dataset=str(other), max_length=3) == 3
    given = ["--pretrained", model, *SMALL, "--output", tmp_path / "run"]
    told = f"--max-length is for another --dataset than {model} was made from; leave it out"
    refused(downstream.main, [*given, "--max-length", "400"], told)


def test_what_is_missing_or_too_much_is_named(official, corpus, refused):
    refused(downstream.main, [*official, *SMALL], "--bilm names no data set; give one by --dataset")
    given = [*official, "--dataset", corpus, *SMALL]
    refused(downstream.main, [*given, "--pretrained", "run"], "--pretrained has no effect with --bilm")
    refused(downstream.main, [*given, "--features", "svd"], "--bilm has no effect with --features svd")
    alone = [*official, "--data-dir", corpus, *SMALL]
    refused(downstream.main, alone, "--bilm names no data set; give one by --dataset")
