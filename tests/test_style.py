"""Identifiers, docstrings and comments use the field's terms and open with a subject or a verb."""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "elmo_jax").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])

# Private words and the standard term for each.
TERMS = {
    "told": "message",
    "dispatch": "step chunk, multi-step call",
    "wanted": "enabled",
    "sound": "is_finite",
    "awaited": "deferred",
    "drawn": "sampled",
    "turned": "transposed, reversed",
    "slopes": "local derivatives",
    "spelled": "character ids",
    "spellings": "character ids",
    "rowwise": "row-sparse",
    "lane": "worker process",
    "peer": "baseline",
    "peers": "baselines",
    "obstacle": "unsupported_reason",
}
# Old names that a shim, an alias or a file format must keep.
KEPT = {"after_dispatch", "dispatches", "rowwise", "spelled", "spellings", "steps_per_dispatch", "wanted"}
TERM = re.compile(r"\b(?:" + "|".join(TERMS) + r")\b", re.IGNORECASE)
OPENING = re.compile(r"(What|Whether|Of|How|Where|Who|Which|It|They)\b")


def words(identifier: str) -> str:
    """Return an identifier as words: ``_toldLane`` as ``told Lane``."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", identifier).replace("_", " ").strip()


def comments_and_names(source: str):
    """Yield the line and text of every comment and identifier."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string.lstrip("# ")
        elif token.type == tokenize.NAME and token.string not in KEPT:
            yield token.start[0], words(token.string)


def docstrings(source: str):
    """Yield the line and text of every docstring, those of fields included."""
    for node in ast.walk(ast.parse(source)):
        for statement in body if isinstance(body := getattr(node, "body", ()), list) else ():
            if (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                yield statement.lineno, statement.value.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_terms_and_openings_are_plain(path):
    source, faults = path.read_text(), []
    for line, text in [*comments_and_names(source), *docstrings(source)]:
        faults += [f"{line}: {found!r}: say {TERMS[found.lower()]}" for found in TERM.findall(text)]
    for line, text in docstrings(source):
        if opening := OPENING.match(text.strip()):
            faults.append(f"{line}: docstring opens with {opening.group()!r}")
    assert not faults, "\n".join([str(path), *faults])


def test_checks_find_what_they_should():
    source = '"""Whether it is told."""\nlane_count = 1  # wanted\n'
    assert [text for _, text in docstrings(source)] == ["Whether it is told."]
    assert [t for _, t in comments_and_names(source) if TERM.search(t)] == ["lane count", "wanted"]
