"""Command that pre-trains a bidirectional language model."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import OmitArgPrefixes

import elmo_jax
from elmo_jax.config import (
    BiLMConfig,
    CharCNNConfig,
    Config,
    Count,
    DataConfig,
    Epochs,
    Kernel,
    OptimizerConfig,
    Seed,
    Size,
)
from experiments.common import cli
from experiments.common.cli import without_effect
from experiments.common.config import CorpusConfig, HostsConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from elmo_jax.data.batching import Stream
    from elmo_jax.training.step import LossFn
    from experiments.common.inputs import Texts

DRY_RUN_TOKENS = 1 << 19  # minimum number of tokens that a dry run reads, to fill most length buckets


@dataclass(frozen=True)
class PretrainConfig(Config):
    """Pre-train a bidirectional LSTM language model."""

    data: Annotated[DataConfig, OmitArgPrefixes] = DataConfig()
    model: Annotated[BiLMConfig, OmitArgPrefixes] = BiLMConfig()
    optimizer: Annotated[OptimizerConfig, OmitArgPrefixes] = OptimizerConfig()
    corpus: Annotated[CorpusConfig, OmitArgPrefixes] = CorpusConfig()
    hosts: Annotated[HostsConfig, OmitArgPrefixes] = HostsConfig()
    preset: Literal["report", "best", "elmo-small", "elmo-medium", "elmo-original"] | None = None
    """Set of defaults, which other flags override: the original report's, the best known, or those of a
    released ELMo model."""
    softmax: Literal["sampled", "full"] = "sampled"
    """Softmax of the training loss; perplexity always uses the full softmax."""
    negatives: Count = 2048
    """Negative samples of the sampled softmax; with a smaller vocabulary the full softmax is used."""
    batch_size: Size = 32
    """Documents per step, over all devices."""
    model_parallel: Count = 1
    """Number of devices that share the vocabulary tables, for tables that do not fit on one device."""
    epochs: Epochs | None = None
    """Passes over the training data; if not given, 6, or up to 20 for small data."""
    seed: Seed = 0
    """Random seed for initialization, data order and dropout."""
    save_every: Count = 1000
    """Steps between checkpoints within an epoch."""
    steps_per_call: Size = 8
    """Training steps per compiled call; at most 8 with --batching sentences."""
    kernel: Kernel = "auto"
    """Implementation of the LSTM layers; auto means persistent if CUDA and the sizes allow it, else fast."""
    dry_run: bool = False
    """Run a few steps, print the estimated memory and time of the run, and write nothing."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""
    output: str = "runs/pretrain"
    """Run folder."""
    resume: bool = False
    """Continue the run in the --output folder."""
    allow_config_change: bool = False
    """With --resume: allow another --learning-rate or --clip-norm, and between epochs another --seed."""
    overwrite: bool = False
    """Replace the run in the --output folder."""


def find_unused_flags(config: PretrainConfig) -> dict[str, str]:
    """Return the flags without effect under these settings, each with a message."""
    model, corpus = config.model, config.corpus
    projected = f"{model.cells}, as wide as --embedding"
    cnn = [field.name for field in fields(CharCNNConfig)]
    columns = ["label_column", "text_columns", "text", "delimiter", "skip_blank"]
    split, counts = ["validation", "split_seed"], ["min_count", "max_vocab"]
    reads_words = model.input == "words"
    rules: list[
        tuple[Any, ...]
    ] = [  # condition, fields without effect, flag, its value, what to give instead
        (config.softmax == "full", ["negatives"], "--softmax", "full", "--softmax sampled"),
        (reads_words, cnn, "--input", "words", "--input characters"),
        (model.tie and not reads_words, ["tie"], "--input", "characters", "--input words"),
        (not model.projected, ["projection_clip"], "--cells", projected, "--project-cells"),
        (corpus.batching == "sentences", ["unroll"], "--batching", "sentences", "--batching contiguous"),
        (corpus.corpus is not None, columns, "--corpus", str(corpus.corpus), "--dataset"),
        (
            corpus.valid_corpus is not None,
            split,
            "--valid-corpus",
            str(corpus.valid_corpus),
            "no --valid-corpus",
        ),
        (corpus.vocab is not None, counts, "--vocab", str(corpus.vocab), "no --vocab"),
    ]
    found = [without_effect(names, *texts) for applies, names, *texts in rules if applies]
    return {flag: message for messages in found for flag, message in messages.items()}


