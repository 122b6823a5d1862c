"""What `import elmo_jax` offers, and where each name is."""

from . import (
    bilm as bilm,
    characters as characters,
    checkpoint as checkpoint,
    classifier as classifier,
    combiners as combiners,
    contiguous as contiguous,
    corpus as corpus,
    cudnn as cudnn,
    data as data,
    datasets as datasets,
    dispatch as dispatch,
    dump as dump,
    elmo as elmo,
    embedders as embedders,
    errors as errors,
    estimator as estimator,
    exported as exported,
    fast as fast,
    hdf5 as hdf5,
    inference as inference,
    integrity as integrity,
    layout as layout,
    lines as lines,
    loop as loop,
    lstm as lstm,
    manual as manual,
    mesh as mesh,
    metrics as metrics,
    negatives as negatives,
    page as page,
    persistent as persistent,
    pretrained as pretrained,
    processes as processes,
    programs as programs,
    progress as progress,
    recurrence as recurrence,
    report as report,
    rows as rows,
    rowwise as rowwise,
    sample as sample,
    sgns as sgns,
    softmax as softmax,
    steps as steps,
    svd as svd,
    tasks as tasks,
    text as text,
    train as train,
    vectors as vectors,
)
from .bilm import BiLM, BiLMConfig
from .characters import character_ids
from .checkpoint import Run
from .classifier import BiLSTMClassifier, ClassifierConfig, classifier_loss
from .combiners import COMBINERS, CombinerConfig, FrozenMix, LearnedFunction, ScalarMix
from .data import Batch, BatchStream, Documents
from .datasets import DataConfig, Dataset, load_dataset
from .elmo import Elmo
from .embedders import CharCNNConfig
from .errors import InputError
from .estimator import ElmoVectorizer
from .loop import fit
from .lstm import LSTM, reverse_valid
from .mesh import Plan, make_mesh
from .negatives import Negatives, log_uniform_negatives
from .softmax import full_nll, sampled_nll
from .tasks import bilm_features, bilm_loss, bilm_sums, bilm_training
from .text import Vocabulary, clean, tokenize
from .train import OptimizerConfig, TrainState, evaluate, make_optimizer, predict, train_step
from .vectors import WordVectors

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
