"""The loop on a model of a few numbers: resuming, sharing out, stopping, and what it refuses."""

import contextlib
import json
import os
import signal
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elmo_jax import loop, steps
from elmo_jax.checkpoint import Run
from elmo_jax.data import BatchStream
from elmo_jax.dispatch import make_dispatch
from elmo_jax.errors import InputError
from elmo_jax.loop import Interrupted, fit
from elmo_jax.mesh import Plan
from elmo_jax.train import (
    OptimizerConfig,
    TrainState,
    _clip_by_global_norm,
    evaluate,
    make_optimizer,
    train_step,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")
EPOCHS = 2


def loss_fn(params, batch, key):
    """Bag-of-words regression with noise, so that keys matter, and a scale that is frozen."""
    values = params["table"][batch.words] * params["scale"]
    mask = jnp.arange(batch.words.shape[1])[None] < batch.lengths[:, None]
    noise = jax.random.normal(key, values.shape)
    each = (jnp.sum(mask * (values + 0.1 * noise), 1) - batch.labels) ** 2 * batch.weight
    return each.sum() / batch.weight.sum(), {"documents": batch.weight.sum(), "error": each.sum()}


def not_a_number(params, batch, key):
    loss, sums = loss_fn(params, batch, key)
    return loss * jnp.nan, sums


def begin(optimizer):
    return Plan(lambda: TrainState.create({"table": jnp.zeros(50)}, optimizer))


def run_fit(documents, path, k=3, epochs=EPOCHS, resume=False, loss=loss_fn, figure=None, **more):
    stream = BatchStream(documents, 4, seed=1, bounds=(12, 32), steps_per_dispatch=k)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.05), EPOCHS * stream.steps_per_epoch)
    more["frozen"] = {"scale": jnp.ones(())}
    run = Run.create(path, {"seed": 1}, monitor="figure", resume=resume)
    error = jax.jit(lambda params, batch: loss_fn(params, batch, jax.random.key(0))[1])

    def on_epoch(state, sums):
        held = evaluate(error, {**state.params, **state.frozen}, BatchStream(documents, 4, bounds=(32,)))
        value = float(held["error"] / held["documents"]) if figure is None else figure()
        return {"figure": value, "train": float(sums["error"])}

    try:
        return fit(
            begin(optimizer), loss, optimizer, stream, run, epochs=epochs, seed=7, on_epoch=on_epoch, **more
        )
    finally:
        run.close()


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def without_times(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


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
    dispatches, add = BatchStream.dispatches, loop._add

    def watched(self, first, last):
        for made in dispatches(self, first, last):
            told.extend(["made"] * (self.seed is not None))  # evaluation's are in order
            yield made

    def make(*args):
        run = make_dispatch(*args)

        def called(state, batches, count, key):
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batches))
            told.append("called")
            return run(state, batches, count, key)

        return called

    monkeypatch.setattr(loop, "make_dispatch", make)
    monkeypatch.setattr(loop, "_add", lambda *args: (told.append("waited"), add(*args)))
    monkeypatch.setattr(BatchStream, "dispatches", watched)
    run_fit(documents, tmp_path / "run", epochs=1)
    assert told[:7] == ["made", "called", "made", "called", "made", "waited", "called"]
    assert told.count("made") == told.count("called") == told.count("waited")


def test_a_state_is_made_once_its_programs_are_there_and_not_at_all_where_one_is_saved(
    documents, tmp_path, monkeypatch
):
    told, call = [], Plan.__call__

    def make(loss_fn, optimizer, like, ahead):
        ahead = list(ahead)
        made = make_dispatch(loss_fn, optimizer, like, ahead)
        told.append(f"{len(ahead)} programs")
        return made

    monkeypatch.setattr(loop, "make_dispatch", make)
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
    batches = [jax.tree.map(lambda a: a[0], d.batches) for d in stream.dispatches(0, 10)]
    optimizer = make_optimizer(OptimizerConfig(), 10)
    run = make_dispatch(loss_fn, optimizer)
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
        run_fit(documents, path, after_dispatch=stop)
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
        run_fit(documents, path, after_dispatch=crash, save_every=2)
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
    run_fit(documents, tmp_path / "run", k=1, save_every=4, after_dispatch=look)
    assert went_on == [True]


