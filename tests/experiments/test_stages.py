"""Stages run once, in order, and continue where they were stopped."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from experiments.common import cli
from experiments.compare.__main__ import CompareConfig
from experiments.compare.stages import METHODS, Comparison, Stage, run_stages


@dataclass(frozen=True)
class Settings:
    output: str
    epochs: int = 1
    resume: bool = True
    overwrite: bool = False
    allow_config_change: bool = False


class Command:
    """A command that makes a run without training and records its calls.

    Attributes:
        calls: Name of the run folder and overwrite, for each call.
        inputs: Digests to record in config.json.
        interrupts: Number of calls to end with KeyboardInterrupt, after the first.
    """

    def __init__(self):
        self.calls, self.inputs, self.interrupts = [], {}, 0

    def __call__(self, settings):
        run = cli.create_run(settings, settings.output, monitor="loss", **self.inputs)
        self.calls.append((Path(settings.output).name, settings.overwrite))
        print("output of the command")
        if self.interrupts and len(self.calls) > 1:
            self.interrupts -= 1
            run.close()
            raise KeyboardInterrupt
        cli.write_results(run.path, {})
        run.close()


@pytest.fixture
def command():
    return Command()


@pytest.fixture
def stages(tmp_path, command):
    """Stages a, b and c."""
    return [
        Stage(name, 1.0, command, Settings(str(tmp_path / name)), lambda: command.inputs) for name in "abc"
    ]


def test_stopped_stages_continue_and_finished_ones_are_not_run_again(stages, command, tmp_path, capsys):
    command.interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, tmp_path)
    assert [name for name, _ in command.calls] == ["a", "b"] and not stages[1].is_finished
    seconds = run_stages(stages, tmp_path)
    assert command.calls[2:] == [("b", False), ("c", False)]
    assert set(seconds) == {"a", "b", "c"}
    assert run_stages(stages, tmp_path) == seconds and len(command.calls) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/3] a: running, remaining time unknown"
    assert lines[1] == "[2/3] b: running, less than a minute remaining"
    assert lines[-1] == "[3/3] c: already finished, nothing remaining"
    assert "output of the command" in (tmp_path / "logs" / "b.txt").read_text()


@pytest.mark.parametrize("is_finished", [True, False])
def test_other_settings_replace_the_run(stages, command, tmp_path, capsys, is_finished):
    run_stages(stages[:1], tmp_path)
    (tmp_path / "a" / "metrics.jsonl").write_text("{}\n")  # a run that has trained
    if not is_finished:
        (tmp_path / "a" / "results.json").unlink()
    longer = replace(stages[0], settings=replace(stages[0].settings, epochs=2))
    assert not longer.is_finished
    capsys.readouterr()
    run_stages([longer], tmp_path)
    line = "[1/1] a: running again because its settings have changed (epochs 1 -> 2), "
    assert capsys.readouterr().out.startswith(line)
    assert command.calls[-1] == ("a", True)
    assert longer.is_finished and not stages[0].is_finished


def test_other_inputs_replace_the_run(stages, command, tmp_path, capsys):
    command.inputs = {"texts": "old"}
    run_stages(stages, tmp_path)
    (tmp_path / "a" / "results.json").unlink()  # a stopped run is replaced too
    command.inputs = {"texts": "new"}
    assert not any(stage.is_finished for stage in stages)
    command.calls.clear()
    capsys.readouterr()
    run_stages(stages, tmp_path)
    assert command.calls == [("a", True), ("b", True), ("c", True)]
    assert capsys.readouterr().out.count("running again because its texts have changed, ") == 3
    assert all(stage.is_finished for stage in stages)


def test_run_without_configuration_is_unfinished(stages, tmp_path):
    run_stages(stages[:1], tmp_path)
    (tmp_path / "a" / "config.json").unlink()
    assert not stages[0].is_finished


@pytest.mark.parametrize("text", ["x", "[1]\n", '{"stage": "a"}\n'])
def test_unreadable_times_are_left_out(stages, command, tmp_path, text):
    run_stages(stages[:1], tmp_path)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert run_stages(stages[:1], tmp_path) == {} and len(command.calls) == 1


def test_only_the_language_model_is_fine_tuned(tmp_path):
    comparison = Comparison(CompareConfig(downstream="--finetune", output=str(tmp_path)))
    finetuned = {method for method in METHODS if comparison.classifier(method, 0).settings.source.finetune}
    assert finetuned == {method for method in METHODS if method.startswith("ELMo")}


def test_flags_of_the_other_vector_method_do_not_replace_a_run(tmp_path):
    plain = Comparison(CompareConfig(output=str(tmp_path))).sources
    config = CompareConfig(vectors="--exponent 1 --epochs 3", output=str(tmp_path))
    other = Comparison(config).sources
    assert other["svd"].settings.svd.exponent == 1 and other["sgns"].settings.epochs == 3
    assert other["sgns"].settings.svd == plain["sgns"].settings.svd
    assert other["svd"].settings.epochs == plain["svd"].settings.epochs


def test_data_set_is_loaded_once(tmp_path, monkeypatch):
    sources = Comparison(CompareConfig(output=str(tmp_path))).sources
    first = sources["svd"].inputs()
    monkeypatch.setattr("experiments.compare.stages.load_dataset", None)
    assert sources["sgns"].inputs() == sources["pretrain"].inputs() == first
