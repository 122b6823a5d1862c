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
from elmo_jax.data.text import Tokenizer, Vocabulary, tokenize, tokenize_texts
from elmo_jax.elmo import Elmo, Pooling, pool_tokens
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM
from elmo_jax.models.classifier import BiLSTMClassifier
from elmo_jax.models.combiners import make_combiner
from elmo_jax.parallel import Plan
from elmo_jax.predictors import TextClassifier, TextClassifierConfig
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.classifier import ClassifierTraining, FeatureSource
from elmo_jax.training.loop import CLASSIFIER_EPOCHS, PRETRAIN_EPOCHS, fit
from elmo_jax.training.objectives import bilm_features, bilm_training, init_params
from elmo_jax.training.step import TrainState


class _TextEstimator(BaseEstimator):
    """Base class of estimators on texts."""

    def __sklearn_tags__(self) -> Any:
        tags: Any = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        return tags

    def _check_counts(self, *names: str, optional: bool = False) -> None:
        """Raise InputError if an argument is not a positive integer, or None if `optional`."""
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
        standardize: Standardize each feature of each layer over the tokens of the texts of `fit`.
        tokenizer: Function from a text to its tokens; None converts texts like the model's training text.
        embedding: Width of the token vectors of a new model.
        cells: LSTM cells per layer and direction of a new model.
        epochs: Passes over the texts in training.
        batch_size: Texts per batch in training.
        negatives: Negative samples of the sampled softmax in training.
        min_count: Minimum number of occurrences; rarer tokens become unknown to a new model.
        random_state: Random seed of training, a `numpy.random.RandomState`, or None for a new seed each time.

    Attributes:
        elmo_: The model.
        standardizer_: Result of `Elmo.layer_statistics`; None if `standardize` is false.
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
        pooling: Pooling = "mean",
        standardize: bool = True,
        tokenizer: Tokenizer | None = None,
        embedding: int = 150,
        cells: int = 150,
        epochs: int = 5,
        batch_size: int = 32,
        negatives: int = 2048,
        min_count: int = 2,
        random_state: int | np.random.RandomState | None = 0,
    ):
        self.pretrained = pretrained
        self.layers: Literal["top", "average", "all"] | int = layers
        self.pooling: Pooling = pooling
        self.standardize = standardize
        self.tokenizer = tokenizer
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
        elmo = load_elmo(self.pretrained, self.tokenizer)
        layers = 1 + (elmo.model.config if elmo else BiLMConfig()).layers
        pool_tokens(
            np.zeros((layers, 1, 1)), self.layers, self.pooling
        )  # refuses wrong arguments before a model is trained
        sentences = tokenize_texts(X, _tokenizer(elmo, self.tokenizer))
        self.elmo_ = elmo or train_language_model(
            sentences,
            int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max)),
            int(self.epochs),
            config=BiLMConfig(embedding=int(self.embedding), cells=int(self.cells)),
            batch_size=int(self.batch_size),
            negatives=int(self.negatives),
            min_count=self.min_count,
            tokenizer=self.tokenizer,
        )
        self.standardizer_ = self.elmo_.layer_statistics(sentences) if self.standardize else None
        self.n_features_out_ = self._encode([]).shape[1]
        return self

    # Pyright: ignore[reportIncompatibleMethodOverride].
    def fit_transform(self, X: Iterable[str] | Iterable[Sequence[str]], y: Any = None) -> np.ndarray:
        """Call `fit` and `transform` with the same texts, which may be an iterator."""
        texts = list(X) if isinstance(X, Iterator) else X
        return self.fit(texts, y)._encode(texts)

    def transform(self, X: Iterable[str] | Iterable[Sequence[str]]) -> np.ndarray:
        """Return the vectors of N texts, or of N lists of tokens, float32 ``[N, n_features_out_]``."""
        check_is_fitted(self)
        return self._encode(X)

    def _encode(self, X: Iterable[str] | Iterable[Sequence[str]]) -> np.ndarray:
        return self.elmo_.encode(X, self.layers, self.pooling, self.standardizer_)

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """Return the names ``elmo0``, ``elmo1`` and so on."""
        check_is_fitted(self)
        return np.array([f"elmo{i}" for i in range(self.n_features_out_)], object)


