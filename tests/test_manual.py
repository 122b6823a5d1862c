"""Losses and layers inside a caller's `jax.shard_map`, where JAX watches what differs between devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from elmo_jax.bilm import BiLM, BiLMConfig
from elmo_jax.data import Batch
from elmo_jax.lstm import LSTM
from elmo_jax.negatives import log_uniform_negatives
from elmo_jax.softmax import full_nll, sampled_nll
from elmo_jax.tasks import bilm_loss, init_params

ROWS, WHOLE = PartitionSpec("d"), PartitionSpec()


def check(value, whole, rows):
    """The value of all rows, and its gradients, are the same where a device has them, and JAX agrees."""
    mesh = jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))
    own = jax.shard_map(
        lambda whole, rows: jax.lax.psum(value(whole, rows), "d"),
        mesh=mesh,
        in_specs=(WHOLE, ROWS),
        out_specs=WHOLE,
    )
    got, want = (jax.jit(jax.value_and_grad(f))(whole, rows) for f in (own, value))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), got, want)


@pytest.mark.parametrize("negatives", [None, 5])
def test_losses(negatives, rng):
    draw = None if negatives is None else log_uniform_negatives(jax.random.key(0), 11, negatives)

    def value(whole, rows):
        if draw is None:
            return full_nll(rows[0], *whole, *rows[1:])[0]
        return sampled_nll(rows[0], *whole, *rows[1:], draw)[0]

    floats = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((11, 3), (11,), (6, 3))]
    targets = jnp.asarray(rng.integers(0, 11, 6), jnp.int32)
    check(value, tuple(floats[:2]), (floats[2], targets, jnp.ones(6)))


@pytest.mark.parametrize("kernel", ["fast", "plain"])
def test_layers(kernel, rng):
    layer, lengths = LSTM(3, kernel=kernel), jnp.array([4, 0, 2], jnp.int32)
    x = jnp.asarray(rng.normal(size=(3, 2, 4, 5)), jnp.float32)  # rows first, to be shared out
    params = layer.init(jax.random.key(0), x.swapaxes(0, 1), lengths)

    def value(whole, rows):
        h, state = layer.apply(whole, rows[0].swapaxes(0, 1), rows[1])
        return jnp.sum(h**2) + jnp.sum(state.c)

    check(value, params, (x, lengths))


@pytest.mark.parametrize("negatives", [None, 5])
def test_the_language_model(negatives):
    model = BiLM(BiLMConfig(embedding=3, cells=3, layers=1, dropout=0.0), 11)
    batch = jax.tree.map(jnp.asarray, Batch.of([[5, 6, 7], [8]]))
    task = bilm_loss(model, negatives)
    check(lambda p, b: task(p, b, jax.random.key(1))[0], init_params(model, jax.random.key(0)), batch)
