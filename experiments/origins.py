"""What runs are made from, as it is now: digests to hold a run's ``config.json`` against."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from elmo_jax.bilm import BiLM
from elmo_jax.checkpoint import RESULTS, VOCABULARY
from elmo_jax.datasets import DataConfig, load_dataset
from elmo_jax.elmo import Elmo
from elmo_jax.errors import InputError
from elmo_jax.integrity import read_config, tree_digest
from elmo_jax.tasks import init_params
from elmo_jax.text import Vocabulary
from elmo_jax.vectors import WordVectors
from experiments.sources import VECTORS, SourceConfig, data_of, thinned


class Origins:
    """Digests of data sets and of features, each computed once: a data set's for good, those of a
    run until the run is finished anew.

    Example:
        >>> origins = Origins()
        >>> len(origins.texts(DataConfig()))
        64
    """

    def __init__(self):
        self._texts: dict[tuple[Any, ...], str] = {}
        self._features: dict[tuple[Any, ...], str] = {}
        self._models: dict[tuple[Path, int], BiLM] = {}

    def texts(self, data: DataConfig, spelled: bool = False, labels: float = 1.0, seed: int = 0) -> str:
        """As runs that read this data set record it as "texts".

        Args:
            data: which texts.
            spelled: whether the language model reads characters.
            labels: share of the labelled documents that are used.
            seed: of their choice.

        Raises:
            InputError: the data set cannot be read.
        """
        key = (data, spelled, labels, seed if labels < 1 else None)
        if key not in self._texts:
            self._texts[key] = thinned(load_dataset(data, spelled=spelled), labels, seed).digest
        return self._texts[key]

    def classifier(self, source: SourceConfig, seed: int) -> dict[str, str]:
        """What a classifier on these features records: "texts", and "model", the parameters it builds on.

        Args:
            source: of the features; its run is finished.
            seed: of the classifier, and of a language model without training.

        Raises:
            InputError: the features' run is damaged.
        """
        path = Path(source.pretrained if source.features == "elmo" else source.vectors or "")
        made = (path, (path / RESULTS).stat().st_mtime_ns)
        key = (*made, source.features, seed if source.untrained else None)
        if key not in self._features:
            self._features[key] = self._digest(source, made, seed)
        saved = read_config(path)
        texts = saved.get("texts", "")
        if source.labels < 1 and (data := data_of(path)) is not None:
            texts = self.texts(data, _spelled(saved), source.labels, seed)
        return {"texts": texts, "model": self._features[key]}

    def _digest(self, source: SourceConfig, made: tuple[Path, int], seed: int) -> str:
        path, _ = made
        if source.features != "elmo":
            return tree_digest(WordVectors.load(path / VECTORS).table(Vocabulary.load(path / VOCABULARY)))
        if source.untrained and made in self._models:
            return tree_digest(init_params(self._models[made], jax.random.key(seed)))
        elmo = Elmo.from_pretrained(path)
        self._models[made] = elmo.model
        return tree_digest(init_params(elmo.model, jax.random.key(seed)) if source.untrained else elmo.params)

    def given(self, path: Path) -> DataConfig:
        """The data set of a language model that a comparison is given.

        Raises:
            InputError: it is no finished run of ``experiments.pretrain`` on a labelled data set, it is
                damaged, or the data set holds other texts now.
        """
        saved = read_config(path)
        if not isinstance(saved.get("model"), dict) or not (path / RESULTS).is_file():
            raise InputError(f"{path}: is not a finished run of experiments.pretrain; finish it first")
        data = data_of(path)
        if data is None:
            raise InputError(f"{path}: was not made from a labelled data set; give a run that was")
        self.classifier(SourceConfig(pretrained=str(path)), 0)  # it can be loaded
        if self.texts(data, _spelled(saved)) != saved.get("texts"):
            raise InputError(f"{path}: was made from other texts than its data set holds now; make it anew")
        return data


def _spelled(saved: Mapping[str, Any]) -> bool:
    """Whether a run's language model reads characters, by its configuration."""
    model = saved.get("model")
    return isinstance(model, dict) and model.get("input") == "characters"
