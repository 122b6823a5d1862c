"""A run's folder: its configuration, its metrics, and its saved steps.

Nouns: a *run* is one training from its first to its last epoch, however often it was
stopped; its *position* is what the host must remember to go on: the step, the sums of the
epoch under way and the *records* of those that ended, one JSON line each.

The saved steps of a run: written in the background, proven when read.

Nouns: a *step* is a folder with the state as Orbax writes it, a position, and a manifest;
it is *whole* if every file is as its manifest has it. The folder gets its name once the
manifest stands in it, so one that a crash cut short is never taken for a step.
"""

import contextlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from elmo_jax.errors import InputError
from elmo_jax.parallel import is_first_process, max_over_processes, run_on_all, run_on_first
from elmo_jax.storage.files import (
    CONFIG,
    binding,
    damage,
    difference,
    digest,
    move,
    read_config,
    structure,
    write_atomically,
    write_config,
    write_manifest,
    writer_lock,
)

KEEP = 2  # newest steps kept beside the best
_STATE, _POSITION = "state", "position.json"
_PART, _DAMAGED = ".part", ".damaged"
_SLOWER = "lower --learning-rate or --clip-norm"
_ROOM = 2**24  # bytes to leave free beside a saved state, for all that is small


class StepStore:
    """The folder of a run's saved steps.

    Args:
        path: the folder; made by the first save.

    Attributes:
        remedy: of numbers that are not finite, where a command has other flags than training has.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     steps = StepStore(Path(folder) / "steps")
        ...     for step in (3, 6, 9, 12):
        ...         steps.save(step, {"w": jnp.ones(2)}, {"step": step}, {3: 1.5, 6: 0.5})
        ...     steps.close()
        ...     steps.saved(), [steps.position(step)["step"] for step in steps.whole()]
        ([6, 9, 12], [12, 9, 6])
    """

    def __init__(self, path: Path):
        self.path = path.absolute()
        self.remedy: str | None = None
        self._checked: dict[int, bool] = {}
        self._saving: tuple[int, Future[None]] | None = None
        self._saver: ocp.AsyncCheckpointer | None = None
        self._background = ThreadPoolExecutor(1)
        # Orbax narrates every save, and a save's failure, which is reported here in one line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    def saved(self) -> list[int]:
        """The steps there are, in order, whole or not."""
        if not self.path.is_dir():
            return []
        return sorted(int(p.name) for p in self.path.iterdir() if re.fullmatch(r"0|[1-9]\d{0,17}", p.name))

    def slower(self) -> str:
        """What to do where training was not finite, once the save under way is done."""
        self.wait()
        if self.remedy is not None:
            return self.remedy
        saved = self.saved()
        if not saved:
            return f"{_SLOWER}; no step was saved yet, begin anew with --overwrite"
        return f"{_SLOWER}; step {saved[-1]} is saved, go on with --resume --allow-config-change"

    def tidy(self) -> None:
        """Remove what saves that a crash cut short have left."""
        for part in self.path.glob(f"*{_PART}"):
            shutil.rmtree(part, ignore_errors=True)

    def save(self, step: int, state: Any, position: Any, figures: Mapping[int, float]) -> None:
        """Copy a state and write it in the background, once the save before is done.

        Args:
            step: later than every saved one.
            state: a pytree of arrays, which may be donated once this returns.
            position: JSON.
            figures: of steps; the one of the lowest is kept, and the newest two.

        Raises:
            InputError: the disk is full, this save or the one before failed, or the state
                holds a number that is not finite; the steps before are as they were.
        """
        self.wait()
        if not _finite(state):
            raise InputError(
                f"{self.path}: step {step} holds numbers that are not finite, and is not saved; "
                f"{self.remedy or _SLOWER}"
            )
        run_on_first(lambda: self._begin(step, state, position))
        with self._reported(step):
            self._saver = self._saver or ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
            with _quiet():
                args = ocp.args.PyTreeSave(jax.tree.map(_on_host, state))
                self._saver.save(self.path / f"{step}{_PART}" / _STATE, args=args)
        self._saving = step, self._background.submit(self._finish, step, self._saver, dict(figures))

    def _begin(self, step: int, state: Any, position: Any) -> None:
        """Make the step's folder, and write the position into it."""
        if step <= max(self.saved(), default=-1):
            raise ValueError(f"step {step} is not later than step {self.saved()[-1]}, which is saved")
        part = self.path / f"{step}{_PART}"
        with self._reported(step):
            self._make_room(state)
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            (part / _POSITION).write_text(json.dumps(position, allow_nan=False))

    def _finish(self, step: int, saver: ocp.AsyncCheckpointer, figures: dict[int, float]) -> None:
        """Give a step its manifest and then its name, and only then remove what is not kept."""
        saver.wait_until_finished()
        if not is_first_process():
            return
        part = self.path / f"{step}{_PART}"
        write_manifest(part)
        move(part, self.path / str(step))
        steps = self.saved()
        best = min((s for s in steps if s in figures), key=lambda s: figures[s], default=step)
        for old in set(steps[:-KEEP]) - {best}:
            part = (self.path / str(old)).rename(self.path / f"{old}{_PART}")
            shutil.rmtree(part, ignore_errors=True)

    def _make_room(self, state: Any) -> None:
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _ROOM
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise OSError(f"{free / 1e6:.0f} MB are free, {needed / 1e6:.0f} MB needed")

    @contextlib.contextmanager
    def _reported(self, step: int) -> Iterator[None]:
        """Tell in one line that a step could not be saved, and make room again."""
        try:
            yield
        except (OSError, ValueError) as error:  # Orbax hands on what its storage says as the latter
            # What Orbax still writes there meanwhile is removed when the run goes on.
            shutil.rmtree(self.path / f"{step}{_PART}", ignore_errors=True)
            number = re.search(r"os_error_code='(\d+)'", str(error))
            reason = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or error
            raise InputError(
                f"{self.path / str(step)}: could not be saved ({reason}); the steps before are kept: make "
                "room and go on with --resume"
            ) from error

    def wait(self) -> None:
        """Wait for the save under way.

        Raises:
            InputError: it failed.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            run_on_all(lambda: self._written(*saving))

    def _written(self, step: int, saving: Future[None]) -> None:
        with self._reported(step):
            saving.result()

    def whole(self, set_aside: bool = False) -> Iterator[int]:
        """The whole steps, newest first; those passed over are named, and set aside if asked."""
        damaged = []
        for step in reversed(self.saved()):
            if step not in self._checked:
                wrong = damage(self.path / str(step))
                self._checked[step] = wrong is None
                if wrong:
                    warnings.warn(f"{self.path / str(step)}: {wrong}; this step is not used", stacklevel=3)
            if not self._checked[step]:
                damaged.append(step)
                continue
            while set_aside and damaged:  # only now that there is another to go on from
                old = self.path / str(damaged.pop())
                shutil.rmtree(f"{old}{_DAMAGED}", ignore_errors=True)
                old.rename(f"{old}{_DAMAGED}")
            yield step

    def position(self, step: int) -> Any:
        """The position of a whole step."""
        path = self.path / str(step) / _POSITION
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path}: cannot be read ({error}); train again") from None

    def kinds(self, step: int) -> Any:
        """The state of a whole step as shapes and dtypes, in nested dictionaries."""
        with _quiet(), self._reader(step) as reader:
            saved: Any = reader.metadata(self.path / str(step) / _STATE).item_metadata
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), saved.tree)

    def load(self, step: int, template: Any) -> Any:
        """The state of a whole step, or the part of it that the template asks for.

        Args:
            step: a whole step.
            template: of arrays, or of their shapes and dtypes, and places if it is not a new array's.
        """
        new = jnp.zeros(()).sharding

        def placed_like(leaf: Any) -> jax.ShapeDtypeStruct:
            place = getattr(leaf, "sharding", None) or new
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

        abstract = jax.tree.map(placed_like, template)
        placed = ocp.checkpoint_utils.construct_restore_args(abstract)  # here, not where they were saved
        args = ocp.args.PyTreeRestore(abstract, restore_args=placed, partial_restore=True)
        with _quiet(), self._reader(step) as reader:
            return reader.restore(self.path / str(step) / _STATE, args=args)

    @contextlib.contextmanager
    def _reader(self, step: int) -> Iterator[ocp.Checkpointer]:
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                yield reader
        except Exception as error:  # whole, and yet not readable: another version's, or never a step
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.path / str(step)}: cannot be restored ({reason}); train again"
            ) from error

    def close(self) -> None:
        """Wait for the save under way, and let go of threads and files."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self._saver is not None:
                self._saver.close()


