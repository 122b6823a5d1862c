import json

import jax.numpy as jnp
import numpy as np
import pytest

from elmo_jax.checkpoint import Position, Run
from elmo_jax.errors import InputError

STATE = {"w": jnp.arange(6.0).reshape(2, 3), "n": jnp.int32(4), "half": jnp.ones(2, jnp.bfloat16)}


def test_a_step_comes_back_as_it_was(tmp_path):
    run = Run.create(tmp_path / "run", {"a": (1, 2)}, monitor="loss")
    before = Position(
        5, {"loss": np.float64(0.1), "confusion": np.eye(2)}, 1.5, [{"epoch": 1, "step": 3, "loss": 2.0}]
    )
    run.save(STATE, before)
    run.close()
    run = Run.create(tmp_path / "run", {"a": (1, 2)}, monitor="loss", resume=True)
    state, after = run.restore(STATE)
    run.close()
    for name, value in STATE.items():
        assert state[name].dtype == value.dtype
        np.testing.assert_array_equal(state[name], value)
    assert after.to_json() == before.to_json()


def test_saving_copies_before_it_returns(tmp_path):
    """The state is donated to the next step while it is still being written."""
    import jax

    bump = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)
    state = {"w": jnp.arange(4_000_000.0)}
    want = np.asarray(state["w"]).copy()
    run = Run.create(tmp_path / "run", {}, monitor="loss")
    run.save(state, Position(1))
    for _ in range(5):
        state = bump(state)
    jax.block_until_ready(state)
    run.close()
    np.testing.assert_array_equal(Run.open(tmp_path / "run").restore_best()["w"], want)


def test_a_folder_with_a_run_is_only_replaced_or_continued_when_told(tmp_path):
    path = tmp_path / "run"
    run = Run.create(path, {"lr": 1}, monitor="loss")
    run.save(STATE, Position(1))
    run.close()
    with pytest.raises(InputError, match=r"holds a run; go on with --resume, replace it with --overwrite"):
        Run.create(path, {"lr": 1}, monitor="loss")
    with pytest.raises(InputError, match=r"was run with other settings \(lr 1 -> 2\)"):
        Run.create(path, {"lr": 2}, monitor="loss", resume=True)
    (path / "notes.md").write_text("mine")
    run = Run.create(path, {"lr": 2}, monitor="loss", overwrite=True)
    assert run.restore(STATE) is None
    run.close()
    assert (path / "notes.md").read_text() == "mine"
    assert json.loads((path / "config.json").read_text())["lr"] == 2


def test_output_and_epochs_may_change(tmp_path):
    Run.create(tmp_path / "run", {"epochs": 1, "output": "a", "lr": 1}, monitor="loss")
    run = Run.create(tmp_path / "run", {"epochs": 2, "output": "b", "lr": 1}, monitor="loss", resume=True)
    assert run.config["epochs"] == 2


def test_places_a_run_cannot_go(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is a file"):
        Run.create(tmp_path / "file", {}, monitor="loss")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="full: is not empty and holds no run"):
        Run.create(tmp_path / "full", {}, monitor="loss", overwrite=True)
    with pytest.raises(InputError, match="cannot be written"):
        Run.create(tmp_path / "file" / "below", {}, monitor="loss")


def test_runs_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        Run.open(tmp_path / "none")
    run = Run.create(tmp_path / "run", {}, monitor="loss")
    with pytest.raises(InputError, match="holds no saved step"):
        run.restore_best()
    run.close()
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        Run.open(tmp_path / "run")


def test_metrics_are_whole_lines(tmp_path):
    run = Run.create(tmp_path / "run", {}, monitor="loss")
    for n in range(3):
        run.log([{"epoch": i} for i in range(n)])
        text = (tmp_path / "run" / "metrics.jsonl").read_text()
        assert [json.loads(line) for line in text.splitlines()] == [{"epoch": i} for i in range(n)]
