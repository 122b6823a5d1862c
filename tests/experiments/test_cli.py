"""Flags, errors, signals and exit codes that all commands share."""

import errno
import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from tiny import call

from elmo_jax import __main__ as console
from elmo_jax.errors import InputError, Interrupted
from experiments import downstream, evaluate, pretrain
from experiments.common import cli
from experiments.pretrain import PretrainConfig

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Config:
    """A command."""

    output: str = "runs/x"
    """Folder."""
    batch_size: int = 32
    """Size."""
    rate: float = 0.5
    """Rate."""
    resume: bool = False
    """Continue."""
    overwrite: bool = False
    """Replace."""


def run_failing(error, args, monkeypatch, capsys):
    def command(config):
        raise error

    monkeypatch.setattr(sys, "argv", ["prog", *args])
    code, err = cli.run(Config, command, "x"), capsys.readouterr().err
    assert err.count("\n") == 1
    return code, err


def run_python(code, *args, cwd=ROOT):
    command = [sys.executable, "-c", code, *args]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60)


def test_optional_switches_need_no_value():
    for args, expected in (
        ([], (None, None)),
        (["--lowercase", "--no-clean"], (True, False)),
        (["--no-lowercase", "--clean", "--combiner", "frozen"], (False, True)),
        (["--lowercase", "False"], (False, None)),
    ):
        source = cli.parse(downstream.DownstreamConfig, "downstream", args=args).source
        assert (source.lowercase, source.clean) == expected


@pytest.mark.parametrize(
    ("command", "args", "message"),
    [
        (pretrain, ["--corpus", "a", "b", "c"], "--corpus takes no further value b; quote a pattern, as in"),
        (downstream, ["--bilm", "x"], "--bilm needs OPTIONS WEIGHTS"),
        (downstream, ["--bilm", "x", "--seed", "1"], "--bilm needs OPTIONS WEIGHTS"),
        (pretrain, ["--embedding", "x"], "--embedding must be an integer, not 'x'"),
        (pretrain, ["--learning-rate", "x"], "--learning-rate must be a number, not 'x'"),
    ],
)
def test_messages_of_the_parser_say_what_to_change(command, args, message, refused):
    refused(command.main, args, message)


@pytest.mark.parametrize("args", ["--bilm o w text", "--bilm=o w text", "text --bilm o w"])
def test_official_model_may_stand_before_positional_arguments(args):
    config = cli.parse(evaluate.EvaluateConfig, "evaluate", args=args.split())
    assert config.bilm == ("o", "w") and config.paths == ("text",)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_prints_the_command_that_continues_it(number, monkeypatch, capsys):
    args = ["--output", "my runs/$HOME's; rm", "--resume"]
    code, err = run_failing(Interrupted(number, 7), args, monkeypatch, capsys)
    assert code == 128 + number and f"stopped by {number.name} at step 7, saved" in err
    printed = shlex.split(err.partition("continue with: ")[2])
    assert printed == ["python", "-m", "experiments.x", *args]


@pytest.mark.parametrize("output_created", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_outside_training_ends_the_command(number, output_created, monkeypatch, capfd):
    codes, before = [], signal.getsignal(number)
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "argv", ["prog", "--output", "x", "--overwrite"])
    monkeypatch.setattr(cli, "_output_created", output_created)
    cli.run(Config, lambda config: signal.raise_signal(number), "x")
    err = capfd.readouterr().err
    assert codes == [128 + number] and err.count("\n") == 1
    flag = "--resume" if output_created else "--overwrite"  # without output, --overwrite is still needed
    assert err.endswith(f"continue with: python -m experiments.x --output x {flag}\n")
    assert signal.getsignal(number) == before


BUSY = """
import hashlib, os, signal, sys, threading
from experiments.common.cli import exit_on_signals
with exit_on_signals(lambda number: os._exit(100 + number)):
    if sys.argv[1] == "training":
        signal.signal(signal.SIGINT, lambda *_: None)
    for delay, number in ((0.2, signal.SIGINT), (0.4, signal.SIGTERM)):
        threading.Timer(delay, os.kill, (os.getpid(), number)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes inside one call into C
"""


@pytest.mark.parametrize("phase", ["training", "other"])
def test_second_signal_ends_a_computation_at_once(phase):
    assert run_python(BUSY, phase).returncode == 100 + signal.SIGTERM


# Errors


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "a file: No space left on device; fix this"),
        (PermissionError(errno.EACCES, "Permission denied", "x.png"), "x.png: Permission denied"),
        (MemoryError(), "out of memory; lower --batch-size"),
        (InputError("batch_size 33 is odd;\n pass rate=0.1"), "--batch-size 33 is odd; pass --rate 0.1"),
    ],
)
def test_errors_the_user_can_fix_are_one_line(error, message, monkeypatch, capsys):
    code, err = run_failing(error, [], monkeypatch, capsys)
    assert code == 2 and err.startswith(f"error: {message}")


