"""Command that classifies new texts with a trained classifier."""

from __future__ import annotations

import csv
import itertools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TextIO

from tyro.conf import Positional, arg

from elmo_jax.config import Config, Kernel
from elmo_jax.errors import InputError
from experiments.common import cli

_BLOCK = 4096  # number of texts read at once; this bounds the memory
_SAMPLE = 200  # number of lines from which the delimiter is found


@dataclass(frozen=True)
class PredictConfig(Config):
    """Classify texts; each gets its most probable class and the probability of every class."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of a finished run of downstream, or one written by TextClassifier.save_pretrained."""
    input: Annotated[Positional[str], arg(metavar="INPUT")]
    """Text file with one text per line, .csv file, or - for lines of standard input; may end in .gz."""
    output: str | None = None
    """File to write, .csv or .jsonl; CSV on standard output if not given."""
    text_columns: tuple[str, ...] = ()
    """Text columns of a .csv file, which are joined: names from its header, or numbers from 1 if it has none.
    Not needed for a file of one column without a header."""
    delimiter: str | None = None
    """Character between the columns of a .csv file, or tab; found if not given."""
    kernel: Kernel = "auto"
    """Implementation of all LSTM layers; auto is persistent on CUDA if that supports them, else fast."""
    overwrite: bool = False
    """Replace an existing output file."""


def predict(config: PredictConfig) -> None:
    """Run the command."""
    from elmo_jax.predictors import TextClassifier
    from elmo_jax.training.loop import ProgressBar

    output = None if config.output is None else Path(config.output)
    if output is not None:
        _check_output(output, config.overwrite)
    if (config.text_columns or config.delimiter) and not _is_csv(config.input):
        flag = "--text-column" if config.text_columns else "--delimiter"
        raise InputError(f"{flag} has no effect on {config.input}; leave it out, or give a .csv file")
    if config.input != "-" and not Path(config.input).is_file():
        raise InputError(f"{config.input}: no such file; check the path")
    model = TextClassifier.from_pretrained(config.model, config.kernel)
    texts = _read_texts(config)
    block = list(itertools.islice(texts, _BLOCK))
    if not block:
        raise InputError(f"{config.input}: holds no text; write one text per line")
    total = 0 if config.input == "-" else Path(config.input).stat().st_size
    blank = 0
    with _open_output(output) as file, ProgressBar(total, "byte", scale=True) as progress:
        write = _writer(file, output is not None and output.suffix == ".jsonl", model.classes)
        while block:
            blank += sum(not text.strip() for text in block)
            for text, row in zip(block, model.predict_proba(block).tolist(), strict=True):
                write(text, row)
            progress.add(sum(len(text.encode()) + 1 for text in block))
            block = list(itertools.islice(texts, _BLOCK))
    if blank:
        warnings.warn(f"{config.input}: {blank:,} texts are blank; their classes mean nothing", stacklevel=2)
    if output is not None:
        cli.say(f"written to {output}")


def _is_csv(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(".csv")


def _check_output(path: Path, overwrite: bool) -> None:
    if path.suffix not in (".csv", ".jsonl"):
        raise InputError(f"--output {path}: must end in .csv or .jsonl")
    if not path.parent.is_dir():
        raise InputError(f"--output {path}: no such folder as {path.parent}; make it first")
    if path.exists() and not overwrite:
        raise InputError(f"{path} already exists; give another file or --overwrite")


@contextmanager
def _open_output(path: Path | None) -> Iterator[TextIO]:
    """Open standard output, or a temporary file that is renamed to `path` when it is complete."""
    if path is None:
        yield sys.stdout
        return
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            yield file
        Path(part).replace(path)
    finally:
        Path(part).unlink(missing_ok=True)


def _read_texts(config: PredictConfig) -> Iterator[str]:
    """Yield the texts of the input."""
    from elmo_jax.data.text import decode, raw_lines

    if config.input == "-":
        lines = (decode(line, Path("-"), i) for i, line in enumerate(sys.stdin.buffer, 1))
    else:
        lines = raw_lines(Path(config.input))
    if _is_csv(config.input):
        yield from _read_csv(lines, config)
    else:
        yield from (line.rstrip("\r\n") for line in lines)


def _read_csv(lines: Iterator[str], config: PredictConfig) -> Iterator[str]:
    """Yield the joined text columns of each row that is not blank."""
    from elmo_jax.data.csv_dataset import check_delimiter, find_delimiter

    path = config.input
    sample = list(itertools.islice(lines, _SAMPLE))
    delimiter = check_delimiter(config.delimiter) if config.delimiter else find_delimiter("".join(sample))
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(itertools.chain(sample, lines), delimiter=delimiter, strict=True)
    try:
        rows = (row for row in reader if row)
        first = next(rows, [])
        indices, has_header = _find_columns(first, config)
        for row in rows if has_header else itertools.chain([first], rows):
            if len(row) != len(first):
                problem = f"{len(row)} columns, expected {len(first)}; check quoting and commas"
                raise InputError(f"{path}:{reader.line_num}: {problem}")
            yield " ".join(row[i] for i in indices)
    except csv.Error as error:
        problem = f"not a row of CSV ({error}); check its quotes"
        raise InputError(f"{path}:{reader.line_num}: {problem}") from None


def _find_columns(first: list[str], config: PredictConfig) -> tuple[list[int], bool]:
    """Return the indices of the text columns, and whether the first row is a header."""
    from elmo_jax.data.csv_dataset import find_column

    path, names = config.input, config.text_columns
    if not first:
        raise InputError(f"{path}: holds no rows; write one text per row")
    if not names:
        if len(first) > 1:
            raise InputError(f"{path}: has the columns {', '.join(first)}; choose with --text-column")
        return [0], False
    return [find_column(name, first, path) for name in names], not all(map(str.isdecimal, names))


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
