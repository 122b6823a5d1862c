"""A dispatch as accelerators run it: loops of a known length, and programs compiled ahead."""

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
from elmo_jax.training import step as dispatch
from elmo_jax.training.objectives import bilm_loss, bilm_window_loss, init_params
from elmo_jax.training.optimizers import make_optimizer
from elmo_jax.training.step import MatmulBound, TrainState, compile_steps, compiler_options, train_step

pytestmark = pytest.mark.usefixtures("standard_promotion")
KEY = jax.random.key(0)
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=0.05), 10)


def begin():
    return TrainState.create({"table": jnp.ones(50)}, OPTIMIZER, {"scale": jnp.ones(())})


def walked(run, stream):
    """The state after an epoch, and every step's loss."""
    state, losses = begin(), []
    for batches, count in stream.chunks(0, stream.steps_per_epoch):
        state, sums = run(state, batches, count, KEY)
        losses += np.asarray(sums["loss"][:count]).tolist()
    return state, losses


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_step_that_is_not_wanted_changes_nothing(documents):
    batch = jax.tree.map(lambda a: a[0], next(BatchStream(documents, 4).chunks(0, 1)).batches)
    state, sums = train_step(begin(), batch, KEY, loss_fn, OPTIMIZER, jnp.array(False))
    same(state, begin())
    assert {float(value) for value in sums.values()} == {0.0}
    state, sums = train_step(begin(), batch, KEY, loss_fn, OPTIMIZER, jnp.array(True))
    assert int(state.step) == 1 and float(sums["steps"]) == 1 and not np.array_equal(state.params["table"], 1)


def test_on_an_accelerator_a_part_filled_dispatch_takes_its_steps_and_no_more(documents, monkeypatch):
    stream = BatchStream(documents, 4, seed=1, bounds=(32,), steps_per_call=8)
    assert stream.steps_per_epoch % 8
    expected = walked(compile_steps(loss_fn, OPTIMIZER), stream)
    monkeypatch.setattr(dispatch, "compiler_options", lambda matmul_bound: {})
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    ends, loop = [], jax.lax.fori_loop
    monkeypatch.setattr(jax.lax, "fori_loop", lambda *args: (ends.append(args[1]), loop(*args))[1])
    same(walked(compile_steps(loss_fn, OPTIMIZER), stream), expected)
    assert ends == [8]  # known when it is compiled


def test_programs_compiled_ahead_are_those_that_would_be_when_they_are_met(documents, monkeypatch):
    stream = BatchStream(documents, 4, seed=1, bounds=(12, 32), steps_per_call=3)
    met = {d.batches.words.shape for d in stream.chunks(0, stream.steps_per_epoch)}
    assert {batches.words.shape for batches in stream.shapes()} == met and len(met) == 2
    character_ids = np.arange(2500, dtype=np.int32).reshape(50, 50) % 262
    spelled = replace(documents, character_ids=character_ids, group_size=4)
    with_characters = BatchStream(spelled, 4, seed=1, bounds=(12, 32))
    shapes = lambda batches: (batches.words.shape, batches.unique_words.first.shape)  # noqa: E731
    every = {shapes(d.batches) for d in with_characters.chunks(0, with_characters.steps_per_epoch)}
    assert {shapes(batches) for batches in with_characters.shapes()} == every and len(every) > 2
    expected = walked(compile_steps(loss_fn, OPTIMIZER), stream)
    run = compile_steps(loss_fn, OPTIMIZER, begin(), stream.shapes())

    def traced_again(*_, **__):
        raise AssertionError("a step is traced when its batch comes")

    monkeypatch.setattr(dispatch, "train_step", traced_again)
    same(walked(run, stream), expected)


@pytest.mark.parametrize("known", [False, True])
def test_a_step_is_traced_once_a_shape(documents, monkeypatch, known):
    stream = BatchStream(documents, 4, seed=1, bounds=(12, 32), steps_per_call=3)
    calls = []
    monkeypatch.setattr(dispatch, "runs_all_steps", lambda: known)
    monkeypatch.setattr(dispatch, "train_step", lambda *args: (calls.append(1), train_step(*args))[1])
    walked(compile_steps(loss_fn, OPTIMIZER), stream)
    assert len(calls) == 2


def test_a_shape_that_was_not_told_ahead_is_compiled_when_it_comes(documents):
    stream = BatchStream(documents, 4, seed=1, bounds=(12, 32), steps_per_call=3)
    run = compile_steps(loss_fn, OPTIMIZER, begin(), stream.shapes()[:1])
    same(walked(run, stream), walked(compile_steps(loss_fn, OPTIMIZER), stream))


def test_a_full_softmax_is_compiled_for_large_products_and_gives_what_it_gave(documents, monkeypatch):
    model = BiLM(BiLMConfig(embedding=8, cells=6, layers=1, dropout=0.0), 50)
    stream = BatchStream(documents, 4, seed=1, bounds=(32,), steps_per_call=3)
    task, asked, options = bilm_loss(model), [], dispatch.compiler_options
    monkeypatch.setattr(
        dispatch,
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
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)  # Adam makes much of rounding


@pytest.mark.parametrize("windows", [False, True])
def test_steps_of_spelled_words_are_the_same_however_they_are_shared_out(documents, rng, windows):
    cnn = CharCNNConfig(filters=((1, 3), (2, 4)), character_features=3, highway=1)
    # The vectors fill a kilobyte: XLA:CPU compiles a loop over less otherwise, to other last bits.
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
    for cuts in ((0, 10), (0, 1, 3, 5, 7, 8, 10)):
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


def test_the_tasks_of_large_products_are_those_of_the_full_softmax():
    model = BiLM(BiLMConfig(embedding=8, cells=6, layers=1), 50)
    for make in bilm_loss, bilm_window_loss:
        assert isinstance(make(model), MatmulBound) and not isinstance(make(model, 7), MatmulBound)


def test_a_compiler_is_told_what_it_knows(monkeypatch):
    assert len(compiler_options(True)) == 1 + len(compiler_options(False)) == 3
    assert not dispatch._is_accepted("xla_cpu_no_such_option", True)
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_prefer_vector_width=256")
        assert compiler_options(False).keys() == {"xla_cpu_copy_insertion_use_region_analysis"}
    small = compiler_options(False)
    monkeypatch.setattr(dispatch, "_is_accepted", lambda name, value: "fusion" not in name)
    assert compiler_options(True) == compiler_options(False) == small
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options(True) == compiler_options(False) == {}
