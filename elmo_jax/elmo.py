"""ELMo for its users: a trained language model that turns sentences into layers of vectors.

Axes: B batch, T time, L layers, F features.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from elmo_jax.bilm import BiLM, BiLMConfig
from elmo_jax.checkpoint import Run, read_config, write_atomically
from elmo_jax.data import Batch
from elmo_jax.errors import InputError
from elmo_jax.text import Vocabulary

VOCABULARY = "vocab.txt"
_WEIGHTS = "model.safetensors"
_STEPS = 16  # lengths are padded to a multiple, so that few shapes are compiled


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
        vocabulary = Vocabulary.load(path / VOCABULARY)
        try:
            model = BiLM(BiLMConfig(**config["model"]), len(vocabulary))
        except TypeError as error:
            raise InputError(f"{path / 'config.json'}: 'model' is not understood ({error})") from None
        if (path / _WEIGHTS).exists():
            try:
                params = unflatten_dict(load_file(path / _WEIGHTS), sep="/")
            except (OSError, SafetensorError) as error:
                raise InputError(f"{path / _WEIGHTS}: cannot be read ({error}); export it again") from None
        else:
            run = Run.open(path)
            params = run.restore_best(("params",))["params"]
            run.close()
        _check_shapes(model, params, path)
        return cls(model, params, vocabulary)

    def save_pretrained(self, path: str | Path) -> None:
        """Write ``config.json``, ``model.safetensors`` and ``vocab.txt`` into a folder."""
        path = Path(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            self.vocabulary.save(path / VOCABULARY)
            arrays = {name: np.asarray(a) for name, a in flatten_dict(self.params, sep="/").items()}
            save_file(arrays, path / _WEIGHTS)
            write_atomically(
                path / "config.json", json.dumps({"model": asdict(self.model.config)}, indent=2) + "\n"
            )
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
        for i, sentence in enumerate(sentences):
            if isinstance(sentence, str):
                raise InputError(f"sentence {i} is a string; give a list of its tokens (see tokenize)")
        ids = [self.vocabulary.ids(sentence) for sentence in sentences]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        out: dict[int, np.ndarray] = {}
        with jax.default_matmul_precision("highest"):
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                steps = -(-(len(ids[rows[-1]]) + 2) // _STEPS) * _STEPS
                batch = Batch.of([ids[i] for i in rows], shape=(batch_size, steps))
                layers = np.asarray(self._states(self.params, batch))  # [L, B, T, F]
                for row, i in enumerate(rows):
                    out[i] = layers[:, row, 1 : len(ids[i]) + 1].copy()
        return [out[i] for i in range(len(ids))]


def _check_shapes(model: BiLM, params: Any, path: Path) -> None:
    """Every parameter there, of the right shape and dtype, and no other."""
    wanted: Any = jax.eval_shape(lambda: model.init(jax.random.key(0), Batch.of([[]]))["params"])

    def kinds(tree: Any) -> dict[Any, Any]:
        flat: dict[Any, Any] = flatten_dict(tree, sep="/")
        return {name: (tuple(a.shape), str(a.dtype)) for name, a in flat.items()}

    want, have = kinds(wanted), kinds(params)
    for name in sorted(want.keys() | have.keys()):
        if want.get(name) != have.get(name):
            raise InputError(
                f"{path}: parameter {name} is {have.get(name, 'missing')}, but its config.json and vocab.txt "
                f"ask for {want.get(name, 'none')}; the files are not of one model"
            )
