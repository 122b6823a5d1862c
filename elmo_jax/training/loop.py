"""The one training loop: epochs, progress, metrics, checkpoints, resuming and stopping.

Nouns: a *record* is an epoch's line of metrics.

How far a long piece of work is, for people: a bar on a terminal, plain lines elsewhere.
"""

import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

from elmo_jax.data.batching import Stream
from elmo_jax.errors import InputError
from elmo_jax.parallel import Plan, feed, find_mesh, is_first_process, is_multiprocess, max_over_processes
from elmo_jax.training.checkpoint import Position, Run
from elmo_jax.training.optimizers import Optimizer
from elmo_jax.training.step import LossFn, Params, TrainState, compile_steps

T = TypeVar("T")


def shown(items: Sequence[T], unit: str) -> Iterator[T]:
    """The items, a `ProgressBar` telling how many are behind, if there are any.

    Example:
        >>> sum(shown([1, 2, 3], "number"))
        6
    """
    if not items:
        return
    with ProgressBar(len(items), unit) as meter:
        for item in items:
            yield item
            meter.add(1)


class ProgressBar:
    """A bar with an ETA on a terminal, a plain line every half minute elsewhere; of the first process.

    Args:
        total: units of work.
        unit: their name.
        done: units that were done before.
        scale: whether the bar shortens large numbers.
    """

    INTERVAL = 30.0

    def __init__(self, total: int, unit: str, done: int = 0, scale: bool = False):
        self.total, self.unit, self.begun, self.done = total, unit, done, done
        self.bar = tqdm(
            total=total,
            initial=done,
            unit=unit,
            unit_scale=scale,
            disable=not (is_first_process() and sys.stderr.isatty()),
            dynamic_ncols=True,
        )
        self.began = self.spoke = time.perf_counter()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, n: int) -> None:
        """Count n more units as done."""
        self.show(self.done + n, f"{self.done + n:,} of {self.total:,} {self.unit}s")

    def show(self, done: int, line: str) -> None:
        """Say how many units are done; a plain line says it as `line`, and how long is left."""
        self.done = done
        if not self.bar.disable:
            self.bar.update(done - self.bar.n)
        elif is_first_process() and done > self.begun and time.perf_counter() - self.spoke > self.INTERVAL:
            self.spoke = time.perf_counter()
            left = (self.total - done) * (self.spoke - self.began) / (done - self.begun)
            print(f"{line}, {left / 60:.1f} min left", file=sys.stderr, flush=True)


MEETING = 8  # dispatches between two, of several processes: a meeting makes the devices wait
PATIENCE = 5  # steps in a row that may be skipped because they are not finite


class Interrupted(Exception):
    """Training was told to stop by a signal, and has saved where it stands."""

    def __init__(self, number: int, step: int):
        super().__init__(f"stopped by {signal.Signals(number).name} at step {step}, saved")
        self.exit_code = 128 + number


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM; the second one acts as if we were not here."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]

    def restore() -> None:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)

    def catch(number: int, _frame: object) -> None:
        caught.append(number)
        restore()

    for number in numbers:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


