"""Saved steps: damaged ones are never used, failed saves are reported, and valid steps are kept."""

import json
import os
import shutil
import time
import warnings

import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore

from elmo_jax.errors import InputError
from elmo_jax.storage.files import write_manifest
from elmo_jax.training.checkpoint import Position, Run, StepStore


def state(step):
    return {"params": {"w": jnp.arange(6.0).reshape(2, 3) + step}, "step": jnp.int32(step)}


def save(run, *steps):
    for step in steps:
        run.save(state(step), Position(step))
    run.steps.wait()


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
def test_damage_to_any_file_is_reported_and_the_step_before_is_used(run, tmp_path, how):
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
        with pytest.warns(UserWarning, match=r"checkpoints/5: .*; this step is not used") as caught:
            best = Run.open(run.path).restore_best()
        assert len(caught) == 1 and "\n" not in str(caught[0].message)
        np.testing.assert_array_equal(best["params"]["w"], state(3)["params"]["w"])
        shutil.rmtree(run.path / "checkpoints")


WRONG_POSITIONS = {
    "another step": {"step": 4},
    "a negative step": {"step": -5},
    "a step that is text": {"step": "5"},
    "sums that are text": {"sums": {"loss": "much"}},
    "sums of sums": {"sums": {"loss": {"a": 1}}},
    "a record without its epoch": {"records": [{"step": 5, "loss": 1.0}]},
    "a record that is text": {"records": ["5"]},
    "seconds that are null": {"seconds": None},
    "skipped steps that are many numbers": {"skipped": [1]},
}


@pytest.mark.parametrize("name", WRONG_POSITIONS)
def test_step_with_a_wrong_position_is_not_used(run, name):
    save(run, 3, 5)
    folder = run.path / "checkpoints" / "5"
    (folder / "manifest.json").unlink()
    position = json.loads((folder / "position.json").read_text()) | WRONG_POSITIONS[name]
    (folder / "position.json").write_text(json.dumps(position))
    write_manifest(folder)
    run.close()
    with pytest.warns(UserWarning, match=r"checkpoints/5: position.json is wrong .*; this step is not used"):
        best = Run.open(run.path).restore_best()
    np.testing.assert_array_equal(best["params"]["w"], state(3)["params"]["w"])


def test_copy_of_a_step_under_a_later_number_is_set_aside(run):
    save(run, 3, 5)
    shutil.copytree(run.path / "checkpoints" / "5", run.path / "checkpoints" / "9")
    with pytest.warns(UserWarning, match=r"checkpoints/9: position.json is wrong \(it belongs to step 5\)"):
        _, position = run.restore(state(0))
    assert position.step == 5
    save(run, 7)
    assert run.steps.saved() == [5, 7]


def test_damaged_step_is_set_aside_and_replaced(run):
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


def test_without_a_valid_step_nothing_is_used_or_removed(run):
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


