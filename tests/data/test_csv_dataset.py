import errno
import gzip
import os
import warnings
from dataclasses import replace

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
        (["Label ,text"] + [f"{('pos', 'neg')[i % 2]},w{i}" for i in range(10)], ("neg", "pos")),
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
        data = load_dataset(write(tmp_path / "d", ["label,review", *rows], ["pos,one", "neg,two"]))
        assert data.classes == ("neg", "pos") and data.test.labels.tolist() == [1, 0]
        assert words(data, data.test).count("<UNK>") == 2
        again = load_dataset(write(tmp_path / "d", ["label,review", *rows], ["label,review", "pos,one"]))
        assert again.test.labels.tolist() == [1]


@pytest.mark.parametrize("header", ["sentiment,review", "spam,win a prize"])
def test_first_row_guessed_to_be_a_header_gives_a_warning(tmp_path, header):
    rows = [f"{('pos', 'neg')[i % 2]},w{i}" for i in range(10)]
    config = write(tmp_path / "d", [header, *rows], [header, *rows])
    label = header.split(",")[0]
    for _ in range(2):  # from the file, then from the cache
        with pytest.warns(UserWarning, match=rf"train\.csv:1: is taken as the header, .*'{label}'") as caught:
            data = load_dataset(config)
        assert len(caught) == 1
        assert data.classes == ("neg", "pos") and len(data.test) == 10
    assert load_dataset(replace(config, label_column=label)).classes == ("neg", "pos")  # without a warning


COLUMNS = [f"{i},the w{i} text,{'ab'[i % 2]},x{i}" for i in range(10)]


@pytest.mark.parametrize(
    ("header", "fields", "text"),
    [
        (["id,text,label,note"], {"label_column": "label", "text_columns": ("text",)}, "the w0 text"),
        (["id,text,label,note"], {"label_column": "3", "text_columns": ("note", "2")}, "x0 the w0 text"),
        (["id,text,label,note"], {"label_column": "label"}, "0 the w0 text x0"),
        (["id,text,label,note"], {"label_column": "3", "text": "description"}, "x0"),
        ([], {"label_column": "3", "text_columns": ("2",)}, "the w0 text"),
    ],
)
def test_columns_by_name_and_number(tmp_path, header, fields, text):
    for lines in ([*header, *COLUMNS], COLUMNS):  # the test file need not have a header
        config = replace(write(tmp_path / "d", [*header, *COLUMNS], lines), **fields)
        vocabulary = Vocabulary.from_counts(dict.fromkeys(["the", "w0", "text", "x0", "0"], 1))
        data = load_dataset(config, vocabulary)
        assert data.classes == ("a", "b") and len(data.test) == 10
        assert words(data, data.test)[: len(text.split())] == text.split()


def test_named_columns_may_be_in_another_order_in_the_test_file(tmp_path):
    train = ["text,label", *[f"w{i},{'ab'[i % 2]}" for i in range(10)]]
    config = replace(write(tmp_path / "d", train, ["label,text", "b,w1"]), label_column="label")
    data = load_dataset(config)
    assert data.test.labels.tolist() == [1] and len(words(data, data.test)) == 1


@pytest.mark.parametrize("column", ["topic", "0", "5", "9" * 5000, ""])
def test_unknown_column_is_refused(tmp_path, column):
    config = write(tmp_path / "d", ["id,text,label,note", *COLUMNS], COLUMNS)
    with pytest.raises(
        InputError, match=r"train\.csv:1: no column .* in 'id', 'text', 'label', 'note'; give"
    ):
        load_dataset(replace(config, text_columns=(column,)))
    with pytest.raises(InputError, match="column 1 is the label; give other columns as `text_columns`"):
        load_dataset(replace(config, text_columns=("text", "1")))


def test_test_file_without_a_named_column_is_refused(tmp_path):
    config = write(tmp_path / "d", ["text,note,label", *[f"w,x,{i % 2}" for i in range(9)]], ["w,1"])
    with pytest.raises(InputError, match=r"test\.csv:1: 2 columns, fewer than in train\.csv"):
        load_dataset(replace(config, label_column="label"))


