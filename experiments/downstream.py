"""Train a classifier on a pre-trained model's layers: python -m experiments.downstream."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import OmitArgPrefixes

from elmo_jax import report
from elmo_jax.bilm import bilm_features
from elmo_jax.checkpoint import Run
from elmo_jax.classifier import (
    BiLSTMClassifier,
    ClassifierConfig,
    Features,
    classifier_loss,
    classify,
    static_features,
)
from elmo_jax.combiners import CombinerConfig, OneLayer, make_combiner
from elmo_jax.data import Batch, BatchStream
from elmo_jax.datasets import DataConfig, Dataset, load_dataset
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.exported import VOCABULARY
from elmo_jax.fit import fit
from elmo_jax.integrity import read_config, structure
from elmo_jax.metrics import classification
from elmo_jax.text import Vocabulary
from elmo_jax.train import OptimizerConfig, TrainState, evaluate, make_optimizer, predict
from elmo_jax.vectors import WordVectors
from experiments import cli

PARTS = ("train", "validation", "test")
VECTORS, PREDICTIONS = "vectors.npz", "predictions.npz"


@dataclass(frozen=True)
class DownstreamConfig:
    """Train a BiLSTM classifier on ELMo's mixed layers or on word vectors, and measure it."""

    features: Literal["elmo", "svd", "sgns"] = "elmo"
    """The layers of a language model, or word vectors that know no context."""
    pretrained: str = "runs/pretrain"
    """elmo: run of experiments.pretrain; the data set is that run's."""
    vectors: str | None = None
    """svd, sgns: run of experiments.vectors, runs/svd or runs/sgns if not given; the data set is its."""
    preset: Literal["report", "best"] | None = None
    """Sizes and epochs of the report, or the best known; other flags win over it."""
    combiner: Annotated[CombinerConfig, OmitArgPrefixes] = CombinerConfig()
    classifier: Annotated[ClassifierConfig, OmitArgPrefixes] = ClassifierConfig()
    optimizer: Annotated[OptimizerConfig, OmitArgPrefixes] = OptimizerConfig(
        learning_rate=2e-3, clip_norm=5.0
    )
    finetune: bool = False
    """Train the language model too."""
    untrained: bool = False
    """Draw the language model anew, to see what its training is worth."""
    labels: float = 1.0
    """Share of the training and validation documents to use, the same of every class."""
    batch_size: int = 32
    """Documents a step."""
    epochs: int = 5
    """Passes over the training part."""
    seed: int = 0
    """Of parameters, order and dropout."""
    steps_per_dispatch: int = 8
    """Steps run by one call of the device."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder too."""
    output: str | None = None
    """Folder of the run; runs/downstream-COMBINER, -svd or -sgns if not given."""
    resume: bool = False
    """Go on with the run in that folder."""
    allow_config_change: bool = False
    """To go on between two epochs with another --seed or --steps-per-dispatch."""
    overwrite: bool = False
    """Replace the run in that folder."""


PRESETS = {
    "report": DownstreamConfig(
        preset="report",
        classifier=ClassifierConfig(hidden=128, classifier_layers=2),
        batch_size=32,
        epochs=5,
    ),
    # The best known so far; a search on validation is to settle it.
    "best": DownstreamConfig(preset="best"),
}


class Source(NamedTuple):
    """Where the classifier's input comes from.

    Attributes:
        data: the data set, numbered as the features know it.
        features: ``(params, batch, key) -> [L, B, T, F]``.
        combiner: of their layers.
        params: what features look for among the parameters.
        shape: (L, F).
    """

    data: Dataset
    features: Features
    combiner: Any
    params: dict[str, Any]
    shape: tuple[int, int]


