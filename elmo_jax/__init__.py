"""ELMo in JAX: train, load and use deep contextualised word vectors (Peters et al. 2018).

Names are those of ``__init__.pyi``, imported when they are asked for: whoever needs one
kernel does not wait for scikit-learn, HDF5 and Orbax, nor give them 150 MB.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
