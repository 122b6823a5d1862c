"""A scikit-learn transformer from texts to vectors.

Axes: N texts, L layers, F features.
"""

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

_BLOCK = 1024  # texts whose layers are in memory at once


class ElmoVectorizer(TransformerMixin, BaseEstimator):
    """Texts to vectors: layers of a biLM, pooled over each text's tokens.

    Args:
        pretrained: an `Elmo`, a folder for `Elmo.from_pretrained`, or the (options, weights)
            of a model in the official format; None trains a new one on the texts of `fit`.
        layers: "top", "average", "all" (side by side), or the number of one.
        pooling: over the tokens: "mean", "max", or "mean+max" side by side. A text without
            tokens is zeros.
        embedding, cells, epochs, batch_size, negatives, min_count: of the new model, each at
            least 1.
        random_state: its seed, a `numpy.random.RandomState`, or None for another one each time.

    Attributes:
        elmo_: the model.
        n_features_out_: width of the vectors.

    Example:
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
        """Load the model, or train it on these texts.

        Args:
            X: texts, or lists of tokens.
            y: ignored.

        Raises:
            InputError: an argument has no meaning, or the texts hold no token.
        """
        for name in ("embedding", "cells", "epochs", "batch_size", "negatives", "min_count"):
            value = getattr(self, name)
            if not _is_whole(value) or value < 1:
                raise InputError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.pooling not in ("mean", "max", "mean+max"):
            raise InputError(f"pooling must be mean, max or mean+max, not {self.pooling!r}")
        if self.pretrained is None:
            self.elmo_ = self._train(_tokens(X))
        elif isinstance(self.pretrained, Elmo):
            self.elmo_ = self.pretrained
        elif isinstance(self.pretrained, tuple | list):
            self.elmo_ = Elmo.from_bilm(*self.pretrained)
        else:
            self.elmo_ = Elmo.from_pretrained(self.pretrained)
        self.n_features_out_ = self._pool(np.zeros(self.elmo_.shape(1), np.float32)).shape[0]
        return self

    def fit_transform(self, X: Iterable[str] | Iterable[Sequence[str]], y: Any = None) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """`fit`, then `transform`; texts that can be read but once are read once."""
        sentences = _tokens(X)
        return self.fit(sentences, y).transform(sentences)

    def transform(self, X: Iterable[str] | Iterable[Sequence[str]]) -> np.ndarray:
        """Texts, or lists of tokens, to float32 ``[N, n_features_out_]``."""
        check_is_fitted(self)
        sentences = _tokens(X)
        out = np.zeros((len(sentences), self.n_features_out_), np.float32)
        for start in range(0, len(sentences), _BLOCK):
            for i, layers in enumerate(self.elmo_.embed(sentences[start : start + _BLOCK]), start):
                if layers.shape[1]:
                    out[i] = self._pool(layers)
        return out

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """``elmo0``, ``elmo1``, ..."""
        check_is_fitted(self)
        return np.array([f"elmo{i}" for i in range(self.n_features_out_)], object)

    def __sklearn_tags__(self) -> Any:
        tags: Any = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        return tags

    def _pool(self, layers: np.ndarray) -> np.ndarray:
        """``[L, tokens, F]`` to one vector."""
        number: Any = self.layers if _is_whole(self.layers) else -1
        if 0 <= number < len(layers):
            x = layers[number]
        elif self.layers == "all":
            x = np.concatenate(list(layers), -1)  # [tokens, L F]
        elif self.layers == "average":
            x = layers.mean(0)
        elif self.layers == "top":
            x = layers[-1]
        else:
            raise InputError(
                f"layers must be top, average, all or a number below {len(layers)}, not {self.layers!r}"
            )
        pooled = {"mean": [x.mean(0)], "max": [x.max(0)], "mean+max": [x.mean(0), x.max(0)]}
        return np.concatenate(pooled[self.pooling])

    def _train(self, sentences: list[list[str]]) -> Elmo:
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        counts = Counter(token for sentence in sentences for token in sentence)
        if not counts:
            raise InputError("the texts hold no token to train on; give others, or a pretrained model")
        vocabulary = Vocabulary.from_counts(counts, self.min_count)
        ids = [vocabulary.ids(sentence) for sentence in sentences]
        offsets = np.cumsum([0, *map(len, ids)])
        documents = Documents(np.concatenate(ids), offsets, np.zeros(len(ids), np.int32))
        stream = BatchStream(documents, int(self.batch_size), seed, steps_per_call=8)
        model = BiLM(BiLMConfig(embedding=int(self.embedding), cells=int(self.cells)), len(vocabulary))
        steps = int(self.epochs) * stream.steps_per_epoch
        task, optimizer = bilm_training(model, OptimizerConfig(), steps, int(self.negatives))
        key = jax.random.key(seed)
        with tempfile.TemporaryDirectory() as folder:
            with contextlib.closing(Run.create(Path(folder) / "run", {}, monitor="loss")) as run:
                state, _ = fit(
                    Plan(lambda: TrainState.create(init_params(model, key), optimizer)),
                    task,
                    optimizer,
                    stream,
                    run,
                    epochs=int(self.epochs),
                    seed=seed,
                    on_epoch=lambda state, sums: {},
                )
        return Elmo(model, jax.tree.map(np.asarray, state.params), vocabulary)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _tokens(texts: Iterable[str] | Iterable[Sequence[str]]) -> list[list[str]]:
    if isinstance(texts, str | bytes):
        raise InputError("the texts are one string; give a list of strings")
    if not isinstance(texts, Iterable):
        raise InputError(f"the texts are {reprlib.repr(texts)}; give a list of strings")
    return [_tokens_of(text, i) for i, text in enumerate(texts)]


def _tokens_of(text: Any, i: int) -> list[str]:
    if isinstance(text, str):
        return tokenize(text)
    if isinstance(text, bytes) or not isinstance(text, Iterable):
        raise InputError(f"text {i} is {reprlib.repr(text)}; give a string, or a list of its tokens")
    return list(text)
