"""Command that trains a classifier on the layers of a language model or on word vectors."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes

from elmo_jax.config import (
    ClassifierConfig,
    CombinerConfig,
    Config,
    Epochs,
    Kernel,
    OptimizerConfig,
    Seed,
    Size,
)
from experiments.common import cli
from experiments.common.cli import without_effect
from experiments.common.config import HostsConfig, SourceConfig

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Mesh

    from elmo_jax.data.batching import BatchStream
    from elmo_jax.data.csv_dataset import Dataset
    from elmo_jax.predictors import TextClassifier
    from elmo_jax.training.checkpoint import Run
    from experiments.common.inputs import Source

PARTS = ("train", "validation", "test")
PREDICTIONS = "predictions.npz"
MODELS = ("network", "logistic regression", "naive Bayes")  # members of the ensemble
LINEAR_ONLY = (0.0, 1.0, 0.0)
_TITLES = {"svd": "SVD", "sgns": "SGNS", "tfidf": "TF-IDF"}


@dataclass(frozen=True)
class DownstreamConfig(Config):
    """Train and evaluate a BiLSTM classifier on ELMo layers or on word vectors."""

    source: Annotated[SourceConfig, OmitArgPrefixes] = SourceConfig()
    preset: Literal["report", "best"] | None = None
    """Set of defaults, which other flags override: the original report's, or the best known."""
    combiner: Annotated[CombinerConfig, OmitArgPrefixes] = CombinerConfig()
    classifier: Annotated[ClassifierConfig, OmitArgPrefixes] = ClassifierConfig()
    optimizer: Annotated[OptimizerConfig, OmitArgPrefixes] = OptimizerConfig(
        learning_rate=2e-3, clip_norm=5.0
    )
    hosts: Annotated[HostsConfig, OmitArgPrefixes] = HostsConfig()
    batch_size: Size = 32
    """Documents per step, over all devices."""
    epochs: Epochs | None = None
    """Passes over the training data; if not given, 3, or up to 20 for small data."""
    standardize: bool = True
    """Standardize each feature of each layer over the training tokens."""
    ensemble: bool = True
    """Add logistic regression and naive Bayes on word counts, with weights fitted on the validation texts."""
    seed: Seed = 0
    """Random seed for initialization, data order and dropout."""
    steps_per_call: Size = 8
    """Training steps per compiled call; at most 8."""
    kernel: Kernel = "auto"
    """Implementation of all LSTM layers; auto means persistent if CUDA and the sizes allow it, else fast."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""
    output: str | None = None
    """Run folder; if not given, runs/downstream- followed by the name of the combiner or of the features."""
    resume: bool = False
    """Continue the run in the --output folder."""
    allow_config_change: bool = False
    """With --resume: allow another --learning-rate or --clip-norm, and between epochs another --seed."""
    overwrite: bool = False
    """Replace the run in the --output folder."""


PRESETS = {
    "report": DownstreamConfig(
        preset="report",
        classifier=ClassifierConfig(hidden=128, classifier_layers=2),
        batch_size=32,
        epochs=5,
    ),
    "best": DownstreamConfig(
        preset="best", epochs=5
    ),  # found by a search on validation data, see docs/results.md
}


def find_unused_flags(config: DownstreamConfig) -> dict[str, str]:
    """Return the flags without effect under these settings, each with a message."""
    from elmo_jax.models.combiners import COMBINER_OPTIONS

    features, combiner = config.source.features, config.combiner.combiner
    mixing = {field.name for field in fields(CombinerConfig)}
    if features == "tfidf":
        kinds = (CombinerConfig, ClassifierConfig, OptimizerConfig)
        names = {field.name for kind in kinds for field in fields(kind)}
        names |= {"bilm", "vectors", "batch_size", "epochs", "standardize", "ensemble", "kernel"}
        return without_effect(names, "--features", features, "other --features")
    if features != "elmo":
        return without_effect(mixing | {"pretrained", "bilm"}, "--features", features, "--features elmo")
    ignored = mixing - {"combiner"} - COMBINER_OPTIONS.get(combiner, mixing)
    unused = {"--vectors": "needs --features svd or sgns; give one, or leave it out"}
    if config.source.bilm is not None:
        unused["--pretrained"] = "has no effect with --bilm; leave out one of the two"
    return unused | without_effect(ignored, "--combiner", combiner, "another --combiner")


def downstream(config: DownstreamConfig) -> dict[str, Any]:
    """Run the command and return the content of ``results.json``."""
    import numpy as np

    from elmo_jax.data.batching import BatchStream
    from elmo_jax.models.lstm import LSTM
    from elmo_jax.parallel import make_mesh, run_on_all, run_on_first
    from elmo_jax.pretrained.folder import MODEL
    from elmo_jax.storage.files import tree_digest
    from elmo_jax.training.loop import CLASSIFIER_EPOCHS
    from experiments.common.inputs import open_source

    cli.join_processes(config.hosts)
    LSTM(
        config.classifier.hidden, kernel=config.kernel
    ).choose()  # refuses an unsupported kernel before a folder is made
    mesh = make_mesh(config.batch_size)
    source = run_on_all(lambda: open_source(config.source, config.combiner, config.seed, config.kernel))
    data, classes = source.data, source.data.classes
    name = config.combiner.combiner if config.source.features == "elmo" else config.source.features
    output = config.output or f"runs/downstream-{name}"
    more = {"texts": data.digest, "model": tree_digest(source.features.params), **source.options}
    train = BatchStream(data.train, config.batch_size, config.seed, steps_per_call=config.steps_per_call)
    config = replace(config, epochs=config.epochs or CLASSIFIER_EPOCHS.epochs(train.steps_per_epoch))
    run = cli.create_run(config, output, monitor="val_loss", **more)
    cli.describe((data.train, data.validation, data.test), data.vocabulary, train)
    records, params, lambdas = [], {}, []
    if source.features.params:
        records, params, lambdas = _train(config, source, train, run, mesh)
    model, log_probabilities = _make_classifier(config, source, params)
    results, predictions = _score_parts(model, data, log_probabilities)
    if records:
        best = source.combiner.lambdas(params["combiner"])
        results["lambdas"] = None if best is None else np.asarray(best, np.float64).tolist()
        results |= cli.speed(records, train)

    def write() -> None:
        np.savez_compressed(run.path / PREDICTIONS, **predictions)  # pyright: ignore[reportArgumentType]
        model.save_pretrained(run.path / MODEL)
        _print_scores(results, classes)  # first, in case a plot fails
        _plot(results, records, lambdas, _TITLES.get(name, f"ELMo, {name}"), run.path)
        cli.write_results(run.path, results)
        cli.say(f"\ntest accuracy {results['test']['accuracy']:.4f}; written to {run.path}")

    run_on_first(write)
    run.close()
    return results


def _train(
    config: DownstreamConfig, source: Source, train: BatchStream, run: Run, mesh: Mesh | None
) -> tuple[list[dict[str, Any]], dict[str, Any], list[list[float]]]:
    """Train the classifier.

    Returns:
        The record of every epoch, all parameters of the best one, and λ before training and by epoch.
    """
    import numpy as np

    from elmo_jax.models.classifier import BiLSTMClassifier
    from elmo_jax.training.classifier import ClassifierTraining

    assert config.epochs is not None
    training = ClassifierTraining(
        source.features,
        source.combiner,
        BiLSTMClassifier(config.classifier, len(source.data.classes), config.kernel),
        config.optimizer,
        config.epochs,
        config.seed,
        config.source.finetune,
        config.standardize,
    )
    network = training.init_network()
    trained, frozen = (cli.count_parameters(each) for each in (network, source.features.params))
    if config.source.finetune:
        trained, frozen = trained + frozen, 0
    cli.say(f"model: {trained:,} trained parameters, {frozen:,} frozen; {training.epochs} epochs")
    with cli.tensorboard(run, config.tensorboard) as on_record:
        records, params = training.run(train, source.data.validation, run, mesh, _print_epoch, on_record)
    first = source.combiner.lambdas(network["combiner"])
    if first is None:
        return records, params, []
    before = np.asarray(first, np.float64).round(6).tolist()  # rounded as in the records
    lambdas = [before, *(record["lambdas"] for record in records)]
    return records, params, lambdas


def _print_epoch(epoch: int, metrics: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    cli.say(
        f"epoch {epoch}: loss {float(metrics['nll'] / metrics['documents']):.4f}, validation loss "
        f"{record['val_loss']:.4f}, accuracy {record['val_accuracy']:.4f}"
        + (f", lambdas {record['lambdas']}" if record["lambdas"] else "")
        + f", {metrics['seconds']:.0f} s"
    )


def _make_classifier(
    config: DownstreamConfig, source: Source, params: dict[str, Any]
) -> tuple[TextClassifier, dict[str, np.ndarray]]:
    """Return the classifier, and the log-probabilities ``[M, N, C]`` of its models for each part."""
    import jax
    import numpy as np

    from elmo_jax.baselines.bag_of_words import BagOfWords, fit_mixture_weights
    from elmo_jax.parallel import to_host
    from elmo_jax.predictors import TextClassifier, TextClassifierConfig
    from experiments.common.inputs import load_words

    features, data = config.source.features, source.data
    words = load_words(config.source, source.settings, config.seed) if config.ensemble or not params else None
    bag = words and BagOfWords.fit(words.train, words.vocabulary, len(data.classes))
    settings = TextClassifierConfig(
        classes=data.classes,
        features=features,
        bilm=source.bilm,
        combiner=config.combiner,
        classifier=config.classifier,
        max_length=source.settings.max_length,
        text=source.settings.text_config(),
    )
    params = jax.tree.map(to_host, params)  # prediction needs only one device
    model = TextClassifier(settings, params, source.vocabulary, bag, config.kernel)
    log_probabilities = {}
    for part in PARTS:
        each = [model.network_log_probabilities(getattr(data, part))] if params else []
        if bag is not None and words is not None:
            each.extend(bag.log_probabilities(getattr(words, part)))
        log_probabilities[part] = np.stack(each)
    if bag is not None:
        weights: Sequence[float] = LINEAR_ONLY
        if params:
            weights = fit_mixture_weights(log_probabilities["validation"], data.validation.labels).tolist()
        model = model.with_weights(weights)
    return model, log_probabilities


def _score_parts(
    model: TextClassifier, data: Dataset, log_probabilities: dict[str, np.ndarray]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the scores of every part, and the label and prediction of every document."""
    import numpy as np

    from elmo_jax.training.evaluate import classification, confusion

    results: dict[str, Any] = {"classes": list(data.classes)}
    arrays: dict[str, np.ndarray] = {}
    for part in PARTS:
        labels = getattr(data, part).labels
        predicted = model.mix(log_probabilities[part]).argmax(-1).astype(np.int32)
        results[part] = classification(confusion(labels, predicted, len(data.classes)))
        arrays |= {part: predicted, f"{part}_labels": labels}
    if len(np.unique(arrays["test"])) == 1:
        name = data.classes[int(arrays["test"][0])]
        warnings.warn(
            f"all test texts are classified as {name!r}; the classifier learned nothing", stacklevel=2
        )
    if model.bag is not None:
        accuracies = (log_probabilities["test"].argmax(-1) == data.test.labels).mean(-1).tolist()
        weights = model.config.weights[-len(accuracies) :]
        results["models"] = {
            name: {"weight": round(weight, 4), "test_accuracy": accuracy}
            for name, weight, accuracy in zip(MODELS[-len(accuracies) :], weights, accuracies, strict=True)
        }
    return results, arrays


