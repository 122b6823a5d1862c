"""Shared parts of the commands: flags, errors, signals, run folders and printed lines.

Modules that import JAX are imported inside functions, so `--help` and a wrong flag answer at once.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import os
import platform
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import elmo_jax
from elmo_jax.config import Dtype
from elmo_jax.errors import InputError, Interrupted
from experiments.common.config import HostsConfig

C = TypeVar("C")

MAX_UNKNOWN = 0.1  # fraction of unknown tokens above which a command warns

# Files and folders that a finished run adds to its folder; the results are written last.
PRODUCTS = ("model", "loss.png", "perplexity.png", "lambdas.png", "predictions.npz",
            "vectors.npz", "vectors.txt",
            *(f"confusion_{part}.png" for part in ("train", "validation", "test")),
            "memory.jsonl", "memory.png", "results.json")  # fmt: skip


# Start and end of a command


def run(
    config: type[C],
    command: Callable[[C], Any],
    name: str,
    presets: Mapping[str, C] | None = None,
    unused: Callable[[C], Mapping[str, str]] = lambda settings: {},
) -> int:
    """Parse the flags and run a command; print an error of the user as one line.

    Args:
        config: Dataclass of the command's flags.
        command: Function to call with the parsed flags.
        name: Name of the command, such as ``pretrain``.
        presets: Named sets of defaults.
        unused: Function that returns the flags without effect under given settings, each with a message.

    Returns:
        The exit code.
    """
    warnings.filterwarnings("always", ".* ends with the next release", DeprecationWarning)
    show_once = functools.cache(lambda line: print(line, file=sys.stderr))
    warnings.showwarning = lambda message, *_, **__: show_once(f"warning: {message}")
    if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal's encoding may lack λ
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with exit_on_signals(lambda number: _leave(number, config, name)):
            try:
                settings = parse(config, name, presets)
                check(settings)
                reasons = unused(settings)
                for flag in flags_in(sys.argv[1:]):  # fields that only a preset sets are allowed
                    if flag in reasons:
                        raise InputError(f"{flag} {reasons[flag]}")
                configure_malloc()
                if not getattr(settings, "dry_run", False):  # a dry run writes nothing
                    _cache_compiled_programs()
                command(settings)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # 128 + SIGPIPE, as a shell reports it
    except Interrupted as stop:
        print(f"{stop}; continue with: {_command_to_continue(config, name)}", file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        print(f"error: {_one_line_reason(error, config)}", file=sys.stderr)
        return 2
    return 0


def _one_line_reason(error: Exception, config: type) -> str:
    """Return the message of an error that the user can fix; raise any other error again."""
    again = "continue with --resume" if hasattr(config, "resume") else "run again"
    if isinstance(error, InputError):
        message = re.sub(r"load it with Elmo\.from_bilm\((.+), (.+)\)", r"give --bilm \1 \2", str(error))
        return " ".join(_arguments_to_flags(message, config).split())
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        return f"{error.filename or 'a file'}: {error.strerror}; fix this and {again}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory; lower --batch-size, --steps-per-call, --max-length or the model's sizes"
    if _is_watching:
        time.sleep(1)  # if another process was killed, the thread that watches it ends this one
    raise error


def prog(name: str) -> str:
    """Return the start of a command line in the form that the user used to start this process.

    Examples:
        >>> prog("vectors")
        'python -m experiments.vectors'
    """
    start = sys.argv[0].rpartition(" ")[0]  # elmo_jax.__main__ sets "elmo-jax pretrain"
    return (
        f"{start} {name}" if start in ("elmo-jax", "python -m elmo_jax") else f"python -m experiments.{name}"
    )


@contextlib.contextmanager
def exit_on_signals(leave: Callable[[int], None]) -> Iterator[None]:
    """Call a function at SIGINT or SIGTERM while the body runs.

    If the body installs a handler of its own, as `elmo_jax.fit` does, only that handler gets the first
    signal. Python runs handlers between bytecode instructions, so a compilation delays them. A thread
    therefore waits for the second signal and calls the function at once.

    Args:
        leave: Function that ends the process; called with the signal number, in either thread.
    """
    if threading.current_thread() is not threading.main_thread():  # other threads cannot set handlers
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch() -> None:
        with open(reader, "rb", buffering=0) as pipe:
            received = (byte[0] for byte in iter(lambda: pipe.read(1), b"") if byte[0] in numbers)
            next(received, None)
            for number in received:
                leave(number)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    old_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    old_handlers = [signal.signal(number, lambda number, _: leave(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, old_handlers, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_fd)
        os.close(writer)  # closing the pipe ends the thread
        thread.join()


def _leave(number: int, config: type, name: str) -> None:
    """End the process at once; unwinding would wait for a save in progress."""
    hint = "continue with" if hasattr(config, "resume") else "run again with"
    line = f"stopped; {hint}: {_command_to_continue(config, name)}\n"
    os.write(
        2, line.encode(errors="backslashreplace")
    )  # os.write, because the main thread may hold the lock of sys.stderr
    os._exit(128 + number)


_is_watching = False


def join_processes(hosts: HostsConfig) -> None:
    """Join the processes of a distributed run; end this process if another one is killed."""
    global _is_watching
    from elmo_jax.parallel import start_distributed

    def leave(process: int) -> None:
        again = "start all processes again" + " with --resume" * _output_created
        os.write(2, f"error: process {process} of this run has ended; {again}\n".encode())
        os._exit(2)  # unwinding would wait for the lost process

    start_distributed(hosts.coordinator, hosts.processes, hosts.process, leave)
    _is_watching = hosts.coordinator is not None


_output_created = False


def mark_output_created() -> None:
    """Note that the output now belongs to this command, so that ``--resume`` continues it."""
    global _output_created
    _output_created = True


def _command_to_continue(config: type, name: str) -> str:
    args = sys.argv[1:]
    if _output_created:  # --overwrite would remove this run's output
        args = [arg for arg in args if arg not in ("--resume", "--overwrite")]
        args += ["--resume"] * hasattr(config, "resume")
    return f"{prog(name)} {shlex.join(args)}".rstrip()


# Flags


def parse(
    config: type[C], name: str, presets: Mapping[str, C] | None = None, args: Sequence[str] | None = None
) -> C:
    """Return the command line as a dataclass; ``--preset NAME`` changes the defaults of all other flags.

    Raises:
        InputError: A flag is unknown or its value has the wrong type.
    """
    import tyro

    args = [_replace_old_flag(arg) for arg in (sys.argv[1:] if args is None else args)]
    args = _move_bilm_last(_write_out_switches(args, config))
    chosen = re.findall(r"(?:^|\0)--preset[=\0]([^\0]*)", "\0".join(args))
    preset = (presets or {}).get(chosen[-1]) if chosen else None
    default: dict[str, Any] = {} if preset is None else {"default": preset}
    output, columns = io.StringIO(), os.environ.get("COLUMNS")
    if "--help" not in args and "-h" not in args:
        os.environ["COLUMNS"] = "10000"  # otherwise the parser wraps its messages at the terminal's width
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(config, prog=prog(name), description=config.__doc__, args=args, **default)
    except SystemExit as error:
        if error.code == 2:
            message = _first_paragraph(output.getvalue())
            if wrong_value := re.fullmatch(r"Error parsing \w[^ ]*: (.* must be .*)", message):
                raise InputError(_arguments_to_flags(wrong_value[1], config)) from None
            message = _explain(message, args)
            raise InputError(f"{message} (see {prog(name)} --help)") from None
        raise
    finally:
        os.environ.pop("COLUMNS", None)
        if columns is not None:
            os.environ["COLUMNS"] = columns


def _replace_old_flag(arg: str) -> str:
    flag, equals, value = arg.partition("=")
    if flag.replace("_", "-") == "--text-column":  # accepted for a single column
        return f"--text-columns{equals}{value}"
    if flag.replace("_", "-") != "--steps-per-dispatch":
        return arg
    new = "--steps-per-call"
    print(f"warning: {flag} is now {new}; the old name ends with the next release", file=sys.stderr)
    return f"{new}{equals}{value}"


def _move_bilm_last(args: Sequence[str]) -> list[str]:
    """Move ``--bilm`` and its two values to the end, since the parser takes all later values as its own."""
    parts = (arg.split("=", 1) if arg.startswith("--bilm=") else [arg] for arg in args)
    args = list(itertools.chain.from_iterable(parts))
    if "--bilm" not in args:
        return args
    i = args.index("--bilm")
    flag, *values = args[i : i + 3]
    if len(values) < 2 or any(value.startswith("--") for value in values):
        raise InputError(f"{flag} needs OPTIONS WEIGHTS, the two files of an official model")
    return [*args[:i], *args[i + 3 :], flag, *values]


def _explain(message: str, args: Sequence[str]) -> str:
    """Reword messages of the parser that do not say what to change."""
    value = re.match(r"Unrecognized options: ([^-,][^,]*)", message)
    if value is not None and value[1] in args:
        before = [arg for arg in args[: args.index(value[1])] if arg.startswith("--")]
        if before:
            return f"{before[-1]} takes no further value {value[1]}; quote a pattern, as in 'shards/*.txt'"
    kinds = {"invalid literal for int.*: ": "an integer", "could not convert string to float: ": "a number"}
    for pattern, kind in kinds.items():
        message = re.sub(f"Error parsing (--[a-z-]+): {pattern}", rf"\1 must be {kind}, not ", message)
    return message


def _write_out_switches(args: Sequence[str], config: type) -> list[str]:
    """Give a value to ``--name`` and ``--no-name`` where the field may also be None."""
    switches = {flag_of(name) for name, hint in _find_fields(config) if hint == (bool | None)}
    values = dict.fromkeys(switches, "True") | {f"--no-{flag[2:]}": "False" for flag in switches}
    out: list[str] = []
    for arg, following in itertools.pairwise([*args, ""]):
        value = values.get(arg) if following not in ("True", "False", "None") else None
        out += [arg] if value is None else [arg.replace("--no-", "--"), value]
    return out


def _find_fields(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the name and the type of every field of a dataclass and of the dataclasses in it."""
    for name, hint in typing.get_type_hints(config).items():
        yield from _find_fields(hint) if dataclasses.is_dataclass(hint) else [(name, hint)]


