"""Pre-training in two processes, which share a run that the first process writes."""

import os
import random
import re
import signal
import socket
import sys
import threading

import jax
import numpy as np
import pytest
from processes import PROCESSES, finish, outcome, steps, wait_for

from elmo_jax import parallel
from elmo_jax.errors import InputError
from experiments import pretrain

TINY = """--embedding 4 --cells 4 --layers 1 --batch-size 8 --min-count 1 --negatives 6 --optimizer lazy_adam
--schedule constant --warmup 0 --save-every 8"""


def command(folder, output, epochs, *flags):
    """Run the command in this process and write its output to a file."""
    index = flags[flags.index("--process") + 1] if "--process" in flags else 0
    out = os.open(f"{output}.{index}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1), os.dup2(out, 2)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_numpy_dtype_promotion", "standard")
    texts = ["--corpus", str(folder / "train.txt"), "--valid-corpus", str(folder / "held-out.txt")]
    sys.argv = ["x", *texts, "--output", str(output), "--epochs", str(epochs), *TINY.split(), *flags]
    sys.exit(pretrain.main())


def start(folder, output, epochs, *flags):
    process = PROCESSES.Process(target=command, args=(folder, output, epochs, *flags))
    process.start()
    return process


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_two(*args):
    joined = "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"
    return [start(*args, *joined, str(i)) for i in range(2)]


def write_texts(folder):
    draw = random.Random(0)
    for name, count in (("train", 96), ("held-out", 24)):  # a vocabulary of 12 words and 4 special tokens
        lines = [" ".join(draw.choices("abcdefghijkl", k=draw.randint(2, 6))) for _ in range(count)]
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")


def test_two_processes_stop_at_one_step_and_end_where_one_ends(tmp_path):
    write_texts(tmp_path)
    path = tmp_path / "two"
    processes = start_two(tmp_path, path, 10**5)
    wait_for(lambda: steps(path)[0] > 12 or not all(p.is_alive() for p in processes))
    os.kill(processes[1].pid, signal.SIGTERM)
    assert [finish(process) for process in processes] == [143, 143]
    newest, records, _ = outcome(path)
    for i in range(2):  # each tells its own user
        assert f"stopped by SIGTERM at step {newest}, saved" in (tmp_path / f"two.{i}.txt").read_text()

    more = len(records) + 2
    again = start_two(tmp_path, path, more, "--resume", "--model-parallel", "2")
    alone = start(tmp_path, tmp_path / "one", more)
    assert [finish(process) for process in (*again, alone)] == [0, 0, 0]
    (step, got, state), (last, want, enabled) = outcome(path), outcome(tmp_path / "one")
    assert step == last and [r["step"] for r in got] == [r["step"] for r in want] and len(got) == more
    for name in ("loss", "perplexity"):
        np.testing.assert_allclose([r[name] for r in got], [r[name] for r in want], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3), state, enabled)

    names = {p.name for p in path.iterdir()} - {".lock"}
    assert names == {p.name for p in (tmp_path / "one").iterdir()} - {".lock"}
    assert all(p.name.isdecimal() for p in (path / "checkpoints").iterdir())
    words = (tmp_path / "two.1.txt").read_text()
    assert "epoch " not in words and "warning" not in words + (tmp_path / "two.0.txt").read_text()


def test_processes_that_differ_are_refused(tmp_path):
    write_texts(tmp_path)
    joined = "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"
    first = start(tmp_path, tmp_path / "x", 1, *joined, "0")
    other = start(tmp_path, tmp_path / "x", 1, *joined, "1", "--seed", "3")
    assert [finish(process) for process in (first, other)] == [2, 2]
    for i in range(2):
        assert "error: the processes of this run differ" in (tmp_path / f"x.{i}.txt").read_text()
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--processes", "2"], "need a coordinator HOST:PORT; give all three or none"),
        (["--coordinator", "auto", "--process", "0"], "need a coordinator HOST:PORT; give all three or none"),
        (["--coordinator", "here"], "must be HOST:PORT or auto, not here"),
        (["--coordinator", "here:99999"], "must be HOST:PORT or auto, not here:99999"),
        (["--coordinator", "here:1"], "coordinator HOST:PORT needs"),
        (["--coordinator", "here:1", "--processes", "2", "--process", "2"], "must be below the 2 processes"),
        (["--coordinator", "no.invalid:1", "--processes", "2", "--process", "1"], "cannot be used"),
        (["--process", "-1"], "--process must be at least 0"),
        (["--model-parallel", "1000"], "1000 does not divide 1 devices"),
    ],
)
def test_wrong_flags_of_distributed_runs_are_refused(refused, flags, message):
    refused(pretrain.main, flags, message)


@pytest.mark.parametrize("taken", [False, True])
def test_processes_that_do_not_start_are_named(refused, monkeypatch, taken):
    monkeypatch.setattr(parallel, "START_TIMEOUT", 0.3)
    port = free_port()
    flags = ["--coordinator", f"127.0.0.1:{port}", "--processes", "3", "--process"]
    if taken:
        with socket.create_server(("127.0.0.1", port)):
            refused(pretrain.main, [*flags, "0"], "cannot be used (Address already in use")
            refused(pretrain.main, [*flags, "1"], "no answer within 0 s (timed out); start process 0 there")
        return
    refused(pretrain.main, [*flags, "0"], "process 1, 2 did not start within 0 s; start all 3 processes")
    refused(pretrain.main, [*flags, "1"], "no answer within 0 s")


@pytest.mark.parametrize("guests", [[(3, 1), (3, 2)], [(3, 1), (3, 1)], [(2, 1)]], ids=str)
def test_duplicate_process_numbers_are_refused(monkeypatch, guests):
    monkeypatch.setattr(parallel, "START_TIMEOUT", 5.0)
    port, results = free_port(), []

    def come(count, process):
        try:
            results.append(parallel._wait_for_all(f"127.0.0.1:{port}", count, process))
        except InputError as error:
            results.append(str(error))

    others = [threading.Thread(target=come, args=guest) for guest in guests]
    for other in others:
        other.start()
    if guests == [(3, 1), (3, 2)]:
        results.append(parallel._wait_for_all(f"127.0.0.1:{port}", 3, 0))
    else:
        with pytest.raises(
            InputError,
            match=re.escape("started twice, or expects other than 3 processes; give each its own number"),
        ):
            parallel._wait_for_all(f"127.0.0.1:{port}", 3, 0)
    for other in others:
        other.join()
    if guests == [(3, 1), (3, 2)]:
        assert sorted(sorted(connections) for connections in results) == [[0], [0], [1, 2]]
        for connection in (connection for connections in results for connection in connections.values()):
            connection.close()
    else:
        assert all(isinstance(word, str) for word in results) and len(results) == len(guests)
