"""Commands refuse damaged or hostile models and word vectors."""

import zipfile
from dataclasses import replace

import h5py
import numpy as np
import pytest
from bad_files import folder, raw
from exported import WORDS
from official import make

from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.models.combiners import CombinerConfig
from elmo_jax.pretrained.folder import VOCABULARY
from elmo_jax.storage.files import digest, write_config
from experiments import downstream, evaluate

SENTENCES = {
    "empty": (b"", "s.json: Input data was truncated"),
    "binary": (b"\xff\xfe", "s.json: JSON is malformed"),
    "numbers": (b"[[1]]", "give a JSON list of lists of sentences"),
    "two lists": (b'[["the"], ["the"]]', "must hold one list per EXPECTED file"),
    "no lists": (b"[]", "must hold one list per EXPECTED file"),
    "empty list": (b"[[]]", "all of one length above 0"),
    "other sentences": (b'[["the bank"]]', "e.hdf5: has no dataset 0 of shape"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_selfcheck_refuses_sentences(name, tmp_path, refused):
    make(tmp_path)
    data, message = SENTENCES[name]
    (tmp_path / "s.json").write_bytes(data)
    with h5py.File(tmp_path / "e.hdf5", "w") as file:
        file["0"] = np.zeros(3)
    paths = [tmp_path / file for file in ("options.json", "weights.hdf5", "s.json", "e.hdf5")]
    refused(evaluate.main, ["--selfcheck", *paths], message)


def swap(name, value):
    def change(path):
        with h5py.File(path, "r+") as file:
            del file[name]
            file[name] = value

    return change


def announce(name, shape, dtype, **more):
    def change(path):
        with h5py.File(path, "r+") as file:
            del file[name]
            file.create_dataset(name, shape, dtype, **more)

    return change


HDF5 = {  # only the softmax file defines its own sizes
    "empty": (raw(b""), "cannot be read as HDF5"),
    "binary": (raw(b"\x89HDF\r\n\x1a\n" + b"\xff" * 1000), "cannot be read as HDF5"),
    "a folder": (folder, "is not a regular file"),
    "tokens of numbers": (swap("tokens", np.arange(5)), "has no list of tokens"),
    "tokens twice": (swap("tokens", ["<S>", "</S>", "<UNK>", "a", "a"]), "'a' occurs twice"),
    "tokens of bytes": (swap("tokens", [b"<S>", b"</S>", b"<UNK>", b"\xff", b"b"]), "is not UTF-8"),
    "another shape": (
        swap("softmax_bias", np.zeros(3, "f")),
        "dataset softmax_bias is float32 (3,), expected float (6,)",
    ),
    "NaN": (swap("softmax_bias", np.full(6, np.nan, "f")), "softmax_bias holds numbers that are not finite"),
    "a million million tokens": (
        announce("tokens", 10**12, h5py.string_dtype(), chunks=(1000,)),
        "dataset tokens announces more",
    ),
    "data in another file": (
        announce("softmax_bias", (6,), "f", external=[("/etc/passwd", 0, 24)]),
        "softmax_bias is stored in another file",
    ),
    "a link to another file": (
        swap("tokens", h5py.ExternalLink("/etc/passwd", "/x")),
        "has no list of tokens",
    ),
}


@pytest.mark.parametrize("name", HDF5)
def test_softmax_file_is_refused(name, tmp_path, refused):
    make(tmp_path, vocabulary=WORDS)
    change, message = HDF5[name]
    change(tmp_path / "weights.softmax.hdf5")
    refused(evaluate.main, ["x", "--bilm", tmp_path / "options.json", tmp_path / "weights.hdf5"], message)


def archive(path, **members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(f"{name}.npy", data)


def npy(shape, descr="<f4", data=b""):
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


NAMES = npy((10,), "|u1", b"<UNK>\nbank")
NPZ = {
    "empty": (raw(b""), "holds no word vectors"),
    "binary": (raw(b"PK\x03\x04" + b"\xff" * 100), "holds no word vectors"),
    "missing": (lambda path: path.unlink(), "no word vectors here"),
    "a folder": (folder, "no word vectors here"),
    "NaN": (lambda path: np.savez(path, tokens=NUMBERS, matrix=[[np.nan], [1]]), "'<UNK>' is not finite"),
    "another shape": (lambda path: np.savez(path, tokens=NUMBERS, matrix=np.zeros((3, 1))), "holds no word"),
    "no matrix": (lambda path: np.savez(path, tokens=NUMBERS, matrix=np.zeros(2)), "holds no word vectors"),
    "a token twice": (
        lambda path: np.savez(path, tokens=np.frombuffer(b"a\na", np.uint8), matrix=np.zeros((2, 1))),
        "occurs twice; remove one",
    ),
    "objects": (
        lambda path: np.savez(path, tokens=np.array(["a", None], object), matrix=np.zeros((2, 1))),
        "holds no word vectors",
    ),
    "an array of 4 TB": (
        lambda path: archive(path, tokens=NAMES, matrix=npy((2, 5 * 10**11))),
        "holds no word vectors",
    ),
    "names of paths": (lambda path: archive(path, **{"../../tokens": NAMES}), "holds no word vectors"),
}
NUMBERS = np.frombuffer(b"<UNK>\nbank", np.uint8)


@pytest.fixture
def counted(tmp_path):
    """A run of vectors."""
    run = tmp_path / "svd"
    run.mkdir()
    (run / VOCABULARY).write_text("<S>\n</S>\n<UNK>\nbank\n")
    WordVectors(["<UNK>", "bank"], np.eye(2)).save(run / "vectors.npz")
    (run / "results.json").write_text("{}")
    files = {VOCABULARY: digest(run / VOCABULARY)}
    write_config(run, {"monitor": "loss", "method": "svd", "data": {}}, files)
    return run


@pytest.mark.parametrize("name", NPZ)
def test_word_vectors_are_refused(name, counted, tmp_path, refused):
    change, message = NPZ[name]
    change(counted / "vectors.npz")
    refused(
        downstream.main, ["--features", "svd", "--vectors", counted, "--output", tmp_path / "down"], message
    )
    assert not (tmp_path / "down").exists()


RUNS = {
    "no run": (["--features", "sgns", "--vectors", "none"], "none: no word vectors here; make them with"),
    "another method's": (
        ["--features", "sgns", "--vectors", "svd"],
        "svd: holds svd vectors; give a run of",
    ),
    "fine-tuned": (["--features", "svd", "--vectors", "svd", "--finetune"], "need --features elmo"),
    "no labels": (["--features", "svd", "--vectors", "svd", "--labels", "0"], "--labels must be above 0"),
    "features that are none": (["--features", "glove"], "--features"),
    "a mix of vectors": (
        [
            "--features",
            "svd",
            "--vectors",
            "svd",
            "--combiner",
            "trainable",
        ],  # the default value, given explicitly
        "--combiner has no effect with --features svd; leave it out, or give --features elmo",
    ),
    "normalised vectors": (
        ["--features=sgns", "--layer_norm"],
        "--layer-norm has no effect with --features sgns; leave",
    ),
    "vectors of a language model": (["--features", "svd", "--pretrained", "x"], "--pretrained has no effect"),
    "vectors for a language model": (["--vectors", "svd"], "--vectors needs --features svd or sgns;"),
    "a function's weights": (
        ["--combiner", "function", "--normalize=softmax"],
        "--normalize has no effect with --combiner function; leave it out, or give another --combiner",
    ),
    "a function normalised": (["--combiner", "function", "--no-layer-norm"], "--layer-norm has no effect"),
    "frozen weights normalised": (["--combiner", "frozen", "--normalize", "none"], "--normalize has no eff"),
    "an activation of none": (["--activation", "tanh"], "--activation has no effect with --combiner t"),
    "another vocabulary": (["--features", "svd", "--vectors", "changed"], "vocab.txt is not what was saved"),
}


@pytest.mark.parametrize("name", RUNS)
def test_downstream_flags_are_refused(name, counted, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    args, message = RUNS[name]
    if "changed" in args:
        counted.rename("changed")
        (tmp_path / "changed" / VOCABULARY).write_text("<S>\n</S>\n<UNK>\nrank\n")
    refused(downstream.main, args, message)


def test_unused_settings_of_a_preset_are_not_refused(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    mixed = replace(downstream.PRESETS["best"], combiner=CombinerConfig("frozen", "softmax", True, "tanh"))
    monkeypatch.setitem(downstream.PRESETS, "best", mixed)
    refused(downstream.main, ["--preset", "best", "--features", "svd"], "runs/svd: no word vectors here")
