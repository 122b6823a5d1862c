"""Where a classifier's input comes from: a language model's layers, or word vectors."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.data.csv_dataset import DataConfig, Dataset, TextColumns, load_dataset
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLMConfig
from elmo_jax.models.classifier import Features, static_features
from elmo_jax.models.combiners import CombinerConfig, OneLayer, make_combiner
from elmo_jax.models.embedders import with_device_group_size
from elmo_jax.models.lstm import Kernel
from elmo_jax.storage.files import check_files, read_config, structure
from elmo_jax.training.checkpoint import RESULTS, VOCABULARY
from elmo_jax.training.objectives import bilm_features, init_params
from experiments.common.cli import check, flag_of

VECTORS = "vectors.npz"


@dataclass(frozen=True)
class SourceConfig:
    """What the classifier is given of each token."""

    features: Literal["elmo", "svd", "sgns"] = "elmo"
    """The layers of a language model, or word vectors that know no context."""
    pretrained: str = "runs/pretrain"
    """elmo: run of experiments.pretrain, or what Elmo.save_pretrained wrote."""
    bilm: tuple[str, str] | None = None
    """elmo: options and weights of a model in the official format, in place of --pretrained."""
    vectors: str | None = None
    """svd, sgns: run of experiments.vectors, runs/svd or runs/sgns if not given."""
    dataset: str | None = None
    """What to classify, as for experiments.pretrain; the data set of the run above if not given."""
    data_dir: str | None = None
    """Folder with AG News's train.csv and test.csv, if they are not where that run had them."""
    text: TextColumns | None = None
    """Of another --dataset: all text columns joined, title+description, or the last alone."""
    max_length: int | None = None
    """Of another --dataset: longer texts are cut to this many tokens, 400."""
    validation: float | None = None
    """Of another --dataset: share of the training rows held out, 0.2."""
    finetune: bool = False
    """Train the language model too."""
    untrained: bool = False
    """Give the language model new parameters, to see what its training is worth."""
    labels: float = 1.0
    """Share of the training and validation documents that are used, at least one of each class."""


class Source(NamedTuple):
    """Where the classifier's input comes from.

    Attributes:
        data: the data set, numbered as the features know it.
        features: ``(params, batch, key) -> [L, B, T, F]``.
        combiner: of their layers.
        params: what features look for among the parameters.
        shape: (L, F).
        about: what else a run on it records, as it is not told by parameters.
    """

    data: Dataset
    features: Features
    combiner: Any
    params: dict[str, Any]
    shape: tuple[int, int]
    about: Mapping[str, Any] = {}


def open_source(config: SourceConfig, combiner: CombinerConfig, seed: int, kernel: Kernel) -> Source:
    """What the flags name.

    Raises:
        InputError: a run is missing or of another kind, flags contradict each other, or the
            kernel does not run such layers.
    """
    if config.features == "elmo":
        return _elmo(config, combiner, seed, kernel)
    if config.finetune or config.untrained:
        raise InputError("--finetune and --untrained need --features elmo; leave them out")
    return _word_vectors(config, seed)


def _elmo(config: SourceConfig, combiner: CombinerConfig, seed: int, kernel: Kernel) -> Source:
    """The layers of a language model."""
    if config.bilm is not None:
        elmo, run = Elmo.from_bilm(*config.bilm, kernel=kernel), None
    else:
        elmo, run = Elmo.from_pretrained(config.pretrained, kernel=kernel), Path(config.pretrained)
    data = _labelled(config, run, elmo.vocabulary, elmo.model.config.input == "characters", seed)
    params, c = elmo.params, elmo.model.config
    if config.untrained:
        params = init_params(elmo.model, jax.random.key(seed))
    features = bilm_features(elmo.model, config.finetune)
    about = {} if run else official(c)  # a run is sealed with its configuration
    shape = c.layers + 1, 2 * c.embedding
    return Source(data, features, make_combiner(combiner), {"bilm": params}, shape, about)


def official(config: BiLMConfig) -> dict[str, Any]:
    """What a run on a model in the official format records of its options."""
    return {"options": json.loads(json.dumps(asdict(replace(config, dtype=BiLMConfig.dtype))))}


def _word_vectors(config: SourceConfig, seed: int) -> Source:
    """A table of word vectors."""
    path = Path(config.vectors or f"runs/{config.features}")
    if not ((path / VECTORS).is_file() and (path / RESULTS).is_file()):  # the second is written last
        raise InputError(
            f"{path}: holds no word vectors; make them with "
            f"python -m experiments.vectors --method {config.features} --output {path}"
        )
    check_files(path)
    method = read_config(path).get("method")
    if method != config.features:
        raise InputError(f"{path}: holds {method} vectors, not --features {config.features}; give its run")
    vocabulary = Vocabulary.load(path / VOCABULARY)
    table = WordVectors.load(path / VECTORS).table(vocabulary)
    data = _labelled(config, path, vocabulary, False, seed)
    return Source(data, static_features, OneLayer(), {"vectors": jnp.asarray(table)}, (1, table.shape[1]))


def _labelled(
    config: SourceConfig, run: Path | None, vocabulary: Vocabulary | None, with_characters: bool, seed: int
) -> Dataset:
    """The data set of the flags, or that of the run the features come from; thinned out if asked for.

    Raises:
        InputError: there is none, or it holds other texts than when the run was made.
    """
    known = None if run is None else data_of(run)
    if config.dataset is None and known is None:
        whose = f"{run}: was not made from a labelled data set" if run else "--bilm names no data set"
        raise InputError(f"{whose}; give one by --dataset")
    own = known if known is not None and config.dataset in (None, known.dataset) else None
    rules = ("text", "max_length", "validation")
    names = ("dataset", "data_dir", *rules)
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    settings = replace(own or DataConfig(), **given)
    if changed := [name for name in rules if own and getattr(settings, name) != getattr(own, name)]:
        told = f"{flag_of(changed[0])} is for another --dataset than {run} was made from"
        raise InputError(f"{told}; leave it out, or give another")
    data = load_dataset(settings, vocabulary, with_characters)
    if own and run and data.digest != read_config(run).get("texts"):
        told = (
            "was made from other texts than its data set holds now; make it anew, or give another --dataset"
        )
        raise InputError(f"{run}: {told}")
    parts = ("train", "validation", "test")
    data = replace(data, **{name: with_device_group_size(getattr(data, name)) for name in parts})
    return thinned(data, config.labels, seed)


def data_of(run: Path) -> DataConfig | None:
    """The labelled data set that a run was made from, if it was made from one.

    Raises:
        InputError: the run cannot be read.
    """
    saved = read_config(run).get("data")
    if saved is None:
        return None
    settings = structure(DataConfig, saved, f"{run}: data")
    check(settings)
    return settings


def thinned(data: Dataset, labels: float, seed: int) -> Dataset:
    """The data set with that share of its labelled documents, of training and validation alone.

    Args:
        data: all of it.
        labels: the share, above 0 and at most 1.
        seed: of the choice.
    """
    if labels == 1:
        return data
    few = {name: getattr(data, name).subset(labels, seed) for name in ("train", "validation")}
    return replace(data, **few)
