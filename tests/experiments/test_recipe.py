"""Tests of pre-training on a corpus with bilm-tf's recipe, at a small size."""

import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from elmo_jax.config import DataConfig
from elmo_jax.data.batching import Batch, ContiguousStream, Window
from elmo_jax.elmo import Elmo
from elmo_jax.models.bilm import BiLM, BiLMConfig, zero_state
from elmo_jax.models.lstm import LSTM
from elmo_jax.pretrained.bilm_format import slots
from elmo_jax.training.objectives import bilm_loss, bilm_window_loss
from elmo_jax.training.optimizers import make_optimizer
from experiments import pretrain
from experiments.common.config import CorpusConfig
from experiments.common.estimate import matmul_flops
from experiments.common.inputs import load_texts

CHARACTERS = ["--filters", "1", "3", "2", "4", "--character-features", "3"]
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
        small = SMALL + ([] if "words" in args else CHARACTERS)
        small += [] if "sentences" in args else ["--unroll", "5"]
        monkeypatch.setattr("sys.argv", ["x", "--preset", "elmo-small", *small, *where, *args])
        return pretrain.main()

    return run


def test_resumed_recipe_equals_an_uninterrupted_run_and_exports_to_the_official_format(corpus, tmp_path):
    assert corpus("--epochs", "2", "--output", "whole") == 0
    assert corpus("--epochs", "1", "--output", "parts") == 0
    for name in ("a.txt", "b.txt"):  # a moved corpus with the same content is accepted
        (tmp_path / name).rename(tmp_path / f"moved_{name}")
    moved = ["--corpus", "moved_*.txt"]
    assert corpus("--epochs", "2", "--output", "parts", "--resume", *moved) == 0
    whole, parts = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "parts")
    )
    for a, b in zip(whole, parts, strict=True):  # equal only if the carried state was saved
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


def load(**settings):
    corpus = CorpusConfig(corpus="[ab].txt", valid_corpus="v.txt", **settings)
    return corpus, load_texts(DataConfig(min_count=1, max_length=6), corpus, with_characters=False)


@pytest.mark.parametrize("batching", ["sentences", "contiguous"])
def test_dry_run_estimates_the_run_and_writes_nothing(corpus, tmp_path, capsys, monkeypatch, batching):
    cache = Path(os.environ["XDG_CACHE_HOME"])
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(pretrain, "DRY_RUN_TOKENS", 60)
    flags = ["--steps-per-call", "1", "--batch-size", "1", "--batching", batching]
    assert corpus(*flags, "--epochs", "10", "--dry-run") == 0
    printed = capsys.readouterr().out
    parts = ("parameters", "memory: ", "million FLOPs a token", " tokens/s, ", " steps in ", " hours")
    assert all(part in printed for part in parts) and re.search(r"documents: \d+ \(train\)", printed), printed
    assert sorted(tmp_path.rglob("*")) == before and not list(cache.rglob("*"))
    fraction = float(re.search(r"first ([\d.]+)% of the corpus", printed)[1]) / 100
    assert 0.1 < fraction < 0.6
    estimated = int(re.search(r"the run: ([\d,]+) steps", printed)[1].replace(",", ""))
    config, texts = load(batching=batching, unroll=5)
    steps = texts.stream(config, 1, 1, 1).steps_per_epoch
    assert 0.5 < estimated / (10 * steps) < 2


def test_long_sentences_are_cut_only_when_batches_hold_sentences(corpus):
    with open("a.txt", "a") as file:
        file.write(2 * (" ".join(["bank"] * 30) + "\n"))
    with pytest.warns(UserWarning, match=r"2 sentences were longer than 6 tokens and were cut"):
        config, texts = load()
    assert max(texts.stream(config, 4, 1, 1).bounds) == 8
    _, texts = load(batching="contiguous")
    assert texts.train.lengths.max() == 30


@pytest.mark.filterwarnings("always:.*unknown to the vocabulary")
def test_unknown_words_are_predicted_as_one_class(corpus, tmp_path, capsys):
    (tmp_path / "v.txt").write_text("the unheard bank\n")
    (tmp_path / "a.txt").write_text("the rare bank rose .\n" * 2 + "a once\n")
    assert corpus("--input", "words", "--min-count", "2", "--epochs", "1", "--output", "w") == 0
    assert "warning: 33.3% of the tokens are unknown" in capsys.readouterr().err
    record = json.loads((tmp_path / "w" / "metrics.jsonl").read_text())
    assert np.isfinite(record["perplexity"]) and record["skipped"] == 0


