"""Command that prints the most similar occurrences of a word by layer."""

import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import numpy as np
from tyro.conf import Positional, arg

from elmo_jax.config import Config, Count, Dtype
from elmo_jax.errors import InputError
from experiments.common import cli

if TYPE_CHECKING:
    from elmo_jax.elmo import Elmo

_CONTEXT = 4  # number of words printed on each side
_EXAMPLES = 4  # occurrences that stand for the others of a text without senses


@dataclass(frozen=True)
class NeighboursConfig(Config):
    """Print the most similar occurrences of a word by layer."""

    word: Annotated[Positional[str], arg(metavar="WORD")] = "bank"
    """Word to look up, written as in the training texts of the model."""
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT ...")] = ()
    """Text files, one sentence per line. If none is given, the training texts of the run are searched; for
    the sample corpus, the test texts, in which ambiguous words are labelled with their sense."""
    pretrained: str | None = None
    """Run of pretrain, or a folder written by save_pretrained."""
    bilm: tuple[str, str] | None = None
    """Options and weights of a model in the official format."""
    precision: Dtype | None = None
    """Matmul dtype; if not given, the dtype stored with the model."""
    tokenize: bool = False
    """Tokenize raw text like the model's training text; if not given, tokens are separated by spaces."""
    nearest: Count = 3
    """Number of neighbours to print."""
    most: Count = 500
    """Maximum number of occurrences to use, from the start of the texts."""
    picture: str | None = None
    """PNG file for a plot of the occurrences, one panel per layer."""
    overwrite: bool = False
    """Replace an existing PNG file."""


_Line = tuple[list[str], str, Mapping[int, str] | None]  # tokens, source, and senses by position


class Occurrence(NamedTuple):
    """One occurrence of a word: its sentence, position, source, and sense if known."""

    sentence: list[str]
    position: int
    source: str
    sense: str | None

    def __str__(self) -> str:
        before = self.sentence[: self.position][-_CONTEXT:]
        after = self.sentence[self.position + 1 :][:_CONTEXT]
        return " ".join([*before, f"[{self.sentence[self.position]}]", *after])


def neighbours(config: NeighboursConfig) -> list[float]:
    """Run the command.

    Returns:
        Fraction of nearest neighbours with the same sense, by layer; empty for texts without senses.
    """
    if config.picture is not None:
        _check_picture(Path(config.picture), config.overwrite)
    elmo = cli.load_elmo(config.pretrained, config.bilm, config.precision)
    found = list(itertools.islice(_find_occurrences(config, elmo), config.most))
    if len(found) < 2:
        raise InputError(f"{config.word!r} occurs {len(found)} times in the texts; give a more frequent word")
    sentences = [occurrence.sentence for occurrence in found]
    cli.warn_unknown(elmo.count_unknown(sentences), sum(map(len, sentences)), config.tokenize)
    layers = elmo.embed(sentences)
    vectors = np.stack([x[:, o.position] for x, o in zip(layers, found, strict=True)], axis=1)  # [L, N, F]
    cosines = [cosine_similarity(layer) for layer in vectors]
    titles = ["token vectors", *(f"LSTM layer {i}" for i in range(1, len(cosines)))]
    senses = [occurrence.sense for occurrence in found]
    cli.say(f"{config.word}: {len(found)} occurrences; nearest by cosine similarity")
    queries = _choose_queries(cosines[-1], senses)
    groups = _group_by_query(found, cosines[-1], queries)
    for query in queries:
        _show(query, found, cosines, titles, config.nearest)
    agreement = []
    if None not in senses:
        agreement = [sense_agreement(layer, senses, config.nearest) for layer in cosines]
        by_layer = {title: f"{fraction:.0%}" for title, fraction in zip(titles, agreement, strict=True)}
        line = ", ".join(f"{title} {percent}" for title, percent in by_layer.items())
        cli.say(f"\nsame sense among the {config.nearest} nearest: {line}")
        titles = [f"{title}\n{percent} of neighbours share the sense" for title, percent in by_layer.items()]
    if config.picture is not None:
        from experiments.common import report

        points = [principal_components(layer) for layer in vectors]
        report.plot_layers(points, groups, titles, Path(config.picture))
        if numbers := report.explain_numbers(list(dict.fromkeys(groups)), "word"):
            cli.say(f"\n{numbers}")
        cli.say(f"\nwritten to {config.picture}")
    return agreement


def _check_picture(picture: Path, overwrite: bool) -> None:
    if picture.suffix.lower() != ".png":
        raise InputError(f"--picture must name a .png file, not {str(picture)!r}")
    if picture.is_dir():
        raise InputError(f"--picture {picture}: is a folder; give the path of a file")
    if not picture.parent.is_dir() or not os.access(picture.parent, os.W_OK):
        raise InputError(f"--picture {picture}: its folder is missing or not writable; give another path")
    if picture.exists() and not overwrite:
        raise InputError(f"--picture {picture}: already exists; replace it with --overwrite")


