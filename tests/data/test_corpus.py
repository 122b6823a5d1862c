import gzip
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from elmo_jax.data import corpus
from elmo_jax.data.batching import BatchStream, ContiguousStream
from elmo_jax.data.corpus import load_corpus
from elmo_jax.data.text import BOS, EOS, UNK, Vocabulary
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


def tokens(documents, vocabulary):
    flat = [
        documents.ids[a:b].tolist() for a, b in zip(documents.offsets, documents.offsets[1:], strict=False)
    ]
    return [[vocabulary.tokens[i] if i < len(vocabulary) else "?" for i in ids] for ids in flat]


def test_a_store_holds_every_sentence_and_spells_unknown_words(shards, vocabulary, tmp_path):
    seen = []
    documents = load_corpus(shards, vocabulary, True, seen.append, tmp_path / "cache")
    known = set(vocabulary.tokens)
    want = [[w if w in known else "?" for w in line.split()] for line in LINES if line]
    assert tokens(documents, vocabulary) == want
    assert isinstance(documents.ids, np.memmap) and sum(seen) == corpus.corpus_bytes(shards)
    from elmo_jax.data.characters import character_ids

    flat = [w for line in LINES for w in line.split()]
    np.testing.assert_array_equal(documents.character_ids[documents.ids], character_ids(flat))


def test_a_stopped_store_goes_on_at_its_shard(shards, vocabulary, tmp_path, monkeypatch):
    whole = load_corpus(shards, vocabulary, True, folder=tmp_path / "one")
    real, read = corpus._sentences, []

    def stops(shard, on_bytes):
        read.append(shard.name)
        for i, words in enumerate(real(shard, on_bytes)):
            if len(read) == 2 and i == 1:
                raise KeyboardInterrupt
            yield words

    monkeypatch.setattr(corpus, "_sentences", stops)
    with pytest.raises(KeyboardInterrupt):
        load_corpus(shards, vocabulary, True, folder=tmp_path / "two")
    again = load_corpus(shards, vocabulary, True, folder=tmp_path / "two")
    assert read == ["a.txt", "b.txt.gz", "b.txt.gz"]
    for name in ("ids", "offsets", "character_ids"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    load_corpus(shards, vocabulary, folder=tmp_path / "two")
    assert len(read) == 3


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"the\n\xff\n", r"c\.txt:2: byte 0xff"), (b"\n \n", "holds no sentence"), (None, "matches no file")],
)
def test_a_wrong_corpus_is_named(vocabulary, tmp_path, data, said):
    if data is not None:
        (tmp_path / "c.txt").write_bytes(data)
    with pytest.raises(InputError, match=said):
        load_corpus(str(tmp_path / "c.txt"), vocabulary, folder=tmp_path / "cache")


def test_a_store_is_on_the_disk_before_it_is_named_complete(shards, vocabulary, tmp_path, monkeypatch):
    done, real = [], os.fsync

    def sync(handle):
        done.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)
        real(handle)

    monkeypatch.setattr(os, "fsync", sync)
    load_corpus(shards, vocabulary, folder=tmp_path / "cache")
    for name in ("ids", "offsets"):
        assert done.count(name) == 2 and done.index(name) < done.index("done.json.part")


def test_words_are_counted_once(shards, tmp_path, monkeypatch):
    seen, folder = [], tmp_path / "cache"
    want = dict(Counter(word for line in LINES for word in line.split()))
    assert corpus.count_words(shards, seen.append, folder, keep=False) == want and not folder.exists()
    assert sum(seen) == corpus.corpus_bytes(shards)
    assert corpus.count_words(shards, folder=folder) == want
    (kept,) = folder.glob("*.counts")
    real = corpus._sentences
    monkeypatch.setattr(corpus, "_sentences", None)
    assert corpus.count_words(shards, seen.append, folder) == want
    assert sum(seen) == 2 * corpus.corpus_bytes(shards)
    monkeypatch.setattr(corpus, "_sentences", real)
    kept.write_bytes(kept.read_bytes()[:-3])  # damaged
    assert corpus.count_words(shards, folder=folder) == want
    (tmp_path / "a.txt").write_text("another text\n")
    assert corpus.count_words(shards, folder=folder)["another"] == 1


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_byte_order_mark_is_no_part_of_the_first_word(tmp_path, pack):
    name = str(tmp_path / ("c.gz" if pack is gzip.compress else "c.txt"))
    Path(name).write_bytes(pack("\ufeffthe bank\n\ufeffriver\n".encode()))
    # Elsewhere than at the start the character is text.
    assert corpus.count_words(name, keep=False) == {"the": 1, "bank": 1, "\ufeffriver": 1}
    Path(name).write_bytes(pack("\ufeffthe ".encode() + b"caf\xe9\n"))
    with pytest.raises(InputError, match=":1: byte 0xe9 is not UTF-8"):
        corpus.count_words(name, keep=False)


