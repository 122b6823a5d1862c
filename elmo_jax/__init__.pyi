"""The public names of elmo_jax and the module that defines each."""

from .baselines.word_vectors import WordVectors
from .config import (
    BiLMConfig,
    CharCNNConfig,
    ClassifierConfig,
    CombinerConfig,
    DataConfig,
    OptimizerConfig,
)
from .data.batching import Batch, BatchStream, Documents
from .data.characters import character_ids
from .data.csv_dataset import Dataset, load_dataset
from .data.text import Vocabulary, clean, tokenize
from .elmo import Elmo
from .errors import InputError
from .models.bilm import BiLM
from .models.classifier import BiLSTMClassifier, classifier_loss
from .models.combiners import COMBINERS, FrozenMix, LearnedFunction, ScalarMix
from .models.lstm import LSTM, reverse_valid
from .ops.softmax import Negatives, full_nll, log_uniform_negatives, sampled_nll
from .parallel import Plan, make_mesh
from .sklearn import ElmoVectorizer
from .training.checkpoint import Run
from .training.evaluate import evaluate, predict
from .training.loop import fit
from .training.objectives import bilm_features, bilm_loss, bilm_sums, bilm_training
from .training.optimizers import make_optimizer
from .training.step import TrainState, train_step

__version__: str

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
    "Negatives",
    "OptimizerConfig",
    "Plan",
    "Run",
    "ScalarMix",
    "TrainState",
    "Vocabulary",
    "WordVectors",
    "bilm_features",
    "bilm_loss",
    "bilm_sums",
    "bilm_training",
    "character_ids",
    "classifier_loss",
    "clean",
    "evaluate",
    "fit",
    "full_nll",
    "load_dataset",
    "log_uniform_negatives",
    "make_mesh",
    "make_optimizer",
    "predict",
    "reverse_valid",
    "sampled_nll",
    "tokenize",
    "train_step",
]
