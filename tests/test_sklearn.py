"""ElmoVectorizer: its vectors, and the scikit-learn estimator interface."""

import operator
import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.utils import estimator_checks as checks

from elmo_jax import sklearn as module
from elmo_jax.errors import InputError
from elmo_jax.sklearn import ElmoClassifier, ElmoVectorizer

TEXTS = ["The bank rose.", "", "A river bank", "bank"]


@pytest.mark.parametrize("layers", ["top", "average", "all", 1, np.int64(1)])
@pytest.mark.parametrize("pooling", ["mean", "max", "mean+max"])
def test_vectors_are_the_pooled_layers(elmo, layers, pooling):
    vectorizer = ElmoVectorizer(elmo, layers=layers, pooling=pooling, standardize=False)
    vectors = vectorizer.fit_transform(TEXTS)
    assert vectors.shape == (4, len(vectorizer.get_feature_names_out()))
    a = elmo.embed([["the", "bank", "rose", "."]])[0]
    x = {"top": a[2], "average": a.mean(0), "all": np.concatenate(a, -1), 1: a[1]}[layers]
    want = np.concatenate([getattr(x, name)(0) for name in pooling.split("+")])
    np.testing.assert_allclose(vectors[0], want, rtol=1e-5, atol=1e-6)
    assert not vectors[1].any()
    tokens = vectorizer.transform([["the", "bank", "rose", "."]])
    np.testing.assert_allclose(tokens[0], vectors[0], atol=1e-6)


def test_features_are_standardized_over_the_tokens_of_fit(elmo):
    vectorizer = ElmoVectorizer(elmo, layers="top").fit(TEXTS)
    sentences = [elmo.tokenize(text) for text in TEXTS]
    np.testing.assert_array_equal(vectorizer.standardizer_["mean"], elmo.layer_statistics(sentences)["mean"])
    lengths = np.array([len(sentence) for sentence in sentences])
    total = (vectorizer.transform(TEXTS) * lengths[:, None]).sum(0)
    np.testing.assert_allclose(total / lengths.sum(), 0, atol=1e-5)


def test_custom_tokenizer_is_used_by_a_given_and_by_a_new_model(elmo, tmp_path):
    split = operator.methodcaller("split", "-")
    given = ElmoVectorizer(elmo, tokenizer=split).fit(["the-bank", "river"])
    np.testing.assert_array_equal(given.transform(["the-bank"]), given.transform([["the", "bank"]]))
    assert pickle.loads(pickle.dumps(given)).transform(["the-bank"]).shape == (1, 8)
    elmo.save_pretrained(tmp_path / "model")
    loaded = ElmoVectorizer(tmp_path / "model", tokenizer=split).fit(["the-bank", "river"])
    np.testing.assert_array_equal(loaded.transform(["the-bank"]), given.transform(["the-bank"]))


def test_pipeline_trains_clones_and_pickles(standard_promotion):
    texts, labels = ["bank money rose", "river water fish"] * 10, ["money", "water"] * 10
    vectorizer = ElmoVectorizer(embedding=4, cells=4, epochs=1, min_count=1, batch_size=8)
    pipeline = make_pipeline(vectorizer, LogisticRegression()).fit(texts, labels)
    assert pipeline.score(texts, labels) == 1.0
    again = clone(pipeline)
    assert again[0].get_params() == vectorizer.get_params() and not hasattr(again[0], "elmo_")
    # The same seed trains the same model, and fit_transform reads an iterator once.
    np.testing.assert_array_equal(again[0].fit_transform(iter(texts)), pipeline[0].transform(texts))
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
@pytest.mark.parametrize("estimator", [ElmoVectorizer, ElmoClassifier])
def test_scikit_learn_check(check, estimator):
    check(estimator.__name__, estimator())


def test_feature_names_match_the_width(elmo):
    vectorizer = ElmoVectorizer(elmo, layers="all").set_output(transform="default").fit(TEXTS)
    names = vectorizer.get_feature_names_out()
    assert len(names) == len(set(names)) == vectorizer.n_features_out_ == 24


