"""Files that commands leave in a run folder."""

import json
import re
import shutil
import warnings

import pytest
from tiny import SMALL, call

from elmo_jax.errors import InputError
from elmo_jax.training.checkpoint import CONFIG, METRICS, RESULTS, VOCABULARY, Run
from experiments import downstream, vectors
from experiments.common import cli, report

pytestmark = pytest.mark.usefixtures("standard_promotion")
CORE = {"checkpoints", CONFIG, METRICS, VOCABULARY, ".lock"}
VECTORS = ["--min-count", "1", "--dimensions", "4", "--epochs", "1"]


def names(path):
    return {p.name for p in path.iterdir()}


@pytest.fixture(scope="module")
def finished(trained, tmp_path_factory):
    """A finished SGNS run."""
    out = tmp_path_factory.mktemp("vectors") / "run"
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--dataset", trained[0].parent / "data", *VECTORS, "--output", out]
        assert call(vectors.main, patch, *flags) == 0
    return out


def test_a_replaced_run_leaves_none_of_its_files(trained, finished, pretrained, tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise InputError("no")

    out, made = tmp_path / "run", names(trained[0]) | names(finished)
    shutil.copytree(finished, out)
    (out / "notes.txt").write_text("mine")
    flags = ["--pretrained", pretrained, *SMALL, "--output", out, "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr("elmo_jax.training.classifier.fit", refuse)
        assert call(downstream.main, patch, *flags) == 2
    assert names(out) <= (CORE - {VOCABULARY}) | {"notes.txt"}
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert call(downstream.main, monkeypatch, *flags) == 0
    assert (made | names(out)) - CORE == set(cli.PRODUCTS) - {"memory.jsonl", "memory.png"}


def test_a_failed_plot_keeps_predictions_and_resume_draws_it(pretrained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    flags = ["--pretrained", pretrained, *SMALL, "--output", out, "--tensorboard"]

    def fail(*args):
        raise OSError(28, "No space left on device", "confusion_test.png")

    with monkeypatch.context() as patch:
        patch.setattr(report, "plot_confusion", fail)
        assert call(downstream.main, patch, *flags) == 2
    output = capsys.readouterr()
    assert "confusion_test.png: No space left on device; fix this and continue with --resume" in output.err
    assert re.search(r"test +.*\d\.\d{4}", output.out)
    assert (out / "predictions.npz").exists() and not (out / RESULTS).exists()
    events = b"".join(path.read_bytes() for path in (out / "tensorboard").iterdir())
    assert all(tag in events for tag in (b"loss", b"val_loss", b"train_accuracy", b"lambdas/2"))
    before = (out / METRICS).read_text()
    assert call(downstream.main, monkeypatch, *flags, "--resume") == 0
    assert {RESULTS, "confusion_train.png", "confusion_test.png"} <= names(out)
    assert (out / METRICS).read_text() == before
    assert json.loads((out / RESULTS).read_text())["test"]["accuracy"] >= 0


def test_a_run_that_cannot_be_continued_keeps_its_results(finished, trained, tmp_path, monkeypatch, capsys):
    out = shutil.copytree(finished, tmp_path / "run")
    for position in out.glob("checkpoints/*/position.json"):
        position.write_text(position.read_text() + " ")
    made = {path.name: path.read_bytes() for path in out.glob("*.*") if path.is_file()}
    del made["config.json"]  # names the new folder
    flags = ["--dataset", trained[0].parent / "data", *VECTORS, "--output", out, "--resume"]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert call(vectors.main, monkeypatch, *flags) == 2
    assert "every saved step is damaged" in capsys.readouterr().err
    assert {name: (out / name).read_bytes() for name in made} == made


def test_a_folder_is_locked_until_its_results_are_written(corpus, tmp_path, monkeypatch):
    out, messages = tmp_path / "run", []
    write = cli.write_results

    def write_watched(path, results):
        with pytest.raises(InputError, match="another run") as info:
            Run.create(out, {}, monitor="loss", overwrite=True)
        messages.append(info.value)
        write(path, results)

    monkeypatch.setattr(cli, "write_results", write_watched)
    flags = ["--dataset", corpus, "--min-count", "1", "--dimensions", "4", "--method", "svd"]
    assert call(vectors.main, monkeypatch, *flags, "--output", out) == 0 and len(messages) == 1
    Run.create(out, {}, monitor="loss", overwrite=True).close()
