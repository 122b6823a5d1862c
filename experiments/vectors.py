"""Command that makes word vectors from a data set's training texts."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta
from tyro.conf import OmitArgPrefixes

from elmo_jax.config import Config, Count, DataConfig, Epochs, Seed, SGNSConfig, SVDConfig
from elmo_jax.errors import InputError, NotFiniteError
from experiments.common import cli

if TYPE_CHECKING:
    import numpy as np

    from elmo_jax.baselines.word_vectors import WordVectors
    from elmo_jax.data.csv_dataset import Dataset
    from elmo_jax.training.checkpoint import Run
    from elmo_jax.training.step import TrainState


@dataclass(frozen=True)
class VectorsConfig(Config):
    """Make word vectors by a truncated SVD of co-occurrence counts or by skip-gram training."""

    method: Literal["svd", "sgns"] = "sgns"
    """Truncated SVD of co-occurrence counts, or skip-gram with negative sampling."""
    data: Annotated[DataConfig, OmitArgPrefixes] = DataConfig()
    dimensions: Annotated[int, Meta(ge=1, le=8192)] = 300
    """Width of the vectors."""
    window: Count = 4
    """Context tokens on each side; with sgns, each token samples its own number from 1 to this one."""
    svd: Annotated[SVDConfig, OmitArgPrefixes] = SVDConfig()
    sgns: Annotated[SGNSConfig, OmitArgPrefixes] = SGNSConfig()
    epochs: Epochs = 10
    """With sgns: passes over the training text."""
    seed: Seed = 0
    """Random seed of the SVD, or of initialization, data order and sampling."""
    output: str | None = None
    """Run folder; runs/METHOD if not given."""
    resume: bool = False
    """Continue the run in the --output folder."""
    allow_config_change: bool = False
    """With --resume: allow another --seed if the run stopped at the end of an epoch."""
    overwrite: bool = False
    """Replace the run in the --output folder."""


def find_unused_flags(config: VectorsConfig) -> dict[str, str]:
    """Return the flags without effect under these settings, each with a message."""
    other, ignored = ("sgns", SGNSConfig) if config.method == "svd" else ("svd", SVDConfig)
    names = {field.name for field in fields(ignored)} | ({"epochs"} if other == "sgns" else set())
    return cli.without_effect(names, "--method", config.method, f"--method {other}")


def vectors(config: VectorsConfig) -> dict[str, Any]:
    """Run the command and return what ``results.json`` holds."""
    from elmo_jax.baselines.word_vectors import WordVectors
    from elmo_jax.data.csv_dataset import load_dataset
    from elmo_jax.data.text import UNK
    from elmo_jax.training.checkpoint import VOCABULARY
    from experiments.common.inputs import VECTORS

    data = load_dataset(config.data)
    output, files = config.output or f"runs/{config.method}", {VOCABULARY: data.vocabulary.text}
    more = {"texts": data.digest, "text": asdict(config.data.text_config())}
    run = cli.create_run(config, output, monitor="loss", files=files, **more)
    cli.say(f"training text: {len(data.train.ids):,} tokens, vocabulary {len(data.vocabulary):,}")
    cli.describe_unknown((data.train, data.validation, data.test))
    try:
        table, results = (_run_svd if config.method == "svd" else _train_sgns)(config, data, run)
    except NotFiniteError as error:  # a run cannot be resumed with another learning rate
        raise InputError(f"{error.fact}; lower --rate and start again with --overwrite") from None
    made = WordVectors(data.vocabulary.tokens[UNK:], table[UNK:])
    made.save(run.path / VECTORS)
    made.save(run.path / "vectors.txt")
    results["neighbours"] = _sample_neighbours(made)
    for word, near in results["neighbours"].items():
        cli.say(f"{word}: {', '.join(near)}")
    cli.write_results(run.path, results)
    run.close()
    cli.say(f"{results['seconds']:.0f} s; written to {run.path}")
    return results


def _run_svd(config: VectorsConfig, data: Dataset, run: Run) -> tuple[np.ndarray, dict[str, Any]]:
    from elmo_jax.baselines.svd import svd_vectors

    start, size = time.perf_counter(), len(data.vocabulary)
    table = svd_vectors(data.train, size, config.window, config.dimensions, config.svd, config.seed)
    seconds = time.perf_counter() - start
    speed = {"seconds": round(seconds, 1), "tokens_per_second": round(len(data.train.ids) / seconds, 1)}
    run.log([{"event": "svd", **speed}])
    return table, speed


def _train_sgns(config: VectorsConfig, data: Dataset, run: Run) -> tuple[np.ndarray, dict[str, Any]]:
    import jax
    import numpy as np

    from elmo_jax.baselines.sgns import SpanStream, sgns_init, sgns_loss, sgns_optimizer
    from elmo_jax.parallel import Plan
    from elmo_jax.training.loop import fit
    from elmo_jax.training.step import TrainState

    size = len(data.vocabulary)
    stream = SpanStream(data.train, size, config.window, config.sgns, config.seed)
    optimizer = sgns_optimizer(config.sgns, stream.window, config.epochs * stream.steps_per_epoch)

    def on_epoch(state: TrainState, metrics: Mapping[str, Any]) -> dict[str, Any]:
        rate = stream.tokens_per_epoch / metrics["seconds"]
        epoch, loss = int(state.step) // stream.steps_per_epoch, metrics["loss"] / max(metrics["pairs"], 1)
        cli.say(f"epoch {epoch}: loss {loss:.4f} a pair, {rate:,.0f} tokens/s, {metrics['seconds']:.0f} s")
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
        raise InputError(
            "subsampling left no pair of neighbouring tokens; raise --subsample or give longer texts, "
            "and start again with --overwrite"
        )
    return np.asarray(state.params["centre"]), cli.speed(records, stream)


def _sample_neighbours(made: WordVectors) -> dict[str, list[str]]:
    """Return the nearest tokens of some words of medium frequency."""
    words = [token for token in made.tokens[1:] if token.isalpha() and len(token) > 3]
    chosen = words[len(words) // 100 :: max(1, len(words) // 40)][:8]
    return {word: [near for near, _ in made.nearest(word, 6)] for word in chosen}


def main() -> int:
    """Run the command line and return the exit code."""
    return cli.run(VectorsConfig, vectors, "vectors", unused=find_unused_flags)


if __name__ == "__main__":
    sys.exit(main())