def _first_paragraph(message: str) -> str:
    """Return the first paragraph of the parser's framed message as one line."""
    text = re.sub(r"[│╭╮╰╯─]+|^ *-{3,}", " ", message.partition("\n")[2], flags=re.MULTILINE)
    return " ".join(re.split(r"\n\s*\n", text.strip())[0].split())


def flag_of(name: str) -> str:
    """Return the flag of a config field.

    Examples:
        >>> flag_of("layer_norm")
        '--layer-norm'
    """
    return f"--{name.replace('_', '-')}"


def flags_in(args: Sequence[str]) -> list[str]:
    """Return the flags of a command line in order, as the help writes them; ``--no-X`` counts as ``--X``.

    Examples:
        >>> flags_in(["text.txt", "--no-layer_norm", "--epochs=2"])
        ['--layer-norm', '--epochs']
    """
    flags = [arg.split("=", 1)[0].replace("_", "-") for arg in args if arg.startswith("--")]
    return [re.sub("^--text-column$", "--text-columns", re.sub("^--no-", "--", flag)) for flag in flags]


def without_effect(names: Iterable[str], by: str, value: str, instead: str) -> dict[str, str]:
    """Return messages about fields without effect while flag `by` has this value.

    Examples:
        >>> without_effect(["unroll"], "--batching", "sentences", "--batching contiguous")
        {'--unroll': 'has no effect with --batching sentences; leave it out, or give --batching contiguous'}
    """
    message = f"has no effect with {by} {value}; leave it out, or give {instead}"
    return dict.fromkeys(map(flag_of, names), message)


