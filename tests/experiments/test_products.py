"""What commands leave in a run's folder at its end, and that nothing there is of another run."""

import builtins
import functools
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tiny import SMALL, TINY, call

from elmo_jax import embed_file as dump
from elmo_jax.errors import InputError
from elmo_jax.training.checkpoint import CONFIG, METRICS, RESULTS, VOCABULARY, Run
from elmo_jax.training.loop import ProgressBar
from experiments import downstream, pretrain, vectors
from experiments.common import cli, memory, report

pytestmark = pytest.mark.usefixtures("standard_promotion")
BEGUN = {"checkpoints", CONFIG, METRICS, VOCABULARY, ".lock"}


def names(path):
    return {p.name for p in path.iterdir()}


def commands(corpus, pretrained, path):
    """Each command's function and flags but for its output."""
    data = ["--dataset", corpus, "--min-count", "1"]
    tiny = [*data, "--dimensions", "4"]
    return [
        (pretrain, ["--dataset", corpus, *TINY]),
        (downstream, ["--pretrained", pretrained, *SMALL]),
        (vectors, [*tiny, "--method", "svd"]),
        (vectors, [*tiny, "--method", "sgns", "--epochs", "2"]),
    ]


def test_nothing_of_a_run_that_ended_survives_beside_a_new_one(corpus, pretrained, tmp_path, monkeypatch):
    def refuse(*args, **more):
        raise InputError("no")

    out, made = tmp_path / "run", set()
    for module, flags in commands(corpus, pretrained, tmp_path):
        args = [*flags, "--output", out, "--overwrite"]
        assert call(module.main, monkeypatch, *args) == 0
        assert names(out) <= BEGUN | set(cli.PRODUCTS), "a product that cli.PRODUCTS does not name"
        made |= names(out) - BEGUN
        (out / "notes.txt").write_text("mine")
        with monkeypatch.context() as patch:
            for name in ("fit", "svd_vectors"):
                patch.setattr(module, name, refuse, raising=False)
            assert call(module.main, patch, *args) == 2
        assert names(out) <= BEGUN | {"notes.txt"}
        assert (out / "notes.txt").read_text() == "mine"
        (out / "notes.txt").unlink()
    assert made == set(cli.PRODUCTS) - {"memory.jsonl", "memory.png"}