def _released_preset(name: Any, cells: int, width: int, highway: int = 2) -> PretrainConfig:
    """Return the sizes of a released ELMo model and bilm-tf's training recipe."""
    return PretrainConfig(
        preset=name,
        model=BiLMConfig(
            input="characters",
            characters=CharCNNConfig(highway=highway),
            embedding=width,
            cells=cells,
            skip=True,
            cell_clip=3.0,
            projection_clip=3.0,
            tie=False,
        ),
        optimizer=OptimizerConfig(
            optimizer="adagrad",
            learning_rate=0.2,
            schedule="constant",
            warmup=0.0,
            clip_norm=10.0,
            gradient_scale=20.0,  # bilm-tf sums the loss over its 20 unrolled steps
        ),
        corpus=CorpusConfig(batching="contiguous", unroll=20),
        negatives=8192,
        batch_size=128,
        epochs=10,
    )


PRESETS = {
    "report": PretrainConfig(
        preset="report", model=BiLMConfig(embedding=150, cells=150, layers=2), batch_size=32, epochs=10
    ),
    "best": PretrainConfig(preset="best", epochs=10),  # by a search on validation data, see RESULTS.md
    "elmo-small": _released_preset("elmo-small", cells=1024, width=128, highway=1),
    "elmo-medium": _released_preset("elmo-medium", cells=2048, width=256),
    "elmo-original": _released_preset("elmo-original", cells=4096, width=512),
}


