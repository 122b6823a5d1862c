"""Linear and naive Bayes models on word counts agree with scikit-learn; mixtures find the better model."""

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfTransformer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB

from elmo_jax.baselines import bag_of_words
from elmo_jax.baselines.bag_of_words import BagOfWords, fit_mixture_weights
from elmo_jax.data.batching import Documents
from elmo_jax.data.text import Vocabulary

VOCABULARY = Vocabulary.from_counts({f"w{i}": 1 for i in range(30)})


def sample_documents(rng, classes: int, count: int = 40) -> Documents:
    labels = np.arange(count) % classes
    sentences = [[f"w{(7 * label + i) % 31}" for i in rng.integers(0, 12, 9)] for label in labels]
    return Documents.of(sentences, VOCABULARY, labels)  # w30 is unknown


@pytest.mark.parametrize("classes", [2, 3])
def test_log_probabilities_equal_those_of_scikit_learn(rng, classes):
    train, test = sample_documents(rng, classes), sample_documents(rng, classes, 7)
    ids = train.ids.copy()
    bag = BagOfWords.fit(train, VOCABULARY, classes)
    np.testing.assert_array_equal(train.ids, ids)

    def count(documents):
        counts = np.zeros((len(documents), len(VOCABULARY)))
        for n in range(len(documents)):
            np.add.at(counts[n], documents.ids[documents.offsets[n] : documents.offsets[n + 1]], 1)
        return csr_matrix(counts * (np.arange(len(VOCABULARY)) > 3))

    tfidf = TfidfTransformer(sublinear_tf=True).fit(count(train))
    x, x_test = (tfidf.transform(count(part)) for part in (train, test))
    models = LogisticRegression(C=3.0, max_iter=500), MultinomialNB(alpha=0.3)
    expected = [model.fit(x, train.labels).predict_log_proba(x_test) for model in models]
    np.testing.assert_allclose(bag.log_probabilities(test), expected, atol=1e-6)


def test_pairs_of_words_are_counted_from_many_documents_on(rng, monkeypatch):
    train, test = sample_documents(rng, 3), sample_documents(rng, 3, 7)
    words = BagOfWords.fit(train, VOCABULARY, 3)
    assert len(words.bigrams) == 0
    monkeypatch.setattr(bag_of_words, "_BIGRAM_DOCUMENTS", len(train))
    bag = BagOfWords.fit(train, VOCABULARY, 3)

    def write(documents):
        spans = zip(documents.offsets, documents.offsets[1:], strict=False)
        texts = [documents.ids[i:j].tolist() for i, j in spans]
        # Each unknown word is another one, so that no pair with it is frequent.
        return [[f"w{i}" if i > 3 else f"{n}-{k}" for k, i in enumerate(ids)] for n, ids in enumerate(texts)]

    texts, test_texts = write(train), write(test)
    pairs = Counter(pair for text in texts for pair in set(itertools.pairwise(text)))
    frequent = {pair for pair, n in pairs.items() if n > 1}
    assert frequent and {(f"w{a}", f"w{b}") for a, b in bag.bigrams.tolist()} == frequent
    known = [f"w{i}" for i in range(4, len(VOCABULARY))] + [" ".join(pair) for pair in sorted(frequent)]
    vectorizer = TfidfVectorizer(
        analyzer=lambda text: [*text, *map(" ".join, itertools.pairwise(text))],
        vocabulary=known,
        sublinear_tf=True,
    )
    x, x_test = vectorizer.fit_transform(texts), vectorizer.transform(test_texts)
    expected = LogisticRegression(C=10.0, max_iter=500).fit(x, train.labels).predict_log_proba(x_test)
    found = bag.log_probabilities(test)
    np.testing.assert_allclose(found[0], expected, atol=1e-4)
    np.testing.assert_allclose(found[1], words.log_probabilities(test)[1], atol=1e-12)


def test_class_without_training_documents_gets_almost_no_probability(rng):
    labels = np.arange(20) % 2
    long = [[f"w{i}" for i in rng.integers(15 * label, 15 * label + 15, 300)] for label in labels]
    train = Documents.of(long, VOCABULARY, labels)
    probabilities = np.exp(BagOfWords.fit(train, VOCABULARY, 3).log_probabilities(train))
    np.testing.assert_allclose(probabilities.sum(-1), 1)
    assert probabilities[:, :, 2].max() < 1e-6


def test_mixture_weights_reach_the_least_loss_on_a_grid(rng):
    labels = rng.integers(0, 3, 200)
    logits = rng.normal(size=(2, 200, 3))
    logits[0, np.arange(200), labels] += 2  # the first model is good, the second one guesses
    log_p = logits - np.logaddexp.reduce(logits, -1, keepdims=True)

    def loss(weights):
        mixed = np.tensordot(weights, log_p, 1)
        mixed -= np.logaddexp.reduce(mixed, -1, keepdims=True)
        return -mixed[np.arange(200), labels].mean()

    weights = fit_mixture_weights(log_p, labels)
    grid = [(a, b) for a in np.linspace(0, 2, 21) for b in np.linspace(0, 2, 21)]
    assert loss(weights) < min(map(loss, grid)) + 1e-3
    assert weights[1] < 0.2 < weights[0]
