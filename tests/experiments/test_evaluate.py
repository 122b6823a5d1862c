"""Scores that evaluate prints and writes, also when it is stopped or its output pipe closes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
from lines import LINES

from elmo_jax.errors import InputError
from experiments import evaluate

# The models of these tests know few words.
pytestmark = pytest.mark.filterwarnings("ignore:.*unknown to the vocabulary:UserWarning")

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


def test_evaluate_prints_and_writes_the_scores(elmo, text, tmp_path, capsys, monkeypatch, refused):
    elmo.save_pretrained(tmp_path / "model")
    scores = tmp_path / "scores"
    assert tiny.call(evaluate.main, monkeypatch, tmp_path / "model", text, "--output", scores) == 0
    out = capsys.readouterr().out
    each = elmo.surprisal([line.split() for line in LINES if line])
    total = sum(a.sum(1) for a in each) / sum(a.shape[1] for a in each)
    assert f"perplexity {np.exp(total.mean()):.2f} (forward {np.exp(total[0]):.2f}" in out
    unknown = sum(word not in elmo.vocabulary.tokens for line in LINES for word in line.split())
    assert unknown > 0 and f"{unknown} of them (" in out
    records = [json.loads(line) for line in (scores / "scores.jsonl").read_text().splitlines()]
    assert [record["line"] for record in records] == [1, 3, 4, 5]
    np.testing.assert_allclose(records[0]["log_p_forward"], -each[0][0].sum(), rtol=1e-5)
    assert held(scores) == FILES
    text.write_text("\n \n")
    refused(
        evaluate.main, [tmp_path / "model", text, "--output", tmp_path / "out"], "no sentences; give a text"
    )
    assert not (tmp_path / "out").exists()


def test_scores_keep_the_least_likely_words_and_sentences(rng):
    scores, words, lines = evaluate._Scores(words_shown=7), [], []
    for i in range(300):
        nll = rng.exponential(size=(2, int(rng.integers(2, 9)))).astype(np.float32)
        tokens = [f"w{i}-{t}" for t in range(nll.shape[1] - 1)]
        scores.add("f", i + 1, tokens, nll)
        words += zip(((nll[0, :-1] + nll[1, 1:]) / 2).tolist(), tokens, strict=True)
        lines.append((float(nll.sum(dtype=np.float64)) / nll.shape[1], i + 1))
    assert [item[:2] for item in scores.words] == sorted(words, reverse=True)[:7]
    assert [(a, n) for a, _, n, *_ in scores.lines] == sorted(lines, reverse=True)[:5]
    assert scores.sentences == 300 and scores.tokens == len(words)


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
    Path("se").mkdir()
    for name in ("metrics.jsonl", "scores.jsonl.part"):  # as a kill before the last file leaves them
        (Path("se") / name).write_text("old")
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


def test_closed_output_pipe_ends_the_command_silently(call):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "experiments.evaluate", *call]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=ENV, check=False)
    os.close(write)
    assert done.returncode == 141 and done.stderr == ""  # as a shell reports SIGPIPE
    assert held("se") == FILES
    (record,) = map(json.loads, Path("se/metrics.jsonl").read_text().splitlines())
    assert record["event"] == "evaluate" and record["perplexity"] > 0
