"""Trained text classifier: load, save, and predict the classes of new texts."""

import reprlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from msgspec import Meta

from elmo_jax.baselines.bag_of_words import BagOfWords, log_softmax
from elmo_jax.config import BiLMConfig, ClassifierConfig, CombinerConfig, Config, Count, Kernel, TextConfig
from elmo_jax.data.batching import Batch, Documents
from elmo_jax.data.text import Tokenizer, Vocabulary, make_tokenizer, tokenize_texts
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM
from elmo_jax.models.classifier import BiLSTMClassifier, classify, static_features
from elmo_jax.models.combiners import OneLayer, make_combiner
from elmo_jax.pretrained.folder import CLASSIFIER, model_folder, read_folder, write_folder
from elmo_jax.storage.files import read_config, structure
from elmo_jax.training.checkpoint import VOCABULARY
from elmo_jax.training.evaluate import classification, confusion
from elmo_jax.training.objectives import bilm_features

_WORDS = "words.txt"  # file with the vocabulary of the bag of words
_ROWS = 32  # documents per batch
# Padded lengths. A text's padded length depends on its own length alone, so other texts do not affect its
# prediction.
_BOUNDS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 408, 512)


@dataclass(frozen=True)
class TextClassifierConfig(Config):
    """Classes and sizes of a `TextClassifier`."""

    classes: tuple[str, ...]
    """Names of the classes."""
    features: Literal["elmo", "svd", "sgns", "tfidf"] = "elmo"
    """Token features of the network; tfidf has no network."""
    bilm: BiLMConfig | None = None
    """Language model."""
    combiner: CombinerConfig = CombinerConfig()
    """Combiner of the layers."""
    classifier: ClassifierConfig = ClassifierConfig()
    """Classifier network."""
    max_length: Count = 400
    """Maximum number of tokens of a text that the network reads."""
    text: TextConfig = TextConfig()
    """Conversion of raw text into tokens."""
    weights: Annotated[tuple[float, ...], Meta(min_length=3, max_length=3)] = (1.0, 0.0, 0.0)
    """Weights of the log-probabilities of the network, logistic regression and naive Bayes."""


