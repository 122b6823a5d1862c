"""Text cleaning, tokenization, vocabularies and line-by-line reading of text files."""

import gzip
import html
import re
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Self

import numpy as np
import regex

from elmo_jax.config import TextConfig
from elmo_jax.errors import InputError
from elmo_jax.storage.files import check_regular, read_bytes

OnBytes = Callable[[int], object]  # progress callback: bytes read since the last call
Tokenizer = Callable[[str], list[str]]

PAD, BOS, EOS, UNK = range(4)
SPECIAL = ("<pad>", "<S>", "</S>", "<UNK>")
BLOCK_TOKENS = 50_000  # a CPU embeds them in a few seconds

_ASCII_TOKEN = re.compile(r"\w+|[^\w\s]")  # matches like _TOKEN on ASCII text, twice as fast
# A word holds letters, numbers, marks, joiners and soft hyphens; anything else is a user-perceived
# character, such as an emoji with its modifiers. `regex` does not count \x1c to \x1f as white space.
_TOKEN = regex.compile(r"[\w\p{N}\p{GCB=Prepend}\u00ad\u2060]+|(?![\s\x1c-\x1f])\X")
_TAG = re.compile(r"</?[a-zA-Z!][^<>]*>")
# AG News lost the ampersand of many entities: " #39;" for an apostrophe, " quot;" for a quote.
_BARE_ENTITY = re.compile(r" ?(?<![&\w])(#\d{1,5}|quot|amp|lt|gt|nbsp|hellip|[lr][sd]quo|[mn]dash);")


def clean(text: str) -> str:
    r"""Remove news-feed markup: HTML entities, tags and backslashes used as line breaks.

    Examples:
        >>> clean(r"Yahoo #39;s  #36;5bn plan\ &lt;b&gt;...&lt;/b&gt;")
        "Yahoo's $5bn plan ..."
    """
    text = html.unescape(_BARE_ENTITY.sub(_restore_entity, text.replace("\\", " ")))
    return " ".join(_TAG.sub(" ", text).split())


def _restore_entity(match: re.Match[str]) -> str:
    char = html.unescape(f"&{match.group(1)};")
    # The feed added a space before every broken entity; only an apostrophe joins the word before it.
    return char if char in "'\u2019" or not match.group().startswith(" ") else " " + char


_clean = clean  # an alias, because `tokenize` has an argument of the same name


def tokenize(text: str, clean: bool = False, lowercase: bool = True) -> list[str]:
    """Split a text into words and single punctuation characters.

    Combining marks, joiners and variation selectors stay with their character, in every script.

    Args:
        text: Any text.
        clean: Remove news-feed markup first, see `clean`.
        lowercase: Convert the text to lower case.

    Examples:
        >>> tokenize("The bank's rate: 4.5%")
        ['the', 'bank', "'", 's', 'rate', ':', '4', '.', '5', '%']
        >>> tokenize("Nai\\u0308ve <b>", lowercase=False) == ["Nai\\u0308ve", "<", "b", ">"]
        True
    """
    text = _clean(text) if clean else text
    text = text.lower() if lowercase else text
    return (_ASCII_TOKEN if text.isascii() else _TOKEN).findall(text)


def make_tokenizer(config: TextConfig, custom: Tokenizer | None = None) -> Tokenizer:
    """Return the function that converts a text into tokens.

    Args:
        config: Text conversion stored with a model.
        custom: Function of the user, called instead of the stored conversion.

    Examples:
        >>> make_tokenizer(TextConfig("whitespace"))("The  U.S. bank")
        ['the', 'u.s.', 'bank']
    """
    if custom is not None:
        return custom

    def split(text: str) -> list[str]:
        if config.tokens == "words":
            return tokenize(text, config.clean, config.lowercase)
        text = clean(text) if config.clean else text
        return (text.lower() if config.lowercase else text).split()

    def refuse(text: str) -> list[str]:
        remedy = "pass it, or pass lists of tokens"
        raise InputError(f"text {reprlib.repr(text)} needs the `tokenizer` used in training; {remedy}")

    return refuse if config.tokens == "custom" else split


