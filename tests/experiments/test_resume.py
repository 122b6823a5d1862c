"""The commands stopped by a signal and gone on with, and what they refuse to go on from."""

import json
import re
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import TINY, call, records

from elmo_jax.models import combiners
from elmo_jax.models.combiners import COMBINERS
from elmo_jax.training import loop
from elmo_jax.training.checkpoint import Run
from experiments import downstream, pretrain

pytestmark = pytest.mark.usefixtures("standard_promotion")
README = (Path(__file__).parents[2] / "README.md").read_text()
SMALL = "--hidden 4 --epochs 2 --batch-size 8 --classifier-layers 1 --steps-per-call 2".split()  # noqa: SIM905


def stop_at(monkeypatch, dispatch):
    """SIGTERM at a dispatch of the next run."""
    real, calls = loop.compile_steps, []

    def make(*args):
        run = real(*args)

        def step(*args):
            calls.append(1)
            if len(calls) == dispatch:
                signal.raise_signal(signal.SIGTERM)
            return run(*args)

        return step

    monkeypatch.setattr(loop, "compile_steps", make)


def assert_same(one, other):
    timeless = [
        [{k: v for k, v in r.items() if "second" not in k} for r in records(run)] for run in (one, other)
    ]
    assert timeless[0] == timeless[1]
    trees = (Run.open(run).restore_best(("params",)) for run in (one, other))
    jax.tree.map(np.testing.assert_array_equal, *trees)


@pytest.mark.parametrize("more", [[], ["--dtype", "bfloat16"]], ids=["float32", "bfloat16"])
def test_pretraining_goes_on_bit_by_bit(corpus, tmp_path, monkeypatch, more):
    flags = ["--dataset", corpus, *TINY, *more]
    assert call(pretrain.main, monkeypatch, *flags, "--output", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)  # in the second epoch
        assert call(pretrain.main, patch, *flags, "--output", tmp_path / "part") == 143
    again = [*flags, "--output", tmp_path / "part", "--resume", "--steps-per-call", "1"]
    assert call(pretrain.main, monkeypatch, *again) == 0
    assert_same(tmp_path / "whole", tmp_path / "part")


@pytest.mark.parametrize("more", [[], ["--finetune"]], ids=["frozen", "finetuned"])
def test_the_classifier_goes_on_bit_by_bit(pretrained, tmp_path, monkeypatch, more):
    flags = ["--pretrained", pretrained, *SMALL, *more]
    assert call(downstream.main, monkeypatch, *flags, "--output", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 4)
        assert call(downstream.main, patch, *flags, "--output", tmp_path / "part") == 143
    assert call(downstream.main, monkeypatch, *flags, "--output", tmp_path / "part", "--resume") == 0
    assert_same(tmp_path / "whole", tmp_path / "part")
    one, other = (json.loads((tmp_path / run / "results.json").read_text()) for run in ("whole", "part"))
    assert one["test"] == other["test"] and one["train"] == other["train"]


def test_readmes_combiner_runs_and_another_model_or_text_is_refused(
    pretrained, corpus, tmp_path, monkeypatch, capsys
):
    block = re.search(r"```python\n(class TopLayer.*?)```", README, re.DOTALL)
    assert block is not None
    names = {**vars(combiners)}
    try:
        exec(block.group(1), names)
        flags = ["--pretrained", pretrained, "--output", tmp_path / "down", *SMALL]
        assert call(downstream.main, monkeypatch, *flags, "--combiner", "top") == 0
    finally:
        COMBINERS.pop("top", None)
    assert call(downstream.main, monkeypatch, *flags, "--combiner", "top") == 2
    assert 'combiner "top" is unknown' in capsys.readouterr().err

    other = ["--dataset", corpus, *TINY, "--seed", "7", "--overwrite", "--output", pretrained]
    assert call(downstream.main, monkeypatch, *flags, "--overwrite") == 0
    assert call(pretrain.main, monkeypatch, *other) == 0
    assert call(downstream.main, monkeypatch, *flags, "--resume") == 2
    assert "model" in capsys.readouterr().err
    rows = (corpus / "train.csv").read_text().splitlines()
    (corpus / "train.csv").write_text("\n".join([*rows[1:], rows[0]]))
    assert call(downstream.main, monkeypatch, *flags, "--overwrite") == 2
    assert "was made from other texts" in capsys.readouterr().err
    assert (tmp_path / "down" / "results.json").exists()


def test_readmes_loop_trains():
    block = re.search(r"```python\n(import jax\n.*?train_step\n.*?)```", README, re.DOTALL)
    assert block is not None
    small = block.group(1).replace("BiLMConfig()", "BiLMConfig(embedding=4, cells=4)")
    names = {}
    exec(small.replace("dispatches(0, stream.steps_per_epoch)", "dispatches(0, 2)"), names)
    assert names["state"].step == 2 and float(names["sums"]["tokens"]) > 0


def test_readmes_commands_write_to_folders_of_their_own():
    lines = re.findall(r"python -m experiments\.(\w+)([^&\n#]*)", README.split("## Your own texts")[0])
    outputs = []
    for command, flags in lines:
        given = re.search(r"--output (\S+)", flags)
        default = "runs/pretrain" if command == "pretrain" else "runs/downstream-trainable"
        outputs.append(given.group(1) if given else default)
    assert len(outputs) == 4 and len(set(outputs)) == 4
