"""Scikit-learn transformer that turns texts into vectors."""

import contextlib
import reprlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import BatchStream, Documents
from elmo_jax.data.text import Vocabulary, tokenize
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM, BiLMConfig
from elmo_jax.parallel import Plan
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.loop import fit
from elmo_jax.training.objectives import bilm_training, init_params
from elmo_jax.training.step import TrainState

_BLOCK_TEXTS = 1024  # bounds the memory for layers


class ElmoVectorizer(TransformerMixin, BaseEstimator):
    """Transformer from texts to vectors: layers of a biLM, pooled over the tokens of each text.

    Args:
        pretrained: An `Elmo`, a folder for `Elmo.from_pretrained`, or the files (options, weights) of a model
            in the official format. None trains a new model on the texts of `fit`.
        layers: "top", "average", "all" (concatenated), or the index of a layer.
        pooling: "mean", "max" or "mean+max" (concatenated) over the tokens; without tokens, zeros.
        embedding: Width of the token vectors of a new model.
        cells: LSTM cells per layer and direction of a new model.
        epochs: Passes over the texts in training.
        batch_size: Texts per batch in training.
        negatives: Negative samples of the sampled softmax in training.
        min_count: Rarer tokens become unknown to a new model.
        random_state: Random seed of training, a `numpy.random.RandomState`, or None for a new seed each time.

    Attributes:
        elmo_: The model.
        n_features_out_: Width of the vectors.

    Examples:
        >>> from sklearn.linear_model import LogisticRegression
        >>> from sklearn.pipeline import make_pipeline
        >>> texts, labels = ["the bank rose", "the team won"] * 8, [0, 1] * 8
        >>> vectorizer = ElmoVectorizer(embedding=8, cells=8, epochs=1, min_count=1)
        >>> make_pipeline(vectorizer, LogisticRegression()).fit(texts, labels).predict(texts[:2])
        array([0, 1])
    """

    def __init__(
        self,
        pretrained: Elmo | str | Path | tuple[str, str] | None = None,
        *,
        layers: Literal["top", "average", "all"] | int = "average",
        pooling: Literal["mean", "max", "mean+max"] = "mean",
        embedding: int = 150,
        cells: int = 150,
        epochs: int = 5,
        batch_size: int = 32,
        negatives: int = 2048,
        min_count: int = 2,
        random_state: int | np.random.RandomState | None = 0,
    ):
        self.pretrained = pretrained
        self.layers = layers
        self.pooling = pooling
        self.embedding = embedding
        self.cells = cells
        self.epochs = epochs
        self.batch_size = batch_size
        self.negatives = negatives
        self.min_count = min_count
        self.random_state = random_state

    def fit(self, X: Iterable[str] | Iterable[Sequence[str]], y: Any = None) -> "ElmoVectorizer":
        """Load the pretrained model, or train a new one on these texts.

        Args:
            X: N texts, or N lists of tokens.
            y: Ignored.

        Raises:
            InputError: An argument is invalid, or there is no token to train on.
        """
        for name in ("embedding", "cells", "epochs", "batch_size", "negatives", "min_count"):
            value = getattr(self, name)
            if not _is_integer(value) or value < 1:
                raise InputError(f"{name} is {value!r}; use an integer of at least 1")
        if self.pooling not in ("mean", "max", "mean+max"):
            raise InputError(f"pooling is {self.pooling!r}; use mean, max or mean+max")
        if self.pretrained is None:
            self.elmo_ = self._train_model(_tokenize_texts(X))
        elif isinstance(self.pretrained, Elmo):
            self.elmo_ = self.pretrained
        elif isinstance(self.pretrained, tuple | list):
            self.elmo_ = Elmo.from_bilm(*self.pretrained)
        else:
            self.elmo_ = Elmo.from_pretrained(self.pretrained)
        self.n_features_out_ = self._pool_tokens(np.zeros(self.elmo_.shape(1), np.float32)).shape[0]
        return self

    def fit_transform(self, X: Iterable[str] | Iterable[Sequence[str]], y: Any = None) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call `fit` and `transform` with the same texts, which may be an iterator."""
        sentences = _tokenize_texts(X)
        return self.fit(sentences, y).transform(sentences)

    def transform(self, X: Iterable[str] | Iterable[Sequence[str]]) -> np.ndarray:
        """Return the vectors of N texts, or of N lists of tokens, float32 ``[N, n_features_out_]``."""
        check_is_fitted(self)
        sentences = _tokenize_texts(X)
        out = np.zeros((len(sentences), self.n_features_out_), np.float32)
        for start in range(0, len(sentences), _BLOCK_TEXTS):
            for i, layers in enumerate(self.elmo_.embed(sentences[start : start + _BLOCK_TEXTS]), start):
                if layers.shape[1]:
                    out[i] = self._pool_tokens(layers)
        return out

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names ``elmo0``, ``elmo1`` and so on."""
        check_is_fitted(self)
        return np.array([f"elmo{i}" for i in range(self.n_features_out_)], object)

    def __sklearn_tags__(self) -> Any:
        tags: Any = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        return tags

    def _pool_tokens(self, layers: np.ndarray) -> np.ndarray:
        """Return the vector of one text from its layers ``[L, T, F]``."""
        index: Any = self.layers if _is_integer(self.layers) else -1
        if 0 <= index < len(layers):
            x = layers[index]
        elif self.layers == "all":
            x = np.concatenate(list(layers), -1)  # [T, L F]
        elif self.layers == "average":
            x = layers.mean(0)
        elif self.layers == "top":
            x = layers[-1]
        else:
            raise InputError(f"layers is {self.layers!r}; use top, average, all or 0 to {len(layers) - 1}")
        return np.concatenate([x.mean(0) if name == "mean" else x.max(0) for name in self.pooling.split("+")])

    def _train_model(self, sentences: list[list[str]]) -> Elmo:
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        counts = Counter(token for sentence in sentences for token in sentence)
        if not counts:
            raise InputError("the texts have no tokens to train on; use other texts or a pretrained model")
        vocabulary = Vocabulary.from_counts(counts, self.min_count)
        ids = [vocabulary.ids(sentence) for sentence in sentences]
        offsets, labels = np.cumsum([0, *map(len, ids)]), np.zeros(len(ids), np.int32)
        documents = Documents(np.concatenate(ids), offsets, labels)
        stream = BatchStream(documents, int(self.batch_size), seed, steps_per_call=8)
        model = BiLM(BiLMConfig(embedding=int(self.embedding), cells=int(self.cells)), len(vocabulary))
        epochs = int(self.epochs)
        steps = epochs * stream.steps_per_epoch
        loss_fn, optimizer = bilm_training(model, OptimizerConfig(), steps, int(self.negatives))
        plan = Plan(lambda: TrainState.create(init_params(model, jax.random.key(seed)), optimizer))
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.closing(Run.create(Path(folder) / "run", {}, monitor="loss")) as run:
                state, _ = fit(
                    plan, loss_fn, optimizer, stream, run, epochs=epochs, seed=seed, on_epoch=lambda *_: {}
                )
        return Elmo(model, jax.tree.map(np.asarray, state.params), vocabulary)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _tokenize_texts(texts: Iterable[str] | Iterable[Sequence[str]]) -> list[list[str]]:
    if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
        raise InputError(f"the texts are {reprlib.repr(texts)}; pass a list of strings")
    return [_tokenize_text(text, i) for i, text in enumerate(texts)]


def _tokenize_text(text: Any, i: int) -> list[str]:
    if isinstance(text, str):
        return tokenize(text)
    if isinstance(text, bytes) or not isinstance(text, Iterable):
        raise InputError(f"text {i} is {reprlib.repr(text)}; pass a string or a list of tokens")
    return list(text)
