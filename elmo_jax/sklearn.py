"""Scikit-learn estimators: a transformer from texts to vectors, and a text classifier."""

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.validation import check_is_fitted

from elmo_jax.baselines.bag_of_words import BagOfWords, fit_mixture_weights
from elmo_jax.config import BiLMConfig, CombinerConfig, OptimizerConfig
from elmo_jax.data.batching import BatchStream, Documents
from elmo_jax.data.text import Vocabulary
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM
from elmo_jax.models.classifier import BiLSTMClassifier
from elmo_jax.models.combiners import make_combiner
from elmo_jax.parallel import Plan
from elmo_jax.predictors import TextClassifier, TextClassifierConfig, tokenize_texts
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.classifier import ClassifierTraining, FeatureSource
from elmo_jax.training.loop import CLASSIFIER_EPOCHS, PRETRAIN_EPOCHS, fit
from elmo_jax.training.objectives import bilm_features, bilm_training, init_params
from elmo_jax.training.step import TrainState

_BLOCK_TEXTS = 1024  # bounds the memory for layers


class _TextEstimator(BaseEstimator):
    """Estimator whose input is texts."""

    def __sklearn_tags__(self) -> Any:
        tags: Any = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        return tags

    def _check_counts(self, *names: str, optional: bool = False) -> None:
        """Raise InputError for an argument that is no positive integer, nor None if it is optional."""
        for name in names:
            value = getattr(self, name)
            if not (optional and value is None) and (not _is_integer(value) or value < 1):
                remedy = "use an integer of at least 1" + ", or None" * optional
                raise InputError(f"{name} is {value!r}; {remedy}")


