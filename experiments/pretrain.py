"""Pre-train a bidirectional language model: python -m experiments.pretrain.

What a pre-training run would cost: its memory, arithmetic and time, from a few timed steps.
"""

import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh
from tyro.conf import OmitArgPrefixes

from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import BatchStream, StepChunk, Stream
from elmo_jax.data.csv_dataset import DataConfig
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM, BiLMConfig, lstm_layer, zero_state
from elmo_jax.models.embedders import CharCNNConfig
from elmo_jax.models.lstm import Kernel
from elmo_jax.parallel import Plan, feed, find_mesh, make_mesh, run_on_all, run_on_first
from elmo_jax.training.checkpoint import VOCABULARY
from elmo_jax.training.evaluate import evaluate, perplexities
from elmo_jax.training.loop import fit
from elmo_jax.training.objectives import bilm_sums, bilm_tables, bilm_training, init_params
from elmo_jax.training.optimizers import Optimizer
from elmo_jax.training.step import LossFn, TrainState, compile_steps, runs_all_steps, shape_key, train_step
from experiments.common import cli, report
from experiments.common.cli import without_effect
from experiments.common.distributed import HostsConfig, join
from experiments.common.texts import CorpusConfig, Texts, load_texts

TIMED = 4  # dispatches
_ENOUGH = 10.0  # seconds of timing
PORTION = 1 << 19  # tokens of a corpus that they are taken from, at least


def estimate(
    state: TrainState, loss_fn: LossFn, optimizer: Optimizer, stream: Any, steps: float, seed: int
) -> None:
    """Say what a run would cost.

    Args:
        state: before the first step; it is used up.
        loss_fn: the task.
        optimizer: of the run.
        stream: of the text, or of a portion of it.
        steps: of the whole run.
        seed: of the steps' randomness.
    """
    key = jax.random.key(seed)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.opt_state)))
    chunks = list(itertools.islice(feed(stream, 0, stream.steps_per_epoch, find_mesh(state)), TIMED))
    shapes = jax.eval_shape(lambda: state)
    ran, words, seconds = _time(state, loss_fn, optimizer, chunks, key)
    flops = _flops(shapes, loss_fn, optimizer, ran, key)
    count = sum(part.count for part in ran)
    peak = cli.peak_memory()
    at_most = "" if peak is None else f", {peak / 1e6:,.0f} MB at the peak"
    cli.say(f"memory: {held / 1e6:,.0f} MB of parameters and optimiser{at_most}")
    cli.say(
        f"arithmetic: {flops / words / 1e6:,.2f} million FLOPs a token in matrix products, padding counted"
    )
    cli.say(
        f"speed: {words / seconds:,.0f} tokens/s, {seconds / count * 1e3:,.1f} ms a step, "
        f"{flops / seconds / 1e9:,.1f} GFLOP/s"
    )
    cli.say(
        f"the run: {steps:,.0f} steps in {steps * seconds / count / 3600:.2f} hours, without its evaluations"
    )


def _time(
    state: TrainState, loss_fn: LossFn, optimizer: Optimizer, chunks: list[StepChunk], key: jax.Array
) -> tuple[list[StepChunk], float, float]:
    """What was run of these dispatches, each compiled before, in how many words and seconds."""
    run = compile_steps(loss_fn, optimizer, state)
    compiled: set[Any] = set()
    ran: list[StepChunk] = []
    words, seconds = 0.0, 0.0
    for batches, count in chunks:
        shape = shape_key(batches)
        if shape not in compiled:
            state, _ = run(state, batches, 1, key)
            compiled.add(shape)
        jax.block_until_ready(state)
        # One step first, which says how many there is time for.
        steps = min(count, 1 + int(_ENOUGH * sum(part.count for part in ran) / seconds)) if ran else 1
        steps = count if runs_all_steps() else steps
        began = time.perf_counter()
        state, sums = jax.block_until_ready(run(state, batches, steps, key))
        seconds += time.perf_counter() - began
        ran.append(StepChunk(batches, steps))
        words += float(np.sum(sums["words"]))
        if seconds > _ENOUGH:
            break
    return ran, words, seconds


def _flops(
    shapes: TrainState, loss_fn: LossFn, optimizer: Optimizer, chunks: list[StepChunk], key: jax.Array
) -> float:
    """Of the matrix products of all these steps; only the shapes of the state are read."""
    total, of_shape = 0.0, {}
    for batches, count in chunks:
        shape = shape_key(batches)
        if shape not in of_shape:
            batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batches)
            step = jax.make_jaxpr(lambda s, b: train_step(s, b, key, loss_fn, optimizer))(shapes, batch)
            of_shape[shape] = matmul_flops(step.jaxpr)
        total += count * of_shape[shape]
    return total


