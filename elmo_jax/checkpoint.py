"""A run's folder: its configuration, its metrics, and its saved steps.

Nouns: a *run* is one training from its first to its last epoch, however often it was
stopped; its *position* is what the host must remember to go on: the step, the sums of the
epoch under way and the *records* of those that ended, one JSON line each.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from elmo_jax.errors import InputError
from elmo_jax.integrity import (
    CONFIG,
    binding,
    difference,
    digest,
    read_config,
    structure,
    write_atomically,
    write_config,
    writer_lock,
)
from elmo_jax.processes import agree, led
from elmo_jax.steps import Steps, check_kinds

METRICS, RESULTS, EVENTS, VOCABULARY = "metrics.jsonl", "results.json", "tensorboard", "vocab.txt"
_STEPS, _LOCK = "checkpoints", ".lock"
_OURS = {_LOCK, f"{CONFIG}.part"}  # what a crash may leave of a run that had not yet begun
_ORDER = {"seed"}  # of the batches alone, once training has begun
_PACE = {"optimizer.learning_rate", "optimizer.clip_norm"}  # after steps that were not finite


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps, the skipped ones among them.
        sums: of the epoch under way, added up in float64.
        seconds: spent in the epoch under way.
        records: of the epochs that ended.
        skipped: how many of the last steps, without a break, were skipped.
    """

    step: int = 0
    sums: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0

    @property
    def ended(self) -> bool:
        """Whether the last step was an epoch's last."""
        return bool(self.records) and self.records[-1]["step"] == self.step

    def to_json(self) -> dict[str, Any]:
        sums = {name: np.asarray(value).tolist() for name, value in self.sums.items()}
        return {**self.__dict__, "sums": sums}

    @classmethod
    def from_json(cls, data: Any, source: str) -> "Position":
        position = structure(cls, data, source)
        position.sums = {name: np.asarray(value, np.float64) for name, value in position.sums.items()}
        return position


