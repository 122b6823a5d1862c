"""The whole comparison, from pre-training to a page of results: python -m experiments.compare."""

import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import filelock
import jax
from tyro.conf import OmitArgPrefixes

from elmo_jax.datasets import DataConfig
from elmo_jax.errors import InputError
from elmo_jax.integrity import CONFIG, write_atomically, writer_lock
from experiments import claims, cli, downstream, pretrain, results, vectors
from experiments.flags import flag_of
from experiments.handed import settings, split
from experiments.origins import Origins
from experiments.stages import Stage, run_stages

# By the name the page gives them: the flags that make them, and the work of an epoch.
METHODS: Mapping[str, tuple[tuple[str, ...], float]] = {
    "ELMo, learned function": (("--combiner", "function"), 1.2),
    "ELMo, trainable λ": (("--combiner", "trainable"), 1.2),
    "SGNS": (("--features", "sgns"), 0.6),
    "ELMo, frozen λ": (("--combiner", "frozen"), 1.2),
    "SVD": (("--features", "svd"), 0.6),
}
_DEFAULT = vectors.VectorsConfig()
# Settings of word vectors that a method does not read.
_OTHERS: Mapping[str, Mapping[str, Any]] = {
    "svd": {"sgns": _DEFAULT.sgns, "epochs": _DEFAULT.epochs},
    "sgns": {"svd": _DEFAULT.svd},
}
_LOCK = ".lock"
_MOST_SEEDS = 1000


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
    """A finished run of experiments.pretrain to use, with its data set; a new one is made if not given."""
    pretrain: str = ""
    """More flags of experiments.pretrain, in one string: --pretrain="--epochs 2 --cells 64"; beside
    --pretrained, of the model that --claims makes."""
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
        origins: what the stages are made from.
        pretrained: the language model's run, if it is not to be made here.
    """

    def __init__(
        self,
        config: CompareConfig,
        data: DataConfig,
        output: Path,
        origins: Origins,
        pretrained: str | None = None,
    ):
        self.config, self.data, self.output, self.origins = config, data, output, origins
        self.language_model = pretrained or str(output / "pretrain")
        self._sources = {stage.name: stage for stage in self._make_sources(pretrained is not None)}
        self._bases = {method: self._base(flags) for method, (flags, _) in METHODS.items()}

    def sources(self) -> list[Stage]:
        """The language model and the word vectors."""
        return list(self._sources.values())

    def _make_sources(self, external: bool) -> list[Stage]:
        stages = []
        if not external:
            flags = [*self._preset, *split("pretrain", self.config.pretrain)]
            base = settings(pretrain.PretrainConfig, "pretrain", pretrain.PRESETS, flags)
            spelled = base.model.input == "characters"
            stages.append(Stage("pretrain", "pretrain", float(base.epochs), pretrain.pretrain,
                                self._at(base, "pretrain", data=self.data),
                                origins=self._texts(spelled)))  # fmt: skip
        for method, work in (("svd", 0.3), ("sgns", 1.0)):
            flags = ["--method", method, *split("vectors", self.config.vectors)]
            base = settings(vectors.VectorsConfig, "vectors", None, flags)
            base = dataclasses.replace(base, **_OTHERS[method])  # else it would be made anew for them
            stages.append(Stage(method, method, work, vectors.vectors,
                                self._at(base, method, data=self.data),
                                origins=self._texts(spelled=False)))  # fmt: skip
        return stages

    def _texts(self, spelled: bool) -> Callable[[], Mapping[str, str]]:
        return lambda: {"texts": self.origins.texts(self.data, spelled)}

    def classifier(self, method: str, seed: int, **changes: Any) -> Stage:
        """A classifier on that method's features.

        Args:
            method: of `METHODS`.
            seed: of the classifier.
            changes: of other settings; they name the run too.
        """
        (flags, work), base = METHODS[method], self._bases[method]
        features = base.source.features
        inputs: dict[str, Any] = {"pretrained": self.language_model}
        if features != "elmo":
            inputs = {"vectors": str(self.output / features)}
        name = "-".join(
            [flags[1], *(key if value is True else f"{key}-{value:g}" for key, value in changes.items())]
        )
        inputs |= {key: changes.pop(key) for key in ("labels", "untrained") if key in changes}
        source = dataclasses.replace(base.source, **inputs)
        made = self._at(base, f"{name}-seed{seed}", seed=seed, source=source, **changes)
        work *= made.epochs * source.labels
        elmo = features == "elmo"
        return Stage(f"{name} seed {seed}", "elmo" if elmo else "static", work, downstream.downstream, made,
                     self._sources.get("pretrain" if elmo else features),
                     lambda: self.origins.classifier(source, seed))  # fmt: skip

    def _base(self, flags: tuple[str, ...]) -> downstream.DownstreamConfig:
        more = split("downstream", self.config.downstream)
        args = [*self._preset, *more, *flags]
        base = settings(downstream.DownstreamConfig, "downstream", downstream.PRESETS, args)
        tuned = base.source.finetune and base.source.features == "elmo"  # word vectors stay as they are
        return dataclasses.replace(base, source=dataclasses.replace(base.source, finetune=tuned))

    @property
    def _preset(self) -> list[str]:
        return ["--preset", self.config.preset]

    def _at(self, base: Any, name: str, **changes: Any) -> Any:
        return dataclasses.replace(
            base, output=str(self.output / name), resume=True, overwrite=False, **changes
        )


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
    plan = Plan(config, data, output, origins, config.pretrained)
    classifiers = {
        method: [plan.classifier(method, seed) for seed in range(config.seeds)] for method in METHODS
    }
    studies = claims.studies(plan, classifiers) if config.claims else None
    output.mkdir(parents=True, exist_ok=True)
    try:
        with writer_lock(output / _LOCK):
            _run(config, plan, classifiers, studies)
    except filelock.Timeout:
        told = "another comparison writes there; wait for it, or give another --output"
        raise InputError(f"{output}: {told}") from None


def _run(
    config: CompareConfig,
    plan: Plan,
    classifiers: Mapping[str, list[Stage]],
    studies: claims.Studies | None,
) -> None:
    """Run what is not finished, and write the pages."""
    output = plan.output
    write_atomically(output / CONFIG, json.dumps(dataclasses.asdict(config), indent=2) + "\n")
    stages = [*plan.sources(), *(run for runs in classifiers.values() for run in runs)]
    seconds = run_stages([*stages, *(claims.stages(studies) if studies else [])], output)
    about = (
        f"Made by `python -m experiments.compare {shlex.join(sys.argv[1:])}` with jax {jax.__version__} on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind} ({os.cpu_count()} CPU cores)."
    )
    results.write(classifiers, plan.sources(), Path(plan.language_model), seconds, about,
                  plan.data.dataset, output)  # fmt: skip
    cli.say(f"written to {output / 'report.html'}")
    if studies:
        claims.write(studies, output)
        cli.say(f"written to {output / 'claims.html'}")


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(CompareConfig, compare, "experiments.compare")


if __name__ == "__main__":
    sys.exit(main())
