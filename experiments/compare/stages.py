"""Stages of a comparison: commands that run once, in order, in this process.

A stage that finished with the same settings and the same inputs is not run again, and a stage that was
stopped continues. `Comparison` makes the stages: the language model, the word vectors and the
classifiers on their features.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.config import DataConfig, SGNSConfig, SVDConfig
from elmo_jax.data.csv_dataset import load_dataset
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.storage.files import CONFIG, read_config, tree_digest, write_atomically
from elmo_jax.training.checkpoint import METRICS, PACING, RESULTS, VOCABULARY, changes
from elmo_jax.training.objectives import init_params
from experiments import downstream, pretrain, vectors
from experiments.common import cli
from experiments.common.config import HostsConfig, SourceConfig
from experiments.common.inputs import VECTORS, data_of, keep_labels

if TYPE_CHECKING:
    from experiments.compare.__main__ import CompareConfig

_CHANGED_INPUTS = {"texts": "its texts have changed", "model": "the model it builds on has changed"}


@dataclass(frozen=True)
class Stage:
    """A command with its settings."""

    name: str
    work: float  # estimated time, in epochs of pre-training
    command: Callable[[Any], Any]
    settings: Any  # a config with the fields output, resume and overwrite
    inputs: Callable[[], Mapping[str, str]] = (
        dict  # returns digests by name in config.json, see _digest_inputs
    )

    @property
    def path(self) -> Path:
        """The run folder."""
        return Path(self.settings.output)

    @property
    def has_run(self) -> bool:
        """True if the folder holds a run."""
        return (self.path / CONFIG).is_file()

    @property
    def is_finished(self) -> bool:
        """True if a run with these settings and the current inputs reached its end."""
        return self.has_run and (self.path / RESULTS).is_file() and self.stale_reason is None

    @property
    def stale_reason(self) -> str | None:
        """The reason why the existing run cannot be continued, or None.

        A different number of epochs is a reason too, because learning rate schedules span all epochs.
        """
        if not self.has_run:
            return None
        saved, now = read_config(self.path), cli.settings_of(self.settings)
        changed = changes({name: value for name, value in saved.items() if name in now}, now)
        reasons = [
            f"{name} {changed[name]}" for name in changed if name not in cli.INPUT_PATHS | PACING | {"output"}
        ]
        if reasons:
            return f"its settings have changed ({'; '.join(reasons)})"
        stale = [name for name, digest in self.inputs().items() if saved.get(name) != digest]
        return " and ".join(_CHANGED_INPUTS[name] for name in stale) or None


def run_stages(stages: Sequence[Stage], output: Path, runs: Path | None = None) -> dict[str, float]:
    """Run the unfinished stages in order and print a line for each stage.

    Args:
        stages: Stages; each may use the runs of those before it.
        output: Folder for the output of the stages (``logs``) and their times (``metrics.jsonl``).
        runs: Folder of other runs; those with the settings and inputs of a stage are copied.

    Returns:
        Seconds by stage name, where known.
    """
    (output / "logs").mkdir(parents=True, exist_ok=True)
    seconds = _read_times(output / METRICS)
    for i, stage in enumerate(stages):
        is_finished, reason = stage.is_finished, stage.stale_reason
        if not is_finished and (found := _find_run(stage, runs)) is not None:
            cli.say(f"[{i + 1}/{len(stages)}] {stage.name}: copied from {found}")
            shutil.rmtree(stage.path, ignore_errors=True)
            shutil.copytree(found, stage.path)
            continue
        action = f"running again because {reason}" if reason else "running"
        action = "already finished" if is_finished else action
        later = [each for each in stages[i + 1 :] if each.name not in seconds]
        waiting = later if is_finished else [stage, *later]
        remaining = _estimate_time(waiting, [s for s in stages if s not in waiting], seconds)
        cli.say(f"[{i + 1}/{len(stages)}] {stage.name}: {action}, {remaining}")
        if is_finished:
            continue
        start, earlier = time.perf_counter(), 0.0 if reason else seconds.get(stage.name, 0.0)
        log = output / "logs" / f"{stage.name.replace(' ', '-')}.txt"
        try:
            with log.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
                resume = stage.has_run and not reason
                stage.command(replace(stage.settings, resume=resume, overwrite=bool(reason)))
        finally:  # a stopped stage keeps its time, because it continues later
            seconds[stage.name] = round(earlier + time.perf_counter() - start, 1)
            lines = (json.dumps({"event": "stage", "stage": n, "seconds": s}) for n, s in seconds.items())
            write_atomically(output / METRICS, "".join(f"{line}\n" for line in lines))
        jax.clear_caches()  # the next stage does not use the programs compiled so far
    return seconds


def _find_run(stage: Stage, folder: Path | None) -> Path | None:
    """Return the first finished run in a folder that has the settings and inputs of a stage."""
    for path in sorted(folder.iterdir()) if folder is not None and folder.is_dir() else ():
        run = replace(stage, settings=replace(stage.settings, output=str(path)))
        if path.absolute() != stage.path.absolute() and run.has_run and run.is_finished:
            return path
    return None


def _estimate_time(waiting: Sequence[Stage], done: Sequence[Stage], seconds: Mapping[str, float]) -> str:
    """Estimate the time of the waiting stages from the times of those that are done."""
    timed = [stage for stage in done if stage.name in seconds]
    if not waiting or not timed:
        return "remaining time unknown" if waiting else "nothing remaining"
    rate = sum(seconds[stage.name] for stage in timed) / sum(stage.work for stage in timed)
    minutes = rate * sum(stage.work for stage in waiting) / 60
    return f"about {minutes:.0f} min remaining" if minutes >= 1 else "less than a minute remaining"


def _read_times(path: Path) -> dict[str, float]:
    try:
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        return {str(record["stage"]): float(record["seconds"]) for record in records}
    except (OSError, KeyError, TypeError, ValueError):
        return {}  # the page then shows no time for these stages


ELMO, TFIDF = "ELMo, trainable λ", "TF-IDF, linear model"
# The flag and its value that make each method, by the method's name on the page.
METHODS: Mapping[str, tuple[str, str]] = {
    "ELMo, learned function": ("--combiner", "function"),
    ELMO: ("--combiner", "trainable"),
    "SGNS": ("--features", "sgns"),
    "ELMo, frozen λ": ("--combiner", "frozen"),
    "SVD": ("--features", "svd"),
    TFIDF: ("--features", "tfidf"),
}
_WORK = {"svd": 0.3, "sgns": 1.0}
# Settings that a word vector method does not use get defaults, so that they never make its run stale.
_UNUSED_SETTINGS: Mapping[str, Any] = {
    "svd": {"sgns": SGNSConfig(), "epochs": vectors.VectorsConfig.epochs},
    "sgns": {"svd": SVDConfig()},
}
_COMMANDS: Mapping[str, tuple[type, Mapping[str, Any] | None]] = {
    "pretrain": (pretrain.PretrainConfig, pretrain.PRESETS),
    "vectors": (vectors.VectorsConfig, None),
    "downstream": (downstream.DownstreamConfig, downstream.PRESETS),
}
_DATA_FLAGS = {cli.flag_of(field.name) for field in fields(DataConfig)}
_OTHER_FLAGS = {cli.flag_of(field.name) for kind in (HostsConfig, SourceConfig) for field in fields(kind)}
_RESERVED_FLAGS = (_DATA_FLAGS | _OTHER_FLAGS) - {"--finetune"} | {
    "--output", "--resume", "--overwrite", "--allow-config-change", "--dry-run", "--corpus", "--valid-corpus",
    "--vocab", "--method", "--combiner",
}  # fmt: skip


class Comparison:
    """The stages of a comparison, made from the settings of the command.

    Attributes:
        data: Data set of every stage.
        output: Folder of the runs.
        language_model: Run folder of the language model.

    Raises:
        InputError: If the given language model is unfinished or damaged, or its data set has changed.
    """

    def __init__(self, config: CompareConfig):
        self.config, self.output = config, Path(config.output)
        self._texts, self._features = functools.cache(_digest_texts), functools.cache(_digest_features)
        self._parse = functools.cache(functools.partial(_parse_settings, config))
        given = config.pretrained
        self.language_model = given or str(self.output / "pretrain")
        self.data = config.data if given is None else self._pretrained_data(Path(given))

    def _pretrained_data(self, path: Path) -> DataConfig:
        """Return the data set of a finished pre-training run."""
        saved, data = read_config(path), data_of(path)
        if data is None or not isinstance(saved.get("model"), dict) or not (path / RESULTS).is_file():
            message = "is not a finished run of experiments.pretrain on a labelled data set; give one"
            raise InputError(f"{path}: {message}")
        self._features(path, None)  # raises an error if the run is damaged
        if self._texts(data, _reads_characters(saved), 1.0, 0) != saved.get("texts"):
            raise InputError(f"{path}: its data set has changed since it was trained; train it again")
        return data

    @functools.cached_property
    def sources(self) -> dict[str, Stage]:
        """The stages of the language model and the word vectors, by name."""
        stages = {}
        if self.config.pretrained is None:
            settings = replace(self._parse("pretrain"), data=self.data)
            stages["pretrain"] = self._make_stage("pretrain", settings.epochs, pretrain.pretrain, settings)
        for method, unused in _UNUSED_SETTINGS.items():
            settings = replace(self._parse("vectors", "--method", method), data=self.data, **unused)
            stages[method] = self._make_stage(method, _WORK[method], vectors.vectors, settings)
        return stages

    @functools.cached_property
    def classifiers(self) -> dict[str, list[Stage]]:
        """The stages of the classifiers by method, one per seed."""
        seeds = range(self.config.seeds)
        return {method: [self.classifier(method, seed) for seed in seeds] for method in METHODS}

    @property
    def stages(self) -> list[Stage]:
        """The stages of all methods, in the order in which they run."""
        return [*self.sources.values(), *itertools.chain(*self.classifiers.values())]

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
        # Models on word counts would hide the differences between the methods.
        base = self._parse("downstream", *METHODS[method], "--no-ensemble")
        name = METHODS[method][1]
        name += f"-labels-{labels:g}" * (labels < 1) + f"-epochs-{epochs}" * (epochs is not None)
        name += "-untrained" * untrained
        rate, inputs = 1.2, dict[str, Any](pretrained=self.language_model)
        if base.source.features != "elmo":  # word vectors and word counts are not fine-tuned
            rate, inputs["finetune"] = 0.6, False
        if base.source.features in _UNUSED_SETTINGS:
            inputs["vectors"] = str(self.output / base.source.features)
        source = replace(base.source, labels=labels, untrained=untrained, **inputs)
        settings = replace(base, seed=seed, source=source, epochs=epochs or base.epochs)
        work = rate * settings.epochs * labels
        return self._make_stage(f"{name} seed {seed}", work, downstream.downstream, settings)

    def _make_stage(self, name: str, work: float, command: Callable, settings: Any) -> Stage:
        settings = replace(settings, output=str(self.output / name.replace(" seed ", "-seed")))
        return Stage(name, work, command, settings, functools.partial(self._digest_inputs, settings))

    def _digest_inputs(self, settings: Any) -> dict[str, str]:
        """Return the digests that a run with these settings records; its source must be finished."""
        source = getattr(settings, "source", None)
        if source is None:
            return {"texts": self._texts(self.data, _reads_characters(cli.settings_of(settings)), 1.0, 0)}
        sample_seed = settings.seed if source.labels < 1 else 0
        if source.features == "tfidf":
            words = replace(self.data, min_count=1, max_vocab=None)
            return {"texts": self._texts(words, False, source.labels, sample_seed), "model": tree_digest({})}
        path = Path(source.pretrained if source.features == "elmo" else source.vectors)
        texts = self._texts(self.data, _reads_characters(read_config(path)), source.labels, sample_seed)
        return {"texts": texts, "model": self._features(path, settings.seed if source.untrained else None)}


def _parse_settings(config: CompareConfig, command: str, *flags: str) -> Any:
    """Parse and check the settings of a command, with the extra flags, before any stage runs."""
    kind, presets = _COMMANDS[command]
    text = getattr(config, command)
    try:
        extra = shlex.split(text)
    except ValueError as error:
        raise InputError(f"--{command} {text!r}: {error}; check its quotes") from None
    for flag in cli.flags_in(extra):
        if flag in _RESERVED_FLAGS or (command, flag) == ("downstream", "--seed"):
            hint = ", or give it to compare itself" if flag in _DATA_FLAGS else ""
            raise InputError(f"--{command} {flag}: is set by the comparison; leave it out{hint}")
    preset = ["--preset", config.preset] if presets else []
    settings = cli.parse(kind, command, presets, [*preset, *flags, *extra])
    cli.check(settings)
    return settings


def _digest_texts(data: DataConfig, with_characters: bool, labels: float, seed: int) -> str:
    return keep_labels(load_dataset(data, with_characters=with_characters), labels, seed).digest


def _digest_features(path: Path, seed: int | None) -> str:
    """Digest the parameters of a run; with a seed, those of an untrained language model of its sizes."""
    if (path / VECTORS).is_file():
        return tree_digest(WordVectors.load(path / VECTORS).table(Vocabulary.load(path / VOCABULARY)))
    elmo = Elmo.from_pretrained(path)
    return tree_digest(elmo.params if seed is None else init_params(elmo.model, jax.random.key(seed)))


def _reads_characters(config: Mapping[str, Any]) -> bool:
    model = config.get("model")
    return isinstance(model, dict) and model.get("input") == "characters"
