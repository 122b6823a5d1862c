"""What of training's time the host costs: an epoch through `fit`, and the same dispatches bare.

Nouns: a *replay* calls the compiled steps of an epoch one after the other, all batches being
on the device; what `fit` takes longer is time outside compiled code.
"""

import threading
from queue import SimpleQueue
from typing import Any

import jax
import numpy as np

from elmo_jax.data import Dispatch
from elmo_jax.dispatch import make_dispatch
from elmo_jax.loop import fit
from elmo_jax.mesh import Plan
from elmo_jax.tasks import bilm_training
from elmo_jax.train import OptimizerConfig, TrainState
from experiments.cases import Case
from experiments.inputs import model_of, stream_of, weights_of
from experiments.worker import RATE, Arrays, Built

_EPOCHS = 10**6  # more than are ever timed


class _Unsaved:
    """A run that keeps nothing: the disk is not what is timed."""

    monitor = "figure"

    def restore(self, template: Any) -> None:
        del template

    def save(self, state: Any, position: Any) -> None:
        del state, position

    def log(self, records: list[Any]) -> None:
        del records

    def wait(self) -> None:
        pass


def _training(case: Case, arrays: Arrays) -> tuple[Plan[TrainState], Any, Any]:
    """The state before the first step, the task of the default recipe, and the optimiser."""
    settings = OptimizerConfig(learning_rate=RATE, schedule="constant")
    task, optimizer = bilm_training(model_of(case, dropout=0.1), settings, 1, case.negatives)
    return Plan(lambda: TrainState.create(weights_of(arrays), optimizer)), task, optimizer


def build_fit(case: Case, arrays: Arrays) -> Built:
    """Epochs of `fit`, which waits in a thread of its own until the next is asked for."""
    begin, task, optimizer = _training(case, arrays)
    stream = stream_of(case, arrays)
    asked: SimpleQueue[None] = SimpleQueue()
    ended: SimpleQueue[Any] = SimpleQueue()

    def on_epoch(_: TrainState, sums: Any) -> dict[str, Any]:
        ended.put(sums["loss"] / sums["steps"])
        asked.get()
        return {"figure": 0.0}

    def train() -> None:
        asked.get()
        run: Any = _Unsaved()
        try:
            fit(begin, task, optimizer, stream, run, epochs=_EPOCHS, seed=0, on_epoch=on_epoch)
        except Exception as error:
            ended.put(error)

    threading.Thread(target=train, daemon=True).start()

    def run(n: int) -> float:
        loss: Any = None
        for _ in range(n):
            asked.put(None)
            loss = ended.get()
            if isinstance(loss, Exception):
                raise loss
        return loss

    return Built(lambda: {"loss": np.array(run(1))}, [(run, 1.0)])


def build_replay(case: Case, arrays: Arrays) -> Built:
    """The first epoch's dispatches again and again."""
    begin, task, optimizer = _training(case, arrays)
    stream = stream_of(case, arrays)
    dispatch, key = make_dispatch(task, optimizer), jax.random.key(0)
    placed = [
        Dispatch(jax.device_put(d.batches), d.count) for d in stream.dispatches(0, stream.steps_per_epoch)
    ]
    held = [begin()]

    def run(n: int) -> float:
        loss = 0.0
        for _ in range(n):
            losses = []
            for batches, count in placed:
                held[0], sums = dispatch(held[0], batches, count, key)
                losses.append((sums["loss"], count))
            jax.block_until_ready(held)
            loss = sum(float(np.sum(each[:count])) for each, count in losses) / stream.steps_per_epoch
        return loss

    return Built(lambda: {"loss": np.array(run(1))}, [(run, 1.0)])
