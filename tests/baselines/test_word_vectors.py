"""Word-vector files: lossless, compatible with gensim, and clear about malformed content."""

import gzip

import archives
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.data.text import Vocabulary
from elmo_jax.errors import InputError

TOKENS = ["<UNK>", "bank", "zürich", "€"]
SPACES = [*"\u00a0\u3000\u2028\u2029\u0085\x1c\t\v", "x\r", "\ufeff", "a\u00a0b", "1\u30002"]
FUZZ = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def vectors(rng):
    return WordVectors(TOKENS, rng.normal(size=(4, 5)) * 10.0 ** rng.integers(-20, 20, (4, 5)))


@pytest.mark.parametrize("name", ["v.txt", "v.npz"])
def test_save_then_load_is_lossless(vectors, tmp_path, name):
    vectors.save(tmp_path / name)
    again = WordVectors.load(tmp_path / name)
    assert again.tokens == vectors.tokens
    np.testing.assert_array_equal(again.matrix, vectors.matrix)


def test_gensim_reads_the_text_format(vectors, tmp_path):
    models = pytest.importorskip("gensim.models")
    vectors.save(tmp_path / "v.txt")
    theirs = models.KeyedVectors.load_word2vec_format(str(tmp_path / "v.txt"))
    assert theirs.index_to_key == TOKENS
    np.testing.assert_array_equal(theirs.vectors, vectors.matrix)
    theirs.save_word2vec_format(str(tmp_path / "theirs.txt"))
    np.testing.assert_allclose(WordVectors.load(tmp_path / "theirs.txt").matrix, vectors.matrix, rtol=1e-6)


@pytest.mark.parametrize("name", ["v.txt", "v.npz"])
@FUZZ
@given(tokens=st.lists(st.text(max_size=4) | st.text("ab \n\r\0\t\udc80\u2028", max_size=3), max_size=5))
@example(tokens=SPACES)
@example(tokens=["a", ""])
@example(tokens=["a b"])
@example(tokens=["\0"])
def test_any_tokens_are_lossless_or_an_error(tmp_path, name, tokens):
    path = tmp_path / name
    path.unlink(missing_ok=True)
    vectors = WordVectors(tokens, np.arange(2.0 * len(tokens)).reshape(-1, 2))
    forbidden = "\n" if name == "v.npz" else " \n\0"
    has_bad_token = any(not t or any(c in forbidden or "\ud800" <= c <= "\udfff" for c in t) for t in tokens)
    if has_bad_token or len(set(tokens)) < len(tokens):
        with pytest.raises(InputError, match=r"cannot hold the token .*; remove it|occurs twice") as error:
            vectors.save(path)
        assert str(error.value).isprintable() and str(path) in str(error.value) and not path.exists()
        return
    vectors.save(path)
    again = WordVectors.load(path)
    assert again.tokens == vectors.tokens
    np.testing.assert_array_equal(again.matrix, vectors.matrix)


def test_gensim_and_word_vectors_read_the_same_tokens(tmp_path):
    models = pytest.importorskip("gensim.models")
    theirs = models.KeyedVectors(2)
    theirs.add_vectors(SPACES, np.arange(2.0 * len(SPACES), dtype=np.float32).reshape(-1, 2))
    theirs.save_word2vec_format(str(tmp_path / "theirs.txt"))
    ours = WordVectors.load(tmp_path / "theirs.txt")
    assert list(ours.tokens) == theirs.index_to_key == SPACES
    ours.save(tmp_path / "ours.txt")
    again = models.KeyedVectors.load_word2vec_format(str(tmp_path / "ours.txt"))
    assert again.index_to_key == SPACES
    np.testing.assert_array_equal(again.vectors, ours.matrix)