def check(settings: Any) -> None:
    """Check that strings are neither empty nor invalid as file names; `Config` checks types and bounds.

    Raises:
        InputError: A value is wrong; the message names its flag.
    """
    for field in dataclasses.fields(settings):
        value, flag = getattr(settings, field.name), flag_of(field.name)
        if dataclasses.is_dataclass(value):
            check(value)
        for item in value if isinstance(value, tuple) else (value,):
            if not isinstance(item, str):
                continue
            if "\0" in item:
                raise InputError(f"{flag} contains a NUL character; remove it")
            if any("\ud800" <= letter <= "\udfff" for letter in item):
                raise InputError(f"{flag} is not UTF-8; give another name")
            if not item and field.default != "":
                raise InputError(f"{flag} is empty; give it a value, or leave it out")


def _arguments_to_flags(message: str, config: type) -> str:
    """Return a library message with Python arguments written as flags.

    ``name=True`` becomes ``--name`` and ``name=5`` becomes ``--name 5``. A bare name becomes a flag if it
    stands in backticks, has an underscore or begins the message; elsewhere it may be plain English.
    """

    names = "|".join(name for name, _ in _find_fields(config))

    def replace(match: re.Match) -> str:
        quoted, name, value = match.groups()
        if not quoted and value is None and "_" not in name and match.start() > 0:
            return match[0]
        if value == "False":
            return flag_of(f"no_{name}")
        return flag_of(quoted or name) + (f" {value}" if value not in (None, "True") else "")

    return re.sub(
        rf"`({names})`|(?<![\w./-])({names})(?:='?([\w.+-]*\w)'?)?(?![\w/:=]|[.-]\w)",
        replace,
        message,
    )


