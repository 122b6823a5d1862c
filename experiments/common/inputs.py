"""Inputs of training: documents for pre-training, and labelled documents with features for a classifier."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.config import BiLMConfig, CombinerConfig, DataConfig, Kernel, TextConfig
from elmo_jax.data.batching import BatchStream, ContiguousStream, Documents
from elmo_jax.data.corpus import Corpus
from elmo_jax.data.csv_dataset import Dataset, load_dataset
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.models.classifier import static_features
from elmo_jax.models.combiners import OneLayer, make_combiner
from elmo_jax.pretrained.folder import read_text_config
from elmo_jax.storage.files import CONFIG, check_files, read_config, structure
from elmo_jax.training.checkpoint import RESULTS, VOCABULARY
from elmo_jax.training.classifier import FeatureSource
from elmo_jax.training.loop import ProgressBar
from elmo_jax.training.objectives import bilm_features, init_params
from experiments.common.cli import check, flag_of, prog
from experiments.common.config import CorpusConfig, SourceConfig

VECTORS = "vectors.npz"


@dataclass(frozen=True)
class Texts:
    """Training and held-out documents with one vocabulary and a digest.

    Attributes:
        fraction: Fraction of the training documents that `train` holds; below 1 only in a dry run.
    """

    train: Documents
    held_out: Documents
    vocabulary: Vocabulary
    digest: str
    fraction: float = 1.0

    def stream(
        self, config: CorpusConfig, batch_size: int, seed: int, steps_per_call: int
    ) -> BatchStream | ContiguousStream:
        """Return the training documents as batches."""
        if config.batching == "sentences":
            return BatchStream(self.train, batch_size, seed, steps_per_call=steps_per_call)
        return ContiguousStream(self.train, batch_size, config.unroll, seed, steps_per_call)


def load_texts(
    data: DataConfig, config: CorpusConfig, with_characters: bool, max_tokens: int | None = None
) -> Texts:
    """Load the texts of a labelled data set or of a corpus.

    Args:
        data: Labelled data set; its limits on vocabulary and length apply to a corpus too.
        config: Corpus.
        with_characters: Add the character ids of every word.
        max_tokens: Read only about this many tokens of a corpus, use them as the held-out part too, and
            write no cache.

    Raises:
        InputError: A file is missing or invalid, or flags contradict each other.
    """
    keep = max_tokens is None
    if config.corpus is None:
        if config.valid_corpus is not None or config.vocab is not None:
            raise InputError("--valid-corpus and --vocab need --corpus; give all or none")
        dataset = load_dataset(data, with_characters=with_characters, keep=keep)
        return Texts(dataset.train, dataset.validation, dataset.vocabulary, dataset.digest)
    if data.dataset != DataConfig.dataset or data.data_dir is not None:
        raise InputError("--corpus replaces --dataset and --data-dir; give one or the other")
    corpus = Corpus.open(config.corpus, data.text_config("whitespace"))
    if max_tokens is not None:
        vocabulary = _corpus_vocabulary(corpus, data, config, keep)
        train, fraction = corpus.read_beginning(vocabulary, with_characters, max_tokens)
        train = _cut_sentences(train, data, config)
        return Texts(train, train, vocabulary, "", fraction)
    if config.valid_corpus is None:
        corpus, held_out_corpus = corpus.hold_out(data.validation, data.split_seed)
    else:
        held_out_corpus = Corpus.open(config.valid_corpus, corpus.text)
        corpus.check_disjoint(held_out_corpus)
    vocabulary = _corpus_vocabulary(corpus, data, config, keep)
    train, held_out = (_load_corpus(part, vocabulary, with_characters) for part in (corpus, held_out_corpus))
    longest = int(np.max(held_out.lengths))
    if longest > data.max_length:
        raise InputError(
            f"{held_out_corpus.pattern}: a sentence has {longest:,} tokens, more than --max-length "
            f"{data.max_length}; cut it or raise --max-length"
        )
    digest = f"{corpus.digest} {held_out_corpus.digest}"
    return Texts(_cut_sentences(train, data, config), held_out, vocabulary, digest)


def _corpus_vocabulary(corpus: Corpus, data: DataConfig, config: CorpusConfig, keep: bool) -> Vocabulary:
    if config.vocab is not None:
        return Vocabulary.load(Path(config.vocab))
    with ProgressBar(corpus.size, "byte", scale=True) as bar:
        counts = corpus.count_words(bar.add, keep=keep)
    return Vocabulary.from_counts(counts, data.min_count, data.max_vocab)


def _load_corpus(corpus: Corpus, vocabulary: Vocabulary, with_characters: bool) -> Documents:
    with ProgressBar(corpus.size, "byte", scale=True) as bar:
        return corpus.load(vocabulary, with_characters, bar.add)


def _cut_sentences(train: Documents, data: DataConfig, config: CorpusConfig) -> Documents:
    """Cut sentences at the maximum length, since a batch is as wide as its longest row."""
    if config.batching != "sentences":
        return train
    count = int((train.lengths > data.max_length).sum())
    if count:
        warnings.warn(
            f"{config.corpus}: {count:,} sentences were longer than {data.max_length} tokens and were cut "
            "(--max-length)",
            stacklevel=3,
        )
    return replace(train, max_length=data.max_length)


class Source(NamedTuple):
    """Input of a classifier.

    Attributes:
        data: Labelled data set, with the token ids that the features use.
        features: Token features; without parameters for word counts.
        combiner: Module that combines the layers.
        settings: Settings that the data set was loaded with.
        vocabulary: Vocabulary of the features; None for an official model.
        bilm: Sizes of the language model, if there is one.
        options: Options of an official model, which the run records.
    """

    data: Dataset
    features: FeatureSource
    combiner: Any
    settings: DataConfig
    vocabulary: Vocabulary | None
    bilm: BiLMConfig | None = None
    options: Mapping[str, Any] = {}


def open_source(config: SourceConfig, combiner: CombinerConfig, seed: int, kernel: Kernel) -> Source:
    """Load the features and the data set named by the flags.

    Raises:
        InputError: A run is missing or of another kind, flags contradict each other, or the
            kernel does not support the layers.
    """
    if config.features == "elmo":
        return _open_elmo(config, combiner, seed, kernel)
    if config.finetune or config.untrained:
        raise InputError("--finetune and --untrained need --features elmo; leave them out")
    return _open_word_counts(config, seed) if config.features == "tfidf" else _open_vectors(config, seed)


def _open_word_counts(config: SourceConfig, seed: int) -> Source:
    run = Path(config.pretrained)
    known = data_of(run) if (run / CONFIG).is_file() else None
    settings = _data_settings(config, run if known else None, known or DataConfig(), TextConfig())
    words = load_words(config, settings, seed)
    features = FeatureSource(static_features, {}, (0, 0))
    return Source(words, features, OneLayer(), settings, words.vocabulary)


def load_words(config: SourceConfig, settings: DataConfig, seed: int) -> Dataset:
    """Load the documents of a data set with a vocabulary that holds every training word."""
    return keep_labels(load_dataset(replace(settings, min_count=1, max_vocab=None)), config.labels, seed)


def _open_elmo(config: SourceConfig, combiner: CombinerConfig, seed: int, kernel: Kernel) -> Source:
    if config.bilm is not None:
        elmo, run = Elmo.from_bilm(*config.bilm, kernel=kernel), None
    else:
        elmo, run = Elmo.from_pretrained(config.pretrained, kernel=kernel), Path(config.pretrained)
    sizes = elmo.model.config
    with_characters = sizes.input == "characters"
    data, settings = _load_labelled(config, run, elmo.vocabulary, elmo.text, with_characters, seed)
    params = init_params(elmo.model, jax.random.key(seed)) if config.untrained else elmo.params
    shape = sizes.layers + 1, 2 * sizes.embedding
    features = FeatureSource(bilm_features(elmo.model, config.finetune), {"bilm": params}, shape)
    options = {} if run else official_options(sizes)  # those of a run are in its own config.json
    return Source(data, features, make_combiner(combiner), settings, elmo.vocabulary, sizes, options)


def official_options(config: BiLMConfig) -> dict[str, Any]:
    """Return the options of an official model as a classifier's run records them."""
    return {"options": json.loads(json.dumps(asdict(replace(config, dtype=BiLMConfig.dtype))))}


