"""Stages of a comparison: commands that run once, in order, in this process.

A stage that finished with the same settings and the same inputs is not run again, and a stage that was
stopped continues. `Comparison` makes the stages: the language model, the word vectors and the
classifiers on their features.
"""

import contextlib
import functools
import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import jax

from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.config import DataConfig
from elmo_jax.data.csv_dataset import load_dataset
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.storage.files import CONFIG, read_config, tree_digest, write_atomically
from elmo_jax.training.checkpoint import METRICS, PACING, PLACES, RESULTS, VOCABULARY, changes
from elmo_jax.training.objectives import init_params
from experiments import downstream, pretrain, vectors
from experiments.common import cli
from experiments.common.cli import C, check, flag_of, flags_in, parse
from experiments.common.config import HostsConfig, SourceConfig
from experiments.common.inputs import VECTORS, data_of, keep_labels

_CHANGED_INPUTS = {"texts": "its texts have changed", "model": "the model it builds on has changed"}


@dataclass(frozen=True)
class Stage:
    """A command with its settings.

    Attributes:
        name: Name in messages and in the log.
        kind: Stages of one kind take time in proportion to their work.
        work: Estimated time in arbitrary units.
        command: Function that takes the settings.
        settings: Settings with ``output``, ``resume`` and ``overwrite``.
        source: Stage that makes the features of this one, if there is one.
        inputs: Function that returns the current digests of the inputs by their name in
            ``config.json``; called only when the source is finished.
    """

    name: str
    kind: str
    work: float
    command: Callable[[Any], Any]
    settings: Any
    source: "Stage | None" = None
    inputs: Callable[[], Mapping[str, str]] = dict

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.settings.output)

    @property
    def is_finished(self) -> bool:
        """True if a run with these settings and the current inputs reached its end."""
        if not (self.path / RESULTS).is_file() or (self.source and not self.source.is_finished):
            return False
        return (self.path / CONFIG).is_file() and self.stale_reason is None

    @property
    def stale_reason(self) -> str | None:
        """The reason why the existing run cannot be continued, or None.

        A different number of epochs is a reason too, because learning rate schedules span all epochs.
        """
        if not (self.path / CONFIG).is_file():
            return None
        saved, now = read_config(self.path), cli.settings_of(self.settings)
        changed = changes({name: value for name, value in saved.items() if name in now}, now)
        reasons = [f"{name} {changed[name]}" for name in changed if name not in PLACES | PACING]
        if reasons:
            return f"its settings have changed ({'; '.join(reasons)})"
        stale = [name for name, digest in self.inputs().items() if saved.get(name) != digest]
        return " and ".join(_CHANGED_INPUTS[name] for name in stale) or None

    def run(self, overwrite: bool) -> None:
        """Run the command, replacing the existing run or continuing it."""
        self.command(replace(self.settings, resume=not overwrite, overwrite=overwrite))


def run_stages(stages: Sequence[Stage], output: Path) -> dict[str, float]:
    """Run the unfinished stages in order and print one line a stage.

    Args:
        stages: Stages; each may use the runs of those before it.
        output: Folder for the output of the stages (``logs``) and their times (``metrics.jsonl``).

    Returns:
        Seconds by stage name, for the stages that ran here now or earlier.
    """
    (output / "logs").mkdir(parents=True, exist_ok=True)
    seconds = _read_times(output)
    done = {stage.name for stage in stages if stage.is_finished}
    for i, stage in enumerate(stages):
        label = f"[{i + 1}/{len(stages)}] {stage.name}"
        if stage.is_finished:
            done.add(stage.name)
            cli.say(f"{label}: already finished, {_estimate_remaining(stages, done, seconds)}")
            continue
        done.discard(stage.name)
        reason = stage.stale_reason
        action = f"running again because {reason}" if reason else "running"
        cli.say(f"{label}: {action}, {_estimate_remaining(stages, done, seconds)}")
        start, earlier = time.perf_counter(), 0.0 if reason else seconds.pop(stage.name, 0.0)
        log = output / "logs" / f"{stage.name.replace(' ', '-')}.txt"
        try:
            with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                stage.run(overwrite=reason is not None)
        finally:  # a stopped stage keeps its time and continues later
            seconds[stage.name] = round(earlier + time.perf_counter() - start, 1)
            lines = (json.dumps({"event": "stage", "stage": n, "seconds": s}) for n, s in seconds.items())
            write_atomically(output / METRICS, "".join(f"{line}\n" for line in lines))
        done.add(stage.name)
        jax.clear_caches()  # the next stage compiles other programs
    return seconds


