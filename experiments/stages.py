"""Commands run one after the other in this process, each once: what is finished is left alone.

Nouns: a *stage* is a command with its settings, its output folder among them; its *work* is
a guess at its time beside the others', until stages of its *kind* were timed; its *origins*
are digests of what it is made from.
"""

import contextlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elmo_jax.checkpoint import METRICS, RESULTS
from elmo_jax.errors import InputError
from elmo_jax.integrity import CONFIG, PACING, PLACES, changes, read_config, write_atomically
from experiments import cli

_TOLD = {"texts": "the texts it was made from have changed", "model": "what it builds on was made anew"}


@dataclass(frozen=True)
class Stage:
    """A command to be run.

    Attributes:
        name: for people.
        kind: stages of one kind take as long, by their work.
        work: guessed.
        command: takes the settings.
        settings: the command's, with `output`, `resume` and `overwrite`.
        source: the stage that makes what this one builds on, if one does.
        origins: by their names in ``config.json``, as they are now; called only if the source
            is finished.
    """

    name: str
    kind: str
    work: float
    command: Callable[[Any], Any]
    settings: Any
    source: "Stage | None" = None
    origins: Callable[[], Mapping[str, str]] = dict

    @property
    def path(self) -> Path:
        """The stage's run folder."""
        return Path(self.settings.output)

    @property
    def finished(self) -> bool:
        """Whether a run with these very settings, made from what there is now, reached its end."""
        if not (self.path / RESULTS).is_file() or not (self.source is None or self.source.finished):
            return False
        return (self.path / CONFIG).is_file() and self.outdated is None

    @property
    def outdated(self) -> str | None:
        """Why the run that is there is none to go on with, if it is of other settings or origins than now.

        The source must be finished. Epochs count as any setting does: a schedule spans all of
        them, so that a run of two and two more is not one of four.
        """
        if not (self.path / CONFIG).is_file():
            return None
        saved, wanted = read_config(self.path), cli.settings_of(self.settings)
        known = {name: value for name, value in saved.items() if name in wanted}
        changed = changes(known, wanted)
        if other := [f"{name} {changed[name]}" for name in changed if name not in PLACES | PACING]:
            return f"it was begun with other settings ({'; '.join(other)})"
        told = [_TOLD[name] for name, now in self.origins().items() if saved.get(name) != now]
        return ", and ".join(told) or None

    def run(self, anew: bool) -> None:
        """Call the command, to replace what is there or to go on with it."""
        self.command(replace(self.settings, resume=not anew, overwrite=anew))


def run_stages(stages: Sequence[Stage], output: Path) -> dict[str, float]:
    """Run what is not finished, in order, a line a stage; their own output goes to files.

    Args:
        stages: each may use what those before it made.
        output: the folder for ``metrics.jsonl``, a line a stage, and the stages' output.

    Returns:
        Seconds by stage, of those that were run here now or earlier.
    """
    (output / "logs").mkdir(parents=True, exist_ok=True)
    seconds = _read_times(output)
    done = {stage.name for stage in stages if stage.finished}
    for i, stage in enumerate(stages):
        place = f"[{i + 1}/{len(stages)}] {stage.name}"
        if stage.finished:
            done.add(stage.name)  # perhaps not before its source was made anew, and came out the same
            cli.say(f"{place}: finished before, {_left(stages[i + 1 :], stages, seconds, done)}")
            continue
        done.discard(stage.name)
        why = stage.outdated
        runs = "runs" if why is None else f"runs anew, since {why}"
        cli.say(f"{place}: {runs}, {_left(stages[i:], stages, seconds, done)}")
        began, before = time.perf_counter(), seconds.pop(stage.name, 0.0) if why is None else 0.0
        log = output / "logs" / f"{stage.name.replace(' ', '-')}.txt"
        try:
            with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                stage.run(anew=why is not None)
        finally:  # the time of a part counts too, when the rest is run later
            seconds[stage.name] = round(before + time.perf_counter() - began, 1)
            _write_times(output, seconds)
        done.add(stage.name)
        jax.clear_caches()  # the next stage compiles other programs; these only take room
    return seconds


def _left(
    waiting: Sequence[Stage], stages: Sequence[Stage], seconds: dict[str, float], done: Collection[str]
) -> str:
    """How long the stages that wait will take, by what those that are done took."""
    waiting = [stage for stage in waiting if stage.name not in done]
    known = [(s, seconds[s.name] / s.work) for s in stages if s.name in seconds and s.name in done]
    if not waiting:
        return "nothing left"
    if not known:
        return "time left not known yet"
    paces = {
        kind: np.mean([pace for s, pace in known if s.kind == kind]) for kind in {s.kind for s, _ in known}
    }
    overall = np.mean(list(paces.values()))
    minutes = sum(float(paces.get(s.kind, overall)) * s.work for s in waiting) / 60
    return f"about {minutes:.0f} min left in all" if minutes >= 1 else "less than a minute left in all"


def _read_times(output: Path) -> dict[str, float]:
    path = output / METRICS
    if not path.is_file():
        return {}
    try:
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        seconds = {str(record["stage"]): float(record["seconds"]) for record in records}
        if not all(0 <= x < float("inf") for x in seconds.values()):
            raise ValueError
        return seconds
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        told = "cannot be read as times of stages; remove it, the stages keep theirs"
        raise InputError(f"{path}: {told}") from None


def _write_times(output: Path, seconds: dict[str, float]) -> None:
    records = ({"event": "stage", "stage": name, "seconds": s} for name, s in seconds.items())
    write_atomically(output / METRICS, "".join(json.dumps(record) + "\n" for record in records))
