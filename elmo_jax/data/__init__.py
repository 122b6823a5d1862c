"""Text files to batches of NumPy arrays; nothing here uses a device."""

from elmo_jax._moved import old_names

_NAMES = "ALL DIRECTIONS Batch BatchStream StepChunk Documents Stream"
__getattr__ = old_names(__name__, "elmo_jax.data.batching", _NAMES)
