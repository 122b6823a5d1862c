"""Losses, gradients and figures that are not finite are skipped, counted, reported and never saved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from regression import EPOCHS, lines, loss_fn, run_fit, same

from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import BatchStream
from elmo_jax.errors import InputError
from elmo_jax.training import loop
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.optimizers import make_optimizer
from elmo_jax.training.step import TrainState, train_step

pytestmark = pytest.mark.usefixtures("standard_promotion")


def not_a_number(params, batch, key):
    loss, sums = loss_fn(params, batch, key)
    return loss * jnp.nan, sums


def test_repeated_skipped_steps_stop_the_run(documents, tmp_path):
    def sick(params, batch, key):
        loss, sums = loss_fn(params, batch, key)
        return loss + jnp.where(jnp.abs(params["table"]).max() > 0.1, jnp.nan, 0.0), sums

    said = r"5 steps in a row, up to step (\d+) \(learning rate 0\.0\d+, documents (\d+, )+\d+\); lower"
    with pytest.raises(InputError, match=said) as told:
        run_fit(documents, tmp_path / "sick", loss=sick, save_every=1)
    run = Run.open(tmp_path / "sick")
    assert np.isfinite(run.restore_best()["params"]["table"]).all()
    run.close()
    assert str(told.value).endswith(
        f"; step {run.steps.saved()[-1]} is saved, continue with resume=True and allow_config_change=True"
    )


def test_message_says_when_no_step_is_saved(documents, tmp_path):
    with pytest.raises(
        InputError,
        match=r"5 steps in a row, up to step 5 .*; no step is saved yet, start again with overwrite=True$",
    ):
        run_fit(documents, tmp_path / "sick", loss=not_a_number)


def test_epoch_without_a_finite_step_stops_the_run(documents, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "MAX_SKIPPED", 1000)
    with pytest.raises(InputError, match=r"not finite at any step of epoch 1 \(.*clip_norm; no step is"):
        run_fit(documents, tmp_path / "run", loss=not_a_number)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_skipped_step_changes_only_the_count(documents):
    stream = BatchStream(documents, 4, seed=1, bounds=(32,))
    (batch,) = (jax.tree.map(lambda a: a[0], d.batches) for d in stream.chunks(0, 1))
    optimizer = make_optimizer(OptimizerConfig(), 10)
    start = TrainState.create({"table": jnp.ones(50)}, optimizer, {"scale": jnp.ones(())})

    @jax.jit
    def step(offset, gradient):
        def loss(params, batch, key):
            value, metrics = loss_fn(params, batch, key)
            root = jnp.sqrt(jnp.sum((params["table"] - 1) ** 2))  # its gradient here is 0 / 0
            return value + offset + jnp.where(gradient, root, 0.0), metrics

        return train_step(start, batch, jax.random.key(0), loss, optimizer)

    for offset, gradient in ((jnp.nan, False), (jnp.inf, False), (0.0, True)):
        after, sums = step(offset, gradient)
        same((after.params, after.opt_state), (start.params, start.opt_state))
        assert int(after.step) == 1 and {name: float(a) for name, a in sums.items()} == {
            "documents": 0,
            "error": 0,
            "loss": 0,
            "steps": 0,
        }
    after, sums = jax.jit(lambda state: train_step(state, batch, jax.random.key(0), loss_fn, optimizer))(
        start
    )
    assert float(sums["steps"]) == 1 and (np.asarray(after.params["table"]) != 1).any()


def test_skipped_steps_are_counted_and_reported(documents, tmp_path):
    longest = documents.lengths.max()

    def sick(params, batch, key):
        loss, sums = loss_fn(params, batch, key)
        return jnp.where(jnp.any(batch.lengths == longest + 2), jnp.nan, loss), sums

    with pytest.warns(UserWarning, match=r"\d steps of epoch \d were skipped") as said:
        state, records = run_fit(documents, tmp_path / "run", loss=sick)
    stream = BatchStream(documents, 4, seed=1, bounds=(12, 32), steps_per_call=3)
    steps = range(EPOCHS * stream.steps_per_epoch)
    hit = [(documents.lengths[stream.document_indices(step)] == longest).any() for step in steps]
    want = np.reshape(hit, (EPOCHS, -1)).sum(1)
    assert [r["skipped"] for r in records] == want.tolist() and want.all() and len(said) == EPOCHS
    assert int(state.step) == len(steps)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_monitored_figure_that_is_not_finite_is_not_saved(documents, tmp_path):
    figures = iter([1.0, float("nan")])
    with pytest.raises(InputError, match="figure is nan after epoch 2; lower learning_rate"):
        run_fit(documents, tmp_path / "run", figure=lambda: next(figures))
    run = Run.open(tmp_path / "run")
    assert len(lines(tmp_path / "run")) == len(run.steps.saved()) == 1
