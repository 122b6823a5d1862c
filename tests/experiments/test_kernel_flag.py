"""--kernel: who may ask for what, and that a model and a run know nothing of it."""

import json
import pickle
import sys

import cuda as pretended
import numpy as np
import pytest

from elmo_jax.elmo import Elmo
from experiments import downstream, pretrain

SENTENCES = [["the", "bank"], ["river", ".", "the"]]


@pytest.mark.parametrize(
    ("cuda", "flags", "said"),
    [
        (False, [], "there is no CUDA device here"),
        (True, ["--cells", "5", "--embedding", "4"], "cuDNN projects no cells, and these are projected"),
        (True, ["--cell-clip", "3"], "cuDNN clips no cells here, and these are clipped"),
        (True, ["--dtype", "bfloat16"], "cuDNN here computes in float32 or TF32, not in bfloat16"),
    ],
)
def test_cudnn_is_refused_where_it_cannot_be(cuda, flags, said, tmp_path, monkeypatch, refused):
    pretended.pretend(monkeypatch, cuda)
    args = ["--kernel", "cudnn", "--output", tmp_path / "run", *flags]
    refused(pretrain.main, args, f"--kernel cudnn: {said}; give --kernel auto")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("cuda", "flags", "said"),
    [
        (False, [], "there is no CUDA device here"),
        (True, ["--cells", "5", "--embedding", "4"], "the persistent kernel projects no cells"),
        (True, ["--cells", "300", "--embedding", "300"], "the persistent kernel runs up to 256 cells"),
    ],
)
def test_the_persistent_kernel_is_refused_where_it_cannot_be(
    cuda, flags, said, tmp_path, monkeypatch, refused
):
    pretended.pretend(monkeypatch, cuda)
    args = ["--kernel", "persistent", "--output", tmp_path / "run", *flags]
    refused(pretrain.main, args, f"--kernel persistent: {said}")


@pytest.mark.parametrize(("cuda", "said"), [(False, "there is no CUDA"), (True, "cuDNN projects no cells")])
def test_the_language_model_under_a_classifier_counts_too(cuda, said, elmo, tmp_path, monkeypatch, refused):
    elmo.save_pretrained(tmp_path / "model")
    pretended.pretend(monkeypatch, cuda)
    args = ["--pretrained", tmp_path / "model", "--kernel", "cudnn", "--output", tmp_path / "run"]
    refused(downstream.main, args, f"--kernel cudnn: {said}")
    assert not (tmp_path / "run").exists()


def test_a_saved_model_runs_with_any_kernel(elmo, tmp_path):
    plain = Elmo(elmo.model.clone(kernel="plain"), elmo.params, elmo.vocabulary)
    plain.save_pretrained(tmp_path / "model")
    assert "kernel" not in (tmp_path / "model" / "config.json").read_text()
    loaded = [Elmo.from_pretrained(tmp_path / "model", kernel=kernel) for kernel in ("plain", "auto")]
    assert [e.model.kernel for e in loaded] == ["plain", "auto"]
    assert Elmo.from_pretrained(tmp_path / "model", "bfloat16", "plain").model.kernel == "plain"
    assert pickle.loads(pickle.dumps(plain)).model.kernel == "plain"
    for a, b in zip(*(e.embed(SENTENCES) for e in loaded), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_run_goes_on_with_another_kernel(tmp_path, monkeypatch, standard_promotion):
    for part in ("train", "test"):
        rows = [f"{i % 2 + 1},the bank raised rates {i % 7}" for i in range(20)]
        (tmp_path / f"{part}.csv").write_text("\n".join(rows))
    sizes = ["--cells", "4", "--embedding", "4", "--layers", "1", "--min-count", "1", "--batch-size", "8"]
    args = ["prog", "--dataset", str(tmp_path), "--output", str(tmp_path / "run"), *sizes]
    for more in (["--epochs", "1", "--kernel", "plain"], ["--epochs", "2", "--kernel", "fast", "--resume"]):
        monkeypatch.setattr(sys, "argv", [*args, *more])
        assert pretrain.main() == 0
    assert "kernel" not in json.loads((tmp_path / "run" / "config.json").read_text())
