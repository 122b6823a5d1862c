"""The public names of elmo_jax and the module that defines each."""

from .baselines.word_vectors import WordVectors as WordVectors
from .config import (
    BiLMConfig as BiLMConfig,
    CharCNNConfig as CharCNNConfig,
    ClassifierConfig as ClassifierConfig,
    CombinerConfig as CombinerConfig,
    DataConfig as DataConfig,
    OptimizerConfig as OptimizerConfig,
    TextConfig as TextConfig,
)
from .data.batching import Batch as Batch, BatchStream as BatchStream, Documents as Documents
from .data.characters import character_ids as character_ids
from .data.csv_dataset import Dataset as Dataset, load_dataset as load_dataset
from .data.text import Vocabulary as Vocabulary, clean as clean, tokenize as tokenize
from .elmo import Elmo as Elmo
from .errors import InputError as InputError
from .models.bilm import BiLM as BiLM
from .models.classifier import BiLSTMClassifier as BiLSTMClassifier, classifier_loss as classifier_loss
from .models.combiners import (
    COMBINERS as COMBINERS,
    FrozenMix as FrozenMix,
    LearnedFunction as LearnedFunction,
    ScalarMix as ScalarMix,
)
from .models.lstm import LSTM as LSTM, reverse_valid as reverse_valid
from .ops.softmax import (
    Negatives as Negatives,
    full_nll as full_nll,
    log_uniform_negatives as log_uniform_negatives,
    sampled_nll as sampled_nll,
)
from .parallel import Plan as Plan, make_mesh as make_mesh
from .predictors import TextClassifier as TextClassifier, TextClassifierConfig as TextClassifierConfig
from .sklearn import ElmoClassifier as ElmoClassifier, ElmoVectorizer as ElmoVectorizer
from .training.checkpoint import Run as Run
from .training.evaluate import evaluate as evaluate, predict as predict
from .training.loop import fit as fit
from .training.objectives import (
    bilm_features as bilm_features,
    bilm_loss as bilm_loss,
    bilm_sums as bilm_sums,
    bilm_training as bilm_training,
)
from .training.optimizers import make_optimizer as make_optimizer
from .training.step import TrainState as TrainState, train_step as train_step

__version__: str
