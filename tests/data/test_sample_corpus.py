from collections import Counter

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from elmo_jax.data.sample_corpus import CLASSES, sample_corpus
from elmo_jax.data.text import tokenize


@pytest.fixture(scope="module")
def corpus():
    return sample_corpus()


def test_corpus_depends_on_the_seed_alone(corpus):
    assert sample_corpus() == corpus
    assert sample_corpus(seed=1) != corpus


def test_parts_are_disjoint_and_balanced(corpus):
    assert not {t.text for t in corpus.train} & {t.text for t in corpus.test}
    for part in corpus:
        assert set(Counter(t.label for t in part).values()) == {len(part) // len(CLASSES)}


def test_senses_name_the_position_of_their_word(corpus):
    senses = Counter()
    for text in corpus.train:
        tokens = tokenize(text.text)
        assert tokens == text.text.split()
        for index, sense in text.senses:
            assert tokens[index] == sense.split("/")[0]
            senses[sense] += 1
    words = Counter(sense.split("/")[0] for sense in senses)
    assert {"bank", "match", "court", "windows", "strike"} <= {word for word, n in words.items() if n > 1}
    assert min(senses.values()) >= 10


def test_word_counts_solve_nine_tenths_of_the_task(corpus):
    vectorizer = TfidfVectorizer(token_pattern=r"\S+", ngram_range=(1, 2))
    x, test = (
        f([t.text for t in part])
        for f, part in zip((vectorizer.fit_transform, vectorizer.transform), corpus, strict=True)
    )
    classifier = LogisticRegression(max_iter=1000).fit(x, [t.label for t in corpus.train])
    assert 0.88 < classifier.score(test, [t.label for t in corpus.test]) < 0.92
