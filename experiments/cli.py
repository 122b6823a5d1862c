"""What every command shares: flags from a dataclass, one-line errors, exit codes."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import pooch
import tyro
from tqdm import tqdm

from elmo_jax.checkpoint import Run, write_atomically
from elmo_jax.data import BatchStream
from elmo_jax.datasets import Dataset
from elmo_jax.errors import InputError
from elmo_jax.fit import Interrupted

C = TypeVar("C")
RESULTS = "results.json"


def parse(
    config: type[C], prog: str, presets: Mapping[str, C] | None = None, args: Sequence[str] | None = None
) -> C:
    """The command line as a dataclass; a wrong flag ends in one line and exit code 2.

    A preset, ``--preset NAME``, changes the defaults, so every other flag wins over it.
    """
    box = io.StringIO()
    given = sys.argv[1:] if args is None else list(args)
    named = [value for flag, value in itertools.pairwise(given) if flag == "--preset"]
    named += [arg.removeprefix("--preset=") for arg in given if arg.startswith("--preset=")]
    default = (presets or {}).get(named[-1] if named else "", config())
    try:
        with contextlib.redirect_stderr(box), _wide():
            return tyro.cli(
                config, prog=f"python -m {prog}", description=config.__doc__, default=default, args=given
            )
    except SystemExit as error:
        if error.code == 2:
            raise InputError(_one_line(box.getvalue(), prog)) from None
        raise


def _one_line(box: str, prog: str) -> str:
    """The first paragraph of the parser's framed message."""
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in box.splitlines()[1:]]
    said = lines[: lines.index("")] if "" in lines else lines
    return f"{' '.join(said)} (see python -m {prog} --help)"


@contextlib.contextmanager
def _wide():
    """The parser folds its messages at the terminal's width; ours are one line."""
    before = os.environ.get("COLUMNS")
    if "--help" not in sys.argv and "-h" not in sys.argv:
        os.environ["COLUMNS"] = "10000"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("COLUMNS", None)
        else:
            os.environ["COLUMNS"] = before


def run(
    config: type[C], command: Callable[[C], Any], prog: str, presets: Mapping[str, C] | None = None
) -> int:
    """Parse, call, and turn what a user can mend into one line and an exit code.

    Args:
        config: the command's flags.
        command: what to call with them.
        prog: the command's module, for messages.
        presets: sets of defaults, by name.

    Returns:
        The exit code.
    """
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    # Compiled programs are kept between runs: it is much of a short run's time.
    jax.config.update("jax_compilation_cache_dir", os.path.join(pooch.os_cache("elmo_jax"), "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    try:
        settings = parse(config, prog, presets)
        _check(settings)
        command(settings)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        args = [arg for arg in sys.argv[1:] if arg not in ("--resume", "--overwrite")]
        args += ["--resume"] * hasattr(config, "resume")
        print(f"{stop}; go on with: python -m {prog} {shlex.join(args)}", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("stopped before training began; nothing to save", file=sys.stderr)
        return 130
    return 0


# In [0, 1), validation not 0.
_SHARES = {"validation", "dropout", "classifier_dropout", "word_dropout", "label_smoothing", "warmup"}
_AT_LEAST_0 = {"seed", "split_seed"}


def _check(settings: Any) -> None:
    """Numbers must be ones that mean something; all but a few must be positive."""
    for field in dataclasses.fields(settings):
        value, flag = getattr(settings, field.name), "--" + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            _check(value)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            continue
        elif field.name in _SHARES:
            if not 0 <= value < 1 or (field.name == "validation" and value == 0):
                raise InputError(f"{flag} must be between 0 and 1, not {value}")
        elif isinstance(value, int):
            least = 0 if field.name in _AT_LEAST_0 else 1
            if value < least:
                raise InputError(f"{flag} must be at least {least}, not {value}")
        elif field.name == "labels":
            if not 0 < value <= 1:
                raise InputError(f"{flag} must be above 0 and at most 1, not {value}")
        elif field.name == "exponent":
            if not 0 <= value < float("inf"):
                raise InputError(f"{flag} must be at least 0 and finite, not {value}")
        elif not 0 < value < float("inf"):
            raise InputError(f"{flag} must be above 0 and finite, not {value}")


def say(line: str) -> None:
    """Print a line at once, also into a pipe, and clear of a progress bar."""
    tqdm.write(line)
    sys.stdout.flush()


def create_run(config: Any, output: str, monitor: str, **more: Any) -> Run:
    """The run's folder, with everything in its configuration but how it was started."""
    settings = settings_of(config) | {"output": output, **more}
    run = Run.create(Path(output), settings, monitor, config.resume, config.overwrite)
    (run.path / RESULTS).unlink(missing_ok=True)  # it stands for a run that reached its end
    return run


def settings_of(config: Any) -> dict[str, Any]:
    """A command's flags but for those about the call alone, as ``config.json`` holds them."""
    about_the_call = {"preset", "resume", "overwrite", "tensorboard"}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in about_the_call}
    return json.loads(json.dumps(settings))


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``: the run has reached its end."""
    write_atomically(path / RESULTS, json.dumps(results, indent=2) + "\n")


def describe(data: Dataset, stream: BatchStream) -> None:
    """What is trained on, in two lines."""
    parts = " / ".join(f"{len(part):,}" for part in (data.train, data.validation, data.test))
    say(f"documents: {parts} (train / validation / test), vocabulary {len(data.vocabulary):,}")
    say(
        f"batches: {stream.steps_per_epoch:,} an epoch of {stream.batch_size}, "
        f"lengths up to {', '.join(map(str, stream.bounds))}, {stream.padding:.1%} padding"
    )


def speed(records: Sequence[Mapping[str, Any]], stream: Any) -> dict[str, float]:
    """Seconds of training in all, and the text's tokens a second."""
    seconds = sum(record["seconds"] for record in records)
    rate = stream.tokens_per_epoch * len(records) / max(seconds, 1e-9)
    return {"seconds": round(seconds, 1), "tokens_per_second": round(rate, 1)}


def count(params: Any) -> int:
    """Numbers in a pytree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def tensorboard(run: Run, wanted: bool) -> Callable[[int, Mapping[str, Any]], None]:
    """What to call with an epoch and its record; it does nothing if not wanted."""
    if not wanted:
        return lambda epoch, record: None
    from tensorboardX import SummaryWriter  # a second to import, for those who ask for it

    writer = SummaryWriter(str(run.path / "tensorboard"))

    def write(epoch: int, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, float):
                writer.add_scalar(name, value, epoch)
        writer.flush()

    return write
