"""Small models in the official format."""

from pathlib import Path

import jax
import numpy as np

from elmo_jax.config import CASED
from elmo_jax.data.batching import Batch
from elmo_jax.elmo import Elmo
from elmo_jax.models.bilm import BiLM, BiLMConfig
from elmo_jax.models.embedders import CharCNNConfig


def make(folder: Path, seed=0, vocabulary=None, **changes) -> Elmo:
    """Save a small model with weights so large that every clip takes effect."""
    characters = CharCNNConfig(
        filters=((1, 3), (2, 4), (5, 6)),
        character_features=4,
        highway=changes.pop("highway", 2),
        activation=changes.pop("activation", "relu"),
    )
    clips = {"cell_clip": 0.3, "projection_clip": 0.2}
    settings = {"cells": 7, "embedding": 5, "skip": True} | clips | changes
    config = BiLMConfig(input="characters", characters=characters, tie=False, **settings)
    model = BiLM(config, len(vocabulary or ()))
    batch = Batch.of([[1]]).replace(chars=np.ones((1, 3, 50), np.int32))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), shapes)
    elmo = Elmo(model, params, vocabulary, CASED)
    elmo.save_bilm(folder / "options.json", folder / "weights.hdf5")
    return elmo
