"""ELMo in JAX: train, load and use deep contextualised word vectors (Peters et al. 2018).

The public names stand in ``__init__.pyi`` and are imported on first use, so a program that needs
one kernel does not wait for scikit-learn, HDF5 and Orbax.
"""

import importlib
from typing import Any

import lazy_loader

from elmo_jax import _moved

__version__ = "0.1.0"

_get_name, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"elmo_jax.{name}") if name in _moved.MOVED else _get_name(name)