class ElmoVectorizer(TransformerMixin, _TextEstimator):
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
        self._check_counts("embedding", "cells", "epochs", "batch_size", "negatives", "min_count")
        if self.pooling not in ("mean", "max", "mean+max"):
            raise InputError(f"pooling is {self.pooling!r}; use mean, max or mean+max")
        self.elmo_ = load_elmo(self.pretrained) or train_language_model(
            tokenize_texts(X),
            int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max)),
            int(self.epochs),
            config=BiLMConfig(embedding=int(self.embedding), cells=int(self.cells)),
            batch_size=int(self.batch_size),
            negatives=int(self.negatives),
            min_count=self.min_count,
        )
        self.n_features_out_ = self._pool_tokens(np.zeros(self.elmo_.shape(1), np.float32)).shape[0]
        return self

    def fit_transform(self, X: Iterable[str] | Iterable[Sequence[str]], y: Any = None) -> np.ndarray:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Call `fit` and `transform` with the same texts, which may be an iterator."""
        sentences = tokenize_texts(X)
        return self.fit(sentences, y)._compute_vectors(sentences)

    def transform(self, X: Iterable[str] | Iterable[Sequence[str]]) -> np.ndarray:
        """Return the vectors of N texts, or of N lists of tokens, float32 ``[N, n_features_out_]``."""
        check_is_fitted(self)
        return self._compute_vectors(tokenize_texts(X))

    def _compute_vectors(self, sentences: list[list[str]]) -> np.ndarray:
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


class ElmoClassifier(ClassifierMixin, _TextEstimator):
    """Text classifier: a language model, a BiLSTM on its layers, and linear models on word counts.

    It holds out a part of the texts, on which it chooses the best epoch and the weights of its models.

    Args:
        pretrained: Language model, as in `ElmoVectorizer`. None trains a new one on the texts of `fit`.
        combiner: Combiner of the layers, a name in `COMBINERS`.
        pretrain_epochs: Passes over the texts in training a language model; None chooses by their number.
        epochs: Passes over the texts in training the classifier; None chooses by their number.
        finetune: Train the language model together with the classifier.
        validation: Fraction of the texts that is held out, stratified by class.
        random_state: Random seed, a `numpy.random.RandomState`, or None for a new seed each time.

    Attributes:
        classes_: Sorted labels.
        model_: The `TextClassifier`, which can be saved.

    Examples:
        >>> texts, labels = ["the bank rose", "the team won"] * 8, ["business", "sports"] * 8
        >>> elmo = ElmoVectorizer(embedding=8, cells=8, epochs=1, min_count=1).fit(texts).elmo_
        >>> model = ElmoClassifier(elmo, epochs=1).fit(texts, labels)
        >>> model.predict(["a bank rose", "a team won"]).tolist()
        ['business', 'sports']
    """

    def __init__(
        self,
        pretrained: Elmo | str | Path | tuple[str, str] | None = None,
        *,
        combiner: str = "trainable",
        pretrain_epochs: int | None = None,
        epochs: int | None = None,
        finetune: bool = False,
        validation: float = 0.2,
        random_state: int | np.random.RandomState | None = 0,
    ):
        self.pretrained = pretrained
        self.combiner = combiner
        self.pretrain_epochs = pretrain_epochs
        self.epochs = epochs
        self.finetune = finetune
        self.validation = validation
        self.random_state = random_state

    def fit(self, X: Iterable[str] | Iterable[Sequence[str]], y: Any) -> "ElmoClassifier":
        """Train on texts and their labels.

        Args:
            X: N texts, or N lists of tokens.
            y: N labels of at least two classes, with at least two texts each.

        Raises:
            InputError: An argument is invalid, or there are too few texts or classes.
        """
        self._check_counts("pretrain_epochs", "epochs", optional=True)
        if not 0 < self.validation < 1:
            raise InputError(f"validation is {self.validation!r}; use a fraction between 0 and 1")
        sentences, y = tokenize_texts(X), column_or_1d(y, warn=True)
        check_consistent_length(sentences, y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2 or np.bincount(labels).min() < 2:
            raise InputError("a classifier needs two classes with two texts each, or more; give more texts")
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        elmo = load_elmo(self.pretrained) or train_language_model(sentences, seed, self.pretrain_epochs)
        self.model_ = self._train_classifier(elmo, sentences, labels, seed)
        return self

    def predict(self, X: Iterable[str] | Iterable[Sequence[str]]) -> np.ndarray:
        """Return the most probable label of N texts, or of N lists of tokens."""
        check_is_fitted(self)
        return self.classes_[self.predict_proba(X).argmax(-1)]

    def predict_proba(self, X: Iterable[str] | Iterable[Sequence[str]]) -> np.ndarray:
        """Return the probability of each class, in the order of `classes_`, float64 ``[N, C]``."""
        check_is_fitted(self)
        return self.model_.predict_proba(X)

    def _train_classifier(
        self, elmo: Elmo, sentences: list[list[str]], labels: np.ndarray, seed: int
    ) -> TextClassifier:
        size = max(len(self.classes_), round(self.validation * len(labels)))  # one text a class, or more
        parts = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=seed)
        settings = TextClassifierConfig(
            tuple(map(str, self.classes_)), "elmo", elmo.model.config, CombinerConfig(combiner=self.combiner)
        )
        words = Vocabulary.from_counts(Counter(token for i in parts[0] for token in sentences[i]))

        def documents(part: Any, vocabulary: Vocabulary | None, **options: Any) -> Documents:
            known = vocabulary or Vocabulary.from_counts({})
            return Documents.of([sentences[i] for i in part], known, labels[part], **options)

        options = {
            "with_characters": elmo.model.config.input == "characters",
            "max_length": settings.max_length,
        }
        train, held_out = (documents(part, elmo.vocabulary, **options) for part in parts)
        stream = BatchStream(train, 32, seed, steps_per_call=8)
        layers, _, width = elmo.shape(0)
        training = ClassifierTraining(
            FeatureSource(bilm_features(elmo.model, self.finetune), {"bilm": elmo.params}, (layers, width)),
            make_combiner(settings.combiner),
            BiLSTMClassifier(settings.classifier, len(self.classes_)),
            OptimizerConfig(learning_rate=2e-3, clip_norm=5.0),
            self.epochs or CLASSIFIER_EPOCHS.epochs(stream.steps_per_epoch),
            seed,
            self.finetune,
        )
        with _temporary_run("val_loss") as run:
            _, params = training.run(stream, held_out, run)
        bag = BagOfWords.fit(documents(parts[0], words), words, len(self.classes_))
        model = TextClassifier(settings, jax.tree.map(np.asarray, params), elmo.vocabulary, bag)
        network = model.network_log_probabilities(held_out)
        each = np.stack([network, *bag.log_probabilities(documents(parts[1], words))])
        return model.with_weights(fit_mixture_weights(each, labels[parts[1]]).tolist())


def train_language_model(
    sentences: list[list[str]],
    seed: int,
    epochs: int | None = None,
    *,
    config: BiLMConfig = BiLMConfig(),
    batch_size: int = 32,
    negatives: int = 2048,
    min_count: int = 2,
) -> Elmo:
    """Train a language model of words on tokenized texts.

    Raises:
        InputError: There is no token to train on.
    """
    counts = Counter(token for sentence in sentences for token in sentence)
    if not counts:
        raise InputError("the texts have no tokens to train on; use other texts or a pretrained model")
    vocabulary = Vocabulary.from_counts(counts, min_count)
    stream = BatchStream(Documents.of(sentences, vocabulary), batch_size, seed, steps_per_call=8)
    model = BiLM(config, len(vocabulary))
    epochs = epochs or PRETRAIN_EPOCHS.epochs(stream.steps_per_epoch)
    loss_fn, optimizer = bilm_training(model, OptimizerConfig(), epochs * stream.steps_per_epoch, negatives)
    plan = Plan(lambda: TrainState.create(init_params(model, jax.random.key(seed)), optimizer))
    with _temporary_run("loss") as run:
        state, _ = fit(
            plan, loss_fn, optimizer, stream, run, epochs=epochs, seed=seed, on_epoch=lambda *_: {}
        )
    return Elmo(model, jax.tree.map(np.asarray, state.params), vocabulary)


@contextlib.contextmanager
def _temporary_run(monitor: str) -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(Run.create(Path(folder) / "run", {}, monitor=monitor)) as run:
            yield run


def load_elmo(pretrained: Elmo | str | Path | tuple[str, str] | None) -> Elmo | None:
    """Return the model of the argument `pretrained` of an estimator."""
    if pretrained is None or isinstance(pretrained, Elmo):
        return pretrained
    if isinstance(pretrained, tuple | list):
        return Elmo.from_bilm(*pretrained)
    return Elmo.from_pretrained(pretrained)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
