"""What every command shares: one-line errors, exit codes, a run folder and what is said of it.

Flags from a command's dataclass, and what their values must be.

SIGINT and SIGTERM at a command: they end it at once, but for the first while training that can save.

What a handler raises is lost if it comes while something is collected or torn down, so the one
here ends the process itself. Python runs handlers between two of its instructions, so whatever
is compiled or waited for delays them; the second signal is seen by a thread, which reads what
the C handler writes.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import re
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import pooch
import tyro
from tqdm import tqdm

from elmo_jax.data.batching import BatchStream, Documents
from elmo_jax.data.characters import CHARACTERS
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Dtype, Elmo
from elmo_jax.errors import InputError, Interrupted
from elmo_jax.parallel import check_same_on_all_processes, is_first_process, run_on_first
from elmo_jax.storage.files import CONFIG, write_atomically
from elmo_jax.training.checkpoint import EVENTS, RESULTS, Run
from experiments.common.memory import process_peak, tame_malloc

C = TypeVar("C")


def parse(
    config: type[C], prog: str, presets: Mapping[str, C] | None = None, args: Sequence[str] | None = None
) -> C:
    """The command line as a dataclass; a wrong flag ends in one line and exit code 2.

    A preset, ``--preset NAME``, changes the defaults, so every other flag wins over it.
    """
    box = io.StringIO()
    given = [_current_name(arg) for arg in (sys.argv[1:] if args is None else args)]
    named = [value for flag, value in itertools.pairwise(given) if flag == "--preset"]
    named += [arg.removeprefix("--preset=") for arg in given if arg.startswith("--preset=")]
    preset = (presets or {}).get(named[-1]) if named else None
    default: dict[str, Any] = {} if preset is None else {"default": preset}
    try:
        with contextlib.redirect_stderr(box), _wide():
            return tyro.cli(
                config, prog=f"python -m {prog}", description=config.__doc__, args=given, **default
            )
    except SystemExit as error:
        if error.code == 2:
            raise InputError(_one_line(box.getvalue(), prog)) from None
        raise


_RENAMED_FLAGS = {"--steps-per-dispatch": "--steps-per-call"}


def _current_name(arg: str) -> str:
    """Return a flag under its current name; an old name works for one more release, with a warning."""
    flag, equals, value = arg.partition("=")
    new = _RENAMED_FLAGS.get(flag.replace("_", "-"))
    if new is None:
        return arg
    print(f"warning: {flag} is now {new}; the old name ends with the next release", file=sys.stderr)
    return f"{new}{equals}{value}"


def flag_of(name: str) -> str:
    """The flag of a setting, by its field's name.

    Example:
        >>> flag_of("layer_norm")
        '--layer-norm'
    """
    return f"--{name.replace('_', '-')}"


def named(args: Sequence[str]) -> list[str]:
    """The flags of a command line, in order, as help spells them; ``--no-X`` is ``--X``.

    Example:
        >>> named(["text.txt", "--no-layer_norm", "--epochs=2"])
        ['--layer-norm', '--epochs']
    """
    bare = [arg.split("=", 1)[0].replace("_", "-") for arg in args if arg.startswith("--")]
    return [f"--{flag.removeprefix('--no-')}" if flag.startswith("--no-") else flag for flag in bare]


def without_effect(names: Iterable[str], by: str, now: str, instead: str) -> dict[str, str]:
    """What `refuse` says of settings that nothing reads while the flag `by` has this value.

    Example:
        >>> without_effect(["unroll"], "--batching", "sentences", "--batching contiguous")
        {'--unroll': 'has no effect with --batching sentences; leave it out, or give --batching contiguous'}
    """
    told = f"has no effect with {by} {now}; leave it out, or give {instead}"
    return dict.fromkeys(map(flag_of, names), told)


def refuse(unread: Mapping[str, str], args: Sequence[str]) -> None:
    """No flag may be given that nothing reads.

    Args:
        unread: such flags, and what is said of each.
        args: the command line; what a preset sets is not in it, and may be there.

    Raises:
        InputError: one was given.
    """
    for flag in named(args):
        if flag in unread:
            raise InputError(f"{flag} {unread[flag]}")


def _one_line(box: str, prog: str) -> str:
    """The first paragraph of the parser's framed message."""
    lines = [re.sub(r"[│╭╮╰╯─]+|^ *-{3,}", " ", line).strip() for line in box.splitlines()[1:]]
    while lines and not lines[0]:  # the frame's upper line, on a terminal without such characters
        del lines[0]
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