# Run folders

# Settings that may change when a run is resumed, because digests tell whether the inputs are the same.
INPUT_PATHS = {"data.dataset", "data.data_dir", "corpus.corpus", "corpus.valid_corpus", "corpus.vocab"} | {
    f"source.{name}" for name in ("pretrained", "bilm", "vectors", "dataset", "data_dir")
}


def create_run(
    config: Any,
    output: str,
    monitor: str,
    files: Mapping[str, str] | None = None,
    **more: Any,
) -> "elmo_jax.Run":
    """Create or open the run folder; its configuration holds the result of `settings_of` and `more`.

    See `Run.create` for `monitor` and `files`.
    """
    from elmo_jax.parallel import check_same_on_all_processes, run_on_first
    from elmo_jax.storage.files import CONFIG

    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite exclude each other; give one")
    settings = settings_of(config) | {"output": output, **more}
    check_same_on_all_processes(json.dumps([settings, dict(files or {}), config.resume, config.overwrite]))
    started = (config.resume, config.overwrite, config.allow_config_change)

    def check_run_exists() -> None:
        if config.resume and not (Path(output) / CONFIG).exists():
            raise InputError(f"{output}: holds no run to continue; check --output, or leave out --resume")

    run_on_first(check_run_exists)
    run = elmo_jax.Run.create(Path(output), settings, monitor, *started, files=files, input_paths=INPUT_PATHS)
    mark_output_created()

    def remove_products() -> None:
        if run.steps.saved() and next(run.steps.valid(), None) is None:
            return  # the results stay, because `Run.restore` will refuse to continue
        for name in reversed(PRODUCTS):
            path = run.path / name
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)

    run_on_first(remove_products)
    return run


