import gzip
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from elmo_jax.config import TextConfig
from elmo_jax.data import corpus
from elmo_jax.data.batching import ContiguousStream
from elmo_jax.data.characters import character_ids
from elmo_jax.data.corpus import Corpus
from elmo_jax.data.text import UNK, Vocabulary
from elmo_jax.errors import InputError

LINES = ["the bank rose", "", "a river bank", "the the", "flood of the river bank"]


@pytest.fixture
def vocabulary():
    return Vocabulary.from_counts({"the": 3, "bank": 2, "river": 1})


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(LINES[:3]) + "\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("\n".join(LINES[3:]).encode()))
    return str(tmp_path / "*.txt*")


def sentences(documents, vocabulary):
    pairs = zip(documents.offsets, documents.offsets[1:], strict=False)
    words = lambda ids: [vocabulary.tokens[i] if i < len(vocabulary) else "?" for i in ids]  # noqa: E731
    return [words(documents.ids[start:end].tolist()) for start, end in pairs]


def test_store_contains_every_sentence_and_the_characters_of_unknown_words(shards, vocabulary, tmp_path):
    bytes_read = []
    documents = Corpus.open(shards).load(vocabulary, True, bytes_read.append, tmp_path / "cache")
    expected = [[w if w in vocabulary else "?" for w in line.split()] for line in LINES if line]
    assert sentences(documents, vocabulary) == expected
    assert isinstance(documents.ids, np.memmap) and sum(bytes_read) == Corpus.open(shards).size
    words = [word for line in LINES for word in line.split()]
    np.testing.assert_array_equal(documents.character_ids[documents.ids], character_ids(words))
    window = ContiguousStream(documents, 1, 20, seed=0).window(0)
    assert window.words.max() < len(vocabulary) and (window.words == UNK).any()
    assert window.chars.shape == (2, 1, 20, 50)


def test_interrupted_store_continues_at_its_shard(shards, vocabulary, tmp_path, monkeypatch):
    opened = Corpus.open(shards)
    expected = opened.load(vocabulary, True, folder=tmp_path / "one")
    read_sentences, read = Corpus._shard_sentences, []

    def interrupt_in_second_shard(self, number, on_bytes):
        read.append(number)
        for i, words in enumerate(read_sentences(self, number, on_bytes)):
            if len(read) == 2 and i == 1:
                raise KeyboardInterrupt
            yield words

    monkeypatch.setattr(Corpus, "_shard_sentences", interrupt_in_second_shard)
    with pytest.raises(KeyboardInterrupt):
        opened.load(vocabulary, True, folder=tmp_path / "two")
    resumed = opened.load(vocabulary, True, folder=tmp_path / "two")
    assert read == [0, 1, 1]
    for name in ("ids", "offsets", "character_ids"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(expected, name))
    opened.load(vocabulary, folder=tmp_path / "two")
    assert len(read) == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"the\n\xff\n", r"c\.txt:2: byte 0xff"), (b"\n \n", "holds no sentence"), (None, "matches no file")],
)
def test_wrong_corpus_is_refused(vocabulary, tmp_path, data, message):
    if data is not None:
        (tmp_path / "c.txt").write_bytes(data)
    with pytest.raises(InputError, match=message):
        Corpus.open(str(tmp_path / "c.txt")).load(vocabulary, folder=tmp_path / "cache")


def test_folder_is_read_without_hidden_files(tmp_path, shards):
    (tmp_path / ".notes").write_text("hidden\n")
    (tmp_path / "sub").mkdir()
    assert [path.name for path in Corpus.open(str(tmp_path)).shards] == ["a.txt", "b.txt.gz"]
    with pytest.raises(InputError, match="sub: matches no file; give a folder of text files"):
        Corpus.open(str(tmp_path / "sub"))


