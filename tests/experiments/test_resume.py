"""Commands stopped by a signal and continued, and runs they refuse to continue."""

import json
import signal

import jax
import numpy as np
import pytest
from tiny import TINY, call, records

from elmo_jax.training import loop
from elmo_jax.training.checkpoint import Run
from experiments import downstream, pretrain

pytestmark = pytest.mark.usefixtures("standard_promotion")
SMALL = "--hidden 4 --epochs 2 --batch-size 8 --classifier-layers 1 --steps-per-call 2".split()  # noqa: SIM905


def stop_at(monkeypatch, call_number):
    """Send SIGTERM at a multi-step call of the next run."""
    real, calls = loop.compile_steps, []

    def compile_steps(*args):
        run = real(*args)

        def run_steps(*args):
            calls.append(1)
            if len(calls) == call_number:
                signal.raise_signal(signal.SIGTERM)
            return run(*args)

        return run_steps

    monkeypatch.setattr(loop, "compile_steps", compile_steps)


def assert_same_run(one, other):
    without_times = [
        [{k: v for k, v in r.items() if "second" not in k} for r in records(run)] for run in (one, other)
    ]
    assert without_times[0] == without_times[1]
    trees = (Run.open(run).restore_best(("params",)) for run in (one, other))
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_resumed_pretraining_equals_an_uninterrupted_run(trained, tmp_path, monkeypatch):
    run, _ = trained
    flags = ["--dataset", run.parent / "data", *TINY, "--output", tmp_path / "part"]
    with monkeypatch.context() as patch:
        stop_at(patch, 4)  # in the second epoch
        assert call(pretrain.main, patch, *flags) == 143
    assert call(pretrain.main, monkeypatch, *flags, "--resume", "--steps-per-call", "1") == 0
    assert_same_run(run, tmp_path / "part")


def test_resumed_finetuning_equals_an_uninterrupted_run_and_another_model_is_refused(
    pretrained, corpus, tmp_path, monkeypatch, capsys
):
    whole, part = tmp_path / "whole", tmp_path / "part"
    flags = ["--pretrained", pretrained, *SMALL, "--finetune"]
    assert call(downstream.main, monkeypatch, *flags, "--output", whole) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert call(downstream.main, patch, *flags, "--output", part) == 143
    assert call(downstream.main, monkeypatch, *flags, "--output", part, "--resume") == 0
    assert_same_run(whole, part)
    one, other = (json.loads((run / "results.json").read_text()) for run in (whole, part))
    assert one["test"] == other["test"] and one["train"] == other["train"]

    other = ["--dataset", corpus, *TINY, "--epochs", "1", "--seed", "7", "--output", pretrained]
    assert call(pretrain.main, monkeypatch, *other, "--overwrite") == 0
    assert call(downstream.main, monkeypatch, *flags, "--output", part, "--resume") == 2
    assert "model" in capsys.readouterr().err
    rows = (corpus / "train.csv").read_text().splitlines()
    (corpus / "train.csv").write_text("\n".join([*rows[1:], rows[0]]))
    assert call(downstream.main, monkeypatch, *flags, "--output", part, "--overwrite") == 2
    assert "texts of its data set have changed" in capsys.readouterr().err
    assert (part / "results.json").exists()
