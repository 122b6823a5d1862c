"""Command that trains a classifier on the layers of a language model or on word vectors."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes

from elmo_jax.config import ClassifierConfig, CombinerConfig, Count, Kernel, OptimizerConfig, Seed, Size
from experiments.common import cli
from experiments.common.cli import without_effect
from experiments.common.config import HostsConfig, SourceConfig

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from elmo_jax.data.batching import Batch, BatchStream, Documents
    from elmo_jax.models.classifier import BiLSTMClassifier
    from elmo_jax.training.checkpoint import Run
    from elmo_jax.training.step import TrainState
    from experiments.common.inputs import Source

PARTS = ("train", "validation", "test")
PREDICTIONS = "predictions.npz"


@dataclass(frozen=True)
class DownstreamConfig:
    """Train and evaluate a BiLSTM classifier on ELMo layers or on word vectors."""

    source: Annotated[SourceConfig, OmitArgPrefixes] = SourceConfig()
    preset: Literal["report", "best"] | None = None
    """Defaults that other flags override: sizes of the original report, or the best known settings."""
    combiner: Annotated[CombinerConfig, OmitArgPrefixes] = CombinerConfig()
    classifier: Annotated[ClassifierConfig, OmitArgPrefixes] = ClassifierConfig()
    optimizer: Annotated[OptimizerConfig, OmitArgPrefixes] = OptimizerConfig(
        learning_rate=2e-3, clip_norm=5.0
    )
    hosts: Annotated[HostsConfig, OmitArgPrefixes] = HostsConfig()
    batch_size: Size = 32
    """Documents per step, over all devices."""
    epochs: Count = 3
    """Passes over the training data."""
    seed: Seed = 0
    """Random seed for initialization, data order and dropout."""
    steps_per_call: Size = 8
    """Training steps per call of the device; at most 8."""
    kernel: Kernel = "auto"
    """Implementation of all LSTM layers; auto takes persistent on CUDA where possible, otherwise fast."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""
    output: str | None = None
    """Run folder; runs/downstream-COMBINER, -svd or -sgns if not given."""
    resume: bool = False
    """Continue the run in that folder."""
    allow_config_change: bool = False
    """With --resume: allow another --learning-rate or --clip-norm, or another --seed between epochs."""
    overwrite: bool = False
    """Replace the run in that folder."""


PRESETS = {
    "report": DownstreamConfig(
        preset="report",
        classifier=ClassifierConfig(hidden=128, classifier_layers=2),
        batch_size=32,
        epochs=5,
    ),
    "best": DownstreamConfig(preset="best", epochs=5),  # by a search on validation data, see RESULTS.md
}


def find_unused_flags(config: DownstreamConfig) -> dict[str, str]:
    """Return the flags without effect under these settings, each with a message."""
    from elmo_jax.models.combiners import COMBINER_OPTIONS

    features, combiner = config.source.features, config.combiner.combiner
    mixing = {field.name for field in fields(CombinerConfig)}
    if features != "elmo":
        return without_effect(mixing | {"pretrained", "bilm"}, "--features", features, "--features elmo")
    ignored = mixing - {"combiner"} - COMBINER_OPTIONS.get(combiner, mixing)
    unused = {"--vectors": "needs --features svd or sgns; give one, or leave it out"}
    if config.source.bilm is not None:
        unused["--pretrained"] = "has no effect with --bilm; leave out one of the two"
    return unused | without_effect(ignored, "--combiner", combiner, "another --combiner")


def downstream(config: DownstreamConfig) -> dict[str, Any]:
    """Run the command and return what ``results.json`` holds."""
    import numpy as np

    from elmo_jax.data.batching import BatchStream
    from elmo_jax.models.classifier import BiLSTMClassifier
    from elmo_jax.models.lstm import LSTM
    from elmo_jax.parallel import make_mesh, run_on_all, run_on_first, start_distributed
    from elmo_jax.storage.files import tree_digest
    from experiments.common.inputs import open_source

    start_distributed(*astuple(config.hosts))
    LSTM(config.classifier.hidden, kernel=config.kernel).choose()  # fails before a folder is made
    mesh = make_mesh(config.batch_size)
    source = run_on_all(lambda: open_source(config.source, config.combiner, config.seed, config.kernel))
    data, classes = source.data, source.data.classes
    name = config.combiner.combiner if config.source.features == "elmo" else config.source.features
    output = config.output or f"runs/downstream-{name}"
    more = {"texts": data.digest, "model": tree_digest(source.params), **source.options}
    run = cli.create_run(config, output, monitor="val_loss", **more)
    train = BatchStream(data.train, config.batch_size, config.seed, steps_per_call=config.steps_per_call)
    cli.describe((data.train, data.validation, data.test), data.vocabulary, train)
    model = BiLSTMClassifier(config.classifier, len(classes), config.kernel)
    records, params = _train(config, source, model, train, run, mesh)
    results, predictions = _evaluate_parts(source, model, params, train)
    lambdas = source.combiner.lambdas(params["combiner"])
    results["lambdas"] = None if lambdas is None else np.asarray(lambdas, np.float64).tolist()
    results |= cli.speed(records, train)

    def write() -> None:
        np.savez_compressed(run.path / PREDICTIONS, **predictions)  # pyright: ignore[reportArgumentType]
        _print_scores(results, classes)  # before the plots, so that a failed plot hides no result
        _plot(results, records, classes, run.path)
        cli.write_results(run.path, results)
        cli.say(f"\ntest accuracy {results['test']['accuracy']:.4f}; written to {run.path}")

    run_on_first(write)
    run.close()
    return results


