"""Commands run one after the other in this process, each once: what is finished is left alone.

Nouns: a *stage* is a command with its settings, its output folder among them; its *work* is
a guess at its time beside the others', until stages of its *kind* were timed; its *origins*
are digests of what it is made from.

The stages that a comparison has: sources of vectors, and the classifiers on them.

Nouns: a *method* is a source of vectors, and for ELMo a way to mix its layers; a *stage* is as in `stages`.

What runs are made from, as it is now: digests to hold a run's ``config.json`` against.

Flags that a comparison hands on to its stages, and those that are its own to set.
"""

import contextlib
import dataclasses
import io
import json
import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from tyro.conf import OmitArgPrefixes

from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.data.csv_dataset import DataConfig, load_dataset
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM
from elmo_jax.storage.files import CONFIG, read_config, tree_digest, write_atomically
from elmo_jax.training.checkpoint import METRICS, PACING, PLACES, RESULTS, VOCABULARY, changes
from elmo_jax.training.objectives import init_params
from experiments import downstream, pretrain, vectors
from experiments.common import cli
from experiments.common.cli import C, check, flag_of, flags_in, parse, prog
from experiments.common.config import HostsConfig, SourceConfig
from experiments.common.inputs import VECTORS, data_of, keep_labels

_TOLD = {"texts": "the texts it was made from have changed", "model": "what it builds on was made anew"}


@dataclass(frozen=True)
class Stage:
    """A command to be run.

    Attributes:
        name: for people.
        kind: stages of one kind take as long, by their work.
        work: guessed.
        command: takes the settings.
        settings: the command's, with `output`, `resume` and `overwrite`.
        source: the stage that makes what this one builds on, if one does.
        origins: by their names in ``config.json``, as they are now; called only if the source
            is finished.
    """

    name: str
    kind: str
    work: float
    command: Callable[[Any], Any]
    settings: Any
    source: "Stage | None" = None
    origins: Callable[[], Mapping[str, str]] = dict

    @property
    def path(self) -> Path:
        """The stage's run folder."""
        return Path(self.settings.output)

    @property
    def finished(self) -> bool:
        """Whether a run with these very settings, made from what there is now, reached its end."""
        if not (self.path / RESULTS).is_file() or not (self.source is None or self.source.finished):
            return False
        return (self.path / CONFIG).is_file() and self.outdated is None

    @property
    def outdated(self) -> str | None:
        """Why the run that is there is none to go on with, if it is of other settings or origins than now.

        The source must be finished. Epochs count as any setting does: a schedule spans all of
        them, so that a run of two and two more is not one of four.
        """
        if not (self.path / CONFIG).is_file():
            return None
        saved, enabled = read_config(self.path), cli.settings_of(self.settings)
        known = {name: value for name, value in saved.items() if name in enabled}
        changed = changes(known, enabled)
        if other := [f"{name} {changed[name]}" for name in changed if name not in PLACES | PACING]:
            return f"it was begun with other settings ({'; '.join(other)})"
        told = [_TOLD[name] for name, now in self.origins().items() if saved.get(name) != now]
        return ", and ".join(told) or None

    def run(self, anew: bool) -> None:
        """Call the command, to replace what is there or to go on with it."""
        self.command(replace(self.settings, resume=not anew, overwrite=anew))


def run_stages(stages: Sequence[Stage], output: Path) -> dict[str, float]:
    """Run what is not finished, in order, a line a stage; their own output goes to files.

    Args:
        stages: each may use what those before it made.
        output: the folder for ``metrics.jsonl``, a line a stage, and the stages' output.

    Returns:
        Seconds by stage, of those that were run here now or earlier.
    """
    (output / "logs").mkdir(parents=True, exist_ok=True)
    seconds = _read_times(output)
    done = {stage.name for stage in stages if stage.finished}
    for i, stage in enumerate(stages):
        place = f"[{i + 1}/{len(stages)}] {stage.name}"
        if stage.finished:
            done.add(stage.name)  # perhaps not before its source was made anew, and came out the same
            cli.say(f"{place}: finished before, {_left(stages[i + 1 :], stages, seconds, done)}")
            continue
        done.discard(stage.name)
        why = stage.outdated
        runs = "runs" if why is None else f"runs anew, since {why}"
        cli.say(f"{place}: {runs}, {_left(stages[i:], stages, seconds, done)}")
        began, before = time.perf_counter(), seconds.pop(stage.name, 0.0) if why is None else 0.0
        log = output / "logs" / f"{stage.name.replace(' ', '-')}.txt"
        try:
            with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                stage.run(anew=why is not None)
        finally:  # the time of a part counts too, when the rest is run later
            seconds[stage.name] = round(before + time.perf_counter() - began, 1)
            _write_times(output, seconds)
        done.add(stage.name)
        jax.clear_caches()  # the next stage compiles other programs; these only take room
    return seconds


def _left(
    waiting: Sequence[Stage], stages: Sequence[Stage], seconds: dict[str, float], done: Collection[str]
) -> str:
    """How long the stages that wait will take, by what those that are done took."""
    waiting = [stage for stage in waiting if stage.name not in done]
    known = [(s, seconds[s.name] / s.work) for s in stages if s.name in seconds and s.name in done]
    if not waiting:
        return "nothing left"
    if not known:
        return "time left not known yet"
    paces = {
        kind: np.mean([pace for s, pace in known if s.kind == kind]) for kind in {s.kind for s, _ in known}
    }
    overall = np.mean(list(paces.values()))
    minutes = sum(float(paces.get(s.kind, overall)) * s.work for s in waiting) / 60
    return f"about {minutes:.0f} min left in all" if minutes >= 1 else "less than a minute left in all"


