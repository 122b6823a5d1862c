"""Train a classifier on a pre-trained model's layers: python -m experiments.downstream."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tyro.conf import OmitArgPrefixes

from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import Batch, BatchStream, Documents
from elmo_jax.models.classifier import BiLSTMClassifier, ClassifierConfig, classifier_loss, classify
from elmo_jax.models.combiners import COMBINER_OPTIONS, CombinerConfig
from elmo_jax.models.lstm import LSTM, Kernel
from elmo_jax.parallel import Plan, make_mesh, run_on_all, run_on_first
from elmo_jax.storage.files import tree_digest
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.evaluate import classification, evaluate, predict
from elmo_jax.training.loop import fit
from elmo_jax.training.optimizers import make_optimizer
from elmo_jax.training.step import TrainState
from experiments.common import cli, report
from experiments.common.cli import without_effect
from experiments.common.distributed import HostsConfig, join
from experiments.common.features import Source, SourceConfig, open_source

PARTS = ("train", "validation", "test")
PREDICTIONS = "predictions.npz"


@dataclass(frozen=True)
class DownstreamConfig:
    """Train a BiLSTM classifier on ELMo's mixed layers or on word vectors, and measure it."""

    source: Annotated[SourceConfig, OmitArgPrefixes] = SourceConfig()
    preset: Literal["report", "best"] | None = None
    """Sizes and epochs of the report, or the best known; other flags win over it."""
    combiner: Annotated[CombinerConfig, OmitArgPrefixes] = CombinerConfig()
    classifier: Annotated[ClassifierConfig, OmitArgPrefixes] = ClassifierConfig()
    optimizer: Annotated[OptimizerConfig, OmitArgPrefixes] = OptimizerConfig(
        learning_rate=2e-3, clip_norm=5.0
    )
    hosts: Annotated[HostsConfig, OmitArgPrefixes] = HostsConfig()
    batch_size: int = 32
    """Documents a step, of all devices."""
    epochs: int = 3
    """Passes over the training part."""
    seed: int = 0
    """Of parameters, order and dropout."""
    steps_per_call: int = 8
    """Steps run by one call of the device, no more than 8."""
    kernel: Kernel = "auto"
    """What runs the LSTM layers, the language model's too; see experiments.pretrain."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder too."""
    output: str | None = None
    """Folder of the run; runs/downstream-COMBINER, -svd or -sgns if not given."""
    resume: bool = False
    """Go on with the run in that folder."""
    allow_config_change: bool = False
    """To go on with another --learning-rate or --clip-norm, or between two epochs with another --seed."""
    overwrite: bool = False
    """Replace the run in that folder."""


PRESETS = {
    "report": DownstreamConfig(
        preset="report",
        classifier=ClassifierConfig(hidden=128, classifier_layers=2),
        batch_size=32,
        epochs=5,
    ),
    # The best of what was searched on validation, see RESULTS.md.
    "best": DownstreamConfig(preset="best", epochs=5),
}


def unread(config: DownstreamConfig) -> dict[str, str]:
    """The flags that nothing reads with these settings, and what is said of each that is given."""
    features, combiner = config.source.features, config.combiner.combiner
    mixing = {field.name for field in fields(CombinerConfig)}
    if features != "elmo":
        return without_effect(mixing | {"pretrained", "bilm"}, "--features", features, "--features elmo")
    idle = mixing - {"combiner"} - COMBINER_OPTIONS.get(combiner, mixing)
    needs = {"--vectors": "needs --features svd or sgns; give one, or leave it out"}
    if config.source.bilm is not None:
        needs["--pretrained"] = "has no effect with --bilm; leave out one of the two"
    return needs | without_effect(idle, "--combiner", combiner, "another --combiner")