def test_a_finished_run_can_be_resumed_and_stays(documents, tmp_path, whole):
    state, records = run_fit(documents, tmp_path / "whole", resume=True)
    same(state, whole[0])
    assert records == whole[1]


def test_a_loss_that_is_not_finite_stops_the_run_and_is_not_saved(documents, tmp_path):
    def sick(params, batch, key):
        loss, sums = loss_fn(params, batch, key)
        return loss + jnp.where(jnp.abs(params["table"]).max() > 0.1, jnp.nan, 0.0), sums

    said = r"5 steps in a row, up to step (\d+) \(learning rate 0\.0\d+, documents (\d+, )+\d+\); lower"
    with pytest.raises(InputError, match=said) as told:
        run_fit(documents, tmp_path / "sick", loss=sick, save_every=1)
    run = Run.open(tmp_path / "sick")
    assert np.isfinite(run.restore_best()["params"]["table"]).all()
    run.close()
    assert str(told.value).endswith(
        f"; step {run.steps.saved()[-1]} is saved, go on with --resume --allow-config-change"
    )


def test_a_run_that_fails_before_its_first_save_says_so(documents, tmp_path):
    with pytest.raises(
        InputError,
        match=r"5 steps in a row, up to step 5 .*; no step was saved yet, begin anew with --overwrite$",
    ):
        run_fit(documents, tmp_path / "sick", loss=not_a_number)


def test_an_epoch_without_a_sound_step_stops_the_run(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "PATIENCE", 1000)
    with pytest.raises(InputError, match=r"not finite at any step of epoch 1 \(.*--clip-norm; no step was"):
        run_fit(documents, tmp_path / "run", loss=not_a_number)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_commands_own_remedy_is_told_wherever_training_fails(documents, tmp_path, monkeypatch):
    create = Run.create

    def with_remedy(*args, **more):
        run = create(*args, **more)
        run.steps.remedy = "turn it down"
        return run

    monkeypatch.setattr(Run, "create", with_remedy)
    for name, more in {"steps": {"loss": not_a_number}, "figure": {"figure": lambda: float("nan")}}.items():
        with pytest.raises(InputError, match=r"(steps in a row|after epoch 1).*; turn it down$"):
            run_fit(documents, tmp_path / name, **more)
    run = with_remedy(tmp_path / "state", {}, monitor="loss")
    with pytest.raises(InputError, match=r"not finite, and is not saved; turn it down$"):
        run.steps.save(1, {"w": jnp.full(2, jnp.inf)}, {}, {})
    run.close()


def test_a_step_that_is_not_finite_changes_nothing_but_the_count(documents):
    stream = BatchStream(documents, 4, seed=1, bounds=(32,))
    (batch,) = (jax.tree.map(lambda a: a[0], d.batches) for d in stream.dispatches(0, 1))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    start = TrainState.create({"table": jnp.ones(50)}, optimizer, {"scale": jnp.ones(())})

    def task(params, batch, key, loss=0.0, gradient=0.0):
        value, sums = loss_fn(params, batch, key)
        root = jnp.sqrt(jnp.sum((params["table"] - 1) ** 2))  # whose gradient here is 0 / 0
        return value + loss + gradient * root, sums

    for sick in ({"loss": jnp.nan}, {"loss": jnp.inf}, {"gradient": 1.0}):
        loss = lambda params, batch, key, sick=sick: task(params, batch, key, **sick)  # noqa: E731
        after, sums = train_step(start, batch, jax.random.key(0), loss, optimizer)
        same((after.params, after.opt_state), (start.params, start.opt_state))
        assert int(after.step) == 1 and {name: float(a) for name, a in sums.items()} == {
            "documents": 0,
            "error": 0,
            "loss": 0,
            "steps": 0,
        }
    after, sums = train_step(start, batch, jax.random.key(0), loss_fn, optimizer)
    assert float(sums["steps"]) == 1 and (np.asarray(after.params["table"]) != 1).any()


