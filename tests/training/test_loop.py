"""The loop: resuming, sharing out, stopping, and what it keeps."""

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
def whole(documents, tmp_path):
    return run_fit(documents, tmp_path / "whole")


def test_it_learns_and_leaves_the_frozen_alone(whole, documents):
    state, records = whole
    batch = documents.batch(np.arange(len(documents)), 32)
    untrained = {"table": jnp.zeros(50), "scale": jnp.ones(())}
    assert records[-1]["figure"] < 0.9 * float(loss_fn(untrained, batch, jax.random.key(0))[0])
    assert [r["epoch"] for r in records] == [1, 2]
    assert int(state.step) == records[-1]["step"]
    same(state.frozen, {"scale": jnp.ones(())})


def test_a_hook_gets_every_new_epochs_whole_record(documents, tmp_path):
    got = []
    _, records = run_fit(documents, tmp_path / "run", epochs=1, on_record=got.append)
    assert got == records == lines(tmp_path / "run") and {"loss", "figure", "seconds"} <= got[0].keys()
    _, records = run_fit(documents, tmp_path / "run", resume=True, on_record=got.append)
    assert got == records and len(got) == EPOCHS


def test_the_next_batches_are_placed_before_anything_is_waited_for(documents, tmp_path, monkeypatch):
    told = []
    chunks, add = BatchStream.chunks, loop._add_metrics

    def watched(self, first, last):
        for made in chunks(self, first, last):
            told.extend(["made"] * (self.seed is not None))  # evaluation's are in order
            yield made

    def make(*args):
        run = compile_steps(*args)

        def called(state, batches, count, key):
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batches))
            told.append("called")
            return run(state, batches, count, key)

        return called

    monkeypatch.setattr(loop, "compile_steps", make)
    monkeypatch.setattr(loop, "_add_metrics", lambda *args: (told.append("waited"), add(*args)))
    monkeypatch.setattr(BatchStream, "chunks", watched)
    run_fit(documents, tmp_path / "run", epochs=1)
    assert told[:7] == ["made", "called", "made", "called", "made", "waited", "called"]
    assert told.count("made") == told.count("called") == told.count("waited")


def test_a_state_is_made_once_its_programs_are_there_and_not_at_all_where_one_is_saved(
    documents, tmp_path, monkeypatch
):
    told, call = [], Plan.__call__

    def make(loss_fn, optimizer, like, ahead):
        ahead = list(ahead)
        made = compile_steps(loss_fn, optimizer, like, ahead)
        told.append(f"{len(ahead)} programs")
        return made

    monkeypatch.setattr(loop, "compile_steps", make)
    monkeypatch.setattr(Plan, "__call__", lambda plan: (told.append("a state"), call(plan))[1])
    run_fit(documents, tmp_path / "run", epochs=1)
    assert told == ["2 programs", "a state"]
    state, _ = run_fit(documents, tmp_path / "run", resume=True)
    again, _ = run_fit(documents, tmp_path / "run", resume=True)
    assert told[2:] == ["2 programs", "0 programs"]  # nothing is left to do the second time
    same(again, state)
    same(state.frozen, {"scale": jnp.ones(())})


def test_what_is_frozen_is_given_to_fit_alone(documents, tmp_path):
    optimizer, stream = make_optimizer(OptimizerConfig(), 1), BatchStream(documents, 4, seed=1, bounds=(32,))
    frozen = Plan(lambda: TrainState.create({"table": jnp.zeros(50)}, optimizer, {"scale": jnp.ones(())}))
    with contextlib.closing(Run.create(tmp_path / "run", {}, monitor="figure")) as run:
        with pytest.raises(ValueError, match="frozen"):
            fit(frozen, loss_fn, optimizer, stream, run, epochs=1, seed=0, on_epoch=lambda *_: {})


def test_sharing_out_steps_to_dispatches_changes_nothing_a_step_does(documents):
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
        (4, signal.SIGINT),
        (10, signal.SIGTERM),
        (13, signal.SIGINT),
        (16, signal.SIGTERM),
    ],
)
def test_a_stopped_run_goes_on_bit_by_bit(documents, tmp_path, whole, stop_after, number):
    def stop(step):
        if step >= stop_after:
            os.kill(os.getpid(), number)

    path = tmp_path / "stopped"
    with pytest.raises(Interrupted) as info:
        run_fit(documents, path, after_call=stop)
    assert info.value.exit_code == 128 + number
    state, records = run_fit(documents, path, resume=True)
    same(state, whole[0])
    assert without_times(records) == without_times(whole[1])
    assert without_times(lines(path)) == without_times(lines(tmp_path / "whole"))


def test_a_crash_goes_on_from_the_last_save(documents, tmp_path, whole):
    path = tmp_path / "crashed"

    def crash(step):
        if step > 13:
            raise MemoryError

    with pytest.raises(MemoryError):
        run_fit(documents, path, after_call=crash, save_every=2)
    state, records = run_fit(documents, path, resume=True, save_every=2)
    same(state, whole[0])
    assert without_times(records) == without_times(whole[1])


def test_training_goes_on_while_a_step_is_written(documents, tmp_path, monkeypatch):
    written, went_on, real = threading.Event(), [], steps.write_manifest

    def wait_and_write(folder):
        assert written.wait(60), "training waits for the save"
        real(folder)

    def look(step):
        folders = {path.name for path in (tmp_path / "run" / "checkpoints").glob("*")}
        if step == 7:  # and the save of step 5, begun two steps ago, is still under way
            went_on.append(folders == {"5.part"})
            written.set()

    monkeypatch.setattr(steps, "write_manifest", wait_and_write)
    run_fit(documents, tmp_path / "run", k=1, save_every=4, after_call=look)
    assert went_on == [True]


def test_a_finished_run_can_be_resumed_and_stays(documents, tmp_path, whole):
    state, records = run_fit(documents, tmp_path / "whole", resume=True)
    same(state, whole[0])
    assert records == whole[1]


def test_the_best_epoch_is_kept_beyond_the_newest(documents, tmp_path):
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