class ElmoClassifier(ClassifierMixin, _TextEstimator):
    """Text classifier: a language model, a BiLSTM on its layers, and linear models on word counts.

    `fit` holds out a part of the texts to choose the best epoch and the weights of the models.

    Args:
        pretrained: Language model, as in `ElmoVectorizer`. None trains a new one on the texts of `fit`.
        combiner: Combiner of the layers, a name in `COMBINERS`.
        pretrain_epochs: Epochs of training a language model; None chooses by the number of texts.
        epochs: Epochs of training the classifier; None chooses by the number of texts.
        finetune: Train the language model together with the classifier.
        tokenizer: Function from a text to its tokens; None converts texts like the model's training text.
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
        tokenizer: Tokenizer | None = None,
        validation: float = 0.2,
        random_state: int | np.random.RandomState | None = 0,
    ):
        self.pretrained = pretrained
        self.combiner = combiner
        self.pretrain_epochs = pretrain_epochs
        self.epochs = epochs
        self.finetune = finetune
        self.tokenizer = tokenizer
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
        elmo = load_elmo(self.pretrained, self.tokenizer)
        sentences = tokenize_texts(X, _tokenizer(elmo, self.tokenizer))
        y = column_or_1d(y, warn=True)
        check_consistent_length(sentences, y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2 or np.bincount(labels).min() < 2:
            raise InputError("a classifier needs at least two classes with two texts each; give more texts")
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        elmo = elmo or train_language_model(sentences, seed, self.pretrain_epochs, tokenizer=self.tokenizer)
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
        size = max(len(self.classes_), round(self.validation * len(labels)))  # at least one per class
        parts = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=seed)
        settings = TextClassifierConfig(
            tuple(map(str, self.classes_)),
            "elmo",
            elmo.model.config,
            CombinerConfig(combiner=self.combiner),
            text=elmo.text,
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
        params = jax.tree.map(np.asarray, params)
        model = TextClassifier(settings, params, elmo.vocabulary, bag, tokenizer=self.tokenizer)
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
    tokenizer: Tokenizer | None = None,
) -> Elmo:
    """Train a word-level language model on tokenized texts.

    Args:
        sentences: Tokens of each text.
        seed: Random seed of initialization, data order and dropout.
        epochs: Passes over the texts; None chooses by the number of texts.
        config: Sizes of the model.
        batch_size: Texts per batch.
        negatives: Negative samples of the sampled softmax.
        min_count: Minimum number of occurrences; rarer tokens become unknown.
        tokenizer: Custom function that made the tokens, if any.

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
    return Elmo(model, jax.tree.map(np.asarray, state.params), vocabulary, tokenizer=tokenizer)


@contextlib.contextmanager
def _temporary_run(monitor: str) -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.closing(Run.create(Path(folder) / "run", {}, monitor=monitor)) as run:
            yield run


def load_elmo(
    pretrained: Elmo | str | Path | tuple[str, str] | None, tokenizer: Tokenizer | None = None
) -> Elmo | None:
    """Return the model for an estimator's arguments `pretrained` and `tokenizer`; None trains a new one."""
    if isinstance(pretrained, tuple | list):
        return Elmo.from_bilm(*pretrained, tokenizer=tokenizer)
    if isinstance(pretrained, str | Path):
        return Elmo.from_pretrained(pretrained, tokenizer=tokenizer)
    if pretrained is None or tokenizer is None:
        return pretrained
    return Elmo(pretrained.model, pretrained.params, pretrained.vocabulary, tokenizer=tokenizer)


def _tokenizer(elmo: Elmo | None, custom: Tokenizer | None) -> Tokenizer:
    return custom or (tokenize if elmo is None else elmo.tokenize)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
