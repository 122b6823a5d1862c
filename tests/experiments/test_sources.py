"""Classifiers on language models without a data set of their own, and on other data sets."""

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import pytest
from exported import MODEL, PARAMS, WORDS
from official import make
from tiny import SMALL, TINY, call

from elmo_jax.config import CASED, CombinerConfig, TextConfig
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.storage.files import read_config, tree_digest, write_config
from elmo_jax.training.checkpoint import Run
from experiments import downstream, embed, pretrain
from experiments.common.config import SourceConfig
from experiments.common.inputs import data_of, open_source

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def official(tmp_path):
    make(tmp_path)
    return ["--bilm", tmp_path / "options.json", tmp_path / "weights.hdf5"]


def open_with(**settings):
    return open_source(SourceConfig(**settings), CombinerConfig(), 0, "auto")


def test_a_classifier_finetunes_an_official_model(official, corpus, tmp_path, monkeypatch, capsys):
    flags, run = [*official, "--dataset", corpus, "--finetune", *SMALL], tmp_path / "run"
    assert call(downstream.main, monkeypatch, *flags, "--output", run) == 0
    params = Elmo.from_bilm(*official[1:]).params
    assert json.loads((run / "config.json").read_text())["model"] == tree_digest({"bilm": params})
    saved = Run.open(run)
    trained = saved.restore_best(("params",))["params"]["bilm"]
    saved.close()
    moved = np.abs(trained["lstm_1"]["recurrent_kernel"] - params["lstm_1"]["recurrent_kernel"])
    assert moved.max() > 0

    (tmp_path / "in.txt").write_text("the bank\n")
    mixing = [tmp_path / "in.txt", tmp_path / "out.h5", *flags[:3], "--layers", "mix", "--mix-from", run]
    assert call(embed.main, monkeypatch, *mixing) == 0
    options = json.loads(flags[1].read_text())
    options["lstm"]["cell_clip"] = 3.0
    flags[1].write_text(json.dumps(options))
    again = [*flags, "--epochs", "3", "--resume", "--output", run]
    assert call(downstream.main, monkeypatch, *again) == 2
    assert "options.cell_clip 0.3 -> 3.0" in capsys.readouterr().err
    assert call(embed.main, monkeypatch, *mixing, "--overwrite") == 2
    make(tmp_path, seed=1)
    assert call(downstream.main, monkeypatch, *again) == 2


def test_a_model_without_a_data_set_needs_the_dataset_flag(corpus, tmp_path, refused):
    model = tmp_path / "model"
    Elmo(MODEL, PARAMS, WORDS).save_pretrained(model)
    given = ["--pretrained", model, *SMALL, "--output", tmp_path / "run"]
    refused(downstream.main, given, "was not trained on a labelled data set; give one with --dataset")
    assert len(open_with(pretrained=str(model), dataset=str(corpus)).data.test) == 10


def test_a_data_set_that_moved_is_found_with_a_flag(trained, pretrained, tmp_path, refused):
    data, moved = trained[0].parent / "data", tmp_path / "moved"
    shutil.move(data, moved)
    try:
        given = ["--pretrained", pretrained, *SMALL, "--output", tmp_path / "run"]
        refused(downstream.main, given, "data: no such folder")
        assert len(open_with(pretrained=str(pretrained), dataset=str(moved)).data.test) == 10
    finally:
        shutil.move(moved, data)


def test_another_data_set_is_read_with_its_own_settings(corpus, tmp_path, monkeypatch, refused):
    model, other = tmp_path / "model", shutil.copytree(corpus, tmp_path / "other")
    flags = ["--dataset", corpus, "--max-length", "2", *TINY, "--epochs", "1", "--output", model]
    with warnings.catch_warnings(action="ignore"):  # about cut texts
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
    refused(downstream.main, [*given, "--max-length", "400"], "--max-length differs from the run's data set")


def test_missing_and_contradicting_flags_are_refused(official, corpus, refused):
    refused(downstream.main, [*official, *SMALL], "--bilm names no data set; give one with --dataset")
    given = [*official, "--dataset", corpus, *SMALL]
    refused(downstream.main, [*given, "--pretrained", "run"], "--pretrained has no effect with --bilm")
    refused(downstream.main, [*given, "--features", "svd"], "--bilm has no effect with --features svd")
    alone = [*official, "--data-dir", corpus, *SMALL]
    refused(downstream.main, alone, "--bilm names no data set; give one with --dataset")


def test_data_set_is_tokenized_like_the_training_texts(elmo, corpus, tmp_path):
    folder, data = tmp_path / "model", str(corpus)
    Elmo(elmo.model, elmo.params, elmo.vocabulary, CASED).save_pretrained(folder)
    given = {"pretrained": str(folder), "dataset": data}
    for settings, expected in (
        ({}, CASED),
        ({"lowercase": True}, TextConfig()),
        ({"tokens": "whitespace"}, TextConfig("whitespace", lowercase=False)),
    ):
        assert open_with(**given, **settings).settings.text_config() == expected
    elmo.save_pretrained(folder)
    assert open_with(**given).settings.text_config() == TextConfig()
    Elmo(elmo.model, elmo.params, elmo.vocabulary, tokenizer=str.split).save_pretrained(folder)
    with pytest.raises(InputError, match="trained with a custom tokenizer; separate the tokens by spaces"):
        open_with(**given)
    assert open_with(**given, tokens="whitespace").settings.tokens == "whitespace"


def test_folder_of_an_official_model_is_refused_with_its_files(official, refused):
    folder = official[1].parent
    message = f"{folder}: holds a model in the official format; give --bilm {official[1]} {official[2]}"
    refused(downstream.main, ["--pretrained", folder], message)


def test_data_set_of_an_older_run_is_cleaned(trained, tmp_path):
    data = read_config(trained[0])["data"]
    assert data.pop("clean") is False
    write_config(tmp_path, {"data": data}, {})
    assert data_of(tmp_path).clean and not data_of(trained[0]).clean
