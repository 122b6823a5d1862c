"""The classifier against a float64 reference, its loss and its regularization."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from reference import log_softmax, lstm as reference_lstm, tree64

from elmo_jax.config import ClassifierConfig, CombinerConfig
from elmo_jax.data.batching import Batch
from elmo_jax.data.characters import character_id_table
from elmo_jax.data.text import SPECIAL, UNK
from elmo_jax.models.classifier import (
    BiLSTMClassifier,
    classifier_loss,
    classify,
    static_features,
)
from elmo_jax.models.combiners import OneLayer, make_combiner

X = jax.random.normal(jax.random.key(0), (3, 5, 4))
LENGTHS = jnp.array([5, 2, 1])


def make(**config):
    model = BiLSTMClassifier(ClassifierConfig(hidden=3, classifier_dropout=0.0, **config), classes=4)
    return model, jax.jit(model.init)(jax.random.key(1), X, LENGTHS)["params"]


@pytest.mark.parametrize("pooling", ["max", "mean+max+attention"])
def test_logits_equal_reference_with_any_padding(pooling):
    model, params = make(pooling=pooling)
    padded = jnp.pad(X, [(0, 1), (0, 2), (0, 0)], constant_values=9.0)
    logits = jax.jit(model.apply)({"params": params}, padded, jnp.array([*LENGTHS, 0]))
    assert np.isfinite(logits).all()
    p = tree64(params)
    for b, n in enumerate(LENGTHS.tolist()):
        x = np.asarray(X[b, :n], np.float64)
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = x * p["norm"]["scale"] + p["norm"]["bias"]
        for layer in ("lstm_0", "lstm_1"):
            w = p[layer]
            forward, backward = (
                reference_lstm(read, w["input_kernel"][d], w["recurrent_kernel"][d], w["bias"][d])[1]
                for d, read in enumerate((x, x[::-1]))
            )
            x = np.concatenate([forward, backward[::-1]], -1)
        pooled = [x.mean(0)] * ("mean" in pooling) + [x.max(0)] * ("max" in pooling)
        if "attention" in pooling:
            scores = (x @ p["attention"]["kernel"] + p["attention"]["bias"])[:, 0]
            pooled.append(np.exp(log_softmax(scores)) @ x)
        v = np.concatenate(pooled)
        v = np.maximum(v @ p["hidden"]["kernel"] + p["hidden"]["bias"], 0)
        np.testing.assert_allclose(logits[b], v @ p["logits"]["kernel"] + p["logits"]["bias"], atol=1e-5)


def test_loss_and_confusion_leave_out_fillers_and_sentence_markers():
    model, head = make()
    docs, labels = [[4, 5, 6], [7]], [3, 1]
    table = jax.random.normal(jax.random.key(2), (2, 8, 4))  # two layers of word vectors
    features = lambda params, batch, key: table[:, batch.words]  # noqa: E731
    params = {"combiner": {"weights": jnp.array([1.0, 2.0])}, "classifier": head}
    loss_fn = classifier_loss(features, make_combiner(CombinerConfig()), model)
    loss, metrics = jax.jit(loss_fn)(params, Batch.of(docs, labels, (3, 9)), None)
    x = jnp.tensordot(jnp.array([1.0, 2.0]), table, 1)[Batch.of(docs).words[:, 1:-1]]
    logits = jax.jit(model.apply)({"params": head}, x, jnp.array([3, 1]))
    nll = -log_softmax(np.asarray(logits, np.float64))[[0, 1], labels]
    np.testing.assert_allclose(loss, nll.mean(), rtol=1e-5)
    assert metrics["documents"] == 2
    expected = np.zeros((4, 4))
    for label, predicted in zip(labels, logits.argmax(-1).tolist(), strict=True):
        expected[label, predicted] += 1
    np.testing.assert_array_equal(metrics["confusion"], expected)


class FeatureAsLogit:
    """Stand-in for a classifier whose logits are the features."""

    def __init__(self, **config):
        self.config, self.classes = ClassifierConfig(**config), 3

    def apply(self, variables, x, lengths, train, rngs):
        return x[:, :, 0]


def test_label_smoothing_applies_in_training_only():
    def loss(label, key=None, **config):
        features = lambda params, batch, key: jnp.arange(5.0)[None, None, :, None]  # noqa: E731
        loss_fn = classifier_loss(features, OneLayer(), FeatureAsLogit(**config))
        return float(loss_fn({"combiner": {}, "classifier": {}}, Batch.of([[4, 5, 6]], [label]), key)[0])

    key = jax.random.key(0)
    assert loss(2, label_smoothing=0.2) == loss(2) == loss(2, key)
    uniform = sum(loss(label) for label in range(3)) / 3
    assert loss(2, key, label_smoothing=0.2) == pytest.approx(0.8 * loss(2) + 0.2 * uniform, rel=1e-5)


def test_word_dropout_replaces_words_and_characters_in_training_only():
    table = character_id_table([*SPECIAL, "goal", "rate", "bank", "unheard"])
    ids = np.array([4, 5, 7, 6, 4, 7])  # id 7 has characters, but is outside the vocabulary
    batch = Batch.of([np.where(ids < 7, ids, UNK)], [1])
    batch = replace(batch, chars=table[Batch.of([ids]).words], unique_words="of this batch")
    seen = []

    def features(params, batch, key):
        seen.append(batch)
        return jnp.zeros((1, *batch.words.shape, 1))

    model = FeatureAsLogit(word_dropout=0.5)
    for key in (None, *jax.random.split(jax.random.key(0), 20)):
        classify({"combiner": {}, "classifier": {}}, batch, key, features, OneLayer(), model)
    evaluated, *trained = seen
    assert evaluated is batch and all(seen.unique_words is None for seen in trained)
    words, chars = np.stack([seen.words for seen in trained]), np.stack([seen.chars for seen in trained])
    dropped = (chars == table[UNK]).all(-1)
    np.testing.assert_array_equal(words, np.where(dropped, UNK, batch.words))
    np.testing.assert_array_equal(chars, np.where(dropped[..., None], table[UNK], batch.chars))
    is_word = batch.words >= UNK
    assert not dropped[:, ~is_word].any() and 0.2 < dropped[:, is_word].mean() < 0.8


@pytest.mark.parametrize("variational", [True, False])
def test_variational_dropout_drops_the_same_features_of_every_token(variational):
    config = ClassifierConfig(3, 1, classifier_dropout=0.5, variational=variational)
    model = BiLSTMClassifier(config, 4)

    @jax.jit
    def dropout_output(key):
        is_dropout = lambda module, _: isinstance(module, nn.Dropout)  # noqa: E731
        rngs = {"params": key, "dropout": key}
        _, state = model.init_with_output(rngs, X, LENGTHS, True, capture_intermediates=is_dropout)
        return next(a for a in jax.tree.leaves(state["intermediates"]) if a.shape == X.shape)

    kept = np.asarray(dropout_output(jax.random.key(0))) != 0
    assert 0 < kept.mean() < 1
    assert (kept == kept[:, :1]).all() == variational


def test_static_features_are_table_rows_without_gradient():
    batch, table = Batch.of([[4, 5], [4]]), jax.random.normal(jax.random.key(0), (6, 3))
    layers = static_features({"vectors": table}, batch, None)
    assert layers.shape == (1, 2, 4, 3)
    np.testing.assert_array_equal(layers[0], table[batch.words])
    gradient = jax.grad(lambda table: static_features({"vectors": table}, batch, None).sum())(table)
    assert not np.any(gradient)


def test_forward_mode_equals_reverse_mode_with_the_plain_kernel():
    config = ClassifierConfig(hidden=3, classifier_dropout=0.0)
    model = BiLSTMClassifier(config, classes=4, kernel="plain")
    params = model.init(jax.random.key(1), X, LENGTHS)["params"]
    f = lambda x: jnp.sin(model.apply({"params": params}, x, LENGTHS)).sum()  # noqa: E731
    direction = jax.random.normal(jax.random.key(2), X.shape)
    _, forward = jax.jit(lambda x, dx: jax.jvp(f, (x,), (dx,)))(X, direction)
    np.testing.assert_allclose(forward, jnp.vdot(jax.grad(f)(X), direction), rtol=1e-4)
