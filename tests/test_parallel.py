"""Losses and layers inside a caller's `jax.shard_map`, where JAX watches what differs between devices.

The devices are two virtual ones of the CPU, in a process of their own.
"""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec
from processes import PROCESSES, finish

from elmo_jax.data.batching import Batch
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM, BiLMConfig
from elmo_jax.models.lstm import LSTM
from elmo_jax.ops.softmax import full_nll, log_uniform_negatives, sampled_nll
from elmo_jax.parallel import DATA, check_memory
from elmo_jax.training.objectives import bilm_loss, init_params

RNG = np.random.default_rng(0)
LENGTHS = np.array([4, 0, 2, 3], np.int32)  # of JAX it would ask for the devices


def floats(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def loss(draw):
    """Of what all devices have and of what each has of its own; and both."""
    rows = floats(6, 3), jnp.asarray(RNG.integers(0, 11, 6), jnp.int32), jnp.ones(6)

    def value(whole, rows):
        given = rows[0], *whole, *rows[1:]
        if not draw:
            return full_nll(*given)[0]
        return sampled_nll(*given, log_uniform_negatives(jax.random.key(0), 11, 5))[0]

    return value, (floats(11, 3), floats(11)), rows


def layer(kernel):
    lstm, x = LSTM(3, kernel=kernel), floats(4, 2, 4, 5)  # rows first, to be shared out

    def value(whole, rows):
        h, state = lstm.apply(whole, rows[0].swapaxes(0, 1), rows[1])
        mask = jnp.arange(4)[None] < rows[1][:, None]
        return jnp.sum(jnp.where(mask[None, :, :, None], h**2, 0)) + jnp.sum(state.c)

    return value, lstm.init(jax.random.key(0), x.swapaxes(0, 1), LENGTHS), (x, LENGTHS)


def language_model(negatives):
    model = BiLM(BiLMConfig(embedding=3, cells=3, layers=1, dropout=0.0), 11)
    task = bilm_loss(model, negatives)

    def value(whole, rows):
        mean, sums = task(whole, rows, jax.random.key(1))
        return mean * sums["tokens"]

    batch = jax.tree.map(jnp.asarray, Batch.of([[5, 6, 7], [8], [9], [4, 4]]))
    return value, init_params(model, jax.random.key(0)), batch


# What is shared out, along which axis, and whether JAX watches; `DATA` is what this library calls its own.
CASES = {
    "full": (lambda: loss(draw=False), "d", True),
    "sampled": (lambda: loss(draw=True), "d", True),
    "fast": (lambda: layer("fast"), "d", True),
    "plain": (lambda: layer("plain"), "d", True),
    "language model, sampled": (lambda: language_model(5), DATA, True),
    "language model, full": (lambda: language_model(None), DATA, True),
    "language model, not watched": (lambda: language_model(None), DATA, False),
}


def apart(value, whole, rows, axis, watched):
    """How far the value and its gradients, summed over two devices, are from those of one."""
    mesh = jax.make_mesh((2,), (axis,), axis_types=(AxisType.Auto,))
    shared = jax.shard_map(
        lambda whole, rows: jax.lax.psum(value(whole, rows), axis),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(axis)),
        out_specs=PartitionSpec(),
        check_vma=watched,
    )
    got, want = (jax.jit(jax.value_and_grad(f))(whole, rows) for f in (shared, value))
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), got, want)))


def in_child(path):
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
    jax.config.update("jax_numpy_rank_promotion", "raise")
    found = {}
    for name, (make, axis, watched) in CASES.items():
        try:
            found[name] = apart(*make(), axis, watched)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"[:500]
    path.write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    path = tmp_path_factory.mktemp("manual") / "found.json"
    process = PROCESSES.Process(target=in_child, args=(path,))
    process.start()
    assert finish(process) == 0
    return json.loads(path.read_text())


@pytest.mark.parametrize("name", CASES)
def test_two_devices_of_the_callers_give_what_one_gives(found, name):
    assert isinstance(found[name], float) and found[name] < 2e-6, found[name]


def test_arrays_beyond_all_memory_are_refused():
    shapes = {"a": jax.ShapeDtypeStruct((65_536, 65_536), np.float32), "b": np.zeros(3)}
    check_memory(shapes, system_bytes=2**35)
    with pytest.raises(InputError, match="take 17 GB, this system has 17 GB; use smaller sizes"):
        check_memory(shapes, system_bytes=2**34)
