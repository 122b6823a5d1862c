"""What `import elmo_jax` offers, and where each name is."""

from . import (
    bilm as bilm,
)
from . import (
    characters as characters,
)
from . import (
    checkpoint as checkpoint,
)
from . import (
    classifier as classifier,
)
from . import (
    combiners as combiners,
)
from . import (
    contiguous as contiguous,
)
from . import (
    corpus as corpus,
)
from . import (
    cudnn as cudnn,
)
from . import (
    data as data,
)
from . import (
    datasets as datasets,
)
from . import (
    dump as dump,
)
from . import (
    elmo as elmo,
)
from . import (
    embedders as embedders,
)
from . import (
    errors as errors,
)
from . import (
    estimator as estimator,
)
from . import (
    exported as exported,
)
from . import (
    hdf5 as hdf5,
)
from . import (
    inference as inference,
)
from . import (
    integrity as integrity,
)
from . import (
    lines as lines,
)
from . import (
    loop as loop,
)
from . import (
    lstm as lstm,
)
from . import (
    mesh as mesh,
)
from . import (
    metrics as metrics,
)
from . import (
    page as page,
)
from . import (
    pretrained as pretrained,
)
from . import (
    processes as processes,
)
from . import (
    progress as progress,
)
from . import (
    recurrence as recurrence,
)
from . import (
    report as report,
)
from . import (
    rows as rows,
)
from . import (
    rowwise as rowwise,
)
from . import (
    sample as sample,
)
from . import (
    sgns as sgns,
)
from . import (
    softmax as softmax,
)
from . import (
    steps as steps,
)
from . import (
    svd as svd,
)
from . import (
    tasks as tasks,
)
from . import (
    text as text,
)
from . import (
    train as train,
)
from . import (
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
