"""One word in its contexts, and what each layer finds alike: python -m experiments.neighbours."""

import itertools
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from tyro.conf import Positional, arg

from elmo_jax.data.sample_corpus import sample_corpus
from elmo_jax.data.text import read_lines, tokenize
from elmo_jax.elmo import Dtype
from elmo_jax.errors import InputError
from elmo_jax.storage.files import move
from experiments.common import cli
from experiments.common.report import explain_numbers, plot_layers

_AROUND = 4  # words shown on either side
_BLOCK = 256  # sentences at a time


@dataclass(frozen=True)
class NeighboursConfig:
    """The same word in different contexts: which of its occurrences each layer finds alike."""

    word: Annotated[Positional[str], arg(metavar="WORD")] = "bank"
    """The word, as the model's texts write it."""
    texts: Annotated[Positional[tuple[str, ...]], arg(metavar="TEXT ...")] = ()
    """Texts, a sentence a line; the embedded corpus's test part, which names senses, if none is given."""
    pretrained: str | None = None
    """Run of experiments.pretrain, or a folder that save_pretrained wrote."""
    bilm: tuple[str, str] | None = None
    """Options and weights of a model in the official format."""
    precision: Dtype | None = None
    """Of the products; what the model was trained with, or float32, if not given."""
    tokenize: bool = False
    """Split raw text as the training commands do; else lines are tokens with spaces between."""
    nearest: int = 3
    """How many neighbours to show."""
    most: int = 500
    """Occurrences looked at; the first."""
    picture: str | None = None
    """PNG to draw the occurrences into, a panel a layer."""
    overwrite: bool = False
    """Replace that PNG."""


class Place(NamedTuple):
    """Where a word stands: its sentence, its place there, where that is from, and its sense if known."""

    sentence: list[str]
    at: int
    source: str
    sense: str | None

    def shown(self) -> str:
        """The words around it, itself in brackets."""
        before, after = self.sentence[: self.at][-_AROUND:], self.sentence[self.at + 1 :][:_AROUND]
        return " ".join([*before, f"[{self.sentence[self.at]}]", *after])


def neighbours(config: NeighboursConfig) -> list[float]:
    """Run the command; returns, of texts that name senses, how often neighbours share theirs by layer."""
    picture = None if config.picture is None else _new(Path(config.picture), config.overwrite)
    elmo = cli.load_elmo(config.pretrained, config.bilm, config.precision)
    places = list(itertools.islice(_places(config), config.most))
    if len(places) < 2:
        raise InputError(
            f"{config.word!r} stands in the texts {len(places)} times; give a more frequent word"
        )
    vectors = _vectors(elmo, places)
    near = [similarity(layer) for layer in vectors]
    names = ["token vectors", *(f"LSTM layer {i}" for i in range(1, len(near)))]
    senses = [place.sense for place in places]
    shares = [] if None in senses else [_agreement(layer, senses, config.nearest) for layer in near]
    cli.say(f"{config.word}: {len(places)} occurrences; nearest by cosine similarity")
    asked = _queries(near[-1], senses)
    for i in asked:
        _show(i, places, near, names, config.nearest)
    if shares:
        told = ", ".join(f"{name} {share:.0%}" for name, share in zip(names, shares, strict=True))
        cli.say(f"\nof the same sense among the {config.nearest} nearest: {told}")
        of_same = [f"{share:.0%} of neighbours share the sense" for share in shares]
        names = [f"{name}\n{told}" for name, told in zip(names, of_same, strict=True)]
    if picture is not None:
        examples = {places[i].sense: f"{places[i].sense}: {places[i].shown()}" for i in asked}
        groups = [examples.get(sense, "") if sense else config.word for sense in senses]
        _draw([flat(layer) for layer in vectors], groups, names, picture)
        if numbers := explain_numbers(list(dict.fromkeys(groups)), "word"):
            cli.say(f"\n{numbers}")
        cli.say(f"\nwritten to {picture}")
    return shares


def _new(picture: Path, overwrite: bool) -> Path:
    """The picture's path, if it can be written."""
    if picture.suffix.lower() != ".png":
        raise InputError(f"--picture must be a file whose name ends in .png, not {str(picture)!r}")
    if picture.is_dir() or not picture.parent.is_dir() or not os.access(picture.parent, os.W_OK):
        told = "is a folder" if picture.is_dir() else "is in no folder that can be written to"
        raise InputError(f"{picture}: {told}; give another --picture")
    if picture.exists() and not overwrite:
        raise InputError(f"{picture}: is there already; replace it with --overwrite")
    return picture