def test_skipped_steps_are_counted_and_told_and_leave_the_rest_as_it_was(documents, tmp_path):
    longest = documents.lengths.max()

    def sick(params, batch, key):
        loss, sums = loss_fn(params, batch, key)
        return jnp.where(jnp.any(batch.lengths == longest + 2), jnp.nan, loss), sums

    with pytest.warns(UserWarning, match=r"\d steps of epoch \d were skipped") as said:
        state, records = run_fit(documents, tmp_path / "run", loss=sick)
    stream = BatchStream(documents, 4, seed=1, bounds=(12, 32), steps_per_dispatch=3)
    steps = range(EPOCHS * stream.steps_per_epoch)
    hit = [(documents.lengths[stream.rows(step)] == longest).any() for step in steps]
    want = np.reshape(hit, (EPOCHS, -1)).sum(1)
    assert [r["skipped"] for r in records] == want.tolist() and want.all() and len(said) == EPOCHS
    assert int(state.step) == len(steps)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_a_figure_that_is_not_finite_stops_before_it_is_saved(documents, tmp_path):
    figures = iter([1.0, float("nan")])
    with pytest.raises(InputError, match="figure is nan after epoch 2; lower --learning-rate"):
        run_fit(documents, tmp_path / "run", figure=lambda: next(figures))
    run = Run.open(tmp_path / "run")
    assert len(lines(tmp_path / "run")) == len(run.steps.saved()) == 1


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


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("name", ["adam", "adagrad"])
def test_first_steps_warm_up_and_last_ones_fall(schedule, name):
    config = OptimizerConfig(name, 0.1, schedule, warmup=0.2, clip_norm=1e9)
    optimizer = make_optimizer(config, 20)
    params, sizes = jnp.zeros(()), []
    state = optimizer.init(params)
    for _ in range(20):
        update, state = optimizer.update(jnp.ones(()), state, params)
        sizes.append(abs(float(update)))
    if name == "adam":  # whose update of a constant gradient is the learning rate
        np.testing.assert_allclose(sizes[:5], [0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-3)
        assert sizes[-1] == pytest.approx(0.1, rel=1e-3) if schedule == "constant" else sizes[-1] < 0.02
    assert sizes[0] < sizes[2]


def test_gradients_are_clipped_by_their_global_norm():
    optimizer = make_optimizer(OptimizerConfig("adagrad", 1.0, "constant", 0.0, clip_norm=1.0), 10)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    g = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}
    update, _ = optimizer.update(g, optimizer.init(params), params)
    want = {"a": 0.6, "b": 0.8}  # of norm 1, over the root of the accumulator
    np.testing.assert_allclose(update["a"][0], -want["a"] / np.sqrt(1 + want["a"] ** 2), rtol=1e-4)
    np.testing.assert_allclose(update["b"][1], -want["b"] / np.sqrt(1 + want["b"] ** 2), rtol=1e-4)


@pytest.mark.parametrize("most", [0.5, 5.0, 100.0, 1e39, np.inf])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e15, np.nan])
def test_gradients_are_clipped_as_optax_clips_them(most, scale):
    gradients = {"a": scale * jnp.array([3.0, 0.5]), "b": scale * jnp.array([-4.0], jnp.bfloat16)}
    got, want = (
        clip.update(gradients, clip.init(gradients))[0]
        for clip in (_clip_by_global_norm(most), optax.clip_by_global_norm(most))
    )
    for name, g in gradients.items():
        assert got[name].dtype == g.dtype
        np.testing.assert_allclose(
            got[name].astype(float), want[name].astype(float), rtol=1e-2 if name == "b" else 1e-6
        )


def test_a_gradient_that_is_not_finite_is_not_made_so_by_clipping():
    clip = _clip_by_global_norm(1.0)
    assert not np.isfinite(clip.update({"a": jnp.array([1.0, np.inf])}, clip.init({}))[0]["a"]).all()
