"""Pretrained ELMo: load and save a bidirectional language model, embed sentences, score tokens.

Sentences of any number and length are read in windows of a few static shapes. Each direction reads a
sentence from its own end and carries its LSTM state from window to window. Deep contextualized word
representations, Peters et al. 2018, https://arxiv.org/abs/1802.05365.
"""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from elmo_jax.config import Dtype, Kernel, TextConfig
from elmo_jax.data.batching import DIRECTIONS
from elmo_jax.data.characters import character_ids
from elmo_jax.data.text import BOS, EOS, SPECIAL, UNK, Tokenizer, Vocabulary, make_tokenizer, tokenize_texts
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM, lstm_layer, zero_state
from elmo_jax.ops.lstm import State
from elmo_jax.pretrained.bilm_format import read_bilm, read_softmax, write_bilm, write_softmax
from elmo_jax.pretrained.folder import load_folder, save_folder
from elmo_jax.training.classifier import feature_standardizer

# Window widths and batch sizes are rounded up to these, so that few shapes are compiled.
_WINDOWS = (16, 24, 32, 48, 64, 96, 128)
_ROWS = (1, 4, 16, 64)
_BATCH_TOKENS = 2048
_CNN_WORDS = 256  # words in one call of the character CNN
_MAX_WORDS = 1 << 15  # cached word vectors
_BLOCK_TEXTS = 1024  # texts embedded at a time, which bounds the memory for their layers

Pooling = Literal["mean", "max", "mean+max"]


