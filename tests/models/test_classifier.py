from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from reference import log_softmax, lstm as oracle, tree64

from elmo_jax.data.batching import Batch
from elmo_jax.data.characters import character_id_table
from elmo_jax.data.text import SPECIAL, UNK
from elmo_jax.models.classifier import (
    BiLSTMClassifier,
    ClassifierConfig,
    _drop_words,
    classifier_loss,
    classify,
    static_features,
)
from elmo_jax.models.combiners import CombinerConfig, OneLayer, make_combiner

X = jax.random.normal(jax.random.key(0), (3, 5, 4))
LENGTHS = jnp.array([5, 2, 1])


def make(**more):
    model = BiLSTMClassifier(ClassifierConfig(hidden=3, classifier_dropout=0.0, **more), classes=4)
    return model, jax.jit(model.init)(jax.random.key(1), X, LENGTHS)["params"]


@pytest.mark.parametrize("pooling", ["mean", "max", "mean+max+attention"])
def test_logits_are_the_oracles(pooling):
    model, params = make(pooling=pooling)
    logits = model.apply({"params": params}, X, LENGTHS)
    p = tree64(params)
    for b, n in enumerate(LENGTHS.tolist()):
        x = np.asarray(X[b, :n], np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = x * p["norm"]["scale"] + p["norm"]["bias"]
        for layer in ("lstm_0", "lstm_1"):
            w = p[layer]
            halves = [
                oracle(read, w["input_kernel"][d], w["recurrent_kernel"][d], w["bias"][d])[1]
                for d, read in enumerate((x, x[::-1]))
            ]
            x = np.concatenate([halves[0], halves[1][::-1]], -1)
        pooled = [x.mean(0)] * ("mean" in pooling) + [x.max(0)] * ("max" in pooling)
        if "attention" in pooling:
            scores = (x @ p["attention"]["kernel"] + p["attention"]["bias"])[:, 0]
            pooled.append(np.exp(log_softmax(scores)) @ x)
        v = np.concatenate(pooled)
        v = np.maximum(v @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
        np.testing.assert_allclose(logits[b], v @ p["logits"]["kernel"] + p["logits"]["bias"], atol=1e-5)


def test_padding_changes_nothing():
    model, params = make(pooling="mean+max+attention")
    padded = jnp.pad(X, [(0, 1), (0, 7), (0, 0)], constant_values=9.0)
    wide = model.apply({"params": params}, padded, jnp.array([5, 2, 1, 0]))
    np.testing.assert_allclose(wide[:3], model.apply({"params": params}, X, LENGTHS), atol=1e-6)
    assert np.isfinite(wide).all()


def test_loss_counts_documents_without_fillers_and_their_markers():
    model, head = make()
    combiner = make_combiner(CombinerConfig())
    docs, labels = [[4, 5, 6], [7]], [3, 1]
    table = jax.random.normal(jax.random.key(2), (2, 8, 4))  # two "layers" of word vectors
    features = lambda params, batch, key: table[:, batch.words]  # noqa: E731
    params = {"combiner": {"weights": jnp.array([1.0, 2.0])}, "classifier": head}
    loss, sums = classifier_loss(features, combiner, model)(params, Batch.of(docs, labels, (3, 9)), None)
    x = jnp.tensordot(jnp.array([1.0, 2.0]), table, 1)[Batch.of(docs).words[:, 1:-1]]
    logits = model.apply({"params": head}, x, jnp.array([3, 1]))
    each = -log_softmax(np.asarray(logits, np.float64))[[0, 1], labels]
    np.testing.assert_allclose(loss, each.mean(), rtol=1e-5)
    assert sums["documents"] == 2
    want = np.zeros((4, 4))
    for label, predicted in zip(labels, logits.argmax(-1).tolist(), strict=True):
        want[label, predicted] += 1
    np.testing.assert_array_equal(sums["confusion"], want)


class Echo:
    """In place of a classifier: the feature itself is the logit."""

    def __init__(self, **config):
        self.config, self.classes = ClassifierConfig(**config), 3

    def apply(self, variables, x, lengths, train, rngs):
        return x[:, :, 0]


def test_smoothed_labels_are_for_training_alone():
    def loss(label, key=None, **config):
        features = lambda params, batch, key: jnp.arange(5.0)[None, None, :, None]  # noqa: E731
        fn = classifier_loss(features, OneLayer(), Echo(**config))
        return float(fn({"combiner": {}, "classifier": {}}, Batch.of([[4, 5, 6]], [label]), key)[0])

    key = jax.random.key(0)
    assert loss(2, label_smoothing=0.2) == loss(2) == loss(2, key)
    even = sum(loss(label) for label in range(3)) / 3
    assert loss(2, key, label_smoothing=0.2) == pytest.approx(0.8 * loss(2) + 0.2 * even, rel=1e-5)


def test_hidden_words_are_unknown_in_training_alone():
    seen = []

    def features(params, batch, key):
        seen.append(np.asarray(batch.words))
        return jnp.zeros((1, *batch.words.shape, 1))

    batch = Batch.of([[4, 5, 6], [7]])
    for key in (None, *jax.random.split(jax.random.key(0), 20)):
        classify({"combiner": {}, "classifier": {}}, batch, key, features, OneLayer(), Echo(word_dropout=0.5))
    np.testing.assert_array_equal(seen[0], batch.words)
    words = np.stack(seen[1:])
    hidden = words != batch.words
    assert (words[hidden] == UNK).all()
    assert not hidden[:, batch.words <= UNK].any()
    assert 0.2 < hidden[:, batch.words > UNK].mean() < 0.8


def test_hidden_words_are_spelled_as_the_unknown_one():
    with_characters = character_id_table([*SPECIAL, "goal", "rate", "bank", "unheard"])
    ids = np.array([4, 5, 7, 6, 4, 7])  # the last type has a spelling, but is no class
    plain = Batch.of([np.where(ids < 7, ids, UNK)], [1])
    batch = replace(plain, chars=with_characters[Batch.of([ids]).words], unique_words="of the words before")
    unknown, hidden = with_characters[UNK], np.zeros(plain.words.shape, bool)
    for key in jax.random.split(jax.random.key(0), 20):
        after = _drop_words(batch, key, 0.5)
        words, chars = np.asarray(after.words), np.asarray(after.chars)
        assert after.unique_words is None
        now = (chars == unknown).all(-1)
        np.testing.assert_array_equal(chars[~now], batch.chars[~now])
        assert (words[now] == UNK).all() and (words[~now] == plain.words[~now]).all()
        hidden |= now
    np.testing.assert_array_equal(hidden, plain.words >= UNK)  # in one draw or another


def test_a_model_of_characters_hears_hidden_words():
    batch = Batch.of([[4, 5, 6]], [1])
    batch = replace(batch, chars=character_id_table([*SPECIAL, "goal", "rate", "bank"])[batch.words])
    model, head = make(word_dropout=0.5)
    letters = jax.random.normal(jax.random.key(3), (262, 4))
    features = lambda params, batch, key: letters[batch.chars].sum(2)[None]  # noqa: E731
    loss = classifier_loss(features, OneLayer(), model)
    keys = [None, *jax.random.split(jax.random.key(0), 6)]
    assert len({float(loss({"combiner": {}, "classifier": head}, batch, key)[0]) for key in keys}) > 2


@pytest.mark.parametrize("variational", [True, False])
def test_variational_dropout_drops_the_same_features_at_every_step(variational):
    config = ClassifierConfig(3, 1, classifier_dropout=0.5, variational=variational)
    model = BiLSTMClassifier(config, 4)

    @jax.jit
    def inputs(key):
        dropped = lambda module, _: isinstance(module, nn.Dropout)  # noqa: E731
        rngs = {"params": key, "dropout": key}
        _, saw = model.init_with_output(rngs, X, LENGTHS, True, capture_intermediates=dropped)
        return next(a for a in jax.tree.leaves(saw["intermediates"]) if a.shape == X.shape)

    kept = np.asarray(inputs(jax.random.key(0))) != 0
    assert 0 < kept.mean() < 1
    assert (kept == kept[:, :1]).all() == variational


@pytest.mark.usefixtures("standard_promotion")
def test_it_learns_what_only_order_tells():
    """Which of two words comes first is the class: no bag of words could know."""
    model = BiLSTMClassifier(ClassifierConfig(hidden=8, classifier_layers=1, classifier_dropout=0.0), 2)
    x = jnp.stack([jnp.eye(2), jnp.eye(2)[::-1]])
    params = model.init(jax.random.key(0), x, jnp.array([2, 2]))["params"]
    optimizer = optax.adam(0.05)

    def loss(p):
        logits = model.apply({"params": p}, x, jnp.array([2, 2]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 1])).mean()

    @jax.jit
    def step(_, carry):
        p, s = carry
        updates, s = optimizer.update(jax.grad(loss)(p), s)
        return optax.apply_updates(p, updates), s

    trained, _ = jax.lax.fori_loop(0, 100, step, (params, optimizer.init(params)))
    assert loss(params) > 0.5
    assert loss(trained) < 0.05


def test_static_features_are_rows_without_a_gradient():
    batch, table = Batch.of([[4, 5], [4]]), jax.random.normal(jax.random.key(0), (6, 3))
    layers = static_features({"vectors": table}, batch, None)
    assert layers.shape == (1, 2, 4, 3)
    np.testing.assert_array_equal(layers[0, 0, 1], layers[0, 1, 1])
    np.testing.assert_array_equal(layers[0, 0, 2], table[5])
    g = jax.grad(lambda t: static_features({"vectors": t}, batch, None).sum())(table)
    assert not np.any(g)
