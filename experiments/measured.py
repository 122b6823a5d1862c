"""What runs came to, read from their files for people to see: of the right form, and of one mind.

Nouns: a run's *records* are the lines of its ``metrics.jsonl``, one an epoch.
Axes: C classes.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
import numpy as np

from elmo_jax.checkpoint import METRICS, RESULTS
from elmo_jax.errors import InputError
from elmo_jax.integrity import read_arrays
from elmo_jax.metrics import classification
from experiments.downstream import PARTS, PREDICTIONS

T = TypeVar("T")
_ROUNDED = 2e-6  # records hold weights of six digits


class _Scores(msgspec.Struct):
    accuracy: float
    f1: float
    precision: float
    recall: float
    confusion_matrix: list[list[int]]


class _Speed(msgspec.Struct):
    seconds: float
    tokens_per_second: float


class _Results(_Speed):
    train: _Scores
    validation: _Scores
    test: _Scores
    classes: list[str]
    lambdas: list[float] | None


class _Epoch(msgspec.Struct):
    epoch: int
    step: int
    val_accuracy: float
    lambdas: list[float] | None


class _Perplexities(_Speed):
    perplexity: float
    perplexity_forward: float
    perplexity_backward: float


class _PretrainEpoch(_Perplexities):
    epoch: int


class _Pretrained(_Perplexities):
    best_epoch: int


class Classifier(NamedTuple):
    """A finished run of ``experiments.downstream``.

    Attributes:
        results: what its ``results.json`` holds.
        records: its epochs.
        labels, predicted: the class of each test document, int32.
    """

    results: dict[str, Any]
    records: list[dict[str, Any]]
    labels: np.ndarray
    predicted: np.ndarray


def classifier(path: Path, epochs: int) -> Classifier:
    """A classifier's figures, which its predictions must bear out.

    Args:
        path: its run.
        epochs: that it was trained for.

    Raises:
        InputError: a file is missing or damaged, or contradicts another.
    """
    results = read_json(path / RESULTS)
    told = _fitting(_Results, results, path / RESULTS)
    records = read_records(path)
    seen = _fitting(list[_Epoch], records, path / METRICS)
    _count(seen, path, epochs)
    if any(not 0 <= record.val_accuracy <= 1 or record.step < 1 for record in seen):
        raise _refusal(path, METRICS, "a val_accuracy or a step is out of bounds")
    _check_lambdas(told, seen, path)
    arrays = _predictions(path, len(told.classes))
    for part in PARTS:
        counts = np.zeros((len(told.classes),) * 2)
        np.add.at(counts, (arrays[f"{part}_labels"], arrays[part]), 1)
        for name, value in classification(counts).items():
            said = getattr(getattr(told, part), name)
            same = said == value if name == "confusion_matrix" else math.isclose(said, value, abs_tol=1e-9)
            if not same:
                raise _refusal(path, RESULTS, f"{part}'s {name} is not that of {PREDICTIONS}")
    return Classifier(results, records, arrays["test_labels"], arrays["test"])


def language_model(path: Path) -> list[dict[str, Any]]:
    """The records of a finished run of ``experiments.pretrain``, with what its results say of them.

    Raises:
        InputError: a file is missing or damaged, or contradicts another.
    """
    told = _fitting(_Pretrained, read_json(path / RESULTS), path / RESULTS)
    records = read_records(path)
    seen = _fitting(list[_PretrainEpoch], records, path / METRICS)
    _count(seen, path)
    for record in seen:
        both = (record.perplexity_forward, record.perplexity_backward)
        if not all(0 < x < math.inf for x in (record.perplexity, *both)):
            raise _refusal(
                path, METRICS, f"epoch {record.epoch} has a perplexity that is not above 0 and finite"
            )
        if not math.isclose(record.perplexity, math.sqrt(both[0]) * math.sqrt(both[1]), rel_tol=1e-6):
            raise _refusal(path, METRICS, f"epoch {record.epoch}'s perplexity is not its directions' mean")
    best = min(seen, key=lambda record: record.perplexity)
    if (told.best_epoch, told.perplexity) != (best.epoch, best.perplexity):
        raise _refusal(path, RESULTS, f"its best epoch is not that of {METRICS}")
    return records


def speed(path: Path) -> tuple[float, float]:
    """A finished run's seconds of training, and tokens a second.

    Raises:
        InputError: its results are missing or damaged.
    """
    told = _fitting(_Speed, read_json(path / RESULTS), path / RESULTS)
    if not all(0 <= x < math.inf for x in (told.seconds, told.tokens_per_second)):
        raise _refusal(path, RESULTS, "its times are no such numbers")
    return told.seconds, told.tokens_per_second


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a run's folder.

    Raises:
        InputError: they are missing or not JSON.
    """
    try:
        records = [json.loads(line) for line in (path / METRICS).read_text("utf-8").splitlines()]
        if not all(isinstance(record, dict) for record in records):
            raise ValueError("not an object a line")
        return records
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path, METRICS, f"cannot be read ({error})") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of a run.

    Raises:
        InputError: it is missing or no JSON object.
    """
    try:
        made = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(made, dict):
            raise ValueError("not an object")
        return made
    except (OSError, ValueError, RecursionError) as error:
        raise _refusal(path.parent, path.name, f"cannot be read ({error})") from None


def _refusal(path: Path, name: str, told: str) -> InputError:
    told = " ".join(told.split())
    return InputError(f"{path / name}: {told}; remove {path / RESULTS}, and finish that run again")


def _fitting(kind: type[T], data: Any, path: Path) -> T:
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise _refusal(path.parent, path.name, str(error)) from None


def _count(seen: Sequence[_Epoch | _PretrainEpoch], path: Path, epochs: int | None = None) -> None:
    wanted = max(len(seen), 1) if epochs is None else epochs
    if [record.epoch for record in seen] != list(range(1, wanted + 1)):
        many = f"{wanted} epochs" if epochs else "every epoch"
        raise _refusal(path, METRICS, f"does not hold {many}, a line each in their order")


def _check_lambdas(told: _Results, seen: Sequence[_Epoch], path: Path) -> None:
    """The weights are those of some epoch's end."""
    if told.lambdas is None and all(record.lambdas is None for record in seen):
        return
    every = [told.lambdas or [], *(record.lambdas or [] for record in seen)]
    if not every[0] or {len(weights) for weights in every} != {len(every[0])}:
        raise _refusal(path, METRICS, f"has not the lambdas of {RESULTS}")
    if not np.isfinite(np.array(every)).all():
        raise _refusal(path, METRICS, "a lambda is not finite")
    if not any(np.abs(np.subtract(weights, every[0])).max() < _ROUNDED for weights in every[1:]):
        raise _refusal(path, RESULTS, f"its lambdas are those of no epoch in {METRICS}")


def _predictions(path: Path, classes: int) -> dict[str, np.ndarray]:
    """Each part's predicted and true classes."""
    names = [f"{part}{which}" for part in PARTS for which in ("", "_labels")]
    try:
        arrays = dict(zip(names, read_arrays(path / PREDICTIONS, names), strict=True))
    except ValueError as error:
        raise _refusal(path, PREDICTIONS, f"cannot be read ({error})") from None
    for part in PARTS:
        pair = (arrays[part], arrays[f"{part}_labels"])
        fit = all(a.ndim == 1 and a.dtype.kind == "i" and len(a) == len(pair[0]) > 0 for a in pair)
        if not fit or not all(a.min() >= 0 and a.max() < classes for a in pair):
            raise _refusal(path, PREDICTIONS, f"{part} is not one of {classes} classes for each document")
    return arrays
