"""Stages run once, in order, and go on where they were stopped."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from elmo_jax.errors import InputError
from experiments.common import cli
from experiments.common.cli import parse
from experiments.common.report import Page
from experiments.compare.stages import Stage, run_stages


@dataclass(frozen=True)
class Settings:
    output: str
    epochs: int = 1
    resume: bool = True
    overwrite: bool = False
    allow_config_change: bool = False


@pytest.fixture
def calls():
    return []


@pytest.fixture
def stages(tmp_path, calls):
    def command(settings):
        run = cli.create_run(settings, settings.output, monitor="loss")
        calls.append(Path(settings.output).name)
        print("chatter")
        if len(calls) == 2 and calls[1] == "b":
            raise KeyboardInterrupt
        cli.write_results(run.path, {})

    return [Stage(n, n, 1.0, command, Settings(str(tmp_path / n))) for n in "abc"]


def test_a_stopped_comparison_goes_on_and_redoes_nothing(stages, calls, tmp_path, capsys):
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, tmp_path)
    assert calls == ["a", "b"] and not stages[1].finished
    seconds = run_stages(stages, tmp_path)
    assert calls == ["a", "b", "b", "c"]
    assert set(seconds) == {"a", "b", "c"}
    assert run_stages(stages, tmp_path) == seconds and len(calls) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/3] a: runs, time left not known yet"
    assert lines[1] == "[2/3] b: runs, less than a minute left in all"
    assert lines[-1] == "[3/3] c: finished before, nothing left"
    assert "chatter" in (tmp_path / "logs" / "b.txt").read_text()


def test_other_settings_are_another_run_made_anew(stages, calls, tmp_path, capsys):
    run_stages(stages[:1], tmp_path)
    (tmp_path / "a" / "metrics.jsonl").write_text("trained\n")  # so that it is one to be resumed
    longer = replace(stages[0], settings=replace(stages[0].settings, epochs=2))
    assert stages[0].finished and not longer.finished
    (tmp_path / "a" / "results.json").unlink()  # one that was stopped is none to go on with either
    capsys.readouterr()
    for stage, was, told in ((longer, stages[0], "1 -> 2"), (stages[0], longer, "2 -> 1")):
        run_stages([stage], tmp_path)
        told = f"[1/1] a: runs anew, since it was begun with other settings (epochs {told}), time left"
        assert capsys.readouterr().out.startswith(told)
        assert stage.finished and not was.finished
        (tmp_path / "a" / "metrics.jsonl").write_text("trained\n" * 2)


def test_a_run_without_its_configuration_is_not_finished(stages, tmp_path):
    run_stages(stages[:1], tmp_path)
    (tmp_path / "a" / "config.json").unlink()
    assert not stages[0].finished


def test_what_is_made_from_something_else_now_is_made_anew(tmp_path, calls, capsys):
    texts = {"texts": "old"}

    def command(settings):
        run = cli.create_run(settings, settings.output, monitor="loss", **texts)
        calls.append((Path(settings.output).name, settings.overwrite))
        cli.write_results(run.path, {})
        run.close()

    source, other = (
        Stage(n, n, 1.0, command, Settings(str(tmp_path / n)), origins=lambda: texts) for n in "sa"
    )
    below = Stage("b", "b", 1.0, command, Settings(str(tmp_path / "b")), source, lambda: texts)
    run_stages([source, below, other], tmp_path)
    (tmp_path / "a" / "results.json").unlink()  # one that was stopped
    texts["texts"] = "new"
    assert not (source.finished or below.finished or other.finished)
    calls.clear()
    capsys.readouterr()
    run_stages([source, below, other], tmp_path)
    assert calls == [("s", True), ("b", True), ("a", True)]
    lines = capsys.readouterr().out.splitlines()
    assert all("runs anew, since the texts it was made from have changed, " in line for line in lines)
    assert source.finished and below.finished and other.finished
    (tmp_path / "s" / "results.json").unlink()
    assert not below.finished  # until its source is there again, and is what it was
    run_stages([source, below, other], tmp_path)
    assert calls[3:] == [("s", False)] and below.finished


def test_times_that_cannot_be_read_are_removed_and_no_run(stages, calls, tmp_path):
    run_stages(stages[:1], tmp_path)
    times = tmp_path / "metrics.jsonl"
    for text in ("x", "[1]\n", '{"stage": "a"}\n', '{"stage": "a", "seconds": NaN}\n', "[" * 100_000):
        times.write_text(text)
        with pytest.raises(InputError, match=r"metrics.jsonl: cannot be read as times of stages; remove it"):
            run_stages(stages[:1], tmp_path)
    times.unlink()
    assert run_stages(stages[:1], tmp_path) == {} and calls == ["a"]


def test_a_page_holds_its_pictures_and_escapes_its_text(tmp_path):
    (tmp_path / "figures").mkdir()
    picture = tmp_path / "figures" / "a b.png"
    picture.write_bytes(b"\x89PNG")
    page = Page("A < B", tmp_path / "page")
    page.add_text("run `x --y` & wait")
    page.add_table(["name", "n|m"], [["<b>", "1"]])
    page.add_figures((picture, "a curve", 'the "caption"'))
    page.write()
    html, markdown = ((tmp_path / f"page.{kind}").read_text() for kind in ("html", "md"))
    assert 'src="data:image/png;base64,iVBORw=="' in html and "http" not in html
    assert "<title>A &lt; B</title>" in html and "<code>x --y</code> &amp; wait" in html
    assert "<td>&lt;b&gt;</td>" in html and 'name="viewport"' in html
    assert 'alt="a curve"' in html and html.count("&quot;caption&quot;") == 1
    assert '![a curve](<figures/a b.png>)\n\nthe "caption"' in markdown
    assert "| name | n\\|m |" in markdown


def test_a_preset_changes_defaults_and_flags_win_over_it():
    from experiments.pretrain import PRESETS, PretrainConfig

    parsed = lambda *args: parse(PretrainConfig, "x", PRESETS, args)  # noqa: E731
    report = parsed("--preset", "report")
    assert report == PRESETS["report"]
    model = report.model
    assert (model.embedding, model.cells, model.layers, report.batch_size, report.epochs) == (
        150,
        150,
        2,
        32,
        10,
    )
    assert parsed("--preset=report", "--epochs", "3") == replace(report, epochs=3)
    assert json.dumps(cli.settings_of(report)) == json.dumps(cli.settings_of(replace(report, preset=None)))
