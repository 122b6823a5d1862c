"""Write the layers of every token of a text: python -m experiments.embed."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import OmitArgPrefixes, Positional

from elmo_jax.dump import Dump, DumpConfig
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.integrity import read_config
from elmo_jax.progress import Meter
from experiments import cli


@dataclass(frozen=True)
class EmbedConfig:
    """Write the layers of every token of a text, a sentence a line, into an HDF5 file."""

    input: Positional[str]
    """The text, UTF-8."""
    out: Positional[str]
    """The HDF5 file to write. Until it is done it takes twice its size on the disk."""
    pretrained: str | None = None
    """Run of experiments.pretrain, or a folder that save_pretrained wrote."""
    bilm: tuple[str, str] | None = None
    """Options and weights of a model in the official format."""
    dump: Annotated[DumpConfig, OmitArgPrefixes] = DumpConfig()
    mix_from: str | None = None
    """Run of experiments.downstream whose lambdas --layers mix takes."""
    resume: bool = False
    """Go on with a file that was not finished."""
    overwrite: bool = False
    """Replace what is there."""


def embed(config: EmbedConfig) -> None:
    """Run the command."""
    elmo = cli.load_elmo(config.pretrained, config.bilm)
    dump = Dump(elmo, Path(config.input), Path(config.out), config.dump, _weights(config, elmo))
    cli.say(f"{dump.lines:,} lines, {dump.tokens:,} tokens; the file will take {dump.size / 1e6:,.1f} MB")
    dump.begin(config.resume, config.overwrite)
    with Meter(dump.tokens, "token", scale=True) as meter:
        dump.write(meter.add)
    cli.say(f"written to {config.out}")


def _weights(config: EmbedConfig, elmo: Elmo) -> list[float] | None:
    if (config.dump.layers == "mix") != (config.mix_from is not None):
        raise InputError("--layers mix and --mix-from RUN need each other; give both or neither")
    if config.mix_from is None:
        return None
    read_config(Path(config.mix_from))
    path = Path(config.mix_from) / "results.json"
    try:
        lambdas = json.loads(path.read_text(encoding="utf-8"))["lambdas"]
        weights = [float(value) for value in lambdas]
        if not np.isfinite(weights).all():
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{path}: holds no lambdas; give a run of experiments.downstream that has some"
        ) from None
    if len(weights) != elmo.shape(0)[0]:
        raise InputError(f"{path}: has {len(weights)} lambdas for a model of {elmo.shape(0)[0]} layers")
    return weights


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(EmbedConfig, embed, "experiments.embed")


if __name__ == "__main__":
    sys.exit(main())