def fit(
    begin: Plan[TrainState],
    loss_fn: LossFn,
    optimizer: Optimizer,
    stream: Stream,
    run: Run,
    *,
    epochs: int,
    seed: int,
    on_epoch: Callable[[TrainState, Mapping[str, Any]], dict[str, Any]],
    frozen: Params | None = None,
    on_record: Callable[[Mapping[str, Any]], None] = lambda record: None,
    save_every: int | None = None,
    after_call: Callable[[int], None] = lambda step: None,
    per: str = "steps",
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Train for `epochs` passes of the stream, saving and logging to the run.

    A run that was stopped goes on from its newest saved step and ends with the same
    parameters and records, but for times, as one that was not.

    Args:
        begin: what `TrainState.create` makes, nothing frozen; not made if the run holds a saved step.
            Without a mesh a CPU first compiles programs for the stream's known shapes, which takes
            room, and an accelerator begins to; with one, they are compiled when they are met.
        loss_fn: the task.
        optimizer: as the state is created with.
        stream: the training batches.
        run: where to save and log.
        epochs: passes in all, the ones before a resumption among them.
        seed: of the steps' randomness.
        on_epoch: evaluates; gets the state and the epoch's sums and returns what its record
            is to hold, the run's `monitor` among it.
        frozen: the state's, where the other arrays lie; it is not saved.
        on_record: gets every new epoch's whole record, once it is logged.
        save_every: steps between saves within an epoch; None saves at its end alone.
        after_dispatch: called with the step after every dispatch.
        per: the sum by which the loss is divided where it is told.

    Returns:
        The last state and every epoch's record.

    Raises:
        InputError: several losses or gradients in a row, or all of an epoch, or the figure
            the run is to lower, were not finite; or a step could not be saved.
        Interrupted: SIGINT or SIGTERM came; the step was saved.
        ValueError: what is to be made holds something frozen.
    """
    like = begin.like()
    if like.frozen:
        raise ValueError("what is frozen is given to fit, not to the state that is to be made")
    like = replace(like, frozen=frozen or {})
    restored, position = run.restore(_as_tree(like)) or (None, Position())
    run.log(position.records)
    mesh = find_mesh(like)
    key = jax.random.key(seed)
    per_epoch = stream.steps_per_epoch
    shapes = stream.shapes() if mesh is None and position.step < epochs * per_epoch else []
    run_steps = compile_steps(loss_fn, optimizer, like, shown(shapes, "program"))
    state = replace(begin(), frozen=like.frozen) if restored is None else replace(like, **restored)
    meeting, chunks = MEETING if is_multiprocess() else 1, 0
    ahead: deque[tuple[int, dict[str, Array]]] = deque()  # empty between epochs

    def settle(leave: int = 0) -> None:
        while len(ahead) > leave:
            _add(position, *ahead.popleft())
        if position.skipped >= PATIENCE:
            told = f"{position.skipped} steps in a row, up to step {position.step}"
            raise _not_finite(told, position, state, stream, run)

    with _stop_signals() as caught, ProgressBar(epochs * per_epoch, "step", position.step) as meter:
        while position.step < epochs * per_epoch:
            end = (position.step // per_epoch + 1) * per_epoch
            saved = position.step
            began = time.perf_counter() - position.seconds
            coming = feed(stream, position.step, end, mesh, prefetch=True)
            following = next(coming, None)
            while following is not None:
                state, sums = run_steps(state, following.batches, following.count, key)
                for value in sums.values():
                    value.copy_to_host_async()  # as soon as it is known
                ahead.append((following.count, sums))
                following = next(coming, None)  # made and under way while the device works
                settle(leave=1)  # one behind, so that the device never waits
                _show(meter, position, per_epoch, per)
                after_call(position.step)
                due = save_every is not None and position.step - saved >= save_every
                chunks += 1
                stop = max_over_processes(max(caught, default=0)) if chunks % meeting == 0 else 0
                if due or stop:
                    settle()
                    saved = position.step
                    if position.step < end:  # or the end of the epoch is about to save it
                        position.seconds = time.perf_counter() - began
                        run.save(_as_tree(state), position)
                        _leave(stop, run, position.step)
            settle()
            position.seconds = time.perf_counter() - began
            if not position.sums["steps"]:
                told = f"at any step of epoch {position.step // per_epoch}"
                raise _not_finite(told, position, state, stream, run)
            _end_epoch(state, position, run, per_epoch, per, on_epoch)
            on_record(position.records[-1])
            _show(meter, position, per_epoch, per)
            _leave(max_over_processes(max(caught, default=0)), run, position.step)
    run.wait()
    return state, position.records


def _leave(stop: int, run: Run, step: int) -> None:
    """Stop here if a signal, by its number, asked for it; the step is being saved."""
    if stop:
        run.wait()
        raise Interrupted(stop, step)


def _mean_loss(position: Position, per: str) -> float:
    """Of the epoch under way; 0 before its first step."""
    return float(position.sums.get("loss", 0.0)) / max(float(position.sums.get(per, 0.0)), 1.0)


def _end_epoch(state: TrainState, position: Position, run: Run, per_epoch: int, per: str, on_epoch) -> None:
    epoch = position.step // per_epoch
    taken = float(position.sums["steps"])
    skipped = per_epoch - round(taken)
    if skipped:
        warnings.warn(f"{skipped} steps of epoch {epoch} were skipped: not finite", stacklevel=2)
    record = {"event": "epoch", "epoch": epoch, "step": position.step, "skipped": skipped}
    record |= {"loss": _mean_loss(position, per)}
    sums = {**position.sums, "seconds": position.seconds}
    record |= on_epoch(state, sums) | {"seconds": round(position.seconds, 3)}
    if not np.isfinite(record[run.monitor]):
        raise InputError(f"{run.monitor} is {record[run.monitor]} after epoch {epoch}; {run.steps.slower()}")
    position.records = [*position.records, record]
    position.sums, position.seconds = {}, 0.0
    run.save(_as_tree(state), position)
    run.log(position.records)


def _as_tree(state: TrainState) -> dict[str, Any]:
    """What is saved: all but what never changes."""
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return tree | ({"carry": state.carry} if state.carry else {})


def _add(position: Position, count: int, sums: dict[str, Array]) -> None:
    """Add a dispatch's sums, step by step, so that how steps were shared out does not show."""
    arrays = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    for i in range(count):
        if position.skipped >= PATIENCE:
            return  # and leave the position where it went wrong
        position.skipped = 0 if arrays["steps"][i] else position.skipped + 1
        for name, value in arrays.items():
            position.sums[name] = position.sums.get(name, 0.0) + value[i]
        position.step += 1


def _not_finite(told: str, position: Position, state: TrainState, stream: Stream, run: Run) -> InputError:
    """What is known of the steps that were skipped."""
    rates = optax.tree.get(state.opt_state, "hyperparams", {})
    rate = f"learning rate {float(rates['learning_rate']):g}, " if "learning_rate" in rates else ""
    rows = ", ".join(map(str, stream.document_indices(position.step - 1)))
    read = f"{rate}documents {rows}" if rows else rate.rstrip(", ")
    read = f" ({read})" if read else ""
    return InputError(f"the loss or a gradient was not finite {told}{read}; {run.steps.slower()}")


def _show(meter: ProgressBar, position: Position, per_epoch: int, per: str) -> None:
    """Say where training stands; a plain line waits for a loss to tell."""
    epoch = min(position.step // per_epoch + 1, meter.total // per_epoch)
    loss = _mean_loss(position, per)
    if not meter.bar.disable:
        meter.bar.set_description(f"epoch {epoch}", refresh=False)
    if loss:
        meter.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    if loss or not meter.bar.disable:
        meter.show(position.step, f"epoch {epoch}, step {position.step} of {meter.total}, loss {loss:.4f}")
