"""The folder of a training run: configuration, metrics and saved steps.

A run is one training from its first to its last epoch, however often it was stopped and resumed. A saved
step is a folder with the state as Orbax writes it, the position in training, and a manifest of digests. It
gets its name only when its manifest is written, so a save that a crash cut short never counts as a step.
"""

import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import filelock
import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import orbax.checkpoint as ocp
from msgspec import Meta

from elmo_jax._moved import renamed_arguments
from elmo_jax.errors import InputError, NotFiniteError
from elmo_jax.parallel import is_first_process, max_over_processes, run_on_all, run_on_first
from elmo_jax.storage.files import (
    CONFIG,
    digest,
    find_damage,
    move,
    read_config,
    write_atomically,
    write_config,
    write_manifest,
    writer_lock,
)

METRICS, RESULTS, EVENTS, VOCABULARY = "metrics.jsonl", "results.json", "tensorboard", "vocab.txt"
PACING = {"save_every", "steps_per_call"}  # settings that do not affect the results
_DIGESTS = {"texts", "model"}  # settings that hold digests of inputs
_FREE = {"output", "epochs", "files"} | PACING  # may change when a run is resumed
_BETWEEN_EPOCHS = {"seed"}  # may change if the run stopped between epochs and the caller allows it
_AFTER_DIVERGENCE = {"optimizer.learning_rate", "optimizer.clip_norm"}  # may change if the caller allows it

_STEPS, _LOCK, _STATE, _POSITION = "checkpoints", ".lock", "state", "position.json"
_PART, _DAMAGED = ".part", ".damaged"
_KEPT_STEPS = 2  # number of newest steps to keep, besides the best epoch
_SPARE_BYTES = 2**24  # disk space needed beside a saved state


@dataclass
class Position:
    """Progress of a run.

    Attributes:
        step: Optimizer steps, skipped ones included.
        sums: Metrics of the current epoch, summed in float64.
        seconds: Time spent in the current epoch.
        records: Records of the finished epochs, as in ``metrics.jsonl``.
        skipped: Number of most recent steps that were skipped in a row.
    """

    step: Annotated[int, Meta(ge=0)] = 0
    sums: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: Annotated[int, Meta(ge=0)] = 0


class _Record(msgspec.Struct):
    """Fields that every epoch record has; a record may have more."""

    epoch: Annotated[int, Meta(ge=1)]
    step: Annotated[int, Meta(ge=1)]


