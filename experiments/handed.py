"""Flags that a comparison hands on to its stages, and those that are its own to set."""

import contextlib
import dataclasses
import io
import shlex
from collections.abc import Mapping

from elmo_jax.datasets import DataConfig
from elmo_jax.errors import InputError
from experiments.flags import C, check, flag_of, named, parse
from experiments.hosts import HostsConfig


def _flags(config: type) -> set[str]:
    return {flag_of(field.name) for field in dataclasses.fields(config)}


_DATA = _flags(DataConfig)
_ALL = _flags(HostsConfig) | {"--output", "--resume", "--overwrite", "--allow-config-change"}
_OWN = {
    "pretrain": _ALL | _DATA | {"--dry-run", "--corpus", "--valid-corpus", "--vocab"},
    "vectors": _ALL | _DATA | {"--method"},
    # The figures stand beside those of all labels and of a trained language model.
    "downstream": _ALL | _DATA | {"--pretrained", "--bilm", "--vectors", "--features", "--combiner", "--seed",
                                  "--labels", "--untrained"},
}  # fmt: skip


def split(name: str, text: str) -> list[str]:
    """The flags in one string for a stage.

    Args:
        name: of the flag that brought it, a command's.
        text: as a shell would take it.

    Raises:
        InputError: its quotes do not match, or a flag is the comparison's to set.

    Example:
        >>> split("pretrain", "--epochs 2 --cells=64")
        ['--epochs', '2', '--cells=64']
    """
    try:
        flags = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--{name} {text!r}: {error}; mend its quotes") from None
    for flag in named(flags):
        if flag in _OWN[name]:
            where = ", or give it to compare itself" if flag in _DATA else ""
            raise InputError(f"--{name} {flag}: is for the comparison to set; leave it out{where}")
    return flags


def settings(config: type[C], name: str, presets: Mapping[str, C] | None, flags: list[str]) -> C:
    """A stage's settings, checked before hours of the stages that come first.

    Args:
        config: the command's flags.
        name: of the command.
        presets: the command's.
        flags: as `split` gave them, and the comparison's own.

    Raises:
        InputError: a flag is wrong, or asks for help.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            made = parse(config, f"experiments.{name}", presets, flags)
    except SystemExit:
        told = f"see python -m experiments.{name} --help, and leave it out"
        raise InputError(f"--{name} {shlex.join(flags)!r}: asks for help; {told}") from None
    check(made)
    return made
