"""The training loop: resuming, grouping steps into calls, stopping, and keeping the best epoch."""

import contextlib
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from regression import EPOCHS, begin, lines, loss_fn, run_fit, same, without_times

from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import BatchStream
from elmo_jax.errors import Interrupted
from elmo_jax.parallel import Plan
from elmo_jax.training import checkpoint as steps, loop
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.loop import fit
from elmo_jax.training.optimizers import make_optimizer
from elmo_jax.training.step import TrainState, compile_steps

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture
def complete(documents, tmp_path):
    return run_fit(documents, tmp_path / "complete")


def test_training_learns_and_keeps_frozen_parameters(complete, documents):
    state, records = complete
    batch = documents.batch(np.arange(len(documents)), 32)
    untrained = {"table": jnp.zeros(50), "scale": jnp.ones(())}
    assert records[-1]["figure"] < 0.9 * float(loss_fn(untrained, batch, jax.random.key(0))[0])
    assert [r["epoch"] for r in records] == [1, 2]
    assert int(state.step) == records[-1]["step"]
    same(state.frozen, {"scale": jnp.ones(())})


def test_on_record_gets_the_complete_record_of_every_new_epoch(documents, tmp_path):
    got = []
    _, records = run_fit(documents, tmp_path / "run", epochs=1, on_record=got.append)
    assert got == records == lines(tmp_path / "run") and {"loss", "figure", "seconds"} <= got[0].keys()
    _, records = run_fit(documents, tmp_path / "run", resume=True, on_record=got.append)
    assert got == records and len(got) == EPOCHS


def test_next_batches_are_placed_before_the_host_waits(documents, tmp_path, monkeypatch):
    events = []
    chunks, add = BatchStream.chunks, loop._add_metrics

    def watched(self, first, last):
        for made in chunks(self, first, last):
            events.extend(["made"] * (self.seed is not None))  # evaluation's are in order
            yield made

    def make(*args):
        run = compile_steps(*args)

        def called(state, batches, count, key):
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batches))
            events.append("called")
            return run(state, batches, count, key)

        return called

    monkeypatch.setattr(loop, "compile_steps", make)
    monkeypatch.setattr(loop, "_add_metrics", lambda *args: (events.append("waited"), add(*args)))
    monkeypatch.setattr(BatchStream, "chunks", watched)
    run_fit(documents, tmp_path / "run", epochs=1)
    assert events[:7] == ["made", "called", "made", "called", "made", "waited", "called"]
    assert events.count("made") == events.count("called") == events.count("waited")


def test_state_is_made_after_compilation_and_only_if_none_is_saved(documents, tmp_path, monkeypatch):
    events, call = [], Plan.__call__

    def make(loss_fn, optimizer, like, ahead):
        ahead = list(ahead)
        made = compile_steps(loss_fn, optimizer, like, ahead)
        events.append(f"{len(ahead)} programs")
        return made

    monkeypatch.setattr(loop, "compile_steps", make)
    monkeypatch.setattr(Plan, "__call__", lambda plan: (events.append("a state"), call(plan))[1])
    run_fit(documents, tmp_path / "run", epochs=1)
    assert events == ["2 programs", "a state"]
    state, _ = run_fit(documents, tmp_path / "run", resume=True)
    again, _ = run_fit(documents, tmp_path / "run", resume=True)
    assert events[2:] == ["2 programs", "0 programs"]  # nothing is left to do the second time
    same(again, state)
    same(state.frozen, {"scale": jnp.ones(())})


def test_planned_state_must_not_have_frozen_parameters(documents, tmp_path):
    optimizer, stream = make_optimizer(OptimizerConfig(), 1), BatchStream(documents, 4, seed=1, bounds=(32,))
    frozen = Plan(lambda: TrainState.create({"table": jnp.zeros(50)}, optimizer, {"scale": jnp.ones(())}))
    with contextlib.closing(Run.create(tmp_path / "run", {}, monitor="figure")) as run:
        with pytest.raises(ValueError, match="frozen"):
            fit(frozen, loss_fn, optimizer, stream, run, epochs=1, seed=0, on_epoch=lambda *_: {})


