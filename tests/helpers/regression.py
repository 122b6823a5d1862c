"""A model of a few numbers, and training it through the loop."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import BatchStream
from elmo_jax.parallel import Plan
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.evaluate import evaluate
from elmo_jax.training.loop import fit
from elmo_jax.training.optimizers import make_optimizer
from elmo_jax.training.step import TrainState

EPOCHS = 2


def loss_fn(params, batch, key):
    """Bag-of-words regression with noise, so that keys matter, and a scale that is frozen."""
    values = params["table"][batch.words] * params["scale"]
    mask = jnp.arange(batch.words.shape[1])[None] < batch.lengths[:, None]
    noise = jax.random.normal(key, values.shape)
    each = (jnp.sum(mask * (values + 0.1 * noise), 1) - batch.labels) ** 2 * batch.weight
    return each.sum() / batch.weight.sum(), {"documents": batch.weight.sum(), "error": each.sum()}


def begin(optimizer):
    return Plan(lambda: TrainState.create({"table": jnp.zeros(50)}, optimizer))


def run_fit(documents, path, k=3, epochs=EPOCHS, resume=False, loss=loss_fn, figure=None, **more):
    stream = BatchStream(documents, 4, seed=1, bounds=(12, 32), steps_per_call=k)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.05), EPOCHS * stream.steps_per_epoch)
    more["frozen"] = {"scale": jnp.ones(())}
    run = Run.create(path, {"seed": 1}, monitor="figure", resume=resume)
    error = jax.jit(lambda params, batch: loss_fn(params, batch, jax.random.key(0))[1])

    def on_epoch(state, sums):
        held = evaluate(error, {**state.params, **state.frozen}, BatchStream(documents, 4, bounds=(32,)))
        value = float(held["error"] / held["documents"]) if figure is None else figure()
        return {"figure": value, "train": float(sums["error"])}

    try:
        return fit(
            begin(optimizer), loss, optimizer, stream, run, epochs=epochs, seed=7, on_epoch=on_epoch, **more
        )
    finally:
        run.close()


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def without_times(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
