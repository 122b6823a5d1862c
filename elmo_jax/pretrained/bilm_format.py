"""Official ELMo format of bilm-tf and AllenNLP: JSON options, and HDF5 weights mapped by a table of slots."""

import json
from collections.abc import Container, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import h5py
import msgspec
import numpy as np
from msgspec import Meta, Struct

from elmo_jax.config import CASED, CHARACTERS, BiLMConfig, CharCNNConfig, TextConfig
from elmo_jax.data.batching import DIRECTIONS
from elmo_jax.data.characters import IDS
from elmo_jax.data.text import Vocabulary
from elmo_jax.errors import InputError
from elmo_jax.storage.files import read_bytes, write_atomically
from elmo_jax.storage.hdf5 import open_datasets, read_floats, write_arrays

_Size = Annotated[int, Meta(ge=1, le=10**6)]
_Width = Annotated[int, Meta(ge=1, le=CHARACTERS)]  # of a filter
_Clip = Annotated[float, Meta(ge=0, le=10**6)]


class _LSTMOptions(Struct, kw_only=True):
    cell_clip: _Clip | None = None
    use_skip_connections: bool | None = None
    n_layers: Annotated[int, Meta(ge=1, le=64)]
    proj_clip: _Clip | None = None
    projection_dim: _Size
    dim: _Size


class _EmbeddingOptions(Struct):
    dim: _Size


class _CharCNNOptions(Struct, kw_only=True):
    embedding: _EmbeddingOptions
    filters: Annotated[list[tuple[_Width, _Size]], Meta(min_length=1)]
    n_highway: Annotated[int, Meta(ge=0, le=100)] | None = None
    n_characters: Annotated[int, Meta(ge=IDS - 1, le=IDS)] | None = IDS  # 261 without the padding token
    max_characters_per_token: Annotated[int, Meta(ge=CHARACTERS, le=CHARACTERS)] | None = CHARACTERS
    activation: Literal["relu", "tanh"]


class _Options(Struct):
    lstm: _LSTMOptions
    char_cnn: _CharCNNOptions
    text: TextConfig = CASED  # our addition, which other readers ignore


class Slot(NamedTuple):
    """Rows of a dataset that hold a parameter, or one direction of it.

    Attributes:
        dataset: Name in the file.
        shape: Shape of the dataset.
        rows: Rows of the dataset's first axis.
        param: Name of the parameter, with "/" between levels.
        param_shape: Shape of the parameter.
        direction: Index into the parameter's first axis; None for the complete parameter.
    """

    dataset: str
    shape: tuple[int, ...]
    rows: slice
    param: str
    param_shape: tuple[int, ...]
    direction: int | None = None


def slots(config: BiLMConfig) -> list[Slot]:
    """Return the table for a model of this configuration."""
    return [*_character_slots(config), *_lstm_slots(config)]


def _character_slots(config: BiLMConfig) -> Iterator[Slot]:
    c = config.characters

    def slot(dataset: str, shape: tuple[int, ...], param: str, param_shape: tuple[int, ...] | None = None):
        return Slot(dataset, shape, slice(None), f"embedder/{param}", param_shape or shape)

    yield slot("char_embed", (IDS - 1, c.character_features), "characters")
    for i, (width, n) in enumerate(c.filters):
        kernel = (width, c.character_features, n)
        yield slot(f"CNN/W_cnn_{i}", (1, *kernel), f"filter_{i}", kernel)
        yield slot(f"CNN/b_cnn_{i}", (n,), f"filter_bias_{i}")
    f = sum(n for _, n in c.filters)
    for k in range(c.highway):
        for name in ("carry", "transform"):
            yield slot(f"CNN_high_{k}/W_{name}", (f, f), f"{name}_{k}_kernel")
            yield slot(f"CNN_high_{k}/b_{name}", (f,), f"{name}_{k}_bias")
    if c.project_filters or f != config.embedding:
        yield slot("CNN_proj/W_proj", (f, config.embedding), "projection_kernel")
        yield slot("CNN_proj/b_proj", (config.embedding,), "projection_bias")


def _lstm_slots(config: BiLMConfig) -> Iterator[Slot]:
    h, p = config.cells, config.embedding
    for d in range(DIRECTIONS):
        for layer in range(config.layers):
            cell = f"RNN_{d}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/"
            param = f"lstm_{layer}/"
            both, half = (2 * p, 4 * h), (DIRECTIONS, p, 4 * h)
            yield Slot(cell + "W_0", both, slice(0, p), param + "input_kernel", half, d)
            yield Slot(cell + "W_0", both, slice(p, None), param + "recurrent_kernel", half, d)
            yield Slot(cell + "B", (4 * h,), slice(None), param + "bias", (DIRECTIONS, 4 * h), d)
            if config.projected:
                shape = (DIRECTIONS, h, p)
                yield Slot(cell + "W_P_0", (h, p), slice(None), param + "projection_kernel", shape, d)


def read_bilm(options: str | Path, weights: str | Path) -> tuple[BiLMConfig, dict[str, Any], TextConfig]:
    """Read a model in the official format.

    Args:
        options: JSON file, may end in ``.gz``.
        weights: HDF5 file, may end in ``.gz``.

    Returns:
        The configuration; the float32 parameters without a softmax, named with "/" between levels; and the
        text preparation.

    Raises:
        InputError: A file is missing or damaged, or the two are of different models.
    """
    options, weights = Path(options), Path(weights)
    config, text = _read_options(options)
    with open_datasets(weights) as datasets:
        config = _find_projections(config, datasets)
        table = slots(config)
        arrays = read_floats(datasets, {slot.dataset: slot.shape for slot in table}, weights)
    params: dict[str, Any] = {}
    for slot in table:
        param = params.setdefault(slot.param, np.empty(slot.param_shape, np.float32))
        part = param if slot.direction is None else param[slot.direction]
        part[...] = arrays[slot.dataset][slot.rows].reshape(part.shape)
    return config, params, text


