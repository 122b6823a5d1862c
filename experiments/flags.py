"""Flags from a command's dataclass, and what their values must be."""

import contextlib
import dataclasses
import io
import itertools
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import tyro

from elmo_jax.characters import CHARACTERS
from elmo_jax.errors import InputError

C = TypeVar("C")


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
_SIZES = {"batch_size", "steps_per_dispatch", "embedding", "cells", "hidden"}  # at most 2**16
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
