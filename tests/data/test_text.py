import sys
import unicodedata

import pytest
from hypothesis import given, settings, strategies as st

from elmo_jax.config import TextConfig
from elmo_jax.data import text
from elmo_jax.data.text import (
    SPECIAL,
    UNK,
    Vocabulary,
    clean,
    make_tokenizer,
    tokenize,
    tokenize_texts,
)
from elmo_jax.errors import InputError


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("China #39;s Largest", "China's Largest"),
        ("the  #36;10 million", "the $10 million"),
        ("worth \\$75 million", "worth $75 million"),
        ("a second\\team", "a second team"),
        ("searching &lt;b&gt;...&lt;/b&gt;", "searching ..."),
        ("message  quot;no quot; twice", 'message "no " twice'),
        ("AT amp;T", "AT &T"),
        ("a &amp; b", "a & b"),
        ("1 < 2 and 3 > 2", "1 < 2 and 3 > 2"),
    ],
)
def test_clean_removes_news_feed_markup(raw, expected):
    assert clean(raw) == expected


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("cafe\u0301.", ["cafe\u0301", "."]),
        ("İstanbul", ["i\u0307stanbul"]),
        ("می\u200cخواهم", ["می\u200cخواهم"]),
        ("ක්\u200dරම", ["ක්\u200dරම"]),
        ("葛\U000e0100城 ᠠ\u180b", ["葛\U000e0100城", "ᠠ\u180b"]),
        ("co\u00adoperate x² ½", ["co\u00adoperate", "x²", "½"]),
        ("so ❤\ufe0f👩\u200d👧👍🏽🇫🇷!", ["so", "❤\ufe0f", "👩\u200d👧", "👍🏽", "🇫🇷", "!"]),
        ("1\ufe0f\u20e3 \u0600 12", ["1\ufe0f\u20e3", "\u0600", "12"]),
        ("é\x1fa", ["é", "a"]),
        ("the <unk> bank", ["the", "<", "unk", ">", "bank"]),
        ("<john@x.org>", ["<", "john", "@", "x", ".", "org", ">"]),
        ("a\\b &amp; c", ["a", "\\", "b", "&", "amp", ";", "c"]),
    ],
)
def test_tokens(raw, expected):
    assert tokenize(raw) == expected


def test_arguments_remove_markup_and_keep_case():
    assert tokenize(r"The <b>bank</b>\&amp;", clean=True) == ["the", "bank", "&"]
    assert tokenize("The IBM", lowercase=False) == ["The", "IBM"]


def test_tokenizer_follows_the_stored_config():
    text = "The <b>U.S.</b> bank"
    assert make_tokenizer(TextConfig())(text) == tokenize(text)
    assert make_tokenizer(TextConfig(lowercase=False, clean=True))(text) == tokenize(text, True, False)
    assert make_tokenizer(TextConfig("whitespace", lowercase=False))(text) == text.split()
    assert make_tokenizer(TextConfig("whitespace", clean=True))(text) == ["the", "u.s.", "bank"]
    custom = TextConfig("custom", lowercase=False)
    assert make_tokenizer(custom, list)("银行") == ["银", "行"]
    with pytest.raises(InputError, match="text '银行' needs the `tokenizer` used in training; pass it"):
        make_tokenizer(custom)("银行")


def test_texts_and_lists_of_tokens_are_mixed_freely():
    assert tokenize_texts(["A bank", ["A", "bank"]]) == [["a", "bank"], ["A", "bank"]]
    with pytest.raises(InputError, match="`tokenizer` returned 'A bank'; it must return a list of strings"):
        tokenize_texts(["A bank"], lambda text: text)
    with pytest.raises(InputError, match="text 1 is 5; pass a string or a list of tokens"):
        tokenize_texts(["A bank", 5])


def test_vocabulary_is_a_container():
    vocabulary = Vocabulary.from_counts({"bank": 2, "the": 3})
    assert "bank" in vocabulary and "goal" not in vocabulary and "<pad>" not in vocabulary
    assert repr(vocabulary) == "Vocabulary(6 tokens: ['the', 'bank'])"


def test_combining_marks_stay_with_their_letters():
    characters = list(map(chr, range(sys.maxunicode + 1)))
    marks = [c for c in characters if unicodedata.category(c)[0] == "M"] + ["\u200c", "\u200d"]
    words = [letter + marks[i % len(marks)] + "a" for i, letter in enumerate(filter(str.isalpha, characters))]
    words += [f"a{mark}b" for mark in marks]
    assert len(words) > 130_000
    assert tokenize(" ".join(words), lowercase=False) == words