def write_bilm(
    config: BiLMConfig,
    params: Mapping[str, Any],
    options: str | Path,
    weights: str | Path,
    text: TextConfig = CASED,
) -> None:
    """Write a model in the official format; `read_bilm` returns the same parameters.

    Args:
        config: Sizes of the model.
        params: Parameters named with "/" between levels; a softmax is left out.
        options: JSON file to write.
        weights: HDF5 file to write.
        text: Text preparation.

    Raises:
        InputError: The model reads words, which the format cannot hold, or a file cannot be written.
    """
    for path in (options, weights):
        if str(path).endswith(".gz"):
            raise InputError(f"{path}: files are written uncompressed; give names without .gz")
    if Path(options).resolve() == Path(weights).resolve():
        raise InputError(f"{weights}: options and weights are two files; give two names")
    if config.input != "characters":
        raise InputError(f"{weights}: the format cannot hold a model that reads words; use save_pretrained")
    arrays: dict[str, np.ndarray] = {}
    for slot in slots(config):
        data = arrays.setdefault(slot.dataset, np.empty(slot.shape, np.float32))
        param = np.asarray(params[slot.param], np.float32)
        part = data[slot.rows]
        part[...] = (param if slot.direction is None else param[slot.direction]).reshape(part.shape)
    write_arrays(Path(weights), arrays)
    try:
        write_atomically(Path(options), json.dumps(_make_options(config, text)) + "\n")
    except OSError as error:
        raise InputError(f"{options}: cannot be written ({error.strerror}); give another path") from None


def _find_projections(config: BiLMConfig, names: Container[str]) -> BiLMConfig:
    """Look up whether equal widths are projected: AllenNLP writes such projections, bilm-tf does not."""
    characters = replace(config.characters, project_filters="CNN_proj/W_proj" in names)
    cell = "RNN_0/RNN/MultiRNNCell/Cell0/LSTMCell/W_P_0" in names
    return replace(config, characters=characters, project_cells=cell)


def _read_options(path: Path) -> tuple[BiLMConfig, TextConfig]:
    try:
        data = read_bytes(path).removeprefix(b"\xef\xbb\xbf")  # byte-order mark
        options = msgspec.json.decode(data, type=_Options)
    except (msgspec.DecodeError, RecursionError) as error:
        advice = "give the options file of a model that reads characters"
        raise InputError(f"{path}: {str(error)[:200]}; {advice}") from None
    lstm, cnn = options.lstm, options.char_cnn
    config = BiLMConfig(
        input="characters",
        characters=CharCNNConfig(
            filters=tuple(cnn.filters),
            character_features=cnn.embedding.dim,
            highway=cnn.n_highway or 0,
            activation=cnn.activation,
        ),
        embedding=lstm.projection_dim,
        cells=lstm.dim,
        layers=lstm.n_layers,
        skip=bool(lstm.use_skip_connections),
        cell_clip=lstm.cell_clip or None,
        projection_clip=lstm.proj_clip or None,
        tie=False,
    )
    return config, options.text


def _make_options(config: BiLMConfig, text: TextConfig) -> dict[str, Any]:
    c = config.characters
    lstm = {
        "cell_clip": config.cell_clip,
        "use_skip_connections": config.skip,
        "n_layers": config.layers,
        "proj_clip": config.projection_clip,
        "projection_dim": config.embedding,
        "dim": config.cells,
    }
    char_cnn = {
        "embedding": {"dim": c.character_features},
        "filters": c.filters,
        "n_highway": c.highway,
        "n_characters": IDS,
        "max_characters_per_token": CHARACTERS,
        "activation": c.activation,
    }
    return {"lstm": lstm, "char_cnn": char_cnn} | ({} if text == CASED else {"text": asdict(text)})


def write_softmax(path: Path, vocabulary: Vocabulary, params: Mapping[str, Any]) -> None:
    """Write the softmax and its vocabulary, which the official format leaves out."""
    names = ("softmax_table", "softmax_bias")
    arrays: dict[str, Any] = {name: np.asarray(params[name], np.float32) for name in names}
    write_arrays(path, arrays | {"tokens": list(vocabulary.tokens[1:])})


def read_softmax(path: Path, width: int) -> tuple[Vocabulary, dict[str, np.ndarray]]:
    """Read the file of `write_softmax` for a model with LSTM outputs of this width.

    Raises:
        InputError: The file is damaged, or of another model.
    """
    with open_datasets(path) as datasets:
        names = datasets.pop("tokens", None)
        if names is None or names.ndim != 1 or h5py.check_string_dtype(names.dtype) is None:
            raise InputError(f"{path}: has no list of tokens; export the model again")
        try:
            vocabulary = Vocabulary([str(token) for token in names.asstr()[...]], str(path))
        except UnicodeDecodeError:
            raise InputError(f"{path}: a token is not UTF-8; export the model again") from None
        shapes = {"softmax_table": (len(vocabulary), width), "softmax_bias": (len(vocabulary),)}
        return vocabulary, read_floats(datasets, shapes, path)
