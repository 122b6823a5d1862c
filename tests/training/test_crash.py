"""Training processes that are killed, run out of disk, or get two signals."""

import json
import os
import random
import resource
import signal
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from processes import PROCESSES, finish, outcome, steps, wait_for

from elmo_jax.data.batching import BatchStream, Documents
from elmo_jax.errors import InputError, Interrupted
from elmo_jax.parallel import Plan
from elmo_jax.training import checkpoint as steps_module
from elmo_jax.training.checkpoint import Position, Run
from elmo_jax.training.loop import fit
from elmo_jax.training.step import TrainState
from experiments import pretrain


def loss_fn(params, batch, key):
    noise = jax.random.normal(key, params["ballast"].shape)
    each = (params["table"][batch.words].sum(1) - batch.labels) ** 2 * batch.weight
    return each.sum() + jnp.mean((params["ballast"] - noise) ** 2), {"documents": batch.weight.sum()}


def train(path, epochs, save_every=2, file_limit=None, resume=True):
    """Train a model with saves slow enough to be interrupted."""
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 10, 40)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    documents = Documents(rng.integers(4, 50, offsets[-1]).astype(np.int32), offsets, np.arange(40) % 3)
    stream = BatchStream(documents, 4, seed=1, bounds=(12,), steps_per_call=2)
    optimizer = optax.adam(0.05)
    params = {"table": jnp.zeros(50), "ballast": jax.random.normal(jax.random.key(5), (200_000,))}
    run = Run.create(path, {}, monitor="loss", resume=resume)
    on_epoch = lambda state, sums: {"documents": float(sums["documents"])}  # noqa: E731
    try:
        fit(
            Plan(lambda: TrainState.create(params, optimizer)),
            loss_fn,
            optimizer,
            stream,
            run,
            epochs=epochs,
            seed=7,
            on_epoch=on_epoch,
            save_every=save_every,
        )
        run.close()
    except Interrupted as stop:
        os._exit(stop.exit_code)
    except InputError as error:
        Path(f"{path}.error").write_text(str(error))
        os._exit(2)


def start(*args, **more):
    process = PROCESSES.Process(target=train, args=args, kwargs=more)
    process.start()
    return process


def kill_and_compare(tmp_path, kills, epochs, start=start):
    """Kill a run several times, every second time during a save, and compare its result."""
    complete, path, moments = tmp_path / "complete", tmp_path / "killed", random.Random(0)
    undisturbed = start(complete, epochs)
    in_saves = 0
    for kill in range(kills):
        before, _ = steps(path)
        process = start(path, epochs)
        wait_for(lambda before=before, process=process: steps(path)[0] > before or not process.is_alive())
        if kill % 2:
            wait_for(lambda process=process: steps(path)[1] or not process.is_alive())
            time.sleep(moments.uniform(0, 0.01))
        else:
            time.sleep(moments.uniform(0, 0.1))
        assert process.is_alive(), "the run ended before it was killed"
        process.kill()
        assert finish(process) == -signal.SIGKILL
        in_saves += steps(path)[1]
        for line in (path / "metrics.jsonl").read_text().splitlines():
            json.loads(line)
    assert finish(start(path, epochs)) == finish(undisturbed) == 0
    (step, records, got), (last, want_records, want) = outcome(path), outcome(complete)
    assert (
        step == last
        and records == want_records
        and [r["epoch"] for r in records] == list(range(1, epochs + 1))
    )
    jax.tree.map(np.testing.assert_array_equal, got, want)
    return in_saves


def test_run_killed_at_any_moment_equals_uninterrupted_run(tmp_path):
    kill_and_compare(tmp_path, kills=2, epochs=3)


@pytest.mark.slow
def test_run_killed_fifty_times_equals_uninterrupted_run(tmp_path):
    assert kill_and_compare(tmp_path, kills=50, epochs=60) >= 10