class StepStore:
    """The saved steps of a run, written in the background and checked when they are read.

    Args:
        path: Folder of the steps; the first save creates it.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     steps = StepStore(Path(folder) / "steps")
        ...     for step in (3, 6, 9, 12):
        ...         steps.save({"w": jnp.ones(2)}, Position(step), {3: 1.5, 6: 0.5})
        ...     steps.close()
        ...     steps.saved(), [steps.position(step).step for step in steps.valid()]
        ([6, 9, 12], [12, 9, 6])
    """

    def __init__(self, path: Path):
        self.path = path.absolute()
        self._is_valid: dict[int, bool] = {}
        self._saving: tuple[int, Future[None]] | None = None
        self._saver: ocp.AsyncCheckpointer | None = None
        self._background = ThreadPoolExecutor(1)
        # Orbax logs every save, and a failed one with a traceback; errors are reported here in one line.
        logging.getLogger("absl").setLevel(logging.CRITICAL)

    def saved(self) -> list[int]:
        """Return all saved steps in order, damaged ones included."""
        if not self.path.is_dir():
            return []
        return sorted(int(p.name) for p in self.path.iterdir() if re.fullmatch(r"0|[1-9]\d{0,17}", p.name))

    def valid(self) -> Iterator[int]:
        """Iterate over the undamaged steps, newest first, with a warning for each damaged one."""
        for step in reversed(self.saved()):
            path = self.path / str(step)
            if step not in self._is_valid:
                damage = find_damage(path) or self._find_wrong_position(step)
                self._is_valid[step] = damage is None
                if damage:
                    warnings.warn(f"{path}: {damage}; this step is not used", stacklevel=3)
            if self._is_valid[step]:
                yield step

    def newest_valid(self) -> int:
        """Rename the damaged steps after the newest undamaged one and return it; -1 if there is none."""
        newest = next(self.valid(), -1)
        for step in self.saved() if newest >= 0 else ():
            if step > newest:
                path = self.path / str(step)
                shutil.rmtree(f"{path}{_DAMAGED}", ignore_errors=True)
                path.rename(f"{path}{_DAMAGED}")
        return newest

    def save(self, state: Any, position: Position, figures: Mapping[int, float]) -> None:
        """Copy a state and write it in the background, after the previous save has finished.

        Args:
            state: Pytree of arrays; they may be donated once this returns.
            position: Progress to save with the state; its step must be later than every saved one.
            figures: Monitored figure by step. The step with the lowest figure and the newest two are kept.

        Raises:
            InputError: This save or the previous one failed, as on a full disk. Earlier steps are kept.
            NotFiniteError: The state contains a number that is not finite.
        """
        step, previous = position.step, self.last_saved()
        if not _is_finite(state):
            raise NotFiniteError(f"{self.path}: step {step} has numbers that are not finite", previous)
        if previous is not None and step <= previous:
            raise ValueError(f"step {step} is not later than step {previous}, which is saved")
        with self._one_line_errors(step), _no_warnings():
            run_on_first(lambda: self._begin(state, position))
            self._saver = self._saver or ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False))
            args = ocp.args.PyTreeSave(jax.tree.map(_view_on_host, state))
            self._saver.save(self.path / f"{step}{_PART}" / _STATE, args=args)
        self._saving = step, self._background.submit(self._finish, step, self._saver, dict(figures))

    def _begin(self, state: Any, position: Position) -> None:
        """Check the free space, make the folder of a step and write its position."""
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) + _SPARE_BYTES
        if (free := self._free_bytes()) < needed:
            raise OSError(f"{free / 1e6:.0f} MB are free, {needed / 1e6:.0f} MB needed")
        part = self.path / f"{position.step}{_PART}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        (part / _POSITION).write_text(
            json.dumps(asdict(position), allow_nan=False, default=np.ndarray.tolist)
        )

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self.path.parent).free

    def _finish(self, step: int, saver: ocp.AsyncCheckpointer, figures: dict[int, float]) -> None:
        """Write the manifest, rename the folder, and only then remove older steps."""
        saver.wait_until_finished()
        if not is_first_process():
            return
        part = self.path / f"{step}{_PART}"
        write_manifest(part)
        move(part, self.path / str(step))
        steps = self.saved()
        for old in set(steps[:-_KEPT_STEPS]) - {_find_best(steps, figures)}:
            part = (self.path / str(old)).rename(self.path / f"{old}{_PART}")
            shutil.rmtree(part, ignore_errors=True)

    @contextmanager
    def _one_line_errors(self, step: int) -> Iterator[None]:
        """Turn a failed save into an InputError of one line and remove what it wrote."""
        try:
            yield
        except (OSError, ValueError) as error:  # TensorStore reports a full disk as a ValueError
            # Files that Orbax is still writing are removed when the run is resumed.
            shutil.rmtree(self.path / f"{step}{_PART}", ignore_errors=True)
            number = re.search(r"os_error_code='(\d+)'", str(error))
            reason = os.strerror(int(number[1])) if number else getattr(error, "strerror", None) or error
            raise InputError(
                f"{self.path / str(step)}: could not be saved ({reason}); earlier steps are kept: "
                "free disk space and continue with resume=True"
            ) from error

    def wait(self) -> None:
        """Wait until the current save has finished; raise InputError if it failed."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with self._one_line_errors(saving[0]):
                run_on_all(saving[1].result)

    def last_saved(self) -> int | None:
        """Return the newest saved step after waiting for the current save; None if there is none."""
        self.wait()
        return max(self.saved(), default=None)

    def position(self, step: int) -> Position:
        """Return the progress saved with a step; raise ValueError if it belongs to another step."""
        data = (self.path / str(step) / _POSITION).read_bytes()
        position = msgspec.json.decode(data, type=Position)
        msgspec.convert(position.records, list[_Record])
        position.sums = {name: np.asarray(value, np.float64) for name, value in position.sums.items()}
        if position.step != step:
            raise ValueError(f"it belongs to step {position.step}")
        return position

    def _find_wrong_position(self, step: int) -> str | None:
        try:
            self.position(step)
        except (ValueError, TypeError, RecursionError) as error:  # msgspec's errors are ValueErrors
            return f"{_POSITION} is wrong ({str(error)[:200]})"
        return None

    def shapes(self, step: int) -> Any:
        """Return the state of a valid step as shapes and dtypes in nested dictionaries."""
        with self._open(step) as reader:
            saved: Any = reader.metadata(self.path / str(step) / _STATE).item_metadata
            return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), saved.tree)

    def load(self, step: int, template: Any) -> Any:
        """Return the parts of a valid step's state that occur in a template.

        Args:
            step: Number of a valid step.
            template: Pytree of arrays, or of their shapes and dtypes. The results have the same shardings;
                entries without a sharding are put on the default device.
        """
        default = jnp.zeros(()).sharding
        abstract = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(
                a.shape, a.dtype, sharding=getattr(a, "sharding", None) or default
            ),
            template,
        )
        # Without these arguments Orbax restores to the devices that the state was saved from.
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
        with self._open(step) as reader:
            return reader.restore(self.path / str(step) / _STATE, args=args)

    @contextmanager
    def _open(self, step: int) -> Iterator[ocp.Checkpointer]:
        try:
            with _no_warnings(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                yield reader
        except Exception as error:  # the step is undamaged; another Orbax version wrote it
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{self.path / str(step)}: cannot be restored ({reason}); train again"
            ) from error

    def close(self) -> None:
        """Wait until the current save has finished, and release threads and files."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self._saver is not None:
                self._saver.close()


