"""Damaged or hostile exported folders and runs, most of them with valid digests."""

import json
import os
import struct
from dataclasses import asdict

import numpy as np
import pytest
from exported import CONFIGURATION, MODEL, PARAMS, WEIGHTS, WORDS, seal, weights

from elmo_jax.data.csv_dataset import DataConfig
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.pretrained.folder import VOCABULARY
from elmo_jax.storage.files import CONFIG, read_config, write_config
from elmo_jax.training.checkpoint import Position, Run
from experiments import downstream
from experiments.common.inputs import data_of


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "exported"
    Elmo(MODEL, PARAMS, WORDS).save_pretrained(folder)
    return folder


def assert_refused(folder, message):
    with pytest.raises(InputError) as info:
        Elmo.from_pretrained(folder)
    assert message in str(info.value) and "\n" not in str(info.value) and len(str(info.value)) < 1000


def header(**entries):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text


BIAS = "softmax_bias"
SAFETENSORS = {
    "empty": (b"", "cannot be read"),
    "zeros": (b"\0" * 100, "cannot be read"),
    "a header of 2**60 bytes": (struct.pack("<Q", 2**60) + b"{}", "cannot be read"),
    "a header of 200 MB": (struct.pack("<Q", 200_000_000) + b" " * 1000, "cannot be read"),
    "a header that is no object": (header()[:8] + b"[]", "cannot be read"),
    "deep nesting": (struct.pack("<Q", 100_000) + b"[" * 100_000, "cannot be read"),
    "an array beyond the end": (
        header(w={"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}),
        "cannot be read",
    ),
    "overlapping arrays": (
        header(**{n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}) + b"\0" * 4,
        "cannot be read",
    ),
    "an unknown dtype": (
        header(w={"dtype": "F3", "shape": [1], "data_offsets": [0, 4]}) + b"\0" * 4,
        "cannot be read",
    ),
    "NaN": (
        weights(**{BIAS: np.full(6, np.nan, np.float32)}),
        "softmax_bias holds numbers that are not finite",
    ),
    "another shape": (
        weights(**{BIAS: np.zeros(5, np.float32)}),
        "softmax_bias is float32 [5], expected float32 [6]",
    ),
    "another dtype": (
        weights(**{BIAS: np.zeros(6, np.float64)}),
        "softmax_bias is float64 [6], expected float32",
    ),
    "an array less": (weights(**{BIAS: None}), "softmax_bias is missing"),
    "a path for a name": (
        weights(**{"../../etc/passwd": np.zeros(1, np.float32)}),
        "../../etc/passwd is float32 [1]",
    ),
    "a name in a name": (
        weights(**{f"{BIAS}/x": np.zeros(1, np.float32)}),
        "softmax_bias/x is float32 [1], expected nothing",
    ),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_weights_are_refused(name, exported):
    data, message = SAFETENSORS[name]
    (exported / WEIGHTS).write_bytes(data)
    seal(exported)
    assert_refused(exported, message)


VOCABULARIES = {
    "empty": (b"", "vocab.txt:1: the line is empty"),
    "another order": (b"</S>\n<S>\n<UNK>\nthe\nbank\n", "vocab.txt:1: must begin with"),
    "a token twice": (b"<S>\n</S>\n<UNK>\nthe\nthe\n", "vocab.txt:4: 'the' occurs twice"),
    "binary": (b"<S>\n</S>\n<UNK>\n\xff\xfe\n", "vocab.txt:4: byte 0xff is not UTF-8"),
    "NUL": (b"<S>\n</S>\n<UNK>\nth\0e\nbank\n", "vocab.txt:4: byte 0x00 is not UTF-8"),
    "a line of 50 MB": (b"<S>\n</S>\n<UNK>\n" + b"x" * 50_000_000, "is float32 [6"),
    "a line of 50 MB twice": (
        b"<S>\n</S>\n<UNK>\n" + b"x" * 25_000_000 + b"\n" + b"x" * 25_000_000,
        "occurs twice",
    ),
    "a million tokens": (WORDS.text.encode() + b"".join(b"w%d\n" % i for i in range(10**6)), "is float32 [6"),
}


@pytest.mark.parametrize("name", VOCABULARIES)
def test_vocabulary_is_refused(name, exported):
    data, message = VOCABULARIES[name]
    (exported / VOCABULARY).write_bytes(data)
    seal(exported)
    assert_refused(exported, message)


CONFIGS = {
    "empty": (b"", "config.json: cannot be read"),
    "binary": (b"\xff\xfe", "config.json: cannot be read"),
    "deep nesting": (b'{"a":' * 100_000, "config.json: cannot be read"),
    "deep nesting, whole": (b"[" * 900 + b"]" * 900, "config.json: is not what was saved"),
    "a number of 10,000 digits": (b'{"model": ' + b"9" * 10_000 + b"}", "config.json: cannot be read"),
    "20 MB": (b" " * 20_000_000, "config.json: cannot be read (longer than"),
    "no object": (b'"model"', "config.json: is not what was saved"),
    "no seal": (b'{"model": {}}', "config.json: is not what was saved"),
    "a wrong seal": (b'{"model": {}, "sha256": []}', "config.json: is not what was saved"),
    "no model": ({"model": None}, "holds no language model"),
    "a model of text": ({"model": {"cells": "4"}}, "model: Expected `int`, got `str`"),
    "10**30 cells": ({"model": {"cells": 10**30}}, "model: Expected `int` <= 65536 - at `$.cells`"),
    "2 billion layers": ({"model": {"layers": 2_000_000_000}}, "`int` <= 64 - at `$.layers`"),
    "no cells": ({"model": {"cells": 0}}, "`int` >= 1 - at `$.cells`"),
    "NaN": ({"model": {"dropout": float("nan")}}, "at `$.dropout`"),
    "unknown settings": ({"model": {"__class__": "os"}}, "'__class__' is not known"),
    "files of a number": ({"files": 5}, "config.json lists no files"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_is_refused(name, exported):
    data, message = CONFIGS[name]
    if isinstance(data, bytes):
        (exported / CONFIG).write_bytes(data)
    elif "files" in data:
        write_config(exported, {"model": asdict(CONFIGURATION)}, {})
    else:
        seal(exported, **data)
    assert_refused(exported, message)


DATA = {
    "text": ("x", "data: Expected `object`, got `str`"),
    "a number": ({"dataset": 5}, "data: Expected `str`, got `int`"),
    "NUL": ({"dataset": "a\0b"}, "contains a NUL character"),
    "-1 tokens": ({"max_length": -1}, "data: Expected `int` >= 1 - at `$.max_length`"),
}


@pytest.mark.parametrize("name", DATA)
def test_data_set_is_refused(name, exported):
    data, message = DATA[name]
    seal(exported, data=data)
    with pytest.raises(InputError) as info:
        data_of(exported)
    assert message in str(info.value)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "/etc/passwd", "a\0b"])
def test_digests_of_files_outside_the_folder_are_refused(name, exported):
    write_config(exported, {"model": asdict(CONFIGURATION)}, {name: {"size": 1, "sha256": ""}})
    assert_refused(exported, "not in the folder")


def pipe(folder):
    (folder / VOCABULARY).unlink()
    os.mkfifo(folder / VOCABULARY)


def endless(folder):
    (folder / VOCABULARY).unlink()
    (folder / VOCABULARY).symlink_to("/dev/zero")


def circle(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).symlink_to(CONFIG)


def config_is_a_folder(folder):
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()


FOLDERS = {
    "a pipe": (pipe, "vocab.txt is missing"),
    "a link to what never ends": (endless, "vocab.txt is missing"),
    "a link to itself": (circle, "holds no run"),
    "a folder for a file": (config_is_a_folder, "holds no run"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), "model.safetensors is missing"),
    "no vocabulary": (lambda folder: (folder / VOCABULARY).unlink(), "vocab.txt is missing"),
    "weights of another time": (lambda f: (f / WEIGHTS).write_bytes(weights(**{BIAS: None})), "(size)"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folder_is_refused(name, exported):
    change, message = FOLDERS[name]
    change(exported)
    assert_refused(exported, message)


@pytest.fixture
def run(tmp_path):
    config = {"model": asdict(CONFIGURATION), "data": asdict(DataConfig())}
    run = Run.create(tmp_path / "run", config, "perplexity", files={VOCABULARY: WORDS.text})
    run.save({"params": PARAMS}, Position(1))
    run.close()
    return run.path


def test_run_without_valid_steps_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
    for path in (run / "checkpoints" / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    assert_refused(run, "every saved step is damaged")
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    assert_refused(run, "holds no saved step")
    (run / "checkpoints").write_text("")
    assert_refused(run, "holds no saved step")
    for path in (run / CONFIG, tmp_path / "none"):
        assert_refused(path, "holds no run")


def test_command_needs_a_data_set(exported, refused):
    config = read_config(exported)
    write_config(exported, config, config.pop("files"))
    refused(downstream.main, ["--pretrained", exported], "--dataset")
