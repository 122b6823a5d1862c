"""The whole comparison, from pre-training to a page of results: python -m experiments.compare."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path

import filelock
import jax

from elmo_jax.data.csv_dataset import DataConfig
from elmo_jax.errors import InputError
from elmo_jax.storage.files import CONFIG, write_atomically, writer_lock
from experiments.common import cli
from experiments.common.cli import flag_of
from experiments.compare import claims, results
from experiments.compare.stages import METHODS, CompareConfig, Comparison, Origins, Stage, run_stages

_LOCK = ".lock"
_MOST_SEEDS = 1000


def _check(config: CompareConfig) -> None:
    """Flags that together mean nothing."""
    if config.seeds > _MOST_SEEDS:
        raise InputError(f"--seeds must be at most {_MOST_SEEDS}, not {config.seeds}")
    if config.pretrained is None:
        return
    default = DataConfig()
    fields = dataclasses.fields(DataConfig)
    given = [f.name for f in fields if getattr(config.data, f.name) != getattr(default, f.name)]
    if given:
        flags = ", ".join(map(flag_of, given))
        raise InputError(f"--pretrained brings the data set of that run; leave out {flags}")
    if config.pretrain.strip() and not config.claims:
        raise InputError("--pretrained is there in place of a new run; leave out it or --pretrain")


def _check_output(output: Path) -> None:
    """A folder that is new, or a comparison's: nothing else is written over."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; give --output a folder")
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    if CONFIG in names:
        try:
            made = json.loads((output / CONFIG).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            made = None
        if not isinstance(made, dict):
            raise InputError(f"{output / CONFIG}: cannot be read; restore it, or give --output a new folder")
        if "seeds" not in made:
            raise InputError(f"{output}: holds a run of another command; give --output a folder of its own")
    elif names - {f"{CONFIG}.part", _LOCK}:
        raise InputError(f"{output}: is not empty and holds no comparison; give --output a new folder")


def compare(config: CompareConfig) -> None:
    """Run the command."""
    output, origins = Path(config.output), Origins()
    _check(config)
    _check_output(output)
    data = config.data if config.pretrained is None else origins.given(Path(config.pretrained))
    comparison = Comparison(config, data, output, origins, config.pretrained)
    classifiers = {
        method: [comparison.classifier(method, seed) for seed in range(config.seeds)] for method in METHODS
    }
    studies = claims.studies(comparison, classifiers) if config.claims else None
    output.mkdir(parents=True, exist_ok=True)
    try:
        with writer_lock(output / _LOCK):
            _run(config, comparison, classifiers, studies)
    except filelock.Timeout:
        told = "another comparison writes there; wait for it, or give another --output"
        raise InputError(f"{output}: {told}") from None


def _run(
    config: CompareConfig,
    comparison: Comparison,
    classifiers: Mapping[str, list[Stage]],
    studies: claims.Studies | None,
) -> None:
    """Run what is not finished, and write the pages."""
    output = comparison.output
    write_atomically(output / CONFIG, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    stages = [*comparison.sources(), *(run for runs in classifiers.values() for run in runs)]
    seconds = run_stages([*stages, *(claims.stages(studies) if studies else [])], output)
    about = (
        f"Made by `{cli.prog('compare')} {shlex.join(sys.argv[1:])}` with jax {jax.__version__} on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)."
    )
    results.write(classifiers, comparison.sources(), Path(comparison.language_model), seconds, about,
                  comparison.data.dataset, output)  # fmt: skip
    cli.say(f"written to {output / 'report.html'}")
    if studies:
        claims.write(studies, output)
        cli.say(f"written to {output / 'claims.html'}")


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(CompareConfig, compare, "compare")


if __name__ == "__main__":
    sys.exit(main())