def downstream(config: DownstreamConfig) -> dict[str, Any]:
    """Run the command; returns what ``results.json`` holds."""
    source = _elmo(config) if config.features == "elmo" else _word_vectors(config)
    name = config.combiner.combiner if config.features == "elmo" else config.features
    output = config.output or f"runs/downstream-{name}"
    run = cli.create_run(config, output, monitor="val_loss", texts=source.data.digest)
    train = BatchStream(
        source.data.train, config.batch_size, config.seed, steps_per_dispatch=config.steps_per_dispatch
    )
    cli.describe(source.data, train)
    model = BiLSTMClassifier(config.classifier, len(source.data.classes))
    records, params = _train(config, source, model, train, run)
    run.close()
    results = _measure(config, source, model, params, train, run.path)
    lambdas = source.combiner.lambdas(params["combiner"])
    results["lambdas"] = None if lambdas is None else np.asarray(lambdas, np.float64).tolist()
    results |= cli.speed(records, train)
    _show(results, records, source.data.classes, run.path)
    cli.write_results(run.path, results)
    return results


def _elmo(config: DownstreamConfig) -> Source:
    """The layers of a language model."""
    elmo = Elmo.from_pretrained(config.pretrained)
    spelled = elmo.model.config.input == "characters"
    data = _data_of(Path(config.pretrained), elmo.vocabulary, config, spelled)
    params = elmo.params
    if config.untrained:
        example = data.train.batch(np.arange(1), (1, int(data.train.lengths[0]) + 2))
        params = jax.jit(elmo.model.init)(jax.random.key(config.seed), example)["params"]
    c = elmo.model.config
    features = bilm_features(elmo.model, config.finetune)
    combiner = make_combiner(config.combiner)
    return Source(data, features, combiner, {"bilm": params}, (c.layers + 1, 2 * c.embedding))


def _word_vectors(config: DownstreamConfig) -> Source:
    """A table of word vectors."""
    if config.finetune or config.untrained:
        raise InputError("--finetune and --untrained need --features elmo; leave them out")
    path = Path(config.vectors or f"runs/{config.features}")
    if not (path / VECTORS).is_file():
        raise InputError(
            f"{path}: holds no word vectors; make them with "
            f"python -m experiments.vectors --method {config.features} --output {path}"
        )
    method = read_config(path).get("method")
    if method != config.features:
        raise InputError(f"{path}: holds {method} vectors, not --features {config.features}; give its run")
    vocabulary = Vocabulary.load(path / VOCABULARY)
    table = WordVectors.load(path / VECTORS).table(vocabulary)
    data = _data_of(path, vocabulary, config)
    return Source(data, static_features, OneLayer(), {"vectors": jnp.asarray(table)}, (1, table.shape[1]))


def _data_of(
    path: Path, vocabulary: Vocabulary | None, config: DownstreamConfig, spelled: bool = False
) -> Dataset:
    """The data set that a run was made from, thinned out if asked for."""
    saved = read_config(path)
    if "data" not in saved:
        raise InputError(f"{path}: names no data set; give a run of experiments.pretrain")
    settings = structure(DataConfig, saved["data"], f"{path}: data")
    cli.check(settings)
    data = load_dataset(settings, vocabulary, spelled)
    if config.labels == 1:
        return data
    few = {name: getattr(data, name).share(config.labels, config.seed) for name in ("train", "validation")}
    return replace(data, **few)


