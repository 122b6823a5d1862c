"""Train a classifier on a pre-trained model's layers: python -m experiments.downstream."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from tyro.conf import OmitArgPrefixes

from elmo_jax import report
from elmo_jax.bilm import bilm_features
from elmo_jax.classifier import BiLSTMClassifier, ClassifierConfig, classifier_loss
from elmo_jax.combiners import CombinerConfig, make_combiner
from elmo_jax.data import BatchStream
from elmo_jax.datasets import DataConfig, load_dataset
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.fit import fit
from elmo_jax.integrity import read_config, structure, write_atomically
from elmo_jax.metrics import classification
from elmo_jax.train import OptimizerConfig, TrainState, evaluate, make_optimizer
from experiments import cli


@dataclass(frozen=True)
class DownstreamConfig:
    """Train a BiLSTM classifier on the mixed layers of a pre-trained model, and measure it."""

    pretrained: str = "runs/pretrain"
    """Run of experiments.pretrain; the data set is that run's."""
    combiner: Annotated[CombinerConfig, OmitArgPrefixes] = CombinerConfig()
    classifier: Annotated[ClassifierConfig, OmitArgPrefixes] = ClassifierConfig()
    optimizer: Annotated[OptimizerConfig, OmitArgPrefixes] = OptimizerConfig(
        learning_rate=2e-3, clip_norm=5.0
    )
    finetune: bool = False
    """Train the language model too."""
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
    """Folder of the run; runs/downstream-COMBINER if not given."""
    resume: bool = False
    """Go on with the run in that folder."""
    allow_config_change: bool = False
    """To go on between two epochs with another --seed or --steps-per-dispatch."""
    overwrite: bool = False
    """Replace the run in that folder."""


def downstream(config: DownstreamConfig) -> dict[str, Any]:
    """Run the command; returns what ``results.json`` holds."""
    elmo = Elmo.from_pretrained(config.pretrained)
    source = read_config(Path(config.pretrained))
    if "data" not in source:
        raise InputError(f"{config.pretrained}: names no data set; give a run of experiments.pretrain")
    settings = structure(DataConfig, source["data"], f"{config.pretrained}: data")
    cli.check(settings)
    spelled = elmo.model.config.input == "characters"
    data = load_dataset(settings, elmo.vocabulary, spelled)
    output = config.output or f"runs/downstream-{config.combiner.combiner}"
    run = cli.create_run(config, output, monitor="val_loss", texts=data.digest)

    train = BatchStream(
        data.train, config.batch_size, config.seed, steps_per_dispatch=config.steps_per_dispatch
    )
    parts = {
        name: BatchStream(part, 2 * config.batch_size, bounds=train.bounds)
        for name, part in (("train", data.train), ("validation", data.validation), ("test", data.test))
    }
    cli.describe(data, train)
    combiner = make_combiner(config.combiner)
    model = BiLSTMClassifier(config.classifier, len(data.classes))
    features = bilm_features(elmo.model, config.finetune)
    loss_fn = classifier_loss(features, combiner, model)
    params = _init(elmo, combiner, model, config.seed)
    frozen = {"bilm": elmo.params}
    if config.finetune:
        params, frozen = params | frozen, {}
    cli.say(f"model: {cli.count(params):,} trained parameters, {cli.count(frozen):,} frozen")
    optimizer = make_optimizer(config.optimizer, config.epochs * train.steps_per_epoch)
    sums_fn = jax.jit(lambda params, batch: loss_fn(params, batch, None)[1])
    log = cli.tensorboard(run, config.tensorboard)

    def on_epoch(state: TrainState, sums: Mapping[str, Any]) -> dict[str, Any]:
        held_out = evaluate(sums_fn, {**state.frozen, **state.params}, parts["validation"])
        lambdas = combiner.lambdas(state.params["combiner"])
        epoch = int(state.step) // train.steps_per_epoch
        record = {
            "train_accuracy": float(np.trace(sums["confusion"]) / sums["documents"]),
            "val_loss": float(held_out["nll"] / held_out["documents"]),
            "val_accuracy": classification(held_out["confusion"])["accuracy"],
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
    best = {**frozen, **run.restore_best(("params",))["params"]}
    run.close()
    results: dict[str, Any] = {
        name: classification(evaluate(sums_fn, best, part)["confusion"]) for name, part in parts.items()
    }
    lambdas = combiner.lambdas(best["combiner"])
    results["lambdas"] = None if lambdas is None else np.asarray(lambdas, np.float64).tolist()
    write_atomically(run.path / "results.json", json.dumps(results, indent=2) + "\n")
    _show(results, records, data.classes, run.path)
    return results


def _init(elmo: Elmo, combiner: Any, model: BiLSTMClassifier, seed: int) -> dict[str, Any]:
    """Parameters of the combiner and the classifier."""

    @jax.jit
    def init(key: jax.Array) -> dict[str, Any]:
        mix, head = jax.random.split(key)
        c = elmo.model.config
        layers = jnp.zeros((c.layers + 1, 1, 1, 2 * c.embedding))
        x, mixed = combiner.init_with_output(mix, layers)
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
    for part in ("train", "validation", "test"):
        scores = results[part]
        title = f"{part}: accuracy {scores['accuracy']:.4f}"
        report.plot_confusion(scores["confusion_matrix"], classes, title, path / f"confusion_{part}.png")
    cli.say(f"\n{report.metrics_table(results)}\n\ntest:")
    cli.say(report.confusion_table(results["test"]["confusion_matrix"], classes))
    cli.say(f"\ntest accuracy {results['test']['accuracy']:.4f}; written to {path}")


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(DownstreamConfig, downstream, "experiments.downstream")


if __name__ == "__main__":
    sys.exit(main())
