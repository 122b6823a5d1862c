"""The official ELMo format, options and HDF5 weights, to parameters and back, by one table.

Nouns: a *slot* says which rows of a dataset of the file are which part of a parameter.
Axes: as bilm-tf writes them; D direction, H cells, P projection, E = P token vector.
"""

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from elmo_jax.data.batching import DIRECTIONS
from elmo_jax.data.characters import CHARACTERS, IDS
from elmo_jax.data.text import Vocabulary
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLMConfig
from elmo_jax.models.embedders import CharCNNConfig
from elmo_jax.storage.files import write_atomically
from elmo_jax.storage.hdf5 import open_datasets, read_bytes, read_floats, write_arrays

_SOFTMAX = ("softmax_table", "softmax_bias")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", list: "a list", str: "a string"}


class Slot(NamedTuple):
    """Rows of a dataset, and the parameter, or the direction of one, that they are.

    Attributes:
        dataset: its name in the file.
        shape: of the whole dataset.
        rows: of the dataset's first axis.
        param: the parameter's name, with "/" between levels.
        param_shape: of the whole parameter.
        direction: index into the parameter's first axis, or None for all of it.
    """

    dataset: str
    shape: tuple[int, ...]
    rows: slice
    param: str
    param_shape: tuple[int, ...]
    direction: int | None = None


def slots(config: BiLMConfig) -> list[Slot]:
    """The whole table for a model of this configuration."""
    return [*_character_slots(config), *_lstm_slots(config)]


def _character_slots(config: BiLMConfig) -> Iterator[Slot]:
    c = config.characters

    def whole(dataset: str, shape: tuple[int, ...], param: str, param_shape: tuple[int, ...] | None = None):
        return Slot(dataset, shape, slice(None), f"embedder/{param}", param_shape or shape)

    yield whole("char_embed", (IDS - 1, c.character_features), "characters")
    for i, (width, n) in enumerate(c.filters):
        kernel = (width, c.character_features, n)
        yield whole(f"CNN/W_cnn_{i}", (1, *kernel), f"filter_{i}", kernel)
        yield whole(f"CNN/b_cnn_{i}", (n,), f"filter_bias_{i}")
    f = sum(n for _, n in c.filters)
    for k in range(c.highway):
        for name in ("carry", "transform"):
            yield whole(f"CNN_high_{k}/W_{name}", (f, f), f"{name}_{k}_kernel")
            yield whole(f"CNN_high_{k}/b_{name}", (f,), f"{name}_{k}_bias")
    if c.project_filters or f != config.embedding:
        yield whole("CNN_proj/W_proj", (f, config.embedding), "projection_kernel")
        yield whole("CNN_proj/b_proj", (config.embedding,), "projection_bias")


def _lstm_slots(config: BiLMConfig) -> Iterator[Slot]:
    h, p = config.cells, config.embedding
    for d in range(DIRECTIONS):
        for layer in range(config.layers):
            cell = f"RNN_{d}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/"
            ours = f"lstm_{layer}/"
            both, half = (2 * p, 4 * h), (DIRECTIONS, p, 4 * h)
            yield Slot(cell + "W_0", both, slice(0, p), ours + "input_kernel", half, d)
            yield Slot(cell + "W_0", both, slice(p, None), ours + "recurrent_kernel", half, d)
            yield Slot(cell + "B", (4 * h,), slice(None), ours + "bias", (DIRECTIONS, 4 * h), d)
            if config.projected:
                shape = (DIRECTIONS, h, p)
                yield Slot(cell + "W_P_0", (h, p), slice(None), ours + "projection_kernel", shape, d)


def read_bilm(options: str | Path, weights: str | Path) -> tuple[BiLMConfig, dict[str, Any]]:
    """Read a model in the official format.

    Args:
        options: its JSON, perhaps gzipped (``.gz``).
        weights: its HDF5, perhaps gzipped.

    Returns:
        The configuration and the parameters, all but a softmax's, float32.

    Raises:
        InputError: a file is missing, damaged, or lacks what the other asks for; the key
            or dataset is named.
    """
    options, weights = Path(options), Path(weights)
    config = _read_options(options)
    with open_datasets(weights) as datasets:
        config = _with_projections(config, datasets)
        table = slots(config)
        arrays = read_floats(datasets, {slot.dataset: slot.shape for slot in table}, weights)
    params: dict[str, Any] = {}
    for slot in table:
        param = params.setdefault(slot.param, np.empty(slot.param_shape, np.float32))
        part = param if slot.direction is None else param[slot.direction]
        part[...] = arrays[slot.dataset][slot.rows].reshape(part.shape)
    return config, params


def write_bilm(
    config: BiLMConfig, params: Mapping[str, Any], options: str | Path, weights: str | Path
) -> None:
    """Write a model in the official format; what `read_bilm` gives, it gives back.

    Args:
        config: of the model.
        params: named with "/" between levels; a softmax among them is left out.
        options: the JSON to write, for inference (262 characters).
        weights: the HDF5 to write.

    Raises:
        InputError: the model reads words, for which the format has no place.
    """
    for path in (options, weights):
        if str(path).endswith(".gz"):
            raise InputError(f"{path}: the files are written as they are; give names without .gz")
    if Path(options).resolve() == Path(weights).resolve():
        raise InputError(f"{weights}: options and weights are two files; give each a name of its own")
    if config.input != "characters":
        raise InputError(
            f"{weights}: the official format holds models that read characters, and this one reads words; "
            "use save_pretrained, or pre-train with --input characters"
        )
    arrays: dict[str, np.ndarray] = {}
    for slot in slots(config):
        data = arrays.setdefault(slot.dataset, np.empty(slot.shape, np.float32))
        param = np.asarray(params[slot.param], np.float32)
        part = data[slot.rows]
        part[...] = (param if slot.direction is None else param[slot.direction]).reshape(part.shape)
    write_arrays(Path(weights), arrays)
    try:
        write_atomically(Path(options), json.dumps(_to_options(config)) + "\n")
    except OSError as error:
        raise InputError(f"{options}: cannot be written ({error.strerror}); give another path") from None


