"""Command that classifies new texts with a trained classifier."""

from __future__ import annotations

import csv
import itertools
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

from tyro.conf import Positional, arg

from elmo_jax.config import Kernel
from elmo_jax.errors import InputError
from experiments.common import cli

_BLOCK = 4096  # texts read at once, which bounds the memory


@dataclass(frozen=True)
class PredictConfig:
    """Classify texts; each gets its most probable class and the probability of every class."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of a finished run of downstream, or one written by TextClassifier.save_pretrained."""
    input: Annotated[Positional[str], arg(metavar="INPUT")]
    """Text file with one text per line, a .csv file, or - for lines from standard input."""
    output: str | None = None
    """File to write, .csv or .jsonl; CSV on standard output if not given."""
    text_columns: tuple[str, ...] = ()
    """With a .csv file: names of its text columns, which are joined; not needed if it has only one column."""
    kernel: Kernel = "auto"
    """Implementation of all LSTM layers; auto is persistent on CUDA if that supports them, else fast."""
    overwrite: bool = False
    """Replace an existing output file."""


def predict(config: PredictConfig) -> None:
    """Run the command."""
    from elmo_jax.predictors import TextClassifier
    from elmo_jax.training.loop import ProgressBar

    output = None if config.output is None else Path(config.output)
    if output is not None and output.suffix not in (".csv", ".jsonl"):
        raise InputError(f"--output {output}: must end in .csv or .jsonl")
    if output is not None and output.exists() and not config.overwrite:
        raise InputError(f"{output} already exists; give another file or --overwrite")
    if config.text_columns and not config.input.endswith(".csv"):
        raise InputError(f"--text-column has no effect on {config.input}; leave it out, or give a .csv file")
    model = TextClassifier.from_pretrained(config.model, config.kernel)
    total = 0 if config.input == "-" else Path(config.input).stat().st_size
    texts = _read_texts(config)
    with _open_output(output) as file, ProgressBar(total, "byte", scale=True) as progress:
        write = _writer(file, output is not None and output.suffix == ".jsonl", model.classes)
        while block := list(itertools.islice(texts, _BLOCK)):
            probabilities = model.predict_proba(block)
            for text, row in zip(block, probabilities.tolist(), strict=True):
                write(text, row)
            progress.add(sum(len(text.encode()) + 1 for text in block))
    if output is not None:
        cli.say(f"written to {output}")


@contextmanager
def _open_output(path: Path | None) -> Iterator[TextIO]:
    """Open standard output, or a temporary file that is renamed to `path` when it is complete."""
    if path is None:
        yield sys.stdout
        return
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _read_texts(config: PredictConfig) -> Iterator[str]:
    """Yield the texts of the input."""
    from elmo_jax.data.text import raw_lines

    if config.input == "-":
        yield from (line.rstrip("\r\n") for line in sys.stdin)
    elif not config.input.endswith(".csv"):
        yield from (line.rstrip("\r\n") for line in raw_lines(Path(config.input)))
    else:
        yield from _read_csv(Path(config.input), config.text_columns)


def _read_csv(path: Path, columns: tuple[str, ...]) -> Iterator[str]:
    from elmo_jax.data.text import raw_lines

    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(raw_lines(path), strict=True)
    try:
        first = next(reader, None)
        if first is None:
            raise InputError(f"{path}: holds no rows; write one text a row")
        if not columns and len(first) > 1:
            names = ", ".join(first)
            raise InputError(f"{path}: has the columns {names}; choose with --text-column")
        missing = [name for name in columns if name not in first]
        if missing:
            raise InputError(f"{path}:1: has no column {missing[0]!r}; its columns are {', '.join(first)}")
        indices = [first.index(name) for name in columns] or [0]
        rows = reader if columns else itertools.chain([first], reader)
        for row in rows:
            if len(row) != len(first):
                problem = f"{len(row)} columns, expected {len(first)}; check quoting and commas"
                raise InputError(f"{path}:{reader.line_num}: {problem}")
            yield " ".join(row[i] for i in indices)
    except csv.Error as error:
        raise InputError(f"{path}:{reader.line_num}: not a row of CSV ({error}); check its quotes") from None


def _writer(file: TextIO, as_json: bool, classes: tuple[str, ...]) -> Any:
    """Return a function that writes a text with its label and probabilities."""
    if as_json:

        def write_json(text: str, row: list[float]) -> None:
            label = classes[max(range(len(row)), key=row.__getitem__)]
            probabilities = {name: round(p, 6) for name, p in zip(classes, row, strict=True)}
            line = {"label": label, "probabilities": probabilities, "text": text}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

        return write_json
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(["label", *(f"p({name})" for name in classes), "text"])

    def write_csv(text: str, row: list[float]) -> None:
        label = classes[max(range(len(row)), key=row.__getitem__)]
        rows.writerow([label, *(f"{p:.6f}" for p in row), text])

    return write_csv


def main() -> int:
    """Run the command line and return the exit code."""
    return cli.run(PredictConfig, predict, "predict")


if __name__ == "__main__":
    sys.exit(main())
