"""Benchmark cases at shapes that compile and run in a moment, and stand-ins for cuDNN's two calls."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.experimental import rnn

from experiments.benchmark.cases import CASES, make_inputs

BY_NAME = {case.name: case for case in CASES}
_SHAPES = {"batch": 3, "steps": 5, "vocabulary": 40, "sentences": 3, "cells": 6}
_CNN = {"filters": ((1, 3), (2, 5)), "characters": 4}


def tiny(name):
    """Return a case at a small shape."""
    case = BY_NAME[name]
    width = 6 if case.cells == case.width else 4
    few = {"negatives": 7} if case.negatives else {}
    return replace(case, **_SHAPES, width=width, **few, **(_CNN if case.filters else {}))


def build(module, case, suffix=""):
    """Return a module's implementation of a case."""
    arrays, _ = make_inputs(case, seed=1)
    return getattr(module, f"build_{case.part}{suffix}")(case, arrays)


class CudnnForward:
    """JAX's reference LSTM in place of `rnn_fwd_p`; `calls` records whether each allowed TF32."""

    def __init__(self):
        self.calls = []

    def bind(self, *arrays, input_size, hidden_size, num_layers, dropout, bidirectional, cudnn_allow_tf32):
        x, h, c, packed, lengths = arrays
        self.calls.append(cudnn_allow_tf32)
        assert not bidirectional
        sizes = input_size, hidden_size, num_layers
        parts = rnn.unpack_lstm_weights(packed, *sizes, bidirectional)
        assert {a.dtype for a in arrays[:4]} == {jnp.dtype("float32")}
        return *rnn.lstm_ref(x, h, c, *parts, lengths, *sizes, dropout, bidirectional), jnp.zeros(1)


class CudnnBackward:
    """The gradients of that reference in place of `rnn_bwd_p`."""

    def bind(self, dy, dh, dc, x, h, c, packed, y, reserve, lengths, **sizes):
        run = lambda *args: CudnnForward().bind(*args, lengths, **sizes)[:3]  # noqa: E731
        return jax.vjp(run, x, h, c, packed)[1]((dy, dh, dc))