def settings_of(config: Any) -> dict[str, Any]:
    """Return the settings that define a run, as ``config.json`` holds them."""
    only_for_this_start = {"preset", "resume", "overwrite", "allow_config_change", "tensorboard"}
    only_for_this_start |= {"kernel", "hosts", "model_parallel"}
    settings = {k: v for k, v in dataclasses.asdict(config).items() if k not in only_for_this_start}
    return json.loads(json.dumps(settings))


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``, which marks the run as finished."""
    from elmo_jax.storage.files import write_atomically

    write_atomically(path / "results.json", json.dumps(results, indent=2) + "\n")


@contextlib.contextmanager
def tensorboard(run: "elmo_jax.Run", enabled: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yield a function that writes the record of an epoch as TensorBoard events, on the first process."""
    from elmo_jax.parallel import is_first_process
    from elmo_jax.training.checkpoint import EVENTS

    if not (enabled and is_first_process()):
        yield lambda record: None
        return
    from tensorboardX import SummaryWriter

    def write(record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            values = {f"{name}/{i}": each for i, each in enumerate(value)} if isinstance(value, list) else {}
            for tag, number in (values or {name: value}).items():
                if isinstance(number, int | float):
                    writer.add_scalar(tag, number, record["epoch"])
        writer.flush()

    with SummaryWriter(str(run.path / EVENTS)) as writer:
        yield write


# Output


def say(line: str) -> None:
    """Print a line on the first process, above a progress bar, and flush it."""
    from tqdm import tqdm

    from elmo_jax.parallel import is_first_process

    if is_first_process():
        tqdm.write(line)
        sys.stdout.flush()


def describe(parts: Sequence["elmo_jax.Documents"], vocabulary: "elmo_jax.Vocabulary", stream: Any) -> None:
    """Print the sizes of the training data; parts are training, validation and perhaps test."""
    sizes = " / ".join(f"{len(part):,}" for part in parts)
    names = " / ".join(("train", "validation", "test")[: len(parts)])
    say(f"documents: {sizes} ({names}), vocabulary {len(vocabulary):,}")
    describe_unknown(parts)
    batches = f"batches: {stream.steps_per_epoch:,} an epoch of {stream.batch_size}"
    if hasattr(stream, "unroll"):
        say(f"{batches} rows of {stream.unroll} steps")
    else:
        say(f"{batches}, lengths up to {', '.join(map(str, stream.bounds))}, {stream.padding:.1%} padding")


def describe_unknown(parts: Sequence["elmo_jax.Documents"]) -> None:
    """Print the fraction of unknown tokens of each part, and warn if one is large."""
    unknown = [part.unknown_fraction for part in parts]
    say(f"unknown tokens: {' / '.join(f'{fraction:.1%}' for fraction in unknown)}")
    _warn_unknown(max(unknown), "give more texts, a lower --min-count, or a model of such texts")


def warn_unknown(unknown: int, tokens: int, tokenize: bool) -> None:
    """Warn if many tokens of a text are unknown to the model; `tokenize` is the flag ``--tokenize``."""
    remedy = "give a model of such texts" + ("" if tokenize else ", or --tokenize for raw text")
    _warn_unknown(unknown / max(tokens, 1), remedy)


def _warn_unknown(fraction: float, remedy: str) -> None:
    if fraction > MAX_UNKNOWN:
        warnings.warn(f"{fraction:.1%} of the tokens are unknown to the vocabulary; {remedy}", stacklevel=4)


def speed(records: Sequence[Mapping[str, Any]], stream: Any) -> dict[str, float]:
    """Return the total seconds of training and the tokens processed per second."""
    seconds = sum(record["seconds"] for record in records)
    rate = stream.tokens_per_epoch * len(records) / max(seconds, 1e-9)
    return {"seconds": round(seconds, 1), "tokens_per_second": round(rate, 1)}


def load_elmo(
    pretrained: str | None, bilm: tuple[str, str] | None, precision: Dtype | None
) -> "elmo_jax.Elmo":
    """Load the model named by ``--pretrained`` or ``--bilm`` with the given matmul dtype."""
    if (pretrained is None) == (bilm is None):
        raise InputError("give one of --pretrained RUN and --bilm OPTIONS WEIGHTS")
    if bilm is not None:
        return elmo_jax.Elmo.from_bilm(*bilm, dtype=precision)
    return elmo_jax.Elmo.from_pretrained(pretrained or "", precision)


# JAX and memory


def count_parameters(params: Any) -> int:
    """Return the number of elements of all arrays, or shapes, of a pytree."""
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _cache_compiled_programs() -> None:
    """Keep compiled programs on disk for later runs, unless JAX is configured otherwise."""
    import jax
    import pooch

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        jax.config.update("jax_compilation_cache_dir", os.path.join(pooch.os_cache("elmo_jax"), "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@functools.cache  # a second call would register a second listener
def configure_malloc() -> bool:
    """Keep glibc from holding freed memory; return False with other C libraries.

    By default glibc creates up to eight heaps per core for threads, and every checkpoint fragments them.
    This function allows one per core. It also returns the memory that a compilation frees, often over
    100 MB, to the system.
    """
    import ctypes

    if platform.libc_ver()[0] != "glibc":
        return False
    libc, arena_max = ctypes.CDLL(None), -8  # M_ARENA_MAX of glibc's malloc.h
    libc.mallopt(arena_max, os.cpu_count() or 1)
    from jax import monitoring

    def trim_after_compilation(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event.endswith("/backend_compile_duration") and duration_secs > 0.02:
            libc.malloc_trim(0)

    monitoring.register_event_duration_secs_listener(trim_after_compilation)
    return True


def process_peak(status: Path = Path("/proc/self/status")) -> int | None:
    """Return this process's peak memory in bytes, or None on Windows.

    Examples:
        >>> process_peak() > 2**20
        True
    """
    if status.exists():  # on Linux, ru_maxrss would include the peak of the parent process
        found = re.search(r"VmHWM:\s*(\d+)", status.read_text())
        return found and 1024 * int(found[1])
    try:
        import resource
    except ImportError:
        return None
    maximum = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return maximum if sys.platform == "darwin" else 1024 * maximum
