"""Language models in folders: exported models and the best epochs of pre-training runs."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from elmo_jax.config import BiLMConfig, Kernel, TextConfig
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
MODEL = "model"  # folder of the trained classifier in its run
CLASSIFIER = "text_classifier"  # entry of a classifier's config.json


def load_folder(
    path: Path, kernel: Kernel = "auto"
) -> tuple[BiLM, dict[str, Any], Vocabulary | None, TextConfig]:
    """Load the language model of a folder.

    Args:
        path: A pre-training run, of which the best epoch is loaded; a finished classifier's run; or an
            exported language model or classifier.
        kernel: LSTM kernel, see `LSTM.choose`.

    Returns:
        The model, its parameters, its vocabulary, which is None for a model that reads characters and has no
        softmax, and its text preparation.

    Raises:
        InputError: The folder holds no language model, or its files are damaged or inconsistent.
    """
    path = model_folder(path)
    _refuse_official_model(path)
    config = read_config(path)
    saved = config[CLASSIFIER].get("bilm") if CLASSIFIER in config else config.get("model")
    if not isinstance(saved, dict):  # in an unfinished classifier's run it is a digest
        raise InputError(f"{path}: holds no language model; give a pre-training run or an exported model")
    config, arrays = read_folder(path)
    if CLASSIFIER in config:
        prefix = "bilm/"
        arrays = {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
    sizes = structure(BiLMConfig, saved, f"{path}: model")
    vocabulary = None
    if sizes.input == "words" or VOCABULARY in config["files"]:
        vocabulary = Vocabulary.load(path / VOCABULARY, exact=True)
    model = BiLM(sizes, len(vocabulary or ()), kernel)
    expected = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    check_shapes(arrays, expected, str(path))
    return model, unflatten_dict(arrays, sep="/"), vocabulary, read_text_config(path)


def _refuse_official_model(path: Path) -> None:
    """Raise InputError if a folder holds the two files of an official model, and no ``config.json``."""
    if (path / CONFIG).exists():
        return
    options = sorted(path.glob("*options*.json"))
    weights = [file for file in sorted(path.glob("*weights*.hdf5")) if ".softmax." not in file.name]
    if options and weights:
        remedy = f"load it with Elmo.from_bilm({options[0]}, {weights[0]})"
        raise InputError(f"{path}: holds a model in the official format; {remedy}")


def read_text_config(path: Path) -> TextConfig:
    """Return the text preparation of the model in a folder.

    Raises:
        InputError: ``config.json`` is missing or invalid.
    """
    config = read_config(path)
    saved = config.get(CLASSIFIER, config).get("text")
    if saved is None:  # older runs did not store it, and cleaned texts by default
        data = config.get("data")
        return TextConfig(clean=isinstance(data, dict) and data.get("clean", True) is True)
    return structure(TextConfig, saved, f"{path}: text")


def model_folder(path: Path) -> Path:
    """Return the folder of the model that a finished classifier's run holds, or the given path."""
    return path / MODEL if (path / MODEL / CONFIG).is_file() else path


def read_folder(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the checked ``config.json`` and the arrays of an exported model, or of the best epoch of a run.

    Returns:
        The config with the digests of the other files as "files", and the arrays by their paths.

    Raises:
        InputError: A file is missing or damaged, or a number is not finite.
    """
    config = read_config(path)
    check_files(path)
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
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {name} holds numbers that are not finite; train or export again")
    return config, arrays


def save_folder(
    path: Path, model: BiLM, params: Any, vocabulary: Vocabulary | None, text: TextConfig
) -> None:
    """Write ``config.json``, ``model.safetensors`` and, if there is a vocabulary, ``vocab.txt``.

    Raises:
        InputError: The folder holds a run, or cannot be written.
    """
    texts = {} if vocabulary is None else {VOCABULARY: vocabulary.text}
    config = {"model": asdict(model.config), "text": asdict(text)}
    write_folder(path, config, flatten_dict(params, sep="/"), texts)


def write_folder(
    path: Path, config: Mapping[str, Any], arrays: Mapping[Any, Any], texts: Mapping[str, str]
) -> None:
    """Write a model's ``config.json``, its arrays as ``model.safetensors``, and text files.

    Raises:
        InputError: The folder holds a run, or cannot be written.
    """
    if (path / CONFIG).exists() and _WEIGHTS not in read_config(path).get("files", {}):
        raise InputError(f"{path}: holds a run that would be lost; give another folder")
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    files = {_WEIGHTS: save(contiguous)} | {name: text.encode() for name, text in texts.items()}
    try:
        path.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomically(path / name, data)
        write_config(path, config, {name: digest(data) for name, data in files.items()})
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); give another folder") from None
