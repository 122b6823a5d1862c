"""How well a model predicts a text: python -m experiments.evaluate."""

import contextlib
import heapq
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, TextIO

import numpy as np
from tyro.conf import Positional, arg

from elmo_jax.data.text import UNK, blocks, read_lines, tokenize
from elmo_jax.elmo import Dtype, Elmo
from elmo_jax.errors import InputError
from elmo_jax.storage.files import move
from elmo_jax.storage.hdf5 import open_datasets
from experiments.common import cli

_WORST = 5  # sentences to show
_FILES = ("metrics.jsonl", "scores.jsonl", "config.json")


@dataclass(frozen=True)
class EvaluateConfig:
    """Perplexity by direction, sentence scores and the least expected words of a text; or check a model."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="[MODEL] TEXT ...")]
    """A run or exported folder and then texts, a sentence a line; or texts alone with --bilm; or, with
    --selfcheck, OPTIONS WEIGHTS SENTENCES EXPECTED..."""
    bilm: tuple[str, str] | None = None
    """Options and weights of a model in the official format, in place of a run."""
    tokenize: bool = False
    """Split raw text as the training commands do; else lines are tokens with spaces between."""
    precision: Dtype | None = None
    """Of the products; what the model was trained with, or float32, if not given."""
    top: int = 20
    """How many of the least expected words to show."""
    selfcheck: bool = False
    """Compare a model's stateful top layer with what is expected of it, as in bilm-tf's fixture:
    SENTENCES is a JSON list of lists of sentences, EXPECTED an HDF5 file a list."""
    rtol: float = 1e-5
    """Relative tolerance of --selfcheck."""
    atol: float = 2e-6
    """Absolute tolerance of --selfcheck."""
    output: str | None = None
    """Folder for scores.jsonl, a line a sentence; none is written without it."""


@dataclass
class _Totals:
    """What is kept of a text however long it is: sums, and the worst few."""

    top: int
    sentences: int = 0
    tokens: int = 0
    unknown: int = 0
    nll: np.ndarray = field(default_factory=lambda: np.zeros(2))  # by direction
    words: list[tuple[float, str, str, int]] = field(default_factory=list)  # heaps, the least extreme first
    lines: list[tuple[float, str, int, float, float]] = field(default_factory=list)

    def add(self, name: str, number: int, line: list[str], each: np.ndarray) -> dict[str, object]:
        """Count one sentence in; returns its record."""
        sums = each.sum(1, dtype=np.float64)
        self.sentences, self.tokens, self.nll = self.sentences + 1, self.tokens + len(line), self.nll + sums
        mean = (each[0, :-1] + each[1, 1:]) / 2
        for value, word in zip(mean.tolist(), line, strict=True):
            _keep(self.words, (value, word, name, number), self.top)
        forward, backward = (-sums).tolist()
        _keep(self.lines, (float(sums.sum()) / (len(line) + 1), name, number, forward, backward), _WORST)
        record = {"file": name, "line": number, "tokens": len(line)}
        return record | {"log_p_forward": forward, "log_p_backward": backward}

    def perplexities(self) -> dict[str, float]:
        """Of both directions, forward and backward."""
        forward, backward = self.nll / (self.tokens + self.sentences)
        named = {"": (forward + backward) / 2, "_forward": forward, "_backward": backward}
        return {f"perplexity{name}": float(np.exp(nll)) for name, nll in named.items()}


def _keep(heap: list, item: tuple, most: int) -> None:
    (heapq.heappush if len(heap) < most else heapq.heappushpop)(heap, item)


def evaluate(config: EvaluateConfig) -> None:
    """Run the command."""
    if config.selfcheck:
        selfcheck(config)
        return
    names = config.paths
    if config.bilm is None:
        if len(names) < 2:
            raise InputError("give a run and at least one text to evaluate it on")
        elmo, names = cli.load_elmo(names[0], None, config.precision), names[1:]
    else:
        elmo = cli.load_elmo(None, config.bilm, config.precision)
    if not names:
        raise InputError("give at least one text")
    totals = _Totals(config.top)
    with _scores(config, totals) as file:
        for name in names:
            lines = read_lines(Path(name), tokenize if config.tokenize else str.split)
            for block in blocks((i, line) for i, line in lines if line):
                each = elmo.surprisal([line for _, line in block])
                for (i, line), surprisal in zip(block, each, strict=True):
                    if elmo.vocabulary is not None:  # surprisal would have asked for one
                        totals.unknown += int(np.sum(elmo.vocabulary.ids(line) == UNK))
                    file.write(json.dumps(totals.add(name, i + 1, line, surprisal)) + "\n")
        if not totals.sentences:
            raise InputError(f"{', '.join(names)}: no sentence to evaluate; give a text with some")
    _show(totals)
    if config.output is not None:
        cli.say(f"\nwritten to {config.output}")


@contextlib.contextmanager
def _scores(config: EvaluateConfig, totals: _Totals) -> Iterator[TextIO]:
    """Where scores go as they come, so that however many there are, none is kept in memory.

    The folder's files get their names when all are whole; what stops the body leaves none of them.
    """
    if config.output is None:
        with open(os.devnull, "w", encoding="utf-8") as file:
            yield file
        return
    folder = Path(config.output)
    files = {folder / name: folder / f"{name}.part" for name in _FILES}
    made = not folder.exists()
    named, waiting = [file.exists() for file in files], [part.exists() for part in files.values()]
    killed = any(waiting) and all(a != b for a, b in zip(named, waiting, strict=True))  # amid the renames
    if any(named) and not killed:
        raise InputError(f"{folder}: holds a run or scores already; give --output a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        metrics, scores, settings = files.values()
        with scores.open("w", encoding="utf-8") as file:
            yield file
        record = {"event": "evaluate", "unknown": totals.unknown, **totals.perplexities()}
        metrics.write_text(json.dumps(record) + "\n", encoding="utf-8")
        settings.write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        for file, part in files.items():
            move(part, file)
    except BaseException as error:
        with contextlib.suppress(OSError):
            for path in (*files, *files.values()):
                path.unlink(missing_ok=True)
            if made:
                folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(
                f"{folder}: cannot be written ({error.strerror}); give another --output"
            ) from None
        raise


def _show(totals: _Totals) -> None:
    share = totals.unknown / max(totals.tokens, 1)
    cli.say(
        f"{totals.sentences:,} sentences, {totals.tokens:,} tokens, {totals.unknown:,} of them ({share:.1%}) "
        "outside the vocabulary, read as one unknown word"
    )
    mean, forward, backward = totals.perplexities().values()
    cli.say(f"perplexity {mean:.2f} (forward {forward:.2f}, backward {backward:.2f}), full softmax")
    cli.say("\nleast likely sentences (log p forward, backward):")
    for _, name, line, forward, backward in sorted(totals.lines, reverse=True):
        cli.say(f"  {forward:9.2f} {backward:9.2f}  {name}:{line}")
    cli.say("\nhighest surprisal (mean of both directions, nats):")
    for value, word, name, line in sorted(totals.words, reverse=True):
        cli.say(f"  {value:6.2f}  {word}  ({name}:{line})")


def selfcheck(config: EvaluateConfig) -> None:
    """Compare a model's stateful embeddings with the expected ones.

    Raises:
        InputError: they differ by more than the tolerance, or a file is wrong.
    """
    if len(config.paths) < 4:
        raise InputError("--selfcheck takes OPTIONS WEIGHTS SENTENCES EXPECTED..., an EXPECTED for each list")
    options, weights, sentences, *expected = config.paths
    elmo = Elmo.from_bilm(options, weights, config.precision)
    lists = _sentence_lists(Path(sentences), len(expected))
    got = []  # one a step: the top layer of every list's sentence, the state carried
    for i in range(len(lists[0])):
        got.append([layers[-1] for layers in elmo.embed([part[i] for part in lists], stateful=True)])
    worst = 0.0
    for k, name in enumerate(expected):
        with open_datasets(Path(name)) as datasets:
            for i, step in enumerate(got):
                halves = np.stack(np.split(step[k], 2, axis=-1))  # [D, tokens, P]
                data = datasets.get(str(i))
                if data is None or data.shape != halves.shape:
                    raise InputError(f"{name}: has no dataset {i} of shape {halves.shape}")
                want = np.asarray(data)
                worst = max(worst, float(np.abs(halves - want).max(initial=0)))
                if not np.allclose(halves, want, rtol=config.rtol, atol=config.atol):
                    raise InputError(f"{name}: dataset {i} differs by {np.abs(halves - want).max():.3g}")
    cli.say(f"all {len(got) * len(expected)} sentences agree; the largest difference is {worst:.3g}")


def _sentence_lists(path: Path, count: int) -> list[list[list[str]]]:
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
        lists = [[sentence.split() for sentence in part] for part in lists]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: holds no JSON list of lists of sentences ({error})") from None
    if len(lists) != count or not lists or len({len(part) for part in lists}) != 1:
        raise InputError(f"{path}: must hold as many lists as there are EXPECTED files, all of one length")
    if not lists[0]:
        raise InputError(f"{path}: holds no sentence, so nothing is checked; give a list with some")
    return lists


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(EvaluateConfig, evaluate, "experiments.evaluate")


if __name__ == "__main__":
    sys.exit(main())
