import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from elmo_jax.errors import InputError
from elmo_jax.estimator import ElmoVectorizer

TEXTS = ["The bank rose.", "", "A river bank", "bank"]


@pytest.mark.parametrize("layers", ["top", "average", "all", 1])
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


def test_wrong_arguments_are_named(elmo):
    for settings, said in [({"layers": 3}, "layers must be"), ({"pooling": "sum"}, "pooling must be")]:
        with pytest.raises(InputError, match=said):
            ElmoVectorizer(elmo, **settings).fit(TEXTS)
    with pytest.raises(InputError, match="one string"):
        ElmoVectorizer(elmo).fit(TEXTS).transform("a text")
    with pytest.raises(InputError, match="hold no token"):
        ElmoVectorizer().fit(["", " "])