def tokenize_texts(
    texts: Iterable[str] | Iterable[Sequence[str]], tokenizer: Tokenizer = tokenize
) -> list[list[str]]:
    """Tokenize texts; lists of tokens stay unchanged, and a table of one column counts as N texts.

    Raises:
        InputError: The texts are not a list of strings or of lists of tokens.
    """
    if isinstance(texts, str | bytes | Mapping | Set) or not isinstance(texts, Iterable):
        raise InputError(f"the texts are {reprlib.repr(texts)}; pass a list of strings")
    shape = getattr(texts, "shape", (0,))
    if len(shape) == 2 and shape[1] == 1:
        texts = np.asarray(texts)[:, 0]
    elif len(shape) != 1:
        raise InputError(f"the texts are a table of shape {shape}; pass the column of texts")
    return [_tokenize_text(text, i, tokenizer) for i, text in enumerate(texts)]


def _tokenize_text(text: Any, i: int, tokenizer: Tokenizer) -> list[str]:
    given = tokenizer(text) if isinstance(text, str) else text
    is_list = isinstance(given, Iterable) and not isinstance(given, str | bytes | Mapping | Set)
    tokens: Any = list(given) if is_list else None
    if tokens is None or not all(isinstance(token, str) for token in tokens):
        if isinstance(text, str):
            raise InputError(f"`tokenizer` returned {reprlib.repr(given)}; it must return a list of strings")
        raise InputError(f"text {i} is {reprlib.repr(text)}; pass a string or a list of tokens")
    return tokens


