"""gensim's side of the benchmark: Word2Vec with this library's settings of skip-gram. It is optional."""

import os
from typing import Any

import numpy as np
from gensim.models import Word2Vec

from experiments.benchmark.cases import Case
from experiments.benchmark.runner import Built, pair_loss

# pyright: reportMissingImports=false


def build(case: Case, arrays: dict[str, np.ndarray]) -> Built:
    """An epoch over the text, its vocabulary counted before; threads race, so no run repeats another."""
    ids = arrays["ids"]
    names = [str(i) for i in ids.tolist()]
    text = [names[i : i + 1000] for i in range(0, len(names), 1000)]
    settings: dict[str, Any] = {"sg": 1, "negative": 5, "window": 4, "sample": 1e-3, "min_count": 1}
    settings |= {"alpha": 0.025, "min_alpha": 0.0, "vector_size": case.width}
    model = Word2Vec(workers=os.cpu_count() or 1, **settings)
    model.build_vocab(text)

    def run(n: int) -> None:
        for _ in range(n):
            model.train(text, total_examples=model.corpus_count, epochs=1)

    def check() -> dict[str, np.ndarray]:
        run(1)
        centre, context = (np.zeros((case.vocabulary, case.width), np.float32) for _ in range(2))
        names_in_order: Any = model.wv.index_to_key
        known = np.array(list(map(int, names_in_order)))
        centre[known], context[known] = model.wv.vectors, model.syn1neg
        return {"loss": pair_loss(ids, centre, context)}

    return Built(check, [(run, 1.0)])