def _train(
    config: DownstreamConfig, source: Source, model: BiLSTMClassifier, train: BatchStream, run: Run
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every epoch's record, and the best epoch's parameters beside the frozen ones."""
    combiner = source.combiner
    loss_fn = classifier_loss(source.features, combiner, model)
    params, frozen = _init(source, model, config.seed), source.params
    if config.finetune:
        params, frozen = params | frozen, {}
    cli.say(f"model: {cli.count(params):,} trained parameters, {cli.count(frozen):,} frozen")
    optimizer = make_optimizer(config.optimizer, config.epochs * train.steps_per_epoch)
    held_out = BatchStream(source.data.validation, 2 * config.batch_size, bounds=train.bounds)
    sums_fn = jax.jit(lambda params, batch: loss_fn(params, batch, None)[1])
    log = cli.tensorboard(run, config.tensorboard)

    def on_epoch(state: TrainState, sums: Mapping[str, Any]) -> dict[str, Any]:
        held = evaluate(sums_fn, {**state.frozen, **state.params}, held_out)
        lambdas = combiner.lambdas(state.params["combiner"])
        epoch = int(state.step) // train.steps_per_epoch
        record = {
            "train_accuracy": float(np.trace(sums["confusion"]) / sums["documents"]),
            "val_loss": float(held["nll"] / held["documents"]),
            "val_accuracy": classification(held["confusion"])["accuracy"],
            "lambdas": None if lambdas is None else np.asarray(lambdas, np.float64).round(6).tolist(),
        }
        cli.say(
            f"epoch {epoch}: loss {float(sums['nll'] / sums['documents']):.4f}, validation loss "
            f"{record['val_loss']:.4f}, accuracy {record['val_accuracy']:.4f}"
            + (f", lambdas {record['lambdas']}" if record["lambdas"] else "")
            + f", {sums['seconds']:.0f} s"
        )
        log(epoch, record)
        return record

    _, records = fit(
        TrainState.create(params, optimizer, frozen),
        loss_fn,
        optimizer,
        train,
        run,
        epochs=config.epochs,
        seed=config.seed,
        on_epoch=on_epoch,
    )
    return records, {**frozen, **run.restore_best(("params",))["params"]}


def _measure(
    config: DownstreamConfig,
    source: Source,
    model: BiLSTMClassifier,
    params: dict[str, Any],
    train: BatchStream,
    path: Path,
) -> dict[str, Any]:
    """Scores of every part; each document's class and prediction are written to a file."""

    @jax.jit
    def predicted(params: Any, batch: Batch) -> jax.Array:
        logits = classify(params, batch, None, source.features, source.combiner, model)
        return logits.argmax(-1).astype(jnp.int32)

    results: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for part in PARTS:
        documents = getattr(source.data, part)
        stream = BatchStream(documents, 2 * config.batch_size, bounds=train.bounds)
        classes = predict(predicted, params, stream)
        counts = np.zeros((model.classes, model.classes))
        np.add.at(counts, (documents.labels, classes), 1)
        results[part] = classification(counts)
        arrays |= {part: classes, f"{part}_labels": documents.labels}
    np.savez_compressed(path / PREDICTIONS, **arrays)  # pyright: ignore[reportArgumentType]
    return results | {"classes": list(source.data.classes)}


def _init(source: Source, model: BiLSTMClassifier, seed: int) -> dict[str, Any]:
    """Parameters of the combiner and the classifier."""
    n, features = source.shape

    @jax.jit
    def init(key: jax.Array) -> dict[str, Any]:
        mix, head = jax.random.split(key)
        x, mixed = source.combiner.init_with_output(mix, jnp.zeros((n, 1, 1, features)))
        weights = model.init(head, x, jnp.ones(1, jnp.int32))
        return {"combiner": mixed.get("params", {}), "classifier": weights["params"]}

    return init(jax.random.key(seed))


def _show(
    results: dict[str, Any], records: list[dict[str, Any]], classes: tuple[str, ...], path: Path
) -> None:
    report.plot_curves(
        records, {"loss": "training", "val_loss": "validation"}, path / "loss.png", "loss (nats)"
    )
    if records[0]["lambdas"]:
        report.plot_lambdas(records, path / "lambdas.png")
    for part in PARTS:
        scores = results[part]
        title = f"{part}: accuracy {scores['accuracy']:.4f}"
        report.plot_confusion(scores["confusion_matrix"], classes, title, path / f"confusion_{part}.png")
    cli.say(f"\n{report.metrics_table(results)}\n\ntest:")
    cli.say(report.confusion_table(results["test"]["confusion_matrix"], classes))
    cli.say(f"\ntest accuracy {results['test']['accuracy']:.4f}; written to {path}")


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(DownstreamConfig, downstream, "experiments.downstream", PRESETS)


if __name__ == "__main__":
    sys.exit(main())