def check_shapes(saved: Any, expected: Any, source: str) -> None:
    """Check that two pytrees have the same names, shapes and dtypes.

    Raises:
        InputError: The pytrees differ; the message names the first difference.

    Examples:
        >>> check_shapes({"w": jnp.zeros(2)}, {"w": jnp.zeros(3)}, "run/5")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        elmo_jax.errors.InputError: run/5: w is float32 [2], expected float32 [3]; ...
    """
    have, want = (dict[str, Any](ocp.tree.to_flat_dict(tree, sep="/")) for tree in (saved, expected))
    for name in sorted(have.keys() | want.keys()):
        found, wanted = (
            f"{tree[name].dtype} {list(tree[name].shape)}" if name in tree else otherwise
            for tree, otherwise in ((have, "missing"), (want, "nothing"))
        )
        if found != wanted:
            advice = "use the settings and texts that it was saved with"
            raise InputError(f"{source}: {name} is {found}, expected {wanted}; {advice}")


def _find_best(steps: list[int], figures: Mapping[int, float]) -> int | None:
    """Return the earliest step with the lowest figure; None if no step has a figure."""
    return min((s for s in sorted(steps) if s in figures), key=figures.__getitem__, default=None)


@jax.jit
def _is_finite(state: Any) -> jax.Array:
    floats = [a for a in jax.tree.leaves(state) if jnp.issubdtype(a.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.isfinite(a).all() for a in floats]))


