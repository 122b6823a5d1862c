"""What every command shares: one-line errors, exit codes, a run folder and what is said of it."""

import contextlib
import dataclasses
import io
import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import pooch
from tqdm import tqdm

from elmo_jax.checkpoint import EVENTS, RESULTS, Run
from elmo_jax.data import BatchStream, Documents
from elmo_jax.elmo import Dtype, Elmo
from elmo_jax.errors import InputError
from elmo_jax.integrity import CONFIG, write_atomically
from elmo_jax.loop import Interrupted
from elmo_jax.processes import alike, first, led
from elmo_jax.text import Vocabulary
from experiments import flags
from experiments.flags import C
from experiments.memory import process_peak, tame_malloc
from experiments.signals import stoppable

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
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that has no λ must not end a run
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        settings = flags.parse(config, prog, presets)
        flags.check(settings)
        flags.refuse(unread(settings), sys.argv[1:])
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
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    if isinstance(error, BrokenPipeError):
        return f"what reads this command's output has gone; {again}"
    if isinstance(error, OSError) and error.strerror and not isinstance(error, ConnectionError):
        return f"{error.filename or 'a file'}: {error.strerror}; mend that and {again}"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return "out of memory; lower --batch-size, --steps-per-dispatch, --max-length or the model's sizes"
    raise error


def begun() -> None:
    """From now on what the command writes to is its own, and can be gone on with."""
    global _begun
    _begun = True


def say(line: str) -> None:
    """Print a line at once, also into a pipe, and clear of a progress bar; the first process alone does."""
    if first():
        tqdm.write(line)
        sys.stdout.flush()


def create_run(
    config: Any,
    output: str,
    monitor: str,
    files: Mapping[str, str] | None = None,
    remedy: str | None = None,
    **more: Any,
) -> Run:
    """The run's folder, with everything in its configuration but how it was started.

    Args:
        config: the command's flags.
        output: the folder.
        monitor: see `Run`.
        files: see `Run.create`.
        remedy: see `Steps`.
        more: for the configuration, beside the flags.
    """
    if config.resume and config.overwrite:
        raise InputError("--resume and --overwrite are two different things; give one")
    settings = settings_of(config) | {"output": output, **more}
    alike(json.dumps([settings, dict(files or {}), config.resume, config.overwrite]))
    started = (config.resume, config.overwrite, config.allow_config_change)
    nothing = config.resume and not (Path(output) / CONFIG).exists()
    run = Run.create(Path(output), settings, monitor, *started, files=files)
    if nothing:
        say(f"{output}: holds no run to go on with; this one begins anew")
    run.steps.remedy = remedy
    begun()

    def clear() -> None:
        if run.steps.saved() and next(run.steps.whole(), None) is None:
            return  # it cannot be gone on with, which `Run.restore` will say; what it made is good
        for name in reversed(PRODUCTS):
            (run.path / name).unlink(missing_ok=True)

    led(clear)
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
def tensorboard(run: Run, wanted: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What to call with an epoch's record; it does nothing if not wanted, or not the first process."""
    if not (wanted and first()):
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
