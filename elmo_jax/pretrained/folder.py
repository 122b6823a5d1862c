"""Language models in folders: exported models and the best epochs of pre-training runs."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from elmo_jax.config import BiLMConfig, Kernel
from elmo_jax.data.text import Vocabulary
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM
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
    """Load the best epoch of a pre-training run, or a folder that `save_folder` wrote.

    Args:
        path: Folder.
        kernel: LSTM kernel, see `LSTM.choose`.

    Returns:
        The model, its parameters and its vocabulary, which is None for a model that reads characters and
        has no softmax.

    Raises:
        InputError: The folder holds no language model, or its files are damaged or inconsistent.
    """
    config = read_config(path)
    if not isinstance(config.get("model"), dict):  # in a classifier's run it is a digest
        raise InputError(f"{path}: holds no language model; give a pre-training run or an exported model")
    check_files(path)
    sizes = structure(BiLMConfig, config["model"], f"{path}: model")
    vocabulary = None
    if sizes.input == "words" or VOCABULARY in config["files"]:
        vocabulary = Vocabulary.load(path / VOCABULARY)
    model = BiLM(sizes, len(vocabulary or ()), kernel)
    if _WEIGHTS in config["files"]:
        try:
            arrays: dict[str, Any] = load_file(path / _WEIGHTS)
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{path / _WEIGHTS}: cannot be read ({reason}); export the model again"
            ) from None
    else:
        arrays = flatten_dict(Run.open(path).restore_best(("params",))["params"], sep="/")
    expected = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    check_shapes(arrays, expected, str(path))
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} holds numbers that are not finite; train or export again")
    return model, unflatten_dict(arrays, sep="/"), vocabulary


def save_folder(path: Path, model: BiLM, params: Any, vocabulary: Vocabulary | None) -> None:
    """Write ``config.json``, ``model.safetensors`` and, if there is a vocabulary, ``vocab.txt``.

    Raises:
        InputError: The folder holds a run, or cannot be written.
    """
    if (path / CONFIG).exists() and _WEIGHTS not in read_config(path).get("files", {}):
        raise InputError(f"{path}: holds a run that would be lost; give another folder")
    arrays = {name: np.asarray(array) for name, array in flatten_dict(params, sep="/").items()}
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
