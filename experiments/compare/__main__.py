"""Command that compares ELMo with word vectors, from pre-training to a page of results."""

import dataclasses
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import filelock
from msgspec import Meta
from tyro.conf import OmitArgPrefixes

from elmo_jax.config import Config, DataConfig
from elmo_jax.errors import InputError
from experiments.common import cli

_CONFIG, _LOCK = "config.json", ".lock"


@dataclass(frozen=True)
class CompareConfig(Config):
    """Compare ELMo with SVD and SGNS vectors; the same command continues after a stop."""

    data: Annotated[DataConfig, OmitArgPrefixes] = DataConfig()
    preset: Literal["report", "best"] = "report"
    """Preset of pre-training and of the classifiers."""
    seeds: Annotated[int, Meta(ge=1, le=1000)] = 1
    """Number of classifiers per method, with random seeds 0, 1, …; the page shows means and deviations."""
    claims: bool = False
    """Also measure the claims about ELMo with many more classifiers, and write claims.md and claims.html."""
    pretrained: str | None = None
    """Finished run of pretrain to use with its data set, instead of pre-training."""
    runs: str | None = None
    """Folder of runs, such as runs; finished ones with the settings of the comparison are copied instead of
    being trained again."""
    pretrain: str = ""
    """More flags of pretrain in one string, as in --pretrain="--epochs 2 --cells 64"; with
    --pretrained, for the language model that --claims trains."""
    vectors: str = ""
    """More flags of vectors in one string."""
    downstream: str = ""
    """More flags of downstream in one string."""
    output: str = "runs/compare"
    """Folder of all runs and of the pages."""


def compare(config: CompareConfig) -> None:
    """Run the unfinished stages and write the pages."""
    from elmo_jax.storage.files import write_atomically, writer_lock
    from experiments.compare import claims, results
    from experiments.compare.stages import Comparison, run_stages

    output = Path(config.output)
    _check_flags(config)
    _check_output(output)
    if config.runs is not None and not Path(config.runs).is_dir():
        raise InputError(f"--runs {config.runs}: no such folder; give the folder that holds the runs")
    comparison = Comparison(config)
    stages = comparison.stages
    studies = claims.Studies(comparison) if config.claims else None
    output.mkdir(parents=True, exist_ok=True)
    try:
        with writer_lock(output / _LOCK):
            write_atomically(output / _CONFIG, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
            for few in studies.few_texts if studies else ():
                few.write_data()
            runs = None if config.runs is None else Path(config.runs)
            seconds = run_stages([*stages, *(studies.stages if studies else [])], output, runs)
            results.write_page(comparison, seconds, _describe_call())
            cli.say(f"written to {output / 'report.html'}")
            if studies:
                claims.write_page(studies, output)
                cli.say(f"written to {output / 'claims.html'}")
    except filelock.Timeout:
        message = "another comparison writes there; wait for it, or give another --output"
        raise InputError(f"{output}: {message}") from None


def _check_flags(config: CompareConfig) -> None:
    """Check flags that exclude each other."""
    if config.pretrained is None:
        return
    default, given = (dataclasses.asdict(data) for data in (DataConfig(), config.data))
    if changed := [cli.flag_of(name) for name in given if given[name] != default[name]]:
        raise InputError(f"--pretrained brings the data set of that run; leave out {', '.join(changed)}")
    if config.pretrain.strip() and not config.claims:
        raise InputError("--pretrain has no effect with --pretrained; leave one of them out")


def _check_output(output: Path) -> None:
    """Refuse a folder that holds anything but a comparison."""
    try:
        is_allowed = "seeds" in json.loads((output / _CONFIG).read_text("utf-8"))
    except FileNotFoundError:
        names = {path.name for path in output.iterdir()} if output.exists() else set()
        is_allowed = names <= {f"{_CONFIG}.part", _LOCK}
    except (TypeError, ValueError):
        is_allowed = False
    if not is_allowed:
        raise InputError(f"{output}: is not empty and holds no comparison; give --output another folder")


def _describe_call() -> str:
    import jax

    device = f"{jax.device_count()} x {jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)"
    command = f"{cli.prog('compare')} {shlex.join(sys.argv[1:])}"
    return f"Made by `{command}` with JAX {jax.__version__} on {device}."


def main() -> int:
    """Run the command and return its exit code."""
    return cli.run(CompareConfig, compare, "compare")


if __name__ == "__main__":
    sys.exit(main())
