"""A run's folder: its configuration, its metrics, and the steps Orbax saved.

Nouns: a *run* is one training from its first to its last epoch, however often it was
stopped; its *position* is what the host must remember to go on: the step, the sums of the
epoch under way and the *records* of those that ended, one JSON line each.
"""

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from elmo_jax.errors import InputError

KEEP = 2  # newest steps kept beside the best
_CONFIG, _METRICS, _STEPS = "config.json", "metrics.jsonl", "checkpoints"


@dataclass
class Position:
    """Where a run stands.

    Attributes:
        step: optimiser steps taken.
        sums: of the epoch under way, added up in float64.
        seconds: spent in the epoch under way.
        records: of the epochs that ended.
    """

    step: int = 0
    sums: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        sums = {name: np.asarray(value).tolist() for name, value in self.sums.items()}
        return {"step": self.step, "sums": sums, "seconds": self.seconds, "records": self.records}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Position":
        sums = {name: np.asarray(value, np.float64) for name, value in data["sums"].items()}
        return cls(data["step"], sums, data["seconds"], data["records"])


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
        ...     Run.open(run.path).config
        {'monitor': 'val_loss', 'seed': 1}
    """

    def __init__(self, path: Path, monitor: str):
        self.path, self.monitor = path, monitor
        self._manager: ocp.CheckpointManager | None = None

    @classmethod
    def create(
        cls,
        path: Path,
        config: Mapping[str, Any],
        monitor: str,
        resume: bool = False,
        overwrite: bool = False,
    ) -> "Run":
        """Make the folder and write the configuration, or go on with what is there.

        Args:
            path: the folder; a new one, unless `resume` or `overwrite`.
            config: written to ``config.json``; to resume, all but "output" and "epochs"
                must be what it was.
            monitor: the record's figure that is lowest at the best epoch.
            resume: go on with a run that is there; begin one if none is.
            overwrite: remove a run that is there.

        Raises:
            InputError: the folder holds a run, or another's configuration, or is no folder.
        """
        run = cls(path, monitor)
        config = {"monitor": monitor, **json.loads(json.dumps(config))}
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file; give --output a folder")
        if (path / _CONFIG).exists():
            if resume:
                _compare(read_config(path), config, path)
            elif overwrite:
                run.clear()
            else:
                raise InputError(f"{path}: holds a run; go on with --resume, replace it with --overwrite")
        elif path.exists() and any(path.iterdir()):
            raise InputError(f"{path}: is not empty and holds no run; give --output a new folder")
        try:
            path.mkdir(parents=True, exist_ok=True)
            write_atomically(path / _CONFIG, json.dumps(config, indent=2) + "\n")
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); give another --output") from None
        return run

    @classmethod
    def open(cls, path: Path) -> "Run":
        """A run to read from.

        Raises:
            InputError: there is none.
        """
        return cls(path, read_config(path).get("monitor", "loss"))

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` holds."""
        return read_config(self.path)

    @property
    def manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save
            best = policies.BestN(
                get_metric_fn=lambda metrics: -metrics["value"], n=1, keep_checkpoints_without_metrics=False
            )
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(KEEP), best]),
                cleanup_tmp_directories=True,
            )
            handlers = {"state": ocp.StandardCheckpointHandler(), "position": ocp.JsonCheckpointHandler()}
            with _quiet():
                self._manager = ocp.CheckpointManager(
                    (self.path / _STEPS).absolute(), options=options, item_handlers=handlers
                )
        return self._manager

    def clear(self) -> None:
        """Remove what a run wrote, and nothing else that may lie in the folder."""
        shutil.rmtree(self.path / _STEPS, ignore_errors=True)
        for name in (_CONFIG, _METRICS):
            (self.path / name).unlink(missing_ok=True)

    def log(self, records: list[dict[str, Any]]) -> None:
        """Write ``metrics.jsonl`` anew: every record so far, a line each, or the file as it was."""
        write_atomically(self.path / _METRICS, "".join(json.dumps(record) + "\n" for record in records))

    def save(self, state: Any, position: Position) -> None:
        """Save a step, in the background; the best epoch and the newest two steps are kept."""
        if position.step in self.manager.all_steps():
            return
        ended = position.records and position.records[-1]["step"] == position.step
        with _quiet():
            self.manager.save(
                position.step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position.to_json())
                ),
                metrics={"value": position.records[-1][self.monitor]} if ended else None,
            )

    def restore(self, template: Any) -> tuple[Any, Position] | None:
        """The newest step, or None if there is none.

        Args:
            template: a pytree of the shapes and dtypes to restore.
        """
        step = self.manager.latest_step()
        return None if step is None else (self._load(step, template), self._position(step))

    def restore_best(self, names: tuple[str, ...] = ()) -> Any:
        """What was saved at the best epoch's end; the newest step if no epoch ended.

        Args:
            names: the keys of the state to restore; all if empty.

        Raises:
            InputError: no step was saved.
        """
        newest = self.manager.latest_step()
        if newest is None:
            raise InputError(f"{self.path}: holds no saved step; let the training run reach one")
        ended = self._position(newest).records
        best = min(ended, key=lambda record: record[self.monitor])["step"] if ended else newest
        saved = self.manager.item_metadata(best)["state"]
        template = {
            name: jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved[name])
            for name in names or saved.keys()
        }
        return self._load(best, template)

    def _load(self, step: int, template: Any) -> Any:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, template)
        args = ocp.args.PyTreeRestore(abstract, partial_restore=True)
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            return reader.restore(self.path.absolute() / _STEPS / str(step) / "state", args=args)

    def _position(self, step: int) -> Position:
        with _quiet():
            args = ocp.args.Composite(position=ocp.args.JsonRestore())
            return Position.from_json(self.manager.restore(step, args=args)["position"])

    def close(self) -> None:
        """Wait for saves under way."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None


def read_config(path: Path) -> dict[str, Any]:
    """The configuration of a run or of an exported folder.

    Raises:
        InputError: there is none, or it is not JSON.
    """
    if not (path / _CONFIG).is_file():
        raise InputError(
            f"{path}: holds no run (no {_CONFIG}); train one with python -m experiments.pretrain"
        )
    try:
        config = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path / _CONFIG}: cannot be read ({error}); restore it or train again") from None
    if not isinstance(config, dict):
        raise InputError(f"{path / _CONFIG}: is no JSON object; restore it or train again")
    return config


def write_atomically(path: Path, text: str) -> None:
    """Write beside and rename: a reader, or a crash, sees the old file or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _compare(before: dict[str, Any], now: dict[str, Any], path: Path) -> None:
    free = {"output", "epochs"}
    changed = [
        f"{name} {before.get(name)!r} -> {now.get(name)!r}"
        for name in sorted(before.keys() | now.keys())
        if name not in free and before.get(name) != now.get(name)
    ]
    if changed:
        raise InputError(f"{path}: was run with other settings ({'; '.join(changed)}); use those to --resume")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's advice about topologies, which a user cannot act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
