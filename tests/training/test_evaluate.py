"""Summed metrics, predictions, and the figures derived from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from regression import loss_fn, same
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix as sklearn_confusion,
    precision_recall_fscore_support,
)

from elmo_jax.data.batching import BatchStream
from elmo_jax.models.classifier import confusion_matrix
from elmo_jax.training.evaluate import classification, evaluate, perplexities, predict

pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@settings(deadline=None, max_examples=25)
@given(pairs, st.integers(0, 3))
def test_classification_equals_scikit_learn(rows, fillers):
    true, predicted = (np.array(column, np.int32) for column in zip(*rows, strict=True))
    weight = jnp.array([1.0] * len(rows) + [0.0] * fillers)
    padded = (jnp.pad(jnp.asarray(column), (0, fillers)) for column in (true, predicted))
    counts = confusion_matrix(*padded, weight, 4)
    np.testing.assert_array_equal(counts, sklearn_confusion(true, predicted, labels=range(4)))
    got = classification(np.asarray(counts))
    want = precision_recall_fscore_support(true, predicted, average="weighted", zero_division=0)
    assert [got[n] for n in ("precision", "recall", "f1")] == pytest.approx(want[:3])
    assert got["accuracy"] == pytest.approx(accuracy_score(true, predicted))
    assert got["confusion_matrix"] == np.asarray(counts).astype(int).tolist()


def test_perplexity_is_exp_of_the_mean_negative_log_likelihood():
    got = perplexities({"nll_forward": 6.0, "nll_backward": 2.0, "tokens": 4.0})
    assert got["perplexity_forward"] == pytest.approx(np.exp(1.5))
    assert got["perplexity_backward"] == pytest.approx(np.exp(0.5))
    assert got["perplexity"] == pytest.approx(np.exp(1.0))


def test_results_do_not_depend_on_steps_per_call(documents, standard_promotion):
    error = jax.jit(lambda params, batch: loss_fn(params, batch, jax.random.key(0))[1])
    params = {"table": jnp.arange(50.0), "scale": jnp.ones(())}
    want, *others = (
        (evaluate(error, params, stream), predict(lambda _, batch: batch.labels, params, stream))
        for k in (1, 3, 100)
        for stream in [BatchStream(documents, 4, seed=1, bounds=(12, 32), steps_per_call=k)]
    )
    assert want[0]["documents"] == len(documents)
    np.testing.assert_array_equal(want[1], documents.labels)
    for got in others:
        same(got, want)


def test_old_argument_names_still_work(documents, standard_promotion):
    stream = BatchStream(documents, 4)
    with pytest.warns(DeprecationWarning, match="rows_fn is now predict_fn"):
        labels = predict(rows_fn=lambda _, batch: batch.labels, params={}, stream=stream)
    np.testing.assert_array_equal(labels, documents.labels)
