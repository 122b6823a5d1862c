"""Measure how well a language model predicts a text: python -m experiments.evaluate."""

import contextlib
import heapq
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TextIO

import msgspec
import numpy as np
from tyro.conf import Positional, arg

from elmo_jax.config import Config, Count, Dtype, Positive
from elmo_jax.errors import InputError
from experiments.common import cli

_LINES_SHOWN = 5
_FILES = ("metrics.jsonl", "scores.jsonl", "config.json")


@dataclass(frozen=True)
class EvaluateConfig(Config):
    """Print the perplexity of texts and their least likely sentences and words, or check a model."""

    paths: Annotated[Positional[tuple[str, ...]], arg(metavar="[MODEL] TEXT ...")]
    """A run or exported folder and then text files, one sentence per line; text files alone with --bilm;
    OPTIONS WEIGHTS SENTENCES EXPECTED... with --selfcheck."""
    bilm: tuple[str, str] | None = None
    """Options and weights of a model in the official format, instead of a run."""
    tokenize: bool = False
    """Tokenize raw text as the model's training text was. Without it, tokens are separated by spaces."""
    precision: Dtype | None = None
    """Matmul dtype; if not given, the dtype stored with the model."""
    top: Count = 20
    """Number of least likely words to print."""
    selfcheck: bool = False
    """Compare a model's stateful top layer with known embeddings, as bilm-tf's tests do. SENTENCES is a
    JSON list of lists of sentences; EXPECTED is one HDF5 file per list."""
    rtol: Positive = 1e-5
    """Relative tolerance of --selfcheck."""
    atol: Positive = 2e-6
    """Absolute tolerance of --selfcheck."""
    output: str | None = None
    """Folder for scores.jsonl, with one record per sentence; not written if not given."""


@dataclass
class _Scores:
    """Sums over all sentences, and the least likely words and sentences, least likely first."""

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
        mean = ((surprisal[0, :-1] + surprisal[1, 1:]) / 2).tolist()
        words = [(value, token, file, line) for value, token in zip(mean, tokens, strict=True)]
        self.words = heapq.nlargest(self.words_shown, self.words + words)
        forward, backward = (-nll).tolist()
        per_token = float(nll.sum()) / (len(tokens) + 1)
        self.lines = heapq.nlargest(_LINES_SHOWN, [*self.lines, (per_token, file, line, forward, backward)])
        record = {"file": file, "line": line, "tokens": len(tokens)}
        return record | {"log_p_forward": forward, "log_p_backward": backward}

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
        for _, file, line, forward, backward in self.lines:
            cli.say(f"  {forward:9.2f} {backward:9.2f}  {file}:{line}")
        cli.say("\nhighest surprisal (mean of both directions, nats):")
        for value, word, file, line in self.words:
            cli.say(f"  {value:6.2f}  {word}  ({file}:{line})")


def evaluate(config: EvaluateConfig) -> None:
    """Run the command."""
    from elmo_jax.data.text import UNK, blocks, read_lines

    if config.selfcheck:
        selfcheck(config)
        return
    if len(config.paths) < (1 if config.bilm else 2):
        raise InputError("give a run and at least one text to evaluate it on, or --bilm and a text")
    run, *texts = config.paths if config.bilm is None else (None, *config.paths)
    elmo = cli.load_elmo(run, config.bilm, config.precision)
    vocabulary: Any = elmo.vocabulary
    scores = _Scores(config.top)
    with _open_scores(config, scores) if config.output else open(os.devnull, "w", encoding="utf-8") as file:
        for text in texts:
            lines = read_lines(Path(text), elmo.tokenize if config.tokenize else str.split)
            for block in blocks((i, tokens) for i, tokens in lines if tokens):
                surprisals = elmo.surprisal(
                    [tokens for _, tokens in block]
                )  # raises an error if the model has no vocabulary
                for (i, tokens), surprisal in zip(block, surprisals, strict=True):
                    scores.unknown += int(np.sum(vocabulary.ids(tokens) == UNK))
                    file.write(json.dumps(scores.add(text, i + 1, tokens, surprisal)) + "\n")
        if not scores.sentences:
            raise InputError(f"{', '.join(texts)}: no sentences; give a text that has some")
    scores.show()
    cli.warn_unknown(scores.unknown, scores.tokens, config.tokenize)
    if config.output is not None:
        cli.say(f"\nwritten to {config.output}")


@contextlib.contextmanager
def _open_scores(config: EvaluateConfig, scores: _Scores) -> Iterator[TextIO]:
    """Open scores.jsonl, with the suffix ``.part`` until the body has ended and the other files are written.

    Files beside one with this suffix are those of a killed process and are replaced.
    """
    folder = Path(config.output or "")
    part, is_new = folder / "scores.jsonl.part", not folder.exists()
    if not part.exists() and any((folder / name).exists() for name in _FILES):
        raise InputError(f"--output {folder}: holds a run or scores already; give a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            yield file
        record = {"event": "evaluate", "unknown": scores.unknown, **scores.perplexities()}
        (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n", encoding="utf-8")
        part.replace(folder / "scores.jsonl")
    except BaseException as error:
        with contextlib.suppress(OSError):
            for name in (*_FILES, part.name):
                (folder / name).unlink(missing_ok=True)
            if is_new:
                folder.rmdir()
        if isinstance(error, OSError):
            message = f"--output {folder}: cannot be written ({error.strerror}); give another folder"
            raise InputError(message) from None
        raise


def selfcheck(config: EvaluateConfig) -> None:
    """Compare a model's stateful embeddings with known ones; raise an InputError if they differ."""
    from elmo_jax.storage.hdf5 import open_datasets

    if len(config.paths) < 4:
        raise InputError("--selfcheck takes OPTIONS WEIGHTS SENTENCES EXPECTED..., one EXPECTED per list")
    options, weights, sentences, *expected = config.paths
    elmo = cli.load_elmo(None, (options, weights), config.precision)
    try:
        decoded = msgspec.json.decode(Path(sentences).read_bytes(), type=list[list[str]])
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise InputError(f"{sentences}: {error}; give a JSON list of lists of sentences") from None
    lists = [[sentence.split() for sentence in part] for part in decoded]
    if len(lists) != len(expected) or len({len(part) for part in lists}) != 1 or not lists[0]:
        raise InputError(f"{sentences}: must hold one list per EXPECTED file, all of one length above 0")
    # Batch i holds sentence i of every list; the LSTM state continues from batch to batch.
    batches = [elmo.embed(batch, stateful=True) for batch in zip(*lists, strict=True)]
    largest = 0.0
    for k, name in enumerate(expected):
        with open_datasets(Path(name)) as datasets:
            for i, batch in enumerate(batches):
                top = np.stack(np.split(batch[k][-1], 2, axis=-1))  # [D, tokens, P]
                dataset = datasets.get(str(i))
                if dataset is None or dataset.shape != top.shape:
                    raise InputError(f"{name}: has no dataset {i} of shape {top.shape}; check EXPECTED")
                difference = np.abs(top - np.asarray(dataset))
                largest = max(largest, float(difference.max(initial=0)))
                if not np.allclose(top, np.asarray(dataset), rtol=config.rtol, atol=config.atol):
                    raise InputError(f"{name}: dataset {i} differs by {difference.max():.3g}")
    cli.say(f"all {len(batches) * len(expected)} sentences agree; the largest difference is {largest:.3g}")


def main() -> int:
    """Run the command and return its exit code."""
    return cli.run(EvaluateConfig, evaluate, "evaluate")


if __name__ == "__main__":
    sys.exit(main())
