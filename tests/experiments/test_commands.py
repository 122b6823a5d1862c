"""The commands, end to end and in this process, on a tiny data set."""

import json
import re

import numpy as np
import pytest
from tiny import SMALL, TINY, call, records

from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Elmo
from elmo_jax.training.loop import ProgressBar
from experiments import downstream, pretrain, vectors

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_pretrain_writes_its_results(trained):
    run, out = trained
    got = records(run)
    assert [r["epoch"] for r in got] == [1, 2]
    keys = {"event", "epoch", "loss", "perplexity", "perplexity_forward", "perplexity_backward"}
    assert all(keys | {"tokens_per_second"} <= r.keys() and r["event"] == "epoch" for r in got)
    assert got[1]["perplexity"] < got[0]["perplexity"]
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["embedding"] == 4 and config["epochs"] == 2
    for name in ("loss.png", "perplexity.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert "padding" in out and str(run) in out
    assert Elmo.from_pretrained(run).embed([["the", "bank"]])[0].shape == (3, 2, 8)


@pytest.mark.parametrize("combiner", ["trainable", "function"])
def test_downstream_writes_its_results(pretrained, tmp_path, monkeypatch, capsys, combiner):
    run = tmp_path / "down"
    flags = ["--pretrained", pretrained, "--output", run, "--combiner", combiner, *SMALL]
    code, captured = call(downstream.main, monkeypatch, *flags), capsys.readouterr()
    assert code == 0, captured.err
    (record,) = records(run)
    assert {"event", "epoch", "loss", "val_loss", "val_accuracy", "lambdas"} <= record.keys()
    results = json.loads((run / "results.json").read_text())
    for part, rows in (("train", 32), ("validation", 8), ("test", 10)):
        scores = results[part]
        assert {"accuracy", "f1", "precision", "recall"} <= scores.keys()
        assert sum(map(sum, scores["confusion_matrix"])) == rows
        assert (run / f"confusion_{part}.png").read_bytes().startswith(b"\x89PNG")
    has_lambdas = combiner == "trainable"
    assert (run / "lambdas.png").exists() == has_lambdas == (record["lambdas"] is not None)
    assert len(results["lambdas"] or []) == 3 * has_lambdas
    assert f"test accuracy {results['test']['accuracy']:.4f}" in captured.out


def test_word_vectors_are_saved_and_feed_a_classifier(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ProgressBar, "INTERVAL", -1.0)
    run, down = tmp_path / "sgns", tmp_path / "down"
    flags = ["--dataset", corpus, "--min-count", "1", "--dimensions", "4", "--epochs", "1", "--output", run]
    assert call(vectors.main, monkeypatch, *flags) == 0, capsys.readouterr().err
    made, text = (WordVectors.load(run / name) for name in ("vectors.npz", "vectors.txt"))
    assert made.tokens == text.tokens == Vocabulary.load(run / "vocab.txt").tokens[3:]
    np.testing.assert_array_equal(made.matrix, text.matrix)
    (record,), captured = records(run), capsys.readouterr()
    assert re.findall(r"loss (\d+\.\d+) a pair", captured.out) == [f"{record['loss']:.4f}"]
    flags = ["--features", "sgns", "--vectors", run, "--output", down, "--labels", "0.5", *SMALL]
    assert call(downstream.main, monkeypatch, *flags) == 0, capsys.readouterr().err
    results = json.loads((down / "results.json").read_text())
    assert results["lambdas"] is None
    predictions = np.load(down / "predictions.npz")
    for part, rows in (("train", 16), ("validation", 4), ("test", 10)):
        hits = predictions[part] == predictions[f"{part}_labels"]
        assert len(hits) == rows and hits.mean() == pytest.approx(results[part]["accuracy"])


DOWNSTREAM = {
    "no vectors": (
        ["--features", "svd", "--vectors", "none"],
        "python -m experiments.vectors --method svd --output none",
    ),
    "finetuned vectors": (["--features", "svd", "--finetune"], "--finetune and --untrained need --features"),
    "too many labels": (["--labels", "1.5"], "--labels must be at most 1"),
    "no run": (["--pretrained", "none"], "none: holds no run"),
}


@pytest.mark.parametrize("name", DOWNSTREAM)
def test_downstream_refuses(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(downstream.main, *DOWNSTREAM[name])


PRETRAIN = {
    "text for a number": (["--epochs", "x"], "--epochs"),
    "no epochs": (["--epochs", "0"], "--epochs must be at least 1"),
    "an unknown flag": (["--nonsense"], "--nonsense"),
    "an unknown choice": (["--softmax", "hierarchical"], "--softmax"),
    "no such data set": (["--dataset", "/nowhere"], "/nowhere: no such folder"),
    "output is a file": (["--output", "/dev/null"], "/dev/null: is a file"),
    "no output": (["--output", ""], "--output is empty"),
    "output is not UTF-8": (["--output", "x\udcff"], "--output is not UTF-8"),
    "nothing to resume": (["--resume", "--output", "typo"], "typo: holds no run to continue; check --output"),
    "both": (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
}


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretrain_refuses(name, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(pretrain.main, *PRETRAIN[name])


def test_an_existing_run_is_refused_or_continued(pretrained, corpus, monkeypatch, capsys):
    flags = ["--dataset", corpus, "--output", pretrained, *TINY]
    before = records(pretrained)
    assert call(pretrain.main, monkeypatch, *flags) == 2
    assert "--resume" in capsys.readouterr().err
    assert call(pretrain.main, monkeypatch, *flags, "--cells", "5", "--resume") == 2
    assert "model.cells 4 -> 5" in capsys.readouterr().err
    assert call(pretrain.main, monkeypatch, *flags, "--epochs", "3", "--resume") == 0
    assert records(pretrained)[:2] == before and len(records(pretrained)) == 3