def test_column_of_texts_is_read_as_texts(elmo):
    vectorizer = ElmoVectorizer(elmo).fit(TEXTS)
    expected = vectorizer.transform(TEXTS)
    column = np.array(TEXTS, object)[:, None]
    np.testing.assert_array_equal(vectorizer.transform(column), expected)
    np.testing.assert_array_equal(vectorizer.transform(np.array(TEXTS)), expected)
    for table in (np.array([TEXTS, TEXTS]), {"text": TEXTS}, set(TEXTS), np.array("text")):
        with pytest.raises(InputError, match=r"the texts are .*; pass"):
            vectorizer.transform(table)


def test_pandas_columns_and_index_are_kept(elmo):
    pandas = pytest.importorskip("pandas")
    texts = pandas.Series(TEXTS, index=[7, 5, 3, 1], name="text")
    vectorizer = ElmoVectorizer(elmo).set_output(transform="pandas")
    for out in (vectorizer.fit_transform(texts), vectorizer.transform(texts)):
        assert out.index.tolist() == [7, 5, 3, 1]
    np.testing.assert_array_equal(vectorizer.transform(texts.to_frame()), vectorizer.transform(texts))
    with pytest.raises(InputError, match=r"a table of shape \(4, 2\); pass the column of texts"):
        vectorizer.transform(pandas.DataFrame({"a": TEXTS, "b": TEXTS}))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_classifier_trains_clones_and_pickles(elmo):
    texts, labels = ["the bank rose", "a river fell"] * 10, [3, 1] * 10
    classifier = ElmoClassifier(elmo, epochs=1, validation=0.25).fit(texts, labels)
    assert classifier.classes_.tolist() == [1, 3]
    assert classifier.predict(["the bank rose", "a river fell"]).tolist() == [3, 1]
    probabilities = classifier.predict_proba(texts)
    np.testing.assert_allclose(probabilities.sum(-1), 1)
    np.testing.assert_array_equal(clone(classifier).fit(texts, labels).predict_proba(texts), probabilities)
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(again.predict_proba(texts), probabilities)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_classifier_trains_a_language_model_and_works_in_grid_search():
    texts, labels = ["the bank rose", "a river fell"] * 10, ["money", "water"] * 10
    grid = {"combiner": ["frozen", "function"]}
    search = GridSearchCV(ElmoClassifier(pretrain_epochs=1, epochs=1), grid, cv=2, refit=False)
    assert search.fit(texts, labels).cv_results_["mean_test_score"].tolist() == [1.0, 1.0]


def test_too_few_classes_or_texts_are_refused(elmo):
    for texts, labels in ((["a", "b"], [1, 1]), (["a", "b", "c"], [1, 1, 2])):
        with pytest.raises(InputError, match="needs at least two classes with two texts each"):
            ElmoClassifier(elmo).fit(texts, labels)
    for settings in ({"epochs": -1}, {"epochs": "3"}, {"pretrain_epochs": 0}, {"validation": 2.0}):
        with pytest.raises(InputError, match=f"^{next(iter(settings))} is "):
            ElmoClassifier(elmo, **settings).fit(["a", "b"], [1, 2])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        ElmoClassifier(elmo).fit(["a", "b"], [1])
    with pytest.raises(NotFittedError):
        ElmoClassifier(elmo).predict(["a"])


def test_random_state_follows_scikit_learn(monkeypatch):
    seeds = []

    class Stop(Exception):
        pass

    def make_stream(documents, batch_size, seed, **_):
        seeds.append(seed)
        raise Stop

    monkeypatch.setattr(module, "BatchStream", make_stream)
    for state in (0, 0, np.int64(0), np.random.RandomState(0), 1, None, None):
        with pytest.raises(Stop):
            ElmoVectorizer(random_state=state).fit(TEXTS)
    assert len(set(seeds[:4])) == 1 and len(set(seeds[3:])) == 4


def test_messages_name_the_wrong_argument(elmo):
    for settings, message in [
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
        with pytest.raises(InputError, match=message):
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
