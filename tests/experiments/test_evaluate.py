"""Files of evaluate when it is stopped, and commands whose output pipe closes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elmo_jax.errors import InputError
from experiments import evaluate

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}
FILES = ["config.json", "metrics.jsonl", "scores.jsonl"]


@pytest.fixture
def call(elmo, tmp_path, monkeypatch):
    """The arguments of a call that writes into "se"."""
    monkeypatch.chdir(tmp_path)
    elmo.save_pretrained(tmp_path / "model")
    Path("in.txt").write_text("the bank rose .\nthe river bank\n")
    return ["model", "in.txt", "--output", "se"]


def held(folder):
    return sorted(path.name for path in Path(folder).iterdir()) if Path(folder).exists() else None


def stop(*_):
    raise InputError("no")


@pytest.mark.parametrize("method", ["add", "perplexities"])
@pytest.mark.parametrize("exists", [False, True])
def test_stopped_command_leaves_no_files(method, exists, call, monkeypatch):
    if exists:
        Path("se").mkdir()
        Path("se/mine").touch()
    monkeypatch.setattr(sys, "argv", ["x", *call])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate._Scores, method, stop)
        assert evaluate.main() == 2
    assert held("se") == (["mine"] if exists else None)
    assert evaluate.main() == 0
    assert held("se") == sorted([*FILES, *["mine"] * exists])


def test_killed_command_can_be_run_again(call, monkeypatch):
    part = Path("se/evaluate.part")  # as a kill between two moves leaves it
    part.mkdir(parents=True)
    Path("se/metrics.jsonl").write_text("old")
    (part / "scores.jsonl").write_text("old")
    monkeypatch.setattr(sys, "argv", ["x", *call])
    assert evaluate.main() == 0 and held("se") == FILES
    assert "old" not in Path("se/metrics.jsonl").read_text()


def test_existing_files_are_not_replaced(call, refused):
    for name in FILES:
        Path("se").mkdir(exist_ok=True)
        (Path("se") / name).write_text("mine")
        refused(evaluate.main, call, "se: holds a run or scores already")
        assert (Path("se") / name).read_text() == "mine" and held("se") == [name]
        (Path("se") / name).unlink()


def test_empty_output_is_refused(call, refused):
    before = held(".")
    refused(evaluate.main, [*call[:3], ""], "--output is empty; give it a value")
    assert held(".") == before


READERS = {  # what is called, and what it leaves when nobody reads what it prints
    "evaluate": (["evaluate", "model", "in.txt", "--output", "se"], ["se"]),
    "neighbours": (["neighbours", "bank", "in.txt", "--pretrained", "model", "--picture", "a.png"], []),
    "embed": (["embed", "in.txt", "out.h5", "--pretrained", "model"], []),
}


@pytest.mark.parametrize("name", READERS)
def test_closed_output_pipe_ends_a_command_silently(name, call):
    (command, *args), left = READERS[name]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{command}", *args],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        check=False,
    )
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""  # as a shell reports SIGPIPE
    assert held(".") == sorted(["in.txt", "model", *left])
    if left:
        assert held("se") == FILES
        (record,) = map(json.loads, Path("se/metrics.jsonl").read_text().splitlines())
        assert record["event"] == "evaluate" and record["perplexity"] > 0