def pretrain(config: PretrainConfig) -> list[dict[str, Any]]:
    """Run the command and return the record of every epoch."""
    import jax

    from elmo_jax.models.bilm import lstm_layer
    from elmo_jax.parallel import check_memory, run_on_all, run_on_first
    from elmo_jax.training.checkpoint import VOCABULARY
    from elmo_jax.training.evaluate import perplexities
    from elmo_jax.training.loop import PRETRAIN_EPOCHS
    from experiments.common.estimate import estimate
    from experiments.common.inputs import load_texts

    cli.join_processes(config.hosts)
    mesh = elmo_jax.make_mesh(config.batch_size, config.model_parallel)
    kernel = lstm_layer(config.model, config.kernel).choose()  # fails before the texts are read
    max_tokens = _dry_run_tokens(config) if config.dry_run else None
    with_characters = config.model.input == "characters"
    texts = run_on_all(lambda: load_texts(config.data, config.corpus, with_characters, max_tokens))
    model = elmo_jax.BiLM(config.model, len(texts.vocabulary), config.kernel)
    train = texts.stream(config.corpus, config.batch_size, config.seed, config.steps_per_call)
    bounds = train.bounds if isinstance(train, elmo_jax.BatchStream) else None
    held_out = elmo_jax.BatchStream(
        texts.held_out, config.batch_size, bounds=bounds, steps_per_call=config.steps_per_call
    )
    epochs = config.epochs or PRETRAIN_EPOCHS.epochs(round(train.steps_per_epoch / texts.fraction))
    config = replace(config, epochs=epochs)
    init_state, optimizer, loss_fn = _prepare_training(config, model, texts, train, mesh)
    check_memory(init_state.like())
    _describe(texts, train, init_state, kernel)
    if config.dry_run:
        steps = epochs * train.steps_per_epoch / texts.fraction
        estimate(init_state(), loss_fn, optimizer, train, steps, config.seed)
        return []
    files = {VOCABULARY: texts.vocabulary.text}
    text = config.data.text_config("words" if config.corpus.corpus is None else "whitespace")
    more: dict[str, Any] = {"texts": texts.digest, "text": asdict(text)}
    more |= {} if config.corpus.corpus is None else {"data": None}
    run = cli.create_run(config, config.output, monitor="perplexity", files=files, **more)
    metrics_fn = jax.jit(elmo_jax.bilm_sums(model))

    def on_epoch(state: elmo_jax.TrainState, metrics: Mapping[str, Any]) -> dict[str, Any]:
        record = perplexities(elmo_jax.evaluate(metrics_fn, state.params, held_out))
        record["tokens_per_second"] = round(float(metrics["words"]) / metrics["seconds"], 1)
        _print_epoch(int(state.step) // train.steps_per_epoch, metrics, record)
        return record

    with cli.tensorboard(run, config.tensorboard) as on_record:
        _, records = elmo_jax.fit(
            init_state,
            loss_fn,
            optimizer,
            train,
            run,
            epochs=epochs,
            seed=config.seed,
            on_epoch=on_epoch,
            on_record=on_record,
            save_every=config.save_every,
        )
    run_on_first(lambda: _write_results(records, train, run.path))
    run.close()
    return records


def _describe(texts: Texts, train: Any, init_state: elmo_jax.Plan[elmo_jax.TrainState], kernel: str) -> None:
    """Print the sizes of the texts, the batches and the model, the devices and the kernel."""
    import jax

    if texts.fraction < 1:
        cli.say(f"estimated from the first {texts.fraction:.2%} of the corpus:")
    parts = (texts.train,) if texts.held_out is texts.train else (texts.train, texts.held_out)
    cli.describe(parts, texts.vocabulary, train)
    parameters = cli.count_parameters(init_state.like().params)
    devices = f"{jax.default_backend()} x {jax.device_count()}"
    cli.say(f"model: {parameters:,} parameters, {devices}, {kernel} LSTM")


def _dry_run_tokens(config: PretrainConfig) -> int:
    """Return the number of corpus tokens that a dry run reads, enough for its steps."""
    from experiments.common.estimate import CALLS

    rows = CALLS * config.steps_per_call * config.batch_size
    length = config.corpus.unroll if config.corpus.batching == "contiguous" else 20
    return max(DRY_RUN_TOKENS, rows * (length + 1))


def _prepare_training(
    config: PretrainConfig, model: elmo_jax.BiLM, texts: Texts, train: Stream, mesh: Mesh | None
) -> tuple[elmo_jax.Plan[elmo_jax.TrainState], Any, LossFn]:
    """Return the initial state, the optimizer and the loss function."""
    import jax

    from elmo_jax.models.bilm import zero_state
    from elmo_jax.training.objectives import bilm_tables, init_params

    excess = len(texts.vocabulary) % config.model_parallel
    if excess:
        raise elmo_jax.InputError(
            f"--model-parallel {config.model_parallel} does not divide the vocabulary's "
            f"{len(texts.vocabulary):,} words; drop the rarest {excess} with --max-vocab or in --vocab"
        )
    contiguous = config.corpus.batching == "contiguous"
    assert config.epochs is not None
    steps = config.epochs * train.steps_per_epoch
    negatives = config.negatives if config.softmax == "sampled" else None
    loss_fn, optimizer = elmo_jax.bilm_training(model, config.optimizer, steps, negatives, contiguous)

    def init_state() -> elmo_jax.TrainState:
        params = init_params(model, jax.random.key(config.seed))
        carry = {"state": zero_state(config.model, config.batch_size)} if contiguous else None
        return elmo_jax.TrainState.create(params, optimizer, carry=carry)

    return elmo_jax.Plan(init_state, mesh, tables=bilm_tables(model)), optimizer, loss_fn


def _print_epoch(epoch: int, metrics: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    cli.say(
        f"epoch {epoch}: loss {metrics['loss'] / max(metrics['steps'], 1):.4f}, held-out perplexity "
        f"{record['perplexity']:.1f} (forward {record['perplexity_forward']:.1f}, backward "
        f"{record['perplexity_backward']:.1f}), {record['tokens_per_second']:,.0f} tokens/s, "
        f"{metrics['seconds']:.0f} s"
    )


def _write_results(records: list[dict[str, Any]], train: Stream, path: Path) -> None:
    """Plot the curves and write the results of the best epoch."""
    from experiments.common import report

    report.plot_curves(records, {"loss": "training"}, path / "loss.png", "training loss (nats a token)")
    lines = {"perplexity_forward": "forward", "perplexity_backward": "backward", "perplexity": "mean"}
    report.plot_curves(records, lines, path / "perplexity.png", "held-out perplexity", log=True)
    best = min(records, key=lambda record: record["perplexity"])
    results = {name: best[name] for name in ("perplexity", "perplexity_forward", "perplexity_backward")}
    cli.write_results(path, results | {"best_epoch": best["epoch"]} | cli.speed(records, train))
    cli.say(f"best epoch {best['epoch']}: held-out perplexity {best['perplexity']:.2f}; written to {path}")


def main() -> int:
    """Run the command line and return the exit code."""
    return cli.run(PretrainConfig, pretrain, "pretrain", PRESETS, find_unused_flags)


if __name__ == "__main__":
    sys.exit(main())
