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

from elmo_jax.loop import Interrupted
from experiments import cli

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Config:
    """A command."""

    output: str = "runs/x"
    """Folder."""
    resume: bool = False
    """Go on."""


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


def test_a_second_interrupt_does_not_wait(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    _, err = end(KeyboardInterrupt(), [], monkeypatch, capsys)
    assert codes == [130] and "stopped at once; what was saved is kept" in err


BUSY = """
import hashlib, os, signal, threading
from experiments.signals import stoppable
for at, number in ((0.3, signal.SIGINT), (0.6, signal.SIGTERM)):
    threading.Timer(at, os.kill, (os.getpid(), number)).start()
with stoppable(lambda number: os._exit(100 + number)):
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes without one of Python's instructions
"""


def test_a_second_signal_does_not_wait_for_what_is_computed():
    assert subprocess.run([sys.executable, "-c", BUSY], timeout=30, cwd=ROOT).returncode == 115


def test_sigterm_where_nothing_trains_prints_how_to_go_on(monkeypatch, capsys):
    codes, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "argv", ["prog", "--output", "x"])
    cli.run(Config, lambda config: signal.raise_signal(signal.SIGTERM), "experiments.x")
    err = capsys.readouterr().err
    assert codes == [143] and err.count("\n") == 1
    assert err.endswith("go on with: python -m experiments.x --output x --resume\n")
    assert signal.getsignal(signal.SIGTERM) == before


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