def _open_vectors(config: SourceConfig, seed: int) -> Source:
    path = Path(config.vectors or f"runs/{config.features}")
    if not (
        (path / VECTORS).is_file() and (path / RESULTS).is_file()
    ):  # the results are written last, so the run is complete
        make = f"{prog('vectors')} --method {config.features} --output {path}"
        raise InputError(f"{path}: no word vectors here; make them with {make}")
    check_files(path)
    method = read_config(path).get("method")
    if method != config.features:
        raise InputError(f"{path}: holds {method} vectors; give a run of --method {config.features}")
    vocabulary = Vocabulary.load(path / VOCABULARY)
    table = WordVectors.load(path / VECTORS).table(vocabulary)
    data, settings = _load_labelled(config, path, vocabulary, read_text_config(path), False, seed)
    features = FeatureSource(static_features, {"vectors": jnp.asarray(table)}, (1, table.shape[1]))
    return Source(data, features, OneLayer(), settings, vocabulary)


def _load_labelled(
    config: SourceConfig,
    run: Path | None,
    vocabulary: Vocabulary | None,
    text: TextConfig,
    with_characters: bool,
    seed: int,
) -> tuple[Dataset, DataConfig]:
    """Load the data set that the flags name, or else the data set that `run` was trained on.

    Raises:
        InputError: Neither names a data set, or its texts have changed since the run.
    """
    known = None if run is None else data_of(run)
    if config.dataset is None and known is None:
        reason = f"{run}: was not trained on a labelled data set" if run else "--bilm names no data set"
        raise InputError(f"{reason}; give one with --dataset")
    own = known if known is not None and config.dataset in (None, known.dataset) else None
    settings = _data_settings(config, run, own, text)
    data = load_dataset(settings, vocabulary, with_characters)
    if own and run and data.digest != read_config(run).get("texts"):
        raise InputError(
            f"{run}: the texts of its data set have changed; train it again, or give another --dataset"
        )
    return keep_labels(data, config.labels, seed), settings


