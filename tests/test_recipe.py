"""bilm-tf's recipe at a small size, from shards to a file in the official format."""

import json

import jax
import numpy as np
import pytest

from elmo_jax.bilm import BiLM, BiLMConfig, zero_state
from elmo_jax.contiguous import ContiguousStream, Window
from elmo_jax.data import Batch
from elmo_jax.elmo import Elmo
from elmo_jax.tasks import bilm_loss, bilm_window_loss
from experiments import pretrain

MODEL = ["--filters", "1", "3", "2", "4", "--character-features", "3", "--embedding", "6", "--cells", "8"]
SMALL = [*MODEL, "--batch-size", "4", "--unroll", "5"]


@pytest.fixture
def corpus(tmp_path, rng, monkeypatch):
    words = np.array(["the", "bank", "river", "rose", "flood", "."])
    for name, count in (("a.txt", 40), ("b.txt", 30), ("v.txt", 8)):
        lines = [" ".join(words[rng.integers(0, 6, rng.integers(2, 7))]) for _ in range(count)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)

    def run(*args):
        where = ["--corpus", "[ab].txt", "--valid-corpus", "v.txt", "--min-count", "1", "--seed", "1"]
        monkeypatch.setattr("sys.argv", ["x", "--preset", "elmo-small", *SMALL, *where, *args])
        return pretrain.main()

    return run


def test_shards_to_the_official_format(corpus, tmp_path, capsys):
    assert corpus("--epochs", "2", "--output", "whole") == 0
    assert corpus("--epochs", "1", "--output", "parts") == 0
    assert corpus("--epochs", "2", "--output", "parts", "--resume") == 0
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    for a, b in zip(whole, parts, strict=True):  # the carried state was saved too
        assert {k: v for k, v in a.items() if "second" not in k} == {
            k: v for k, v in b.items() if "second" not in k
        }
    elmo = Elmo.from_pretrained("whole")
    assert elmo.model.config.skip and elmo.model.config.cell_clip == 3
    elmo.save_bilm("options.json", "weights.hdf5")
    back = Elmo.from_bilm("options.json", "weights.hdf5")
    text = [line.split() for line in (tmp_path / "v.txt").read_text().splitlines()]
    each = elmo.surprisal(text)
    for a, b in zip(each, back.surprisal(text), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(elmo.embed(text)[0], back.embed(text)[0])
    mean = np.concatenate([a.ravel() for a in each]).mean()
    assert np.isclose(np.exp(mean), min(r["perplexity"] for r in whole), rtol=1e-3)
    capsys.readouterr()
    assert corpus("--dry-run", "--output", "none") == 0
    said = capsys.readouterr().out
    assert "tokens/s" in said and "hours" in said and not (tmp_path / "none").exists()


@pytest.mark.parametrize("batching", ["sentences", "contiguous"])
def test_unknown_words_are_a_class_of_a_model_of_words(corpus, tmp_path, batching):
    (tmp_path / "v.txt").write_text("the unheard bank\n")
    (tmp_path / "a.txt").write_text("the rare bank rose .\n" * 2 + "a once\n")
    flags = ["--input", "words", "--min-count", "2", "--epochs", "1", "--batching", batching, "--output", "w"]
    assert corpus(*flags) == 0
    record = json.loads((tmp_path / "w" / "metrics.jsonl").read_text())
    assert np.isfinite(record["perplexity"]) and record["skipped"] == 0


def test_flags_that_need_each_other(corpus, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x", "--corpus", "a.txt"])
    assert pretrain.main() == 2
    assert "--corpus needs --valid-corpus" in capsys.readouterr().err
    assert corpus("--unroll", "5000") == 2
    assert "lower --batch-size or --unroll" in capsys.readouterr().err


def test_a_window_of_one_sentence_is_the_sentence():
    """Both readings predict the same tokens from the same past, so their losses are one."""
    model = BiLM(BiLMConfig(embedding=6, cells=6, dropout=0.0), 20)
    batch = Batch.of([[4, 5, 6, 7]])
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    read = np.stack([batch.words, batch.words[:, ::-1]])  # [D, B, T]
    window = Window(read, np.ones((2, 1, 5), np.float32))
    key = jax.random.key(1)
    want, sums = jax.jit(bilm_loss(model))(params, batch, key)
    given = params | {"state": zero_state(model.config, 1)}
    got, window_sums = jax.jit(bilm_window_loss(model))(given, window, key)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    for name, value in sums.items():
        np.testing.assert_allclose(window_sums[name], value, rtol=1e-6)


def test_the_state_goes_from_window_to_window(documents):
    """Two windows with the state carried are one window of twice the length."""
    model = BiLM(BiLMConfig(embedding=6, cells=6, dropout=0.0), 50)
    short, long = (ContiguousStream(documents, 2, unroll, seed=1) for unroll in (4, 8))
    params = jax.jit(model.init)(jax.random.key(0), Batch.of([[4]]))["params"]
    loss = jax.jit(bilm_window_loss(model))
    state, total = zero_state(model.config, 2), 0.0
    for step in range(2):
        _, sums = loss(params | {"state": state}, short.window(step), jax.random.key(1))
        state, total = sums["state"], total + sums["nll_forward"] + sums["nll_backward"]
    _, whole = loss(params | {"state": zero_state(model.config, 2)}, long.window(0), jax.random.key(1))
    np.testing.assert_allclose(total, whole["nll_forward"] + whole["nll_backward"], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), state, whole["state"])