class TextClassifier:
    """A trained classifier with its language model or word vectors, vocabulary and classes.

    Args:
        config: Classes and sizes.
        params: Parameters of the network, as in `classify`; empty for "tfidf".
        vocabulary: Vocabulary of the network; None for a language model that reads characters.
        bag: Linear models on word counts, or None.
        kernel: LSTM kernel, see `LSTM.choose`.
        tokenizer: Function from a text to its tokens, used instead of `config.text`; it is not saved.

    Examples:
        >>> vocabulary = Vocabulary.from_counts({"bank": 2, "goal": 1})
        >>> texts = Documents.of([["bank"], ["goal"]], vocabulary, labels=[0, 1])
        >>> config = TextClassifierConfig(("business", "sports"), "tfidf", weights=(0.0, 1.0, 0.0))
        >>> model = TextClassifier(config, {}, vocabulary, BagOfWords.fit(texts, vocabulary, classes=2))
        >>> model.predict(["A late goal .", "the bank"]).tolist()
        ['sports', 'business']
    """

    def __init__(
        self,
        config: TextClassifierConfig,
        params: Any,
        vocabulary: Vocabulary | None,
        bag: BagOfWords | None,
        kernel: Kernel = "auto",
        tokenizer: Tokenizer | None = None,
    ):
        if tokenizer is not None:
            config = replace(config, text=TextConfig("custom", lowercase=False))
        self.config, self.params, self.vocabulary, self.bag = config, params, vocabulary, bag
        self.classes = config.classes
        self._kernel: Kernel = kernel
        self._tokenizer, self._split = tokenizer, make_tokenizer(config.text, tokenizer)
        model = BiLSTMClassifier(config.classifier, len(config.classes), kernel)
        bilm = self._language_model()
        features = static_features if bilm is None else bilm_features(bilm)
        combiner = OneLayer() if bilm is None else make_combiner(config.combiner)

        @jax.jit
        def compute_logits(params: Any, batch: Batch) -> Array:
            return classify(params, batch, None, features, combiner, model)

        self._compute_logits = compute_logits

    def __reduce__(self):
        """Pickle the classifier without its compiled functions."""
        params = jax.tree.map(np.asarray, self.params)
        return type(self), (
            self.config,
            params,
            self.vocabulary,
            self.bag,
            self._kernel,
            self._tokenizer,
        )

    def __repr__(self) -> str:
        return f"TextClassifier({self.config.features}, classes={reprlib.repr(list(self.classes))})"

    def _language_model(self) -> BiLM | None:
        bilm = self.config.bilm
        return None if bilm is None else BiLM(bilm, len(self.vocabulary or ()), self._kernel)

    @property
    def elmo(self) -> Elmo:
        """The language model; fine-tuned if it was trained together with the classifier.

        Raises:
            InputError: The classifier uses word vectors or word counts.
        """
        model = self._language_model()
        if model is None:
            raise InputError(f"a classifier on {self.config.features} features has no language model")
        return Elmo(model, self.params["bilm"], self.vocabulary, self.config.text, self._tokenizer)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, kernel: Kernel = "auto", tokenizer: Tokenizer | None = None
    ) -> "TextClassifier":
        """Load a finished run of the downstream command, or a folder that `save_pretrained` wrote.

        Args:
            path: Folder of the run or of the saved classifier.
            kernel: LSTM kernel, see `LSTM.choose`.
            tokenizer: See `TextClassifier`; None converts raw text like the training text.

        Raises:
            InputError: The folder holds no classifier, or its files are damaged or inconsistent.
        """
        path = model_folder(Path(path))
        if CLASSIFIER not in read_config(path):
            raise InputError(
                f"{path}: holds no text classifier; give a finished run of downstream or a saved classifier"
            )
        saved, arrays = read_folder(path)
        config = structure(TextClassifierConfig, saved[CLASSIFIER], f"{path}: {CLASSIFIER}")
        names = {VOCABULARY: None, _WORDS: None} | {
            name: Vocabulary.load(path / name, exact=True)
            for name in (VOCABULARY, _WORDS)
            if name in saved["files"]
        }
        tree: dict[str, Any] = unflatten_dict(arrays, sep="/")
        bag, words = tree.pop("bag", None), names[_WORDS]
        if bag is not None:
            assert words is not None
            bag = BagOfWords(words, bag["bigrams"], bag["idf"], bag["weights"], bag["bias"])
        if "classifier" in tree:  # a combiner without parameters saves no arrays
            tree = {"combiner": {}} | tree
        return cls(config, tree, names[VOCABULARY], bag, kernel, tokenizer)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the classifier with its language model and vocabularies into a folder.

        Raises:
            InputError: The folder holds a run or cannot be written, or a word holds a line break.
        """
        for vocabulary in (self.vocabulary, self.bag and self.bag.vocabulary):
            for word in vocabulary.tokens if vocabulary else ():
                if "\n" in word or "\r" in word:
                    raise InputError(f"the word {word!r} holds a line break; remove it from the vocabulary")
        tree, texts = dict(self.params), {}
        if self.vocabulary is not None:
            texts[VOCABULARY] = self.vocabulary.text
        if self.bag is not None:
            texts[_WORDS] = self.bag.vocabulary.text
            tree["bag"] = {name: getattr(self.bag, name) for name in ("bigrams", "idf", "weights", "bias")}
        write_folder(Path(path), {CLASSIFIER: asdict(self.config)}, flatten_dict(tree, sep="/"), texts)

    def predict(self, texts: Iterable[str] | Iterable[Sequence[str]]) -> np.ndarray:
        """Return the name of the most probable class of each text, ``[N]``.

        Args:
            texts: N texts, or N lists of tokens.
        """
        return np.array(self.classes, object)[self.predict_log_proba(texts).argmax(-1)]

    def predict_proba(self, texts: Iterable[str] | Iterable[Sequence[str]]) -> np.ndarray:
        """Return the probability of each class, in the order of `classes`, float64 ``[N, C]``."""
        return np.exp(self.predict_log_proba(texts))

    def predict_log_proba(self, texts: Iterable[str] | Iterable[Sequence[str]]) -> np.ndarray:
        """Return the log-probability of each class, in the order of `classes`, float64 ``[N, C]``.

        Raises:
            InputError: The texts are not a list of strings or of lists of tokens.
        """
        sentences = tokenize_texts(texts, self._split)
        parts = []
        if self.params:
            parts.append(self.network_log_probabilities(self._documents(sentences)))
        if self.bag is not None:
            parts.extend(self.bag.log_probabilities(Documents.of(sentences, self.bag.vocabulary)))
        return self.mix(np.stack(parts))

    def evaluate(
        self, texts: Iterable[str] | Iterable[Sequence[str]], labels: Sequence[str]
    ) -> dict[str, Any]:
        """Return the figures of `elmo_jax.training.evaluate.classification` for labelled texts.

        Args:
            texts: N texts, or N lists of tokens.
            labels: Name of the class of each text.

        Raises:
            InputError: A label is not one of the classes, or the numbers of texts and labels differ.
        """
        if isinstance(labels, str) or not isinstance(labels, Iterable):
            raise InputError(f"the labels are {reprlib.repr(labels)}; pass a list of class names")
        labels = [str(label) for label in labels]
        number = {name: i for i, name in enumerate(self.classes)}
        unknown = [label for label in labels if label not in number]
        if unknown:
            raise InputError(f"label {unknown[0]!r} is not one of the classes {', '.join(self.classes)}")
        predicted = self.predict_log_proba(texts).argmax(-1)
        if not labels:
            raise InputError("there are no texts to evaluate; pass some")
        if len(predicted) != len(labels):
            raise InputError(f"{len(predicted)} texts have {len(labels)} labels; give one for each text")
        true = np.array([number[label] for label in labels])
        return classification(confusion(true, predicted, len(self.classes)))

    def with_weights(self, weights: Sequence[float]) -> "TextClassifier":
        """Return a classifier with the same models but other mixture weights."""
        if len(weights) != 3 or not all(0 <= weight < np.inf for weight in weights):
            raise InputError(f"the weights are {weights}; pass three finite numbers of at least 0")
        config = replace(self.config, weights=tuple(float(weight) for weight in weights))
        return TextClassifier(config, self.params, self.vocabulary, self.bag, self._kernel, self._tokenizer)

    def mix(self, log_probabilities: np.ndarray) -> np.ndarray:
        """Return log_softmax(Σ_m w_m log p_m) of the models that the classifier has.

        Args:
            log_probabilities: ``[M, N, C]`` of the network, if there is one, followed by those of `bag`.
        """
        has_model = [bool(self.params)] + [self.bag is not None] * 2
        weights = [w for w, present in zip(self.config.weights, has_model, strict=True) if present]
        return log_softmax(np.tensordot(weights, log_probabilities, 1))

    def network_log_probabilities(self, documents: Documents) -> np.ndarray:
        """Return the log-probabilities of the network, float64 ``[N, C]``.

        Args:
            documents: Documents with the token ids of `vocabulary`.
        """
        logits = np.zeros((len(documents), len(self.classes)))
        pending: deque[tuple[np.ndarray, Array]] = deque()

        def finish() -> None:
            indices, values = pending.popleft()
            logits[indices] = np.asarray(values)[: len(indices)]

        for indices, batch in _batches(documents):
            pending.append((indices, self._compute_logits(self.params, batch)))
            if len(pending) > 2:  # a short queue keeps the device busy and the memory constant
                finish()
        while pending:
            finish()
        return log_softmax(logits)

    def _documents(self, sentences: list[list[str]]) -> Documents:
        bilm, vocabulary = self.config.bilm, self.vocabulary or Vocabulary.from_counts({})
        with_characters = bilm is not None and bilm.input == "characters"
        return Documents.of(
            sentences, vocabulary, with_characters=with_characters, max_length=self.config.max_length
        )


def _batches(documents: Documents) -> Iterator[tuple[np.ndarray, Batch]]:
    """Yield the indices and the batch of groups of documents, short documents first."""
    steps = documents.lengths + 2
    last = _BOUNDS[-1]
    bounds = np.array([*_BOUNDS, *range(2 * last, int(steps.max(initial=0)) + last, last)])
    bucket = np.searchsorted(bounds, steps)
    for i in np.unique(bucket).tolist():
        members = np.flatnonzero(bucket == i)
        for start in range(0, len(members), _ROWS):
            indices = members[start : start + _ROWS]
            padded = np.pad(indices, (0, _ROWS - len(indices)), constant_values=-1)
            batch = documents.batch(padded, int(bounds[i]), group_scale=1)
            yield indices, jax.tree.map(jnp.asarray, batch)
