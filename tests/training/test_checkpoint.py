"""The folder of a run: creating, resuming, replacing, locking and reading it."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from elmo_jax.errors import InputError
from elmo_jax.storage.files import write_config
from elmo_jax.training.checkpoint import Position, Run

STATE = {"w": jnp.arange(6.0).reshape(2, 3), "n": jnp.int32(4), "half": jnp.ones(2, jnp.bfloat16)}


def test_saved_step_is_restored_exactly(tmp_path):
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
    assert after.step == before.step and after.records == before.records
    np.testing.assert_array_equal(after.sums["confusion"], np.eye(2))
    assert (after.sums["loss"], after.seconds, after.skipped) == (0.1, 1.5, 0)


def test_saving_copies_before_it_returns(tmp_path):
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


def test_existing_run_needs_resume_or_overwrite(tmp_path):
    path = tmp_path / "run"
    run = Run.create(path, {"lr": 1}, monitor="loss")
    run.save(STATE, Position(1))
    run.close()
    with pytest.raises(InputError, match=r"already exists; pass resume=True"):
        Run.create(path, {"lr": 1}, monitor="loss")
    with pytest.raises(InputError, match=r"was started with other settings \(lr 1 -> 2\)"):
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


def test_input_paths_may_change_while_their_digests_are_the_same(tmp_path):
    def create(folder, texts, input_paths):
        config = {"data": {"data_dir": folder}, "texts": texts}
        Run.create(path, config, monitor="loss", resume=True, input_paths=input_paths).close()

    path, paths = tmp_path / "run", {"data.data_dir"}
    create("a", "digest", paths)
    (path / "metrics.jsonl").write_text("{}\n")
    create("b", "digest", paths)
    with pytest.raises(InputError, match=r"\(data.data_dir 'b' -> 'c'\)"):
        create("c", "digest", ())
    with pytest.raises(InputError, match=r"\(data.data_dir 'b' -> 'c'; texts 'digest' -> 'other'\)"):
        create("c", "other", paths)


def test_fewer_epochs_than_were_run_are_refused(tmp_path):
    def create(epochs):
        return Run.create(tmp_path / "run", {"epochs": epochs}, monitor="loss", resume=True)

    run = create(3)
    run.save(STATE, Position(6, records=[{"epoch": i, "step": 3 * i, "loss": 1.0} for i in (1, 2)]))
    run.close()
    with pytest.raises(InputError, match="has run 2 epochs; give at least as many epochs"):
        create(1)
    assert run.config["epochs"] == 3
    create(2).close()


def test_learning_rate_may_change_within_an_epoch_if_allowed(tmp_path):
    def create(rate, **more):
        config = {"optimizer": {"learning_rate": rate}}
        return Run.create(tmp_path / "run", config, monitor="loss", resume=True, **more)

    run = create(2.0)
    run.save(STATE, Position(3))
    run.close()
    with pytest.raises(InputError, match=r"learning_rate 2.0 -> 1.0\); .* allow_config_change=True"):
        create(1.0)
    run = create(1.0, allow_config_change=True)
    assert run.config["optimizer"] == {"learning_rate": 1.0}
    run.close()


def test_seed_may_change_between_epochs_if_allowed(tmp_path):
    def create(seed, **more):
        return Run.create(tmp_path / "run", {"seed": seed, "lr": 1}, monitor="loss", resume=True, **more)

    run = create(0)
    run.save(STATE, Position(3, records=[{"epoch": 1, "step": 3, "loss": 1.0}]))
    run.close()
    with pytest.raises(InputError, match=r"\(seed 0 -> 1\); .* or pass allow_config_change=True"):
        create(1)
    run = create(1, allow_config_change=True)
    run.save(STATE, Position(4, records=[{"epoch": 1, "step": 3, "loss": 1.0}]))
    run.close()
    with pytest.raises(InputError, match="stopped within an epoch; keep the seed until it has ended"):
        create(2, allow_config_change=True)
    with pytest.raises(
        InputError, match=r"other settings \(monitor 'loss' -> 'figure'\); resume with those$"
    ):
        Run.create(tmp_path / "run", {"seed": 1, "lr": 1}, "figure", resume=True, allow_config_change=True)


def test_resuming_needs_the_same_texts_and_repairs_them(tmp_path):
    def create(text):
        return Run.create(tmp_path / "run", {}, "loss", resume=True, files={"vocab.txt": text})

    run = create("the\nbank\n")
    run.log([{"loss": 1.0}])  # a run without results would be replaced
    run.close()
    with pytest.raises(InputError, match=r"vocab\.txt: differs from the present text"):
        create("the\nriver\n")
    with pytest.raises(InputError, match=r"vocab\.txt: differs from the present text"):
        create("the\n")
    (tmp_path / "run" / "vocab.txt").write_text("damaged")
    create("the\nbank\n").close()
    assert (tmp_path / "run" / "vocab.txt").read_text() == "the\nbank\n"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["files"]["vocab.txt"]["size"] == 9


def test_folder_has_one_writer(tmp_path):
    run = Run.create(tmp_path / "run", {}, monitor="loss")
    for how in ({"resume": True}, {"overwrite": True}, {}):
        with pytest.raises(InputError, match="another run writes there; wait for it"):
            Run.create(tmp_path / "run", {}, monitor="loss", **how)
    Run.open(tmp_path / "run")  # reading needs no lock
    run.close()
    Run.create(tmp_path / "run", {}, monitor="loss", overwrite=True).close()


def test_saved_model_is_no_run(tmp_path):
    write_config(tmp_path, {"model": {}}, {})
    with pytest.raises(InputError, match="holds a saved model, not a run"):
        Run.open(tmp_path)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that refuses even root")
def test_folder_that_cannot_be_written_is_reported(tmp_path):
    with pytest.raises(InputError, match=r"/sys/kernel/run: cannot be written"):
        Run.create(Path("/sys/kernel/run"), {}, monitor="loss")


def test_metrics_with_nan_are_refused(tmp_path):
    run = Run.create(tmp_path / "run", {}, monitor="loss")
    run.log([{"loss": 1.0}])
    with pytest.raises(ValueError, match="JSON"):
        run.log([{"loss": float("nan")}])
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"loss": 1.0}\n'
    run.close()


def test_unusable_output_folders_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file: is a file"):
        Run.create(tmp_path / "file", {}, monitor="loss")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="full: is not empty and holds no run"):
        Run.create(tmp_path / "full", {}, monitor="loss", overwrite=True)
    with pytest.raises(InputError, match="cannot be written"):
        Run.create(tmp_path / "file" / "below", {}, monitor="loss")


def test_missing_runs_are_reported(tmp_path):
    with pytest.raises(InputError, match="holds no run"):
        Run.open(tmp_path / "none")
    run = Run.create(tmp_path / "run", {}, monitor="loss")
    with pytest.raises(InputError, match="holds no saved step"):
        run.restore_best()
    run.close()
    (tmp_path / "run" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json: cannot be read"):
        Run.open(tmp_path / "run")


def test_metrics_are_complete_lines(tmp_path):
    run = Run.create(tmp_path / "run", {}, monitor="loss")
    for n in range(3):
        run.log([{"epoch": i} for i in range(n)])
        text = (tmp_path / "run" / "metrics.jsonl").read_text()
        assert [json.loads(line) for line in text.splitlines()] == [{"epoch": i} for i in range(n)]
