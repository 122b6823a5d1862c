"""Tiny model, and exported folders with valid digests for any content."""

from dataclasses import asdict

import jax
import numpy as np
from safetensors.numpy import save

from elmo_jax.data.batching import Batch
from elmo_jax.data.csv_dataset import DataConfig
from elmo_jax.data.text import Vocabulary
from elmo_jax.models.bilm import BiLM, BiLMConfig
from elmo_jax.pretrained.folder import VOCABULARY
from elmo_jax.storage.files import digest, write_config

WEIGHTS = "model.safetensors"
CONFIGURATION = BiLMConfig(embedding=4, cells=4, layers=1)
WORDS = Vocabulary.from_counts({"the": 3, "bank": 2})
MODEL = BiLM(CONFIGURATION, len(WORDS))
SHAPES = jax.eval_shape(lambda: MODEL.init(jax.random.key(0), Batch.of([[]]))["params"])
PARAMS = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), SHAPES)


def seal(folder, **settings):
    """Write the configuration of an exported folder or a run, with valid digests for its files."""
    files = {name: digest(folder / name) for name in (VOCABULARY, WEIGHTS) if (folder / name).is_file()}
    config = {"model": asdict(CONFIGURATION), "data": asdict(DataConfig())}
    write_config(folder, config | settings, files)


def weights(**changed):
    flat = dict(flatten(PARAMS)) | changed
    return save({name: a for name, a in flat.items() if a is not None})


def flatten(tree, before=""):
    for name, value in tree.items():
        yield from flatten(value, f"{before}{name}/") if isinstance(value, dict) else [(before + name, value)]
