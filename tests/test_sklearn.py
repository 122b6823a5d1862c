import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks as checks

from elmo_jax import sklearn as module
from elmo_jax.errors import InputError
from elmo_jax.sklearn import ElmoVectorizer

TEXTS = ["The bank rose.", "", "A river bank", "bank"]


@pytest.mark.parametrize("layers", ["top", "average", "all", 1, np.int64(1)])
@pytest.mark.parametrize("pooling", ["mean", "max", "mean+max"])
def test_vectors_are_the_pooled_layers(elmo, layers, pooling):
    vectorizer = ElmoVectorizer(elmo, layers=layers, pooling=pooling)
    vectors = vectorizer.fit_transform(TEXTS)
    assert vectors.shape == (4, len(vectorizer.get_feature_names_out()))
    a = elmo.embed([["the", "bank", "rose", "."]])[0]
    x = {"top": a[2], "average": a.mean(0), "all": np.concatenate(a, -1), 1: a[1]}[layers]
    want = np.concatenate([getattr(x, name)(0) for name in pooling.split("+")])
    np.testing.assert_allclose(vectors[0], want, rtol=1e-5, atol=1e-6)
    assert not vectors[1].any()
    tokens = vectorizer.transform([["the", "bank", "rose", "."]])
    np.testing.assert_allclose(tokens[0], vectors[0], atol=1e-6)


def test_it_is_an_estimator(elmo, standard_promotion):
    texts, labels = ["bank money rose", "river water fish"] * 10, ["money", "water"] * 10
    vectorizer = ElmoVectorizer(embedding=4, cells=4, epochs=1, min_count=1, batch_size=8)
    pipeline = make_pipeline(vectorizer, LogisticRegression()).fit(texts, labels)
    assert pipeline.score(texts, labels) == 1.0
    again = clone(pipeline)
    assert again[0].get_params() == vectorizer.get_params() and not hasattr(again[0], "elmo_")
    np.testing.assert_array_equal(again.fit(texts, labels)[0].transform(texts), pipeline[0].transform(texts))
    back = pickle.loads(pickle.dumps(pipeline))
    np.testing.assert_array_equal(back.predict_proba(texts), pipeline.predict_proba(texts))
    with pytest.raises(NotFittedError):
        clone(vectorizer).transform(texts)


@pytest.mark.parametrize(
    "check",
    [
        checks.check_estimator_cloneable,
        checks.check_estimator_repr,
        checks.check_no_attributes_set_in_init,
        checks.check_parameters_default_constructible,
        checks.check_get_params_invariance,
        checks.check_set_params,
        checks.check_mixin_order,
        checks.check_estimator_tags_renamed,
        checks.check_valid_tag_types,
    ],
)
def test_what_scikit_learn_asks_of_every_estimator(check):
    check("ElmoVectorizer", ElmoVectorizer())


def test_outputs_are_named_and_set_as_scikit_learn_does(elmo):
    vectorizer = ElmoVectorizer(elmo, layers="all").set_output(transform="default").fit(TEXTS)
    names = vectorizer.get_feature_names_out()
    assert len(names) == len(set(names)) == vectorizer.n_features_out_ == 24
    again = pickle.loads(pickle.dumps(vectorizer))
    np.testing.assert_allclose(again.transform(TEXTS), vectorizer.transform(TEXTS), atol=1e-6)


def test_texts_that_can_be_read_once_are_read_once(standard_promotion):
    vectorizer = ElmoVectorizer(embedding=2, cells=2, epochs=1, min_count=1)
    got = vectorizer.fit_transform(text for text in TEXTS)
    np.testing.assert_array_equal(got, vectorizer.transform(TEXTS))
    assert len(got) == len(TEXTS)


def test_seeds_are_those_of_scikit_learn(monkeypatch):
    seeds = []

    class Stop(Exception):
        pass

    def begin(documents, batch_size, seed, **_):
        seeds.append(seed)
        raise Stop

    monkeypatch.setattr(module, "BatchStream", begin)
    for state in (0, 0, np.int64(0), np.random.RandomState(0), 1, None, None):
        with pytest.raises(Stop):
            ElmoVectorizer(random_state=state).fit(TEXTS)
    assert len(set(seeds[:4])) == 1 and len(set(seeds[3:])) == 4


def test_wrong_arguments_are_named(elmo):
    for settings, said in [
        ({"layers": 3}, "layers is"),
        ({"layers": True}, "layers is"),
        ({"pooling": "sum"}, "pooling is"),
        ({"embedding": 0}, "embedding is 0; use an integer of at least 1"),
        ({"cells": 0}, "cells is"),
        ({"epochs": 0}, "epochs is"),
        ({"batch_size": 0}, "batch_size is"),
        ({"negatives": -1}, "negatives is"),
        ({"min_count": 1.5}, "min_count is"),
    ]:
        with pytest.raises(InputError, match=said):
            ElmoVectorizer(elmo, **settings).fit(TEXTS)
    with pytest.raises(InputError, match="the texts are 'a text'"):
        ElmoVectorizer(elmo).fit(TEXTS).transform("a text")
    for odd in (None, float("nan"), 3, b"abc"):
        with pytest.raises(InputError, match=r"text 1 is .*; pass a string or a list of tokens"):
            ElmoVectorizer(elmo).fit(TEXTS).transform(["a", odd])
    for odd in (5, b"a text"):
        with pytest.raises(InputError, match=r"the texts are .*; pass a list of strings"):
            ElmoVectorizer(elmo).fit_transform(odd)
    with pytest.raises(InputError, match="have no tokens"):
        ElmoVectorizer().fit(["", " "])
