"""Model formats: the official bilm HDF5 format and folders that `Elmo.save_pretrained` writes."""

from elmo_jax._moved import old_names

_NAMES = "Slot read_bilm read_softmax slots write_bilm write_softmax"
__getattr__ = old_names(__name__, "elmo_jax.pretrained.bilm_format", _NAMES)