def test_identity_is_the_content(shards, vocabulary, tmp_path, monkeypatch):
    digest, folder = Corpus.open(shards).digest, tmp_path / "cache"
    expected = Corpus.open(shards).load(vocabulary, folder=folder)
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in Corpus.open(shards).shards:
        (moved / path.name).write_bytes(path.read_bytes())
        os.utime(path, (1, 1))
    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "_shard_sentences", None)  # converting again would fail
        for pattern in (shards, str(moved)):
            assert Corpus.open(pattern).digest == digest
            again = Corpus.open(pattern).load(vocabulary, folder=folder)
            np.testing.assert_array_equal(again.ids, expected.ids)
    path, state = moved / "a.txt", (moved / "a.txt").stat()
    path.write_text(path.read_text().replace("rose", "fell"))  # other bytes of the same size and time
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert Corpus.open(str(moved)).digest != digest
    assert Corpus.open(str(moved)).count_words(folder=folder)["fell"] == 1


def test_raw_text_is_converted_and_has_a_store_of_its_own(tmp_path, vocabulary):
    (tmp_path / "c.txt").write_text("The bank, the BANK.\n")
    tokenized, raw = Corpus.open(str(tmp_path)), Corpus.open(str(tmp_path), TextConfig())
    assert tokenized.count_words(keep=False) == {"The": 1, "bank,": 1, "the": 1, "BANK.": 1}
    assert raw.count_words(keep=False) == {"the": 2, "bank": 2, ",": 1, ".": 1}
    assert tokenized.digest != raw.digest
    assert len(raw.load(vocabulary, folder=tmp_path / "cache").ids) == 6


def test_damaged_store_is_converted_again(shards, vocabulary, tmp_path):
    expected = np.array(Corpus.open(shards).load(vocabulary, folder=tmp_path / "cache").ids)
    (ids,) = tmp_path.glob("cache/*/ids")
    (done,) = tmp_path.glob("cache/*/done.json")
    data = ids.read_bytes()
    files = [(ids, data[:-4]), (ids, data[:-1] + b"\7"), (done, b"[]"), (done, b'{"files": {"a": 1}}')]
    for path, damaged in files:
        path.write_bytes(damaged)
        with pytest.warns(UserWarning, match="is damaged; the corpus is converted again"):
            again = Corpus.open(shards).load(vocabulary, folder=tmp_path / "cache")
        np.testing.assert_array_equal(again.ids, expected)


def test_cache_is_limited(tmp_path, vocabulary, monkeypatch):
    folder = tmp_path / "cache"
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"the bank {i}\n")
        Corpus.open(str(tmp_path / f"{i}.txt")).load(vocabulary, folder=folder)
    monkeypatch.setattr(corpus, "_CACHE_BYTES", 0)
    Corpus.open(str(tmp_path / "0.txt")).load(vocabulary, folder=folder)  # all are in use
    stores = sorted(folder.glob("*/"), key=lambda store: (store / "done.json").stat().st_mtime_ns)
    assert len(stores) == 3
    monkeypatch.setattr(corpus, "_used_stores", set())
    lock = FileLock(f"{stores[0]}.lock")
    with lock, pytest.warns(UserWarning, match=f"removed the least recently used, {stores[1].name}$"):
        Corpus.open(str(tmp_path / "0.txt")).load(vocabulary, folder=folder)
    assert sorted(folder.glob("*/")) == sorted([stores[0], stores[2]])


def test_held_out_lines_are_sampled_by_seed(tmp_path, vocabulary, monkeypatch):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("".join(f"the {name}{i}\n" for i in range(50)))
    whole = Corpus.open(str(tmp_path / "*.txt"))
    train, held_out = whole.hold_out(0.2, seed=1)
    counts = [part.count_words(keep=False) for part in (train, held_out)]
    assert [part.pop("the") for part in counts] == [80, 20]
    assert not set(counts[0]) & set(counts[1]) and set(counts[0]) | set(counts[1]) == set(
        whole.count_words(keep=False)
    ) - {"the"}
    assert any(word[0] == "a" for word in counts[1]) and any(word[0] == "b" for word in counts[1])
    assert whole.hold_out(0.2, seed=1)[1].digest == held_out.digest != train.digest
    assert whole.hold_out(0.2, seed=2)[1].digest != held_out.digest
    monkeypatch.setattr(corpus, "MAX_HELD_OUT", 7)
    assert len(whole.hold_out(0.2, seed=1)[1].load(vocabulary, folder=tmp_path / "cache")) == 7
    (tmp_path / "one.txt").write_text("the bank\n")
    with pytest.raises(InputError, match="holds 1 line, too few to hold some out"):
        Corpus.open(str(tmp_path / "one.txt")).hold_out(0.5, 0)