def _estimate_remaining(stages: Sequence[Stage], done: set[str], seconds: Mapping[str, float]) -> str:
    """Estimate the time of the stages that are not done from the times of those that are."""
    waiting = [stage for stage in stages if stage.name not in done]
    rates: dict[str, list[float]] = {}
    for stage in stages:
        if stage.name in done and stage.name in seconds:
            rates.setdefault(stage.kind, []).append(seconds[stage.name] / stage.work)
    if not waiting or not rates:
        return "remaining time unknown" if waiting else "nothing remaining"
    mean = {kind: sum(of_kind) / len(of_kind) for kind, of_kind in rates.items()}
    overall = sum(mean.values()) / len(mean)
    minutes = sum(mean.get(stage.kind, overall) * stage.work for stage in waiting) / 60
    return f"about {minutes:.0f} min remaining" if minutes >= 1 else "less than a minute remaining"


def _read_times(output: Path) -> dict[str, float]:
    path = output / METRICS
    if not path.is_file():
        return {}
    try:
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return {str(record["stage"]): float(record["seconds"]) for record in records}
    except (KeyError, TypeError, ValueError):
        message = "cannot be read as the times of the stages; remove it, the runs stay"
        raise InputError(f"{path}: {message}") from None


class InputDigests:
    """Digests of the inputs of runs, each computed once."""

    def __init__(self):
        self._texts = functools.cache(_digest_texts)
        self._features = functools.cache(_digest_features)

    def texts(
        self, data: DataConfig, with_characters: bool = False, labels: float = 1.0, seed: int = 0
    ) -> str:
        """Return the digest that a run on this fraction of the labels records as "texts"."""
        return self._texts(data, with_characters, labels, seed if labels < 1 else 0)

    def classifier(self, source: SourceConfig, seed: int) -> dict[str, str]:
        """Return the digests that a classifier on the features of a finished run records.

        "texts" is that of its data set, "model" that of the parameters it builds on.
        """
        path = Path(source.pretrained if source.features == "elmo" else source.vectors or "")
        finish_time = (path / RESULTS).stat().st_mtime_ns  # a run that was made again has other features
        model_seed = seed if source.untrained else None
        model = self._features(path, finish_time, source.features == "elmo", model_seed)
        saved = read_config(path)
        texts = saved.get("texts", "")
        if source.labels < 1 and (data := data_of(path)) is not None:
            texts = self.texts(data, _reads_characters(saved), source.labels, seed)
        return {"texts": texts, "model": model}

    def pretrained_data(self, path: Path) -> DataConfig:
        """Return the data set of a finished pre-training run.

        Raises:
            InputError: If the run is of another kind, unfinished or damaged, or its data set has changed.
        """
        saved = read_config(path)
        if not isinstance(saved.get("model"), dict) or not (path / RESULTS).is_file():
            raise InputError(f"{path}: is not a finished run of experiments.pretrain; finish it first")
        data = data_of(path)
        if data is None:
            raise InputError(f"{path}: was not trained on a labelled data set; give a run that was")
        self.classifier(SourceConfig(pretrained=str(path)), 0)  # fails if the run is damaged
        if self.texts(data, _reads_characters(saved)) != saved.get("texts"):
            raise InputError(f"{path}: its data set has changed since it was trained; train it again")
        return data


def _digest_texts(data: DataConfig, with_characters: bool, labels: float, seed: int) -> str:
    return keep_labels(load_dataset(data, with_characters=with_characters), labels, seed).digest


def _digest_features(path: Path, _finish_time: int, is_elmo: bool, seed: int | None) -> str:
    """Digest the parameters of a run; with a seed, those of an untrained language model of its sizes."""
    if not is_elmo:
        return tree_digest(WordVectors.load(path / VECTORS).table(Vocabulary.load(path / VOCABULARY)))
    elmo = Elmo.from_pretrained(path)
    return tree_digest(elmo.params if seed is None else init_params(elmo.model, jax.random.key(seed)))


def _reads_characters(config: Mapping[str, Any]) -> bool:
    model = config.get("model")
    return isinstance(model, dict) and model.get("input") == "characters"


def _flags_of(config: type) -> set[str]:
    return {flag_of(each.name) for each in fields(config)}


_DATA_FLAGS = _flags_of(DataConfig)
_COMMON = (
    _DATA_FLAGS | _flags_of(HostsConfig) | {"--output", "--resume", "--overwrite", "--allow-config-change"}
)
_RESERVED_FLAGS = {  # set by the comparison itself
    "pretrain": _COMMON | {"--dry-run", "--corpus", "--valid-corpus", "--vocab"},
    "vectors": _COMMON | {"--method"},
    "downstream": _COMMON | {"--pretrained", "--bilm", "--vectors", "--features", "--combiner", "--seed",
                             "--labels", "--untrained"},
}  # fmt: skip


# The flag and its value that make each method, by the method's name on the page.
METHODS: Mapping[str, tuple[str, str]] = {
    "ELMo, learned function": ("--combiner", "function"),
    "ELMo, trainable λ": ("--combiner", "trainable"),
    "SGNS": ("--features", "sgns"),
    "ELMo, frozen λ": ("--combiner", "frozen"),
    "SVD": ("--features", "svd"),
}
# Settings that a word vector method does not use; at their defaults, they cannot make its run stale.
_UNUSED_SETTINGS = {"svd": ("sgns", "epochs"), "sgns": ("svd",)}


