import errno
import gzip
import os

import archives
import numpy as np
import pytest
import requests

from elmo_jax.data import csv_dataset
from elmo_jax.data.batching import BatchStream
from elmo_jax.data.csv_dataset import DataConfig, load_dataset
from elmo_jax.data.text import Vocabulary
from elmo_jax.errors import InputError

TEXTS = [f'"{1 + i % 2}","title {i}","word{i % 3} again"' for i in range(20)]


def write(folder, train=None, test=None, **files):
    folder.mkdir(exist_ok=True)
    (folder / "train.csv").write_text("\n".join(TEXTS if train is None else train) + "\n")
    (folder / "test.csv").write_text("\n".join(TEXTS[:2] if test is None else test) + "\n")
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return DataConfig(dataset=str(folder), min_count=1)


def words(data, part):
    return [data.vocabulary.tokens[i] for i in part.ids]


def test_text_columns(tmp_path):
    rows = [f'"{1 + i % 2}","title","word{i % 2} again"' for i in range(20)]
    config = write(tmp_path / "d", rows, rows[:2])
    all_columns = load_dataset(config)
    last_column = load_dataset(DataConfig(dataset=config.dataset, min_count=1, text="description"))
    assert all_columns.classes == ("1", "2")
    assert words(all_columns, all_columns.test) == ["title", "word0", "again", "title", "word1", "again"]
    assert words(last_column, last_column.test) == ["word0", "again", "word1", "again"]


@pytest.mark.parametrize(
    ("train", "classes"),
    [
        (["label,text"] + [f"{'ab'[i % 2]},w{i}" for i in range(10)], ("a", "b")),
        (["Class Index,Title"] + [f"{i % 2},w{i}" for i in range(10)], ("0", "1")),
        (["which,what"] + [f"{i % 2},w{i}" for i in range(10)], ("0", "1")),
        (["sentiment,review"] + [f"{('pos', 'neg')[i % 2]},w{i}" for i in range(10)], ("neg", "pos")),
        (["label,text"] + [f"{'a'},w{i}" for i in range(10)], ("a",)),
        ([f"{'a'},w{i}" for i in range(10)], ("a",)),
        (["label,text"] + [f"{('label', 'other')[i % 2]},w{i}" for i in range(9)], ("label", "other")),
        ([f"{'ab'[i % 2]},w{i}" for i in range(10)], ("a", "b")),
        ([f"{(2, 10)[i % 2]},w{i}" for i in range(10)], ("2", "10")),
    ],
)
def test_headers_and_labels(tmp_path, train, classes):
    data = load_dataset(write(tmp_path / "d", train, train))
    assert data.classes == classes
    assert len(data.train) + len(data.validation) == len(data.test) == 10


@pytest.mark.parametrize(("labels", "names"), [("12", "pos\nneg\n"), ("01", "pos\nneg\n"), ("ba", "b\na\n")])
def test_classes_file_names_and_orders_the_classes(tmp_path, labels, names):
    train = [f"{labels[i % 2]},w{i}" for i in range(10)]
    data = load_dataset(write(tmp_path / "d", train, train, classes=names))
    assert data.classes == tuple(names.split())
    assert data.test.labels.tolist() == [0, 1] * 5


def test_header_only_in_the_training_file(tmp_path):
    rows = [f"{('pos', 'neg')[i % 2]},w{i}" for i in range(10)]
    for _ in range(2):  # from the file, then from the cache
        data = load_dataset(write(tmp_path / "d", ["sentiment,review", *rows], ["pos,one", "neg,two"]))
        assert data.classes == ("neg", "pos") and data.test.labels.tolist() == [1, 0]
        assert words(data, data.test).count("<UNK>") == 2
        again = load_dataset(
            write(tmp_path / "d", ["sentiment,review", *rows], ["sentiment,review", "pos,one"])
        )
        assert again.test.labels.tolist() == [1]


