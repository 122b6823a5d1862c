"""One LSTM layer, its inputs, and its outputs and gradients by kernel."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elmo_jax.models.lstm import LSTM
from elmo_jax.ops.lstm import State, Weights
from elmo_jax.ops.lstm_pallas import on_cuda

D, B, T, I, H = 2, 3, 5, 4, 6  # noqa: E741


LENGTHS = jnp.array([5, 2, 0], jnp.int32)


needs_cuda = pytest.mark.skipif(not on_cuda(), reason="there is no CUDA device here")


@cache
def layer_and_inputs():
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (D, B, T, I))
    params = LSTM(H, kernel="plain").init(keys[1], x, LENGTHS)["params"]
    params["bias"] = jax.random.normal(keys[2], params["bias"].shape)
    state = State(*(jax.random.normal(k, (D, B, H)) for k in jax.random.split(keys[3])))
    return params, x, state


def outputs_and_gradients(kernel, lengths, **settings):
    """Real steps' h, the last states, and the gradients of parameters, input and first state."""
    real = (jnp.arange(T, dtype=jnp.int32)[None] < lengths[:, None])[None, :, :, None]

    def loss(params, x, state):
        h, last = LSTM(H, kernel=kernel, **settings).apply({"params": params}, x, lengths, state)
        h = jnp.where(real, h, 0)
        weight = jnp.cos(jnp.arange(h.size, dtype=jnp.float32)).reshape(h.shape)
        return jnp.sum(weight * h**2) + jnp.sum(jnp.sin(last.c)) + jnp.sum(last.h**2), (h, last)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*layer_and_inputs())


def close(a, b, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), a, b)


def given(rows, cells, directions=D, steps=T):
    """The first state, the gates and the weights; and gradients of the states."""
    keys = jax.random.split(jax.random.key(1), 6)
    gates = jax.random.normal(keys[0], (directions, rows, steps, 4 * cells))
    state = State(*(jax.random.normal(key, (directions, rows, cells)) for key in keys[1:3]))
    recurrent = jax.random.normal(keys[3], (directions, cells, 4 * cells)) * cells**-0.5
    w = Weights(recurrent, jax.random.normal(keys[4], (directions, 4 * cells)), None)
    return (state, gates, w), State(*jax.random.normal(keys[5], (2, directions, rows, steps, cells)))