def test_lines_of_the_corpus_are_held_out(corpus):
    texts, same, other = (
        load_texts(
            DataConfig(min_count=1, split_seed=seed, tokens="words"), CorpusConfig(corpus="[ab].txt"), False
        )
        for seed in (0, 0, 1)
    )
    assert (len(texts.train), len(texts.held_out)) == (56, 14)
    assert texts.digest == same.digest != other.digest


def test_a_window_that_is_too_long_is_refused(corpus, capsys):
    assert corpus("--unroll", "5000") == 2
    assert "lower --batch-size or --unroll" in capsys.readouterr().err


def test_loss_of_a_window_with_one_sentence_equals_the_sentence_loss():
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


def test_matmul_flops_count_every_step_of_the_recurrence():
    steps, rows, inputs, cells, width = 7, 3, 4, 6, 5
    lstm = LSTM(cells, projection=width)
    x, lengths = jnp.ones((2, rows, steps, inputs)), jnp.full(rows, steps)
    params = lstm.init(jax.random.key(0), x, lengths)
    forward = lambda params, x: lstm.apply(params, x, lengths)[0].sum()  # noqa: E731
    once = 2 * steps * 2 * rows * (inputs * 4 * cells + width * 4 * cells + cells * width)
    assert matmul_flops(jax.make_jaxpr(forward)(params, x).jaxpr) == once
    back = jax.make_jaxpr(jax.grad(forward, argnums=(0, 1)))(params, x)
    first_state = 2 * 2 * rows * 4 * cells * width  # the jaxpr includes its gradient, which XLA removes
    assert matmul_flops(back.jaxpr) == 3 * once + first_state


def test_two_windows_with_carried_state_equal_one_long_window(documents):
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
def test_presets_match_the_released_models(name, cells, width, highway):
    config = pretrain.PRESETS[f"elmo-{name}"]
    model, recipe = config.model, config.optimizer
    filters = [(1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024)]
    expected = {"char_embed": (261, 16), "CNN_proj/W_proj": (2048, width), "CNN_proj/b_proj": (width,)}
    for i, (size, count) in enumerate(filters):
        expected |= {f"CNN/W_cnn_{i}": (1, size, 16, count), f"CNN/b_cnn_{i}": (count,)}
    for k in range(highway):
        expected |= {f"CNN_high_{k}/W_{gate}": (2048, 2048) for gate in ("carry", "transform")}
        expected |= {f"CNN_high_{k}/b_{gate}": (2048,) for gate in ("carry", "transform")}
    for d in (0, 1):
        for layer in (0, 1):
            cell = f"RNN_{d}/RNN/MultiRNNCell/Cell{layer}/LSTMCell/"
            expected |= {f"{cell}W_0": (2 * width, 4 * cells), f"{cell}B": (4 * cells,)}
            expected |= {f"{cell}W_P_0": (cells, width)}
    assert {slot.dataset: slot.shape for slot in slots(model)} == expected
    assert model.skip and model.cell_clip == model.projection_clip == 3
    assert model.characters.activation == "relu" and model.layers == 2
    assert (config.corpus.batching, config.corpus.unroll, config.batch_size) == ("contiguous", 20, 128)
    assert (config.negatives, config.softmax, model.dropout, model.tie) == (8192, "sampled", 0.1, False)
    assert (recipe.optimizer, recipe.learning_rate, recipe.clip_norm) == ("adagrad", 0.2, 10.0)


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("size", [0.01, 40.0])
def test_recipe_takes_adagrad_steps(size):
    """bilm-tf sums gradients over 20 unrolled steps, clips them, and starts accumulators at 1."""
    optimizer = make_optimizer(pretrain.PRESETS["elmo-small"].optimizer, 100)
    gradient = size * np.array([0.6, -0.8])
    params = {"w": jnp.zeros(2)}
    state, total = optimizer.init(params), np.ones(2)
    for _ in range(3):
        updates, state = optimizer.update({"w": jnp.array(gradient, jnp.float32)}, state, params)
        g = 20 * gradient * min(1, 10 / np.linalg.norm(20 * gradient))
        total = total + g**2
        np.testing.assert_allclose(updates["w"], -0.2 * g / np.sqrt(total), rtol=1e-5)
