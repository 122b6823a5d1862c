"""What pre-training reads: a labelled data set's texts, or a corpus of shards."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from elmo_jax.contiguous import ContiguousStream
from elmo_jax.corpus import count_words, find_shards, load_corpus
from elmo_jax.data import BatchStream, Documents
from elmo_jax.datasets import DataConfig, load_dataset
from elmo_jax.errors import InputError
from elmo_jax.progress import Meter
from elmo_jax.text import Vocabulary


@dataclass(frozen=True)
class CorpusConfig:
    """A corpus in place of a labelled data set, and how text becomes batches."""

    corpus: str | None = None
    """Glob of texts, a tokenised sentence a line, .gz too; numbered once, kept in the user's cache."""
    valid_corpus: str | None = None
    """Glob of the held-out texts."""
    vocab: str | None = None
    """Vocabulary file in bilm-tf's format; made from the corpus if not given."""
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

    def stream(
        self, config: CorpusConfig, batch_size: int, seed: int, k: int
    ) -> BatchStream | ContiguousStream:
        """The training part in batches."""
        if config.batching == "sentences":
            return BatchStream(self.train, batch_size, seed, steps_per_dispatch=k)
        try:
            return ContiguousStream(self.train, batch_size, config.unroll, seed, k)
        except ValueError as error:
            raise InputError(f"{error}; lower --batch-size or --unroll, or give more text") from None


def load_texts(data: DataConfig, config: CorpusConfig, spelled: bool) -> Texts:
    """Read what the flags name.

    Raises:
        InputError: a file is missing or wrong, or a flag lacks its partner.
    """
    if config.corpus is None:
        if config.valid_corpus is not None or config.vocab is not None:
            raise InputError("--valid-corpus and --vocab need --corpus; give all or none")
        made = load_dataset(data, spelled=spelled)
        return Texts(made.train, made.validation, made.vocabulary, made.digest)
    if config.valid_corpus is None:
        raise InputError("--corpus needs --valid-corpus, texts to measure perplexity on; give it")
    if config.vocab is not None:
        vocabulary = Vocabulary.load(Path(config.vocab))
    else:
        vocabulary = Vocabulary.from_counts(count_words(config.corpus), data.min_count, data.max_vocab)
    parts = []
    for pattern in (config.corpus, config.valid_corpus):
        size = sum(path.stat().st_size for path in find_shards(pattern))
        with Meter(size, "byte", scale=True) as meter:
            parts.append(load_corpus(pattern, vocabulary, spelled, meter.add))
    train, held_out = parts
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
