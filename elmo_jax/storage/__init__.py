"""Safe files: atomic writes, digests, locks, configurations and HDF5."""
