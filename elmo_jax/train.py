"""One training loop for every task; it knows no model.

Nouns: a *task* is a pure ``loss_fn(params, batch, key) -> (loss, sums)``; a *dispatch* is
one call of the device that takes several steps; a *record* is an epoch's line of metrics.
"""

import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array
from tqdm import tqdm

from elmo_jax.checkpoint import Position, Run
from elmo_jax.data import Batch, BatchStream, Dispatch
from elmo_jax.errors import InputError

Params = dict[str, Any]
LossFn = Callable[[Params, Batch, Array], tuple[Array, dict[str, Array]]]
SumsFn = Callable[[Params, Batch], dict[str, Array]]


@dataclass(frozen=True)
class OptimizerConfig:
    """How parameters follow their gradients."""

    optimizer: Literal["adam", "adagrad"] = "adam"
    """Adam, or Adagrad with an accumulator that begins at 1."""
    learning_rate: float = 2e-3
    """The highest of the schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls to 0 after the warm-up, if it does."""
    warmup: float = 0.02
    """Share of all steps over which the learning rate rises from 0."""
    clip_norm: float = 10.0
    """Gradients of a larger global norm are scaled down to it."""


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimiser for a run of that many steps."""
    warmup = max(1, round(config.warmup * steps))
    rest = max(1, steps - warmup)
    top = config.learning_rate
    after = {
        "cosine": optax.cosine_decay_schedule(top, rest),
        "linear": optax.linear_schedule(top, 0.0, rest),
        "constant": optax.constant_schedule(top),
    }[config.schedule]
    rate = optax.join_schedules([optax.linear_schedule(top / warmup, top, warmup), after], [warmup])
    if config.optimizer == "adam":
        step = optax.adam(rate)
    else:
        step = optax.adagrad(rate, initial_accumulator_value=1.0)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), step)


@struct.dataclass
class TrainState:
    """What training changes, and what it reads.

    Attributes:
        step: int32, optimiser steps taken.
        params: trained.
        frozen: given to the task beside params, never changed.
        opt_state: of the optimiser.
    """

    step: Array
    params: Params
    frozen: Params
    opt_state: Any

    @classmethod
    def create(
        cls, params: Params, optimizer: optax.GradientTransformation, frozen: Params | None = None
    ) -> "TrainState":
        """The state before the first step."""
        return cls(jnp.zeros((), jnp.int32), params, frozen or {}, optimizer.init(params))


def train_step(
    state: TrainState, batch: Batch, key: Array, loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, Array]]:
    """One step; its randomness is ``fold_in(key, state.step)``.

    Returns:
        The next state, and the task's sums with the ``loss`` among them.
    """
    key = jax.random.fold_in(key, state.step)
    task = lambda params: loss_fn({**state.frozen, **params}, batch, key)  # noqa: E731
    (loss, sums), gradients = jax.value_and_grad(task, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    state = state.replace(step=state.step + 1, params=params, opt_state=opt_state)
    return state, {**sums, "loss": loss}


def make_dispatch(loss_fn: LossFn, optimizer: optax.GradientTransformation):
    """Compile `train_step` over up to K batches in one call, the state donated.

    Returns:
        ``(state, batches [K, ...], count, key) -> (state, sums [K, ...])``; of the sums the
        first `count` were filled. Steps are the same however they are shared out to calls.
    """

    @partial(jax.jit, donate_argnums=0)
    def run(state: TrainState, frozen: Params, batches: Batch, count: Array, key: Array):
        state = state.replace(frozen=frozen)

        def body(i: Array, carry):
            state, filled = carry
            batch = jax.tree.map(lambda a: a[i], batches)
            state, sums = train_step(state, batch, key, loss_fn, optimizer)
            return state, {name: filled[name].at[i].set(value) for name, value in sums.items()}

        first = jax.tree.map(lambda a: a[0], batches)
        shapes = jax.eval_shape(lambda s: train_step(s, first, key, loss_fn, optimizer)[1], state)
        steps = batches.words.shape[0]
        filled = {name: jnp.zeros((steps, *s.shape), s.dtype) for name, s in shapes.items()}
        state, filled = jax.lax.fori_loop(0, count, body, (state, filled))
        return state.replace(frozen={}), filled

    def dispatch(state: TrainState, batches: Batch, count: int, key: Array):
        # What is frozen stays the caller's: it is neither donated nor copied.
        after, sums = run(state.replace(frozen={}), state.frozen, batches, count, key)
        return after.replace(frozen=state.frozen), sums

    return dispatch


def evaluate(sums_fn: SumsFn, params: Params, stream: BatchStream) -> dict[str, np.ndarray]:
    """The task's sums over one pass of a stream, added up in float64.

    Args:
        sums_fn: compiled ``(params, batch) -> sums``.
        params: all the task needs.
        stream: of one step a dispatch.
    """
    waiting: deque[dict[str, Array]] = deque()
    total: dict[str, np.ndarray] = {}

    def add(sums: dict[str, Array]) -> None:
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)

    for dispatch in stream.dispatches(0, stream.steps_per_epoch):
        batch = jax.tree.map(lambda a: a[0], dispatch.batches)
        waiting.append(sums_fn(params, batch))
        if len(waiting) > 2:  # the device stays busy, and memory flat
            add(waiting.popleft())
    for sums in waiting:
        add(sums)
    return total


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
    state: TrainState,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    stream: BatchStream,
    run: Run,
    *,
    epochs: int,
    seed: int,
    on_epoch: Callable[[TrainState, Mapping[str, Any]], dict[str, Any]],
    save_every: int | None = None,
    after_dispatch: Callable[[int], None] = lambda step: None,
) -> tuple[TrainState, list[dict[str, Any]]]:
    """Train for `epochs` passes of the stream, saving and logging to the run.

    A run that was stopped goes on from its newest saved step and ends with the same
    parameters and records, but for times, as one that was not.

    Args:
        state: as `TrainState.create` made it; replaced if the run holds a saved step.
        loss_fn: the task.
        optimizer: as `state` was created with.
        stream: the training batches.
        run: where to save and log.
        epochs: passes in all, the ones before a resumption among them.
        seed: of the steps' randomness.
        on_epoch: evaluates; gets the state and the epoch's sums and returns what its record
            is to hold, the run's `monitor` among it.
        save_every: steps between saves within an epoch; None saves at its end alone.
        after_dispatch: called with the step after every dispatch.

    Returns:
        The last state and every epoch's record.

    Raises:
        InputError: the loss is no longer finite.
        Interrupted: SIGINT or SIGTERM came; the step was saved.
    """
    position = Position()
    restored = run.restore(_as_tree(state))
    if restored is not None:
        tree, position = restored
        state = state.replace(**tree)
    run.log(position.records)
    dispatch_fn = make_dispatch(loss_fn, optimizer)
    key = jax.random.key(seed)
    per_epoch = stream.steps_per_epoch
    with _stop_signals() as caught, _Progress(position.step, epochs * per_epoch, per_epoch) as progress:
        while position.step < epochs * per_epoch:
            end = (position.step // per_epoch + 1) * per_epoch
            saved = position.step
            began = time.perf_counter() - position.seconds
            ahead: deque[tuple[Dispatch, dict[str, Array]]] = deque()

            def settle(waiting: deque = ahead) -> None:
                _add(position, *waiting.popleft())

            for dispatch in stream.dispatches(position.step, end):
                state, sums = dispatch_fn(state, dispatch.batches, dispatch.count, key)
                ahead.append((dispatch, sums))
                if len(ahead) > 1:  # one dispatch behind, so that the device never waits
                    settle()
                progress.update(position)
                after_dispatch(position.step)
                due = save_every is not None and position.step - saved >= save_every
                if due or caught:
                    while ahead:
                        settle()
                    position.seconds = time.perf_counter() - began
                    saved = position.step
                    run.save(_as_tree(state), position)
                if caught:
                    run.close()
                    raise Interrupted(caught[0], position.step)
            while ahead:
                settle()
            position.seconds = time.perf_counter() - began
            _end_epoch(state, position, run, per_epoch, on_epoch)
            progress.update(position)
    run.close()
    return state, position.records


def _end_epoch(state: TrainState, position: Position, run: Run, per_epoch: int, on_epoch) -> None:
    epoch = position.step // per_epoch
    record = {"event": "epoch", "epoch": epoch, "step": position.step}
    record |= {"loss": float(position.sums["loss"]) / per_epoch}
    sums = {**position.sums, "seconds": position.seconds}
    record |= on_epoch(state, sums) | {"seconds": round(position.seconds, 3)}
    position.records = [*position.records, record]
    position.sums, position.seconds = {}, 0.0
    run.save(_as_tree(state), position)
    run.log(position.records)


def _as_tree(state: TrainState) -> dict[str, Any]:
    """What is saved: all but what never changes."""
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


def _add(position: Position, dispatch: Dispatch, sums: dict[str, Array]) -> None:
    """Add a dispatch's sums, step by step, so that how steps were shared out does not show."""
    arrays = {name: np.asarray(value, np.float64) for name, value in sums.items()}
    for i in range(dispatch.count):
        if not np.isfinite(arrays["loss"][i]):
            raise InputError(
                f"the loss is {arrays['loss'][i]} at step {position.step + 1}; lower --learning-rate or "
                "--clip-norm; the last saved step is kept"
            )
        for name, value in arrays.items():
            position.sums[name] = position.sums.get(name, 0.0) + value[i]
        position.step += 1


class _Progress:
    """A bar with an ETA on a terminal, a plain line every half minute elsewhere."""

    INTERVAL = 30.0

    def __init__(self, step: int, total: int, per_epoch: int):
        self.first, self.total, self.per_epoch = step, total, per_epoch
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=step, unit="step", disable=not terminal, dynamic_ncols=True)
        self.began = self.spoke = time.perf_counter()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def update(self, position: Position) -> None:
        done = position.step - self.first
        epoch = min(position.step // self.per_epoch + 1, self.total // self.per_epoch)
        loss = position.sums.get("loss", 0.0) / (position.step % self.per_epoch or 1)
        if not self.bar.disable:
            self.bar.set_description(f"epoch {epoch}", refresh=False)
            if loss:
                self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            self.bar.update(position.step - self.bar.n)
        elif done and loss and time.perf_counter() - self.spoke > self.INTERVAL:
            self.spoke = time.perf_counter()
            left = (self.total - position.step) * (self.spoke - self.began) / done
            print(
                f"epoch {epoch}, step {position.step} of {self.total}, loss {loss:.4f}, "
                f"{left / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )
