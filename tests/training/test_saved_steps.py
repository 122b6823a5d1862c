"""Saved steps: what is damaged is never used, what fails to be saved is told, what is whole stays."""

import os
import shutil
import time
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from elmo_jax.errors import InputError
from elmo_jax.training.checkpoint import Position, Run, StepStore


def state(step):
    return {"params": {"w": jnp.arange(6.0).reshape(2, 3) + step}, "step": jnp.int32(step)}


def save(run, *steps):
    for step in steps:
        run.save(state(step), Position(step))
    run.wait()


@pytest.fixture
def run(tmp_path):
    run = Run.create(tmp_path / "run", {}, monitor="loss")
    yield run
    run.close()


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << (len(data) % 8)
    path.write_bytes(data)


DAMAGES = {
    "a bit flipped": flip,
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_whatever_file_of_a_step_is_damaged_the_step_before_is_used_and_says_so(run, tmp_path, how):
    save(run, 3, 5)
    files = sorted(
        p.relative_to(run.path) for p in (run.path / "checkpoints" / "5").rglob("*") if p.is_file()
    )
    assert len(files) > 8
    run.close()
    shutil.copytree(run.path, tmp_path / "kept")
    for name in files:
        shutil.copytree(tmp_path / "kept" / "checkpoints", run.path / "checkpoints", dirs_exist_ok=True)
        DAMAGES[how](run.path / name)
        with pytest.warns(UserWarning, match=r"checkpoints/5: .*; this step is not used") as said:
            best = Run.open(run.path).restore_best()
        assert len(said) == 1 and "\n" not in str(said[0].message)
        np.testing.assert_array_equal(best["params"]["w"], state(3)["params"]["w"])
        shutil.rmtree(run.path / "checkpoints")


def test_a_damaged_step_is_set_aside_and_its_place_taken(run):
    save(run, 3, 5)
    flip(run.path / "checkpoints" / "5" / "position.json")
    run.close()
    run = Run.create(run.path, {}, monitor="loss", resume=True)
    with pytest.warns(UserWarning, match=r"5: position\.json is not what was saved \(sha256\); this step"):
        restored, position = run.restore(state(0))
    assert position.step == int(restored["step"]) == 3
    save(run, 5)
    run.close()
    assert (run.path / "checkpoints" / "5.damaged").is_dir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert int(Run.open(run.path).restore_best()["step"]) == 5


def test_where_no_step_is_whole_nothing_is_used_and_nothing_removed(run):
    save(run, 3, 5)
    for step in ("3", "5"):
        flip(run.path / "checkpoints" / step / "position.json")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="every saved step is damaged"):
            run.restore(state(0))
        with pytest.raises(InputError, match="every saved step is damaged"):
            Run.open(run.path).restore_best()
    assert run.steps.saved() == [3, 5]


def test_a_damaged_best_epoch_gives_way_to_the_best_that_is_whole(run):
    losses = [3.0, 1.0, 2.0, 5.0]
    records = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    for i in range(4):
        run.save(state(i + 1), Position(i + 1, records=records[: i + 1]))
    run.wait()
    assert run.steps.saved() == [2, 3, 4]
    assert int(run.restore_best()["step"]) == 2
    flip(run.path / "checkpoints" / "2" / "position.json")
    with pytest.warns(UserWarning, match="checkpoints/2"):
        assert int(Run.open(run.path).restore_best()["step"]) == 3


def test_what_a_crash_leaves_is_no_step_and_is_removed(run):
    save(run, 3)
    shutil.copytree(run.path / "checkpoints" / "3", run.path / "checkpoints" / "5.part")
    assert int(run.restore_best()["step"]) == 3
    run.close()
    Run.create(run.path, {}, monitor="loss", resume=True).close()
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize("step", [5, 4])
def test_a_step_that_is_not_later_is_refused(run, step):
    save(run, 5)
    with pytest.raises(ValueError, match=f"step {step} is not later than step 5"):
        run.save(state(step), Position(step))


def test_the_latest_is_the_highest_whatever_the_clock_says(run, monkeypatch):
    began = time.time()
    for step in (8, 9, 10):
        monkeypatch.setattr(time, "time", lambda step=step: began - 1e6 * step)
        monkeypatch.setattr(time, "time_ns", lambda step=step: int(1e9 * (began - 1e6 * step)))
        save(run, step)
        os.utime(run.path / "checkpoints" / str(step), 2 * (began - 1e6 * step,))
    assert run.steps.saved() == [9, 10]
    assert run.restore(state(0))[1].step == 10


def test_numbers_that_are_not_finite_are_not_saved(run):
    save(run, 3)
    sick = state(5) | {"params": {"w": jnp.array([1.0, np.nan])}}
    with pytest.raises(InputError, match="step 5 has numbers that are not finite"):
        run.save(sick, Position(5))
    assert run.steps.saved() == [3]


def test_room_is_looked_for_first(run, monkeypatch):
    save(run, 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1_000_000))
    with pytest.raises(
        InputError, match=r"checkpoints/5: could not be saved \(1 MB are free, 17 MB needed\)"
    ):
        run.save(state(5), Position(5))
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize(
    ("enabled", "said"),
    [
        ({"w": jnp.zeros((2, 4))}, r"params/w is float32 \[2, 3\], expected float32 \[2, 4\]"),
        ({"w": jnp.zeros((2, 3), jnp.bfloat16)}, r"float32 \[2, 3\], expected bfloat16 \[2, 3\]"),
        ({}, r"params/w is float32 \[2, 3\], expected nothing"),
        ({"w": jnp.zeros((2, 3)), "b": jnp.zeros(1)}, r"params/b is missing, expected float32 \[1\]"),
    ],
)
def test_another_shape_or_dtype_is_refused_by_both_names(run, enabled, said):
    save(run, 3)
    with pytest.raises(InputError, match=said):
        run.restore({"params": enabled, "step": jnp.int32(0)})


def test_a_file_where_the_steps_should_be(run):
    (run.path / "checkpoints").write_text("")
    with pytest.raises(
        InputError, match=r"checkpoints/3: could not be saved \((File exists|Not a directory)\)"
    ):
        save(run, 3)


def test_a_saved_state_may_be_large_and_training_goes_on_meanwhile(tmp_path):
    """The folder has its name only when the background is done; saving returns before."""
    steps, order = StepStore(tmp_path / "steps"), []
    finish = steps._finish
    steps._finish = lambda *args: (time.sleep(0.2), finish(*args), order.append("written"))
    steps.save(state(1), Position(1), {})
    order.append("returned")
    steps.close()
    assert order == ["returned", "written"]


def test_on_equal_figures_the_earliest_is_the_best_and_is_kept(run):
    records = [{"step": i + 1, "loss": loss} for i, loss in enumerate([3.0, 1.0, 1.0, 1.0, 2.0])]
    for i in range(5):
        run.save(state(i + 1), Position(i + 1, records=records[: i + 1]))
    run.wait()
    assert run.steps.saved() == [2, 4, 5]
    assert int(run.restore_best()["step"]) == 2


def test_a_save_neither_counts_bytes_nor_needs_a_database(run, monkeypatch):
    """Both leak, some 30 and 15 KB a save."""
    counted = []
    monkeypatch.setattr(
        tensorstore, "experimental_collect_matching_metrics", lambda *a: counted.append(a) or []
    )
    save(run, 3)
    names = {p.name for p in (run.path / "checkpoints" / "3" / "state").iterdir()}
    assert not counted and "params.w" in names and "manifest.ocdbt" not in names
    restored, _ = run.restore(state(0))
    np.testing.assert_array_equal(restored["params"]["w"], state(3)["params"]["w"])
