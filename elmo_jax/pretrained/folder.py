"""A language model in a folder: a run's best epoch, or its own three files."""

import reprlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from elmo_jax.data.text import Vocabulary
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM, BiLMConfig
from elmo_jax.models.lstm import Kernel
from elmo_jax.storage.files import (
    CONFIG,
    check_files,
    digest,
    read_config,
    structure,
    write_atomically,
    write_config,
)
from elmo_jax.training.checkpoint import VOCABULARY, Run, check_shapes
from elmo_jax.training.objectives import init_params

_WEIGHTS = "model.safetensors"


def load_folder(path: Path, kernel: Kernel = "auto") -> tuple[BiLM, dict[str, Any], Vocabulary | None]:
    """The model of a run of ``experiments.pretrain``, at its best epoch, or of `save_folder`.

    Args:
        path: the folder.
        kernel: of the model's LSTM layers.

    Returns:
        The model, its parameters and its vocabulary; None if it reads characters and has
        no softmax.

    Raises:
        InputError: it is neither, its files are damaged, they do not fit each other, or the
            kernel does not run such layers.
    """
    config = read_config(path)
    if not isinstance(config.get("model"), dict):  # a classifier's run has the digest of one
        raise InputError(f"{path}: holds no language model; give a run of experiments.pretrain")
    check_files(path)
    settings = _model_config(config["model"], f"{path}: model")
    without = settings.input == "characters" and VOCABULARY not in config["files"]
    vocabulary = None if without else Vocabulary.load(path / VOCABULARY)
    model = BiLM(settings, len(vocabulary or ()), kernel)
    if _WEIGHTS in config["files"]:
        arrays: dict[str, Any] = _read_weights(path / _WEIGHTS)
    else:
        arrays = flatten_dict(Run.open(path).restore_best(("params",))["params"], sep="/")
    enabled = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    check_shapes(arrays, enabled, str(path))
    for name, a in arrays.items():
        if not np.isfinite(a).all():
            raise InputError(f"{path}: {name} holds numbers that are not finite; train or export again")
    return model, unflatten_dict(arrays, sep="/"), vocabulary


def save_folder(path: Path, model: BiLM, params: Any, vocabulary: Vocabulary | None) -> None:
    """Write ``config.json``, ``model.safetensors`` and, if there is one, ``vocab.txt``.

    Raises:
        InputError: the folder holds a run, or something else with a configuration, or cannot
            be written.
    """
    if (path / CONFIG).exists() and _WEIGHTS not in read_config(path).get("files", {}):
        raise InputError(f"{path}: holds a run, which would be lost; give another folder")
    arrays = {name: np.asarray(a) for name, a in flatten_dict(params, sep="/").items()}
    files = {_WEIGHTS: save(arrays)}
    if vocabulary is not None:
        files[VOCABULARY] = vocabulary.text.encode()
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(path / name, data)
        digests = {name: digest(data) for name, data in files.items()}
        write_config(path, {"model": asdict(model.config)}, digests)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another folder") from None


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