@dataclass(frozen=True)
class Comparison:
    """The stages of a comparison.

    Attributes:
        data: Data set of every stage.
        output: Folder of the runs.
        preset: Preset of pre-training and of the classifiers.
        extra_flags: More flags by command, each in one string.
        pretrained: Existing run of the language model to use.
        digests: Digests of the inputs.
    """

    data: DataConfig
    output: Path
    preset: str = "report"
    extra_flags: Mapping[str, str] = field(default_factory=dict)
    pretrained: str | None = None
    digests: InputDigests = field(default_factory=InputDigests)

    @property
    def language_model(self) -> str:
        """The run folder of the language model."""
        return self.pretrained or str(self.output / "pretrain")

    @functools.cached_property
    def sources(self) -> dict[str, Stage]:
        """The stages of the language model and the word vectors, by name."""
        stages = {}
        if self.pretrained is None:
            base = self._parse(pretrain.PretrainConfig, "pretrain", self._preset, pretrain.PRESETS)
            with_characters = base.model.input == "characters"
            stages["pretrain"] = self._make_source(
                "pretrain", base.epochs, pretrain.pretrain, base, with_characters
            )
        for method, work in (("svd", 0.3), ("sgns", 1.0)):
            base = self._parse(vectors.VectorsConfig, "vectors", ["--method", method])
            defaults = {name: getattr(vectors.VectorsConfig(), name) for name in _UNUSED_SETTINGS[method]}
            stages[method] = self._make_source(method, work, vectors.vectors, replace(base, **defaults))
        return stages

    def _make_source(
        self, name: str, work: float, command: Callable, base: Any, with_characters: bool = False
    ) -> Stage:
        settings = self._place(base, name, data=self.data)
        inputs = lambda: {"texts": self.digests.texts(self.data, with_characters)}  # noqa: E731
        return Stage(name, name, work, command, settings, inputs=inputs)

    @functools.cached_property
    def _classifiers(self) -> dict[str, downstream.DownstreamConfig]:
        """The settings of each method's classifier, without its inputs."""
        settings = {}
        for method, flags in METHODS.items():
            flags = [*self._preset, *flags]
            base = self._parse(downstream.DownstreamConfig, "downstream", flags, downstream.PRESETS)
            finetune = base.source.finetune and base.source.features == "elmo"  # word vectors are fixed
            settings[method] = replace(base, source=replace(base.source, finetune=finetune))
        return settings

    def classifier(
        self, method: str, seed: int, labels: float = 1.0, epochs: int | None = None, untrained: bool = False
    ) -> Stage:
        """Return the stage of a classifier.

        Args:
            method: A key of `METHODS`.
            seed: Random seed of the classifier.
            labels: Fraction of the labelled documents to use.
            epochs: Number of epochs, if it is not that of the preset.
            untrained: Use a language model with random parameters.
        """
        base, name = self._classifiers[method], METHODS[method][1]
        name += f"-labels-{labels:g}" * (labels < 1) + f"-epochs-{epochs}" * (epochs is not None)
        name += "-untrained" * untrained
        features = base.source.features
        source = replace(base.source, labels=labels, untrained=untrained)
        if features == "elmo":
            kind, rate, made_by = "elmo", 1.2, self.sources.get("pretrain")
            source = replace(source, pretrained=self.language_model)
        else:
            kind, rate, made_by = "static", 0.6, self.sources[features]
            source = replace(source, vectors=str(self.output / features))
        settings = self._place(
            base, f"{name}-seed{seed}", seed=seed, source=source, epochs=epochs or base.epochs
        )
        work = rate * settings.epochs * labels
        inputs = lambda: self.digests.classifier(source, seed)  # noqa: E731
        return Stage(f"{name} seed {seed}", kind, work, downstream.downstream, settings, made_by, inputs)

    @property
    def _preset(self) -> list[str]:
        return ["--preset", self.preset]

    def _parse(
        self, config: type[C], command: str, flags: Sequence[str], presets: Mapping[str, C] | None = None
    ) -> C:
        """Parse and check the settings of a command, with the extra flags, before any stage runs."""
        text = self.extra_flags.get(command, "")
        try:
            extra = shlex.split(text)
        except ValueError as error:
            raise InputError(f"--{command} {text!r}: {error}; check its quotes") from None
        for flag in flags_in(extra):
            if flag in _RESERVED_FLAGS[command]:
                hint = ", or give it to compare itself" if flag in _DATA_FLAGS else ""
                raise InputError(f"--{command} {flag}: is set by the comparison; leave it out{hint}")
        settings = parse(config, command, presets, [*flags, *extra])
        check(settings)
        return settings

    def _place(self, base: Any, name: str, **settings: Any) -> Any:
        """Return settings that run in the folder of this name."""
        return replace(base, output=str(self.output / name), resume=True, overwrite=False, **settings)