def _read_times(output: Path) -> dict[str, float]:
    path = output / METRICS
    if not path.is_file():
        return {}
    try:
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        seconds = {str(record["stage"]): float(record["seconds"]) for record in records}
        if not all(0 <= x < float("inf") for x in seconds.values()):
            raise ValueError
        return seconds
    except (OSError, KeyError, TypeError, ValueError, RecursionError):
        told = "cannot be read as times of stages; remove it, the stages keep theirs"
        raise InputError(f"{path}: {told}") from None


def _write_times(output: Path, seconds: dict[str, float]) -> None:
    records = ({"event": "stage", "stage": name, "seconds": s} for name, s in seconds.items())
    write_atomically(output / METRICS, "".join(json.dumps(record) + "\n" for record in records))


class Origins:
    """Digests of data sets and of features, each computed once: a data set's for good, those of a
    run until the run is finished anew.

    Example:
        >>> origins = Origins()
        >>> len(origins.texts(DataConfig()))
        64
    """

    def __init__(self):
        self._texts: dict[tuple[Any, ...], str] = {}
        self._features: dict[tuple[Any, ...], str] = {}
        self._models: dict[tuple[Path, int], BiLM] = {}

    def texts(
        self, data: DataConfig, with_characters: bool = False, labels: float = 1.0, seed: int = 0
    ) -> str:
        """As runs that read this data set record it as "texts".

        Args:
            data: which texts.
            spelled: whether the language model reads characters.
            labels: share of the labelled documents that are used.
            seed: of their choice.

        Raises:
            InputError: the data set cannot be read.
        """
        key = (data, with_characters, labels, seed if labels < 1 else None)
        if key not in self._texts:
            self._texts[key] = keep_labels(
                load_dataset(data, with_characters=with_characters), labels, seed
            ).digest
        return self._texts[key]

    def classifier(self, source: SourceConfig, seed: int) -> dict[str, str]:
        """What a classifier on these features records: "texts", and "model", the parameters it builds on.

        Args:
            source: of the features; its run is finished.
            seed: of the classifier, and of a language model without training.

        Raises:
            InputError: the features' run is damaged.
        """
        path = Path(source.pretrained if source.features == "elmo" else source.vectors or "")
        made = (path, (path / RESULTS).stat().st_mtime_ns)
        key = (*made, source.features, seed if source.untrained else None)
        if key not in self._features:
            self._features[key] = self._digest(source, made, seed)
        saved = read_config(path)
        texts = saved.get("texts", "")
        if source.labels < 1 and (data := data_of(path)) is not None:
            texts = self.texts(data, _spelled(saved), source.labels, seed)
        return {"texts": texts, "model": self._features[key]}

    def _digest(self, source: SourceConfig, made: tuple[Path, int], seed: int) -> str:
        path, _ = made
        if source.features != "elmo":
            return tree_digest(WordVectors.load(path / VECTORS).table(Vocabulary.load(path / VOCABULARY)))
        if source.untrained and made in self._models:
            return tree_digest(init_params(self._models[made], jax.random.key(seed)))
        elmo = Elmo.from_pretrained(path)
        self._models[made] = elmo.model
        return tree_digest(init_params(elmo.model, jax.random.key(seed)) if source.untrained else elmo.params)

    def given(self, path: Path) -> DataConfig:
        """The data set of a language model that a comparison is given.

        Raises:
            InputError: it is no finished run of ``experiments.pretrain`` on a labelled data set, it is
                damaged, or the data set holds other texts now.
        """
        saved = read_config(path)
        if not isinstance(saved.get("model"), dict) or not (path / RESULTS).is_file():
            raise InputError(f"{path}: is not a finished run of experiments.pretrain; finish it first")
        data = data_of(path)
        if data is None:
            raise InputError(f"{path}: was not made from a labelled data set; give a run that was")
        self.classifier(SourceConfig(pretrained=str(path)), 0)  # it can be loaded
        if self.texts(data, _spelled(saved)) != saved.get("texts"):
            raise InputError(f"{path}: was made from other texts than its data set holds now; make it anew")
        return data


def _spelled(saved: Mapping[str, Any]) -> bool:
    """Whether a run's language model reads characters, by its configuration."""
    model = saved.get("model")
    return isinstance(model, dict) and model.get("input") == "characters"


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
    for flag in flags_in(flags):
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
            made = parse(config, name, presets, flags)
    except SystemExit:
        told = f"see {prog(name)} --help, and leave it out"
        raise InputError(f"--{name} {shlex.join(flags)!r}: asks for help; {told}") from None
    check(made)
    return made


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
            with_characters = base.model.input == "characters"
            stages.append(Stage("pretrain", "pretrain", float(base.epochs), pretrain.pretrain,
                                self._at(base, "pretrain", data=self.data),
                                origins=self._texts(with_characters)))  # fmt: skip
        for method, work in (("svd", 0.3), ("sgns", 1.0)):
            flags = ["--method", method, *split("vectors", self.config.vectors)]
            base = settings(vectors.VectorsConfig, "vectors", None, flags)
            base = dataclasses.replace(base, **_OTHERS[method])  # else it would be made anew for them
            stages.append(Stage(method, method, work, vectors.vectors,
                                self._at(base, method, data=self.data),
                                origins=self._texts(with_characters=False)))  # fmt: skip
        return stages

    def _texts(self, with_characters: bool) -> Callable[[], Mapping[str, str]]:
        return lambda: {"texts": self.origins.texts(self.data, with_characters)}

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
