"""What plays cuDNN's two calls where there is no CUDA: JAX's own reference, which runs anywhere.

`jax.experimental.rnn` is left as it is but for the two primitives it calls.
"""

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from elmo_jax.ops import lstm_pallas


def pretend(monkeypatch, there=True):
    """Whether there is CUDA, as far as the choice of a kernel goes."""
    monkeypatch.setattr(lstm_pallas, "on_cuda", lambda: there)


class Forward:
    """Plays `rnn_fwd_p`: y, h_n, c_n and what the backward call is to be given back."""

    def __init__(self):
        self.calls = []  # whether each was bidirectional, and whether in TF32

    def bind(self, *arrays, input_size, hidden_size, num_layers, dropout, bidirectional, cudnn_allow_tf32):
        x, h, c, packed, lengths = arrays
        self.calls.append((bidirectional, cudnn_allow_tf32))
        sizes = input_size, hidden_size, num_layers
        parts = rnn.unpack_lstm_weights(packed, *sizes, bidirectional)
        assert {a.dtype for a in arrays[:4]} == {jnp.dtype("float32")}
        return *rnn.lstm_ref(x, h, c, *parts, lengths, *sizes, dropout, bidirectional), jnp.zeros(1)


class Backward:
    """Plays `rnn_bwd_p`: the gradients of x, h_0, c_0 and the weights."""

    def bind(self, dy, dh, dc, x, h, c, packed, y, reserve, lengths, **sizes):
        run = lambda *args: Forward().bind(*args, lengths, **sizes)[:3]  # noqa: E731
        return jax.vjp(run, x, h, c, packed)[1]((dy, dh, dc))
