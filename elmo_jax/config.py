"""Settings of models, training and data as frozen dataclasses; importing them does not import JAX.

Each field declares its type and bounds, which are checked when a config is created.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from functools import cache, cached_property
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec
from msgspec import Meta

from elmo_jax.errors import InputError

Kernel = Literal["auto", "persistent", "cudnn", "fast", "plain"]
Dtype = Literal["float32", "bfloat16"]
TextColumns = Literal["title+description", "description"]
Layers = Literal["all", "top", "average", "mix"]
Tokens = Literal["words", "whitespace"]

Count = Annotated[int, Meta(ge=1, lt=2**31)]
Epochs = Annotated[int, Meta(ge=1, le=100_000)]
Size = Annotated[int, Meta(ge=1, le=2**16)]
Depth = Annotated[int, Meta(ge=1, le=64)]
NonNegative = Seed = Annotated[int, Meta(ge=0, lt=2**31)]
Fraction = Annotated[float, Meta(ge=0, lt=1)]
Positive = Annotated[float, Meta(gt=0)]

CHARACTERS = 50  # character ids per word, including its begin and end symbols


_COMPARISONS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
_TYPES = {"int": "an integer", "float": "a number", "str": "text", "bool": "True or False"}


class Config:
    """Base class of settings; creating an object checks the types and bounds of its fields.

    Raises:
        InputError: A value is wrong; the message names its field.

    Examples:
        >>> OptimizerConfig(learning_rate=-1.0)
        Traceback (most recent call last):
        elmo_jax.errors.InputError: learning_rate must be above 0, not -1.0
    """

    def __post_init__(self):
        for name, kind in _field_types(type(self)).items():
            if not is_dataclass(value := getattr(self, name)):  # a nested config was checked on creation
                _check_field(name, kind, value)


@cache
def _field_types(config: type) -> dict[str, Any]:
    return get_type_hints(config, include_extras=True)


def _check_field(name: str, kind: Any, value: Any) -> None:
    if isinstance(value, float):
        value = float(value)  # NumPy's float64 is one too, which msgspec does not accept
        if not math.isfinite(value):
            raise InputError(f"{name} must be a finite number, not {value}")
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message, _, index = str(error).partition(" - at `$")
        index = index.rstrip("`")
        wrong: Any = value
        for i in re.findall(r"\d+", index):
            wrong = wrong[int(i)]
        raise InputError(f"{name}{index} must be {_explain(message, kind)}, not {wrong!r}") from None


def _explain(message: str, kind: Any) -> str:
    """Return what msgspec expected of a value."""
    if bound := re.fullmatch(r"Expected `\w+` (of length )?(\S+) (\S+)", message):
        return f"{bound[1] or ''}{_COMPARISONS[bound[2]]} {bound[3].removesuffix('.0')}"
    if message.startswith("Invalid enum value"):
        return f"one of {', '.join(_find_choices(kind))}"
    names: list[str] = re.findall(r"\w+", message.partition("`")[2].partition("`")[0])
    return " or ".join(_TYPES.get(name, name.replace("null", "None")) for name in names)


def _find_choices(kind: Any) -> Iterator[str]:
    for arg in get_args(kind):
        if isinstance(arg, str):
            yield arg
        else:
            yield from _find_choices(arg)


@dataclass(frozen=True)
class TextConfig(Config):
    """Conversion of raw text into the tokens of a model; it is stored with the model."""

    tokens: Literal["words", "whitespace", "custom"] = "words"
    """Split into words and punctuation characters, split at whitespace, or call a custom tokenizer."""
    lowercase: bool = True
    """Convert the text to lower case."""
    clean: bool = False
    """Remove news-feed markup (tags, HTML entities, backslashes)."""


CASED = TextConfig(lowercase=False)  # used by the official models
PRETOKENIZED = TextConfig("whitespace", lowercase=False)


@dataclass(frozen=True)
class DataConfig(Config):
    """A labelled data set and the conversion of its texts into token ids."""

    dataset: str = "sample"
    """sample (included), ag_news (downloaded once), or a folder with train.csv and test.csv."""
    data_dir: str | None = None
    """Folder with AG News's train.csv and test.csv, used instead of the download."""
    label_column: str | None = None
    """Column with the label: its name in the header, or its number from 1; the first if not given."""
    text_columns: tuple[str, ...] | None = None
    """Columns with the text, by name or number, joined in this order; all others if not given."""
    text: TextColumns = "title+description"
    """Without text_columns: join all columns except the label, or use only the last of them."""
    delimiter: str | None = None
    """Character between columns, or tab; if not given, detected among comma, semicolon and tab."""
    tokens: Tokens | None = None
    """Split texts into words and punctuation characters, or only at whitespace, for pre-tokenized text; if
    not given, words for a data set and whitespace for a corpus."""
    lowercase: bool | None = None
    """Convert texts to lower case; if not given, only with --tokens words."""
    clean: bool = False
    """Remove news-feed markup (tags, HTML entities, backslashes); always done for ag_news."""
    skip_blank: bool = False
    """Leave out texts without tokens instead of stopping with an error."""
    min_count: Count = 3
    """Minimum number of occurrences in the training texts; rarer tokens become unknown."""
    max_vocab: Count | None = None
    """Maximum number of tokens in the vocabulary."""
    max_length: Count = 400
    """Maximum number of tokens of a text; longer texts are cut."""
    validation: Annotated[float, Meta(gt=0, lt=1)] = 0.2
    """Fraction of the training rows held out for validation, stratified by class. For a corpus without
    held-out text: fraction of its lines, at most 20,000 lines."""
    split_seed: Seed = 0
    """Random seed for the split into training and validation rows."""

    def text_config(self, default: Tokens = "words") -> TextConfig:
        """Return the conversion of texts into tokens, with `default` if `tokens` is None."""
        tokens = self.tokens or default
        lowercase = tokens == "words" if self.lowercase is None else self.lowercase
        return TextConfig(tokens, lowercase, self.clean or self.dataset == "ag_news")