def test_best_valid_epoch_is_used_if_the_best_is_damaged(run):
    losses = [3.0, 1.0, 2.0, 5.0]
    records = [{"epoch": i + 1, "step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    for i in range(4):
        run.save(state(i + 1), Position(i + 1, records=records[: i + 1]))
    run.steps.wait()
    assert run.steps.saved() == [2, 3, 4]
    assert int(run.restore_best()["step"]) == 2
    flip(run.path / "checkpoints" / "2" / "position.json")
    with pytest.warns(UserWarning, match="checkpoints/2"):
        assert int(Run.open(run.path).restore_best()["step"]) == 3


def test_unfinished_save_is_no_step_and_is_removed(run):
    save(run, 3)
    shutil.copytree(run.path / "checkpoints" / "3", run.path / "checkpoints" / "5.part")
    assert int(run.restore_best()["step"]) == 3
    run.close()
    Run.create(run.path, {}, monitor="loss", resume=True).close()
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize("step", [5, 4])
def test_step_that_is_not_later_is_refused(run, step):
    save(run, 5)
    with pytest.raises(ValueError, match=f"step {step} is not later than step 5"):
        run.save(state(step), Position(step))


def test_newest_step_does_not_depend_on_the_clock(run, monkeypatch):
    began = time.time()
    for step in (8, 9, 10):
        monkeypatch.setattr(time, "time", lambda step=step: began - 1e6 * step)
        monkeypatch.setattr(time, "time_ns", lambda step=step: int(1e9 * (began - 1e6 * step)))
        save(run, step)
        os.utime(run.path / "checkpoints" / str(step), 2 * (began - 1e6 * step,))
    assert run.steps.saved() == [9, 10]
    assert run.restore(state(0))[1].step == 10


def test_state_that_is_not_finite_is_not_saved(run):
    save(run, 3)
    sick = state(5) | {"params": {"w": jnp.array([1.0, np.nan])}}
    with pytest.raises(InputError, match="step 5 has numbers that are not finite"):
        run.save(sick, Position(5))
    assert run.steps.saved() == [3]


def test_free_space_is_checked_before_saving(run, monkeypatch):
    save(run, 3)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1_000_000))
    with pytest.raises(
        InputError, match=r"checkpoints/5: could not be saved \(1 MB are free, 17 MB needed\)"
    ):
        run.save(state(5), Position(5))
    assert [p.name for p in (run.path / "checkpoints").iterdir()] == ["3"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"w": jnp.zeros((2, 4))}, r"params/w is float32 \[2, 3\], expected float32 \[2, 4\]"),
        ({"w": jnp.zeros((2, 3), jnp.bfloat16)}, r"float32 \[2, 3\], expected bfloat16 \[2, 3\]"),
        ({}, r"params/w is float32 \[2, 3\], expected nothing"),
        ({"w": jnp.zeros((2, 3)), "b": jnp.zeros(1)}, r"params/b is missing, expected float32 \[1\]"),
    ],
)
def test_other_shapes_or_dtypes_are_refused(run, params, message):
    save(run, 3)
    with pytest.raises(InputError, match=message):
        run.restore({"params": params, "step": jnp.int32(0)})


def test_file_in_place_of_the_steps_folder_is_reported(run):
    (run.path / "checkpoints").write_text("")
    with pytest.raises(
        InputError, match=r"checkpoints/3: could not be saved \((File exists|Not a directory)\)"
    ):
        save(run, 3)


def test_save_returns_before_the_step_is_written(tmp_path):
    steps, order = StepStore(tmp_path / "steps"), []
    finish = steps._finish
    steps._finish = lambda *args: (time.sleep(0.2), finish(*args), order.append("written"))
    steps.save(state(1), Position(1), {})
    order.append("returned")
    steps.close()
    assert order == ["returned", "written"]


def test_earliest_of_equal_epochs_is_the_best_and_is_kept(run):
    records = [
        {"epoch": i + 1, "step": i + 1, "loss": loss} for i, loss in enumerate([3.0, 1.0, 1.0, 1.0, 2.0])
    ]
    for i in range(5):
        run.save(state(i + 1), Position(i + 1, records=records[: i + 1]))
    run.steps.wait()
    assert run.steps.saved() == [2, 4, 5]
    assert int(run.restore_best()["step"]) == 2


def test_save_avoids_orbax_features_that_leak_memory(run, monkeypatch):
    """Counting bytes and the OCDBT database leak about 30 and 15 KB with every save."""
    counted = []
    monkeypatch.setattr(
        tensorstore, "experimental_collect_matching_metrics", lambda *a: counted.append(a) or []
    )
    save(run, 3)
    names = {p.name for p in (run.path / "checkpoints" / "3" / "state").iterdir()}
    assert not counted and "params.w" in names and "manifest.ocdbt" not in names
    restored, _ = run.restore(state(0))
    np.testing.assert_array_equal(restored["params"]["w"], state(3)["params"]["w"])