def _train(
    config: DownstreamConfig,
    source: Source,
    model: BiLSTMClassifier,
    train: BatchStream,
    run: Run,
    mesh: Mesh | None,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Train the classifier; return the record of every epoch and all parameters of the best one."""
    import jax

    from elmo_jax.models.classifier import classifier_loss
    from elmo_jax.parallel import Plan
    from elmo_jax.training.evaluate import evaluate
    from elmo_jax.training.loop import fit
    from elmo_jax.training.optimizers import make_optimizer
    from elmo_jax.training.step import TrainState

    loss_fn = classifier_loss(source.features, source.combiner, model)
    params, frozen = _init_params(source, model, config.seed), source.params
    if config.source.finetune:
        params, frozen = params | frozen, {}
    cli.say(
        f"model: {cli.count_parameters(params):,} trained parameters, {cli.count_parameters(frozen):,} frozen"
    )
    frozen = Plan(lambda frozen: frozen, mesh, (frozen,))()
    optimizer = make_optimizer(config.optimizer, config.epochs * train.steps_per_epoch)
    validation = _stream_like(train, source.data.validation)
    metrics_fn = jax.jit(lambda params, batch: loss_fn(params, batch, None)[1])

    def on_epoch(state: TrainState, metrics: Mapping[str, Any]) -> dict[str, Any]:
        validated = evaluate(metrics_fn, {**state.frozen, **state.params}, validation)
        record = _epoch_record(metrics, validated, source.combiner.lambdas(state.params["combiner"]))
        _print_epoch(int(state.step) // train.steps_per_epoch, metrics, record)
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


def _epoch_record(
    metrics: Mapping[str, Any], validated: Mapping[str, Any], lambdas: jax.Array | None
) -> dict[str, Any]:
    import numpy as np

    from elmo_jax.training.evaluate import classification

    return {
        "train_accuracy": float(np.trace(metrics["confusion"]) / metrics["documents"]),
        "val_loss": float(validated["nll"] / validated["documents"]),
        "val_accuracy": classification(validated["confusion"])["accuracy"],
        "lambdas": None if lambdas is None else np.asarray(lambdas, np.float64).round(6).tolist(),
    }


def _print_epoch(epoch: int, metrics: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    cli.say(
        f"epoch {epoch}: loss {float(metrics['nll'] / metrics['documents']):.4f}, validation loss "
        f"{record['val_loss']:.4f}, accuracy {record['val_accuracy']:.4f}"
        + (f", lambdas {record['lambdas']}" if record["lambdas"] else "")
        + f", {metrics['seconds']:.0f} s"
    )


def _stream_like(train: BatchStream, documents: Documents) -> BatchStream:
    """Batch documents in the shapes of training, whose programs are compiled already."""
    from elmo_jax.data.batching import BatchStream

    return BatchStream(documents, train.batch_size, bounds=train.bounds, steps_per_call=train.steps_per_call)


def _evaluate_parts(
    source: Source, model: BiLSTMClassifier, params: dict[str, Any], train: BatchStream
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the scores of every part, and the label and prediction of every document."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from elmo_jax.models.classifier import classify
    from elmo_jax.training.evaluate import classification, predict

    @jax.jit
    def predict_batch(params: Any, batch: Batch) -> jax.Array:
        logits = classify(params, batch, None, source.features, source.combiner, model)
        return logits.argmax(-1).astype(jnp.int32)

    results: dict[str, Any] = {"classes": list(source.data.classes)}
    arrays: dict[str, np.ndarray] = {}
    for part in PARTS:
        documents = getattr(source.data, part)
        classes = predict(predict_batch, params, _stream_like(train, documents))
        confusion = np.zeros((model.classes, model.classes))
        np.add.at(confusion, (documents.labels, classes), 1)
        results[part] = classification(confusion)
        arrays |= {part: classes, f"{part}_labels": documents.labels}
    return results, arrays


def _init_params(source: Source, model: BiLSTMClassifier, seed: int) -> dict[str, Any]:
    """Initialize the parameters of the combiner and the classifier."""
    import jax
    import jax.numpy as jnp

    layers, features = source.shape

    @jax.jit
    def init(key: jax.Array) -> dict[str, Any]:
        combiner_key, classifier_key = jax.random.split(key)
        x = jnp.zeros((layers, 1, 1, features))
        x, combiner = source.combiner.init_with_output(combiner_key, x)
        classifier = model.init(classifier_key, x, jnp.ones(1, jnp.int32))
        return {"combiner": combiner.get("params", {}), "classifier": classifier["params"]}

    return init(jax.random.key(seed))


def _print_scores(results: dict[str, Any], classes: tuple[str, ...]) -> None:
    from experiments.common import report

    cli.say(f"\n{report.metrics_table(results)}\n\ntest:")
    cli.say(report.confusion_table(results["test"]["confusion_matrix"], classes))
    if key := report.explain_numbers(classes, "class"):
        cli.say(f"\n{key}")


def _plot(
    results: dict[str, Any], records: list[dict[str, Any]], classes: tuple[str, ...], path: Path
) -> None:
    from experiments.common import report

    losses = {"loss": "training", "val_loss": "validation"}
    report.plot_curves(records, losses, path / "loss.png", "loss (nats)")
    if records[0]["lambdas"]:
        report.plot_lambdas(records, path / "lambdas.png")
    for part in PARTS:
        scores = results[part]
        title = f"{part}: accuracy {scores['accuracy']:.4f}"
        report.plot_confusion(scores["confusion_matrix"], classes, title, path / f"confusion_{part}.png")


def main() -> int:
    """Run the command line and return the exit code."""
    return cli.run(DownstreamConfig, downstream, "downstream", PRESETS, find_unused_flags)


if __name__ == "__main__":
    sys.exit(main())