@settings(deadline=None)
@given(st.text() | st.text("aA1²_é\u0301\u0600\u200d❤\ufe0f👩🏽🇫<>&#;\\ \n\t\0\x1f\xa0"))
def test_only_white_space_is_lost(text):
    tokens = tokenize(text, lowercase=False)
    assert "".join(tokens) == "".join(text.split())
    assert all(token.split() == [token] for token in tokens)
    assert tokenize(" ".join(tokens), lowercase=False) == tokens


@given(st.text(st.characters(max_codepoint=127)))
def test_ascii_and_unicode_patterns_agree(ascii_text):
    assert text._ASCII_TOKEN.findall(ascii_text) == text._TOKEN.findall(ascii_text)


@settings(deadline=None)
@given(st.text())
def test_clean_leaves_single_spaces(text):
    assert "  " not in clean(text)


@settings(deadline=None, max_examples=30)
@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda t: t.split() == [t] and "\0" not in t), st.integers(1, 9)
    )
)
def test_saved_vocabulary_loads_unchanged(tmp_path_factory, counts):
    path = tmp_path_factory.mktemp("v") / "vocab.txt"
    vocabulary = Vocabulary.from_counts(counts)
    vocabulary.save(path)
    assert Vocabulary.load(path) == vocabulary


def test_vocabulary_is_sorted_by_count_then_name():
    counts = {"b": 5, "a": 5, "c": 9, "rare": 1, "<S>": 7}
    vocabulary = Vocabulary.from_counts(counts, min_count=2)
    assert vocabulary.tokens == (*SPECIAL, "c", "a", "b")
    assert Vocabulary.from_counts(counts, max_size=2).tokens == (*SPECIAL, "c", "a")
    assert vocabulary.ids(["a", "rare", "never"]).tolist() == [5, UNK, UNK]


def test_vocabulary_without_words_is_refused():
    with pytest.raises(InputError, match="no word reaches min_count=3; lower it or give more texts"):
        Vocabulary.from_counts({"bank": 2, "the": 1}, min_count=3)


def test_padding_token_in_a_text_is_an_ordinary_word(tmp_path):
    vocabulary = Vocabulary.from_counts({"bank": 1, "<pad>": 5})
    assert vocabulary.ids(["<pad>", "bank"]).tolist() == [UNK, len(SPECIAL)]
    path = tmp_path / "vocab.txt"
    path.write_text("<S>\n</S>\n<UNK>\n<pad>\n")
    assert Vocabulary.load(path).ids(["<pad>"]).tolist() == [len(SPECIAL)]


def test_vocabulary_file_has_the_bilm_format(tmp_path):
    Vocabulary.from_counts({"the": 2}).save(tmp_path / "v")
    assert (tmp_path / "v").read_text() == "<S>\n</S>\n<UNK>\nthe\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<S>\n</S>\n<UNK>\na\nb\na\n", ":4: 'a' occurs twice"),
        (b"the\nof\n", ":1: must begin with"),
        (b"<S>\n</S>\n<UNK>\n\nb\n", ":4: the line is empty"),
        (b"<S>\n</S>\n<UNK>\n\xff\n", ":4: byte 0xff is not UTF-8"),
        (b"", ":1: "),
        (b"<S>\n</S>\n<UNK>\nthe 12\n", ":4: 'the 12' holds white space; write one token per line"),
        (b"<S>\n</S>\n<UNK>\nthe\t12\n", r":4: 'the\\t12' holds white space"),
        (b"<S>\n</S>\n<UNK>\n  \n", ":4: the line is empty"),
    ],
)
def test_wrong_vocabulary_file_is_refused_with_its_line(tmp_path, data, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        Vocabulary.load(path)


def test_windows_line_endings_and_string_paths(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"<S>\r\n</S>\r\n<UNK>\r\nthe\r\nbank\r\n")
    assert Vocabulary.load(str(path)).tokens[-2:] == ("the", "bank")
    path.write_bytes(path.read_bytes() + b"\r\n")
    with pytest.raises(InputError, match=":6: the line is empty"):
        Vocabulary.load(path)


def test_spaces_around_tokens_are_stripped_unless_exact(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("<S> \n</S>\n<UNK>\n the\t\nbank \n")
    assert Vocabulary.load(path).tokens[-2:] == ("the", "bank")
    Vocabulary.from_counts({"New York": 1}).save(path)
    assert Vocabulary.load(path, exact=True).tokens[-1] == "New York"


def test_missing_vocabulary_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: cannot be read"):
        Vocabulary.load(tmp_path / "none.txt")


def test_blocks_hold_complete_lines_up_to_a_number_of_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "BLOCK_TOKENS", 4)
    path = tmp_path / "lines.txt"
    path.write_text("the bank\nrose\n\nthe river bank rose\nbank\n")
    lines = list(text.read_lines(path, str.split))
    assert list(text.blocks(lines)) == [lines[:2], lines[2:4], lines[4:]]
