"""Combiners against their equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elmo_jax.models.combiners import COMBINER_OPTIONS, COMBINERS, CombinerConfig, make_combiner

LAYERS = jax.random.normal(jax.random.key(0), (3, 2, 4, 6))
X = np.asarray(LAYERS, np.float64)


def run(params=None, **config):
    combiner = make_combiner(CombinerConfig(**config))
    params = params or combiner.init(jax.random.key(1), LAYERS)["params"]
    return combiner, params, np.asarray(combiner.apply({"params": params}, LAYERS), np.float64)


def test_trainable_is_the_weighted_sum_with_gradient():
    weights = jnp.array([0.2, -1.0, 3.0])
    combiner, _, y = run({"weights": weights})
    np.testing.assert_allclose(y, sum(w * x for w, x in zip(weights.tolist(), X, strict=True)), atol=1e-5)
    np.testing.assert_array_equal(combiner.lambdas({"weights": weights}), weights)
    g = jax.grad(lambda w: combiner.apply({"params": {"weights": w}}, LAYERS).sum())(weights)
    np.testing.assert_allclose(g, X.sum((1, 2, 3)), rtol=1e-4, atol=1e-4)


def test_softmax_normalized_is_equation_1_of_the_paper():
    w, gamma = np.array([0.2, -1.0, 3.0]), 1.7
    params = {"weights": jnp.float32(w), "gamma": jnp.float32(gamma)}
    combiner, _, y = run(params, normalize="softmax")
    s = gamma * np.exp(w) / np.exp(w).sum()
    np.testing.assert_allclose(y, np.tensordot(s, X, 1), atol=1e-5)
    np.testing.assert_allclose(combiner.lambdas(params), s, rtol=1e-5)


@pytest.mark.parametrize("normalize", ["none", "softmax"])
def test_training_starts_at_the_mean(normalize):
    np.testing.assert_allclose(run(normalize=normalize)[2], X.mean(0), atol=1e-6)


def test_frozen_weights_depend_on_the_seed_and_have_no_gradient():
    combiner, params, y = run(combiner="frozen")
    weights = np.asarray(combiner.lambdas(params), np.float64)
    np.testing.assert_allclose(y, np.tensordot(weights, X, 1), atol=1e-5)
    again = combiner.init(jax.random.key(1), LAYERS)["params"]["weights"]
    other = combiner.init(jax.random.key(2), LAYERS)["params"]["weights"]
    np.testing.assert_array_equal(again, params["weights"])
    assert not np.array_equal(other, params["weights"])
    g = jax.grad(lambda p: combiner.apply({"params": p}, LAYERS).sum())(params)
    assert not np.any(g["weights"])


@pytest.mark.parametrize("combiner", ["trainable", "frozen"])
def test_layer_norm_normalizes_each_token(combiner):
    weights = jnp.array([0.2, -1.0, 3.0])
    _, _, y = run({"weights": weights}, combiner=combiner, layer_norm=True)
    normed = (X - X.mean(-1, keepdims=True)) / X.std(-1, keepdims=True)
    np.testing.assert_allclose(y, np.tensordot(np.asarray(weights, np.float64), normed, 1), atol=1e-4)


@pytest.mark.parametrize(("activation", "f"), [("relu", lambda x: np.maximum(x, 0)), ("tanh", np.tanh)])
def test_function_is_a_dense_layer_over_all_layers(activation, f):
    combiner, params, y = run(combiner="function", activation=activation)
    concatenated = np.concatenate(list(X), axis=-1)
    w, b = (np.asarray(params["linear"][n], np.float64) for n in ("kernel", "bias"))
    assert w.shape == (18, 6)
    np.testing.assert_allclose(y, f(concatenated @ w + b), atol=1e-5)
    assert combiner.lambdas(params) is None


def test_combiner_options_are_those_that_change_the_combiner():
    others = {"normalize": "softmax", "layer_norm": True, "activation": "tanh"}
    for name in COMBINERS:
        (_, weights, plain), used = run(combiner=name), set()
        for key, value in others.items():
            _, params, y = run(combiner=name, **{key: value})
            if params.keys() != weights.keys() or y.tolist() != plain.tolist():
                used.add(key)
        assert used == COMBINER_OPTIONS[name]
