"""The --kernel flag and the `kernel` argument, on which saved models and runs do not depend."""

import json
import pickle

import cuda
import numpy as np
import pytest
import tiny

from elmo_jax.elmo import Elmo
from elmo_jax.models.lstm import LSTM
from experiments import downstream, pretrain

SENTENCES = [["the", "bank"], ["river", ".", "the"]]


@pytest.mark.parametrize(
    ("is_there", "flags", "reason"),
    [
        (False, [], "there is no CUDA device here"),
        (True, ["--cells", "5", "--embedding", "4"], "it has a projection"),
    ],
)
def test_persistent_kernel_is_refused_before_the_run_begins(
    is_there, flags, reason, tmp_path, monkeypatch, refused
):
    cuda.pretend(monkeypatch, is_there)
    args = ["--kernel", "persistent", "--output", tmp_path / "run", *flags]
    refused(pretrain.main, args, f'kernel "persistent" cannot run this layer: {reason}')
    assert not (tmp_path / "run").exists()


def test_persistent_kernel_is_refused_for_a_pretrained_model(elmo, tmp_path, monkeypatch, refused):
    elmo.save_pretrained(tmp_path / "model")
    cuda.pretend(monkeypatch)
    args = ["--pretrained", tmp_path / "model", "--kernel", "persistent", "--output", tmp_path / "run"]
    refused(downstream.main, args, "it has a projection")
    assert not (tmp_path / "run").exists()


def test_cudnn_kernel_warns_and_runs_as_auto(monkeypatch):
    for is_there, expected in ((False, "fast"), (True, "persistent")):
        cuda.pretend(monkeypatch, is_there)
        with pytest.warns(DeprecationWarning, match='kernel "cudnn" was removed and runs as "auto"'):
            assert LSTM(4, kernel="cudnn").choose() == expected


def test_saved_model_runs_with_any_kernel(elmo, tmp_path):
    plain = Elmo(elmo.model.clone(kernel="plain"), elmo.params, elmo.vocabulary)
    plain.save_pretrained(tmp_path / "model")
    assert "kernel" not in (tmp_path / "model" / "config.json").read_text()
    loaded = [Elmo.from_pretrained(tmp_path / "model", kernel=kernel) for kernel in ("plain", "auto")]
    assert [e.model.kernel for e in loaded] == ["plain", "auto"]
    assert Elmo.from_pretrained(tmp_path / "model", "bfloat16", "plain").model.kernel == "plain"
    assert pickle.loads(pickle.dumps(plain)).model.kernel == "plain"
    for a, b in zip(*(e.embed(SENTENCES) for e in loaded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_run_resumes_with_another_kernel(pretrained, corpus, monkeypatch, capsys, standard_promotion):
    flags = [*tiny.TINY, "--dataset", corpus, "--output", pretrained, "--resume"]
    flags += ["--epochs", "3", "--kernel", "cudnn"]
    assert tiny.call(pretrain.main, monkeypatch, *flags) == 0
    assert capsys.readouterr().err.count('warning: kernel "cudnn" was removed') == 1
    assert "kernel" not in json.loads((pretrained / "config.json").read_text())
