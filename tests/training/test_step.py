"""Compiled calls of several steps: results, loops of fixed length, and compilation ahead of time."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from regression import loss_fn

from elmo_jax.config import OptimizerConfig
from elmo_jax.data import characters
from elmo_jax.data.batching import BatchStream, ContiguousStream
from elmo_jax.models.bilm import BiLM, BiLMConfig, zero_state
from elmo_jax.models.embedders import CharCNNConfig
from elmo_jax.training import step as step_module
from elmo_jax.training.objectives import bilm_loss, bilm_window_loss, init_params
from elmo_jax.training.optimizers import make_optimizer
from elmo_jax.training.step import MatmulBound, TrainState, compile_steps, compiler_options, train_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(0)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.05), 10)


def first_state():
    return TrainState.create({"table": jnp.ones(50)}, OPTIMIZER, {"scale": jnp.ones(())})


def train_epoch(run, stream):
    """Return the state after an epoch and the loss of every step."""
    state, losses = first_state(), []
    for batches, count in stream.chunks(0, stream.steps_per_epoch):
        state, sums = run(state, batches, count, KEY)
        losses += np.asarray(sums["loss"][:count]).tolist()
    return state, losses


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_disabled_step_changes_nothing(documents):
    batch = jax.tree.map(lambda a: a[0], next(BatchStream(documents, 4).chunks(0, 1)).batches)
    step = jax.jit(lambda enabled: train_step(first_state(), batch, KEY, loss_fn, OPTIMIZER, enabled))
    state, metrics = step(False)
    same(state, first_state())
    assert {float(value) for value in metrics.values()} == {0.0}
    state, metrics = step(True)
    assert int(state.step) == 1 and float(metrics["steps"]) == 1
    assert not np.array_equal(state.params["table"], 1)


def test_accelerator_loop_has_fixed_length_and_masks_the_excess(documents, monkeypatch):
    stream = BatchStream(documents, 4, seed=1, bounds=(32,), steps_per_call=8)
    assert stream.steps_per_epoch % 8
    expected = train_epoch(compile_steps(loss_fn, OPTIMIZER), stream)
    monkeypatch.setattr(step_module, "compiler_options", lambda matmul_bound: {})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ends, loop = [], jax.lax.fori_loop
    monkeypatch.setattr(jax.lax, "fori_loop", lambda *args: (ends.append(args[1]), loop(*args))[1])
    same(train_epoch(compile_steps(loss_fn, OPTIMIZER), stream), expected)
    assert ends == [8]  # fixed at compile time


def test_steps_compiled_ahead_serve_every_batch(documents, monkeypatch):
    stream = BatchStream(documents, 4, seed=1, bounds=(12, 32), steps_per_call=3)
    met = {d.batches.words.shape for d in stream.chunks(0, stream.steps_per_epoch)}
    assert {batches.words.shape for batches in stream.shapes()} == met and len(met) == 2
    character_ids = np.arange(2500, dtype=np.int32).reshape(50, 50) % 262
    spelled = replace(documents, character_ids=character_ids, group_size=4)
    with_characters = BatchStream(spelled, 4, seed=1, bounds=(12, 32))
    shapes = lambda batches: (batches.words.shape, batches.unique_words.first.shape)  # noqa: E731
    every = {shapes(d.batches) for d in with_characters.chunks(0, with_characters.steps_per_epoch)}
    assert {shapes(batches) for batches in with_characters.shapes()} == every and len(every) > 2
    expected = train_epoch(compile_steps(loss_fn, OPTIMIZER), stream)
    run = compile_steps(loss_fn, OPTIMIZER, first_state(), stream.shapes())

    def traced_again(*_, **__):
        raise AssertionError("a step is traced when its batch occurs")

    monkeypatch.setattr(step_module, "train_step", traced_again)
    same(train_epoch(run, stream), expected)


@pytest.mark.parametrize("all_steps", [False, True])
def test_step_is_traced_once_for_each_shape(documents, monkeypatch, all_steps):
    stream = BatchStream(documents, 4, seed=1, bounds=(12, 32), steps_per_call=3)
    calls = []
    monkeypatch.setattr(step_module, "runs_all_steps", lambda: all_steps)
    monkeypatch.setattr(step_module, "train_step", lambda *args: (calls.append(1), train_step(*args))[1])
    train_epoch(compile_steps(loss_fn, OPTIMIZER), stream)
    assert len(calls) == 2


def test_unexpected_shape_is_compiled_when_it_occurs(documents):
    stream = BatchStream(documents, 4, seed=1, bounds=(12, 32), steps_per_call=3)
    run = compile_steps(loss_fn, OPTIMIZER, first_state(), stream.shapes()[:1])
    same(train_epoch(run, stream), train_epoch(compile_steps(loss_fn, OPTIMIZER), stream))


def test_matmul_bound_options_change_only_rounding(documents, monkeypatch):
    model = BiLM(BiLMConfig(embedding=8, cells=6, layers=1, dropout=0.0), 50)
    stream = BatchStream(documents, 4, seed=1, bounds=(32,), steps_per_call=3)
    task, asked, options = bilm_loss(model), [], step_module.compiler_options
    monkeypatch.setattr(
        step_module,
        "compiler_options",
        lambda matmul_bound: (asked.append(matmul_bound), options(matmul_bound))[1],
    )
    batches, count = next(stream.chunks(0, 3))[:2]
    done = []
    for loss in task, task.loss_fn:
        params = init_params(model, KEY)
        done.append(compile_steps(loss, OPTIMIZER)(TrainState.create(params, OPTIMIZER), batches, count, KEY))
    assert asked == [True, False]
    (state, sums), (plain_state, plain_sums) = done
    np.testing.assert_allclose(sums["loss"], plain_sums["loss"], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(plain_state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # Adam amplifies rounding


@pytest.mark.parametrize("windows", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_character_steps_do_not_depend_on_their_grouping(documents, rng, windows):
    cnn = CharCNNConfig(filters=((1, 3), (2, 4)), character_features=3, highway=1)
    # XLA:CPU compiles loops over less than a kilobyte differently, with another rounding.
    sizes = {"embedding": 16, "cells": 4, "layers": 1}
    config = BiLMConfig(**sizes, input="characters", characters=cnn, dtype="bfloat16")
    model = BiLM(config, 50)
    ids = np.where(np.arange(len(documents.ids)) % 300 < 150, documents.ids % 5 + 4, documents.ids)
    character_ids = rng.integers(1, 262, (50, characters.CHARACTERS)).astype(np.int32)
    documents = replace(documents, ids=ids.astype(np.int32), character_ids=character_ids, group_size=8)
    if windows:
        stream, task = ContiguousStream(documents, 4, 4, 0, steps_per_call=3), bilm_window_loss(model)
    else:
        stream, task = BatchStream(documents, 4, 1, bounds=(32,), steps_per_call=3), bilm_loss(model)
    run, ends, groups = compile_steps(task, OPTIMIZER), [], []
    ways = ((0, 10), (0, 1, 3, 5, 7, 8, 10)) if windows else ((0, 5), (0, 1, 3, 5))
    for cuts in ways:
        carry = {"state": zero_state(config, 4)} if windows else None
        state, seen = TrainState.create(init_params(model, KEY), OPTIMIZER, carry=carry), []
        for first, last in pairwise(cuts):
            for batches, count in stream.chunks(first, last):
                seen += [batches.unique_words.first.shape[1]] * count
                state, _ = run(state, batches, count, KEY)
        ends.append(state)
        groups.append(seen)
    assert groups[0] != groups[1]
    same(*(jax.tree.map(np.asarray, (end.params, end.opt_state)) for end in ends))


def test_full_softmax_is_marked_matmul_bound():
    model = BiLM(BiLMConfig(embedding=8, cells=6, layers=1), 50)
    for make in bilm_loss, bilm_window_loss:
        assert isinstance(make(model), MatmulBound) and not isinstance(make(model, 7), MatmulBound)


def test_compiler_options_are_those_that_jaxlib_accepts(monkeypatch):
    assert len(compiler_options(True)) == 1 + len(compiler_options(False)) == 3
    assert not step_module._is_accepted("xla_cpu_no_such_option", True)
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256")
        assert compiler_options(False).keys() == {"xla_cpu_copy_insertion_use_region_analysis"}
    small = compiler_options(False)
    monkeypatch.setattr(step_module, "_is_accepted", lambda name, value: "fusion" not in name)
    assert compiler_options(True) == compiler_options(False) == small
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options(True) == compiler_options(False) == {}
