"""Make word vectors from a data set's training text: python -m experiments.vectors."""

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

import jax
import numpy as np
from tyro.conf import OmitArgPrefixes

from elmo_jax.baselines.sgns import SGNSConfig, SpanStream, sgns_init, sgns_loss, sgns_optimizer
from elmo_jax.baselines.svd import SVDConfig, svd_vectors
from elmo_jax.baselines.word_vectors import WordVectors
from elmo_jax.data.csv_dataset import DataConfig, Dataset, load_dataset
from elmo_jax.data.text import UNK
from elmo_jax.errors import InputError, NotFiniteError
from elmo_jax.parallel import Plan
from elmo_jax.training.checkpoint import VOCABULARY, Run
from elmo_jax.training.loop import fit
from elmo_jax.training.step import TrainState
from experiments.common import cli
from experiments.common.cli import without_effect
from experiments.common.features import VECTORS


@dataclass(frozen=True)
class VectorsConfig:
    """Make word vectors by SVD of co-occurrence counts, or by skip-gram with negative sampling."""

    method: Literal["svd", "sgns"] = "sgns"
    """Counting and a truncated SVD, or skip-gram with negative sampling."""
    data: Annotated[DataConfig, OmitArgPrefixes] = DataConfig()
    dimensions: int = 300
    """Width of the vectors."""
    window: int = 4
    """Steps to either side that count as context; sgns: at most, drawn for each token."""
    svd: Annotated[SVDConfig, OmitArgPrefixes] = SVDConfig()
    sgns: Annotated[SGNSConfig, OmitArgPrefixes] = SGNSConfig()
    epochs: int = 10
    """sgns: passes over the training text."""
    seed: int = 0
    """Of the decomposition, or of parameters, order and draws."""
    output: str | None = None
    """Folder of the run; runs/METHOD if not given."""
    resume: bool = False
    """Go on with the run in that folder."""
    allow_config_change: bool = False
    """To go on between two epochs with another --seed."""
    overwrite: bool = False
    """Replace the run in that folder."""


def unread(config: VectorsConfig) -> dict[str, str]:
    """The flags that nothing reads with these settings, and what is said of each that is given."""
    other, idle = ("sgns", SGNSConfig) if config.method == "svd" else ("svd", SVDConfig)
    names = {field.name for field in fields(idle)} | ({"epochs"} if other == "sgns" else set())
    return without_effect(names, "--method", config.method, f"--method {other}")


def vectors(config: VectorsConfig) -> dict[str, Any]:
    """Run the command; returns what ``results.json`` holds."""
    data = load_dataset(config.data)
    output, files = config.output or f"runs/{config.method}", {VOCABULARY: data.vocabulary.text}
    run = cli.create_run(config, output, monitor="loss", files=files, texts=data.digest)
    cli.say(f"training text: {len(data.train.ids):,} tokens, vocabulary {len(data.vocabulary):,}")
    try:
        matrix, results = (_count if config.method == "svd" else _train)(config, data, run)
    except NotFiniteError as error:  # a run keeps its rate, so it cannot be resumed with a lower one
        raise InputError(f"{error.fact}; lower --rate, and begin anew with --overwrite") from None
    made = WordVectors(data.vocabulary.tokens[UNK:], matrix[UNK:])
    made.save(run.path / VECTORS)
    made.save(run.path / "vectors.txt")
    results["neighbours"] = _neighbours(made, data)
    for word, near in results["neighbours"].items():
        cli.say(f"{word}: {', '.join(near)}")
    cli.write_results(run.path, results)
    run.close()  # only now may another command write here
    cli.say(f"{results['seconds']:.0f} s; written to {run.path}")
    return results


def _count(config: VectorsConfig, data: Dataset, run: Run) -> tuple[np.ndarray, dict[str, Any]]:
    began = time.perf_counter()
    size = len(data.vocabulary)
    matrix = svd_vectors(data.train, size, config.window, config.dimensions, config.svd, config.seed)
    seconds = time.perf_counter() - began
    speed = {"seconds": round(seconds, 1), "tokens_per_second": round(len(data.train.ids) / seconds, 1)}
    run.log([{"event": "svd", **speed}])
    return matrix, speed


def _train(config: VectorsConfig, data: Dataset, run: Run) -> tuple[np.ndarray, dict[str, Any]]:
    size = len(data.vocabulary)
    stream = SpanStream(data.train, size, config.window, config.sgns, config.seed)
    optimizer = sgns_optimizer(config.sgns, stream.window, config.epochs * stream.steps_per_epoch)

    def on_epoch(state: TrainState, sums: Mapping[str, Any]) -> dict[str, Any]:
        rate = stream.tokens_per_epoch / sums["seconds"]
        epoch, loss = int(state.step) // stream.steps_per_epoch, sums["loss"] / max(sums["pairs"], 1)
        cli.say(f"epoch {epoch}: loss {loss:.4f} a pair, {rate:,.0f} tokens/s, {sums['seconds']:.0f} s")
        return {"tokens_per_second": round(rate, 1)}

    key = jax.random.key(config.seed)
    state, records = fit(
        Plan(lambda: TrainState.create(sgns_init(size, config.dimensions, key), optimizer)),
        sgns_loss(config.sgns),
        optimizer,
        stream,
        run,
        epochs=config.epochs,
        seed=config.seed,
        on_epoch=on_epoch,
        loss_per="pairs",
    )
    if not any(record["loss"] for record in records):
        told = "no epoch held two neighbouring tokens; raise --subsample, or give longer texts"
        raise InputError(f"{told}, and begin anew with --overwrite")
    return np.asarray(state.params["centre"]), cli.speed(records, stream)


def _neighbours(made: WordVectors, data: Dataset) -> dict[str, list[str]]:
    """The nearest tokens of some words of middling frequency, for the eye."""
    words = [token for token in data.vocabulary.tokens[UNK + 1 :] if token.isalpha() and len(token) > 3]
    chosen = words[len(words) // 100 :: max(1, len(words) // 40)][:8]
    return {word: [near for near, _ in made.nearest(word, 6)] for word in chosen}


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(VectorsConfig, vectors, "experiments.vectors", unread=unread)


if __name__ == "__main__":
    sys.exit(main())
