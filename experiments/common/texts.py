"""What pre-training reads: a labelled data set's texts, or a corpus of shards."""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from elmo_jax.data.batching import BatchStream, ContiguousStream, Documents
from elmo_jax.data.corpus import corpus_bytes, count_words, find_shards, load_corpus, read_beginning
from elmo_jax.data.csv_dataset import DataConfig, load_dataset
from elmo_jax.data.text import Vocabulary
from elmo_jax.errors import InputError
from elmo_jax.models.embedders import with_device_group_size
from elmo_jax.training.loop import ProgressBar


@dataclass(frozen=True)
class CorpusConfig:
    """A corpus in place of a labelled data set, and how text becomes batches."""

    corpus: str | None = None
    """Glob of texts, a tokenised sentence a line, .gz too; numbered once, kept in the user's cache."""
    valid_corpus: str | None = None
    """Glob of the held-out texts."""
    vocab: str | None = None
    """Vocabulary file in bilm-tf's format, taken whole; made from the corpus if not given."""
    batching: Literal["sentences", "contiguous"] = "sentences"
    """A document a row; or running text, --unroll steps a batch, the LSTM state carried on."""
    unroll: int = 20
    """Steps a batch of running text."""


@dataclass(frozen=True)
class Texts:
    """Training and held-out documents, one vocabulary, and what identifies them."""

    train: Documents
    held_out: Documents
    vocabulary: Vocabulary
    digest: str
    share: float = 1.0
    """Of the training part that `train` is; below 1 in a dry run."""

    def stream(
        self, config: CorpusConfig, batch_size: int, seed: int, k: int
    ) -> BatchStream | ContiguousStream:
        """The training part in batches."""
        if config.batching == "sentences":
            return BatchStream(self.train, batch_size, seed, steps_per_call=k)
        return ContiguousStream(self.train, batch_size, config.unroll, seed, k)


def load_texts(
    data: DataConfig, config: CorpusConfig, with_characters: bool, portion: int | None = None
) -> Texts:
    """Read what the flags name.

    Args:
        data: of a labelled data set.
        config: of a corpus.
        spelled: whether documents bring character ids.
        portion: read about that many tokens of a corpus alone, for both parts, and write nothing.

    Raises:
        InputError: a file is missing or wrong, or a flag lacks its partner.
    """
    if config.corpus is None:
        if config.valid_corpus is not None or config.vocab is not None:
            raise InputError("--valid-corpus and --vocab need --corpus; give all or none")
        made = load_dataset(data, with_characters=with_characters, keep=portion is None)
        parts = with_device_group_size(made.train), with_device_group_size(made.validation)
        return Texts(*parts, made.vocabulary, made.digest)
    if data.dataset != DataConfig.dataset or data.data_dir is not None:
        raise InputError("--corpus stands in place of --dataset and --data-dir; give one or the other")
    if config.valid_corpus is None:
        raise InputError("--corpus needs --valid-corpus, texts to measure perplexity on; give it")
    find_shards(config.valid_corpus)  # before the hours that the other may take
    vocabulary = _vocabulary(data, config, config.corpus, keep=portion is None)
    if portion is not None:
        train, share = read_beginning(config.corpus, vocabulary, with_characters, portion)
        train = _cut(with_device_group_size(train), data, config)
        return Texts(train, train, vocabulary, "", share)
    parts = []
    for pattern in (config.corpus, config.valid_corpus):
        with ProgressBar(corpus_bytes(pattern), "byte", scale=True) as meter:
            part = load_corpus(pattern, vocabulary, with_characters, meter.add)
            parts.append(with_device_group_size(part))
    train, held_out = _cut(parts[0], data, config), parts[1]
    longest = int(np.max(held_out.lengths))
    if longest > data.max_length:
        raise InputError(
            f"{config.valid_corpus}: a sentence has {longest:,} tokens, more than --max-length "
            f"{data.max_length}; cut it or raise that"
        )
    stores = [
        Path(str(getattr(part.ids, "filename", ""))).parent.name for part in parts
    ]  # named by shards and vocabulary
    return Texts(train, held_out, vocabulary, " ".join(stores))


def _vocabulary(data: DataConfig, config: CorpusConfig, pattern: str, keep: bool) -> Vocabulary:
    """The one that is named, or the words of the corpus."""
    if config.vocab is not None:
        return Vocabulary.load(Path(config.vocab))
    with ProgressBar(corpus_bytes(pattern), "byte", scale=True) as meter:
        counts = count_words(pattern, meter.add, keep=keep)
    return Vocabulary.from_counts(counts, data.min_count, data.max_vocab)


def _cut(train: Documents, data: DataConfig, config: CorpusConfig) -> Documents:
    """Rows of a batch are as long as its longest; windows of running text are not."""
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
