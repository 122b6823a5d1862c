"""The stages that a comparison has: sources of vectors, and the classifiers on them.

Nouns: a *method* is a source of vectors, and for ELMo a way to mix its layers; a *stage* is as in `stages`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes

from elmo_jax.datasets import DataConfig
from experiments import downstream, pretrain, vectors
from experiments.handed import settings, split
from experiments.origins import Origins
from experiments.stages import Stage

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


class Comparison:
    """What a comparison is made of.

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
