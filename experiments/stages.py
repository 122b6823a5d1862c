"""Commands run one after the other in this process, each once: what is finished is left alone.

Nouns: a *stage* is a command with its settings, its output folder among them; its *work* is
a guess at its time beside the others', until stages of its *kind* were timed.
"""

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from elmo_jax.checkpoint import METRICS, RESULTS
from elmo_jax.errors import InputError
from elmo_jax.integrity import read_config, write_atomically
from experiments import cli


@dataclass(frozen=True)
class Stage:
    """A command to be run.

    Attributes:
        name: for people.
        kind: stages of one kind take as long, by their work.
        work: guessed.
        command: takes the settings.
        settings: the command's, with `output` and `resume` set.
    """

    name: str
    kind: str
    work: float
    command: Callable[[Any], Any]
    settings: Any

    @property
    def path(self) -> Path:
        """The stage's run folder."""
        return Path(self.settings.output)

    @property
    def finished(self) -> bool:
        """Whether a run with these very settings reached its end."""
        if not (self.path / RESULTS).is_file():
            return False
        saved, wanted = read_config(self.path), cli.settings_of(self.settings)
        return {name: saved.get(name) for name in wanted} == wanted

    def results(self) -> dict[str, Any]:
        """What the finished stage's ``results.json`` holds."""
        return read_json(self.path / RESULTS)

    def records(self) -> list[dict[str, Any]]:
        """What its ``metrics.jsonl`` holds."""
        return read_records(self.path)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The epochs' records of a run folder.

    Raises:
        InputError: they are missing or not JSON.
    """
    try:
        records = [json.loads(line) for line in (path / METRICS).read_text("utf-8").splitlines()]
        if not all(isinstance(record, dict) for record in records):
            raise ValueError("not an object a line")
        return records
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path / METRICS}: cannot be read ({error}); train that run again") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        InputError: it is missing or no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); remove it, and its run is finished anew"
        ) from None


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
    for i, stage in enumerate(stages):
        place = f"[{i + 1}/{len(stages)}] {stage.name}"
        if stage.finished:
            cli.say(f"{place}: finished before, {_left(stages[i + 1 :], stages, seconds)}")
            continue
        cli.say(f"{place}: runs, {_left(stages[i:], stages, seconds)}")
        began, before = time.perf_counter(), seconds.pop(stage.name, 0.0)
        log = output / "logs" / f"{stage.name.replace(' ', '-')}.txt"
        try:
            with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                stage.command(stage.settings)
        finally:  # the time of a part counts too, when the rest is run later
            seconds[stage.name] = round(before + time.perf_counter() - began, 1)
            _write_times(output, seconds)
        jax.clear_caches()  # the next stage compiles other programs; these only take room
    return seconds


def _left(waiting: Sequence[Stage], stages: Sequence[Stage], seconds: dict[str, float]) -> str:
    """How long the stages that wait will take, by what others took."""
    waiting = [stage for stage in waiting if not stage.finished]
    known = [(s, seconds[s.name] / s.work) for s in stages if s.name in seconds and s.finished]
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
    if not (output / METRICS).is_file():
        return {}
    records = read_records(output)
    try:
        return {record["stage"]: float(record["seconds"]) for record in records}
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{output / METRICS}: holds no times of stages; remove it") from None


def _write_times(output: Path, seconds: dict[str, float]) -> None:
    records = ({"event": "stage", "stage": name, "seconds": s} for name, s in seconds.items())
    write_atomically(output / METRICS, "".join(json.dumps(record) + "\n" for record in records))
