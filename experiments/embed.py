"""Command that writes the layers of every token of a text to HDF5."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
from tyro.conf import OmitArgPrefixes, Positional, arg

import elmo_jax
from elmo_jax.config import CombinerConfig, Config, Dtype, DumpConfig
from elmo_jax.errors import InputError
from experiments.common import cli

if TYPE_CHECKING:
    from elmo_jax.models.combiners import Mix


@dataclass(frozen=True)
class EmbedConfig(Config):
    """Write the layers of every token of a text, one sentence per line, to an HDF5 file."""

    input: Annotated[Positional[str], arg(metavar="TEXT")]
    """The text file, UTF-8."""
    out: Annotated[Positional[str], arg(metavar="OUT.h5")]
    """The HDF5 file to write. Writing it needs free disk space of twice its size."""
    pretrained: str | None = None
    """Run of pretrain, or a folder written by save_pretrained."""
    bilm: tuple[str, str] | None = None
    """Options and weights of a model in the official format."""
    dump: Annotated[DumpConfig, OmitArgPrefixes] = DumpConfig()
    precision: Dtype | None = None
    """Matmul dtype; if not given, the dtype stored with the model."""
    mix_from: str | None = None
    """Run of downstream; --layers mix uses its lambdas, its layer norm and, if it fine-tuned the language
    model, that model."""
    resume: bool = False
    """Continue an unfinished file, even if it is to replace an existing file."""
    overwrite: bool = False
    """Replace an existing file."""


def embed(config: EmbedConfig) -> None:
    """Run the command."""
    from elmo_jax.embed_file import Dump
    from elmo_jax.training.loop import ProgressBar

    elmo = cli.load_elmo(config.pretrained, config.bilm, config.precision)
    if (config.dump.layers == "mix") != (config.mix_from is not None):
        raise InputError("--layers mix and --mix-from RUN need each other; give both or neither")
    mix = None
    if config.mix_from is not None:
        elmo, mix = load_mix(elmo, Path(config.mix_from))
    dump = Dump(elmo, Path(config.input), Path(config.out), config.dump, mix)
    cli.say(f"{dump.lines:,} lines, {dump.tokens:,} tokens; the file will take {dump.size / 1e6:,.1f} MB")
    cli.warn_unknown(dump.unknown, dump.tokens, config.dump.tokenize)
    dump.prepare(config.resume, config.overwrite)
    cli.mark_output_created()
    with ProgressBar(dump.tokens, "token", scale=True) as progress:
        dump.write(progress.add)
    cli.say(f"written to {config.out}")


def load_mix(elmo: "elmo_jax.Elmo", path: Path) -> tuple["elmo_jax.Elmo", "Mix"]:
    """Return the language model of a downstream run, with its fine-tuning, and the mix of its layers.

    Raises:
        InputError: The folder is not a downstream run, has no lambdas, or uses another language model.
    """
    from elmo_jax.models.combiners import Mix, make_combiner
    from elmo_jax.storage.files import read_config, structure, tree_digest
    from elmo_jax.training.checkpoint import RESULTS
    from experiments.common.config import SourceConfig
    from experiments.common.inputs import official_options

    config = read_config(path)
    if "source" not in config or "combiner" not in config:
        raise InputError(f"--mix-from {path}: is not a run of downstream; give one that has lambdas")
    combiner = structure(CombinerConfig, config["combiner"], f"{path}: combiner")
    source = structure(SourceConfig, config["source"], f"{path}: source")
    if source.untrained:
        raise InputError(f"--mix-from {path}: its language model is untrained; give another run")
    options = official_options(elmo.model.config)["options"]
    if config.get("model") != tree_digest(elmo.params) or config.get("options", options) != options:
        raise InputError(f"--mix-from {path}: uses another language model; give the one it names")
    params = elmo_jax.Run.open(path).restore_best(("params",))["params"]
    weights = make_combiner(combiner).lambdas(params.get("combiner", {}))
    if weights is None or not (path / RESULTS).is_file():
        raise InputError(f"--mix-from {path}: has no lambdas; give a finished run that has some")
    if source.finetune:
        elmo = elmo_jax.Elmo(elmo.model, params["bilm"], elmo.vocabulary, elmo.text)
    weights = np.asarray(weights, np.float64).tolist()
    statistics = params.get("standardizer")
    if statistics is not None:  # lists, because the HDF5 file records them as JSON
        statistics = {name: np.asarray(value, np.float64).tolist() for name, value in statistics.items()}
    return elmo, Mix(weights, combiner.layer_norm, statistics)


def main() -> int:
    """Run the command and return its exit code."""
    return cli.run(EmbedConfig, embed, "embed")


if __name__ == "__main__":
    sys.exit(main())
