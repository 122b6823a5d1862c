import gzip
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from elmo_jax.data import corpus
from elmo_jax.data.batching import ContiguousStream
from elmo_jax.data.characters import character_ids
from elmo_jax.data.corpus import count_words, load_corpus
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
    documents = load_corpus(shards, vocabulary, True, bytes_read.append, tmp_path / "cache")
    expected = [[w if w in vocabulary.tokens else "?" for w in line.split()] for line in LINES if line]
    assert sentences(documents, vocabulary) == expected
    assert isinstance(documents.ids, np.memmap) and sum(bytes_read) == corpus.corpus_bytes(shards)
    words = [word for line in LINES for word in line.split()]
    np.testing.assert_array_equal(documents.character_ids[documents.ids], character_ids(words))
    window = ContiguousStream(documents, 1, 20, seed=0).window(0)
    assert window.words.max() < len(vocabulary) and (window.words == UNK).any()
    assert window.chars.shape == (2, 1, 20, 50)


def test_interrupted_store_continues_at_its_shard(shards, vocabulary, tmp_path, monkeypatch):
    expected = load_corpus(shards, vocabulary, True, folder=tmp_path / "one")
    read_sentences, read = corpus._sentences, []

    def interrupt_in_second_shard(shard, on_bytes):
        read.append(shard.name)
        for i, words in enumerate(read_sentences(shard, on_bytes)):
            if len(read) == 2 and i == 1:
                raise KeyboardInterrupt
            yield words

    monkeypatch.setattr(corpus, "_sentences", interrupt_in_second_shard)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(shards, vocabulary, True, folder=tmp_path / "two")
    resumed = load_corpus(shards, vocabulary, True, folder=tmp_path / "two")
    assert read == ["a.txt", "b.txt.gz", "b.txt.gz"]
    for name in ("ids", "offsets", "character_ids"):
        np.testing.assert_array_equal(getattr(resumed, name), getattr(expected, name))
    load_corpus(shards, vocabulary, folder=tmp_path / "two")
    assert len(read) == 3


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"the\n\xff\n", r"c\.txt:2: byte 0xff"), (b"\n \n", "holds no sentence"), (None, "matches no file")],
)
def test_wrong_corpus_is_refused(vocabulary, tmp_path, data, message):
    if data is not None:
        (tmp_path / "c.txt").write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_corpus(str(tmp_path / "c.txt"), vocabulary, folder=tmp_path / "cache")


def test_damaged_store_is_refused(shards, vocabulary, tmp_path):
    load_corpus(shards, vocabulary, folder=tmp_path / "cache")
    (ids,) = tmp_path.glob("cache/*/ids")
    ids.write_bytes(ids.read_bytes()[:-4])
    with pytest.raises(InputError, match="is damaged; remove the folder"):
        load_corpus(shards, vocabulary, folder=tmp_path / "cache")


def test_store_is_on_disk_before_it_is_marked_complete(shards, vocabulary, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def record(handle):
        synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    load_corpus(shards, vocabulary, folder=tmp_path / "cache")
    for name in ("ids", "offsets"):
        assert synced.count(name) == 2 and synced.index(name) < synced.index("done.json.part")


def test_word_counts_are_cached_until_a_shard_changes(shards, tmp_path, monkeypatch):
    bytes_read, folder = [], tmp_path / "cache"
    expected = dict(Counter(word for line in LINES for word in line.split()))
    assert count_words(shards, bytes_read.append, folder, keep=False) == expected and not folder.exists()
    assert sum(bytes_read) == corpus.corpus_bytes(shards)
    assert count_words(shards, folder=folder) == expected
    (cache,) = folder.glob("*.counts")
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_sentences", None)  # counting again would fail
        assert count_words(shards, bytes_read.append, folder) == expected
    assert sum(bytes_read) == 2 * corpus.corpus_bytes(shards)
    cache.write_bytes(cache.read_bytes()[:-3])  # damaged
    assert count_words(shards, folder=folder) == expected
    (tmp_path / "a.txt").write_text("another text\n")
    assert count_words(shards, folder=folder)["another"] == 1


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_byte_order_mark_is_removed_from_the_first_word_only(tmp_path, pack):
    path = tmp_path / ("c.gz" if pack is gzip.compress else "c.txt")
    path.write_bytes(pack("\ufeffthe bank\n\ufeffriver\n".encode()))
    assert count_words(str(path), keep=False) == {"the": 1, "bank": 1, "\ufeffriver": 1}
    path.write_bytes(pack("\ufeffthe ".encode() + b"caf\xe9\n"))
    with pytest.raises(InputError, match=":1: byte 0xe9 is not UTF-8"):
        count_words(str(path), keep=False)


def test_progress_is_reported_within_a_shard(tmp_path):
    (tmp_path / "c.txt").write_text("the bank\n" * 5000)
    bytes_read = []
    count_words(str(tmp_path / "c.txt"), bytes_read.append, keep=False)
    assert len(bytes_read) >= 5 and sum(bytes_read) == 9 * 5000


@pytest.mark.parametrize(("tokens", "lines"), [(1, 1), (4, 2), (99, 4)])
def test_beginning_of_a_corpus_equals_the_beginning_of_its_store(shards, vocabulary, tmp_path, tokens, lines):
    store = load_corpus(shards, vocabulary, True, folder=tmp_path / "cache")
    beginning, fraction = corpus.read_beginning(shards, vocabulary, True, tokens)
    assert len(beginning) == lines and (fraction == 1) == (lines == 4) and 0 < fraction <= 1
    n = beginning.offsets[-1]
    np.testing.assert_array_equal(beginning.ids, store.ids[:n])
    np.testing.assert_array_equal(beginning.offsets, store.offsets[: lines + 1])
    expected = store.character_ids[store.ids[:n]]
    np.testing.assert_array_equal(beginning.character_ids[beginning.ids], expected)