def test_gzip_file_gives_the_same_dataset(tmp_path):
    config = write(tmp_path / "d")
    plain = load_dataset(config)
    for name in ("train.csv", "test.csv"):
        path = tmp_path / "d" / name
        (tmp_path / "d" / f"{name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    packed = load_dataset(config)
    assert packed.vocabulary == plain.vocabulary
    assert packed.train.ids.tolist() == plain.train.ids.tolist()


def test_damaged_gzip_is_refused(tmp_path):
    config = write(tmp_path / "d")
    (tmp_path / "d" / "test.csv").unlink()
    packed = gzip.compress(b"1,word\n" * 50)
    (tmp_path / "d" / "test.csv.gz").write_bytes(packed[:10] + b"\xff" * 4 + packed[14:])
    with pytest.raises(InputError, match=r"test\.csv\.gz: cannot be read"):
        load_dataset(config)


def test_split_is_stratified_and_seeded_and_only_training_texts_make_the_vocabulary(tmp_path):
    config = write(tmp_path / "d", test=["1,unseen token"])
    data = load_dataset(config)
    assert np.bincount(data.validation.labels).tolist() == [2, 2]
    assert "unseen" not in data.vocabulary.tokens
    held_out = {w for w in words(data, data.validation) if w.isdigit()}
    assert not held_out & set(data.vocabulary.tokens)
    other = load_dataset(DataConfig(dataset=config.dataset, min_count=1, split_seed=1))
    assert other.train.ids.tolist() != data.train.ids.tolist()
    given = load_dataset(config, Vocabulary.from_counts({"word1": 1}))
    assert set(words(given, given.train)) == {"<UNK>", "word1"}


def test_long_texts_are_cut_with_one_warning(tmp_path):
    long = "w " * 100_000
    config = write(tmp_path / "d", [*TEXTS, f'1,t,"{long}"'], [f'1,t,"{long}"'])
    with pytest.warns(UserWarning, match="2 texts are longer than 400 tokens") as caught:
        data = load_dataset(config)
    assert len(caught) == 1
    assert data.test.lengths.max() == 400


def test_cache_is_used_until_the_file_changes(tmp_path, monkeypatch):
    config = write(tmp_path / "d")
    first = load_dataset(config)
    with monkeypatch.context() as patch:
        patch.setattr(csv_dataset, "_tokenize_examples", None)  # tokenizing again would fail
        assert load_dataset(config).train.ids.tolist() == first.train.ids.tolist()
    write(tmp_path / "d", test=["2,changed"])
    assert load_dataset(config).test.labels.tolist() == [1]


@pytest.mark.parametrize("damage", ["cut", *archives.FIELDS])
def test_damaged_cache_is_replaced(tmp_path, damage):
    config = write(tmp_path / "d")
    first = load_dataset(config)
    for path in (csv_dataset.cache_folder()).iterdir():
        path.write_bytes(archives.damaged(path.read_bytes())[damage])
    assert load_dataset(config).train.ids.tolist() == first.train.ids.tolist()


def test_failed_write_leaves_no_file_in_the_cache(tmp_path, monkeypatch):
    def fills_the_disk(path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = write(tmp_path / "d")
    monkeypatch.setattr(np, "savez_compressed", fills_the_disk)
    with pytest.warns(UserWarning, match="tokens are not cached .No space left"):
        load_dataset(config)
    assert list(csv_dataset.cache_folder().iterdir()) == []


@pytest.mark.parametrize("text", ["title+description", "description"])
@pytest.mark.parametrize(
    ("row", "n"), [("1,alone", "2 columns"), ("1,a,b,c", "4 columns"), ("1", "1 column")]
)
def test_row_of_another_width_is_refused(tmp_path, text, row, n):
    folder = write(tmp_path / "d", [*TEXTS, row]).dataset
    with pytest.raises(InputError, match=rf"train\.csv:21: {n}, expected 3; check quoting and commas"):
        load_dataset(DataConfig(dataset=folder, text=text))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (["1,a", "2"], None, r"train\.csv:2: 1 column, expected 2"),
        (["1,a", "2,b", "1,c", "2,d", '1," "'], None, r"train\.csv:5: the text has no tokens"),
        ([""], None, r"train\.csv: holds no rows"),
        (['1,"a\nb"', '2,"open'], None, r"train\.csv:3: not a row of CSV"),
        (None, ["1,ok", "7,odd"], r"test\.csv:2: label '7' is not one of '1', '2'"),
        (["1,a"], ["1,a"], r"train\.csv:1: is the only row of class '1'; add another, or remove it$"),
        (["label,text", "a,word"], ["a,word"], r"train\.csv:2: is the only row of class 'a'"),
        (["a,word"], ["a,word"], r"train\.csv: holds no rows below its header"),
        (["a,word", "b,word", "a,more"], ["b,word"], r"train\.csv:2: is the only row of class 'b'"),
        (["a,word", "b,word", "a,x", "b,y"], ["b,word"], r"train\.csv: 4 rows of 2 classes are too few"),
        (["label,text", *"aa"], ["a,word"], r"train\.csv:2: 1 column, expected 2"),
        (["label,text", *TEXTS], None, r"train\.csv:2: 3 columns, expected 2"),
        (["label,a,text", *TEXTS], ["label,a,text"], r"test\.csv: holds no rows below its header"),
    ],
)
def test_wrong_row_is_refused_with_its_line(tmp_path, train, test, message):
    with pytest.raises(InputError, match=message):
        load_dataset(write(tmp_path / "d", train, test))


def test_text_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    config = write(tmp_path / "d")
    with (tmp_path / "d" / "train.csv").open("ab") as file:
        file.write(b"1,caf\xe9\n")
    with pytest.raises(InputError, match=r"train\.csv:21: byte 0xe9 is not UTF-8"):
        load_dataset(config)


def test_missing_file_or_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        load_dataset(DataConfig(dataset=str(tmp_path / "nowhere")))
    with pytest.raises(InputError, match=r"train\.csv: no such file"):
        load_dataset(DataConfig(dataset=str(tmp_path)))


def test_failed_download_names_the_remedy(monkeypatch):
    def refuse(*_, **__):
        raise requests.exceptions.ConnectionError("name resolution failed")

    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setattr(requests.Session, "request", refuse)
    with pytest.raises(InputError, match=r"train\.csv could not be downloaded .*`data_dir`"):
        load_dataset(DataConfig(dataset="ag_news"))


def test_ag_news_dataset(ag_news):
    data = load_dataset(DataConfig(dataset="ag_news", data_dir=str(ag_news)))
    assert data.classes == ("World", "Sports", "Business", "Sci/Tech")
    assert np.bincount(data.test.labels).tolist() == [1900] * 4
    stream = BatchStream(data.train, 32)
    assert stream.padding < 0.06
    assert len(stream.bounds) <= 12
    assert not {"quot", "&lt", "lt", "#39"} & set(data.vocabulary.tokens[:2000])
