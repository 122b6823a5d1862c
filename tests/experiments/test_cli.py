"""How commands end: what is printed to go on with, and what of the system's errors a user sees."""

import errno
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from elmo_jax.errors import Interrupted
from experiments.common import cli

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Config:
    """A command."""

    output: str = "runs/x"
    """Folder."""
    resume: bool = False
    """Go on."""
    overwrite: bool = False
    """Begin anew."""


def end(error, args, monkeypatch, capsys):
    def command(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["prog", *args])
    code, err = cli.run(Config, command, "experiments.x"), capsys.readouterr().err
    assert err.count("\n") == 1
    return code, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_printed_is_the_one_to_go_on_with(number, monkeypatch, capsys):
    args = ["--output", "my runs/$HOME's; rm", "--resume"]
    code, err = end(Interrupted(number, 7), args, monkeypatch, capsys)
    assert code == 128 + number and f"stopped by {number.name} at step 7, saved" in err
    printed = shlex.split(err.partition("go on with: ")[2])
    assert printed == ["python", "-m", "experiments.x", *args]


BUSY = """
import hashlib, os, signal, threading
from experiments.common.cli import stoppable
with stoppable(lambda number: os._exit(100 + number)):
    for at, number in ((0.3, signal.SIGINT), (0.6, signal.SIGTERM)):
        threading.Timer(at, os.kill, (os.getpid(), number)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without one of Python's instructions
"""


def test_a_second_signal_does_not_wait_for_what_is_computed():
    assert subprocess.run([sys.executable, "-c", BUSY], timeout=60, cwd=ROOT).returncode == 115


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_where_nothing_trains_prints_how_to_go_on(number, begun, monkeypatch, capfd):
    codes, before = [], signal.getsignal(number)
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "argv", ["prog", "--output", "x", "--overwrite"])
    monkeypatch.setattr(cli, "_begun", begun)  # before, --overwrite still has something to do
    cli.run(Config, lambda config: signal.raise_signal(number), "experiments.x")
    err = capfd.readouterr().err
    assert codes == [128 + number] and err.count("\n") == 1
    flag = "--resume" if begun else "--overwrite"
    assert err.endswith(f"kept, go on with: python -m experiments.x --output x {flag}\n")
    assert signal.getsignal(number) == before


COLLECTED = """
import gc, os, signal
from experiments.common.cli import stoppable
with stoppable(lambda number: os._exit(100 + number)):
    gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGTERM))
    gc.collect()
"""


def test_a_signal_that_comes_while_garbage_is_collected_is_not_lost():
    assert subprocess.run([sys.executable, "-c", COLLECTED], cwd=ROOT).returncode == 115


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "a file: No space left on device; mend that"),
        (PermissionError(errno.EACCES, "Permission denied", "x.png"), "x.png: Permission denied"),
        (MemoryError(), "out of memory; lower --batch-size"),
    ],
)
def test_what_the_system_refuses_is_one_line(error, said, monkeypatch, capsys):
    code, err = end(error, [], monkeypatch, capsys)
    assert code == 2 and err.startswith(f"error: {said}")


@pytest.mark.parametrize("error", [KeyError("x"), OSError("who knows"), ValueError("x")])
def test_a_defect_keeps_its_traceback(error, monkeypatch, capsys):
    with pytest.raises(type(error)):
        end(error, [], monkeypatch, capsys)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_command_is_imported_leaves_no_traceback(number):
    command = [sys.executable, "-X", "importtime", "-m", "experiments.pretrain", "--help"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "elmo_jax.errors" in line:  # deep within what is imported
            process.send_signal(number)
            break
    rest = [line for line in process.communicate()[1].splitlines() if not line.startswith("import time:")]
    assert process.returncode == 128 + number and rest == ["stopped"]
