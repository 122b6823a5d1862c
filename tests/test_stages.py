"""Stages run once, in order, and go on where they were stopped."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from elmo_jax.page import Page
from experiments import claims, cli
from experiments.flags import parse
from experiments.stages import Stage, run_stages


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


def test_another_setting_is_another_run(stages, calls, tmp_path):
    run_stages(stages[:1], tmp_path)
    assert stages[0].finished
    longer = replace(stages[0], settings=replace(stages[0].settings, epochs=2))
    assert not longer.finished
    run_stages([longer], tmp_path)
    assert longer.finished and not stages[0].finished


def test_a_page_holds_its_pictures_and_escapes_its_text(tmp_path):
    (tmp_path / "figures").mkdir()
    picture = tmp_path / "figures" / "a b.png"
    picture.write_bytes(b"\x89PNG")
    page = Page("A < B")
    page.text("run `x --y` & wait")
    page.table(["name", "n|m"], [["<b>", "1"]])
    page.figures((picture, 'the "caption"'))
    page.write(tmp_path / "page")
    html, markdown = ((tmp_path / f"page.{kind}").read_text() for kind in ("html", "md"))
    assert 'src="data:image/png;base64,iVBORw=="' in html and "http" not in html
    assert "<title>A &lt; B</title>" in html and "<code>x --y</code> &amp; wait" in html
    assert "<td>&lt;b&gt;</td>" in html and 'name="viewport"' in html
    assert "](<figures/a b.png>)" in markdown and "| name | n\\|m |" in markdown


def test_sentences_say_what_the_figures_show():
    leads = {"ELMo, trainable λ": (0.8, 0.9), "SGNS": (0.7, 0.88), "SVD": (0.6, 0.87)}
    curves = {name: [{1.0: low, 100.0: high}] for name, (low, high) in leads.items()}
    said = claims.efficiency_sentence(curves)
    assert "+0.100" in said and "+0.020" in said and "larger with few labels than with all" in said
    turned = {**curves, "SGNS": [{1.0: 0.95, 100.0: 0.88}]}
    said = claims.efficiency_sentence(turned)
    assert "-0.150" in said and "no larger with few labels" in said
    said = claims.convergence_sentence(curves)
    assert "SGNS is at its best, 0.880, after 100 updates; ELMo reaches that after 100" in said
    assert "ELMo reaches that never" in claims.convergence_sentence(
        {**curves, "SVD": [{1.0: 0.6, 100.0: 0.99}]}
    )


def test_context_is_told_from_vectors_that_know_it_and_only_from_those(rng):
    words = ["bank", "match"] * 60
    senses = [f"{w}/{rng.integers(2)}" for w in words]
    part = claims.Occurrences([], [], words, senses)
    known = {s: rng.normal(size=8) for s in sorted(set(senses))}
    vectors = rng.normal(size=(120, 8)) * 0.1 + [known[s] for s in senses]
    static = rng.normal(size=(120, 8)) * 0 + [[w == "bank"] * 8 for w in words]
    assert claims.probe(vectors[:60], senses[:60], vectors[60:], senses[60:]) > 0.95
    floor = claims.commonest(
        replace(part, words=words[:60], senses=senses[:60]),
        replace(part, words=words[60:], senses=senses[60:]),
    )
    assert claims.probe(static[:60], senses[:60], static[60:], senses[60:]) == pytest.approx(floor)


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