def check_kinds(saved: Any, enabled: Any, source: str) -> None:
    """Every array of the one there in the other, of the same shape and dtype, and no other.

    Raises:
        InputError: the first that is not, as it is and as it should be.

    Example:
        >>> check_kinds({"w": jnp.zeros(2)}, {"w": jnp.zeros(3)}, "run/5")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        elmo_jax.errors.InputError: run/5: w is float32 [2] there, but float32 [3] is asked for; ...
    """
    have, want = (
        {
            name: f"{leaf.dtype} {list(leaf.shape)}"
            for name, leaf in ocp.tree.to_flat_dict(tree, sep="/").items()
        }
        for tree in (saved, enabled)
    )
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise InputError(
                f"{source}: {name} is {have.get(name, 'missing')} there, but "
                f"{want.get(name, 'none')} is asked for; use the settings and texts it was saved with"
            )


@jax.jit
def _finite_on_device(floats: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.array([jnp.isfinite(a).all() for a in floats]))


def _finite(state: Any) -> bool:
    floats = [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.inexact)]
    return bool(_finite_on_device(floats))


def _on_host(array: Any) -> Any:
    """A view of an array, if all of it can be had in this process; Orbax copies it.

    For arrays on devices Orbax counts the bytes it writes, and every count leaks some 30 KB.
    """
    spread = isinstance(array, jax.Array) and not (array.is_fully_replicated or array.is_fully_addressable)
    return array if spread else np.asarray(array)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's advice about topologies, which a user cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


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
        self.steps = StepStore(path / _STEPS)
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
        made = run_on_first(
            lambda: cls._create(Path(path), config, monitor, resume, overwrite, allow_change, files)
        )
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
        run_on_first(lambda: write_atomically(self.path / METRICS, "".join(lines)))

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
        newest = run_on_first(lambda: next(self.steps.whole(set_aside=True), -1))
        step = max_over_processes(-1 if newest is None else newest)
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
