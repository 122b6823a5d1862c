"""ELMo for its users: a trained language model that turns sentences into layers of vectors.

Axes: B batch, T time, L layers, F features.
"""

import reprlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from elmo_jax.bilm import BiLM, BiLMConfig
from elmo_jax.checkpoint import Run
from elmo_jax.data import Batch
from elmo_jax.errors import InputError
from elmo_jax.integrity import check_files, digest, read_config, structure, write_atomically, write_config
from elmo_jax.steps import check_kinds
from elmo_jax.text import Vocabulary

VOCABULARY = "vocab.txt"
_WEIGHTS = "model.safetensors"
_STEPS = 16  # lengths are padded to a multiple, so that few shapes are compiled
_LONGEST = 2**16  # tokens a sentence; a longer one is a mistake, and would take much memory


class Elmo:
    """A bidirectional language model with its parameters and vocabulary.

    Args:
        model: the language model.
        params: its parameters.
        vocabulary: its numbering of tokens.

    Example:
        >>> vocabulary = Vocabulary.from_counts({"the": 2, "bank": 1})
        >>> model = BiLM(BiLMConfig(embedding=4, cells=4), len(vocabulary))
        >>> params = model.init(jax.random.key(0), Batch.of([[4, 5]]))["params"]
        >>> layers = Elmo(model, params, vocabulary).embed([["the", "bank"], ["bank"]])
        >>> [a.shape for a in layers]
        [(3, 2, 8), (3, 1, 8)]
    """

    def __init__(self, model: BiLM, params: Any, vocabulary: Vocabulary):
        self.model, self.params, self.vocabulary = model, params, vocabulary
        self._states = jax.jit(lambda params, batch: model.apply({"params": params}, batch)[0])

    @classmethod
    def from_pretrained(cls, path: str | Path) -> "Elmo":
        """Load a run of ``experiments.pretrain`` (its best epoch), or what `save_pretrained` wrote.

        Args:
            path: the folder.

        Raises:
            InputError: it is neither, or its files do not fit each other.
        """
        path = Path(path)
        config = read_config(path)
        if "model" not in config:
            raise InputError(f"{path}: holds no language model; give a run of experiments.pretrain")
        check_files(path)
        vocabulary = Vocabulary.load(path / VOCABULARY)
        model = BiLM(_model_config(config["model"], f"{path}: model"), len(vocabulary))
        if _WEIGHTS in config["files"]:
            arrays: dict[str, Any] = _read_weights(path / _WEIGHTS)
        else:
            arrays = flatten_dict(Run.open(path).restore_best(("params",))["params"], sep="/")
        wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), Batch.of([[]]))["params"])
        check_kinds(arrays, wanted, str(path))
        for name, a in arrays.items():
            if not np.isfinite(a).all():
                raise InputError(f"{path}: {name} holds numbers that are not finite; train or export again")
        return cls(model, unflatten_dict(arrays, sep="/"), vocabulary)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``vocab.txt`` into a folder."""
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            arrays = {name: np.asarray(a) for name, a in flatten_dict(self.params, sep="/").items()}
            files = {_WEIGHTS: save(arrays), VOCABULARY: self.vocabulary.text.encode()}
            for name, data in files.items():
                write_atomically(path / name, data)
            digests = {name: digest(data) for name, data in files.items()}
            write_config(path, {"model": asdict(self.model.config)}, digests)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); give another folder") from None

    def embed(self, sentences: Sequence[Sequence[str]], batch_size: int = 32) -> list[np.ndarray]:
        """The layer states of every token.

        A sentence's vectors depend on its own tokens alone, not on its neighbours in the
        call or on earlier calls. ``<S>`` and ``</S>`` are read, and their rows left out.

        Args:
            sentences: tokens, as the vocabulary writes them (`tokenize` for raw text).
            batch_size: sentences run at once.

        Returns:
            For each sentence float32 ``[L, tokens, F]``: layer 0 the token vectors, then
            each LSTM layer; the first half of F read forward, the second backward.
        """
        _check_sentences(sentences)
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, not {batch_size}")
        ids = [self.vocabulary.ids(sentence) for sentence in sentences]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out: dict[int, np.ndarray] = {}
        with jax.default_matmul_precision("highest"):
            while order:
                # The longest first, and fewer of the very long at once, so that memory is bounded.
                steps = -(-(len(ids[order[-1]]) + 2) // _STEPS) * _STEPS
                most = min(batch_size, max(1, _LONGEST // steps))
                rows = [order.pop() for _ in range(min(most, len(order)))]
                batch = Batch.of([ids[i] for i in rows], shape=(most, steps))
                layers = np.asarray(self._states(self.params, batch))  # [L, B, T, F]
                for row, i in enumerate(rows):
                    out[i] = layers[:, row, 1 : len(ids[i]) + 1].copy()
        return [out[i] for i in range(len(ids))]


def _check_sentences(sentences: Sequence[Sequence[str]]) -> None:
    if isinstance(sentences, str) or not isinstance(sentences, Sequence | np.ndarray):
        raise InputError("sentences must be a list of lists of tokens (see tokenize)")
    for i, sentence in enumerate(sentences):
        if isinstance(sentence, str):
            raise InputError(f"sentence {i} is a string; give a list of its tokens (see tokenize)")
        if not isinstance(sentence, Sequence | np.ndarray):
            raise InputError(f"sentence {i} is a {type(sentence).__name__}; give a list of its tokens")
        if len(sentence) > _LONGEST:
            raise InputError(f"sentence {i} has {len(sentence):,} tokens; split it, {_LONGEST:,} is the most")
        for token in sentence:
            if not isinstance(token, str):
                raise InputError(f"sentence {i} holds {reprlib.repr(token)}, which is no string; give tokens")


def _model_config(data: Any, source: str) -> BiLMConfig:
    config = structure(BiLMConfig, data, source)
    if not (
        config.embedding > 0 and config.cells > 0 and 0 < config.layers <= 64 and 0 <= config.dropout < 1
    ):
        raise InputError(f"{source}: these are no sizes of a model: {reprlib.repr(data)}; train again")
    return config


def _read_weights(path: Path) -> dict[str, Any]:
    """The arrays of a safetensors file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: cannot be read ({reason}); export it again") from None
