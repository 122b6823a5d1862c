"""Raw text to tokens, and tokens to ids.

Nouns: a *token* is a lower-case word or a mark; a *vocabulary* numbers the tokens by
falling count behind four special ones.

A text file's lines as tokens, one at a time or in groups, whatever its size.
"""

import gzip
import html
import re
import reprlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from elmo_jax.errors import InputError

PAD, BOS, EOS, UNK = range(4)
SPECIAL = ("<pad>", "<S>", "</S>", "<UNK>")

_TOKEN = re.compile(r"\w+|[^\w\s]")
_TAG = re.compile(r"</?[a-zA-Z!][^<>]*>")
# AG News lost the ampersand of many entities: " #39;" for an apostrophe, " quot;" for a quote.
_BARE_ENTITY = re.compile(r" ?(?<![&\w])(#\d{1,5}|quot|amp|lt|gt|nbsp|hellip|[lr][sd]quo|[mn]dash);")


def clean(text: str) -> str:
    r"""Undo what news feeds leave in their text: entities, tags, backslashes for line breaks.

    Example:
        >>> clean(r"Yahoo #39;s  #36;5bn plan\ &lt;b&gt;...&lt;/b&gt;")
        "Yahoo's $5bn plan ..."
    """
    text = text.replace("\\", " ")
    text = _BARE_ENTITY.sub(lambda m: _mend(m.group(0), m.group(1)), text)
    text = html.unescape(text)
    return " ".join(_TAG.sub(" ", text).split())


def _mend(match: str, name: str) -> str:
    char = html.unescape(f"&{name};")
    # The feed put a space before every mended entity; only an apostrophe clings to its word.
    return char if char in "'\u2019" or not match.startswith(" ") else " " + char


def tokenize(text: str) -> list[str]:
    """Raw text, cleaned as `clean` does, as lower-case words and single marks in order.

    Example:
        >>> tokenize("The bank's rate: 4.5%")
        ['the', 'bank', "'", 's', 'rate', ':', '4', '.', '5', '%']
    """
    return _TOKEN.findall(clean(text).lower())


def read_text(path: str | Path) -> str:
    """A whole UTF-8 file, without a byte-order mark.

    Raises:
        InputError: it is missing, unreadable or not UTF-8 (with the line).
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe or a device may have no end
        raise InputError(f"{path}: is not a regular file; give the path of one")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    return decode(data, path)


def decode(data: bytes, path: Path, line: int = 1) -> str:
    """UTF-8 bytes without NUL as text, less the byte-order mark that a file may begin with.

    Args:
        data: a file's bytes, or those of some lines.
        path: of the file, for the message alone.
        line: which line of the file the bytes begin at, from 1.

    Raises:
        InputError: a byte is none of such text, with its line.
    """
    try:
        text, bad = data.decode("utf-8-sig" if line == 1 else "utf-8"), data.find(b"\0")
    except UnicodeDecodeError as error:
        text, data, bad = "", bytes(error.object), error.start  # counted without the mark
    if bad >= 0:
        line += data.count(b"\n", 0, bad)
        raise InputError(
            f"{path}:{line}: byte 0x{data[bad]:02x} is not UTF-8 text; convert the file to UTF-8"
        )
    return text


class Vocabulary:
    """The tokens a model knows, by falling count, behind padding, BOS, EOS and unknown.

    The file is bilm-tf's: a token a line from ``<S>``, ``</S>``, ``<UNK>`` on; padding, id 0,
    has no line, so a token's id is its line number.

    Args:
        tokens: all but padding, so ``<S>``, ``</S>``, ``<UNK>`` first.

    Raises:
        InputError: a special token is missing or a token stands twice.

    Example:
        >>> v = Vocabulary.from_counts({"bank": 3, "the": 9, "rare": 1}, min_count=2)
        >>> len(v), v.ids(["the", "bank", "rare"]).tolist()
        (6, [4, 5, 3])
    """

    def __init__(self, tokens: Sequence[str], source: str = "vocabulary"):
        self.tokens = (SPECIAL[PAD], *tokens)
        # Padding has no name that a text could use: "<pad>" in one is a word like any other.
        self._ids = {token: i for i, token in enumerate(self.tokens) if i != PAD}
        if self.tokens[: len(SPECIAL)] != SPECIAL:
            raise InputError(f"{source}:1: must begin with the lines {', '.join(SPECIAL[1:])}; add them")
        if len(self._ids) < len(tokens):
            line = next(i for i, token in enumerate(self.tokens) if i and self._ids[token] != i)
            raise InputError(
                f"{source}:{line}: {reprlib.repr(self.tokens[line])} stands twice; remove one of the two"
            )

    def __len__(self) -> int:
        return len(self.tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.tokens == other.tokens

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, int], min_count: int = 1, max_size: int | None = None
    ) -> "Vocabulary":
        """The tokens seen at least `min_count` times, at most `max_size` of them; ties by name."""
        kept = (token for token, n in counts.items() if n >= min_count and token not in SPECIAL)
        words = sorted(kept, key=lambda token: (-counts[token], token))[:max_size]
        return cls([*SPECIAL[1:], *words])

    def ids(self, tokens: Iterable[str]) -> np.ndarray:
        """int32 ids ``[tokens]``; what is not in the vocabulary is ``<UNK>``."""
        return np.fromiter((self._ids.get(token, UNK) for token in tokens), np.int32)

    @property
    def text(self) -> str:
        """What its file holds, a token a line."""
        return "".join(f"{token}\n" for token in self.tokens[1:])

    def save(self, path: str | Path) -> None:
        """Write the file."""
        Path(path).write_text(self.text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Vocabulary":
        """Read a file that `save` or bilm-tf wrote.

        Raises:
            InputError: it is missing, not UTF-8, lacks the special tokens, or has a blank
                or repeated line.
        """
        lines = read_text(path).replace("\r\n", "\n").removesuffix("\n").split("\n")
        if "" in lines:
            raise InputError(f"{path}:{lines.index('') + 1}: the line is empty; remove it")
        return cls(lines, source=str(path))


PART_TOKENS = 50_000  # of a group: a few seconds' work


def read_lines(path: Path, split: Callable[[str], list[str]]) -> Iterator[tuple[int, list[str]]]:
    """Line numbers from 0 and their tokens, one line in memory at a time; see `raw_lines`."""
    return ((i, split(line)) for i, line in enumerate(raw_lines(path)))


def raw_lines(path: Path) -> Iterator[str]:
    """Lines with what ends them, one in memory at a time; unpacked if the name ends in ``.gz``.

    Raises:
        InputError: the file is missing, damaged or not UTF-8, with the line.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a regular file, and is read more than once; save it as one first")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for i, line in enumerate(file, 1):
                yield decode(line, path, i)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be read ({reason}); check the file") from None


def blocks(lines: Iterable[tuple[int, list[str]]]) -> Iterator[list[tuple[int, list[str]]]]:
    """Lines in groups of about `PART_TOKENS` tokens: the same however often it is asked."""
    block: list[tuple[int, list[str]]] = []
    tokens = 0
    for i, line in lines:
        block.append((i, line))
        tokens += len(line) + 1
        if tokens >= PART_TOKENS:
            yield block
            block, tokens = [], 0
    if block:
        yield block