class Run:
    """A run's folder, for the command that writes it and for those that read it.

    Args:
        path: the folder.
        monitor: the record's figure that is lowest at the best epoch.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = Run.create(Path(folder) / "run", {"seed": 1}, monitor="val_loss")
        ...     run.save({"w": np.ones(2, np.float32)}, Position(step=3))
        ...     run.close()
        ...     Run.open(run.path).restore_best()["w"].tolist()
        [1.0, 1.0]
    """

    def __init__(self, path: Path, monitor: str):
        self.path, self.monitor = path, monitor
        self.steps = Steps(path / _STEPS)
        self._lock = writer_lock(path / _LOCK)

    @classmethod
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        monitor: str,
        resume: bool = False,
        overwrite: bool = False,
        allow_change: bool = False,
        files: Mapping[str, str] | None = None,
    ) -> "Run":
        """Make the folder and write the configuration, or go on with what is there.

        The folder is locked against other writers until `close`, or the process's end.

        Args:
            path: the folder; a new one, unless `resume` or `overwrite`.
            config: written to ``config.json``; to resume a run that made something, what is
                `binding` in it must be what it was.
            monitor: the record's figure that is lowest at the best epoch.
            resume: go on with a run that is there; begin one if none is.
            overwrite: remove a run that is there.
            allow_change: to resume, the learning rate and the norm gradients are clipped to
                may change too, and between two epochs "seed", for the order of batches.
            files: names and texts to write beside, which must be the same to resume.

        Raises:
            InputError: the folder holds a run, or another's configuration, or is no folder,
                or another process writes to it.
        """
        made = led(lambda: cls._create(Path(path), config, monitor, resume, overwrite, allow_change, files))
        return made or cls(Path(path), monitor)

    @classmethod
    def _create(cls, path: Path, config: Mapping[str, Any], monitor: str, resume: bool, overwrite: bool,
                allow_change: bool, files: Mapping[str, str] | None) -> "Run":  # fmt: skip
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file; give --output a folder")
        config = {"monitor": monitor, **json.loads(json.dumps(config))}
        texts = {name: text.encode() for name, text in (files or {}).items()}
        digests = {name: digest(data) for name, data in texts.items()}
        try:
            run = cls._lock_folder(path, monitor)
            try:
                if (path / CONFIG).exists():
                    if resume and not run._made_nothing():
                        run._compare(config, texts, allow_change)
                    elif resume or overwrite:
                        run.clear()
                    else:
                        told = "holds a run; go on with --resume, replace it with --overwrite"
                        raise InputError(f"{path}: {told}")
                write_config(path, config, digests)
                for name, data in texts.items():
                    write_atomically(path / name, data)
                run.steps.tidy()
            except BaseException:
                run.close()
                raise
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); give another --output") from None
        return run

    @classmethod
    def _lock_folder(cls, path: Path, monitor: str) -> "Run":
        """The folder, made if need be, and no one else's."""
        path.mkdir(parents=True, exist_ok=True)
        if not (path / CONFIG).exists() and {p.name for p in path.iterdir()} - _OURS:
            raise InputError(f"{path}: is not empty and holds no run; give --output a new folder")
        run = cls(path, monitor)
        try:
            run._lock.acquire()
        except filelock.Timeout:
            told = "another run writes there; wait for it, or give another --output"
            raise InputError(f"{path}: {told}") from None
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """A run to read from.

        Raises:
            InputError: there is none.
        """
        monitor = read_config(path).get("monitor")
        if not isinstance(monitor, str):
            raise InputError(f"{path}: holds no run, but something exported; give a run's folder")
        return cls(path, monitor)

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return read_config(self.path)

    def _compare(self, config: Mapping[str, Any], texts: Mapping[str, bytes], allow_change: bool) -> None:
        """Refuse to go on with other settings or other texts than the run began with."""
        before = read_config(self.path)
        changed = binding(before, config)
        may = changed.keys() <= _ORDER | _PACE
        if changed and not (allow_change and may):
            told = "; ".join(f"{name} {text}" for name, text in changed.items())
            remedy = "use those to --resume" + (", or --allow-config-change" if may else "")
            raise InputError(f"{self.path}: was run with other settings ({told}); {remedy}")
        fewer = config.get("epochs", 0) < before.get("epochs", 0)
        for step in self.steps.whole() if fewer or changed.keys() & _ORDER else ():
            position = self._position(step)
            if changed.keys() & _ORDER and not position.ended:
                raise InputError(f"{self.path}: stopped within an epoch; seed may change after it")
            if fewer and config["epochs"] < (ran := len(position.records)):
                raise InputError(f"{self.path}: has run {ran} epochs; give --epochs that many")
            break
        for name, data in texts.items():
            if before["files"].get(name) != digest(data):
                told = difference(self.path / name, data)
                raise InputError(f"{self.path / name}: {told}; use the texts it was made from")

    def _made_nothing(self) -> bool:
        """Whether it ended before there was anything to go on with, as by a setting that cannot be."""
        files = (self.path / METRICS, self.path / RESULTS)
        return not (self.steps.saved() or any(f.exists() and f.stat().st_size for f in files))

    def clear(self) -> None:
        """Remove what a run wrote, and nothing else that may lie in the folder."""
        for folder in (_STEPS, EVENTS):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        for name in (RESULTS, METRICS, VOCABULARY, CONFIG):  # the last, since it makes the folder a run
            (self.path / name).unlink(missing_ok=True)

    def log(self, records: list[dict[str, Any]]) -> None:
        """Write ``metrics.jsonl`` anew: every record so far, a line each, or the file as it was."""
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        led(lambda: write_atomically(self.path / METRICS, "".join(lines)))

    def save(self, state: Any, position: Position) -> None:
        """Save a step, in the background; the best epoch and the newest two steps are kept.

        Raises:
            InputError: it, or the save before, cannot be written, or a number is not finite.
        """
        self.steps.save(position.step, state, position.to_json(), self._figures(position))

    def _figures(self, position: Position) -> dict[int, float]:
        """What epochs came to, by the step each ended at."""
        records = (record for record in position.records if {"step", self.monitor} <= record.keys())
        return {record["step"]: record[self.monitor] for record in records}

    def _position(self, step: int) -> Position:
        return Position.from_json(self.steps.position(step), f"{self.steps.path / str(step)}")

    def restore(self, template: Any) -> tuple[Any, Position] | None:
        """The newest whole step, or None if none was ever saved.

        Args:
            template: a pytree of the shapes and dtypes to restore.

        Raises:
            InputError: no step is whole, or it is not of these shapes and dtypes.
        """
        newest = led(lambda: next(self.steps.whole(set_aside=True), -1))
        step = agree(-1 if newest is None else newest)
        if step >= 0:
            check_kinds(self.steps.kinds(step), template, f"{self.steps.path / str(step)}")
            return self.steps.load(step, template), self._position(step)
        if self.steps.saved():
            told = "no saved step is whole; restore a copy, or begin anew with --overwrite"
            raise InputError(f"{self.path}: {told}")
        return None

    def restore_best(self, names: tuple[str, ...] = ()) -> Any:
        """What was saved at the best epoch's end; the newest step if no epoch ended.

        Args:
            names: the keys of the state to restore; all if empty.

        Raises:
            InputError: no step was saved, or none is whole.
        """
        whole = list(self.steps.whole())
        if not whole:
            told = "no saved step is whole; restore a copy, or train again"
            told = told if self.steps.saved() else "holds no saved step; let the training run reach one"
            raise InputError(f"{self.path}: {told}")
        figures = self._figures(self._position(whole[0]))
        measured = [step for step in whole if step in figures]  # on equal figures, the earliest
        best = min(measured, key=lambda step: (figures[step], step), default=whole[0])
        saved = self.steps.kinds(best)
        missing = set(names) - saved.keys()
        if missing:
            raise InputError(f"{self.steps.path / str(best)}: holds no {', '.join(missing)}; train again")
        return self.steps.load(best, {name: saved[name] for name in names or saved})

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            InputError: it failed.
        """
        self.steps.wait()

    def close(self) -> None:
        """Wait for the save under way, and let others write to the folder."""
        try:
            self.steps.close()
        finally:
            self._lock.release()
