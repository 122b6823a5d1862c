"""Measure how well a language model predicts a text: python -m experiments.evaluate."""

import contextlib
import heapq
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TextIO

import numpy as np
from tyro.conf import Positional, arg

from elmo_jax.config import Dtype
from elmo_jax.errors import InputError
from experiments.common import cli

if TYPE_CHECKING:
    from elmo_jax.elmo import Elmo

_SENTENCES_SHOWN = 5
_FILES = ("metrics.jsonl", "scores.jsonl", "config.json")


@dataclass(frozen=True)
class EvaluateConfig:
    """Print the perplexity of texts and their least likely sentences and words, or check a model."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="[MODEL] TEXT ...")]
    """A run or exported folder and then text files, one sentence per line; text files alone with --bilm;
    OPTIONS WEIGHTS SENTENCES EXPECTED... with --selfcheck."""
    bilm: tuple[str, str] | None = None
    """Options and weights of a model in the official format, instead of a run."""
    tokenize: bool = False
    """Tokenize raw text as the training commands do. Without it, spaces separate the tokens of a line."""
    precision: Dtype | None = None
    """Matmul dtype; the model's own if not given."""
    top: int = 20
    """Number of least likely words to print."""
    selfcheck: bool = False
    """Compare a model's stateful top layer with known embeddings, as bilm-tf's tests do. SENTENCES is a
    JSON list of lists of sentences; EXPECTED is one HDF5 file per list."""
    rtol: float = 1e-5
    """Relative tolerance of --selfcheck."""
    atol: float = 2e-6
    """Absolute tolerance of --selfcheck."""
    output: str | None = None
    """Folder for scores.jsonl, with one record per sentence; not written if not given."""


@dataclass
class _Scores:
    """Sums over all sentences, and the least likely words and sentences in heaps of bounded size."""

    words_shown: int
    sentences: int = 0
    tokens: int = 0
    unknown: int = 0
    nll: np.ndarray = field(default_factory=lambda: np.zeros(2))  # forward, backward
    words: list[tuple[float, str, str, int]] = field(default_factory=list)
    lines: list[tuple[float, str, int, float, float]] = field(default_factory=list)

    def add(self, file: str, line: int, tokens: list[str], surprisal: np.ndarray) -> dict[str, object]:
        """Add a sentence's surprisal ``[2, tokens + 1]`` and return its record."""
        nll = surprisal.sum(1, dtype=np.float64)
        self.sentences += 1
        self.tokens += len(tokens)
        self.nll = self.nll + nll
        # The forward direction predicts EOS last and the backward one BOS first.
        mean = (surprisal[0, :-1] + surprisal[1, 1:]) / 2
        for value, token in zip(mean.tolist(), tokens, strict=True):
            _push(self.words, (value, token, file, line), self.words_shown)
        forward, backward = (-nll).tolist()
        per_token = float(nll.sum()) / (len(tokens) + 1)
        _push(self.lines, (per_token, file, line, forward, backward), _SENTENCES_SHOWN)
        return {
            "file": file,
            "line": line,
            "tokens": len(tokens),
            "log_p_forward": forward,
            "log_p_backward": backward,
        }

    def perplexities(self) -> dict[str, float]:
        """Return the perplexity of both directions together, forward and backward."""
        forward, backward = self.nll / (self.tokens + self.sentences)
        by_name = {"": (forward + backward) / 2, "_forward": forward, "_backward": backward}
        return {f"perplexity{name}": float(np.exp(nll)) for name, nll in by_name.items()}

    def show(self) -> None:
        """Print the summary, the least likely sentences and the least likely words."""
        cli.say(
            f"{self.sentences:,} sentences, {self.tokens:,} tokens, {self.unknown:,} of them "
            f"({self.unknown / max(self.tokens, 1):.1%}) unknown to the vocabulary"
        )
        mean, forward, backward = self.perplexities().values()
        cli.say(f"perplexity {mean:.2f} (forward {forward:.2f}, backward {backward:.2f}), full softmax")
        cli.say("\nleast likely sentences (log p forward, backward):")
        for _, file, line, forward, backward in sorted(self.lines, reverse=True):
            cli.say(f"  {forward:9.2f} {backward:9.2f}  {file}:{line}")
        cli.say("\nhighest surprisal (mean of both directions, nats):")
        for value, word, file, line in sorted(self.words, reverse=True):
            cli.say(f"  {value:6.2f}  {word}  ({file}:{line})")


def _push(heap: list, item: tuple, size: int) -> None:
    """Add an item to a heap that keeps its largest items."""
    (heapq.heappush if len(heap) < size else heapq.heappushpop)(heap, item)


def evaluate(config: EvaluateConfig) -> None:
    """Run the command."""
    if config.selfcheck:
        selfcheck(config)
        return
    texts, run = config.paths, None
    if config.bilm is None:
        if len(texts) < 2:
            raise InputError("give a run and at least one text to evaluate it on")
        run, *texts = texts
    if not texts:
        raise InputError("give at least one text")
    elmo = cli.load_elmo(run, config.bilm, config.precision)
    scores = _Scores(config.top)
    with _score_file(config, scores) as file:
        for text in texts:
            _score(elmo, text, config.tokenize, scores, file)
        if not scores.sentences:
            raise InputError(f"{', '.join(texts)}: no sentences; give a text that has some")
    scores.show()
    if config.output is not None:
        cli.say(f"\nwritten to {config.output}")