def _view_on_host(array: Any) -> Any:
    """Return an array as NumPy if this process has all of it.

    Orbax counts the bytes that it writes of device arrays, which leaks about 30 KB per save.
    """
    is_split = isinstance(array, jax.Array) and not (array.is_fully_replicated or array.is_fully_addressable)
    return array if is_split else np.asarray(array)


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Suppress Orbax's warnings about topologies, which users cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Run:
    """Folder of a training run, opened to write or to read.

    Args:
        path: Folder of the run.
        monitor: Name of the figure in the epoch records whose lowest value marks the best epoch.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     run = Run.create(Path(folder) / "run", {"seed": 1}, monitor="val_loss")
        ...     run.save({"w": np.ones(2, np.float32)}, Position(step=3))
        ...     run.close()
        ...     Run.open(run.path).restore_best()["w"].tolist()
        [1.0, 1.0]
    """

    def __init__(self, path: Path, monitor: str):
        self.path, self.monitor = Path(path), monitor
        self.steps = StepStore(self.path / _STEPS)
        self._lock = writer_lock(self.path / _LOCK)

    @classmethod
    @renamed_arguments(allow_change="allow_config_change")
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        monitor: str,
        resume: bool = False,
        overwrite: bool = False,
        allow_config_change: bool = False,
        files: Mapping[str, str] | None = None,
        input_paths: Collection[str] = (),
    ) -> "Run":
        """Create the folder of a new run, or open the folder of a run to continue it.

        The folder is locked against other writers until `close` or until the process ends.

        Args:
            path: Folder of the run; it must not hold a run unless `resume` or `overwrite` is true.
            config: Settings for ``config.json``; only epochs and output may change on resume.
            monitor: Name of the figure in the epoch records whose lowest value marks the best epoch.
            resume: Continue the run in the folder; start one if there is none.
            overwrite: Remove the run in the folder.
            allow_config_change: Allow another learning rate or clipping norm on resume, and another seed if
                the run stopped between two epochs.
            files: Names and texts of further files to write; they must not change on resume.
            input_paths: Names of settings, such as "data.dataset", that may change on resume if the digests
                of the inputs (the settings "texts" and "model") do not change.

        Raises:
            InputError: The folder holds a run, other files or other settings, is locked, or is not writable.
        """
        run = cls(path, monitor)
        config = {"monitor": monitor, **json.loads(json.dumps(config))}
        texts = {name: text.encode() for name, text in (files or {}).items()}
        check = lambda: run._check_unchanged(config, texts, input_paths, allow_config_change)  # noqa: E731
        try:
            run_on_first(lambda: run._prepare(config, texts, check if resume else None, overwrite))
        except OSError as error:
            run.close()
            reason = f"cannot be written ({error.strerror}); give another output folder"
            raise InputError(f"{path}: {reason}") from None
        except BaseException:
            run.close()
            raise
        return run

    def _prepare(
        self,
        config: dict[str, Any],
        texts: dict[str, bytes],
        check_unchanged: Callable[[], None] | None,  # None if the run must not be resumed
        overwrite: bool,
    ) -> None:
        """Lock the folder, compare or remove what it holds, and write the configuration."""
        self._lock_folder()
        if (self.path / CONFIG).exists():
            results = (self.path / METRICS, self.path / RESULTS)
            has_results = self.steps.saved() or any(f.exists() and f.stat().st_size for f in results)
            if check_unchanged and has_results:
                check_unchanged()
            elif check_unchanged or overwrite:
                self.clear()
            else:
                advice = "pass resume=True to continue it or overwrite=True to replace it"
                raise InputError(f"run folder {self.path} already exists; {advice}")
        write_config(self.path, config, {name: digest(data) for name, data in texts.items()})
        for name, data in texts.items():
            write_atomically(self.path / name, data)
        for part in self.steps.path.glob(f"*{_PART}"):  # left by saves that a crash interrupted
            shutil.rmtree(part, ignore_errors=True)

    def _lock_folder(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path}: is a file; give an output folder")
        self.path.mkdir(parents=True, exist_ok=True)
        own = {_LOCK, f"{CONFIG}.part"}  # a crash may leave these files before the configuration is written
        if not (self.path / CONFIG).exists() and {p.name for p in self.path.iterdir()} - own:
            raise InputError(f"{self.path}: is not empty and holds no run; give a new output folder")
        try:
            self._lock.acquire()
        except filelock.Timeout:
            reason = "another run writes there; wait for it, or give another output folder"
            raise InputError(f"{self.path}: {reason}") from None

    def _check_unchanged(
        self, config: dict[str, Any], texts: dict[str, bytes], input_paths: Collection[str], allow: bool
    ) -> None:
        """Check that the settings and texts equal those that the run was started with."""
        before = read_config(self.path)
        changed = changes(before, config)
        free = _FREE if changed.keys() & _DIGESTS else _FREE.union(input_paths)
        changed = {name: change for name, change in changed.items() if name not in free}
        is_allowable = changed.keys() <= _BETWEEN_EPOCHS | _AFTER_DIVERGENCE
        if changed and not (allow and is_allowable):
            listed = "; ".join(f"{name} {change}" for name, change in changed.items())
            advice = "resume with those" + (", or pass allow_config_change=True" if is_allowable else "")
            raise InputError(f"{self.path}: was started with other settings ({listed}); {advice}")
        fewer = config.get("epochs", 0) < before.get("epochs", 0)
        if changed or fewer:
            newest = next(self.steps.valid(), None)
            position = Position() if newest is None else self.steps.position(newest)
            ended = [record["step"] for record in position.records]
            if changed.keys() & _BETWEEN_EPOCHS and position.step != max(ended, default=0):
                raise InputError(f"{self.path}: stopped within an epoch; keep the seed until it has ended")
            if fewer and config["epochs"] < len(ended):
                raise InputError(f"{self.path}: has run {len(ended)} epochs; give at least as many epochs")
        for name, data in texts.items():
            if before["files"].get(name) != digest(data):
                raise InputError(f"{self.path / name}: differs from the present text; use the same texts")

    @classmethod
    def open(cls, path: Path) -> "Run":
        """Open a run to read from it.

        Raises:
            InputError: The folder holds no run.
        """
        monitor = read_config(path).get("monitor")
        if not isinstance(monitor, str):
            raise InputError(f"{path}: holds a saved model, not a run; give the folder of a run")
        return cls(path, monitor)

    @property
    def config(self) -> dict[str, Any]:
        """Content of ``config.json``."""
        return read_config(self.path)

    def clear(self) -> None:
        """Remove the files of the run; other files in the folder stay."""
        for folder in (_STEPS, EVENTS):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        for name in (RESULTS, METRICS, VOCABULARY, CONFIG):  # last the configuration, which marks a run
            (self.path / name).unlink(missing_ok=True)

    def log(self, records: list[dict[str, Any]]) -> None:
        """Replace ``metrics.jsonl`` by these records, one JSON line each."""
        lines = [json.dumps(record, allow_nan=False) + "\n" for record in records]
        run_on_first(lambda: write_atomically(self.path / METRICS, "".join(lines)))

    def save(self, state: Any, position: Position) -> None:
        """Save a step in the background; see `StepStore.save`."""
        self.steps.save(state, position, self._monitored(position))

    def _monitored(self, position: Position) -> dict[int, float]:
        """Return the monitored figure of every finished epoch, keyed by the epoch's last step."""
        figures = {record["step"]: record.get(self.monitor) for record in position.records}
        return {step: figure for step, figure in figures.items() if isinstance(figure, int | float)}

    def restore(self, template: Any) -> tuple[Any, Position] | None:
        """Return the state and position of the newest valid step, or None if no step was saved.

        Args:
            template: Pytree of arrays, or of their shapes and dtypes.

        Raises:
            InputError: Every saved step is damaged, or the step has other shapes or dtypes.
        """
        newest = run_on_first(self.steps.newest_valid)
        step = max_over_processes(-1 if newest is None else newest)
        if step < 0:
            if self.steps.saved():
                advice = "restore a copy, or start again with overwrite=True"
                raise InputError(f"{self.path}: every saved step is damaged; {advice}")
            return None
        check_shapes(self.steps.shapes(step), template, f"{self.steps.path / str(step)}")
        return self.steps.load(step, template), self.steps.position(step)

    def restore_best(self, names: tuple[str, ...] = ()) -> Any:
        """Return the state at the end of the best epoch, or the newest if no epoch has ended.

        Args:
            names: Parts of the state to load; empty for all.

        Raises:
            InputError: No step was saved, or every saved step is damaged.
        """
        valid = list(self.steps.valid())
        if not valid:
            reason = "holds no saved step; let the training run reach one"
            if self.steps.saved():
                reason = "every saved step is damaged; restore a copy, or train again"
            raise InputError(f"{self.path}: {reason}")
        figures = self._monitored(self.steps.position(valid[0]))
        best = _find_best(valid, figures)
        best = valid[0] if best is None else best
        saved = self.steps.shapes(best)
        missing = set(names) - saved.keys()
        if missing:
            raise InputError(f"{self.steps.path / str(best)}: holds no {', '.join(missing)}; train again")
        return self.steps.load(best, {name: saved[name] for name in names or saved})

    def close(self) -> None:
        """Wait until the current save has finished, and unlock the folder."""
        try:
            self.steps.close()
        finally:
            self._lock.release()


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return every setting that differs, with its old and new value.

    Examples:
        >>> changes({"model": {"cells": 4}, "seed": 0}, {"model": {"cells": 8}, "seed": 0})
        {'model.cells': '4 -> 8'}
        >>> changes({}, {"clean": False}), changes({}, {"clean": True})
        ({}, {'clean': 'None -> True'})
    """
    found: dict[str, str] = {}
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found |= {f"{name}.{inner}": change for inner, change in changes(old, new).items()}
        elif old != new and (old, new) != (
            None,
            False,
        ):  # a run of an older release lacks newer settings, which are off
            found[name] = f"{old!r} -> {new!r}"
    return found
