"""The biLM's parameters before training, and it as a task: to train, to measure, to build on.

Nouns: a *task* is a pure function of parameters and a batch, as `fit` and `evaluate` take it.
Axes: B batch, T time, L layers, F features, C characters.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

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

FEW = 32  # Adam goes by rows on a CPU where no more than one of so many classes is drawn


def init_params(model: BiLM, key: Array) -> dict[str, Any]:
    """The parameters before training, whether the model reads words or characters."""
    example = replace(Batch.of([[]]), chars=np.zeros((1, 2, CHARACTERS), np.int32))
    return jax.jit(model.init)(key, example)["params"]


def bilm_loss(model: BiLM, negatives: int | None = None, rowwise: bool = False):
    """The pre-training task: mean -log p a token, both directions, with dropout.

    Args:
        model: the language model.
        negatives: of the sampled softmax; None is the full one.
        rowwise: whether the tables among the parameters are but the rows of `bilm_rows`.

    Returns:
        A pure ``(params, batch, key) -> (loss, sums)``.
    """

    def loss(params: Any, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        small, batch, draw = _prepare(model, negatives, rowwise, batch, key)
        rngs = {"dropout": jax.random.split(key)[0]}
        sums: Any = small.apply({"params": params}, batch, True, draw, rngs=rngs, method="nll")
        return _a_token(sums)

    return MatmulBound(loss) if negatives is None else loss


def bilm_window_loss(model: BiLM, negatives: int | None = None, rowwise: bool = False):
    """`bilm_loss` over the windows of a `ContiguousStream`; the carried ``state`` is among params."""

    def loss(params: Any, window: Window, key: Array) -> tuple[Array, dict[str, Any]]:
        ends = jnp.sum(window.words[0, :, 1:] == EOS).astype(jnp.float32)
        small, window, draw = _prepare(model, negatives, rowwise, window, key)
        rngs = {"dropout": jax.random.split(key)[0]}
        state, weights = params["state"], {n: p for n, p in params.items() if n != "state"}
        sums: Any = small.apply({"params": weights}, window, state, draw, rngs=rngs, method="window_nll")
        return _a_token(sums | {"words": sums["tokens"] - ends})

    return MatmulBound(loss) if negatives is None else loss


def _a_token(sums: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
    """The mean loss, which is to fall, and the other sums."""
    mean = sums["loss"] / jnp.maximum(DIRECTIONS * sums["tokens"], 1)
    return mean, {name: value for name, value in sums.items() if name != "loss"}


def bilm_training(
    model: BiLM, config: OptimizerConfig, steps: int, negatives: int | None = None, windows: bool = False
) -> tuple[LossFn, Optimizer]:
    """The pre-training task, and the optimiser for it.

    With a sampled softmax both go by the rows of the tables that a step touches. Adam does so on
    a CPU alone, and where they are few, for it is only faster by it: its results are the same
    either way but for rounding.

    Args:
        model: the language model.
        config: of the optimiser.
        steps: of the run.
        negatives: of the sampled softmax; None, or as many as there are classes, is the full one.
        windows: whether batches are the windows of a `ContiguousStream`.

    Returns:
        The task, and the optimiser for `TrainState.create`, `train_step` and `fit`.

    Raises:
        InputError: lazy_adam is asked for with the full softmax, which touches every row.
    """
    loss = bilm_window_loss if windows else bilm_loss
    optimizer, adam = make_optimizer(config, steps), config.optimizer == "adam"
    if negatives is None or negatives >= model.vocabulary:
        if config.optimizer == "lazy_adam":
            raise InputError(
                "--optimizer lazy_adam needs the sampled softmax, with fewer --negatives than the "
                f"vocabulary's {model.vocabulary:,} words; else give --optimizer adam"
            )
        return loss(model), optimizer
    if adam and (negatives >= model.vocabulary // FEW or jax.default_backend() != "cpu"):
        return loss(model, negatives), optimizer
    return loss(model, negatives, rowwise=True), RowSparse(optimizer, bilm_rows(model, negatives), dense=adam)


def bilm_rows(model: BiLM, negatives: int):
    """The rows of the model's tables that a step of the sampled softmax touches, for `RowSparse`.

    Args:
        model: the language model.
        negatives: of the sampled softmax.

    Returns:
        ``(batch, key) -> {path of a table: its rows}``, the rows ``[R]`` int32 rising, each
        once; the places left over hold V.
    """

    def rows(batch: Batch | Window, key: Array) -> dict[str, Array]:
        used = _used(model, batch, _draw(model, negatives, key))
        return dict.fromkeys(bilm_tables(model), used)

    return rows


def bilm_tables(model: BiLM) -> tuple[str, ...]:
    """The paths of the parameters that have a row a word of the vocabulary."""
    by_word = model.config.input == "words"
    table = ("softmax_table",) * (not (by_word and model.config.tie))
    return ("softmax_bias", *table, *("embedder/table",) * by_word)


def _draw(model: BiLM, negatives: int, key: Array) -> Negatives:
    return log_uniform_negatives(jax.random.split(key)[1], model.vocabulary, negatives)


def _used(model: BiLM, batch: Batch | Window, draw: Negatives) -> Array:
    """The words of a batch and of a draw, ``[R]``, each once."""
    words = jnp.concatenate([jnp.ravel(all_gather(batch.words)), draw.classes])
    ordered = jnp.sort(words)  # by hand, for jnp.unique takes four times as long on a CPU
    place = jnp.cumsum(jnp.diff(ordered, prepend=ordered[:1]) != 0)
    left = jnp.full(min(model.vocabulary, words.size), model.vocabulary, jnp.int32)
    return left.at[place].set(ordered)


def _prepare(model: BiLM, negatives: int | None, rowwise: bool, batch: Any, key: Array):
    """The model, the batch and the draw; rowwise, in terms of a vocabulary of the used words alone."""
    if negatives is None:
        return model, batch, None
    draw = _draw(model, negatives, key)
    if not rowwise:
        return model, batch, draw
    used = _used(model, batch, draw)
    place = lambda ids: jnp.searchsorted(used, ids).astype(jnp.int32)  # noqa: E731
    draw = Negatives(place(draw.classes), jnp.take(draw.log_expected, used, mode="clip"))
    return replace(model, vocabulary=len(used)), replace(batch, words=place(batch.words)), draw


def bilm_sums(model: BiLM):
    """The evaluation task: the same sums without dropout and with the full softmax."""

    def sums(params: Any, batch: Batch) -> dict[str, Array]:
        sums: Any = model.apply({"params": params}, batch, method="nll")
        return {name: value for name, value in sums.items() if name != "loss"}

    return sums


def bilm_features(model: BiLM, finetune: bool = False):
    """Layer states as features of another task; the language model's parameters are "bilm".

    Args:
        model: the language model.
        finetune: whether it trains along, with its dropout; if not, no gradient reaches it.

    Returns:
        ``(params, batch, key) -> [L, B, T, F]``; no key, no dropout.
    """

    def features(params: Any, batch: Batch, key: Array | None) -> Array:
        train = finetune and key is not None
        rngs: Any = {"dropout": key} if train else {}
        layers, _ = model.apply({"params": params["bilm"]}, batch, train=train, rngs=rngs)
        return layers if finetune else jax.lax.stop_gradient(layers)

    return features
