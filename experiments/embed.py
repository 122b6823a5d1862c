"""Write the layers of every token of a text: python -m experiments.embed."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from tyro.conf import OmitArgPrefixes, Positional, arg

from elmo_jax.elmo import Dtype, Elmo
from elmo_jax.embed_file import Dump, DumpConfig
from elmo_jax.errors import InputError
from elmo_jax.models.combiners import CombinerConfig, Mix, make_combiner
from elmo_jax.storage.files import read_config, structure, tree_digest
from elmo_jax.training.checkpoint import RESULTS, Run, check_shapes
from elmo_jax.training.loop import ProgressBar
from experiments.common import cli
from experiments.common.features import SourceConfig, official


@dataclass(frozen=True)
class EmbedConfig:
    """Write the layers of every token of a text, a sentence a line, into an HDF5 file."""

    input: Annotated[Positional[str], arg(metavar="TEXT")]
    """The text, UTF-8."""
    out: Annotated[Positional[str], arg(metavar="OUT.h5")]
    """The HDF5 file to write. Until it is done it takes twice its size on the disk."""
    pretrained: str | None = None
    """Run of experiments.pretrain, or a folder that save_pretrained wrote."""
    bilm: tuple[str, str] | None = None
    """Options and weights of a model in the official format."""
    dump: Annotated[DumpConfig, OmitArgPrefixes] = DumpConfig()
    precision: Dtype | None = None
    """Of the products; what the model was trained with, or float32, if not given."""
    mix_from: str | None = None
    """Run of experiments.downstream whose lambdas --layers mix takes, with its layer norm, and with its
    language model if it was finetuned."""
    resume: bool = False
    """Go on with a file that was not finished, also one that is to replace what is there."""
    overwrite: bool = False
    """Replace what is there."""


def embed(config: EmbedConfig) -> None:
    """Run the command."""
    elmo = cli.load_elmo(config.pretrained, config.bilm, config.precision)
    if (config.dump.layers == "mix") != (config.mix_from is not None):
        raise InputError("--layers mix and --mix-from RUN need each other; give both or neither")
    mix = None
    if config.mix_from is not None:
        elmo, mix = mixed(elmo, Path(config.mix_from))
    dump = Dump(elmo, Path(config.input), Path(config.out), config.dump, mix)
    cli.say(f"{dump.lines:,} lines, {dump.tokens:,} tokens; the file will take {dump.size / 1e6:,.1f} MB")
    dump.begin(config.resume, config.overwrite)
    cli.begun()
    with ProgressBar(dump.tokens, "token", scale=True) as meter:
        dump.write(meter.add)
    cli.say(f"written to {config.out}")


def mixed(elmo: Elmo, path: Path) -> tuple[Elmo, Mix]:
    """The language model and the mix of its layers that a run of experiments.downstream ended with.

    Raises:
        InputError: it is no such run, has no lambdas, or is of another language model.
    """
    config = read_config(path)
    if "source" not in config or "combiner" not in config:
        raise InputError(f"{path}: is not a run of experiments.downstream; give one that has lambdas")
    combiner = structure(CombinerConfig, config["combiner"], f"{path}: combiner")
    source = structure(SourceConfig, config["source"], f"{path}: source")
    if source.untrained:
        raise InputError(f"{path}: had a language model without training; give a run with a trained one")
    try:
        lambdas = json.loads((path / RESULTS).read_text(encoding="utf-8"))["lambdas"]
        weights = [float(value) for value in lambdas]
        if not np.isfinite(weights).all():
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{path / RESULTS}: holds no lambdas; give a run of experiments.downstream that has some"
        ) from None
    if len(weights) != elmo.shape(0)[0]:
        told = f"has {len(weights)} lambdas for a model of {elmo.shape(0)[0]} layers"
        raise InputError(f"{path / RESULTS}: {told}; give the model it was trained on")
    options = official(elmo.model.config)["options"]
    if config.get("model") != tree_digest(elmo.params) or config.get("options", options) != options:
        raise InputError(f"{path}: is of another language model than the one given; give the one it names")
    params = Run.open(path).restore_best(("params",))["params"]
    trained = make_combiner(combiner).lambdas(params.get("combiner", {}))
    if trained is None or not np.allclose(weights, trained, rtol=1e-5, atol=1e-7):
        told = "its lambdas are not those of the saved parameters"
        raise InputError(f"{path / RESULTS}: {told}; restore it, or go on with that run by --resume")
    if source.finetune:
        tuned = params.get("bilm", {})
        check_shapes(tuned, elmo.params, str(path))
        elmo = Elmo(elmo.model, tuned, elmo.vocabulary)
    return elmo, Mix(weights, combiner.layer_norm)


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(EmbedConfig, embed, "experiments.embed")


if __name__ == "__main__":
    sys.exit(main())