@dataclass(frozen=True)
class CharCNNConfig(Config):
    """Sizes of a character CNN; the defaults are those of the released ELMo models."""

    filters: Annotated[
        tuple[tuple[Annotated[int, Meta(ge=1, le=CHARACTERS)], Size], ...], Meta(min_length=1)
    ] = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    """Pairs of filter width, in characters, and number of filters."""
    character_features: Size = 16
    """Width of the character vectors."""
    highway: Annotated[int, Meta(ge=0, le=100)] = 2
    """Number of highway layers."""
    activation: Literal["relu", "tanh"] = "relu"
    """Activation after max pooling over a word's characters."""
    project_filters: bool = False
    """Project the filter outputs even if their number equals the embedding width."""


@dataclass(frozen=True)
class BiLMConfig(Config):
    """Sizes of a bidirectional language model."""

    input: Literal["words", "characters"] = "words"
    """Source of the token vectors: an embedding table, or a CNN over each token's characters."""
    characters: CharCNNConfig = CharCNNConfig()
    embedding: Size = 150
    """Width of the token vectors and of each direction's LSTM outputs."""
    cells: Size = 150
    """LSTM cells per layer and direction; projected to the embedding width if the two differ."""
    project_cells: bool = False
    """Project the LSTM outputs even if cells and embedding have the same width."""
    layers: Depth = 2
    """LSTM layers per direction."""
    skip: bool = False
    """Add the input of every LSTM layer above the first to its output."""
    cell_clip: Positive | None = None
    """Clip cell states to this absolute value; no clipping if not given."""
    projection_clip: Positive | None = None
    """Clip projected LSTM outputs to this absolute value; no clipping if not given."""
    dropout: Fraction = 0.1
    """Dropout rate of each LSTM layer's input and of the top layer's output."""
    tie: bool = True
    """Share one table between word embeddings and softmax (Press and Wolf 2017)."""
    dtype: Dtype = "float32"
    """Matmul dtype. Accumulation, states and parameters stay float32."""

    @cached_property
    def projected(self) -> bool:
        """True if LSTM outputs are projected to the embedding width."""
        return self.project_cells or self.cells != self.embedding


