"""cuDNN's kernel: the layer it makes is the plain scan's, and who may ask for it.

Where there is no CUDA its calls are played, see tests/helpers/cuda.py; all else is what runs there.
"""

import cuda
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lstm_cases import LENGTHS, B, D, H, T, close, layer_and_inputs, needs_cuda, outputs_and_gradients

from elmo_jax.data.batching import Batch
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM, BiLMConfig
from elmo_jax.models.lstm import LSTM
from elmo_jax.ops import cudnn
from elmo_jax.ops.cudnn import unsupported_reason
from elmo_jax.ops.lstm import Clips
from elmo_jax.training.objectives import bilm_loss, init_params


@pytest.mark.parametrize("lengths", [LENGTHS, jnp.full(B, T, jnp.int32)], ids=["ragged", "full"])
def test_it_is_the_plain_scan_in_values_and_gradients(played, lengths):
    gradients, outputs = outputs_and_gradients("cudnn", lengths)
    assert len(played) == D and not any(bidirectional for bidirectional, _ in played)
    close((gradients, outputs), outputs_and_gradients("plain", lengths))
    assert all(jnp.abs(g).max() > 0.01 for g in jax.tree.leaves(gradients))


def test_a_row_without_a_step_keeps_its_state(played):
    params, x, state = layer_and_inputs()
    _, last = LSTM(H, kernel="cudnn").apply({"params": params}, x, LENGTHS, state)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 2], b[:, 2]), last, state)
    assert not np.allclose(last.c[:, 1], state.c[:, 1])


@pytest.mark.parametrize(
    ("asked", "tf32"), [(None, True), ("bfloat16", True), ("highest", False), ("float32", False)]
)
def test_it_is_as_exact_as_other_products_are_asked_to_be(played, asked, tf32):
    params, x, _ = layer_and_inputs()
    with jax.default_matmul_precision(asked):
        LSTM(H, kernel="cudnn").apply({"params": params}, x, LENGTHS)
    assert played == [(False, tf32)] * D


def test_the_language_models_loss_is_the_same_with_either(played, standard_promotion):
    config = BiLMConfig(embedding=H, cells=H, dropout=0.0)
    batch = Batch.of([[5, 6, 7], [8]], shape=(B, T))
    params = init_params(BiLM(config, 9, "plain"), jax.random.key(0))
    found = []
    for kernel in ("cudnn", "plain"):
        task = bilm_loss(BiLM(config, 9, kernel))
        found.append(jax.value_and_grad(lambda p, t=task: t(p, batch, jax.random.key(1))[0])(params))
    assert len(played) == D * config.layers
    close(*found)


def test_what_cudnn_cannot_run_is_refused(monkeypatch):
    cuda.pretend(monkeypatch)
    assert LSTM(H, kernel="cudnn").choose() == "cudnn"
    for layer in (LSTM(H, 3), LSTM(H, clips=Clips(3.0)), LSTM(H, dtype="bfloat16"), LSTM(H, dtype="float64")):
        with pytest.raises(InputError, match=r"^--kernel cudnn: cuDNN .*; give --kernel auto$"):
            layer.clone(kernel="cudnn").choose()


def test_no_cuda_no_cudnn():
    if not cudnn.on_cuda():
        assert unsupported_reason(None, Clips(), "float32") == "there is no CUDA device here"
    with jax.default_device(jax.devices("cpu")[0]):
        assert not cudnn.on_cuda() and LSTM(H).choose() == "fast"


@needs_cuda
@pytest.mark.parametrize(("asked", "rtol"), [("float32", 1e-4), ("tensorfloat32", 2e-2)])
def test_on_real_cuda_it_is_the_plain_scan(asked, rtol):
    """LENGTHS hold an empty row, a short and a full one."""
    with jax.default_matmul_precision(asked):
        close(outputs_and_gradients("cudnn", LENGTHS), outputs_and_gradients("plain", LENGTHS), rtol)
