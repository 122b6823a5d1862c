"""ELMo for its users: a trained language model that turns sentences into layers of vectors.

Axes: L layers, F features.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from elmo_jax.config import Dtype
from elmo_jax.data.text import Vocabulary
from elmo_jax.errors import InputError
from elmo_jax.inference import BATCH_TOKENS, Reader
from elmo_jax.models.bilm import BiLM, lstm_layer, zero_state
from elmo_jax.models.lstm import Kernel
from elmo_jax.ops.lstm import State
from elmo_jax.pretrained.bilm_format import read_bilm, read_softmax, write_bilm, write_softmax
from elmo_jax.pretrained.folder import load_folder, save_folder


class Elmo:
    """A bidirectional language model with its parameters and vocabulary.

    Args:
        model: the language model.
        params: its parameters.
        vocabulary: its numbering of tokens; None for a model that reads characters and has
            no softmax.

    Example:
        >>> from elmo_jax.models.bilm import BiLMConfig
        >>> from elmo_jax.data.batching import Batch
        >>> vocabulary = Vocabulary.from_counts({"the": 2, "bank": 1})
        >>> model = BiLM(BiLMConfig(embedding=4, cells=4), len(vocabulary))
        >>> params = model.init(jax.random.key(0), Batch.of([[4, 5]]))["params"]
        >>> layers = Elmo(model, params, vocabulary).embed([["the", "bank"], ["bank"]])
        >>> [a.shape for a in layers]
        [(3, 2, 8), (3, 1, 8)]
    """

    def __init__(self, model: BiLM, params: Any, vocabulary: Vocabulary | None):
        self.model, self.params, self.vocabulary = model, params, vocabulary
        self._reader = Reader(model, params, vocabulary)
        self._carried: tuple[State, ...] | None = None

    def __reduce__(self):
        """Pickled as what it is made of: scikit-learn pipelines are."""
        params = jax.tree.map(np.asarray, self.params)
        return type(self), (self.model, params, self.vocabulary)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: Dtype | None = None, kernel: Kernel = "auto") -> "Elmo":
        """Load a run of ``experiments.pretrain`` (its best epoch), or what `save_pretrained` wrote.

        Args:
            path: the folder.
            dtype: of the products, "float32" or "bfloat16"; None is what it was trained with.
            kernel: of the LSTM layers, see `LSTM.choose`.

        Raises:
            InputError: it is neither, or its files do not fit each other.
        """
        model, params, vocabulary = load_folder(Path(path), kernel)
        return cls(_computing(model, dtype), params, vocabulary)

    @classmethod
    def from_bilm(
        cls,
        options: str | Path,
        weights: str | Path,
        dtype: Dtype | None = None,
        kernel: Kernel = "auto",
    ) -> "Elmo":
        """Load a model in the official format of bilm-tf and AllenNLP.

        If `save_bilm` left the softmax and the vocabulary beside the weights, which the
        format has no place for, they are read too.

        Args:
            options: the JSON file, perhaps ``.gz``.
            weights: the HDF5 file, perhaps ``.gz``.
            dtype: of the products, "float32", which is the default, or "bfloat16".
            kernel: of the LSTM layers, see `LSTM.choose`.

        Raises:
            InputError: a file is missing or damaged, the two are not of one model, or the
                kernel does not run such layers.
        """
        config, flat = read_bilm(options, weights)
        vocabulary = None
        beside = _softmax_path(weights)
        if beside.exists():
            vocabulary, softmax = read_softmax(beside, config.embedding)
            flat |= softmax
        model = _computing(BiLM(config, len(vocabulary or ()), kernel), dtype)
        lstm_layer(model.config, kernel).choose()
        return cls(model, unflatten_dict(flat, sep="/"), vocabulary)

    def save_bilm(self, options: str | Path, weights: str | Path) -> None:
        """Write the official format: ``options.json`` and ``weights.hdf5``.

        A softmax is written beside the weights, as ``NAME.softmax.hdf5``, with its
        vocabulary: bilm-tf and AllenNLP neither need nor see it.

        Raises:
            InputError: the model reads words, for which the format has no place, or a file
                cannot be written.
        """
        flat: dict[str, Any] = flatten_dict(self.params, sep="/")
        write_bilm(self.model.config, flat, options, weights)
        if self.vocabulary is not None:
            write_softmax(_softmax_path(weights), self.vocabulary, flat)
        else:  # or another model's would be taken for this one's
            _softmax_path(weights).unlink(missing_ok=True)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``vocab.txt`` into a folder."""
        save_folder(Path(path), self.model, self.params, self.vocabulary)

    def embed(
        self, sentences: Sequence[Sequence[str]], stateful: bool = False, batch_tokens: int = BATCH_TOKENS
    ) -> list[np.ndarray]:
        """The layer states of every token.

        A sentence's vectors depend on its own tokens alone, not on its neighbours in the
        call or on earlier calls. ``<S>`` and ``</S>`` are read, and their rows left out.

        Args:
            sentences: tokens, as the vocabulary writes them (`tokenize` for raw text).
            stateful: begin sentence k with the LSTM state that sentence k of the last
                stateful call ended with, in both directions, as bilm-tf and AllenNLP do;
                `reset_state` forgets it. All sentences then run at once.
            batch_tokens: sentences times steps run at once, about.

        Returns:
            For each sentence float32 ``[L, tokens, F]``: layer 0 the token vectors, then
            each LSTM layer; the first half of F read forward, the second backward.

        Raises:
            InputError: a sentence is no list of strings.
        """
        _check_sentences(sentences)
        if batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, not {batch_tokens}")
        layers, _, width = self.shape(0)
        out = [np.empty((layers, len(s), width), np.float32) for s in sentences]
        with jax.default_matmul_precision("highest"):
            if stateful and len(sentences):
                self._carried = self._reader.read(sentences, out, self._state(len(sentences)))
                return out
            for rows in self._reader.groups([len(s) for s in sentences], batch_tokens):
                chosen, into = [sentences[i] for i in rows], [out[i] for i in rows]
                self._reader.read(chosen, into, batch_tokens=batch_tokens)
        return out

    def embed_into(self, sentence: Sequence[str], out: Any) -> None:
        """`embed` one sentence of any length, a window at a time, into what need not fit in memory.

        Args:
            sentence: its tokens.
            out: takes ``out[:, tokens, features] = values`` for `shape` ``[L, tokens, F]``;
                an HDF5 dataset, for one.
        """
        _check_sentences([sentence])
        with jax.default_matmul_precision("highest"):
            self._reader.read([sentence], [out])

    def shape(self, tokens: int) -> tuple[int, int, int]:
        """``(L, tokens, F)``, the shape of a sentence's layers."""
        return self.model.config.layers + 1, tokens, 2 * self.model.config.embedding

    def surprisal(self, sentences: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """How unexpected each token is to each direction: -log p in nats, with the full softmax.

        Args:
            sentences: tokens.

        Returns:
            For each sentence float32 ``[2, tokens + 1]``: forward, every token given those
            before it and then ``</S>``; backward, ``<S>`` and then every token, given those
            behind it. The mean of a row is the log of its perplexity.

        Raises:
            InputError: the model has no softmax, or a sentence is no list of strings.
        """
        _check_sentences(sentences)
        if self.vocabulary is None:
            raise InputError("the model was loaded without a softmax, and cannot tell how likely a token is")
        out: dict[int, np.ndarray] = {}
        with jax.default_matmul_precision("highest"):
            for rows in self._reader.groups([len(s) for s in sentences]):
                parts = self._reader.surprisal([sentences[i] for i in rows])
                out |= dict(zip(rows, parts, strict=True))
        return [out[i] for i in range(len(sentences))]

    def reset_state(self) -> None:
        """Forget what stateful calls carried."""
        self._carried = None

    def _state(self, rows: int) -> tuple[State, ...]:
        """The carried state, with zeros for sentences beyond those of earlier calls."""
        fresh = zero_state(self.model.config, rows)
        if self._carried is None:
            return fresh
        have = len(self._carried[0].c[0])
        if have >= rows:
            return self._carried
        return jax.tree.map(lambda new, old: new.at[:, :have].set(old), fresh, self._carried)


def _computing(model: BiLM, dtype: Dtype | None) -> BiLM:
    """The model with its products in that dtype."""
    if dtype not in (None, "float32", "bfloat16"):
        raise InputError(f"dtype must be float32 or bfloat16, not {dtype!r}")
    return model if dtype is None else replace(model, config=replace(model.config, dtype=dtype))


def _check_sentences(sentences: Sequence[Sequence[str]]) -> None:
    if isinstance(sentences, str) or not isinstance(sentences, Sequence | np.ndarray):
        raise InputError("sentences must be a list of lists of tokens (see tokenize)")
    for i, sentence in enumerate(sentences):
        if isinstance(sentence, str):
            raise InputError(f"sentence {i} is a string; give a list of its tokens (see tokenize)")
        if not isinstance(sentence, Sequence | np.ndarray):
            raise InputError(f"sentence {i} is a {type(sentence).__name__}; give a list of its tokens")
        for token in sentence:
            if not isinstance(token, str):
                raise InputError(
                    f"sentence {i} holds {reprlib.repr(token)}, which is not a string; give tokens"
                )


def _softmax_path(weights: str | Path) -> Path:
    path = Path(weights)
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".hdf5") + ".softmax.hdf5")
