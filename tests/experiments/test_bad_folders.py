"""Exported folders and runs that are not what they should be, with digests that are right."""

import json
import os
import struct
from dataclasses import asdict

import numpy as np
import pytest
from exported import CONFIGURATION, MODEL, PARAMS, WEIGHTS, WORDS, seal, weights

from elmo_jax.data.csv_dataset import DataConfig
from elmo_jax.elmo import Elmo
from elmo_jax.pretrained.folder import VOCABULARY
from elmo_jax.storage.files import CONFIG, read_config, write_config
from elmo_jax.training.checkpoint import Position, Run
from experiments import downstream


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "exported"
    Elmo(MODEL, PARAMS, WORDS).save_pretrained(folder)
    return folder


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
        "softmax_bias is float32 [5] there, but float32 [6]",
    ),
    "another dtype": (
        weights(**{BIAS: np.zeros(6, np.float64)}),
        "softmax_bias is float64 [6] there, but float32",
    ),
    "an array less": (weights(**{BIAS: None}), "softmax_bias is missing there"),
    "a path for a name": (
        weights(**{"../../etc/passwd": np.zeros(1, np.float32)}),
        "../../etc/passwd is float32 [1]",
    ),
    "a name in a name": (
        weights(**{f"{BIAS}/x": np.zeros(1, np.float32)}),
        "softmax_bias/x is float32 [1] there, but none",
    ),
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(name, exported, refused):
    data, said = SAFETENSORS[name]
    (exported / WEIGHTS).write_bytes(data)
    seal(exported)
    refused(downstream.main, ["--pretrained", exported], said)


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
def test_vocabularies(name, exported, refused):
    data, said = VOCABULARIES[name]
    (exported / VOCABULARY).write_bytes(data)
    seal(exported)
    refused(downstream.main, ["--pretrained", exported], said)


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
    "a model of 10**30": ({"model": {"cells": 10**30}}, "model: cells is"),
    "a model of 2 billion layers": ({"model": {"layers": 2_000_000_000}}, "no sizes of a model"),
    "a model of no cells": ({"model": {"cells": 0}}, "no sizes of a model"),
    "a model of NaN": ({"model": {"dropout": float("nan")}}, "model: dropout is nan"),
    "a model of unknown parts": ({"model": {"__class__": "os"}}, "'__class__' is not known"),
    "data of text": ({"data": "x"}, "data: Expected `object`, got `str`"),
    "data of a number": ({"data": {"dataset": 5}}, "data: Expected `str`, got `int`"),
    "data with NUL": ({"data": {"dataset": "a\0b"}}, "--dataset holds a NUL character"),
    "data of -1 tokens": ({"data": {"max_length": -1}}, "--max-length must be at least 1"),
    "files of a number": ({"files": 5}, "config.json lists no files"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations(name, exported, refused):
    data, said = CONFIGS[name]
    if isinstance(data, bytes):
        (exported / CONFIG).write_bytes(data)
    elif "files" in data:
        write_config(exported, {"model": asdict(CONFIGURATION)}, {})
    else:
        seal(exported, **data)
    refused(downstream.main, ["--pretrained", exported], said)


@pytest.mark.parametrize(
    ("name", "said"),
    [("../../../etc/passwd", "not below it"), ("/etc/passwd", "not below it"), ("a\0b", "not below it")],
)
def test_digests_name_no_file_outside(name, said, exported, refused):
    write_config(exported, {"model": asdict(CONFIGURATION)}, {name: {"size": 1, "sha256": ""}})
    refused(downstream.main, ["--pretrained", exported], said)


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
    "no data set": (lambda folder: write_config(folder, *sealed(folder)), "give one by --dataset"),
}


def sealed(folder):
    config = read_config(folder)
    files = config.pop("files")
    return config, files


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(name, exported, refused):
    change, said = FOLDERS[name]
    change(exported)
    refused(downstream.main, ["--pretrained", exported], said)


@pytest.fixture
def run(tmp_path):
    config = {"model": asdict(CONFIGURATION), "data": asdict(DataConfig())}
    run = Run.create(tmp_path / "run", config, "perplexity", files={VOCABULARY: WORDS.text})
    run.save({"params": PARAMS}, Position(1))
    run.close()
    return run.path


def test_runs(run, tmp_path, monkeypatch, refused):
    args = ["--pretrained", run]
    monkeypatch.setattr("warnings.warn", lambda *_, **__: None)
    for path in (run / "checkpoints" / "1" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    refused(downstream.main, args, "every saved step is damaged")
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    refused(downstream.main, args, "holds no saved step")
    (run / "checkpoints").write_text("")
    refused(downstream.main, args, "holds no saved step")
    for path, said in ((run / CONFIG, "holds no run"), (tmp_path / "none", "holds no run"), ("", "is empty")):
        refused(downstream.main, ["--pretrained", path], said)