def _print_scores(results: dict[str, Any], classes: tuple[str, ...]) -> None:
    from experiments.common import report

    cli.say(f"\n{report.metrics_table(results)}")
    if models := results.get("models"):
        each = (f"{name} {m['test_accuracy']:.4f} (weight {m['weight']:.2f})" for name, m in models.items())
        cli.say(f"\ntest accuracy of each model: {', '.join(each)}")
    cli.say("\ntest:")
    cli.say(report.confusion_table(results["test"]["confusion_matrix"], classes))
    if key := report.explain_numbers(classes, "class"):
        cli.say(f"\n{key}")


def _plot(
    results: dict[str, Any],
    records: list[dict[str, Any]],
    lambdas: list[list[float]],
    method: str,
    path: Path,
) -> None:
    from experiments.common import report

    losses = {"loss": "training", "val_loss": "validation"}
    if records:
        report.plot_curves(records, losses, path / "loss.png", "loss (nats)")
    if lambdas:
        report.plot_lambdas(lambdas, path / "lambdas.png")
    for part in PARTS:
        scores = results[part]
        title = f"{method}, {part}: accuracy {scores['accuracy']:.4f}"
        picture = path / f"confusion_{part}.png"
        report.plot_confusion(scores["confusion_matrix"], results["classes"], title, picture)


def main() -> int:
    """Run the command line and return the exit code."""
    return cli.run(DownstreamConfig, downstream, "downstream", PRESETS, find_unused_flags)


if __name__ == "__main__":
    sys.exit(main())
