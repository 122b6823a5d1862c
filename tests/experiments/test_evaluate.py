"""What evaluate, neighbours and embed leave when they are stopped, or not read to the end."""

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


# Where it is stopped: in the scores, or before the first, second and third file gets its name.
@pytest.mark.parametrize("at", ["scores", 0, 1, 2])
@pytest.mark.parametrize("there", [False, True])
def test_a_stop_leaves_nothing_that_blocks_the_same_command(at, there, call, monkeypatch):
    moved, real = [], evaluate.move

    def stop(part, file):
        if len(moved) == at:
            raise InputError("no")
        moved.append(file)
        real(part, file)

    def stop_adding(*_):
        raise InputError("no")

    if there:
        Path("se").mkdir()
        Path("se/mine").touch()
    monkeypatch.setattr(sys, "argv", ["x", *call])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "move", stop)
        if at == "scores":
            patch.setattr(evaluate._Totals, "add", stop_adding)
        assert evaluate.main() == 2
    assert held("se") == (["mine"] if there else None)
    assert evaluate.main() == 0
    assert held("se") == sorted([*FILES, *["mine"] * there])


KILLED = {  # the moment, and what it leaves
    "before the figures": ("evaluate._Totals.perplexities = lambda self: os._exit(9)", ["scores.jsonl.part"]),
    "between two names": (
        "evaluate.move = lambda part, file: os._exit(9) if 'scores' in str(file) else part.rename(file)",
        ["config.json.part", "metrics.jsonl", "scores.jsonl.part"],
    ),
}


@pytest.mark.parametrize("moment", KILLED)
def test_a_kill_leaves_nothing_that_blocks_the_same_command(moment, call, monkeypatch):
    kill, left = KILLED[moment]
    code = f"""
import os, sys
from elmo_jax.errors import InputError
from experiments import evaluate
{kill}
sys.exit(evaluate.main())
"""
    assert subprocess.run([sys.executable, "-c", code, *call], env=ENV, check=False).returncode == 9
    assert held("se") == left
    monkeypatch.setattr(sys, "argv", ["x", *call])
    assert evaluate.main() == 0 and held("se") == FILES


def test_no_file_of_others_is_replaced(call, refused):
    for name in FILES:
        Path("se").mkdir(exist_ok=True)
        (Path("se") / name).write_text("mine")
        refused(evaluate.main, call, "se: holds a run or scores already")
        assert (Path("se") / name).read_text() == "mine" and held("se") == [name]
        (Path("se") / name).unlink()


def test_an_empty_output_is_refused(call, refused):
    before = held(".")
    refused(evaluate.main, [*call[:3], ""], "--output is empty; give it a value")
    assert held(".") == before


READERS = {  # what is called, and what it leaves when nobody reads what it prints
    "evaluate": (["evaluate", "model", "in.txt", "--output", "se"], ["se"]),
    "neighbours": (["neighbours", "bank", "in.txt", "--pretrained", "model", "--picture", "a.png"], []),
    "embed": (["embed", "in.txt", "out.h5", "--pretrained", "model"], []),
}


@pytest.mark.parametrize("name", READERS)
def test_a_reader_that_has_gone_is_one_line(name, call):
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
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert held(".") == sorted(["in.txt", "model", *left])
    if left:
        assert held("se") == FILES
        (record,) = map(json.loads, Path("se/metrics.jsonl").read_text().splitlines())
        assert record["event"] == "evaluate" and record["perplexity"] > 0
