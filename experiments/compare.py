"""The whole comparison, from pre-training to a page of results: python -m experiments.compare."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
from tyro.conf import OmitArgPrefixes

from elmo_jax.checkpoint import RESULTS
from elmo_jax.datasets import DataConfig
from elmo_jax.errors import InputError
from elmo_jax.integrity import CONFIG, read_config, write_atomically
from experiments import claims, cli, downstream, pretrain, results, vectors
from experiments.flags import C, check, parse
from experiments.stages import Stage, read_json, run_stages

# By the name the page gives them: the flags that make them, and the work of an epoch.
METHODS: Mapping[str, tuple[tuple[str, ...], float]] = {
    "ELMo, learned function": (("--combiner", "function"), 1.2),
    "ELMo, trainable λ": (("--combiner", "trainable"), 1.2),
    "SGNS": (("--features", "sgns"), 0.6),
    "ELMo, frozen λ": (("--combiner", "frozen"), 1.2),
    "SVD": (("--features", "svd"), 0.6),
}


@dataclass(frozen=True)
class CompareConfig:
    """Run or reuse every stage, then write report.md and report.html; stopped, the same call goes on."""

    data: Annotated[DataConfig, OmitArgPrefixes] = DataConfig()
    preset: Literal["report", "best"] = "report"
    """Of pre-training and of the classifier."""
    seeds: int = 1
    """Classifiers of each method, of seeds 0, 1, …; figures are their mean and standard deviation."""
    claims: bool = False
    """Measure the report's claims too (many more classifiers), and write claims.md and claims.html."""
    pretrained: str | None = None
    """A finished run of experiments.pretrain to use; a new one is made if not given."""
    pretrain: str = ""
    """More flags of experiments.pretrain, in one string: --pretrain="--epochs 2 --cells 64"."""
    vectors: str = ""
    """More flags of experiments.vectors, in one string."""
    downstream: str = ""
    """More flags of experiments.downstream, in one string."""
    output: str = "runs/compare"
    """Folder of all runs and of the pages."""


class Plan:
    """The stages' settings, from the comparison's.

    Args:
        config: of the comparison.
        data: the data set of every stage.
        output: the folder of their runs.
        pretrained: the language model's run, if it is not to be made here.
    """

    def __init__(self, config: CompareConfig, data: DataConfig, output: Path, pretrained: str | None = None):
        self.config, self.data, self.output = config, data, output
        self.language_model = pretrained or str(output / "pretrain")
        self.external = pretrained is not None

    def sources(self) -> list[Stage]:
        """The language model and the word vectors."""
        stages = []
        if not self.external:
            flags = [*self._preset, *_split("pretrain", self.config.pretrain)]
            base = _parse(pretrain.PretrainConfig, "experiments.pretrain", pretrain.PRESETS, flags)
            settings = self._at(base, "pretrain", data=self.data)
            stages.append(Stage("pretrain", "pretrain", float(base.epochs), pretrain.pretrain, settings))
        for method, work in (("svd", 0.3), ("sgns", 1.0)):
            flags = ["--method", method, *_split("vectors", self.config.vectors)]
            base = _parse(vectors.VectorsConfig, "experiments.vectors", None, flags)
            settings = self._at(base, method, data=self.data)
            stages.append(Stage(method, method, work, vectors.vectors, settings))
        return stages

    def classifier(self, method: str, seed: int, **changes: Any) -> Stage:
        """A classifier on that method's features.

        Args:
            method: of `METHODS`.
            seed: of the classifier.
            changes: of other settings; they name the run too.
        """
        flags, work = METHODS[method]
        more = _split("downstream", self.config.downstream)
        args = [*self._preset, *more, *flags]
        base = _parse(downstream.DownstreamConfig, "experiments.downstream", downstream.PRESETS, args)
        inputs: dict[str, Any] = {"pretrained": self.language_model}
        if base.source.features != "elmo":
            inputs = {"vectors": str(self.output / base.source.features)}
        name = "-".join(
            [flags[1], *(key if value is True else f"{key}-{value:g}" for key, value in changes.items())]
        )
        inputs |= {key: changes.pop(key) for key in ("labels", "untrained") if key in changes}
        source = dataclasses.replace(base.source, **inputs)
        settings = self._at(base, f"{name}-seed{seed}", seed=seed, source=source, **changes)
        work *= settings.epochs * source.labels
        return Stage(f"{name} seed {seed}", "elmo" if base.source.features == "elmo" else "static", work,
                     downstream.downstream, settings)  # fmt: skip

    @property
    def _preset(self) -> list[str]:
        return ["--preset", self.config.preset]

    def _at(self, base: Any, name: str, **changes: Any) -> Any:
        return dataclasses.replace(
            base, output=str(self.output / name), resume=True, overwrite=False, **changes
        )


def _parse(config: type[C], prog: str, presets: Mapping[str, C] | None, flags: list[str]) -> C:
    settings = parse(config, prog, presets, flags)
    check(settings)  # before hours of the stages that come first
    return settings


def _split(name: str, flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise InputError(f"--{name} {flags!r}: {error}; mend its quotes") from None


def _check_output(output: Path) -> None:
    """A folder that is new, or a comparison's: nothing else is written over."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; give --output a folder")
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    if CONFIG in names and "seeds" not in read_json(output / CONFIG):
        raise InputError(f"{output}: holds a run of another command; give --output a folder of its own")
    if names - {f"{CONFIG}.part"} and CONFIG not in names:
        raise InputError(f"{output}: is not empty and holds no comparison; give --output a new folder")


def compare(config: CompareConfig) -> None:
    """Run the command."""
    output = Path(config.output)
    _check_output(output)
    data = config.data
    if config.pretrained is not None:
        saved = read_config(Path(config.pretrained))
        if saved.get("data") is None or not (Path(config.pretrained) / RESULTS).is_file():
            raise InputError(
                f"{config.pretrained}: is no finished run of experiments.pretrain; finish it first"
            )
        data = DataConfig(**saved["data"])
    plan = Plan(config, data, output, config.pretrained)
    classifiers = {
        method: [plan.classifier(method, seed) for seed in range(config.seeds)] for method in METHODS
    }
    stages = [*plan.sources(), *(run for runs in classifiers.values() for run in runs)]
    studies = claims.studies(plan, classifiers) if config.claims else None
    more = claims.stages(studies) if studies else []
    output.mkdir(parents=True, exist_ok=True)
    write_atomically(output / CONFIG, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    seconds = run_stages([*stages, *more], output)
    about = (
        f"Made by `python -m experiments.compare {shlex.join(sys.argv[1:])}` with jax {jax.__version__} on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)."
    )
    results.write(classifiers, plan.sources(), Path(plan.language_model), seconds, about, output)
    cli.say(f"written to {output / 'report.html'}")
    if studies:
        claims.write(studies, output)
        cli.say(f"written to {output / 'claims.html'}")


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(CompareConfig, compare, "experiments.compare")


if __name__ == "__main__":
    sys.exit(main())