def test_glove_files_and_compressed_files_are_read(vectors, tmp_path):
    vectors.save(tmp_path / "v.txt")
    text = (tmp_path / "v.txt").read_text(encoding="utf-8")
    (tmp_path / "glove.txt").write_text(text.partition("\n")[2], encoding="utf-8")
    for name in ("v.txt", "glove.txt"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
        for path in (tmp_path / name, tmp_path / f"{name}.gz"):
            again = WordVectors.load(path)
            assert again.tokens == vectors.tokens
            np.testing.assert_array_equal(again.matrix, vectors.matrix)


@pytest.mark.parametrize("separator", [b"", b"\n"])
def test_binary_files_of_word2vec_are_read(vectors, tmp_path, separator):
    rows = zip(vectors.tokens, vectors.matrix, strict=True)
    data = b"4 5\n" + separator.join(token.encode() + b" " + row.tobytes() for token, row in rows)
    (tmp_path / "v.bin").write_bytes(data)
    (tmp_path / "v.bin.gz").write_bytes(gzip.compress(data))
    for name in ("v.bin", "v.bin.gz"):
        again = WordVectors.load(tmp_path / name)
        assert again.tokens == vectors.tokens
        np.testing.assert_array_equal(again.matrix, vectors.matrix)
    for damaged, message in (
        (b"", "not in word2vec's binary format"),
        (b"4 5", "not in word2vec's binary format"),
        (b"a b\n", "not in word2vec's binary format"),
        (b"-1 5\n" + data, "not in word2vec's binary format"),
        (b"99999999999 5\n" + data, "not in word2vec's binary format"),
        (data[:-1], "ends after 3 of 4 vectors"),
        (b"1 1\n\xff " + bytes(4), "token 1 is not UTF-8"),
        (b"2 1\na " + bytes(4) + b"a " + bytes(4), "the token 'a' occurs twice"),
    ):
        (tmp_path / "v.bin").write_bytes(damaged)
        with pytest.raises(InputError, match=message):
            WordVectors.load(tmp_path / "v.bin")


def test_gensim_writes_what_is_read(vectors, tmp_path):
    models = pytest.importorskip("gensim.models")
    vectors.save(tmp_path / "v.txt")
    theirs = models.KeyedVectors.load_word2vec_format(str(tmp_path / "v.txt"))
    theirs.save_word2vec_format(str(tmp_path / "v.bin"), binary=True)
    np.testing.assert_array_equal(WordVectors.load(tmp_path / "v.bin").matrix, vectors.matrix)


def test_trailing_spaces_and_carriage_returns_are_ignored(tmp_path):
    (tmp_path / "v.txt").write_bytes(b"2 2\r\na 1 2 \nb 3 4\r\n")
    vectors = WordVectors.load(tmp_path / "v.txt")
    assert vectors.tokens == ("a", "b") and vectors.matrix.tolist() == [[1, 2], [3, 4]]


def test_unusable_vectors_are_not_saved(tmp_path):
    for matrix, message in (([[1, np.inf]], "the vector of 'a' is not finite"), ([[]], "have 0 features")):
        for name in ("v.txt", "v.npz"):
            with pytest.raises(InputError, match=message):
                WordVectors(["a"], np.array(matrix)).save(tmp_path / name)
            assert not (tmp_path / name).exists()


def test_table_has_one_row_per_id(vectors):
    vocabulary = Vocabulary(["<S>", "</S>", "<UNK>", "bank", "unheard"])
    table = vectors.table(vocabulary)
    assert not table[:3].any()
    np.testing.assert_array_equal(table[3:], vectors.matrix[[0, 1, 0]])


def test_nearest_orders_by_angle():
    vectors = WordVectors(["a", "b", "c", "d"], np.array([[1, 0], [9, 1], [1, 1], [-1, 0.0]]))
    assert [token for token, _ in vectors.nearest("a", 3)] == ["b", "c", "d"]
    assert vectors.nearest("a", 1)[0][1] == pytest.approx(9 / np.hypot(9, 1))
    with pytest.raises(InputError, match="'x' has no vector"):
        vectors.nearest("x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ":1: not a token and numbers"),
        ("a\n", ":1: not a token and numbers"),
        ("a 1 2\nb 1\n", ":2: not a token and 2 numbers"),
        ("a b\nb 1\n", ":1: could not convert string to float: 'b'"),
        ("2 2\na 1 2\n", ":1: '2 2' does not fit the 1 lines below"),
        ("2 2\na 1 2\nb 1\n", ":3: not a token and 2 numbers"),
        ("1 2\na 1 2 3\n", ":2: not a token and 2 numbers"),
        ("1 2\na 1 x\n", ":2: could not convert string to float: 'x'"),
        ("2 -1\na\nb\n", ":1: '2 -1' does not fit"),
        ("1 99999999999\na 1\n", ":1: '1 99999999999' does not fit"),
        ("1 2\na b 1 2\n", ":2: not a token and 2 numbers"),
        ("1 2\n 1 2\n", ":2: not a token and 2 numbers"),
        ("1 1\na\u00a01\n", ":2: not a token and 1 numbers"),
        ("0 -3\n", ":1: '0 -3' does not fit"),
        (f"0 {10**20}\n", ":1: '0 1"),
        ("1 2\na 1 1e99\n", "the vector of 'a' is not finite"),
        ("1 2\na 1 nan\n", "the vector of 'a' is not finite"),
        ("2 1\na 1\na 2\n", ":3: the token 'a' occurs in line 2 already; remove one"),
        ("a 1\nb 2\na 3\n", ":3: the token 'a' occurs in line 1 already; remove one"),
    ],
)
def test_malformed_text_gives_a_one_line_message(tmp_path, text, message):
    path = tmp_path / "v.txt"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError) as info:
        WordVectors.load(path)
    assert message in str(info.value) and str(path) in str(info.value) and "\n" not in str(info.value)


def test_malformed_npz_gives_a_one_line_message(tmp_path):
    path = tmp_path / "v.npz"
    tokens = np.frombuffer(b"a\nb", np.uint8)
    for arrays in (
        {"tokens": tokens},
        {"tokens": tokens, "matrix": np.zeros((3, 2))},
        {"tokens": tokens, "matrix": np.array([["x"], ["y"]])},
        {"tokens": np.array(["a", "b"], object), "matrix": np.zeros((2, 2))},
    ):
        np.savez(path, **arrays)
        with pytest.raises(InputError, match="holds no word vectors") as info:
            WordVectors.load(path)
        assert "\n" not in str(info.value)
    for data in (b"", b"PK\x03\x04 torn"):
        path.write_bytes(data)
        with pytest.raises(InputError, match="holds no word vectors"):
            WordVectors.load(path)
    WordVectors(["a", "b"], np.eye(2)).save(path)
    for data in archives.damaged(path.read_bytes()).values():
        path.write_bytes(data)
        with pytest.raises(InputError, match="holds no word vectors"):
            WordVectors.load(path)
    with pytest.raises(InputError, match="holds no word vectors"):
        WordVectors.load(tmp_path / "none.npz")
