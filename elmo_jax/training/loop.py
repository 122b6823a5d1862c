"""The training loop: epochs, progress, metrics, checkpoints, resuming and stopping."""

import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
from jax import Array
from tqdm import tqdm

from elmo_jax._moved import renamed_arguments
from elmo_jax.data.batching import Stream
from elmo_jax.errors import Interrupted, NotFiniteError
from elmo_jax.parallel import Plan, find_mesh, is_first_process, is_multiprocess, max_over_processes
from elmo_jax.training.checkpoint import Position, Run
from elmo_jax.training.optimizers import Optimizer
from elmo_jax.training.step import LossFn, Params, TrainState, choose_group_scale, compile_steps, feed

T = TypeVar("T")
CALLS_BETWEEN_STOP_CHECKS = 8  # used with several processes, where a check makes all devices wait
MAX_SKIPPED = 5  # steps in a row that may be skipped because they are not finite


@renamed_arguments(begin="plan", after_dispatch="after_call", per="loss_per")
def fit(
    plan: Plan[TrainState],
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
    loss_per: str = "steps",
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Train for a number of epochs, saving and logging to the folder of a run.

    A run that was stopped continues from its newest saved step. It ends with the same parameters
    and records, except for times, as a run that was not stopped.

    Args:
        plan: Makes the state before the first step, without frozen parameters. It is not called if the
            run has a saved step.
        loss_fn: ``(params, batch, key) -> (loss, metrics)``.
        optimizer: Optimizer that the state is created with.
        stream: Training batches.
        run: Folder to save and log to.
        epochs: Total number of passes over the stream, those before resuming included.
        seed: Random seed of the steps.
        on_epoch: Called after every epoch with the state and the summed metrics of the epoch. Returns
            further items for the epoch's record; one of them must be the figure that the run monitors.
        frozen: Parameters that the loss function gets and that are neither trained nor saved.
        on_record: Called with the complete record of every epoch after it is logged.
        save_every: Steps between saves within an epoch; None saves at the end of an epoch only.
        after_call: Called with the step after every compiled call.
        loss_per: Name of the metric by which the summed loss is divided for progress and records.

    Returns:
        The last state and the records of all epochs.

    Raises:
        NotFiniteError: several steps in a row, a whole epoch, or the monitored figure are not finite.
        InputError: a step could not be saved.
        Interrupted: SIGINT or SIGTERM arrived; the state was saved.
        ValueError: the planned state has frozen parameters.
    """
    like = plan.like()
    if like.frozen:
        raise ValueError("the planned state has frozen parameters; pass them to fit as frozen")
    like = replace(like, frozen=frozen or {})
    restored, position = run.restore(_saved_part(like)) or (None, Position())
    run.log(position.records)
    mesh, key, per_epoch = find_mesh(like), jax.random.key(seed), stream.steps_per_epoch
    total = epochs * per_epoch
    choose_group_scale(stream)  # called first, because the shapes depend on it
    shapes = stream.shapes() if mesh is None and position.step < total else []
    run_steps = compile_steps(loss_fn, optimizer, like, iterate_with_progress(shapes, "program"))
    state = replace(plan(), frozen=like.frozen) if restored is None else replace(like, **restored)
    stop_interval, calls = CALLS_BETWEEN_STOP_CHECKS if is_multiprocess() else 1, 0
    pending: deque[tuple[int, dict[str, Array]]] = deque()  # calls whose metrics are not yet added

    def add_pending(leave: int = 0) -> None:
        while len(pending) > leave:
            _add_metrics(position, *pending.popleft())
        if position.skipped >= MAX_SKIPPED:
            where = f"in {position.skipped} steps in a row, up to step {position.step}"
            raise _skipped_error(where, position, state, stream, run)

    with _stop_signals() as caught, ProgressBar(total, "step", position.step) as progress:
        while position.step < total:
            end = (position.step // per_epoch + 1) * per_epoch
            last_save = position.step
            started = time.perf_counter() - position.seconds
            chunks = feed(stream, position.step, end, mesh, prefetch=True)
            chunk = next(chunks, None)
            while chunk is not None:
                state, metrics = run_steps(state, chunk.batches, chunk.count, key)
                for value in metrics.values():
                    value.copy_to_host_async()
                pending.append((chunk.count, metrics))
                chunk = next(chunks, None)  # prepared while the device works
                add_pending(leave=1)  # so that the device never waits for the host
                _show_progress(progress, position, per_epoch, loss_per)
                after_call(position.step)
                is_save_due = save_every is not None and position.step - last_save >= save_every
                calls += 1
                stop = max_over_processes(max(caught, default=0)) if calls % stop_interval == 0 else 0
                if is_save_due or stop:
                    add_pending()
                    last_save = position.step
                    if position.step < end:  # at the end of an epoch the state is saved anyway
                        position.seconds = time.perf_counter() - started
                        run.save(_saved_part(state), position)
                        _raise_if_stopped(stop, run, position.step)
            add_pending()
            position.seconds = time.perf_counter() - started
            if not position.sums["steps"]:
                where = f"at any step of epoch {position.step // per_epoch}"
                raise _skipped_error(where, position, state, stream, run)
            _end_epoch(state, position, run, per_epoch, loss_per, on_epoch)
            on_record(position.records[-1])
            _show_progress(progress, position, per_epoch, loss_per)
            _raise_if_stopped(max_over_processes(max(caught, default=0)), run, position.step)
    run.steps.wait()
    return state, position.records


class EpochRule(NamedTuple):
    """Default number of epochs: `least`, or on small data enough for `steps` steps, but at most `most`.

    Examples:
        >>> EpochRule(least=3, steps=400, most=20).epochs(70), CLASSIFIER_EPOCHS.epochs(2000)
        (6, 3)
    """

    least: int
    steps: int
    most: int

    def epochs(self, steps_per_epoch: int) -> int:
        """Return the number of epochs for this number of steps an epoch."""
        return max(self.least, min(self.most, -(-self.steps // steps_per_epoch)))


PRETRAIN_EPOCHS = EpochRule(least=6, steps=420, most=20)
CLASSIFIER_EPOCHS = EpochRule(least=3, steps=300, most=20)


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM; a second signal goes to the previous handler."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield caught
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def catch(number: int, _frame: object) -> None:
        caught.append(number)
        restore()

    for number in previous:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


def _raise_if_stopped(signal_number: int, run: Run, step: int) -> None:
    if signal_number:
        run.steps.wait()
        raise Interrupted(signal_number, step)


def _saved_part(state: TrainState) -> dict[str, Any]:
    """Return the parts of a state that are saved: all but the frozen parameters."""
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return tree | ({"carry": state.carry} if state.carry else {})


def _add_metrics(position: Position, count: int, metrics: dict[str, Array]) -> None:
    """Add the metrics of a call step by step, so that the sums do not depend on the size of the calls."""
    arrays = {name: np.asarray(value, np.float64) for name, value in metrics.items()}
    for i in range(count):
        if position.skipped >= MAX_SKIPPED:
            return  # the position stays at the failed step
        position.skipped = 0 if arrays["steps"][i] else position.skipped + 1
        for name, value in arrays.items():
            position.sums[name] = position.sums.get(name, 0.0) + value[i]
        position.step += 1


def _mean_loss(position: Position, loss_per: str) -> float:
    """Return the mean loss of the current epoch, 0 before its first step."""
    return float(position.sums.get("loss", 0.0)) / max(float(position.sums.get(loss_per, 0.0)), 1.0)


def _end_epoch(
    state: TrainState,
    position: Position,
    run: Run,
    per_epoch: int,
    loss_per: str,
    on_epoch: Callable[..., Any],
) -> None:
    """Evaluate, save and log after the last step of an epoch."""
    epoch = position.step // per_epoch
    skipped = per_epoch - round(float(position.sums["steps"]))
    if skipped:
        warnings.warn(f"{skipped} steps of epoch {epoch} were skipped: not finite", stacklevel=2)
    record = {"event": "epoch", "epoch": epoch, "step": position.step, "skipped": skipped}
    record |= {"loss": _mean_loss(position, loss_per)}
    record |= on_epoch(state, {**position.sums, "seconds": position.seconds})
    record |= {"seconds": round(position.seconds, 3)}
    if not np.isfinite(record[run.monitor]):
        fact = f"{run.monitor} is {record[run.monitor]} after epoch {epoch}"
        raise NotFiniteError(fact, run.steps.last_saved())
    position.records = [*position.records, record]
    position.sums, position.seconds = {}, 0.0
    run.save(_saved_part(state), position)
    run.log(position.records)


def _skipped_error(
    where: str, position: Position, state: TrainState, stream: Stream, run: Run
) -> NotFiniteError:
    """Return the error about skipped steps, with the learning rate and the documents of the last one."""
    rates = optax.tree.get(state.opt_state, "hyperparams", {})
    details = [f"learning rate {float(rates['learning_rate']):g}"] if "learning_rate" in rates else []
    documents = stream.document_indices(position.step - 1)
    if len(documents):
        details.append(f"documents {', '.join(map(str, documents))}")
    cause = f" ({', '.join(details)})" if details else ""
    return NotFiniteError(f"the loss or a gradient was not finite {where}{cause}", run.steps.last_saved())


def _show_progress(progress: "ProgressBar", position: Position, per_epoch: int, loss_per: str) -> None:
    epoch = min(position.step // per_epoch + 1, progress.total // per_epoch)
    loss = _mean_loss(position, loss_per)
    if not progress.bar.disable:
        progress.bar.set_description(f"epoch {epoch}", refresh=False)
    if loss:
        progress.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    if loss or not progress.bar.disable:
        line = f"epoch {epoch}, step {position.step} of {progress.total}, loss {loss:.4f}"
        progress.show(position.step, line)


def iterate_with_progress(items: Sequence[T], unit: str) -> Iterator[T]:
    """Iterate over items with a `ProgressBar`.

    Examples:
        >>> sum(iterate_with_progress([1, 2, 3], "number"))
        6
    """
    if not items:
        return
    with ProgressBar(len(items), unit) as progress:
        for item in items:
            yield item
            progress.add(1)


class ProgressBar:
    """A progress bar on a terminal, otherwise a plain line every half minute; only in the first process.

    Args:
        total: Units of work.
        unit: Name of a unit.
        done: Units that were done before.
        scale: Whether the bar shortens large numbers.
    """

    INTERVAL = 30.0  # seconds

    def __init__(self, total: int, unit: str, done: int = 0, scale: bool = False):
        self.total, self.unit, self.done, self._done_before = total, unit, done, done
        disable = not (is_first_process() and sys.stderr.isatty())
        self.bar = tqdm(
            total=total, initial=done, unit=unit, unit_scale=scale, disable=disable, dynamic_ncols=True
        )
        self._started = self._last_line = time.perf_counter()

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, n: int) -> None:
        """Count n more units as done."""
        self.show(self.done + n, f"{self.done + n:,} of {self.total:,} {self.unit}s")

    def show(self, done: int, line: str) -> None:
        """Show that so many units are done; a plain line consists of `line` and the time left."""
        self.done = done
        now = time.perf_counter()
        if not self.bar.disable:
            self.bar.update(done - self.bar.n)
        elif is_first_process() and done > self._done_before and now - self._last_line > self.INTERVAL:
            self._last_line = now
            left = (self.total - done) * (now - self._started) / (done - self._done_before)
            print(f"{line}, {left / 60:.1f} min left", file=sys.stderr, flush=True)