def matmul_flops(jaxpr: Any) -> float:
    """Floating-point operations of a traced function's matrix products, a loop's steps each counted.

    The compiler's own count takes the body of a loop once, and an LSTM is a loop.

    Args:
        jaxpr: as `jax.make_jaxpr` gives it, opened.

    Example:
        >>> import jax.numpy as jnp
        >>> product = lambda a, b: jax.lax.scan(lambda x, _: (x @ b, None), a, length=5)[0]
        >>> matmul_flops(jax.make_jaxpr(product)(jnp.ones((2, 3)), jnp.ones((3, 3))).jaxpr)
        180.0
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * inner * math.prod(eqn.outvars[0].aval.shape)
        each = [matmul_flops(inner) for inner in _inside(eqn.params)]
        if each:
            times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
            total += times * (max(each) if eqn.primitive.name == "cond" else sum(each))
    return total


def _inside(params: dict[str, Any]) -> Iterator[Any]:
    """The functions that an operation calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item


_SENTENCE = 20  # tokens, about


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-train a bidirectional LSTM language model and save it as a run."""

    data: Annotated[DataConfig, OmitArgPrefixes] = DataConfig()
    model: Annotated[BiLMConfig, OmitArgPrefixes] = BiLMConfig()
    optimizer: Annotated[OptimizerConfig, OmitArgPrefixes] = OptimizerConfig()
    corpus: Annotated[CorpusConfig, OmitArgPrefixes] = CorpusConfig()
    hosts: Annotated[HostsConfig, OmitArgPrefixes] = HostsConfig()
    preset: Literal["report", "best", "elmo-small", "elmo-medium", "elmo-original"] | None = None
    """Sizes and epochs of the report, the best known, or the sizes and the recipe of a released model;
    other flags win over it."""
    softmax: Literal["sampled", "full"] = "sampled"
    """Training objective; perplexity is always of the full softmax."""
    negatives: int = 2048
    """Classes of the sampled softmax; if the vocabulary has no more, it is the full one."""
    batch_size: int = 32
    """Documents a step, of all devices."""
    model_parallel: int = 1
    """Devices that the vocabulary's tables are split over, where one cannot hold them."""
    epochs: int = 6
    """Passes over the training part."""
    seed: int = 0
    """Of parameters, order and dropout."""
    save_every: int = 1000
    """Steps between saves within an epoch."""
    steps_per_call: int = 8
    """Steps run by one call of the device; no more than 8 where a document is a row."""
    kernel: Kernel = "auto"
    """What runs the LSTM layers: on CUDA one kernel for all steps where it can, else the fast scan; or
    one of them, or the plain scan. It is no part of the run: --resume may name another."""
    dry_run: bool = False
    """Say what the run would cost, and write nothing but a download; a corpus is read in part."""
    tensorboard: bool = False
    """Write TensorBoard events into the run folder too."""
    output: str = "runs/pretrain"
    """Folder of the run."""
    resume: bool = False
    """Go on with the run in that folder."""
    allow_config_change: bool = False
    """To go on with another --learning-rate or --clip-norm, or between two epochs with another --seed."""
    overwrite: bool = False
    """Replace the run in that folder."""


def unread(config: PretrainConfig) -> dict[str, str]:
    """The flags that nothing reads with these settings, and what is said of each that is given."""
    told: dict[str, str] = {}
    if config.softmax == "full":
        told |= without_effect(["negatives"], "--softmax", "full", "--softmax sampled")
    model, corpus = config.model, config.corpus
    if model.input == "words":
        spelling = [field.name for field in fields(CharCNNConfig)]
        told |= without_effect(spelling, "--input", "words", "--input characters")
    elif model.tie:
        told |= without_effect(["tie"], "--input", "characters", "--input words")
    if not model.projected:
        now = f"{model.cells}, as wide as --embedding"
        told |= without_effect(["projection_clip"], "--cells", now, "--project-cells")
    if corpus.batching == "sentences":
        told |= without_effect(["unroll"], "--batching", "sentences", "--batching contiguous")
    if corpus.corpus is not None:
        told |= without_effect(["text", "validation", "split_seed"], "--corpus", corpus.corpus, "--dataset")
    if corpus.vocab is not None:
        told |= without_effect(["min_count", "max_vocab"], "--vocab", corpus.vocab, "no --vocab")
    return told


def _released(
    preset: Literal["elmo-small", "elmo-medium", "elmo-original"], cells: int, width: int, highway: int = 2
) -> PretrainConfig:
    """A released model's sizes, and the recipe of bilm-tf that trained it."""
    model = BiLMConfig(
        input="characters",
        characters=CharCNNConfig(highway=highway),
        embedding=width,
        cells=cells,
        skip=True,
        cell_clip=3.0,
        projection_clip=3.0,
        tie=False,
    )
    optimizer = OptimizerConfig(
        optimizer="adagrad",
        learning_rate=0.2,
        schedule="constant",
        warmup=0.0,
        clip_norm=10.0,
        gradient_scale=20.0,  # bilm-tf adds up the loss over its 20 unrolled steps
    )
    return PretrainConfig(
        preset=preset,
        model=model,
        optimizer=optimizer,
        corpus=CorpusConfig(batching="contiguous", unroll=20),
        negatives=8192,
        batch_size=128,
        epochs=10,
    )


