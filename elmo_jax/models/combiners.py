"""Ways to make one vector a token of the layers of a bidirectional language model.

A combiner is a Flax module ``[L, B, T, F] -> [B, T, F]``, chosen by name from `COMBINERS`.
A new one is a class here and a line there.
Axes: L layers, B batch, T time, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from elmo_jax.config import CombinerConfig
from elmo_jax.errors import InputError

_EPSILON = 1e-6  # of the layer norm


class OneLayer(nn.Module):
    """The only layer as it is, for vectors that know no context.

    Example:
        >>> OneLayer().apply({}, jnp.ones((1, 2, 3, 4))).shape
        (2, 3, 4)
    """

    @nn.compact
    def __call__(self, layers: Array) -> Array:
        return layers[0]

    def lambdas(self, params: Any) -> None:
        """None: there is nothing to weigh."""


class ScalarMix(nn.Module):
    """sum_j λ_j h_j with trained λ; with normalize="softmax", γ sum_j softmax(w)_j h_j.

    The second is equation 1 of Peters et al. (2018); w begins at 0 and γ at 1. The raw λ
    begin at 1 / L, so that both begin as the mean of the layers.

    Example:
        >>> layers = jnp.stack([jnp.zeros((1, 2, 4)), jnp.ones((1, 2, 4))])
        >>> mixed, _ = ScalarMix().init_with_output(jax.random.key(0), layers)
        >>> mixed.shape, float(mixed[0, 0, 0])
        ((1, 2, 4), 0.5)
    """

    config: CombinerConfig = CombinerConfig()

    @nn.compact
    def __call__(self, layers: Array) -> Array:
        n = layers.shape[0]
        if self.config.normalize == "none":
            params = {"weights": self.param("weights", nn.initializers.constant(1 / n), (n,))}
        else:
            params = {
                "weights": self.param("weights", nn.initializers.zeros, (n,)),
                "gamma": self.param("gamma", nn.initializers.ones, ()),
            }
        return _weighted(self.lambdas(params), layers, self.config)

    def lambdas(self, params: Any) -> Array:
        """The weight of each layer ``[L]``, γ included."""
        weights = jnp.asarray(params["weights"])
        return weights if self.config.normalize == "none" else params["gamma"] * jax.nn.softmax(weights)


class FrozenMix(nn.Module):
    """sum_j λ_j h_j with λ drawn once from a standard normal and never trained.

    Example:
        >>> layers = jnp.ones((3, 1, 2, 4))
        >>> params = FrozenMix().init(jax.random.key(0), layers)
        >>> gradient = jax.grad(lambda p: FrozenMix().apply(p, layers).sum())(params)
        >>> float(abs(gradient["params"]["weights"]).sum())
        0.0
    """

    config: CombinerConfig = CombinerConfig()

    @nn.compact
    def __call__(self, layers: Array) -> Array:
        weights = self.param("weights", nn.initializers.normal(1.0), (layers.shape[0],))
        return _weighted(jax.lax.stop_gradient(weights), layers, self.config)

    def lambdas(self, params: Any) -> Array:
        """The weight of each layer ``[L]``."""
        return jnp.asarray(params["weights"])


class LearnedFunction(nn.Module):
    """activation([h_0; h_1; …] W + b): all layers of a token side by side, L F to F.

    Example:
        >>> mixed, _ = LearnedFunction().init_with_output(jax.random.key(0), jnp.ones((3, 1, 2, 4)))
        >>> mixed.shape
        (1, 2, 4)
    """

    config: CombinerConfig = CombinerConfig()

    @nn.compact
    def __call__(self, layers: Array) -> Array:
        n, *shape, features = layers.shape
        beside = jnp.moveaxis(layers, 0, -2).reshape(*shape, n * features)  # [B, T, L F]
        y = nn.Dense(features, dtype=layers.dtype, name="linear")(beside)
        return nn.relu(y) if self.config.activation == "relu" else jnp.tanh(y)

    def lambdas(self, params: Any) -> None:
        """None: the layers have no weight of their own here."""


@dataclass(frozen=True)
class Mix:
    """A scalar mix that was trained, for layers that have left the device.

    Example:
        >>> Mix([0.5, 2.0]).of(np.ones((2, 1, 3), np.float32)).tolist()
        [[2.5, 2.5, 2.5]]

    Attributes:
        weights: of each layer, γ included.
        layer_norm: as in `CombinerConfig`.
    """

    weights: Sequence[float]
    layer_norm: bool = False

    def of(self, layers: np.ndarray) -> np.ndarray:
        """``[L, tokens, F]`` to ``[tokens, F]``."""
        if self.layer_norm:
            layers = layers - layers.mean(-1, keepdims=True)
            layers = layers / np.sqrt(np.square(layers).mean(-1, keepdims=True) + _EPSILON)
        return np.einsum("l,ltf->tf", self.weights, layers)


def _weighted(weights: Array, layers: Array, config: CombinerConfig) -> Array:
    if config.layer_norm:  # a token at a time, so that a vector hangs on its own sentence alone
        layers = jax.nn.standardize(layers, axis=-1, epsilon=_EPSILON)
    return jnp.tensordot(weights.astype(layers.dtype), layers, axes=1)


COMBINERS: dict[str, Any] = {"trainable": ScalarMix, "frozen": FrozenMix, "function": LearnedFunction}
# What each of these reads of its configuration; one that is not here may read all.
READS = {"trainable": {"normalize", "layer_norm"}, "frozen": {"layer_norm"}, "function": {"activation"}}


def make_combiner(config: CombinerConfig) -> Any:
    """The combiner that `config` names.

    Raises:
        InputError: there is none of that name.
    """
    if config.combiner not in COMBINERS:
        raise InputError(f"--combiner {config.combiner} is none of {', '.join(COMBINERS)}; give one of them")
    return COMBINERS[config.combiner](config)
