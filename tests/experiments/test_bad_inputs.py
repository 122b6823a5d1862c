"""Commands refuse wrong flags, texts and sentences."""

import gzip
import os
from pathlib import Path

import pytest
from exported import MODEL, PARAMS, WORDS

from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.storage.hdf5 import open_datasets, read_bytes
from experiments import embed, evaluate, pretrain

GOOD = "".join(f"{'ab'[i % 2]},word{i}\n" for i in range(20)).encode()


FLAGS = {
    "--epochs=ten": "--epochs",
    "--epochs=-1": "--epochs must be at least 1",
    "--epochs=99999999999999999999": "--epochs must be at most 100000",
    "--seed=-1": "--seed must be at least 0",
    "--seed=1e3": "--seed",
    "--split-seed=4294967296": "--split-seed must be at most",
    "--learning-rate=nan": "--learning-rate must be a finite number",
    "--learning-rate=inf": "--learning-rate must be a finite number",
    "--learning-rate=0": "--learning-rate must be above 0",
    "--clip-norm=-1": "--clip-norm must be above 0",
    "--warmup=1": "--warmup must be below 1, not 1.0",
    "--dropout=nan": "--dropout must be a finite number",
    "--validation=0": "--validation must be above 0",
    "--batch-size=0": "--batch-size must be at least 1",
    "--batch-size=1000000000": "--batch-size must be at most 65536",
    "--embedding=1000000000": "--embedding must be at most 65536",
    "--layers=1000000000": "--layers must be at most 64",
    "--optimizer=lazy_adam --softmax=full": 'optimizer "lazy_adam" needs the sampled softmax',
    "--negatives=9 --softmax=full": "--negatives has no effect with --softmax full; leave it out, or give",
    "--highway=1": "--highway has no effect with --input words; leave it out, or give --input characters",
    "--tie --input=characters": "--tie has no effect with --input characters; leave it out, or give --input",
    "--projection-clip=1": "--projection-clip has no effect with --cells 150, as wide as --embedding; leave",
    "--corpus=c --skip-blank": "--skip-blank has no effect with --corpus c; leave it out, or give --dat",
    "--corpus=c --valid-corpus=d --validation=.5": "--validation has no effect with --valid-corpus d; leave",
    "--corpus=c --vocab=v --max-vocab=9": "--max-vocab has no effect with --vocab v; leave it out, or give",
    "--unroll=9": "--unroll has no effect with --batching sentences; leave it out, or give --batching contig",
    "--steps-per-call=1000000000": "--steps-per-call must be at most",
    "--max-length=0": "--max-length must be at least 1",
    "--negatives=0": "--negatives must be at least 1",
    "--filters 60 4": "--filters[0][0] must be at most 50, not 60",
    "--filters 1 4 0 4": "--filters[1][0] must be at least 1, not 0",
    "--filters 1 0": "--filters[0][1] must be at least 1, not 0",
    "--filters 1 99999999": "--filters[0][1] must be at most 65536",
    "--filters": "--filters",
    "--filters 3": "--filters",
    "--dtype=float8": "--dtype",
    "--optimizer=lion": "--optimizer",
    "--dataset=": "--dataset is empty",
    "--dataset=/dev/null": "/dev/null: no such folder",
    "--dataset=a\0b": "--dataset contains a NUL character",
    "--dataset=ag_news --data-dir=/nowhere": "/nowhere: no such folder",
    "--data-dir=/nowhere": "ag_news; add that, or give the folder as",
    "--dataset=/nowhere --data-dir=/nowhere": "ag_news; add that, or give the folder as",
    "--dataset=ag_news --corpus=x --valid-corpus=x": "--corpus replaces --dataset",
    "--data-dir=/nowhere --corpus=x --valid-corpus=x": "--corpus replaces --dataset",
    "--output=/dev/null": "/dev/null: is a file",
    "--output=/dev/null/below": "cannot be written",
    f"--output={'long' * 100}": "File name too long",
    "--resume --overwrite": "exclude each other",
    "stray": "stray",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_flags_are_refused(flags, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    refused(pretrain.main, flags.split(" "), FLAGS[flags])
    assert list(tmp_path.iterdir()) == []


CSVS = {
    "empty": (b"", "train.csv: holds no rows"),
    "blank lines": (b"\n\n\n", "train.csv: holds no rows"),
    "binary": (bytes(range(256)), "train.csv:2: byte 0x80 is not UTF-8"),
    "UTF-16": ("a,b\n".encode("utf-16"), "train.csv:1: byte 0xff is not UTF-8"),
    "Latin-1": (GOOD + b"a,caf\xe9\n", "train.csv:21: byte 0xe9 is not UTF-8"),
    "NUL": (GOOD + b"a,\0\n", "train.csv:21: byte 0x00 is not UTF-8"),
    "one column": (GOOD + b"alone\n", "train.csv:21: 1 column, expected 2"),
    "a line of 50 MB": (GOOD + b"x" * 50_000_000, "train.csv:21: 1 column, expected 2"),
    "a label of 50 MB": (GOOD + b"y" * 50_000_000 + b",a\n", "train.csv:21: is the only row of class 'yyy"),
    "an open quote": (GOOD + b'a,"open\n', "train.csv:21: not a row of CSV"),
    "no tokens": (GOOD + b"a, \n", "train.csv:21: the text has no tokens"),
    "no label": (GOOD + b",text\n", "train.csv:21: the label is empty"),
    "one class has one row": (GOOD + b"c,text\n", "train.csv:21: is the only row of class 'c'"),
    "a header alone": (b"label,text\n", "train.csv: holds no rows below its header"),
    "a header with no label": (b",text\n" + GOOD, "train.csv:1: the label is empty"),
    "a comma without quotes": (GOOD + b"a,one,two\n", "train.csv:21: 3 columns, expected 2"),
    "5000 digits": ((b"1" * 5000 + b",a\n2,b\n") * 5, "test.csv:1: label 'a' is not one of"),
    "tabs in this file alone": (GOOD.replace(b",", b"\t"), "test.csv:1: 1 column, expected 2"),
}


@pytest.mark.parametrize("name", CSVS)
def test_training_files_are_refused(name, tmp_path, refused):
    data, message = CSVS[name]
    (tmp_path / "train.csv").write_bytes(data)
    (tmp_path / "test.csv").write_bytes(GOOD)
    args = ["--dataset", tmp_path, "--output", tmp_path / "run"]
    refused(pretrain.main, args, message)
    assert not (tmp_path / "run").exists()


TESTS = {
    "a header that train.csv lacks": (b"label,text\na,word\n", "test.csv:1: label 'label' is not one of"),
    "unknown label": (b"zz,word\n", "test.csv:1: label 'zz' is not one of 'a', 'b'"),
    "unknown label of a million tokens": (b"zz," + b"w " * 1_000_000, "test.csv:1: label 'zz' is not one of"),
    "a folder": (None, "test.csv: no such file"),
}


@pytest.mark.parametrize("name", TESTS)
def test_test_files_are_refused(name, tmp_path, refused):
    data, message = TESTS[name]
    (tmp_path / "train.csv").write_bytes(GOOD)
    (tmp_path / "test.csv").mkdir() if data is None else (tmp_path / "test.csv").write_bytes(data)
    refused(pretrain.main, ["--dataset", tmp_path], message)


def test_class_names_and_compressed_files_are_refused(tmp_path, refused):
    (tmp_path / "train.csv").write_bytes(GOOD)
    (tmp_path / "test.csv").write_bytes(GOOD)
    args = ["--dataset", tmp_path]
    for names, message in (
        (b"a\nb\na\n", "names a class twice"),
        (b" \n", "classes.txt: is empty"),
        (b"a\nc\n", "label 'b' is not one of"),
    ):
        (tmp_path / "classes.txt").write_bytes(names)
        refused(pretrain.main, args, message)
    for packed, message in (
        (gzip.compress(b"\0" * 200_000_000), "unpacks to over a hundred times its size"),
        (b"no gzip", "cannot be read"),
        (gzip.compress(GOOD)[:-9], "cannot be read"),
    ):
        (tmp_path / "train.csv").unlink(missing_ok=True)
        (tmp_path / "train.csv.gz").write_bytes(packed)
        refused(pretrain.main, args, message)
    (tmp_path / "train.csv").symlink_to("train.csv")
    (tmp_path / "train.csv.gz").unlink()
    refused(pretrain.main, args, "train.csv: no such file")


def test_flags_with_several_values_are_checked(tmp_path, refused):
    refused(evaluate.main, ["a\0b", "c"], "--paths contains a NUL character")
    refused(evaluate.main, ["x", "--bilm", "a\0b", "c"], "--bilm contains a NUL character")
    refused(embed.main, ["in", "out", "--bilm", "a", "c\0d"], "--bilm contains a NUL character")


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
def test_files_that_are_not_regular_are_refused(kind, tmp_path, refused):
    path = Path("/dev/zero") if kind == "device" else tmp_path / "x"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    good = tmp_path / "good"
    good.write_text("{}")
    refused(embed.main, [good, tmp_path / "o", "--bilm", path, good], f"{path}: is not a regular file")
    with pytest.raises(InputError, match="is not a regular file"):
        read_bytes(path)
    with pytest.raises(InputError, match="is not a regular file"), open_datasets(path):
        pass


SENTENCES = {
    "text": ("the bank", "must be a list of lists of tokens"),
    "nothing": (None, "must be a list of lists of tokens"),
    "sentences of text": (["the bank"], "sentence 0 is a string"),
    "bytes": ([[b"the"]], "sentence 0 holds b'the', which is not a string"),
    "ids": ([["the"], [5]], "sentence 1 holds 5, which is not a string"),
    "none": ([None], "sentence 0 is a NoneType"),
    "nested": ([[["the"]]], "sentence 0 holds"),
    "a mapping": ([{"the": 1}], "sentence 0 is a dict"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_sentences_are_refused(name):
    sentences, message = SENTENCES[name]
    with pytest.raises(InputError) as info:
        Elmo(MODEL, PARAMS, WORDS).embed(sentences)
    assert message in str(info.value) and len(str(info.value)) < 1000