def test_held_out_text_must_not_be_training_text(shards, tmp_path):
    train = Corpus.open(shards)
    with pytest.raises(InputError, match=r"a\.txt: is a part of the training corpus; hold out other text"):
        train.check_disjoint(Corpus.open(str(tmp_path / "a.txt")))
    (tmp_path / "copy").write_bytes((tmp_path / "a.txt").read_bytes())
    with pytest.raises(InputError, match=r"copy: has the same content as .*a\.txt, a part of the training"):
        train.check_disjoint(Corpus.open(str(tmp_path / "copy")))
    (tmp_path / "other").write_text("the river\n")
    train.check_disjoint(Corpus.open(str(tmp_path / "other")))


def test_store_is_on_disk_before_it_is_marked_complete(shards, vocabulary, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(handle):
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    Corpus.open(shards).load(vocabulary, folder=tmp_path / "cache")
    for name in ("ids", "offsets"):
        assert synced.count(name) == 2 and synced.index(name) < synced.index("done.json.part")


def test_word_counts_are_cached_until_a_shard_changes(shards, tmp_path, monkeypatch):
    bytes_read, folder = [], tmp_path / "cache"
    expected = dict(Counter(word for line in LINES for word in line.split()))
    assert (
        Corpus.open(shards).count_words(bytes_read.append, folder, keep=False) == expected
        and not folder.exists()
    )
    assert sum(bytes_read) == Corpus.open(shards).size
    assert Corpus.open(shards).count_words(folder=folder) == expected
    (cache,) = folder.glob("*.counts")
    with monkeypatch.context() as patch:
        patch.setattr(Corpus, "_sentences", None)  # counting again would fail
        assert Corpus.open(shards).count_words(bytes_read.append, folder) == expected
    assert sum(bytes_read) == 2 * Corpus.open(shards).size
    cache.write_bytes(cache.read_bytes()[:-3])  # damaged
    assert Corpus.open(shards).count_words(folder=folder) == expected
    (tmp_path / "a.txt").write_text("another text\n")
    assert Corpus.open(shards).count_words(folder=folder)["another"] == 1


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_byte_order_mark_is_removed_from_the_first_word_only(tmp_path, pack):
    path = tmp_path / ("c.gz" if pack is gzip.compress else "c.txt")
    path.write_bytes(pack("\ufeffthe bank\n\ufeffriver\n".encode()))
    assert Corpus.open(str(path)).count_words(keep=False) == {"the": 1, "bank": 1, "\ufeffriver": 1}
    path.write_bytes(pack("\ufeffthe ".encode() + b"caf\xe9\n"))
    with pytest.raises(InputError, match=":1: byte 0xe9 is not UTF-8"):
        Corpus.open(str(path)).count_words(keep=False)


def test_progress_is_reported_within_a_shard(tmp_path):
    (tmp_path / "c.txt").write_text("the bank\n" * 5000)
    bytes_read = []
    Corpus.open(str(tmp_path / "c.txt")).count_words(bytes_read.append, keep=False)
    assert len(bytes_read) >= 5 and sum(bytes_read) == 9 * 5000


@pytest.mark.parametrize(("tokens", "lines"), [(1, 1), (4, 2), (99, 4)])
def test_beginning_of_a_corpus_equals_the_beginning_of_its_store(shards, vocabulary, tmp_path, tokens, lines):
    store = Corpus.open(shards).load(vocabulary, True, folder=tmp_path / "cache")
    beginning, fraction = Corpus.open(shards).read_beginning(vocabulary, True, tokens)
    assert len(beginning) == lines and (fraction == 1) == (lines == 4) and 0 < fraction <= 1
    n = beginning.offsets[-1]
    np.testing.assert_array_equal(beginning.ids, store.ids[:n])
    np.testing.assert_array_equal(beginning.offsets, store.offsets[: lines + 1])
    expected = store.character_ids[store.ids[:n]]
    np.testing.assert_array_equal(beginning.character_ids[beginning.ids], expected)
