"""Settings that several commands share; importing them does not import JAX."""

from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from elmo_jax.config import Config, Count, Seed, TextColumns, Tokens


@dataclass(frozen=True)
class SourceConfig(Config):
    """Input features of the classifier."""

    features: Literal["elmo", "svd", "sgns", "tfidf"] = "elmo"
    """Layers of a language model, static word vectors, or TF-IDF with logistic regression and no network."""
    pretrained: str = "runs/pretrain"
    """With elmo: run folder of the pretrain command, or a folder written by Elmo.save_pretrained."""
    bilm: tuple[str, str] | None = None
    """With elmo: options and weights files of an official model, used instead of --pretrained."""
    vectors: str | None = None
    """With svd or sgns: run folder of the vectors command; runs/svd or runs/sgns if not given."""
    dataset: str | None = None
    """Data set to classify: sample, ag_news or a folder; the one of the run above if not given."""
    data_dir: str | None = None
    """Folder with AG News's train.csv and test.csv, if they have moved since that run."""
    label_column: str | None = None
    """With another --dataset: column with the label, by name or number; the first if not given."""
    text_columns: tuple[str, ...] | None = None
    """With another --dataset: columns with the text, by name or number; all others if not given."""
    delimiter: str | None = None
    """With another --dataset: character between columns, or tab; found if not given."""
    tokens: Tokens | None = None
    """With another --dataset: split texts into words and punctuation characters, or only at whitespace; as
    for the features if not given."""
    lowercase: bool | None = None
    """With another --dataset: convert texts to lower case; as for the features if not given."""
    clean: bool | None = None
    """With another --dataset: remove news-feed markup; as for the features if not given."""
    skip_blank: bool | None = None
    """With another --dataset: leave out texts without tokens."""
    text: TextColumns | None = None
    """With another --dataset: use all text columns joined, or the last one only."""
    max_length: Count | None = None
    """With another --dataset: maximum number of tokens of a text; 400 if not given."""
    validation: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """With another --dataset: fraction of the training rows held out for validation; 0.2 if not given."""
    finetune: bool = False
    """Train the language model together with the classifier."""
    untrained: bool = False
    """Reinitialize the language model, as a baseline without pre-training."""
    labels: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Fraction of the training and validation documents to use; at least one per class."""


@dataclass(frozen=True)
class CorpusConfig(Config):
    """A text corpus used instead of a labelled data set, and how text is split into batches."""

    corpus: str | None = None
    """Folder or quoted glob of training texts (plain or .gz), one sentence per line; tokens are separated by
    spaces, or made from raw text with --tokens words."""
    valid_corpus: str | None = None
    """Folder or quoted glob of held-out texts for measuring perplexity; if not given, lines of the corpus."""
    vocab: str | None = None
    """Vocabulary file, one token per line as in bilm-tf; built from the corpus if not given."""
    batching: Literal["sentences", "contiguous"] = "sentences"
    """One document per row; or contiguous text, --unroll steps per batch, carrying the LSTM state over."""
    unroll: Count = 20
    """Time steps per batch of contiguous text."""


@dataclass(frozen=True)
class HostsConfig(Config):
    """Processes of a distributed run; start each with the same command and its own --process."""

    coordinator: str | None = None
    """HOST:PORT of the first process; or auto under Slurm, Open MPI, Kubernetes or on TPUs."""
    processes: Count | None = None
    """Number of processes that share the run."""
    process: Seed | None = None
    """Index of this process, from 0; the first one prints and writes."""