def test_progress_is_told_within_a_shard(tmp_path):
    (tmp_path / "c.txt").write_text("the bank\n" * 5000)
    seen = []
    corpus.count_words(str(tmp_path / "c.txt"), seen.append, keep=False)
    assert len(seen) >= 5 and sum(seen) == 9 * 5000


@pytest.mark.parametrize(("tokens", "lines"), [(1, 1), (4, 2), (99, 4)])
def test_a_portion_is_what_the_store_begins_with(shards, vocabulary, tmp_path, tokens, lines):
    whole = load_corpus(shards, vocabulary, True, folder=tmp_path / "cache")
    part, share = corpus.read_beginning(shards, vocabulary, True, tokens)
    assert len(part) == lines and (share == 1) == (lines == 4) and 0 < share <= 1
    n = part.offsets[-1]
    np.testing.assert_array_equal(part.ids, whole.ids[:n])
    np.testing.assert_array_equal(part.offsets, whole.offsets[: lines + 1])
    np.testing.assert_array_equal(part.character_ids[part.ids], whole.character_ids[whole.ids[:n]])


def test_long_sentences_are_cut_in_rows_alone(documents):
    cut = replace(documents, max_length=5)
    assert cut.lengths.tolist() == np.minimum(documents.lengths, 5).tolist()
    rows = np.array([3, 0, 7])
    for a in (cut.batch(rows, 7), cut.take(rows).batch(np.arange(3), 7)):
        for words, n in zip(a.words, rows, strict=True):
            ids = documents.ids[documents.offsets[n] : documents.offsets[n + 1]][:5]
            assert words[: len(ids) + 2].tolist() == [BOS, *ids, EOS]
    assert BatchStream(cut, 4).bounds[-1] == 8


@pytest.mark.parametrize("unroll", [3, 5])
def test_windows_are_the_sentences_end_to_end(documents, unroll):
    stream = ContiguousStream(documents, 2, unroll, seed=1, steps_per_call=3)
    windows = [stream.window(step) for step in range(stream.steps_per_epoch)]
    order = np.random.default_rng([1, 0]).permutation(len(documents))
    text = [documents.ids[documents.offsets[n] : documents.offsets[n + 1]].tolist() for n in order]
    forward = [i for ids in text for i in (BOS, *ids, EOS)]
    backward = [i for ids in text for i in (EOS, *ids[::-1], BOS)]
    predicts = [1.0] * len(forward)
    at = np.cumsum([len(ids) + 2 for ids in text]) - 1
    for place in at:
        predicts[place] = 0.0
    for b in (0, 1):
        start = b * stream.tokens_per_row
        for s, window in enumerate(windows):
            here = slice(start + s * unroll, start + (s + 1) * unroll + 1)
            assert window.words[0, b].tolist() == forward[here]
            assert window.words[1, b].tolist() == backward[here]
            assert window.weight[0, b].tolist() == predicts[here][:-1]
            assert window.weight[1, b].tolist() == predicts[here][:-1]
    assert len(forward) - 2 * unroll * len(windows) < 2 * (unroll + 2)


def test_the_window_of_a_step_does_not_depend_on_where_one_begins(documents):
    stream = ContiguousStream(documents, 2, 4, seed=1, steps_per_call=3)
    n = stream.steps_per_epoch
    whole = [d.batches.words[i] for d in stream.chunks(0, 2 * n) for i in range(d.count)]
    fresh = ContiguousStream(documents, 2, 4, seed=1, steps_per_call=2)
    part = [d.batches.words[i] for d in fresh.chunks(n - 3, n + 4) for i in range(d.count)]
    np.testing.assert_array_equal(whole[n - 3 : n + 4], part)
    assert not np.array_equal(whole[0], whole[n])


def test_words_beyond_the_vocabulary_are_unknown_as_classes(shards, vocabulary, tmp_path):
    documents = load_corpus(shards, vocabulary, True, folder=tmp_path / "cache")
    window = ContiguousStream(documents, 1, 20, seed=0).window(0)
    assert window.words.max() < len(vocabulary) and (window.words == UNK).any()
    assert window.chars.shape == (2, 1, 20, 50)