PRESETS = {
    "report": PretrainConfig(
        preset="report", model=BiLMConfig(embedding=150, cells=150, layers=2), batch_size=32, epochs=10
    ),
    # The best of what was searched on validation, see RESULTS.md.
    "best": PretrainConfig(preset="best", epochs=10),
    "elmo-small": _released("elmo-small", cells=1024, width=128, highway=1),
    "elmo-medium": _released("elmo-medium", cells=2048, width=256),
    "elmo-original": _released("elmo-original", cells=4096, width=512),
}


def pretrain(config: PretrainConfig) -> list[dict[str, Any]]:
    """Run the command; returns every epoch's record."""
    join(config.hosts)
    mesh = make_mesh(config.batch_size, config.model_parallel)
    kernel = lstm_layer(config.model, config.kernel).choose()  # before all that takes long
    portion = _portion(config) if config.dry_run else None
    with_characters = config.model.input == "characters"
    data = run_on_all(lambda: load_texts(config.data, config.corpus, with_characters, portion))
    model = BiLM(config.model, len(data.vocabulary), config.kernel)
    train = data.stream(config.corpus, config.batch_size, config.seed, config.steps_per_call)
    bounds = train.bounds if isinstance(train, BatchStream) else None
    held_out = BatchStream(
        data.held_out, config.batch_size, bounds=bounds, steps_per_call=config.steps_per_call
    )
    if data.share < 1:
        cli.say(f"estimated from the first {data.share:.2%} of the corpus:")
    parts = (data.train,) if data.held_out is data.train else (data.train, data.held_out)
    cli.describe(parts, data.vocabulary, train)
    begin, optimizer, loss_fn = _begin(config, model, data, train, mesh)
    count, devices = cli.count(begin.like().params), f"{jax.default_backend()} x {jax.device_count()}"
    cli.say(f"model: {count:,} parameters, {devices}, {kernel} LSTM")
    if config.dry_run:
        steps = config.epochs * train.steps_per_epoch / data.share
        estimate(begin(), loss_fn, optimizer, train, steps, config.seed)
        return []
    files = {VOCABULARY: data.vocabulary.text}
    about = {"texts": data.digest} | ({} if config.corpus.corpus is None else {"data": None})
    run = cli.create_run(config, config.output, monitor="perplexity", files=files, **about)
    sums_fn = jax.jit(bilm_sums(model))

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
        return record

    with cli.tensorboard(run, config.tensorboard) as on_record:
        _, records = fit(
            begin,
            loss_fn,
            optimizer,
            train,
            run,
            epochs=config.epochs,
            seed=config.seed,
            on_epoch=on_epoch,
            on_record=on_record,
            save_every=config.save_every,
        )
    run_on_first(lambda: _conclude(records, train, run.path))
    run.close()
    return records


def _conclude(records: list[dict[str, Any]], train: Stream, path: Path) -> None:
    """Draw the curves and write what the run came to."""
    report.plot_curves(records, {"loss": "training"}, path / "loss.png", "training loss (nats a token)")
    lines = {"perplexity_forward": "forward", "perplexity_backward": "backward", "perplexity": "mean"}
    report.plot_curves(records, lines, path / "perplexity.png", "held-out perplexity", log=True)
    best = min(records, key=lambda record: record["perplexity"])
    results = {name: best[name] for name in ("perplexity", "perplexity_forward", "perplexity_backward")}
    cli.write_results(path, results | {"best_epoch": best["epoch"]} | cli.speed(records, train))
    cli.say(f"best epoch {best['epoch']}: held-out perplexity {best['perplexity']:.2f}; written to {path}")


def _portion(config: PretrainConfig) -> int:
    """Tokens enough for the steps that a dry run times; more, so that its buckets are not much fewer."""
    rows = TIMED * config.steps_per_call * config.batch_size
    length = config.corpus.unroll if config.corpus.batching == "contiguous" else _SENTENCE
    return max(PORTION, rows * (length + 1))


def _begin(
    config: PretrainConfig, model: BiLM, data: Texts, train: Stream, mesh: Mesh | None
) -> tuple[Plan[TrainState], Any, LossFn]:
    """The state before the first step, the optimiser, and the task."""
    left = len(data.vocabulary) % config.model_parallel
    if left:
        raise InputError(
            f"--model-parallel {config.model_parallel} does not divide the vocabulary's "
            f"{len(data.vocabulary):,} words; leave out the rarest {left}, by --max-vocab or in --vocab"
        )
    windows, steps = config.corpus.batching == "contiguous", config.epochs * train.steps_per_epoch
    negatives = config.negatives if config.softmax == "sampled" else None
    task, optimizer = bilm_training(model, config.optimizer, steps, negatives, windows)

    def begin() -> TrainState:
        params = init_params(model, jax.random.key(config.seed))
        carry = {"state": zero_state(config.model, config.batch_size)} if windows else None
        return TrainState.create(params, optimizer, carry=carry)

    return Plan(begin, mesh, tables=bilm_tables(model)), optimizer, task


def main() -> int:
    """The command; returns its exit code."""
    return cli.run(PretrainConfig, pretrain, "experiments.pretrain", PRESETS, unread)


if __name__ == "__main__":
    sys.exit(main())
