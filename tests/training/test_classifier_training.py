"""Training of the classifier: standardized features, which are saved and not trained."""

import jax
import numpy as np
import pytest

from elmo_jax.config import BiLMConfig, ClassifierConfig, OptimizerConfig
from elmo_jax.data.batching import BatchStream
from elmo_jax.models.bilm import BiLM
from elmo_jax.models.classifier import BiLSTMClassifier, standardize
from elmo_jax.models.combiners import ScalarMix
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.classifier import ClassifierTraining, FeatureSource, feature_statistics
from elmo_jax.training.objectives import bilm_features, init_params


@pytest.fixture
def source() -> FeatureSource:
    model = BiLM(BiLMConfig(embedding=4, cells=4, dropout=0.0), 50)
    return FeatureSource(bilm_features(model), {"bilm": init_params(model, jax.random.key(0))}, (3, 8))


def test_standardized_features_have_mean_0_and_variance_1_over_all_words(source, documents):
    statistics = feature_statistics(source, BatchStream(documents, 8, seed=0))
    batch = documents.batch(np.arange(len(documents)), 40)
    layers = standardize(statistics, source.features(source.params, batch, None))
    is_word = np.arange(40) < documents.lengths[:, None] + 1
    is_word[:, 0] = False
    x = np.asarray(layers, np.float64)[:, is_word]  # [L, words, F]
    assert x.shape[1] == documents.lengths.sum()
    np.testing.assert_allclose(x.mean(1), 0, atol=1e-3)
    np.testing.assert_allclose(x.std(1), 1, atol=2e-2)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("finetune", [False, True])
def test_statistics_are_saved_and_stay_as_they_were(source, documents, tmp_path, finetune):
    stream = BatchStream(documents, 8, seed=0)
    training = ClassifierTraining(
        source,
        ScalarMix(),
        BiLSTMClassifier(ClassifierConfig(hidden=4, classifier_layers=1), 3),
        OptimizerConfig(),
        epochs=1,
        finetune=finetune,
    )
    before = feature_statistics(source, stream)
    run = Run.create(tmp_path / "run", {}, monitor="val_loss")
    _, params = training.run(stream, documents, run)
    run.close()
    for name in ("mean", "scale"):
        np.testing.assert_array_equal(params["standardizer"][name], before[name])
    saved = Run.open(tmp_path / "run").restore_best(("params",))["params"]
    np.testing.assert_array_equal(saved["standardizer"]["mean"], before["mean"])
    assert ("bilm" in saved) == finetune
