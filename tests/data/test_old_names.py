"""Names of the previous release still work, with a warning."""

import numpy as np
import pytest

from elmo_jax.data.batching import BatchStream, Documents
from elmo_jax.data.csv_dataset import DataConfig, load_dataset


def test_old_arguments_attributes_and_methods(documents):
    table = np.ones((50, 3), np.int32)
    arrays = documents.ids, documents.offsets, documents.labels
    with pytest.warns(DeprecationWarning, match="spellings is now character_ids"):
        old = Documents(*arrays, spellings=table)
    assert old.spellings is old.character_ids is table
    with pytest.warns(DeprecationWarning, match="share is now subset"):
        subset = old.share(0.5, seed=0)
    np.testing.assert_array_equal(subset.ids, old.subset(0.5, seed=0).ids)
    with pytest.warns(DeprecationWarning, match="steps_per_dispatch is now steps_per_call"):
        stream = BatchStream(documents, 4, seed=0, steps_per_dispatch=2)
    with pytest.warns(DeprecationWarning, match="dispatches is now chunks"):
        chunks = stream.dispatches(0, 3)
    for got, expected in zip(chunks, stream.chunks(0, 3), strict=True):
        np.testing.assert_array_equal(got.batches.words, expected.batches.words)
    with pytest.warns(DeprecationWarning, match="spelled is now with_characters"):
        dataset = load_dataset(DataConfig(), spelled=True)
    assert dataset.train.character_ids is not None