def _draw(points: list[np.ndarray], groups: list[str], names: list[str], picture: Path) -> None:
    """Write the picture, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=picture.parent, prefix=".picture-") as folder:
        part = Path(folder) / "part.png"
        plot_layers(points, groups, names, part)
        move(part, picture)


def _places(config: NeighboursConfig) -> Iterator[Place]:
    """Every occurrence of the word."""
    if not config.texts:
        for n, text in enumerate(sample_corpus().test):
            of = {at: name.partition("/")[2] for at, name in text.senses}
            words = text.text.split()
            for at in (at for at, word in enumerate(words) if word == config.word):
                yield Place(words, at, f"sample:{n + 1}", of.get(at, config.word))
    split = tokenize if config.tokenize else str.split
    for name in config.texts:
        for i, words in read_lines(Path(name), split):
            for at in (at for at, word in enumerate(words) if word == config.word):
                yield Place(words, at, f"{name}:{i + 1}", None)


def _vectors(elmo: Any, places: list[Place]) -> np.ndarray:
    """The word's vectors ``[L, N, F]``."""
    columns = []
    for i in range(0, len(places), _BLOCK):
        part = places[i : i + _BLOCK]
        layers = elmo.embed([place.sentence for place in part])
        columns += [layer[:, place.at] for place, layer in zip(part, layers, strict=True)]
    return np.stack(columns, axis=1)


def similarity(x: np.ndarray) -> np.ndarray:
    """Cosines ``[N, N]`` of vectors ``[N, F]``; -1 of each with itself, which is no neighbour.

    Example:
        >>> similarity(np.array([[2.0, 0.0], [0.0, 1.0], [1.0, 0.0]])).tolist()
        [[-1.0, 0.0, 1.0], [0.0, -1.0, 0.0], [1.0, 0.0, -1.0]]
    """
    unit = x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -1)
    return cosines


def flat(x: np.ndarray) -> np.ndarray:
    """The two principal components ``[N, 2]`` of vectors ``[N, F]``."""
    centred = x - x.mean(0)
    left, size, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.zeros((len(x), 2))
    points[:, : min(2, len(size))] = (left * size)[:, :2]
    return points


def _agreement(near: np.ndarray, senses: list[Any], k: int) -> float:
    """How many of the k nearest, and of those as near as they, share the sense; the mean over all."""
    same = np.array(senses)[:, None] == np.array(senses)[None]
    last = np.sort(near, axis=1)[:, -min(k, len(near) - 1)]
    chosen = near >= last[:, None] - 1e-6
    np.fill_diagonal(chosen, False)
    return float(np.mean((same & chosen).sum(1) / chosen.sum(1)))


def _queries(near: np.ndarray, senses: list[Any]) -> list[int]:
    """The first occurrence of every sense; or the first of all, and that least like it at the top."""
    if None not in senses and len(set(senses)) > 1:
        return [senses.index(sense) for sense in dict.fromkeys(senses)]
    return [0, 1 + int(near[0, 1:].argmin())]


def _show(i: int, places: list[Place], near: list[np.ndarray], names: list[str], k: int) -> None:
    cli.say(f"\n{places[i].shown()}" + (f"  ({places[i].sense})" if places[i].sense else ""))
    for name, cosines in zip(names, near, strict=True):
        cli.say(f"  {name}")
        others = cosines[i]
        if np.isclose(np.delete(others, i), 1, atol=1e-5).all():
            why = "no context is known here" if name == names[0] else "their contexts are alike"
            cli.say(f"     1.00  every occurrence: {why}")
            continue
        for j in np.argsort(-others, kind="stable")[: min(k, len(others) - 1)]:  # the last is itself
            sense = f", {places[j].sense}" if places[j].sense else ""
            cli.say(f"    {others[j]:5.2f}  {places[j].shown()}  ({places[j].source}{sense})")


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(NeighboursConfig, neighbours, "experiments.neighbours")


if __name__ == "__main__":
    sys.exit(main())