def downstream(config: DownstreamConfig) -> dict[str, Any]:
    """Run the command; returns what ``results.json`` holds."""
    join(config.hosts)
    LSTM(config.classifier.hidden, kernel=config.kernel).choose()  # before there is a folder
    mesh = make_mesh(config.batch_size)
    source = run_on_all(lambda: open_source(config.source, config.combiner, config.seed, config.kernel))
    name = config.combiner.combiner if config.source.features == "elmo" else config.source.features
    output = config.output or f"runs/downstream-{name}"
    run = cli.create_run(
        config,
        output,
        monitor="val_loss",
        texts=source.data.digest,
        model=tree_digest(source.params),
        **source.about,
    )
    train = BatchStream(
        source.data.train, config.batch_size, config.seed, steps_per_call=config.steps_per_call
    )
    data = source.data
    cli.describe((data.train, data.validation, data.test), data.vocabulary, train)
    model = BiLSTMClassifier(config.classifier, len(source.data.classes), config.kernel)
    records, params = _train(config, source, model, train, run, mesh)
    results, predictions = _measure(config, source, model, params, train)
    lambdas = source.combiner.lambdas(params["combiner"])
    results["lambdas"] = None if lambdas is None else np.asarray(lambdas, np.float64).tolist()
    results |= cli.speed(records, train)

    def conclude() -> None:
        np.savez_compressed(run.path / PREDICTIONS, **predictions)  # pyright: ignore[reportArgumentType]
        _tell(results, source.data.classes)  # before the pictures, whose failure must lose no measurement
        _draw(results, records, source.data.classes, run.path)
        cli.write_results(run.path, results)
        cli.say(f"\ntest accuracy {results['test']['accuracy']:.4f}; written to {run.path}")

    run_on_first(conclude)
    run.close()  # only now may another command write here
    return results


def _train(
    config: DownstreamConfig,
    source: Source,
    model: BiLSTMClassifier,
    train: BatchStream,
    run: Run,
    mesh: Mesh | None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every epoch's record, and the best epoch's parameters beside the frozen ones."""
    combiner = source.combiner
    loss_fn = classifier_loss(source.features, combiner, model)
    params, frozen = _init(source, model, config.seed), source.params
    if config.source.finetune:
        params, frozen = params | frozen, {}
    cli.say(f"model: {cli.count(params):,} trained parameters, {cli.count(frozen):,} frozen")
    frozen = Plan(lambda frozen: frozen, mesh, (frozen,))()
    optimizer = make_optimizer(config.optimizer, config.epochs * train.steps_per_epoch)
    held_out = _by_length(source.data.validation, train)
    sums_fn = jax.jit(lambda params, batch: loss_fn(params, batch, None)[1])

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
        return record

    with cli.tensorboard(run, config.tensorboard) as on_record:
        _, records = fit(
            Plan(lambda params: TrainState.create(params, optimizer), mesh, (params,)),
            loss_fn,
            optimizer,
            train,
            run,
            epochs=config.epochs,
            seed=config.seed,
            on_epoch=on_epoch,
            on_record=on_record,
            frozen=frozen,
        )
    best = run.restore_best(("params",))["params"]
    return records, {**frozen, **Plan(lambda best: best, mesh, (best,))()}


def _by_length(documents: Documents, train: BatchStream) -> BatchStream:
    """Documents to measure on, in shapes like those of training."""
    return BatchStream(documents, train.batch_size, bounds=train.bounds, steps_per_call=train.steps_per_call)


def _measure(
    config: DownstreamConfig,
    source: Source,
    model: BiLSTMClassifier,
    params: dict[str, Any],
    train: BatchStream,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scores of every part, and each document's class and prediction."""

    @jax.jit
    def predicted(params: Any, batch: Batch) -> jax.Array:
        logits = classify(params, batch, None, source.features, source.combiner, model)
        return logits.argmax(-1).astype(jnp.int32)

    results: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for part in PARTS:
        documents = getattr(source.data, part)
        stream = _by_length(documents, train)
        classes = predict(predicted, params, stream)
        counts = np.zeros((model.classes, model.classes))
        np.add.at(counts, (documents.labels, classes), 1)
        results[part] = classification(counts)
        arrays |= {part: classes, f"{part}_labels": documents.labels}
    return results | {"classes": list(source.data.classes)}, arrays


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


def _tell(results: dict[str, Any], classes: tuple[str, ...]) -> None:
    cli.say(f"\n{report.metrics_table(results)}\n\ntest:")
    cli.say(report.confusion_table(results["test"]["confusion_matrix"], classes))
    if key := report.explain_numbers(classes, "class"):
        cli.say(f"\n{key}")


def _draw(
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


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(DownstreamConfig, downstream, "experiments.downstream", PRESETS, unread)


if __name__ == "__main__":
    sys.exit(main())