def _find_occurrences(config: NeighboursConfig, elmo: "Elmo") -> Iterator[Occurrence]:
    from elmo_jax.data.text import read_lines

    lines: Iterable[_Line]
    if config.texts:
        split = elmo.tokenize if config.tokenize else str.split
        texts = ((name, read_lines(Path(name), split)) for name in config.texts)
        lines = ((words, f"{name}:{n + 1}", None) for name, text in texts for n, words in text)
    else:
        lines = _training_lines(config.pretrained, elmo)
    for words, source, senses in lines:
        for i, word in enumerate(words):
            if word == config.word:
                sense = None if senses is None else senses.get(i, word).rpartition("/")[2]
                yield Occurrence(words, i, source, sense)


def _training_lines(run: str | None, elmo: "Elmo") -> Iterator[_Line]:
    """Yield the sentences of a run's training texts; for the sample corpus, its test texts with senses.

    Raises:
        InputError: The model is not a run, or its texts cannot be read.
    """
    from elmo_jax.data.corpus import Corpus
    from elmo_jax.data.csv_dataset import read_training_texts
    from elmo_jax.data.sample_corpus import sample_corpus
    from elmo_jax.data.text import read_lines
    from elmo_jax.storage.files import read_config
    from experiments.common.inputs import data_of

    data = None if run is None else data_of(Path(run))
    corpus = None if run is None else (read_config(Path(run)).get("corpus") or {}).get("corpus")
    if data is not None and data.dataset == "sample":
        for n, text in enumerate(sample_corpus().test, 1):
            yield text.text.split(), f"sample:{n}", dict(text.senses)
    elif data is not None:
        texts = read_training_texts(data)
        for line, start, end in zip(texts.lines, texts.offsets[:-1], texts.offsets[1:], strict=True):
            yield [texts.tokens[code] for code in texts.codes[start:end]], f"{texts.path}:{line}", None
    elif corpus is not None:
        for shard in Corpus.open(corpus).shards:
            for n, words in read_lines(shard, elmo.tokenize):
                yield words, f"{shard}:{n + 1}", None
    else:
        raise InputError("the model does not name its training texts; give a TEXT to search")


def cosine_similarity(x: np.ndarray) -> np.ndarray:
    """Return cosines ``[N, N]`` of vectors ``[N, F]``, with -1 on the diagonal to exclude self-matches."""
    unit = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -1)
    return cosines


def principal_components(x: np.ndarray) -> np.ndarray:
    """Return the first two principal components ``[N, 2]`` of vectors ``[N, F]``."""
    left, size, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return (left * size)[:, :2]


def sense_agreement(cosines: np.ndarray, senses: Sequence[str | None], k: int) -> float:
    """Return the mean fraction of the k nearest occurrences, ties included, that share the sense."""
    same = np.array(senses)[:, None] == np.array(senses)[None]
    kth = np.sort(cosines, axis=1)[:, -min(k, len(cosines) - 1)]
    chosen = cosines >= kth[:, None] - 1e-6
    np.fill_diagonal(chosen, False)
    return float(np.mean((same & chosen).sum(1) / chosen.sum(1)))


def _choose_queries(cosines: np.ndarray, senses: Sequence[str | None]) -> list[int]:
    """Return the first occurrence of each sense; without senses, the first and the one least similar."""
    if None not in senses and len(set(senses)) > 1:
        return [senses.index(sense) for sense in dict.fromkeys(senses)]
    queries = [0]
    while len(queries) < min(_EXAMPLES, len(cosines)):
        nearest = cosines[queries].max(0)
        nearest[queries] = np.inf
        queries.append(int(nearest.argmin()))
    return queries


def _group_by_query(found: Sequence[Occurrence], cosines: np.ndarray, queries: Sequence[int]) -> list[str]:
    """Return a label for each occurrence: the query of the same sense; without senses, the most similar."""
    if found[queries[0]].sense is not None:
        examples = {found[i].sense: f"{found[i].sense}: {found[i]}" for i in queries}
        return [examples[occurrence.sense] for occurrence in found]
    similarity = cosines[queries]  # [queries, N]
    similarity[range(len(queries)), queries] = np.inf
    return [f"like: {found[queries[i]]}" for i in similarity.argmax(0).tolist()]


def _show(query: int, found: list[Occurrence], cosines: list[np.ndarray], titles: list[str], k: int) -> None:
    """Print an occurrence and its nearest neighbours by layer."""
    cli.say(f"\n{found[query]}" + (f"  ({found[query].sense})" if found[query].sense else ""))
    for title, layer in zip(titles, cosines, strict=True):
        cli.say(f"  {title}")
        others = layer[query]
        if np.isclose(np.delete(others, query), 1, atol=1e-5).all():
            why = (
                "this layer does not depend on context" if title == titles[0] else "all contexts are similar"
            )
            cli.say(f"     1.00  all occurrences: {why}")
            continue
        for i in np.argsort(-others, kind="stable")[: min(k, len(others) - 1)]:
            sense = f", {found[i].sense}" if found[i].sense else ""
            cli.say(f"    {others[i]:5.2f}  {found[i]}  ({found[i].source}{sense})")


def main() -> int:
    """Run the command and return its exit code."""
    return cli.run(NeighboursConfig, neighbours, "neighbours")


if __name__ == "__main__":
    sys.exit(main())
