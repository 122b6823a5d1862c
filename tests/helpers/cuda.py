"""CUDA, as far as the choice of a kernel goes, on a machine without it."""

from elmo_jax.ops import lstm_pallas


def pretend(monkeypatch, there=True):
    """Let the choice of a kernel find CUDA, or not."""
    monkeypatch.setattr(lstm_pallas, "on_cuda", lambda: there)