# In [0, 1), validation not 0.
_SHARES = {"validation", "dropout", "classifier_dropout", "word_dropout", "label_smoothing", "warmup"}
_AT_LEAST_0 = {"seed", "split_seed", "highway", "process"}
_SIZES = {"batch_size", "steps_per_call", "embedding", "cells", "hidden"}  # at most 2**16
_DEPTHS = {"layers", "classifier_layers"}  # at most 64


def check(settings: Any) -> None:
    """Numbers must be ones that mean something; all but a few must be positive.

    Raises:
        InputError: one is not, by its flag.
    """
    for field in dataclasses.fields(settings):
        value, flag = getattr(settings, field.name), flag_of(field.name)
        texts = [item for item in (value if isinstance(value, tuple) else (value,)) if isinstance(item, str)]
        if dataclasses.is_dataclass(value):
            check(value)
        elif any("\0" in text for text in texts):
            raise InputError(f"{flag} holds a NUL character; leave it out")
        elif any("\ud800" <= letter <= "\udfff" for text in texts for letter in text):
            raise InputError(f"{flag} holds bytes that are not UTF-8; give another name")
        elif "" in texts and field.default != "":
            raise InputError(f"{flag} is empty; give it a value, or leave it out")
        elif field.name == "filters":
            _check_filters(value, flag)
        elif isinstance(value, bool) or not isinstance(value, int | float):
            continue
        elif field.name in _SHARES:
            if not 0 <= value < 1 or (field.name == "validation" and value == 0):
                raise InputError(f"{flag} must be between 0 and 1, not {value}")
        elif isinstance(value, int):
            least = 0 if field.name in _AT_LEAST_0 else 1
            most = 2**16 if field.name in _SIZES else 64 if field.name in _DEPTHS else 2**31 - 1
            if value < least:
                raise InputError(f"{flag} must be at least {least}, not {value}")
            if value > most:
                raise InputError(f"{flag} must be at most {most}, not {value}")
        elif field.name == "labels":
            if not 0 < value <= 1:
                raise InputError(f"{flag} must be above 0 and at most 1, not {value}")
        elif field.name == "exponent":
            if not 0 <= value < float("inf"):
                raise InputError(f"{flag} must be at least 0 and finite, not {value}")
        elif not 0 < value < float("inf"):
            raise InputError(f"{flag} must be above 0 and finite, not {value}")


def _check_filters(filters: tuple[tuple[int, int], ...], flag: str) -> None:
    if not filters:
        raise InputError(f"{flag} must be pairs of a width and a number; give one at least")
    for width, number in filters:
        if not 1 <= width <= CHARACTERS:
            raise InputError(f"{flag} must have widths from 1 to {CHARACTERS} characters, not {width}")
        if not 1 <= number <= 2**16:
            raise InputError(f"{flag} must have from 1 to {2**16} filters of a width, not {number}")