def _score(elmo: "Elmo", text: str, raw: bool, scores: _Scores, file: TextIO) -> None:
    """Add every sentence of a text to the scores and write its record."""
    from elmo_jax.data.text import UNK, blocks, read_lines, tokenize

    lines = read_lines(Path(text), tokenize if raw else str.split)
    for block in blocks((i, tokens) for i, tokens in lines if tokens):
        surprisals = elmo.surprisal([tokens for _, tokens in block])
        for (i, tokens), surprisal in zip(block, surprisals, strict=True):
            if elmo.vocabulary is not None:  # surprisal refuses a model without one
                scores.unknown += int(np.sum(elmo.vocabulary.ids(tokens) == UNK))
            file.write(json.dumps(scores.add(text, i + 1, tokens, surprisal)) + "\n")


@contextlib.contextmanager
def _score_file(config: EvaluateConfig, scores: _Scores) -> Iterator[TextIO]:
    """Open the file for the records of sentences; on success, write the other files beside it.

    All files are written in a temporary folder and moved when they are complete. A temporary folder left
    by a killed process marks files that may be replaced.
    """
    if config.output is None:
        with open(os.devnull, "w", encoding="utf-8") as file:
            yield file
        return
    folder = Path(config.output)
    part = folder / "evaluate.part"
    if not part.is_dir() and any((folder / name).exists() for name in _FILES):
        raise InputError(f"--output {folder}: holds a run or scores already; give a new folder")
    is_new = not folder.exists()
    try:
        part.mkdir(parents=True, exist_ok=True)
        with (part / "scores.jsonl").open("w", encoding="utf-8") as file:
            yield file
        record = {"event": "evaluate", "unknown": scores.unknown, **scores.perplexities()}
        (part / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        (part / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        for name in _FILES:
            (part / name).replace(folder / name)
        part.rmdir()
    except BaseException as error:
        if part.is_dir():
            for name in _FILES:
                (folder / name).unlink(missing_ok=True)
            shutil.rmtree(part)
            if is_new:
                folder.rmdir()
        if isinstance(error, OSError):
            raise InputError(
                f"--output {folder}: cannot be written ({error.strerror}); give another folder"
            ) from None
        raise


def selfcheck(config: EvaluateConfig) -> None:
    """Compare a model's stateful embeddings with known ones.

    Raises:
        InputError: they differ by more than the tolerance, or a file is not as expected.
    """
    from elmo_jax.elmo import Elmo
    from elmo_jax.storage.hdf5 import open_datasets

    if len(config.paths) < 4:
        raise InputError("--selfcheck takes OPTIONS WEIGHTS SENTENCES EXPECTED..., one EXPECTED per list")
    options, weights, sentences, *expected = config.paths
    elmo = Elmo.from_bilm(options, weights, config.precision)
    lists = _read_sentence_lists(Path(sentences), len(expected))
    # Batch i holds sentence i of every list; the LSTM state continues from batch to batch.
    batches = [
        [layers[-1] for layers in elmo.embed([part[i] for part in lists], stateful=True)]
        for i in range(len(lists[0]))
    ]
    largest = 0.0
    for k, name in enumerate(expected):
        with open_datasets(Path(name)) as datasets:
            for i, batch in enumerate(batches):
                top = np.stack(np.split(batch[k], 2, axis=-1))  # [D, tokens, P]
                dataset = datasets.get(str(i))
                if dataset is None or dataset.shape != top.shape:
                    raise InputError(f"{name}: has no dataset {i} of shape {top.shape}; check EXPECTED")
                difference = np.abs(top - np.asarray(dataset))
                largest = max(largest, float(difference.max(initial=0)))
                if not np.allclose(top, np.asarray(dataset), rtol=config.rtol, atol=config.atol):
                    raise InputError(f"{name}: dataset {i} differs by {difference.max():.3g}")
    cli.say(f"all {len(batches) * len(expected)} sentences agree; the largest difference is {largest:.3g}")


def _read_sentence_lists(path: Path, count: int) -> list[list[list[str]]]:
    try:
        lists = json.loads(path.read_text(encoding="utf-8"))
        lists = [[sentence.split() for sentence in part] for part in lists]
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON list of lists of sentences ({error})") from None
    if len(lists) != count or not lists or len({len(part) for part in lists}) != 1:
        raise InputError(f"{path}: must hold one list per EXPECTED file, all of the same length")
    if not lists[0]:
        raise InputError(f"{path}: the lists are empty; give lists with sentences")
    return lists


def main() -> int:
    """Run the command and return its exit code."""
    return cli.run(EvaluateConfig, evaluate, "evaluate")


if __name__ == "__main__":
    sys.exit(main())
