"""The commands, end to end and in this process, on a tiny data set."""

import json

import numpy as np
import pytest
from tiny import TINY, call, records

from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from experiments import downstream, pretrain, vectors
from experiments.common import report

pytestmark = pytest.mark.usefixtures("standard_promotion")


def test_pretrain_writes_what_it_promises(trained):
    run, out = trained
    got = records(run)
    assert [r["epoch"] for r in got] == [1, 2]
    keys = {
        "event",
        "epoch",
        "loss",
        "perplexity",
        "perplexity_forward",
        "perplexity_backward",
        "tokens_per_second",
    }
    assert all(keys <= r.keys() and r["event"] == "epoch" for r in got)
    assert got[1]["perplexity"] < got[0]["perplexity"]
    config = json.loads((run / "config.json").read_text())
    assert config["model"]["embedding"] == 4 and config["epochs"] == 2
    for name in ("loss.png", "perplexity.png"):
        assert (run / name).read_bytes().startswith(b"\x89PNG")
    assert "padding" in out and str(run) in out
    assert Elmo.from_pretrained(run).embed([["the", "bank"]])[0].shape == (3, 2, 8)


@pytest.mark.parametrize(
    ("combiner", "more"),
    [("trainable", ["--normalize", "softmax"]), ("frozen", ["--finetune"]), ("function", [])],
)
def test_downstream_writes_what_it_promises(pretrained, tmp_path, monkeypatch, capsys, combiner, more):
    run = tmp_path / "down"
    flags = ["--hidden", "4", "--epochs", "2", "--batch-size", "8", "--classifier-layers", "1"]
    code = call(
        downstream.main,
        monkeypatch,
        "--pretrained",
        pretrained,
        "--output",
        run,
        "--combiner",
        combiner,
        *flags,
        *more,
    )
    captured = capsys.readouterr()
    assert code == 0, captured.err
    got = records(run)
    assert all({"event", "epoch", "loss", "val_loss", "val_accuracy", "lambdas"} <= r.keys() for r in got)
    scored = json.loads((run / "results.json").read_text())
    for part, rows in (("train", 32), ("validation", 8), ("test", 10)):
        scores = scored[part]
        assert {"accuracy", "f1", "precision", "recall", "confusion_matrix"} <= scores.keys()
        assert sum(map(sum, scores["confusion_matrix"])) == rows
        assert (run / f"confusion_{part}.png").read_bytes().startswith(b"\x89PNG")
    lambdas = scored["lambdas"]
    if combiner == "function":
        assert lambdas is None and got[0]["lambdas"] is None
    else:
        assert len(lambdas) == 3
        assert (run / "lambdas.png").exists()
        assert (got[0]["lambdas"] == got[1]["lambdas"]) == (combiner == "frozen")
    assert f"test accuracy {scored['test']['accuracy']:.4f}" in captured.out


def test_word_vectors_feed_the_same_classifier(corpus, tmp_path, monkeypatch, capsys):
    run, down = tmp_path / "sgns", tmp_path / "down"
    flags = [
        "--method",
        "sgns",
        "--dataset",
        corpus,
        "--min-count",
        "1",
        "--dimensions",
        "4",
        "--epochs",
        "2",
    ]
    assert call(vectors.main, monkeypatch, *flags, "--output", run) == 0, capsys.readouterr().err
    made, text = (WordVectors.load(run / name) for name in ("vectors.npz", "vectors.txt"))
    assert made.tokens == text.tokens == Vocabulary.load(run / "vocab.txt").tokens[3:]
    np.testing.assert_array_equal(made.matrix, text.matrix)
    assert [r["epoch"] for r in records(run)] == [1, 2]
    flags = ["--vectors", run, "--output", down, "--hidden", "4", "--epochs", "1", "--labels", "0.5"]
    code = call(downstream.main, monkeypatch, "--features", "sgns", *flags)
    assert code == 0, capsys.readouterr().err
    scored = json.loads((down / "results.json").read_text())
    assert scored["lambdas"] is None
    predictions = np.load(down / "predictions.npz")
    for part, rows in (("train", 16), ("validation", 4), ("test", 10)):
        hits = predictions[part] == predictions[f"{part}_labels"]
        assert len(hits) == rows and hits.mean() == pytest.approx(scored[part]["accuracy"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--features", "svd", "--vectors", "none"],
            "python -m experiments.vectors --method svd --output none",
        ),
        (["--features", "svd", "--finetune"], "--finetune and --untrained need --features elmo"),
        (["--labels", "1.5"], "--labels must be above 0 and at most 1"),
    ],
)
def test_features_that_cannot_be_had_end_in_one_line(tmp_path, monkeypatch, capsys, flags, said):
    monkeypatch.chdir(tmp_path)
    assert call(downstream.main, monkeypatch, *flags) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and "\n" not in err


def test_a_run_is_not_lost_by_accident_and_can_be_continued(pretrained, corpus, monkeypatch, capsys):
    flags = ["--dataset", corpus, "--output", pretrained, *TINY]
    before = records(pretrained)
    assert call(pretrain.main, monkeypatch, *flags) == 2
    assert "already exists; pass" in capsys.readouterr().err
    assert call(pretrain.main, monkeypatch, *flags, "--cells", "5", "--resume") == 2
    assert "was started with other settings (model.cells 4 -> 5)" in capsys.readouterr().err
    assert call(pretrain.main, monkeypatch, *flags, "--epochs", "3", "--resume") == 0
    assert records(pretrained)[:2] == before and len(records(pretrained)) == 3


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--epochs", "x"], "--epochs"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--nonsense"], "--nonsense"),
        (["--softmax", "hierarchical"], "--softmax"),
        (["--validation", "1.5"], "--validation must be between 0 and 1"),
        (["--dropout", "1"], "--dropout must be"),
        (["--learning-rate", "-1"], "--learning-rate must be"),
        (["--dataset", "/nowhere"], "/nowhere: no such folder"),
        (["--output", "/dev/null"], "/dev/null: is a file"),
        (["--output", ""], "--output is empty"),
        (["--output", "x\udcff"], "--output holds bytes that are not UTF-8"),
    ],
)
def test_wrong_flags_end_in_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    assert call(pretrain.main, monkeypatch, *args) == 2
    err = capsys.readouterr().err.strip()
    assert said in err and "\n" not in err


def test_a_picture_that_fails_loses_no_measurement(pretrained, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise InputError("no picture")

    monkeypatch.setattr(report, "plot_confusion", fail)
    run = tmp_path / "down"
    flags = ["--hidden", "4", "--epochs", "1", "--classifier-layers", "1", "--tensorboard"]
    assert call(downstream.main, monkeypatch, "--pretrained", pretrained, "--output", run, *flags) == 2
    assert "no picture" in capsys.readouterr().err
    assert (run / "predictions.npz").is_file() and not (run / "results.json").exists()  # the last of all
    events = b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    assert all(tag in events for tag in (b"loss", b"val_loss", b"train_accuracy", b"lambdas/2"))


def test_an_unknown_run_is_named(tmp_path, monkeypatch, capsys):
    assert call(downstream.main, monkeypatch, "--pretrained", tmp_path / "none") == 2
    err = capsys.readouterr().err.strip()
    assert "none: holds no run" in err and "\n" not in err


def test_help_lists_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as info:
        call(downstream.main, monkeypatch, "--help")
    assert info.value.code == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--pretrained", "--combiner", "--seed", "--output", "--finetune"))