class Elmo:
    """A bidirectional language model with its parameters and vocabulary.

    Args:
        model: Language model.
        params: Parameters of the model.
        vocabulary: Vocabulary; None for a model that reads characters and has no softmax.
        text: Conversion of raw text into tokens.
        tokenizer: Function from a text to its tokens, used instead of `text`; it is not saved.

    Examples:
        >>> from elmo_jax.config import BiLMConfig
        >>> from elmo_jax.data.batching import Batch
        >>> vocabulary = Vocabulary.from_counts({"the": 2, "bank": 1})
        >>> model = BiLM(BiLMConfig(embedding=4, cells=4), len(vocabulary))
        >>> params = model.init(jax.random.key(0), Batch.of([[4, 5]]))["params"]
        >>> elmo = Elmo(model, params, vocabulary)
        >>> [layers.shape for layers in elmo.embed([["the", "bank"], ["bank"]])]
        [(3, 2, 8), (3, 1, 8)]
        >>> [nll.shape for nll in elmo.surprisal([["the", "bank"]])]
        [(2, 3)]
        >>> elmo.tokenize("The bank!"), elmo.encode(["The bank!", "banks"]).shape
        (['the', 'bank', '!'], (2, 8))
    """

    def __init__(
        self,
        model: BiLM,
        params: Any,
        vocabulary: Vocabulary | None,
        text: TextConfig = TextConfig(),
        tokenizer: Tokenizer | None = None,
    ):
        lstm_layer(model.config, model.kernel).choose()  # raises InputError for an unsupported kernel
        self.model, self.params, self.vocabulary = model, params, vocabulary
        self.text = text if tokenizer is None else TextConfig("custom", lowercase=False)
        self._tokenizer, self._split = tokenizer, make_tokenizer(text, tokenizer)
        self._words = _WordTable(model, params, vocabulary)
        self._window = _WINDOWS[-1]
        self._state: tuple[State, ...] | None = None  # the LSTM states after the last stateful call

        def contextualize(params: Any, x: Array, lengths: Array, state: Any) -> tuple[Array, Any]:
            x = x.astype(model.config.dtype)
            out: Any = model.apply({"params": params}, x, lengths, state, method="contextualize")
            return jnp.stack([h.astype(jnp.float32) for h in out[0]]), out[1]

        def nll(params: Any, h: Array, targets: Array) -> Any:
            return model.apply({"params": params}, h, targets, method="surprisal")

        # The word table grows. A separate lookup avoids recompiling the LSTM when it does.
        self._look_up = jax.jit(lambda table, rows: jnp.take(table, rows, axis=0))
        self._contextualize = _jit_precise(contextualize, donate_argnums=3)
        self._nll = _jit_precise(nll)

    def __reduce__(self):
        """Pickle the model without its compiled functions, as scikit-learn pipelines need."""
        params = jax.tree.map(np.asarray, self.params)
        return type(self), (self.model, params, self.vocabulary, self.text, self._tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        dtype: Dtype | None = None,
        kernel: Kernel = "auto",
        tokenizer: Tokenizer | None = None,
    ) -> "Elmo":
        """Load the best epoch of a pre-training run, or a folder that `save_pretrained` wrote.

        Args:
            path: Folder of the run or of the saved model.
            dtype: Matmul dtype, "float32" or "bfloat16"; None keeps the dtype of the training.
            kernel: LSTM kernel, see `LSTM.choose`.
            tokenizer: See `Elmo`; None converts raw text like the training text.

        Raises:
            InputError: The folder holds no language model, or its files are damaged or inconsistent.
        """
        model, params, vocabulary, text = load_folder(Path(path), kernel)
        return cls(_with_dtype(model, dtype), params, vocabulary, text, tokenizer)

    @classmethod
    def from_bilm(
        cls,
        options: str | Path,
        weights: str | Path,
        dtype: Dtype | None = None,
        kernel: Kernel = "auto",
        tokenizer: Tokenizer | None = None,
    ) -> "Elmo":
        """Load a model in the official format of bilm-tf and AllenNLP.

        The format has no softmax and no vocabulary; both are loaded if `save_bilm` wrote them beside the
        weights. Official models are cased, so raw text is not converted to lower case.

        Args:
            options: JSON file, may end in ``.gz``.
            weights: HDF5 file, may end in ``.gz``.
            dtype: Matmul dtype, "float32" (default) or "bfloat16".
            kernel: LSTM kernel, see `LSTM.choose`.
            tokenizer: See `Elmo`.

        Raises:
            InputError: A file is missing or damaged, the files belong to different models, or the kernel
                does not support the layers.
        """
        config, flat, text = read_bilm(options, weights)
        vocabulary = None
        softmax_path = _softmax_path(weights)
        if softmax_path.exists():
            vocabulary, softmax = read_softmax(softmax_path, config.embedding)
            flat |= softmax
        model = _with_dtype(BiLM(config, len(vocabulary or ()), kernel), dtype)
        return cls(model, unflatten_dict(flat, sep="/"), vocabulary, text, tokenizer)

    def save_bilm(self, options: str | Path, weights: str | Path) -> None:
        """Write the official format, such as ``options.json`` and ``weights.hdf5``.

        The softmax and the vocabulary go into a third file, ``weights.softmax.hdf5``, which bilm-tf and
        AllenNLP ignore.

        Raises:
            InputError: The model reads words, which the format cannot hold, or a file cannot be written.
        """
        flat = flatten_dict(self.params, sep="/")
        write_bilm(self.model.config, flat, options, weights, self.text)
        if self.vocabulary is not None:
            write_softmax(_softmax_path(weights), self.vocabulary, flat)
        else:  # the softmax of an older model must not be loaded with these weights
            _softmax_path(weights).unlink(missing_ok=True)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``vocab.txt`` into a folder.

        Raises:
            InputError: The folder holds a run, or cannot be written.
        """
        save_folder(Path(path), self.model, self.params, self.vocabulary, self.text)

    def __repr__(self) -> str:
        c, words = self.model.config, len(self.vocabulary or ())
        return (
            f"Elmo(input={c.input!r}, layers={c.layers}, cells={c.cells}, features={2 * c.embedding}, "
            f"vocabulary={words:,})"
        )

    def shape(self, tokens: int) -> tuple[int, int, int]:
        """Return ``(L, tokens, F)``, the shape of the layers of a sentence."""
        return self.model.config.layers + 1, tokens, 2 * self.model.config.embedding

    def embed(
        self, sentences: Sequence[Sequence[str]], stateful: bool = False, batch_tokens: int = _BATCH_TOKENS
    ) -> list[np.ndarray]:
        """Return the vectors of every token from all layers.

        Without `stateful`, the vectors of a sentence depend on its own tokens alone, not on other sentences
        or earlier calls. The model also reads ``<S>`` and ``</S>``, but their vectors are left out.

        Args:
            sentences: Tokens of each sentence; `tokenize` makes them from raw text.
            stateful: Start sentence k from the LSTM state after sentence k of the last stateful call, in
                both directions, as bilm-tf and AllenNLP do. All sentences then form one batch.
            batch_tokens: Approximate number of sentences times tokens in a batch.

        Returns:
            float32 ``[L, tokens, F]`` for each sentence. Layer 0 is the token vector, the others are the
            LSTM layers. The first half of F is the forward direction, the second the backward one.

        Raises:
            InputError: A sentence is not a list of strings.
        """
        _check_sentences(sentences)
        if batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, not {batch_tokens}")
        layers, _, width = self.shape(0)
        out = [np.empty((layers, len(s), width), np.float32) for s in sentences]
        if stateful and len(sentences):
            state = self._first_state(len(sentences))
            self._state = self._embed_batch(sentences, out, batch_tokens, state)
            return out
        for group in self._group_by_length(sentences, batch_tokens):
            self._embed_batch([sentences[i] for i in group], [out[i] for i in group], batch_tokens)
        return out

    def tokenize(self, text: str) -> list[str]:
        """Split a raw text into tokens like the training text.

        Raises:
            InputError: The model was trained with a custom tokenizer, which was not passed.
        """
        return self._split(text)

    def encode(
        self,
        texts: Iterable[str] | Iterable[Sequence[str]],
        layers: Literal["top", "average", "all"] | int = "average",
        pooling: Pooling = "mean",
        standardizer: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Return one vector per text.

        Args:
            texts: N texts, or N lists of tokens.
            layers: "top", "average", "all" (concatenated), or the index of a layer.
            pooling: "mean", "max" or "mean+max" (concatenated) over the tokens; without tokens, zeros.
            standardizer: Result of `layer_statistics`, used to standardize each feature before pooling.

        Returns:
            float32 ``[N, F]``; F is multiplied by the number of layers with "all", and doubled by "mean+max".

        Raises:
            InputError: An argument is invalid.
        """
        sentences = tokenize_texts(texts, self.tokenize)
        width = len(pool_tokens(np.zeros(self.shape(1), np.float32), layers, pooling))
        out = np.zeros((len(sentences), width), np.float32)
        for start in range(0, len(sentences), _BLOCK_TEXTS):
            for i, x in enumerate(self.embed(sentences[start : start + _BLOCK_TEXTS]), start):
                if standardizer is not None:
                    x = (x - standardizer["mean"][:, None]) * standardizer["scale"][:, None]
                if x.shape[1]:
                    out[i] = pool_tokens(x, layers, pooling)
        return out

    def layer_statistics(self, sentences: Sequence[Sequence[str]]) -> dict[str, np.ndarray]:
        """Return "mean" and "scale", the inverse standard deviation, of every feature over all tokens.

        Args:
            sentences: Tokens of each sentence.

        Returns:
            float32 ``[L, F]`` each.
        """
        layers, _, features = self.shape(0)
        words, (total, squares) = 0, np.zeros((2, layers, features))
        for start in range(0, len(sentences), _BLOCK_TEXTS):
            for x in self.embed(sentences[start : start + _BLOCK_TEXTS]):
                words += x.shape[1]
                total += x.sum(1, dtype=np.float64)
                squares += np.square(x, dtype=np.float64).sum(1)
        return feature_standardizer(words, total, squares)

    def count_unknown(self, sentences: Iterable[Sequence[str]]) -> int:
        """Return how many tokens are unknown to a model that reads words; 0 for one that reads characters."""
        if self.model.config.input == "characters":
            return 0
        assert self.vocabulary is not None
        return sum(int((self.vocabulary.ids(sentence) == UNK).sum()) for sentence in sentences)

    def embed_into(self, sentence: Sequence[str], out: Any) -> None:
        """Embed one long sentence window by window into an array that need not fit in memory.

        Args:
            sentence: Tokens.
            out: Array-like of shape ``[L, tokens, F]`` that supports ``out[:, i:j, k:l] = values``, such
                as an HDF5 dataset.

        Raises:
            InputError: The sentence is not a list of strings.
        """
        _check_sentences([sentence])
        self._embed_batch([sentence], [out], _BATCH_TOKENS)

    def surprisal(self, sentences: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Return -log p of every token in nats, by direction, with the full softmax.

        Args:
            sentences: Tokens of each sentence.

        Returns:
            float32 ``[2, tokens + 1]`` for each sentence. Row 0 (forward) holds every token and then
            ``</S>``, each given the tokens before it. Row 1 (backward) holds ``<S>`` and then every
            token, each given the tokens after it. The mean of a row is the log of its perplexity.

        Raises:
            InputError: The model has no softmax, or a sentence is not a list of strings.
        """
        _check_sentences(sentences)
        if self.vocabulary is None:
            raise InputError("the model has no softmax for surprisal; load a model that has one")
        out: list[Any] = [None] * len(sentences)
        for group in self._group_by_length(sentences, _BATCH_TOKENS):
            for i, nll in zip(group, self._batch_surprisal([sentences[i] for i in group]), strict=True):
                out[i] = nll
        return out

    def reset_state(self) -> None:
        """Forget the LSTM state of stateful calls."""
        self._state = None

    def _first_state(self, rows: int) -> tuple[State, ...]:
        """Return the state of the last stateful call, padded with zeros for additional sentences."""
        if self._state is None:
            return zero_state(self.model.config, rows)
        missing = max(0, rows - self._state[0].c.shape[1])
        return jax.tree.map(lambda a: jnp.pad(a, ((0, 0), (0, missing), (0, 0))), self._state)

    def _embed_batch(
        self, sentences: Sequence[Sequence[str]], out: Sequence[Any], batch_tokens: int, state: Any = None
    ) -> Any:
        """Write the layers ``[L, tokens, F]`` of each sentence; return the final state."""
        for start, layers, after in self._read_windows(sentences, batch_tokens, state):
            _store_layers(np.asarray(layers), start, sentences, out)
            state = after
        return state

    def _batch_surprisal(self, sentences: Sequence[Sequence[str]]) -> list[np.ndarray]:
        assert self.vocabulary is not None
        ids = [np.r_[BOS, self.vocabulary.ids(s), EOS].astype(np.int32) for s in sentences]
        out = [np.empty((DIRECTIONS, len(s) + 1), np.float32) for s in sentences]
        in_reading_order = [(nll[0], nll[1, ::-1]) for nll in out]
        for start, layers, _ in self._read_windows(sentences, _BATCH_TOKENS):
            _, _, rows, width, _ = layers.shape
            targets = np.zeros((DIRECTIONS, rows, width), np.int32)
            for b, row in enumerate(ids):
                for d, reading in enumerate((row, row[::-1])):
                    part = reading[start + 1 : start + 1 + width]
                    targets[d, b, : len(part)] = part
            nll = np.asarray(self._nll(self.params, layers[-1], targets))
            for b, readings in enumerate(in_reading_order):
                for d, reading in enumerate(readings):
                    part = reading[start : start + width]
                    part[:] = nll[d, b, : len(part)]
        return out

    def _read_windows(
        self, sentences: Sequence[Sequence[str]], batch_tokens: int, state: Any = None
    ) -> Iterator[tuple[int, Array, Any]]:
        """Yield each window's first position, its layers ``[L, D, B, W, P]`` and the state after it.

        Rows beyond the number of sentences are padding. `state` must have a row for each sentence.
        """
        longest = max(map(len, sentences)) + 2
        if state is None:
            most = max(len(sentences), self._max_rows(longest, batch_tokens))
            state = zero_state(self.model.config, min(most, _round_up(len(sentences), _ROWS)))
        rows = state[0].c.shape[1]
        lengths = np.zeros(rows, np.int32)
        lengths[: len(sentences)] = [len(s) + 2 for s in sentences]
        forward = [[SPECIAL[BOS], *s, SPECIAL[EOS]] for s in sentences]
        readings = [reading for tokens in forward for reading in (tokens, tokens[::-1])]
        # The state is donated. A copy keeps the caller's state valid if this call is interrupted.
        state = jax.tree.map(jnp.copy, state)
        width = self._window_width(longest)
        for start in range(0, longest, width):
            remaining = np.clip(lengths - start, 0, width)
            indices = np.zeros((rows, DIRECTIONS, width), np.int32)
            valid = np.broadcast_to(np.arange(width) < remaining[:, None, None], indices.shape)
            tokens = [token for reading in readings for token in reading[start : start + width]]
            indices[valid] = self._words.indices(tokens)
            x = self._look_up(self._words.vectors, indices.swapaxes(0, 1))
            layers, state = self._contextualize(self.params, x, remaining, state)
            yield start, layers, state

    def _group_by_length(self, sentences: Sequence[Sequence[str]], batch_tokens: int) -> Iterator[list[int]]:
        """Yield the indices of sentences that form a batch, longest sentences first."""
        order = sorted(range(len(sentences)), key=lambda i: -len(sentences[i]))
        start = 0
        while start < len(order):
            rows = self._max_rows(len(sentences[order[start]]) + 2, batch_tokens)
            yield order[start : start + rows]
            start += rows

    def _max_rows(self, longest: int, batch_tokens: int) -> int:
        return max(1, batch_tokens // self._window_width(longest))

    def _window_width(self, longest: int) -> int:
        return min(self._window, _round_up(longest, _WINDOWS))


class _WordTable:
    """Word vectors on the device, one row per word.

    For a model that reads words, this is the embedding table. For a model that reads characters, this is
    a cache of vectors, which is emptied when full.
    """

    def __init__(self, model: BiLM, params: Any, vocabulary: Vocabulary | None):
        self._params, self._vocabulary, self._capacity = params, vocabulary, _MAX_WORDS
        self._reads_words = model.config.input == "words"
        self._rows: dict[str, int] = {}
        # Trimmed padding stays at least as wide as the widest filter; see `character_ids`.
        self._multiple = max(8, *(width for width, _ in model.config.characters.filters))
        empty = jnp.zeros((0, model.config.embedding), jnp.float32)
        self.vectors: Array = params["embedder"]["table"] if self._reads_words else empty

        def compute(params: Any, ids: Array) -> Array:
            vectors: Any = model.apply({"params": params}, ids, method="token_vectors")
            return vectors.astype(jnp.float32)

        def put(table: Array, vectors: Array, start: Array) -> Array:
            return jax.lax.dynamic_update_slice(table, vectors, (start, jnp.zeros_like(start)))

        self._compute, self._put = _jit_precise(compute), jax.jit(put, donate_argnums=0)

    def clear(self) -> None:
        """Empty the cache; has no effect for a model that reads words."""
        self._rows = {}

    def indices(self, tokens: Sequence[str]) -> np.ndarray:
        """Return the row of each token in `vectors`, int32 ``[tokens]``; compute the vectors of new words."""
        if self._reads_words:
            assert self._vocabulary is not None
            return self._vocabulary.ids(tokens)
        self._add_words(dict.fromkeys((SPECIAL[BOS], SPECIAL[EOS], *tokens)))
        return np.fromiter((self._rows[token] for token in tokens), np.int32, len(tokens))

    def _add_words(self, words: dict[str, None]) -> None:
        new = [word for word in words if word not in self._rows]
        if len(self._rows) + len(new) > self._capacity:
            self.clear()
            new = list(words)
        new.sort(key=lambda word: len(word.encode("utf-8", "ignore")))  # similar lengths share one shape
        size = len(self._rows) + len(new) + _CNN_WORDS
        if size > len(self.vectors):
            table = jnp.zeros((1 << (size - 1).bit_length(), self.vectors.shape[1]), jnp.float32)
            self.vectors = table.at[: len(self.vectors)].set(self.vectors)
        for i in range(0, len(new), _CNN_WORDS):
            part = new[i : i + _CNN_WORDS]
            # The last part is padded with its last word; later words overwrite these rows.
            ids = character_ids(part + part[-1:] * (_CNN_WORDS - len(part)), multiple=self._multiple)
            vectors = self._compute(self._params, ids)
            self.vectors = self._put(self.vectors, vectors, np.int32(len(self._rows)))
            self._rows |= {word: len(self._rows) + k for k, word in enumerate(part)}


def _jit_precise(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile a function whose float32 matmuls keep full precision on every device."""

    def precise(*args: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args)

    return jax.jit(precise, **options)


def _store_layers(
    layers: np.ndarray, start: int, sentences: Sequence[Sequence[str]], out: Sequence[Any]
) -> None:
    """Copy a window ``[L, D, B, W, P]`` into the arrays of its sentences, both halves in text order."""
    _, _, _, width, features = layers.shape
    for b, (sentence, array) in enumerate(zip(sentences, out, strict=True)):
        n = len(sentence)
        low, high = (
            max(start, 1),
            min(start + width, n + 1),
        )  # positions in reading order, without BOS and EOS
        if low < high:
            part = layers[:, :, b, low - start : high - start]
            array[:, low - 1 : high - 1, :features] = part[:, 0]
            array[:, n + 1 - high : n + 1 - low, features:] = part[:, 1, ::-1]


def _round_up(n: int, sizes: Sequence[int]) -> int:
    """Return the smallest size of at least n, or else the next multiple of the last size."""
    return next((size for size in sizes if size >= n), -(-n // sizes[-1]) * sizes[-1])


def _with_dtype(model: BiLM, dtype: Dtype | None) -> BiLM:
    """Return the model with another matmul dtype."""
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    return model if dtype is None else replace(model, config=replace(model.config, dtype=dtype))


def _check_sentences(sentences: Sequence[Sequence[str]]) -> None:
    if isinstance(sentences, str) or not isinstance(sentences, Sequence | np.ndarray):
        raise InputError("sentences must be a list of lists of tokens; use encode or tokenize for raw text")
    for i, sentence in enumerate(sentences):
        if isinstance(sentence, str):
            raise InputError(f"sentence {i} is a string; give a list of its tokens, as tokenize returns")
        if not isinstance(sentence, Sequence | np.ndarray):
            raise InputError(f"sentence {i} is a {type(sentence).__name__}; give a list of its tokens")
        for token in (token for token in sentence if not isinstance(token, str)):
            raise InputError(f"sentence {i} holds {reprlib.repr(token)}, which is not a string; give tokens")


def pool_tokens(
    layers: np.ndarray, choice: Literal["top", "average", "all"] | int, pooling: Pooling
) -> np.ndarray:
    """Return the vector ``[F]`` of one text from its layers ``[L, T, F]``; see `Elmo.encode`.

    Raises:
        InputError: `choice` or `pooling` is invalid.
    """
    if pooling not in ("mean", "max", "mean+max"):
        raise InputError(f"pooling is {pooling!r}; use mean, max or mean+max")
    is_index = isinstance(choice, int | np.integer) and not isinstance(choice, bool)
    index: Any = choice if is_index else -1
    if 0 <= index < len(layers):
        x = layers[index]
    elif choice == "all":
        x = np.concatenate(list(layers), -1)  # [T, L F]
    elif choice == "average":
        x = layers.mean(0)
    elif choice == "top":
        x = layers[-1]
    else:
        raise InputError(f"layers is {choice!r}; use top, average, all or 0 to {len(layers) - 1}")
    return np.concatenate([x.mean(0) if name == "mean" else x.max(0) for name in pooling.split("+")])


def _softmax_path(weights: str | Path) -> Path:
    path = Path(weights)
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".hdf5") + ".softmax.hdf5")
