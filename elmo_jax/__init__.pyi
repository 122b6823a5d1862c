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
    dump as dump,
    elmo as elmo,
    embedders as embedders,
    errors as errors,
    estimator as estimator,
    exported as exported,
    hdf5 as hdf5,
    inference as inference,
    integrity as integrity,
    lines as lines,
    loop as loop,
    lstm as lstm,
    mesh as mesh,
    metrics as metrics,
    page as page,
    pretrained as pretrained,
    processes as processes,
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
from .softmax import full_nll, sampled_nll
from .tasks import bilm_features, bilm_loss, bilm_sums
from .text import Vocabulary, clean, tokenize
from .train import OptimizerConfig, TrainState, evaluate, make_optimizer, train_step
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