def pretrain_at(path, epochs):
    """Run the command."""
    out = os.open(path.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ["XDG_CACHE_HOME"] = str(path.parent / "cache")
    tiny = "--embedding 4 --cells 4 --layers 1 --batch-size 4 --min-count 1 --save-every 4"
    sys.argv = ["x", "--dataset", str(path.parent), "--output", str(path), "--epochs", str(epochs)]
    sys.argv += [*tiny.split(), *["--resume"] * (path / "config.json").exists()]
    sys.exit(pretrain.main())


def start_pretrain(path, epochs):
    rows = [f"{'ab'[i % 2]},the bank of {i % 7}" for i in range(80)]
    for part in ("train", "test"):
        (path.parent / f"{part}.csv").write_text("\n".join(rows))
    process = PROCESSES.Process(target=pretrain_at, args=(path, epochs))
    process.start()
    return process


@pytest.mark.slow
def test_command_killed_at_any_moment_equals_uninterrupted_command(tmp_path):
    kill_and_compare(tmp_path, 2, 12, start_pretrain)


@pytest.mark.slow
def test_command_killed_fifty_times_equals_uninterrupted_command(tmp_path):
    assert kill_and_compare(tmp_path, 50, 300, start_pretrain) >= 10


def test_full_disk_ends_the_run_in_one_line_and_keeps_earlier_steps(tmp_path):
    path = tmp_path / "run"
    assert finish(start(path, 1)) == 0
    before = outcome(path)
    assert finish(start(path, 2, file_limit=100_000)) == 2
    said = Path(f"{path}.error").read_text()
    assert "could not be saved (File too large); earlier steps are kept" in said and "\n" not in said
    after = outcome(path)
    assert after[:2] == before[:2]
    jax.tree.map(np.testing.assert_array_equal, after[2], before[2])
    assert finish(start(path, 2)) == 0
    assert not list((path / "checkpoints").glob("*.part"))


def test_one_writer_a_folder_until_it_dies(tmp_path):
    path = tmp_path / "run"
    process = start(path, 1000)
    wait_for(lambda: steps(path)[0] > 0)
    with pytest.raises(InputError, match="another run writes there"):
        Run.create(path, {}, monitor="loss", resume=True)
    with pytest.raises(InputError, match="another run writes there"):
        Run.create(path, {}, monitor="loss", overwrite=True)
    process.kill()
    finish(process)
    Run.create(path, {}, monitor="loss", resume=True).close()


def save_on_devices(path, count):
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
    mesh = jax.make_mesh((count,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shared_out = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
    state = {
        "a": jax.device_put(jnp.arange(3.0), everywhere),
        "b": jax.device_put(jnp.arange(8.0), shared_out),
    }
    run = Run.create(path, {}, monitor="loss")
    run.save(state, Position(1))
    run.close()


def test_step_saved_on_four_devices_is_restored_on_one(tmp_path):
    process = PROCESSES.Process(target=save_on_devices, args=(tmp_path / "run", 4))
    process.start()
    assert finish(process) == 0
    run = Run.open(tmp_path / "run")
    want = {"a": jnp.arange(3.0), "b": jnp.arange(8.0)}
    for got in (run.restore(want)[0], run.restore_best()):
        assert all(a.devices() == {jax.devices()[0]} for a in got.values())
        jax.tree.map(np.testing.assert_array_equal, got, want)


def stop_twice(path):
    """Send a signal, and another one during the save that the first one starts."""
    write = steps_module.write_manifest

    def slowly(folder):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
        write(folder)

    steps_module.write_manifest = slowly
    threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    train(path, 1000, save_every=10**9)


def test_second_signal_stops_at_once(tmp_path):
    began = time.monotonic()
    process = PROCESSES.Process(target=stop_twice, args=(tmp_path / "run",))
    process.start()
    assert finish(process) == -signal.SIGTERM
    assert time.monotonic() - began < 50
    Run.create(tmp_path / "run", {}, monitor="loss", resume=True).close()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_open_files_do_not_grow(tmp_path):
    counts = []
    process = start(tmp_path / "run", 1000)
    for step in (10, 30):
        wait_for(lambda step=step: steps(tmp_path / "run")[0] > step)
        counts.append(len(os.listdir(f"/proc/{process.pid}/fd")))
    process.terminate()
    assert finish(process) == 143
    assert max(counts) - min(counts) <= 8  # those of the current save