def _data_settings(
    config: SourceConfig, run: Path | None, own: DataConfig | None, text: TextConfig
) -> DataConfig:
    """Return the settings of the data set: the flags, completed by those of a run on the same data set.

    Another data set uses the text conversion of the features unless flags change it.
    """
    columns = ("label_column", "text_columns", "text", "delimiter")
    fixed = (*columns, "tokens", "lowercase", "clean", "skip_blank", "max_length", "validation")
    names = ("dataset", "data_dir", *fixed)
    given = {name: value for name in names if (value := getattr(config, name)) is not None}
    if own is None and text.tokens == "custom" and config.tokens is None:
        problem = "the model was trained with a custom tokenizer"
        raise InputError(f"{problem}; separate the tokens by spaces and give --tokens whitespace")
    own = own and replace(own, **asdict(own.text_config()))
    settings = replace(own, **given) if own else DataConfig(**asdict(text) | given)
    if changed := [name for name in fixed if own and getattr(settings, name) != getattr(own, name)]:
        raise InputError(
            f"{flag_of(changed[0])} differs from the run's data set in {run}; leave it out, or give another "
            "--dataset"
        )
    return settings


def data_of(run: Path) -> DataConfig | None:
    """Return the labelled data set that a run was trained on, if any.

    Raises:
        InputError: The run cannot be read.
    """
    saved = read_config(run).get("data")
    if saved is None:
        return None
    if isinstance(saved, dict):
        saved = {"clean": True, **saved}  # before `clean` was a setting, every text was cleaned
    settings = structure(DataConfig, saved, f"{run}: data")
    check(settings)
    return settings


def keep_labels(data: Dataset, fraction: float, seed: int) -> Dataset:
    """Return the data set with a random fraction of its training and validation documents.

    Args:
        data: Data set.
        fraction: Number above 0 and at most 1.
        seed: Random seed of the choice.
    """
    if fraction == 1:
        return data
    fewer = {name: getattr(data, name).subset(fraction, seed) for name in ("train", "validation")}
    return replace(data, **fewer)