def test_the_vocabulary_of_an_overwritten_run_goes(corpus, pretrained, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert call(pretrain.main, monkeypatch, "--dataset", corpus, *TINY, "--output", out) == 0
    flags = ["--pretrained", pretrained, *SMALL, "--output", out, "--overwrite"]
    assert call(downstream.main, monkeypatch, *flags) == 0
    assert not (out / VOCABULARY).exists()


def test_a_picture_that_failed_is_drawn_when_the_run_goes_on(pretrained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    flags = ["--pretrained", pretrained, *SMALL, "--output", out]

    def full(*args):
        raise OSError(28, "No space left on device", "confusion_test.png")

    with monkeypatch.context() as patch:
        patch.setattr(report, "plot_confusion", full)
        assert call(downstream.main, patch, *flags) == 2
    said = capsys.readouterr()
    assert "confusion_test.png: No space left on device; mend that and go on with --resume" in said.err
    assert re.search(r"test +.*\d\.\d{4}", said.out)  # the measurement is told all the same
    assert (out / "predictions.npz").exists() and not (out / RESULTS).exists()
    before = (out / METRICS).read_text()
    assert call(downstream.main, monkeypatch, *flags, "--resume") == 0
    assert {RESULTS, "confusion_train.png", "confusion_test.png"} <= names(out)
    assert (out / METRICS).read_text() == before
    assert json.loads((out / RESULTS).read_text())["test"]["accuracy"] >= 0


def test_a_dry_run_of_labelled_texts_writes_nothing(corpus, tmp_path, monkeypatch):
    cache = Path(os.environ["XDG_CACHE_HOME"])
    flags = ["--dataset", corpus, *TINY, "--output", tmp_path / "run"]
    before = set(tmp_path.rglob("*"))
    assert call(pretrain.main, monkeypatch, *flags, "--dry-run") == 0
    assert set(tmp_path.rglob("*")) == before and not list(cache.rglob("*"))
    assert call(pretrain.main, monkeypatch, *flags) == 0
    assert list(cache.rglob("tokens/*.npz"))


def test_skip_grams_progress_and_epochs_tell_the_same_figure(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ProgressBar, "INTERVAL", -1.0)
    short = functools.partial(vectors.SpanStream, spans=1, steps_per_call=1)
    monkeypatch.setattr(vectors, "SpanStream", short)
    flags = ["--dataset", corpus, "--min-count", "1", "--dimensions", "4", "--epochs", "1"]
    assert call(vectors.main, monkeypatch, *flags, "--output", tmp_path / "run") == 0
    said = capsys.readouterr()
    (logged,) = [json.loads(line)["loss"] for line in (tmp_path / "run" / METRICS).read_text().splitlines()]
    shown = [float(figure) for figure in re.findall(r"loss (\d+\.\d+), ", said.err)]
    told = re.findall(r"loss (\d+\.\d+) a pair", said.out)
    assert told == [f"{logged:.4f}"]
    assert shown and all(abs(figure - logged) < 0.2 * logged for figure in shown)


@pytest.mark.parametrize("absent", ["resource", "fcntl"])
def test_what_a_system_lacks_is_done_without(monkeypatch, absent):
    """As on Windows; every command is imported anew, in a process of its own."""
    script = f"""
import sys
sys.modules[{absent!r}] = None
import elmo_jax, elmo_jax.embed_file
from experiments import downstream, embed, evaluate, neighbours, pretrain, vectors
from experiments.benchmark import __main__, runner
from experiments.compare import __main__
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_peak_that_is_not_known_is_not_told(monkeypatch):
    real = builtins.__import__

    def none(name, *args, **more):
        if name == "resource":
            raise ImportError(name)
        return real(name, *args, **more)

    told = memory.process_peak()
    monkeypatch.setattr(memory, "_STATUS", Path("/none"))
    assert abs(memory.process_peak() - told) < 2**30
    monkeypatch.setattr(builtins, "__import__", none)
    assert memory.process_peak() is None


def test_a_long_line_is_mixed_where_space_cannot_be_reserved(elmo, tmp_path, monkeypatch):
    text, layers = tmp_path / "in.txt", []
    text.write_text("the bank " * 20)
    monkeypatch.setattr(dump, "_LONG", 8)
    for name in ("one", "other"):
        made = dump.Dump(elmo, text, tmp_path / name, dump.DumpConfig(layers="average"))
        made.prepare(resume=False, overwrite=False)
        made.write()
        with dump.h5py.File(tmp_path / name) as file:
            layers.append(file["0"][...])
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert (layers[0] == layers[1]).all()


def test_what_cannot_be_gone_on_with_keeps_what_it_made(corpus, tmp_path, monkeypatch, capsys):
    _, flags = commands(corpus, None, tmp_path)[-1]
    flags = [*flags, "--output", tmp_path / "run"]
    assert call(vectors.main, monkeypatch, *flags) == 0
    for position in (tmp_path / "run").glob("checkpoints/*/position.json"):
        position.write_text(position.read_text() + " ")
    made = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.*") if path.is_file()}
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert call(vectors.main, monkeypatch, *flags, "--resume") == 2
    assert "every saved step is damaged" in capsys.readouterr().err
    assert {name: (tmp_path / "run" / name).read_bytes() for name in made} == made


@pytest.mark.parametrize("module", [downstream, vectors])
def test_a_folder_is_held_until_its_results_are_written(module, corpus, pretrained, tmp_path, monkeypatch):
    out, said = tmp_path / "run", []
    write = cli.write_results

    def watched(path, results):
        with pytest.raises(InputError, match="another run writes there") as told:
            Run.create(out, {}, monitor="loss", overwrite=True)
        said.append(told.value)
        write(path, results)

    monkeypatch.setattr(cli, "write_results", watched)
    flags = next(flags for command, flags in commands(corpus, pretrained, out) if command is module)
    assert call(module.main, monkeypatch, *flags, "--output", out) == 0 and len(said) == 1
    Run.create(out, {}, monitor="loss", overwrite=True).close()