@dataclass(frozen=True)
class CombinerConfig(Config):
    """Combiner, which merges the layers of a language model into one."""

    combiner: str = "trainable"
    """trainable or frozen scalar weights for the layers, or function: a learned map of all layers."""
    normalize: Literal["none", "softmax"] = "none"
    """With trainable: use the raw weights, or softmax-normalize and scale them as in the paper."""
    layer_norm: bool = False
    """With trainable or frozen: normalize each layer to mean 0 and variance 1 first."""
    activation: Literal["relu", "tanh"] = "relu"
    """With function: activation after the linear map."""


@dataclass(frozen=True)
class ClassifierConfig(Config):
    """Sizes and regularization of the BiLSTM classifier."""

    hidden: Size = 128
    """LSTM cells per layer and direction, and units of the ReLU layer."""
    classifier_layers: Depth = 2
    """Bidirectional LSTM layers."""
    pooling: Literal["mean", "max", "mean+max", "attention", "mean+max+attention"] = "mean+max"
    """Pooling of token states into one document vector."""
    classifier_dropout: Fraction = 0.2
    """Dropout rate of each layer's input."""
    variational: bool = False
    """Use the same dropout mask for every token of a document (Gal and Ghahramani 2016)."""
    word_dropout: Fraction = 0.0
    """Fraction of tokens replaced by the unknown token in training."""
    label_smoothing: Fraction = 0.0
    """Fraction of the training target spread evenly over all classes."""


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adam", "lazy_adam", "adagrad"] = "adam"
    """adam updates all vocabulary rows; with sampled softmax, lazy_adam and adagrad update those in use."""
    learning_rate: Positive = 2e-3
    """Peak learning rate of the schedule."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """After the warmup, decrease the learning rate to 0 or keep it constant."""
    warmup: Fraction = 0.02
    """Fraction of all steps over which the learning rate rises from 0."""
    clip_norm: Positive = 10.0
    """Maximum global norm of the gradient; larger gradients are scaled down."""
    gradient_scale: Positive = 1.0
    """Factor applied to gradients before clipping; it affects adagrad, and adam only through clipping."""


@dataclass(frozen=True)
class SVDConfig(Config):
    """Word vectors from a truncated SVD of co-occurrence counts."""

    weighting: Literal["ppmi", "counts"] = "ppmi"
    """Matrix entries: positive pointwise mutual information, or raw counts."""
    exponent: Annotated[float, Meta(ge=0)] = 0.5
    """Exponent of the singular values that scale the dimensions; 0 leaves them unscaled."""


@dataclass(frozen=True)
class SGNSConfig(Config):
    """Word vectors from skip-gram with negative sampling."""

    negatives: Count = 5
    """Weight of the negative samples relative to each positive pair."""
    subsample: Positive = 1e-3
    """Relative frequency above which tokens are randomly dropped in training."""
    rate: Positive = 0.025
    """Initial learning rate; it falls linearly to 0."""


@dataclass(frozen=True)
class DumpConfig(Config):
    """Content of an HDF5 file of embeddings."""

    layers: Layers = "all"
    """Write all layers [L, tokens, F], or [tokens, F]: the top layer, the average or a trained mix."""
    dtype: Literal["float32", "float16"] = "float32"
    """Number format of the file."""
    tokenize: bool = False
    """Tokenize raw text like the model's training text; if not given, tokens are separated by spaces."""
    long: Literal["split", "refuse"] = "split"
    """For lines longer than --max-length: process them in pieces (same result), or stop with an error."""
    max_length: Count = 100_000
    """Number of tokens above which a line counts as long."""
    batch_tokens: Count = 2048
    """Approximate number of tokens processed at once."""
