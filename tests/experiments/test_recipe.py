"""bilm-tf's recipe at a small size, from shards to a file in the official format."""

import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elmo_jax.data.batching import Batch, ContiguousStream, Window
from elmo_jax.elmo import Elmo
from elmo_jax.models.bilm import BiLM, BiLMConfig, zero_state
from elmo_jax.models.lstm import LSTM
from elmo_jax.pretrained.bilm_format import slots
from elmo_jax.training.objectives import bilm_loss, bilm_window_loss
from elmo_jax.training.optimizers import make_optimizer
from experiments import pretrain
from experiments.pretrain import matmul_flops

SPELLING = ["--filters", "1", "3", "2", "4", "--character-features", "3"]
SMALL = ["--embedding", "6", "--cells", "8", "--batch-size", "4", "--negatives", "5"]


@pytest.fixture
def corpus(tmp_path, rng, monkeypatch):
    words = np.array(["the", "bank", "river", "rose", "flood", "."])
    for name, count in (("a.txt", 40), ("b.txt", 30), ("v.txt", 8)):
        lines = [" ".join(words[rng.integers(0, 6, rng.integers(2, 7))]) for _ in range(count)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)

    def run(*args):
        where = ["--corpus", "[ab].txt", "--valid-corpus", "v.txt", "--min-count", "1", "--seed", "1"]
        small = SMALL + ([] if "words" in args else SPELLING)
        small += [] if "sentences" in args else ["--unroll", "5"]
        monkeypatch.setattr("sys.argv", ["x", "--preset", "elmo-small", *small, *where, *args])
        return pretrain.main()

    return run


def test_shards_to_the_official_format(corpus, tmp_path):
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


@pytest.mark.parametrize("batching", ["sentences", "contiguous"])
def test_a_dry_run_says_what_a_run_costs_and_writes_nothing(corpus, tmp_path, capsys, monkeypatch, batching):
    cache = Path(os.environ["XDG_CACHE_HOME"])
    before = sorted(tmp_path.rglob("*"))
    assert corpus("--dry-run", "--batching", batching) == 0
    said = capsys.readouterr().out
    parts = ("parameters", "memory: ", "million FLOPs a token", " tokens/s, ", " steps in ", " hours")
    assert all(part in said for part in parts) and re.search(r"documents: \d+ \(train\)", said), said
    assert sorted(tmp_path.rglob("*")) == before and not list(cache.rglob("*"))
    monkeypatch.setattr(pretrain, "PORTION", 60)
    flags = ["--steps-per-call", "1", "--batch-size", "1", "--batching", batching]
    assert corpus(*flags, "--epochs", "10", "--dry-run") == 0
    part = capsys.readouterr().out
    share = float(re.search(r"first ([\d.]+)% of the corpus", part)[1]) / 100
    assert 0.1 < share < 0.6
    total = int(re.search(r"the run: ([\d,]+) steps", part)[1].replace(",", ""))
    assert corpus(*flags, "--epochs", "1") == 0
    true = int(re.search(r"batches: ([\d,]+) an epoch", capsys.readouterr().out)[1].replace(",", ""))
    assert 0.5 < total / (10 * true) < 2


@pytest.mark.filterwarnings("default")  # the command prints them
def test_long_lines_are_cut_in_sentences_and_only_there(corpus, capsys):
    flags = ["--epochs", "1", "--max-length", "6", "--batching", "sentences", "--output", "cut"]
    long = " ".join(["bank"] * 30) + "\n"
    with open("a.txt", "a") as file:
        file.write(2 * long)
    assert corpus(*flags) == 0
    said = capsys.readouterr()
    assert said.err.count("2 sentences were longer than 6 tokens and were cut (--max-length)") == 1
    assert "lengths up to 8," in said.out
    assert corpus("--epochs", "1", "--max-length", "6", "--output", "whole") == 0


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


def test_arithmetic_is_counted_through_the_recurrence():
    steps, rows, inputs, cells, width = 7, 3, 4, 6, 5
    lstm = LSTM(cells, projection=width)
    x, lengths = jnp.ones((2, rows, steps, inputs)), jnp.full(rows, steps)
    params = lstm.init(jax.random.key(0), x, lengths)
    forward = lambda params, x: lstm.apply(params, x, lengths)[0].sum()  # noqa: E731
    once = 2 * steps * 2 * rows * (inputs * 4 * cells + width * 4 * cells + cells * width)
    assert matmul_flops(jax.make_jaxpr(forward)(params, x).jaxpr) == once
    back = jax.make_jaxpr(jax.grad(forward, argnums=(0, 1)))(params, x)
    first_state = 2 * 2 * rows * 4 * cells * width  # its gradient is one more, which XLA drops
    assert matmul_flops(back.jaxpr) == 3 * once + first_state


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


@pytest.mark.parametrize(
    ("name", "cells", "width", "highway"),
    [("small", 1024, 128, 1), ("medium", 2048, 256, 2), ("original", 4096, 512, 2)],
)
def test_presets_are_the_released_sizes_and_their_recipe(name, cells, width, highway):
    config = pretrain.PRESETS[f"elmo-{name}"]
    model, recipe = config.model, config.optimizer
    filters = [(1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024)]
    enabled = {"char_embed": (261, 16), "CNN_proj/W_proj": (2048, width), "CNN_proj/b_proj": (width,)}
    for i, (size, count) in enumerate(filters):
        enabled |= {f"CNN/W_cnn_{i}": (1, size, 16, count), f"CNN/b_cnn_{i}": (count,)}
    for k in range(highway):
        enabled |= {f"CNN_high_{k}/W_{gate}": (2048, 2048) for gate in ("carry", "transform")}
        enabled |= {f"CNN_high_{k}/b_{gate}": (2048,) for gate in ("carry", "transform")}
    for d in (0, 1):
        for layer in (0, 1):
            cell = f"RNN_{d}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/"
            enabled |= {f"{cell}W_0": (2 * width, 4 * cells), f"{cell}B": (4 * cells,)}
            enabled |= {f"{cell}W_P_0": (cells, width)}
    assert {slot.dataset: slot.shape for slot in slots(model)} == enabled
    assert model.skip and model.cell_clip == model.projection_clip == 3
    assert model.characters.activation == "relu" and model.layers == 2
    assert (config.corpus.batching, config.corpus.unroll, config.batch_size) == ("contiguous", 20, 128)
    assert (config.negatives, config.softmax, model.dropout, model.tie) == (8192, "sampled", 0.1, False)
    assert (recipe.optimizer, recipe.learning_rate, recipe.clip_norm) == ("adagrad", 0.2, 10.0)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("size", [0.01, 40.0])
def test_steps_are_adagrads_from_an_accumulator_of_one(size):
    """On gradients that bilm-tf sums over its 20 unrolled steps, and then clips by their norm."""
    optimizer = make_optimizer(pretrain.PRESETS["elmo-small"].optimizer, 100)
    gradient = size * np.array([0.6, -0.8])
    params = {"w": jnp.zeros(2)}
    state, total = optimizer.init(params), np.ones(2)
    for _ in range(3):
        updates, state = optimizer.update({"w": jnp.array(gradient, jnp.float32)}, state, params)
        g = 20 * gradient * min(1, 10 / np.linalg.norm(20 * gradient))
        total = total + g**2
        np.testing.assert_allclose(updates["w"], -0.2 * g / np.sqrt(total), rtol=1e-5)
