"""Combiners that mix the layers of a biLM into one vector per token.

A combiner is a Linen module ``[L, B, T, F] -> [B, T, F]``. To add one, add its class to `COMBINERS`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from elmo_jax.config import CombinerConfig
from elmo_jax.errors import InputError

_LAYER_NORM_EPSILON = 1e-6


class OneLayer(nn.Module):
    """Combiner of features that have a single layer, which it returns.

    Examples:
        >>> OneLayer().apply({}, jnp.ones((1, 2, 3, 4))).shape
        (2, 3, 4)
    """

    def __call__(self, layers: Array) -> Array:
        return layers[0]

    def lambdas(self, params: Any) -> None:
        """Return None: there are no layer weights."""


class ScalarMix(nn.Module):
    """Weighted sum of the layers with trained weights (Peters et al. 2018, equation 1).

    With ``normalize="softmax"`` it is γ Σ_j s_j h_j, s = softmax(w), where w starts at 0 and γ at 1; without,
    Σ_j λ_j h_j, where λ starts at 1 / L. Both start as the mean of the layers.

    Examples:
        >>> layers = jnp.stack([jnp.zeros((1, 2, 4)), jnp.ones((1, 2, 4))])
        >>> mixed, _ = ScalarMix().init_with_output(jax.random.key(0), layers)
        >>> mixed.shape, float(mixed[0, 0, 0])
        ((1, 2, 4), 0.5)
    """

    config: CombinerConfig = CombinerConfig()

    @nn.compact
    def __call__(self, layers: Array) -> Array:
        n, raw = layers.shape[0], self.config.normalize == "none"
        init = nn.initializers.constant(1 / n) if raw else nn.initializers.zeros
        params = {"weights": self.param("weights", init, (n,))}
        if not raw:
            params["gamma"] = self.param("gamma", nn.initializers.ones, ())
        return _mix(self.lambdas(params), layers, self.config)

    def lambdas(self, params: Any) -> Array:
        """Return the weight of each layer ``[L]``, γ included."""
        weights = jnp.asarray(params["weights"])
        return weights if self.config.normalize == "none" else params["gamma"] * jax.nn.softmax(weights)


class FrozenMix(nn.Module):
    """Weighted sum Σ_j λ_j h_j, with λ sampled once from a standard normal distribution and not trained.

    Examples:
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
        return _mix(jax.lax.stop_gradient(weights), layers, self.config)

    def lambdas(self, params: Any) -> Array:
        """Return the weight of each layer ``[L]``."""
        return jnp.asarray(params["weights"])


class LearnedFunction(nn.Module):
    """Dense layer over the concatenated layers of a token: activation([h_0; h_1; …] W + b).

    Examples:
        >>> mixed, _ = LearnedFunction().init_with_output(jax.random.key(0), jnp.ones((3, 1, 2, 4)))
        >>> mixed.shape
        (1, 2, 4)
    """

    config: CombinerConfig = CombinerConfig()

    @nn.compact
    def __call__(self, layers: Array) -> Array:
        n, *shape, features = layers.shape
        concatenated = jnp.moveaxis(layers, 0, -2).reshape(*shape, n * features)  # [B, T, L F]
        y = nn.Dense(features, dtype=layers.dtype, name="linear")(concatenated)
        return nn.relu(y) if self.config.activation == "relu" else jnp.tanh(y)

    def lambdas(self, params: Any) -> None:
        """Return None: there are no layer weights."""


def _mix(weights: Array, layers: Array, config: CombinerConfig) -> Array:
    """Return Σ_j weights_j layers_j, after layer normalization if it is configured."""
    # Normalized over the features alone, so that a token's vector depends only on its sentence.
    if config.layer_norm:
        layers = jax.nn.standardize(layers, axis=-1, epsilon=_LAYER_NORM_EPSILON)
    return jnp.tensordot(weights.astype(layers.dtype), layers, axes=1)


COMBINERS: dict[str, Any] = {"trainable": ScalarMix, "frozen": FrozenMix, "function": LearnedFunction}
# Fields of CombinerConfig that each of these combiners uses.
COMBINER_OPTIONS = {
    "trainable": {"normalize", "layer_norm"},
    "frozen": {"layer_norm"},
    "function": {"activation"},
}


def make_combiner(config: CombinerConfig) -> Any:
    """Return the combiner named by `config`.

    Raises:
        InputError: `COMBINERS` has no such name.
    """
    if config.combiner not in COMBINERS:
        raise InputError(f'combiner "{config.combiner}" is unknown; use one of {", ".join(COMBINERS)}')
    return COMBINERS[config.combiner](config)


@dataclass(frozen=True)
class Mix:
    """Trained scalar mix in NumPy, for layers on the host.

    Attributes:
        weights: Weight of each layer, γ included.
        layer_norm: As in `CombinerConfig`.
        statistics: "mean" and "scale" ``[L, F]`` that standardize the layers first; None does not.

    Examples:
        >>> Mix([0.5, 2.0]).apply(np.ones((2, 1, 3), np.float32)).tolist()
        [[2.5, 2.5, 2.5]]
    """

    weights: Sequence[float]
    layer_norm: bool = False
    statistics: Mapping[str, Any] | None = None

    def apply(self, layers: np.ndarray) -> np.ndarray:
        """Mix layers ``[L, tokens, F]`` into ``[tokens, F]``."""
        if self.statistics is not None:
            mean, scale = (np.asarray(self.statistics[name])[:, None] for name in ("mean", "scale"))
            layers = (layers - mean) * scale
        if self.layer_norm:
            layers = layers - layers.mean(-1, keepdims=True)
            layers = layers / np.sqrt(np.square(layers).mean(-1, keepdims=True) + _LAYER_NORM_EPSILON)
        return np.einsum("l,ltf->tf", self.weights, layers)
