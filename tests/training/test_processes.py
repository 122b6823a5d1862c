"""One run in two processes: they stop at the same step, and the first one writes."""

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from processes import PROCESSES, finish, outcome, wait_for

from elmo_jax.data.batching import BatchStream, Documents
from elmo_jax.errors import InputError, Interrupted
from elmo_jax.parallel import (
    DATA,
    MODEL,
    Plan,
    check_same_on_all_processes,
    is_first_process,
    max_over_processes,
    run_on_all,
    run_on_first,
    start_distributed,
)
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.loop import fit
from elmo_jax.training.step import TrainState


def join(port, index):
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)


def loss_fn(params, batch, key):
    each = (params["table"][batch.words].sum(1) - batch.labels) ** 2 * batch.weight
    return each.sum() + jax.random.normal(key) * params["table"].sum(), {"documents": batch.weight.sum()}


def train(path, index, port, epochs, mark=None):
    """Train the same model in every process."""
    join(port, index)
    documents = Documents(np.arange(160, dtype=np.int32) % 46 + 4, np.arange(0, 161, 4), np.arange(40) % 3)
    stream = BatchStream(documents, 4, seed=1, bounds=(6,), steps_per_call=2)
    optimizer = optax.adam(0.05)
    mesh = jax.make_mesh((1, 2), (DATA, MODEL), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    begin = Plan(lambda: TrainState.create({"table": jnp.zeros(50)}, optimizer), mesh)
    run = Run.create(path, {}, monitor="loss", resume=True)

    def after_call(step):
        if mark is not None:
            mark.value = step

    try:
        fit(begin, loss_fn, optimizer, stream, run, epochs=epochs, seed=7, save_every=30,
            on_epoch=lambda state, sums: {}, after_call=after_call)  # fmt: skip
        run.close()
    except Interrupted as stop:
        Path(f"{path}.{index}").write_text(str(stop))
        sys.exit(stop.exit_code)


def start_both(work, *args, count=2):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [PROCESSES.Process(target=work, args=(args[0], i, port, *args[1:])) for i in range(count)]
    for process in processes:
        process.start()
    return processes


def test_signal_to_one_process_stops_both_at_one_step(tmp_path):
    path, step = tmp_path / "run", PROCESSES.Value("i", 0)
    processes = start_both(train, path, 100_000, step)
    wait_for(lambda: step.value > 40 or not all(p.is_alive() for p in processes))
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [finish(process) for process in processes] == [143, 143]
    said = {Path(f"{path}.{i}").read_text() for i in range(2)}
    newest, records, _ = outcome(path)
    assert said == {f"stopped by SIGTERM at step {newest}, saved"}
    assert not list(path.rglob("*.part")) and [r["epoch"] for r in records] == list(
        range(1, len(records) + 1)
    )

    more = len(records) + 3
    assert [finish(process) for process in start_both(train, path, more)] == [0, 0]
    assert [finish(process) for process in start_both(train, tmp_path / "complete", more)] == [0, 0]
    (last, records, got), (want_last, want_records, want) = outcome(path), outcome(tmp_path / "complete")
    assert last == want_last and records == want_records
    jax.tree.map(np.testing.assert_array_equal, got, want)


def fail(path, index, port):
    join(port, index)

    def refuse():
        if index:
            raise InputError("no")

    results = [is_first_process(), max_over_processes(3 * index), run_on_first(lambda: index)]
    check_same_on_all_processes("same")
    for work in (
        lambda: run_on_first(lambda: Path(path / "none" / "x").write_text("")),
        lambda: run_on_all(refuse),
        lambda: check_same_on_all_processes(str(index)),
    ):
        try:
            work()
        except (InputError, OSError) as error:
            results.append(type(error).__name__)

    (path / f"{index}.json").write_text(json.dumps(results))


def test_failure_in_one_process_is_raised_in_both(tmp_path):
    assert [finish(process) for process in start_both(fail, tmp_path)] == [0, 0]
    said = [json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)]
    assert said == [
        [True, 3, 0, "FileNotFoundError", "InputError", "InputError"],
        [False, 3, None, "InputError", "InputError", "InputError"],
    ]


def watch(path, index, port, seconds):
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: SIM115

    def leave(process):
        Path(f"{path}.{index}").write_text(str(process))
        os._exit(2)

    start_distributed(f"127.0.0.1:{port}", 3, index, leave)
    Path(f"{path}.{index}").touch()
    time.sleep(seconds)


def test_killed_process_is_named_in_all_others(tmp_path):
    files = [tmp_path / f"x.{i}" for i in range(3)]
    processes = start_both(watch, tmp_path / "x", 300, count=3)
    wait_for(lambda: all(file.exists() for file in files))
    processes[2].kill()
    assert [finish(process) for process in processes] == [2, 2, -signal.SIGKILL]
    assert [file.read_text() for file in files] == ["2", "2", ""]


def test_processes_that_end_by_themselves_are_not_missed(tmp_path):
    processes = start_both(watch, tmp_path / "x", 0, count=3)
    assert [finish(process) for process in processes] == [0, 0, 0]
    assert not any((tmp_path / f"x.{i}").read_text() for i in range(3))
