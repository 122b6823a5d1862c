"""ELMo in JAX: train, load and use deep contextualised word vectors (Peters et al. 2018)."""

from elmo_jax.bilm import BiLM, BiLMConfig
from elmo_jax.characters import character_ids
from elmo_jax.classifier import BiLSTMClassifier, ClassifierConfig, classifier_loss
from elmo_jax.combiners import COMBINERS, CombinerConfig, FrozenMix, LearnedFunction, ScalarMix
from elmo_jax.data import Batch, BatchStream, Documents
from elmo_jax.datasets import DataConfig, Dataset, load_dataset
from elmo_jax.elmo import Elmo
from elmo_jax.embedders import CharCNNConfig
from elmo_jax.errors import InputError
from elmo_jax.estimator import ElmoVectorizer
from elmo_jax.fit import fit
from elmo_jax.lstm import LSTM, reverse_valid
from elmo_jax.softmax import full_nll, sampled_nll
from elmo_jax.tasks import bilm_features, bilm_loss, bilm_sums
from elmo_jax.text import Vocabulary, clean, tokenize
from elmo_jax.train import OptimizerConfig, TrainState, evaluate, make_optimizer, train_step
from elmo_jax.vectors import WordVectors

__version__ = "0.1.0"

__all__ = [
    "COMBINERS",
    "LSTM",
    "Batch",
    "BatchStream",
    "BiLM",
    "BiLMConfig",
    "BiLSTMClassifier",
    "CharCNNConfig",
    "ClassifierConfig",
    "CombinerConfig",
    "DataConfig",
    "Dataset",
    "Documents",
    "Elmo",
    "ElmoVectorizer",
    "FrozenMix",
    "InputError",
    "LearnedFunction",
    "OptimizerConfig",
    "ScalarMix",
    "TrainState",
    "Vocabulary",
    "WordVectors",
    "bilm_features",
    "bilm_loss",
    "bilm_sums",
    "character_ids",
    "classifier_loss",
    "clean",
    "evaluate",
    "fit",
    "full_nll",
    "load_dataset",
    "make_optimizer",
    "reverse_valid",
    "sampled_nll",
    "tokenize",
    "train_step",
]