def _with_projections(config: BiLMConfig, names: Container[str]) -> BiLMConfig:
    """bilm-tf leaves out a projection between equal widths, AllenNLP writes it: the file decides."""
    characters = replace(config.characters, project_filters="CNN_proj/W_proj" in names)
    cell = "RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell/W_P_0" in names
    return replace(config, characters=characters, project_cells=cell)


class _Options:
    """A JSON object whose values are asked for by key, kind and least value."""

    def __init__(self, path: Path):
        self.path = path
        data = read_bytes(path)
        try:
            self.data = json.loads(data.decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            reason = str(error)[:100]
            raise InputError(f"{path}: is not JSON ({reason}); give the model's options file") from None
        if not isinstance(self.data, dict):
            raise InputError(f"{path}: is not an object of JSON; give the model's options file")

    def get(self, key: str, kind: Any, least: float = 0, most: float = 1e6, default: Any = None) -> Any:
        value: Any = self.data
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        value = default if value is None else value
        if kind is float and type(value) is int:
            value = float(value)
        number = kind in (int, float)
        if type(value) is not kind or (number and not least <= value <= most):
            bounds = f" from {least} to {most:.0f}" if number else ""
            shown = json.dumps(value)[:60]
            raise InputError(f"{self.path}: {key} must be {_KINDS[kind]}{bounds}, not {shown}")
        return value


def _read_options(path: Path) -> BiLMConfig:
    options = _Options(path)
    get = options.get
    if "char_cnn" not in options.data:
        raise InputError(f"{path}: has no char_cnn; only models that read characters can be loaded")
    get("char_cnn.n_characters", int, IDS - 1, IDS, default=IDS)
    get("char_cnn.max_characters_per_token", int, CHARACTERS, CHARACTERS, default=CHARACTERS)
    return BiLMConfig(
        input="characters",
        characters=_char_cnn(options),
        embedding=get("lstm.projection_dim", int, 1),
        cells=get("lstm.dim", int, 1),
        layers=get("lstm.n_layers", int, 1, 64),
        skip=get("lstm.use_skip_connections", bool, default=False),
        cell_clip=get("lstm.cell_clip", float, default=0.0) or None,
        projection_clip=get("lstm.proj_clip", float, default=0.0) or None,
        tie=False,
    )


def _char_cnn(options: _Options) -> CharCNNConfig:
    activation = options.get("char_cnn.activation", str)
    if activation not in ("relu", "tanh"):
        raise InputError(f"{options.path}: char_cnn.activation must be relu or tanh, not {activation[:60]}")
    filters = options.get("char_cnn.filters", list)
    for item in filters:
        pair = isinstance(item, list) and len(item) == 2 and all(type(n) is int and n > 0 for n in item)
        if not pair or item[0] > CHARACTERS:
            shown = json.dumps(item)[:60]
            raise InputError(f"{options.path}: char_cnn.filters must hold pairs [width, number], not {shown}")
    if not filters:
        raise InputError(f"{options.path}: char_cnn.filters is empty; give the model's options file")
    return CharCNNConfig(
        filters=tuple((width, n) for width, n in filters),
        character_features=options.get("char_cnn.embedding.dim", int, 1),
        highway=options.get("char_cnn.n_highway", int, 0, 100, default=0),
        activation=activation,
    )


def _to_options(config: BiLMConfig) -> dict[str, Any]:
    c = config.characters
    return {
        "lstm": {
            "cell_clip": config.cell_clip,
            "use_skip_connections": config.skip,
            "n_layers": config.layers,
            "proj_clip": config.projection_clip,
            "projection_dim": config.embedding,
            "dim": config.cells,
        },
        "char_cnn": {
            "embedding": {"dim": c.character_features},
            "filters": [list(pair) for pair in c.filters],
            "n_highway": c.highway,
            "n_characters": IDS,
            "max_characters_per_token": CHARACTERS,
            "activation": c.activation,
        },
    }


def write_softmax(path: Path, vocabulary: Vocabulary, params: Mapping[str, Any]) -> None:
    """Write what the official format leaves out: the softmax and the names of its classes."""
    arrays: dict[str, Any] = {name: np.asarray(params[name], np.float32) for name in _SOFTMAX}
    write_arrays(path, arrays | {"tokens": list(vocabulary.tokens[1:])})


def read_softmax(path: Path, width: int) -> tuple[Vocabulary, dict[str, np.ndarray]]:
    """Read what `write_softmax` wrote, for a model whose states are of that width.

    Raises:
        InputError: the file is damaged, or of another model.
    """
    with open_datasets(path) as datasets:
        names = datasets.pop("tokens", None)
        if names is None or names.ndim != 1 or h5py.check_string_dtype(names.dtype) is None:
            raise InputError(f"{path}: has no list of tokens; export the model again")
        try:
            vocabulary = Vocabulary([str(token) for token in names.asstr()[...]], str(path))
        except UnicodeDecodeError:
            raise InputError(f"{path}: a token is not UTF-8; export the model again") from None
        v = len(vocabulary)
        shapes = {"softmax_table": (v, width), "softmax_bias": (v,)}
        return vocabulary, read_floats(datasets, shapes, path)