class Vocabulary:
    """Token-to-id mapping, most frequent tokens first, after padding, ``<S>``, ``</S>`` and ``<UNK>``.

    The file format is bilm-tf's: one token per line, starting with ``<S>``, ``</S>``, ``<UNK>``.
    Padding (id 0) has no line, so the id of a token is its line number.

    Args:
        tokens: All tokens except padding, starting with ``<S>``, ``</S>``, ``<UNK>``.
        source: Name of the token list in error messages.

    Raises:
        InputError: A special token is missing or a token occurs twice.

    Examples:
        >>> v = Vocabulary.from_counts({"bank": 3, "the": 9, "rare": 1}, min_count=2)
        >>> len(v), v.ids(["the", "bank", "rare"]).tolist(), "bank" in v
        (6, [4, 5, 3], True)
    """

    def __init__(self, tokens: Sequence[str], source: str = "vocabulary"):
        self.tokens = (SPECIAL[PAD], *tokens)
        # The padding token cannot be looked up: "<pad>" in a text is an ordinary word.
        self._ids = {token: i for i, token in enumerate(self.tokens) if i != PAD}
        if self.tokens[: len(SPECIAL)] != SPECIAL:
            raise InputError(f"{source}:1: must begin with the lines {', '.join(SPECIAL[1:])}; add them")
        if len(self._ids) < len(tokens):
            line = next(i for i, token in enumerate(self.tokens) if i and self._ids[token] != i)
            raise InputError(f"{source}:{line}: {reprlib.repr(self.tokens[line])} occurs twice; remove one")

    def __len__(self) -> int:
        return len(self.tokens)

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def __repr__(self) -> str:
        return f"Vocabulary({len(self):,} tokens: {reprlib.repr(list(self.tokens[len(SPECIAL) :]))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_counts(cls, counts: Mapping[str, int], min_count: int = 1, max_size: int | None = None) -> Self:
        """Build a vocabulary of the most frequent tokens; tokens of equal count are sorted by name.

        Args:
            counts: Number of occurrences of each token.
            min_count: Minimum number of occurrences.
            max_size: Maximum number of tokens besides the special ones; None sets no limit.

        Raises:
            InputError: There are tokens, but none reaches `min_count`.
        """
        frequent = (token for token, n in counts.items() if n >= min_count and token not in SPECIAL)
        words = sorted(frequent, key=lambda token: (-counts[token], token))[:max_size]
        if counts and not words:
            raise InputError(f"no word reaches min_count={min_count}; lower it or give more texts")
        return cls([*SPECIAL[1:], *words])

    def ids(self, tokens: Iterable[str]) -> np.ndarray:
        """Return int32 ids ``[tokens]``; a token outside the vocabulary becomes ``<UNK>``."""
        return np.fromiter((self._ids.get(token, UNK) for token in tokens), np.int32)

    @property
    def text(self) -> str:
        """Content of the vocabulary file."""
        return "".join(f"{token}\n" for token in self.tokens[1:])

    def save(self, path: str | Path) -> None:
        """Write the vocabulary file."""
        Path(path).write_text(self.text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, exact: bool = False) -> Self:
        """Read a file written by `save` or by bilm-tf.

        Args:
            path: UTF-8 file, one token per line.
            exact: Keep spaces inside tokens. A model trained on lists of tokens may have such tokens.

        Raises:
            InputError: The file is missing, is not UTF-8, or has an invalid line, which the message names.
        """
        lines = read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
        tokens = lines if exact else [line.strip(" \t\r") for line in lines]
        for i, token in enumerate(tokens, 1):
            if not token:
                raise InputError(f"{path}:{i}: the line is empty; remove it")
            if not exact and (" " in token or "\t" in token):
                raise InputError(
                    f"{path}:{i}: {reprlib.repr(token)} holds white space; write one token per line"
                )
        return cls(tokens, source=str(path))


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file, which may be compressed as ``.gz``, without its byte-order mark.

    Raises:
        InputError: The file is missing, unreadable or not UTF-8; the message names the line.
    """
    path = Path(path)
    return decode(read_bytes(path), path)


def decode(data: bytes, path: Path, line: int = 1) -> str:
    """Decode UTF-8 bytes that begin at the given line of a file; at line 1, remove a byte-order mark.

    Raises:
        InputError: A byte is NUL or not UTF-8; the message names its line.
    """
    try:
        text, bad = data.decode("utf-8-sig" if line == 1 else "utf-8"), data.find(b"\0")
    except UnicodeDecodeError as error:
        text, data, bad = "", bytes(error.object), error.start  # `start` ignores the byte-order mark
    if bad >= 0:
        line += data.count(b"\n", 0, bad)
        raise InputError(f"{path}:{line}: byte 0x{data[bad]:02x} is not UTF-8 text; convert the file")
    return text


def read_lines(path: Path, split: Callable[[str], list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each line, from 0, and its tokens; see `raw_lines`."""
    return ((i, split(line)) for i, line in enumerate(raw_lines(path)))


def raw_lines(path: Path, on_bytes: OnBytes = lambda n: None) -> Iterator[str]:
    """Yield the lines of a text or ``.gz`` file with their line endings; call `on_bytes` with the bytes read.

    Raises:
        InputError: The file is missing, damaged or not UTF-8; the message names the line.
    """
    check_regular(path)
    reported = 0
    try:
        with path.open("rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            try:
                for i, line in enumerate(file, 1):
                    if i % 1000 == 0:
                        on_bytes(raw.tell() - reported)
                        reported = raw.tell()
                    yield decode(line, path, i)
            finally:
                on_bytes(raw.tell() - reported)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); check the file") from None


def blocks(lines: Iterable[tuple[int, list[str]]]) -> Iterator[list[tuple[int, list[str]]]]:
    """Group lines into blocks of about `BLOCK_TOKENS` tokens."""
    block: list[tuple[int, list[str]]] = []
    tokens = 0
    for i, line in lines:
        block.append((i, line))
        tokens += len(line) + 1
        if tokens >= BLOCK_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block