@pytest.mark.parametrize("header", [[], ["text,label"]])
@pytest.mark.parametrize("cell", ["the team won game {i}", "{i}"])
def test_labels_that_look_like_texts_are_refused(tmp_path, header, cell):
    train = [*header, *[f"{cell.format(i=i)},{'ab'[i % 2]}" for i in range(10)]]
    config = write(tmp_path / "d", train, train, classes="a\nb\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the header is a guess
        with pytest.raises(
            InputError, match=r"train\.csv: column 1 is taken as the label, but has "
        ) as error:
            load_dataset(config)
    assert ("(header: 'text', 'label')" in str(error.value)) == bool(header)
    assert "set `label_column` and `text_columns`" in str(error.value)


@pytest.mark.parametrize("delimiter", [";", "\t"])
@pytest.mark.parametrize("comma", ["", ", "])
def test_delimiter_is_detected(tmp_path, delimiter, comma):
    rows = [
        delimiter.join(["ab"[i % 2], f"some{comma} w{i}", f"more; {i}" * (delimiter != ";")])
        for i in range(9)
    ]
    plain = [row.replace(",", " ").replace(delimiter, ",") for row in rows]
    expected = load_dataset(write(tmp_path / "d", plain, plain[:1]))
    found = load_dataset(write(tmp_path / "d", rows, rows[:1]))
    assert found.classes == expected.classes == ("a", "b")
    if not comma:
        assert found.digest == expected.digest
    header = [delimiter.join(["label", "one", "two"]), *rows]
    assert load_dataset(write(tmp_path / "d", header, header)).classes == ("a", "b")


def test_commas_win_over_other_delimiters_in_texts(tmp_path):
    rows = [f"{i % 2},w{i}; more\t{i};" for i in range(9)]
    assert load_dataset(write(tmp_path / "d", rows, rows)).classes == ("0", "1")


@pytest.mark.parametrize(("given", "used"), [("|", "|"), ("tab", "\t"), ("\t", "\t"), (";", ";")])
def test_given_delimiter_is_used(tmp_path, given, used):
    rows = [used.join(["ab"[i % 2], f"w, {i}"]) for i in range(9)]
    assert load_dataset(replace(write(tmp_path / "d", rows, rows), delimiter=given)).classes == ("a", "b")
    rows[-1] += f"{used}more"
    with pytest.raises(InputError, match=r"train\.csv:9: 3 columns, expected 2; check quoting and "):
        load_dataset(replace(write(tmp_path / "d", rows, rows), delimiter=given))


@pytest.mark.parametrize("delimiter", ["", "::", '"', "\n"])
def test_wrong_delimiter_is_refused(tmp_path, delimiter):
    with pytest.raises(InputError, match=r"`delimiter` is .*; give one character, or tab"):
        load_dataset(replace(write(tmp_path / "d"), delimiter=delimiter))


def test_markup_is_removed_in_ag_news_or_with_clean(tmp_path):
    rows = [f"{1 + i % 4},a <b>bank</b> &amp; <unk>" for i in range(20)]
    config = write(tmp_path / "d", rows, rows)
    kept = load_dataset(config)
    assert words(kept, kept.test)[:5] == ["a", "<", "b", ">", "bank"] and "unk" in kept.vocabulary.tokens
    cleaned = load_dataset(replace(config, clean=True))
    assert words(cleaned, cleaned.test)[:4] == ["a", "bank", "&", "a"]
    news = load_dataset(DataConfig("ag_news", config.dataset, min_count=1))
    assert words(news, news.test) == words(cleaned, cleaned.test)


def test_blank_texts_are_all_named_or_left_out(tmp_path):
    rows = [*TEXTS, "1,,", '2," ",', TEXTS[0], ",,"]
    config = write(tmp_path / "d", rows)
    for _ in range(2):  # from the file, then from the cache
        with pytest.raises(
            InputError, match=r"train\.csv:21, 22, 24: 3 texts have no tokens; .*skip_blank=True"
        ):
            load_dataset(config)
    with pytest.warns(
        UserWarning, match=r"train\.csv:21, 22, 24: 3 of 24 texts are blank and left out"
    ) as caught:
        data = load_dataset(replace(config, skip_blank=True))
    assert len(caught) == 1 and len(data.train) + len(data.validation) == 21
    many = write(tmp_path / "d", [*TEXTS, *["1,,"] * 15])
    with pytest.raises(InputError, match=r"train\.csv:21, .*, 30 and 5 more: 15 texts have no tokens"):
        load_dataset(many)
    with pytest.raises(InputError, match=r"test\.csv: no row has a text"):
        load_dataset(replace(write(tmp_path / "d", test=["1,", "2,"]), skip_blank=True))


def test_empty_labels_are_all_named(tmp_path):
    with pytest.raises(InputError, match=r"train\.csv:21, 22: the label is empty; fix or remove the rows"):
        load_dataset(write(tmp_path / "d", [*TEXTS, ",a,b", " ,a,b"]))


def test_one_class_is_refused(tmp_path):
    for rows in (["a,w1", "a,w2"], ["label,text", "a,w1", "a,w2"]):
        with pytest.raises(InputError, match="all rows have the label 'a'; at least two classes are needed"):
            load_dataset(write(tmp_path / "d", rows, ["b,w3"], classes="a\nb\n"))


def test_unknown_tokens_are_counted_and_must_not_be_all(tmp_path):
    config = write(tmp_path / "d", test=["1,unseen words", "2,again unseen"])
    data = load_dataset(config)
    assert data.train.unknown_fraction == 0 and data.test.unknown_fraction == 0.75
    assert load_dataset(config, with_characters=True).test.unknown_fraction == 0.75
    upper = Vocabulary.from_counts({"TITLE": 1})
    with pytest.raises(InputError, match=r"train\.csv: no token is in the vocabulary"):
        load_dataset(config, upper)
    assert load_dataset(config, upper, with_characters=True).train.unknown_fraction == 1
    with pytest.raises(InputError, match="no word reaches min_count=99"):
        load_dataset(replace(config, min_count=99))


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


def test_labels_of_equal_number_have_a_fixed_order():
    for labels in (["01", "1", "2", "001"], ["1", "001", "01", "2"]):
        numbers = csv_dataset._number_classes(labels, None)
        assert list(numbers) == ["001", "01", "1", "2"]


def test_whitespace_tokens_keep_pretokenized_words_whole(tmp_path):
    rows = "".join(f"{i % 2},銀行 が 金利 を 上げ-た {i % 3}\n" for i in range(20))
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text(rows, encoding="utf-8")
    config = DataConfig(str(tmp_path), tokens="whitespace", min_count=1)
    assert "上げ-た" in load_dataset(config).vocabulary
    assert "上げ-た" not in load_dataset(replace(config, tokens="words")).vocabulary


def test_case_is_kept_with_lowercase_false(tmp_path):
    for name in ("train.csv", "test.csv"):
        (tmp_path / name).write_text("1,The IBM\n2,an Apple\n" * 10)
    config = DataConfig(str(tmp_path), min_count=1)
    assert "ibm" in load_dataset(config).vocabulary
    assert "IBM" in load_dataset(replace(config, lowercase=False)).vocabulary