_STOPS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def stoppable(leave: Callable[[int], None]) -> Iterator[None]:
    """Call a function at SIGINT or SIGTERM while the body runs.

    A handler that the body installs, as `fit` does, has the first signal to itself.

    Args:
        leave: gets the signal's number, perhaps in another thread; it is to end the process.

    Example:
        >>> came = []
        >>> with stoppable(came.append):
        ...     signal.raise_signal(signal.SIGTERM)
        >>> came == [signal.SIGTERM]
        True
    """

    def watch() -> None:
        came = 0
        while number := os.read(seen, 1):
            came += number[0] in _STOPS
            if came == 2:
                leave(number[0])

    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    seen, tell = os.pipe()
    os.set_blocking(tell, False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    fd = signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
    before = [signal.signal(number, lambda number, _frame: leave(number)) for number in _STOPS]
    try:
        yield
    finally:
        for number, handler in zip(_STOPS, before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(fd)
        os.close(tell)  # which ends the thread
        thread.join()
        os.close(seen)


# What commands make of a run that has reached its end; the results come last.
PRODUCTS = ("loss.png", "perplexity.png", "lambdas.png", "predictions.npz", "vectors.npz", "vectors.txt",
            *(f"confusion_{part}.png" for part in ("train", "validation", "test")),
            "memory.jsonl", "memory.png", RESULTS)  # fmt: skip


def _keep_programs() -> None:
    """Keep what is compiled for the next run, whose start it shortens; JAX's own settings win."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", os.path.join(pooch.os_cache("elmo_jax"), "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


_begun = False  # nothing was written yet


def run(
    config: type[C],
    command: Callable[[C], Any],
    prog: str,
    presets: Mapping[str, C] | None = None,
    unread: Callable[[C], Mapping[str, str]] = lambda settings: {},
) -> int:
    """Parse, call, and turn what a user can mend into one line and an exit code.

    Args:
        config: the command's flags.
        command: what to call with them.
        prog: the command's module, for messages.
        presets: sets of defaults, by name.
        unread: the flags that nothing reads with these settings, and what is said of each that is given.

    Returns:
        The exit code.
    """
    tame_malloc()
    warnings.filterwarnings("always", ".* ends with the next release", DeprecationWarning)
    show_once = functools.cache(lambda line: print(line, file=sys.stderr))
    warnings.showwarning = lambda message, *_, **__: show_once(f"warning: {message}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that has no λ must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        settings = parse(config, prog, presets)
        check(settings)
        refuse(unread(settings), sys.argv[1:])
        if not getattr(settings, "dry_run", False):  # which is to leave no trace
            _keep_programs()
        with stoppable(lambda number: _leave(number, config, prog)):
            command(settings)
    except (InputError, OSError, MemoryError, jax.errors.JaxRuntimeError) as error:
        print(f"error: {_reason(error, config)}", file=sys.stderr)
        return 2
    except Interrupted as stop:
        print(f"{stop}; go on with: {_again(config, prog)}", file=sys.stderr)
        return stop.exit_code
    return 0


def _leave(number: int, config: type, prog: str) -> None:
    """End the process now; to unwind would be to wait for a save under way."""
    kept = "what was saved is kept, go on with" if hasattr(config, "resume") else "run it again with"
    line = f"stopped at once; {kept}: {_again(config, prog)}\n"
    os.write(2, line.encode(errors="backslashreplace"))  # the main thread may be within a print
    os._exit(128 + number)


def _again(config: type, prog: str) -> str:
    """The command that goes on with this run."""
    args = sys.argv[1:]
    if _begun:  # what --overwrite was to replace is gone
        args = [arg for arg in args if arg not in ("--resume", "--overwrite")]
        args += ["--resume"] * hasattr(config, "resume")
    return f"python -m {prog} {shlex.join(args)}"


def _reason(error: Exception, config: type) -> str:
    """An error that a user can mend in one line; any other is raised again, a defect."""
    again = "go on with --resume" if hasattr(config, "resume") else "run it again"
    if isinstance(error, InputError):  # the library names arguments, a command its flags
        return re.sub(r"`(\w+)`", lambda name: flag_of(name[1]), " ".join(str(error).split()))
    if isinstance(error, BrokenPipeError):
        return f"what reads this command's output has gone; {again}"
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        return f"{error.filename or 'a file'}: {error.strerror}; mend that and {again}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory; lower --batch-size, --steps-per-call, --max-length or the model's sizes"
    raise error


def begun() -> None:
    """From now on what the command writes to is its own, and can be gone on with."""
    global _begun
    _begun = True


def say(line: str) -> None:
    """Print a line at once, also into a pipe, and clear of a progress bar; the first process alone does."""
    if is_first_process():
        tqdm.write(line)
        sys.stdout.flush()


def create_run(
    config: Any,
    output: str,
    monitor: str,
    files: Mapping[str, str] | None = None,
    **more: Any,
) -> Run:
    """The run's folder, with everything in its configuration but how it was started.

    Args:
        config: the command's flags.
        output: the folder.
        monitor: see `Run`.
        files: see `Run.create`.
        more: for the configuration, beside the flags.
    """
    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite are two different things; give one")
    settings = settings_of(config) | {"output": output, **more}
    check_same_on_all_processes(json.dumps([settings, dict(files or {}), config.resume, config.overwrite]))
    started = (config.resume, config.overwrite, config.allow_config_change)
    nothing = config.resume and not (Path(output) / CONFIG).exists()
    run = Run.create(Path(output), settings, monitor, *started, files=files)
    if nothing:
        say(f"{output}: holds no run to go on with; this one begins anew")
    begun()

    def clear() -> None:
        if run.steps.saved() and next(run.steps.valid(), None) is None:
            return  # it cannot be gone on with, which `Run.restore` will say; what it made is good
        for name in reversed(PRODUCTS):
            (run.path / name).unlink(missing_ok=True)

    run_on_first(clear)
    return run


def settings_of(config: Any) -> dict[str, Any]:
    """A command's flags but for those about the call alone, as ``config.json`` holds them."""
    about_the_call = {"preset", "resume", "overwrite", "allow_config_change", "tensorboard"}
    about_the_call |= {"kernel", "hosts", "model_parallel"}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in about_the_call}
    return json.loads(json.dumps(settings))


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``: the run has reached its end."""
    write_atomically(path / RESULTS, json.dumps(results, indent=2) + "\n")


def describe(parts: Sequence[Documents], vocabulary: Vocabulary, stream: Any) -> None:
    """What is trained on, in two lines; parts are training, validation and perhaps test."""
    sizes = " / ".join(f"{len(part):,}" for part in parts)
    names = " / ".join(("train", "validation", "test")[: len(parts)])
    say(f"documents: {sizes} ({names}), vocabulary {len(vocabulary):,}")
    if not isinstance(stream, BatchStream):
        size = f"{stream.batch_size} rows of {stream.unroll} steps"
        say(f"batches: {stream.steps_per_epoch:,} an epoch of {size}")
        return
    say(
        f"batches: {stream.steps_per_epoch:,} an epoch of {stream.batch_size}, "
        f"lengths up to {', '.join(map(str, stream.bounds))}, {stream.padding:.1%} padding"
    )


def speed(records: Sequence[Mapping[str, Any]], stream: Any) -> dict[str, float]:
    """Seconds of training in all, and the text's tokens a second."""
    seconds = sum(record["seconds"] for record in records)
    rate = stream.tokens_per_epoch * len(records) / max(seconds, 1e-9)
    return {"seconds": round(seconds, 1), "tokens_per_second": round(rate, 1)}


def peak_memory() -> int | None:
    """Bytes at the peak: of the device, or of this process where it has no memory of its own."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or process_peak()


def count(params: Any) -> int:
    """Numbers in a pytree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@contextlib.contextmanager
def tensorboard(run: Run, enabled: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What to call with an epoch's record; it does nothing if not wanted, or not the first process."""
    if not (enabled and is_first_process()):
        yield lambda record: None
        return
    from tensorboardX import SummaryWriter  # a second to import, for those who ask for it

    def write(record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            values = {f"{name}/{i}": each for i, each in enumerate(value)} if isinstance(value, list) else {}
            for tag, number in (values or {name: value}).items():
                if isinstance(number, int | float):
                    writer.add_scalar(tag, number, record["epoch"])
        writer.flush()

    with SummaryWriter(str(run.path / EVENTS)) as writer:
        yield write


def load_elmo(pretrained: str | None, bilm: tuple[str, str] | None, precision: Dtype | None) -> Elmo:
    """The model that one of the two flags names, with products of that dtype."""
    if (pretrained is None) == (bilm is None):
        raise InputError("give one of --pretrained RUN and --bilm OPTIONS WEIGHTS")
    if bilm is not None:
        return Elmo.from_bilm(*bilm, dtype=precision)
    return Elmo.from_pretrained(pretrained or "", precision)
