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

from elmo_jax.bilm import BiLM
from elmo_jax.characters import CHARACTERS
from elmo_jax.contiguous import Window
from elmo_jax.data import DIRECTIONS, Batch


def init_params(model: BiLM, key: Array) -> dict[str, Any]:
    """The parameters before training, whether the model reads words or characters."""
    example = replace(Batch.of([[]]), chars=np.zeros((1, 2, CHARACTERS), np.int32))
    return jax.jit(model.init)(key, example)["params"]


def bilm_loss(model: BiLM, negatives: int | None = None):
    """The pre-training task: mean -log p a token, both directions, with dropout.

    Args:
        model: the language model.
        negatives: of the sampled softmax; None is the full one.

    Returns:
        A pure ``(params, batch, key) -> (loss, sums)``.
    """

    def loss(params: Any, batch: Batch, key: Array) -> tuple[Array, dict[str, Array]]:
        dropout, draw = jax.random.split(key)
        rngs = {"dropout": dropout, "negatives": draw}
        sums: Any = model.apply({"params": params}, batch, True, negatives, rngs=rngs, method="nll")
        total = sums.pop("loss")
        return total / jnp.maximum(DIRECTIONS * sums["tokens"], 1), sums

    return loss


def bilm_window_loss(model: BiLM, negatives: int | None = None):
    """`bilm_loss` over the windows of a `ContiguousStream`; the carried ``state`` is among params."""

    def loss(params: Any, window: Window, key: Array) -> tuple[Array, dict[str, Any]]:
        dropout, draw = jax.random.split(key)
        rngs = {"dropout": dropout, "negatives": draw}
        state, weights = params["state"], {n: p for n, p in params.items() if n != "state"}
        sums: Any = model.apply({"params": weights}, window, state, negatives, rngs=rngs, method="window_nll")
        total = sums.pop("loss")
        return total / jnp.maximum(DIRECTIONS * sums["tokens"], 1), sums

    return loss


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
