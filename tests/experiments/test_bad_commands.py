"""Commands refuse wrong texts, output paths, folders and corpora."""

import os
from dataclasses import asdict

import pytest
from bad_files import folder, raw
from exported import MODEL, PARAMS, WORDS

from elmo_jax.data.csv_dataset import DataConfig
from elmo_jax.elmo import Elmo
from elmo_jax.storage.files import write_config
from experiments import embed, evaluate, pretrain, vectors
from experiments.compare import __main__ as compare


@pytest.fixture
def model(tmp_path):
    Elmo(MODEL, PARAMS, WORDS).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "in.txt").write_text("the bank\nthe\n")
    return tmp_path / "in.txt"


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def circle(path):
    path.unlink()
    path.symlink_to(path.name)


TEXTS = {  # change of the text file, and expected message
    "missing": (lambda path: path.unlink(), "in.txt: cannot be read (No such file"),
    "a folder": (folder, "in.txt: is not a regular file"),
    "a pipe": (pipe, "in.txt: is not a regular file"),
    "a link to itself": (circle, "in.txt: cannot be read"),
    "binary": (raw(bytes(range(256))), "in.txt:1: byte 0x00 is not UTF-8 text"),
    "UTF-16": (raw("the bank\n".encode("utf-16")), "in.txt:1: byte 0xff is not UTF-8"),
    "Latin-1": (raw(b"the\ncaf\xe9\n"), "in.txt:2: byte 0xe9 is not UTF-8"),
    "NUL": (raw(b"the\nba\0nk\n"), "in.txt:2: byte 0x00 is not UTF-8 text"),
    "50 MB in a line": (raw(b"x" * 50_000_000 + b"\n\xff"), "in.txt:2: byte 0xff"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_are_refused(name, model, text, tmp_path, refused):
    change, message = TEXTS[name]
    change(text)
    refused(embed.main, [text, tmp_path / "out.h5", "--pretrained", model], message)
    assert not list(tmp_path.glob("out.h5*"))
    refused(evaluate.main, [model, text, "--output", tmp_path / "scores"], message)
    assert not (tmp_path / "scores").exists()


EMBED = {
    "no model": ([], "give one of --pretrained RUN and --bilm"),
    "two models": (["--pretrained", "model", "--bilm", "o", "w"], "give one of"),
    "no such model": (["--pretrained", "none"], "none: holds no run"),
    "a layer that is none": (["--pretrained", "model", "--layers", "bottom"], "--layers"),
    "a dtype that is none": (["--pretrained", "model", "--dtype", "int8"], "--dtype"),
    "no tokens": (["--pretrained", "model", "--max-length", "0"], "--max-length must be at least 1"),
    "a mix of nothing": (["--pretrained", "model", "--layers", "mix"], "need each other"),
    "a mix from nothing": (
        ["--pretrained", "model", "--layers", "mix", "--mix-from", "none"],
        "holds no run",
    ),
    "a mix from a model": (
        ["--pretrained", "model", "--layers", "mix", "--mix-from", "model"],
        "is not a run of downstream",
    ),
    "a million tokens": (["--pretrained", "model", "--long", "refuse"], "in.txt:3: has 1,000,000 tokens"),
}


@pytest.mark.parametrize("name", EMBED)
def test_embed_refuses(name, model, text, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    args, message = EMBED[name]
    if name == "a million tokens":
        text.write_text("the\nbank\n" + "the " * 1_000_000)
    refused(embed.main, [text, "out.h5", *args], message)
    assert not list(tmp_path.glob("out.h5*"))


OUTS = {
    "below a file": ("in.txt/out.h5", "in.txt/out.h5.parts: cannot be written (Not a directory)"),
    "a folder": ("model", "model: is not a regular file; give the HDF5 file to write"),
    "no name": ("", "--out is empty; give it a value"),
    "this folder": (".", "is not a regular file"),
    "the root": ("/", "/: is not a regular file"),
    "above nothing": ("none/..", "none/..: is not a regular file"),
    "the text": ("in.txt", "in.txt: is the text itself"),
    "a name too long": ("x" * 300, "File name too long"),
}


@pytest.mark.parametrize("name", OUTS)
def test_unusable_output_paths_of_embed_are_refused(name, model, text, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    out, message = OUTS[name]
    for flags in ([], ["--overwrite"], ["--resume"]):
        refused(embed.main, [text, out, "--pretrained", model, *flags], message)
    assert text.read_text() == "the bank\nthe\n"


EVALUATE = {
    "nothing": ([], "give a run and at least one text"),
    "a run alone": (["model"], "at least one text"),
    "no run": (["in.txt", "in.txt"], "in.txt: holds no run"),
    "words": (["model", "in.txt", "--top", "0"], "--top must be at least 1"),
    "a blank text": (["model", "blank.txt"], "no sentences; give a text"),
    "scores where a run is": (
        ["model", "in.txt", "--output", "model"],
        "model: holds a run or scores",
    ),
    "scores below a file": (["model", "in.txt", "--output", "in.txt/x"], "cannot be written"),
    "half a check": (["--selfcheck", "o", "w"], "--selfcheck takes OPTIONS WEIGHTS"),
}


@pytest.mark.parametrize("name", EVALUATE)
def test_evaluate_refuses(name, model, text, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blank.txt").write_text("\n \n")
    args, message = EVALUATE[name]
    refused(evaluate.main, args, message)
    Elmo.from_pretrained(model)


VECTORS = {
    "a method that is none": (["--method", "glove"], "--method"),
    "no dimensions": (["--dimensions", "0"], "--dimensions must be at least 1"),
    "no window": (["--window", "0"], "--window must be at least 1"),
    "a power of NaN": (["--exponent", "nan"], "--exponent must be a finite number"),
    "no negatives": (["--negatives", "0"], "--negatives must be at least 1"),
    "a negative rate": (["--rate", "-1"], "--rate must be above 0"),
    "an infinite share": (["--subsample", "inf"], "--subsample must be a finite number"),
    "a count's weighting": (
        ["--weighting", "counts"],
        "--weighting has no effect with --method sgns; leave it out, or give --method svd",
    ),
    "passes of a count": (["--method", "svd", "--epochs", "3"], "--epochs has no effect with --method svd;"),
    "an empty file": (["--dataset", "data"], "train.csv: holds no rows"),
    "another's run": (["--output", "model"], "run folder model already exists"),
    "another's folder": (["--output", "data"], "data: is not empty and holds no run"),
    "a file": (["--output", "in.txt"], "in.txt: is a file"),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_refuses(name, model, text, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for part in ("train", "test"):
        (tmp_path / "data" / f"{part}.csv").write_text("")
    args, message = VECTORS[name]
    refused(vectors.main, args, message)
    Elmo.from_pretrained(model)


COMPARE = {
    "a preset that is none": (["--preset", "worst"], "--preset"),
    "no seeds": (["--seeds", "0"], "--seeds must be at least 1"),
    "an open quote": (["--pretrain", '--epochs "2'], "--pretrain"),
    "a flag of none": (["--vectors=--speed 5"], "--speed"),
    "a number of another": (["--downstream=--epochs 0"], "--epochs must be at least 1"),
    "no run": (["--pretrained", "none"], "none: holds no run"),
    "no finished run": (["--pretrained", "model"], "model: is not a finished run"),
    "a file": (["--output", "in.txt"], "in.txt/config.json: Not a directory"),
    "another's run": (["--output", "model"], "model: is not empty and holds no comparison"),
    "another's folder": (["--output", "mine"], "mine: is not empty and holds no comparison"),
    "a number for a configuration": (["--output", "five"], "five: is not empty and holds no comparison"),
    "more seeds than anyone has": (["--seeds", "1000000000"], "--seeds must be at most 1000"),
    "two data sets": (
        ["--pretrained", "model", "--dataset", "x", "--min-count", "1"],
        "leave out --dataset, --min-count",
    ),
    "two language models": (
        ["--pretrained", "model", "--pretrain=--epochs 1"],
        "--pretrain has no effect with --pretrained",
    ),
    "a run of vectors": (["--pretrained", "svd"], "svd: is not a finished run of experiments.pretrain"),
    "data of a stage": (
        ["--pretrain=--max_length 5"],
        "--pretrain --max-length: is set by the comparison",
    ),
    "a corpus": (["--pretrain=--corpus x --valid-corpus y"], "--pretrain --corpus: is set by the comparison"),
    "a dry run": (["--pretrain=--dry-run"], "--pretrain --dry-run: is set by the comparison"),
    "a method": (["--vectors=--method svd"], "--vectors --method: is set by the comparison"),
}
OWNED = "--seed=7 --pretrained=foo --output=bar --combiner=function --features=svd --labels=0.5 --untrained"
COMPARE |= {
    f"downstream's {flag}": ([f"--downstream={flag}"], f"{flag.split('=')[0]}: is set by the comparison")
    for flag in f"{OWNED} --vectors=x --overwrite --resume --allow-config-change --process=1".split()
}


@pytest.mark.parametrize("name", COMPARE)
def test_compare_refuses(name, model, text, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.md").write_text("mine")
    (tmp_path / "five").mkdir()
    (tmp_path / "five" / "config.json").write_text("5")
    (tmp_path / "svd").mkdir()
    write_config(tmp_path / "svd", {"monitor": "loss", "method": "svd", "data": asdict(DataConfig())}, {})
    (tmp_path / "svd" / "results.json").write_text("{}")
    args, message = COMPARE[name]
    refused(compare.main, args, message)
    assert not (tmp_path / "runs").exists()
    Elmo.from_pretrained(model)


CORPORA = {
    "a single line": (["--corpus", "held.txt"], "held.txt: holds 1 line, too few to hold some out"),
    "held-out training text": (
        ["--corpus", "*.txt", "--valid-corpus", "in.txt", "--min-count", "1"],
        "in.txt: is a part of the training corpus; hold out other text",
    ),
    "a pattern of nothing": (["--corpus", "*.none", "--valid-corpus", "in.txt"], "matches no file"),
    "a blank text": (
        ["--corpus", "in.txt", "--valid-corpus", "blank.txt", "--min-count", "1"],
        "holds no sentence",
    ),
    "only rare words": (
        ["--corpus", "in.txt", "--valid-corpus", "held.txt"],
        "no word reaches --min-count 3; lower it or give more texts",
    ),
    "a vocabulary of other words": (
        ["--corpus", "in.txt", "--valid-corpus", "held.txt", "--vocab", "other.bin"],
        "in.txt: no word is in the vocabulary",
    ),
    "binary": (
        ["--corpus", "binary.bin", "--valid-corpus", "in.txt"],
        "binary.bin:1: byte 0xff is not UTF-8",
    ),
    "NUL": (["--corpus", "nul.bin", "--valid-corpus", "in.txt"], "nul.bin:1: byte 0x00"),
    "no gzip": (["--corpus", "in.gz", "--valid-corpus", "in.txt"], "in.gz: cannot be read"),
    "no vocabulary": (
        ["--corpus", "in.txt", "--valid-corpus", "held.txt", "--vocab", "blank.txt"],
        "blank.txt:1: the line is empty",
    ),
    "a million tokens": (
        ["--corpus", "in.txt", "--valid-corpus", "long.bin", "--min-count", "1"],
        "has 1,000,000 tokens",
    ),
}


@pytest.mark.parametrize("name", CORPORA)
def test_corpora_are_refused(name, text, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "held.txt").write_text("the river bank\n")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "binary.bin").write_bytes(b"the \xff\n")
    (tmp_path / "nul.bin").write_bytes(b"the\0bank\n")
    (tmp_path / "in.gz").write_bytes(b"the bank\n")
    (tmp_path / "other.bin").write_bytes(b"<S>\n</S>\n<UNK>\nBANK\n")
    if name == "a million tokens":
        (tmp_path / "long.bin").write_text("the " * 1_000_000)
    args, message = CORPORA[name]
    refused(pretrain.main, args, message)
    assert not (tmp_path / "runs").exists()