def test_results_do_not_depend_on_steps_per_call(documents):
    stream = BatchStream(documents, 4, seed=1, bounds=(32,))
    batches = [jax.tree.map(lambda a: a[0], d.batches) for d in stream.chunks(0, 10)]
    optimizer = make_optimizer(OptimizerConfig(), 10)
    run = compile_steps(loss_fn, optimizer)
    states = []
    for counts in ((8, 2), (3, 4, 3)):
        state = TrainState.create({"table": jnp.zeros(50)}, optimizer, {"scale": jnp.ones(())})
        done = 0
        for count in counts:
            part = batches[done : done + count]
            stacked = jax.tree.map(lambda *a: np.stack(a), *part, *[part[0]] * (8 - count))
            state, _ = run(state, stacked, count, jax.random.key(0))
            done += count
        states.append(state)
    same(*states)


@pytest.mark.parametrize(
    ("stop_after", "number"),
    [
        (1, signal.SIGTERM),
        (10, signal.SIGINT),  # the end of an epoch
        (13, signal.SIGTERM),
    ],
)
def test_resumed_run_equals_uninterrupted_run(documents, tmp_path, complete, stop_after, number):
    def stop(step):
        if step >= stop_after:
            os.kill(os.getpid(), number)

    path = tmp_path / "stopped"
    with pytest.raises(Interrupted) as info:
        run_fit(documents, path, after_call=stop)
    assert info.value.exit_code == 128 + number
    state, records = run_fit(documents, path, resume=True)
    same(state, complete[0])
    assert without_times(records) == without_times(complete[1])
    assert without_times(lines(path)) == without_times(lines(tmp_path / "complete"))


def test_run_resumes_after_a_crash_from_the_last_save(documents, tmp_path, complete):
    path = tmp_path / "crashed"

    def crash(step):
        if step > 13:
            raise MemoryError

    with pytest.raises(MemoryError):
        run_fit(documents, path, after_call=crash, save_every=2)
    state, records = run_fit(documents, path, resume=True, save_every=2)
    same(state, complete[0])
    assert without_times(records) == without_times(complete[1])


def test_training_continues_while_a_step_is_written(documents, tmp_path, monkeypatch):
    written, went_on, real = threading.Event(), [], steps.write_manifest

    def wait_and_write(folder):
        assert written.wait(60), "training waited for the save"
        real(folder)

    def look(step):
        folders = {path.name for path in (tmp_path / "run" / "checkpoints").glob("*")}
        if step == 7:  # and the save of step 5, begun two steps ago, is still under way
            went_on.append(folders == {"5.part"})
            written.set()

    monkeypatch.setattr(steps, "write_manifest", wait_and_write)
    run_fit(documents, tmp_path / "run", k=1, save_every=4, after_call=look)
    assert went_on == [True]


def test_resuming_a_finished_run_changes_nothing(documents, tmp_path, complete):
    state, records = run_fit(documents, tmp_path / "complete", resume=True)
    same(state, complete[0])
    assert records == complete[1]


def test_best_epoch_is_kept_beside_the_newest_steps(documents, tmp_path):
    figures = iter([3.0, 1.0, 2.0, 5.0, 4.0])
    stream = BatchStream(documents, 8, seed=1, bounds=(32,))
    optimizer = make_optimizer(OptimizerConfig(), 5 * stream.steps_per_epoch)
    frozen = {"scale": jnp.ones(())}
    run = Run.create(tmp_path / "run", {}, monitor="figure")
    seen = []

    def on_epoch(state, sums):
        seen.append(np.asarray(state.params["table"]).copy())
        return {"figure": next(figures)}

    fit(begin(optimizer), loss_fn, optimizer, stream, run, epochs=5, seed=0, on_epoch=on_epoch, frozen=frozen)
    run = Run.open(tmp_path / "run")
    np.testing.assert_array_equal(run.restore_best(("params",))["params"]["table"], seen[1])
    assert len(run.steps.saved()) == 3
    run.close()
