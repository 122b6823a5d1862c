"""Learning rate schedules and clipping."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from elmo_jax.config import OptimizerConfig
from elmo_jax.training.optimizers import clip_by_global_norm, make_optimizer

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("name", ["adam", "adagrad"])
def test_learning_rate_warms_up_and_decays(schedule, name):
    config = OptimizerConfig(name, 0.1, schedule, warmup=0.2, clip_norm=1e9)
    optimizer = make_optimizer(config, 20)
    params, sizes = jnp.zeros(()), []
    state = optimizer.init(params)
    for _ in range(20):
        update, state = optimizer.update(jnp.ones(()), state, params)
        sizes.append(abs(float(update)))
    if name == "adam":  # whose update of a constant gradient is the learning rate
        np.testing.assert_allclose(sizes[:5], [0.025, 0.05, 0.075, 0.1, 0.1], rtol=1e-3)
        assert sizes[-1] == pytest.approx(0.1, rel=1e-3) if schedule == "constant" else sizes[-1] < 0.02
    assert sizes[0] < sizes[2]


def test_gradients_are_clipped_by_their_global_norm():
    optimizer = make_optimizer(OptimizerConfig("adagrad", 1.0, "constant", 0.0, clip_norm=1.0), 10)
    params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    g = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([0.0, 4.0])}
    update, _ = optimizer.update(g, optimizer.init(params), params)
    want = {"a": 0.6, "b": 0.8}  # of norm 1, over the root of the accumulator
    np.testing.assert_allclose(update["a"][0], -want["a"] / np.sqrt(1 + want["a"] ** 2), rtol=1e-4)
    np.testing.assert_allclose(update["b"][1], -want["b"] / np.sqrt(1 + want["b"] ** 2), rtol=1e-4)


@pytest.mark.parametrize("most", [0.5, 100.0, np.inf])
@pytest.mark.parametrize("scale", [0.0, 1e15, np.nan])
def test_clipping_equals_optax(most, scale):
    gradients = {"a": scale * jnp.array([3.0, 0.5]), "b": scale * jnp.array([-4.0], jnp.bfloat16)}
    got, want = (
        clip.update(gradients, clip.init(gradients))[0]
        for clip in (clip_by_global_norm(most), optax.clip_by_global_norm(most))
    )
    for name, g in gradients.items():
        assert got[name].dtype == g.dtype
        np.testing.assert_allclose(
            got[name].astype(float), want[name].astype(float), rtol=1e-2 if name == "b" else 1e-6
        )


def test_clipping_keeps_gradients_that_are_not_finite():
    clip = clip_by_global_norm(1.0)
    assert not np.isfinite(clip.update({"a": jnp.array([1.0, np.inf])}, clip.init({}))[0]["a"]).all()
