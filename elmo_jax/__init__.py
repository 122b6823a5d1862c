"""ELMo in JAX: train, load and use deep contextualized word vectors (Peters et al. 2018).

The public names stand in ``__init__.pyi``. Each is imported on first use, so that a program which needs one
of them does not import scikit-learn, HDF5 and Orbax.
"""

import importlib
from typing import Any

import lazy_loader

from elmo_jax._moved import MOVED

__version__ = "0.1.0"

_get_public_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"elmo_jax.{name}") if name in MOVED else _get_public_name(name)
