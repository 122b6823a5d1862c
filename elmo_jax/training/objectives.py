"""Objectives of the biLM: loss functions for training, metrics for evaluation, features for other models."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from elmo_jax._moved import renamed_arguments
from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import DIRECTIONS, Batch, Window
from elmo_jax.data.characters import CHARACTERS
from elmo_jax.data.text import EOS
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM
from elmo_jax.ops.softmax import Negatives, log_uniform_negatives
from elmo_jax.parallel import all_gather
from elmo_jax.training.optimizers import Optimizer, RowSparse, make_optimizer
from elmo_jax.training.step import LossFn, MatmulBound

# Row-sparse gradients make Adam faster only on a CPU and if the vocabulary is this many times the negatives.
ROW_SPARSE_ADAM_RATIO = 32


def init_params(model: BiLM, key: Array) -> dict[str, Any]:
    """Return the initial parameters of a model of words or of characters."""
    example = replace(Batch.of([[]]), chars=np.zeros((1, 2, CHARACTERS), np.int32))
    return jax.jit(model.init)(key, example)["params"]


@renamed_arguments(rowwise="row_sparse")
def bilm_loss(model: BiLM, negatives: int | None = None, row_sparse: bool = False) -> LossFn:
    """Return the loss function of the biLM: mean -log p(next token) over both directions, with dropout.

    Args:
        model: The language model.
        negatives: Number of negative samples of the sampled softmax; None uses the full softmax.
        row_sparse: The parameters hold only the rows `bilm_rows` of each vocabulary table.

    Returns:
        A pure function ``(params, batch, key) -> (loss, metrics)``; metrics as in `BiLM.nll`.
    """

    def loss_fn(params: Any, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        used, batch, samples = _sample_softmax(model, negatives, row_sparse, batch, key)
        rngs = {"dropout": jax.random.split(key)[0]}
        metrics: Any = used.apply({"params": params}, batch, True, samples, rngs=rngs, method="nll")
        return _divide_loss(metrics)

    return MatmulBound(loss_fn) if negatives is None else loss_fn


def bilm_window_loss(model: BiLM, negatives: int | None = None, row_sparse: bool = False) -> LossFn:
    """Return `bilm_loss` for windows of a `ContiguousStream`; the LSTM state is ``params["state"]``."""

    def loss_fn(params: Any, window: Window, key: Array) -> tuple[Array, dict[str, Any]]:
        sentences = jnp.sum(window.words[0, :, 1:] == EOS).astype(jnp.float32)
        used, window, samples = _sample_softmax(model, negatives, row_sparse, window, key)
        rngs = {"dropout": jax.random.split(key)[0]}
        state, weights = params["state"], {name: p for name, p in params.items() if name != "state"}
        metrics: Any = used.apply({"params": weights}, window, state, samples, rngs=rngs, method="window_nll")
        return _divide_loss(metrics | {"words": metrics["tokens"] - sentences})

    return MatmulBound(loss_fn) if negatives is None else loss_fn


def _divide_loss(metrics: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
    """Return the mean loss per predicted token, and the metrics without the loss."""
    mean = metrics["loss"] / jnp.maximum(DIRECTIONS * metrics["tokens"], 1)
    return mean, {name: value for name, value in metrics.items() if name != "loss"}


def bilm_training(
    model: BiLM, config: OptimizerConfig, steps: int, negatives: int | None = None, windows: bool = False
) -> tuple[LossFn, Optimizer]:
    """Return the loss function of the biLM and the optimizer for it.

    With the sampled softmax, adagrad and lazy_adam are row-sparse, and so is adam where that is faster.

    Args:
        model: The language model.
        config: Optimizer and schedule.
        steps: Optimizer steps of the whole run.
        negatives: Number of negative samples; None, or at least the vocabulary, uses the full softmax.
        windows: Train on the windows of a `ContiguousStream` instead of batches of documents.

    Raises:
        InputError: lazy_adam is combined with the full softmax, which uses every row.

    Examples:
        >>> from elmo_jax import BiLMConfig
        >>> model = BiLM(BiLMConfig(embedding=4, cells=4), vocabulary=9)
        >>> loss_fn, optimizer = bilm_training(model, OptimizerConfig(), steps=100, negatives=5)
    """
    make_loss = bilm_window_loss if windows else bilm_loss
    optimizer, is_adam = make_optimizer(config, steps), config.optimizer == "adam"
    if negatives is None or negatives >= model.vocabulary:
        if config.optimizer == "lazy_adam":
            raise InputError(
                'optimizer "lazy_adam" needs the sampled softmax, with fewer negatives than the '
                f'{model.vocabulary:,} words of the vocabulary; use "adam"'
            )
        return make_loss(model), optimizer
    is_large = negatives < model.vocabulary // ROW_SPARSE_ADAM_RATIO and jax.default_backend() == "cpu"
    if is_adam and not is_large:
        return make_loss(model, negatives), optimizer
    return make_loss(model, negatives, True), RowSparse(optimizer, bilm_rows(model, negatives), dense=is_adam)


def bilm_rows(model: BiLM, negatives: int):
    """Return ``(batch, key) -> {path of a table: rows}``, the vocabulary rows of a step, for `RowSparse`.

    The rows are int32 ``[R]``, unique and ascending, filled up with V.
    """

    def find_rows(batch: Batch | Window, key: Array) -> dict[str, Array]:
        used = _find_used_words(model, batch, _sample_negatives(model, negatives, key))
        return dict.fromkeys(bilm_tables(model), used)

    return find_rows


def bilm_tables(model: BiLM) -> tuple[str, ...]:
    """Return the paths of the parameters that have one row per word of the vocabulary."""
    by_word = model.config.input == "words"
    softmax_table = () if by_word and model.config.tie else ("softmax_table",)
    return ("softmax_bias", *softmax_table, *(("embedder/table",) if by_word else ()))


def _sample_negatives(model: BiLM, negatives: int, key: Array) -> Negatives:
    return log_uniform_negatives(jax.random.split(key)[1], model.vocabulary, negatives)


def _find_used_words(model: BiLM, batch: Batch | Window, samples: Negatives) -> Array:
    """Return the unique words ``[R]`` of a batch and its negative samples, ascending, filled up with V."""
    words = jnp.concatenate([jnp.ravel(all_gather(batch.words)), samples.classes])
    ordered = jnp.sort(words)  # four times as fast as jnp.unique on a CPU
    index = jnp.cumsum(jnp.diff(ordered, prepend=ordered[:1]) != 0)
    unused = jnp.full(min(model.vocabulary, words.size), model.vocabulary, jnp.int32)
    return unused.at[index].set(ordered)


def _sample_softmax(model: BiLM, negatives: int | None, row_sparse: bool, batch: Any, key: Array):
    """Return the model, the batch and the negative samples, renumbered to the used words if row-sparse."""
    samples = None if negatives is None else _sample_negatives(model, negatives, key)
    if samples is None or not row_sparse:
        return model, batch, samples
    used = _find_used_words(model, batch, samples)
    renumber = lambda ids: jnp.searchsorted(used, ids).astype(jnp.int32)  # noqa: E731
    samples = Negatives(renumber(samples.classes), jnp.take(samples.log_expected, used, mode="clip"))
    return replace(model, vocabulary=len(used)), replace(batch, words=renumber(batch.words)), samples


def bilm_sums(model: BiLM):
    """Return the evaluation function ``(params, batch) -> metrics``: full softmax, without dropout."""

    def compute_metrics(params: Any, batch: Batch) -> dict[str, Array]:
        metrics: Any = model.apply({"params": params}, batch, method="nll")
        return {name: value for name, value in metrics.items() if name != "loss"}

    return compute_metrics


def bilm_features(model: BiLM, finetune: bool = False):
    """Return ``(params, batch, key) -> [L, B, T, F]``, which computes layers as features of another model.

    Args:
        model: The language model; its parameters are ``params["bilm"]``.
        finetune: Train the language model too, with dropout if there is a key; otherwise it gets no gradient.
    """

    def compute_layers(params: Any, batch: Batch, key: Array | None) -> Array:
        train = finetune and key is not None
        rngs: Any = {"dropout": key} if train else {}
        layers, _ = model.apply({"params": params["bilm"]}, batch, train=train, rngs=rngs)
        return layers if finetune else jax.lax.stop_gradient(layers)

    return compute_layers
