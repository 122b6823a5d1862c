"""The saved steps of a run: written in the background, proven when read.

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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from elmo_jax.errors import InputError
from elmo_jax.integrity import damage, move, write_manifest
from elmo_jax.processes import first, led, together

KEEP = 2  # newest steps kept beside the best
_STATE, _POSITION = "state", "position.json"
_PART, _DAMAGED = ".part", ".damaged"
_SLOWER = "lower --learning-rate or --clip-norm"
_ROOM = 2**24  # bytes to leave free beside a saved state, for all that is small


class Steps:
    """The folder of a run's saved steps.

    Args:
        path: the folder; made by the first save.

    Attributes:
        remedy: of numbers that are not finite, where a command has other flags than training has.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     steps = Steps(Path(folder) / "steps")
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
        led(lambda: self._begin(step, state, position))
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
        if not first():
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
            together(lambda: self._written(*saving))

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


def check_kinds(saved: Any, wanted: Any, source: str) -> None:
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
        for tree in (saved, wanted)
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
