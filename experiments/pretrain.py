"""Pre-train a bidirectional language model: python -m experiments.pretrain."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import numpy as np
from tyro.conf import OmitArgPrefixes

from elmo_jax import report
from elmo_jax.bilm import BiLM, BiLMConfig, bilm_loss, bilm_sums
from elmo_jax.data import BatchStream
from elmo_jax.datasets import DataConfig, load_dataset
from elmo_jax.exported import VOCABULARY
from elmo_jax.fit import fit
from elmo_jax.metrics import perplexities
from elmo_jax.train import OptimizerConfig, TrainState, evaluate, make_optimizer
from experiments import cli


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-train a bidirectional LSTM language model and save it as a run."""

    data: Annotated[DataConfig, OmitArgPrefixes] = DataConfig()
    model: Annotated[BiLMConfig, OmitArgPrefixes] = BiLMConfig()
    optimizer: Annotated[OptimizerConfig, OmitArgPrefixes] = OptimizerConfig()
    preset: Literal["report", "best"] | None = None
    """Sizes and epochs of the report, or the best known; other flags win over it."""
    softmax: Literal["sampled", "full"] = "sampled"
    """Training objective; perplexity is always of the full softmax."""
    negatives: int = 2048
    """Classes of the sampled softmax; if the vocabulary has no more, it is the full one."""
    batch_size: int = 32
    """Documents a step."""
    epochs: int = 10
    """Passes over the training part."""
    seed: int = 0
    """Of parameters, order and dropout."""
    save_every: int = 1000
    """Steps between saves within an epoch."""
    steps_per_dispatch: int = 8
    """Steps run by one call of the device."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder too."""
    output: str = "runs/pretrain"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in that folder."""
    allow_config_change: bool = False
    """To go on between two epochs with another --seed or --steps-per-dispatch."""
    overwrite: bool = False
    """Replace the run in that folder."""


PRESETS = {
    "report": PretrainConfig(
        preset="report", model=BiLMConfig(embedding=150, cells=150, layers=2), batch_size=32, epochs=10
    ),
    # The best known so far; a search on validation is to settle it.
    "best": PretrainConfig(preset="best"),
}


def pretrain(config: PretrainConfig) -> list[dict[str, Any]]:
    """Run the command; returns every epoch's record."""
    data = load_dataset(config.data, spelled=config.model.input == "characters")
    model = BiLM(config.model, len(data.vocabulary))
    files = {VOCABULARY: data.vocabulary.text}
    run = cli.create_run(config, config.output, monitor="perplexity", files=files, texts=data.digest)

    train = BatchStream(
        data.train, config.batch_size, config.seed, steps_per_dispatch=config.steps_per_dispatch
    )
    held_out = BatchStream(data.validation, 2 * config.batch_size, bounds=train.bounds)
    cli.describe(data, train)
    example = data.train.batch(np.arange(1), (1, int(data.train.lengths[0]) + 2))
    params = jax.jit(model.init)(jax.random.key(config.seed), example)["params"]
    cli.say(f"model: {cli.count(params):,} parameters, {jax.devices()[0].platform} x {jax.device_count()}")
    optimizer = make_optimizer(config.optimizer, config.epochs * train.steps_per_epoch)
    sampled = config.softmax == "sampled" and config.negatives < len(data.vocabulary)
    negatives = config.negatives if sampled else None
    sums_fn = jax.jit(bilm_sums(model))
    log = cli.tensorboard(run, config.tensorboard)

    def on_epoch(state: TrainState, sums: Mapping[str, Any]) -> dict[str, Any]:
        record = perplexities(evaluate(sums_fn, state.params, held_out))
        record["tokens_per_second"] = round(float(sums["words"]) / sums["seconds"], 1)
        epoch = int(state.step) // train.steps_per_epoch
        cli.say(
            f"epoch {epoch}: loss {sums['loss'] / max(sums['steps'], 1):.4f}, held-out perplexity "
            f"{record['perplexity']:.1f} (forward {record['perplexity_forward']:.1f}, backward "
            f"{record['perplexity_backward']:.1f}), {record['tokens_per_second']:,.0f} tokens/s, "
            f"{sums['seconds']:.0f} s"
        )
        log(epoch, record)
        return record

    _, records = fit(
        TrainState.create(params, optimizer),
        bilm_loss(model, negatives),
        optimizer,
        train,
        run,
        epochs=config.epochs,
        seed=config.seed,
        on_epoch=on_epoch,
        save_every=config.save_every,
    )
    report.plot_curves(records, {"loss": "training"}, run.path / "loss.png", "training loss (nats a token)")
    lines = {"perplexity_forward": "forward", "perplexity_backward": "backward", "perplexity": "mean"}
    report.plot_curves(records, lines, run.path / "perplexity.png", "held-out perplexity", log=True)
    best = min(records, key=lambda record: record["perplexity"])
    results = {name: best[name] for name in ("perplexity", "perplexity_forward", "perplexity_backward")}
    cli.write_results(run.path, results | {"best_epoch": best["epoch"]} | cli.speed(records, train))
    cli.say(
        f"best epoch {best['epoch']}: held-out perplexity {best['perplexity']:.2f}; written to {run.path}"
    )
    run.close()
    return records


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(PretrainConfig, pretrain, "experiments.pretrain", PRESETS)


if __name__ == "__main__":
    sys.exit(main())
