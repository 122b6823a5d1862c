"""How well a model predicts a text: python -m experiments.evaluate."""

import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from elmo_jax.dump import read_lines
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.hdf5 import open_datasets
from elmo_jax.integrity import write_atomically
from elmo_jax.text import tokenize
from experiments import cli

_BLOCK = 1000  # lines at a time


@dataclass(frozen=True)
class EvaluateConfig:
    """Perplexity by direction, sentence scores and the least expected words of a text; or check a model."""

    paths: Positional[tuple[str, ...]]
    """A run or exported folder and then texts, a sentence a line; or texts alone with --bilm; or, with
    --selfcheck, OPTIONS WEIGHTS SENTENCES EXPECTED..."""
    bilm: tuple[str, str] | None = None
    """Options and weights of a model in the official format, in place of a run."""
    tokenize: bool = False
    """Split raw text as the training commands do; else lines are tokens with spaces between."""
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


def evaluate(config: EvaluateConfig) -> None:
    """Run the command."""
    if config.selfcheck:
        selfcheck(config)
        return
    names = config.paths
    if config.bilm is None:
        if len(names) < 2:
            raise InputError("give a run and at least one text to evaluate it on")
        elmo, names = cli.load_elmo(names[0], None), names[1:]
    else:
        elmo = cli.load_elmo(None, config.bilm)
    if not names:
        raise InputError("give at least one text")
    scores: list[dict[str, object]] = []
    words: list[tuple[float, str, str, int]] = []
    sums, count = np.zeros(2), 0
    for name, number, line, each in _score(elmo, config, names):
        sums, count = sums + each.sum(1, dtype=np.float64), count + each.shape[1]
        forward, backward = (float(s) for s in -each.sum(1, dtype=np.float64))
        scores.append(
            {
                "file": name,
                "line": number + 1,
                "tokens": len(line),
                "log_p_forward": forward,
                "log_p_backward": backward,
            }
        )
        mean = (each[0, :-1] + each[1, 1:]) / 2
        words += [(float(mean[t]), line[t], name, number + 1) for t in range(len(line))]
        words = sorted(words, reverse=True)[: config.top]
    if not count:
        raise InputError(f"{', '.join(names)}: no sentence to evaluate; give a text with some")
    _show(sums / count, scores, words)
    if config.output is not None:
        _write(Path(config.output), config, sums / count, scores)


def _score(
    elmo: Elmo, config: EvaluateConfig, names: tuple[str, ...]
) -> Iterator[tuple[str, int, list[str], np.ndarray]]:
    """File, line number, tokens and `Elmo.surprisal` of every line that holds a token."""
    split = tokenize if config.tokenize else str.split
    for name in names:
        lines = ((i, line) for i, line in read_lines(Path(name), split) if line)
        for block in iter(lambda lines=lines: list(itertools.islice(lines, _BLOCK)), []):
            each = elmo.surprisal([line for _, line in block])
            for (i, line), surprisal in zip(block, each, strict=True):
                yield name, i, line, surprisal


def _show(nll: np.ndarray, scores: list, words: list[tuple[float, str, str, int]]) -> None:
    tokens = sum(score["tokens"] for score in scores)
    cli.say(f"{len(scores):,} sentences, {tokens:,} tokens")
    forward, backward, mean = np.exp([nll[0], nll[1], nll.mean()])
    cli.say(f"perplexity {mean:.2f} (forward {forward:.2f}, backward {backward:.2f}), full softmax")
    by_token = sorted(scores, key=lambda s: (s["log_p_forward"] + s["log_p_backward"]) / (s["tokens"] + 1))
    cli.say("\nleast likely sentences (log p forward, backward):")
    for s in by_token[:5]:
        cli.say(f"  {s['log_p_forward']:9.2f} {s['log_p_backward']:9.2f}  {s['file']}:{s['line']}")
    cli.say("\nhighest surprisal (mean of both directions, nats):")
    for value, word, name, line in words:
        cli.say(f"  {value:6.2f}  {word}  ({name}:{line})")


def _write(folder: Path, config: EvaluateConfig, nll: np.ndarray, scores: list) -> None:
    if (folder / "config.json").exists():
        raise InputError(f"{folder}: holds a run or scores already; give --output a new folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.json", json.dumps(asdict(config), indent=2) + "\n")
        forward, backward, mean = np.exp([nll[0], nll[1], nll.mean()]).tolist()
        record = {"event": "evaluate", "perplexity": mean}
        record |= {"perplexity_forward": forward, "perplexity_backward": backward}
        write_atomically(folder / "metrics.jsonl", json.dumps(record) + "\n")
        write_atomically(folder / "scores.jsonl", "".join(json.dumps(score) + "\n" for score in scores))
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --output") from None
    cli.say(f"\nwritten to {folder}")


def selfcheck(config: EvaluateConfig) -> None:
    """Compare a model's stateful embeddings with the expected ones.

    Raises:
        InputError: they differ by more than the tolerance, or a file is wrong.
    """
    if len(config.paths) < 4:
        raise InputError("--selfcheck takes OPTIONS WEIGHTS SENTENCES EXPECTED..., an EXPECTED for each list")
    options, weights, sentences, *expected = config.paths
    elmo = Elmo.from_bilm(options, weights)
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
    return lists


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(EvaluateConfig, evaluate, "experiments.evaluate")


if __name__ == "__main__":
    sys.exit(main())