@pytest.mark.parametrize("error", [KeyError("x"), OSError("unknown"), ValueError("x")])
def test_defects_keep_their_traceback(error, monkeypatch, capsys):
    with pytest.raises(type(error)):
        run_failing(error, [], monkeypatch, capsys)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("pass resume=True or overwrite=False", "pass --resume or --no-overwrite"),
        ("rate must be low", "--rate must be low"),
        ("output: the rate of x/batch_size is high", "output: the rate of x/batch_size is high"),
        ("batch_size.txt, not batch_size", "batch_size.txt, not --batch-size"),
    ],
)
def test_python_arguments_in_messages_become_flags(message, expected):
    assert cli._arguments_to_flags(message, Config) == expected


# Flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "0"], "--layers must be at least 1, not 0"),
        (["--dropout", "nan"], "--dropout must be a finite number, not nan"),
        (["--filters", "1", "2", "51", "3"], "--filters[1][0] must be at most 50, not 51"),
        (["--epochs", "2147483647"], "--epochs must be at most 100000, not 2147483647"),
        (["--dataset", "a\0"], "--dataset contains a NUL character"),
        (["--dataset", "x\udcff"], "--dataset is not UTF-8"),
        (["--dataset", ""], "--dataset is empty"),
    ],
)
def test_wrong_values_are_named_by_flag(flags, message, refused):
    refused(pretrain.main, flags, message)


def test_a_renamed_flag_works_with_a_warning(capsys):
    settings = cli.parse(PretrainConfig, "pretrain", args=["--steps_per_dispatch=3"])
    assert settings.steps_per_call == 3
    assert capsys.readouterr().err.startswith("warning: --steps_per_dispatch is now --steps-per-call")


def test_help_lists_every_flag(monkeypatch, capsys):
    with pytest.raises(SystemExit) as info:
        call(downstream.main, monkeypatch, "--help")
    assert info.value.code == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--pretrained", "--combiner", "--seed", "--output", "--finetune"))


HELP = """
import sys
from elmo_jax import __main__
for command in __main__.COMMANDS:
    for flag in ("--help", "--nonsense"):
        sys.argv = ["elmo-jax", command, flag]
        try:
            assert __main__.main() == 2
        except SystemExit as error:
            assert error.code == 0
    slow = {"jax", "flax", "orbax", "matplotlib", "sklearn", "scipy"} & set(sys.modules)
    assert not slow, f"{command} imports {slow}"
"""


def test_help_and_wrong_flags_import_no_slow_module():
    done = run_python(HELP)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(console.COMMANDS) and all(
        line.startswith("error: ") and "--help)" in line for line in lines
    )


# The console command


def test_the_console_command_lists_commands_and_refuses_others(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/bin/elmo-jax"])
    assert console.main() == 0
    out = capsys.readouterr().out
    assert out.startswith("usage: elmo-jax COMMAND") and all(f"  {name}" in out for name in console.COMMANDS)
    monkeypatch.setattr(sys, "argv", ["/bin/elmo-jax", "pretran"])
    assert console.main() == 2
    assert capsys.readouterr().err == "error: unknown command pretran; did you mean pretrain?\n"


def test_the_console_command_runs_beside_a_users_own_experiments_package(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "__init__.py").write_text("raise ImportError('not this one')")
    start = [sys.executable, "-m", "elmo_jax"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*start, "vectors", "--window", "0"], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 2 and done.stderr == b"error: --window must be at least 1, not 0\n"
    done = subprocess.run([*start, "vectors", "--windows"], cwd=tmp_path, env=env, capture_output=True)
    assert b"(see python -m elmo_jax vectors --help)" in done.stderr


def test_a_closed_output_pipe_is_silent():
    code = "import sys; from experiments import vectors; sys.argv[1:] = ['-h']; sys.exit(vectors.main())"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


# Memory


def test_peak_memory_without_proc_and_without_resource(monkeypatch):
    peak = cli.process_peak()
    assert abs(cli.process_peak(Path("/none")) - peak) < 2**30
    monkeypatch.setitem(sys.modules, "resource", None)
    assert cli.process_peak(Path("/none")) is None


@pytest.mark.parametrize("absent", ["resource", "fcntl"])
def test_commands_import_without_modules_that_windows_lacks(absent):
    code = f"""
import sys
sys.modules[{absent!r}] = None
import elmo_jax.embed_file, experiments.common.inputs, experiments.common.estimate
from experiments import downstream, embed, evaluate, neighbours, pretrain, vectors
from experiments.benchmark import __main__, runner
from experiments.compare import __main__
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_text_column_may_be_given_in_the_singular():
    args = ["--label-column", "2", "--text-column", "title", "body"]
    settings = cli.parse(PretrainConfig, "pretrain", args=args)
    assert settings.data.text_columns == ("title", "body")
    assert cli.flags_in(args) == ["--label-column", "--text-columns"]
