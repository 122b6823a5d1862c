"""Training on eight devices equals training on one; a run resumes on another number of devices.

The devices are virtual devices of the CPU, in a process of their own.
"""

import json
import os
import re
import shutil
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec
from processes import PROCESSES, finish

from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import Batch, BatchStream, ContiguousStream, Documents
from elmo_jax.data.characters import CHARACTERS
from elmo_jax.errors import InputError
from elmo_jax.models.bilm import BiLM, BiLMConfig, zero_state
from elmo_jax.models.classifier import BiLSTMClassifier, ClassifierConfig, classifier_loss
from elmo_jax.models.combiners import CombinerConfig, make_combiner
from elmo_jax.models.embedders import CharCNNConfig
from elmo_jax.ops import softmax
from elmo_jax.ops.lstm import Clips, fast_recurrence
from elmo_jax.ops.lstm_pallas import run_persistent
from elmo_jax.parallel import DATA, MODEL, Plan, make_mesh, replicated, use_mesh
from elmo_jax.training import objectives as tasks
from elmo_jax.training.checkpoint import Run
from elmo_jax.training.evaluate import evaluate, predict
from elmo_jax.training.loop import fit
from elmo_jax.training.objectives import (
    bilm_features,
    bilm_loss,
    bilm_sums,
    bilm_tables,
    bilm_training,
    init_params,
)
from elmo_jax.training.optimizers import make_optimizer
from elmo_jax.training.step import TrainState, feed, train_step as take_step

ROWS, WORDS, BOUND, UNROLL = 16, 384, 12, 5  # more words than a step has tokens and negatives
CHUNK = 20  # positions that the full softmax takes at a time
# Adagrad where parameters are compared: Adam makes much of a gradient that is all rounding.
CASES = {
    "full": {"optimizer": "adagrad"},
    "sampled": {"optimizer": "adagrad", "negatives": 20, "by_rows": False, "tie": False},
    "adam": {"optimizer": "adam", "negatives": 20, "learning_rate": 1e-3},
    "windows": {"optimizer": "adagrad", "negatives": 20, "windows": True},
    "characters": {"optimizer": "adagrad", "windows": True, "input": "characters"},
    "classifier": {"optimizer": "adagrad"},
}


def texts() -> Documents:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, BOUND - 1, 56)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.integers(4, WORDS, offsets[-1]).astype(np.int32)
    character_ids = rng.integers(0, 261, (WORDS, CHARACTERS)).astype(np.int32)
    return Documents(ids, offsets, (np.arange(56) % 3).astype(np.int32), character_ids, group_size=8)


def mesh_on(count):
    """Return a mesh of the first devices; None for one."""
    grid = np.array(jax.devices()[:count]).reshape(count, 1)
    return None if count == 1 else Mesh(grid, (DATA, MODEL), axis_types=(AxisType.Auto,) * 2)


def language_model(mesh, optimizer, negatives=None, by_rows=True, windows=False, learning_rate=0.05, **more):
    """Return plan, loss function, optimizer and batches of pre-training."""
    cnn = CharCNNConfig(filters=((1, 4), (2, 4)), highway=1)
    model = BiLM(BiLMConfig(embedding=4, cells=5, layers=1, characters=cnn, **more), WORDS)
    settings = OptimizerConfig(optimizer=optimizer, learning_rate=learning_rate, schedule="constant")
    task, steps = bilm_training(model, settings, 100, negatives, windows)
    if not by_rows:  # as Adam on an accelerator
        task, steps = bilm_loss(model, negatives), make_optimizer(settings, 100)

    def begin():
        carry = {"state": zero_state(model.config, ROWS)} if windows else None
        return TrainState.create(init_params(model, jax.random.key(0)), steps, carry=carry)

    documents = texts() if more.get("input") == "characters" else replace(texts(), character_ids=None)
    stream = BatchStream(documents, ROWS, seed=1, bounds=(BOUND,), steps_per_call=2)
    if windows:
        stream = ContiguousStream(documents, ROWS, UNROLL, seed=1, steps_per_call=2)
    return Plan(begin, mesh, tables=bilm_tables(model)), task, steps, stream, model


def classifier(mesh, optimizer):
    """Return plan, loss function, optimizer and batches of a classifier on a frozen language model."""
    model = BiLM(BiLMConfig(embedding=4, cells=4, layers=1), WORDS)
    combiner, head = make_combiner(CombinerConfig()), BiLSTMClassifier(ClassifierConfig(hidden=4), 3)
    task = classifier_loss(bilm_features(model), combiner, head)
    steps = make_optimizer(OptimizerConfig(optimizer=optimizer, learning_rate=0.05), 100)
    mixed, mix = combiner.init_with_output(jax.random.key(1), jnp.zeros((2, 1, 1, 8)))
    weights = head.init(jax.random.key(2), mixed, jnp.ones(1, jnp.int32))["params"]
    params = {"combiner": mix["params"], "classifier": weights}
    frozen = {"bilm": init_params(model, jax.random.key(0))}
    begin = Plan(lambda *given: TrainState.create(given[0], steps, given[1]), mesh, (params, frozen))
    documents = replace(texts(), character_ids=None)
    stream = BatchStream(documents, ROWS, seed=1, bounds=(BOUND,), steps_per_call=2)
    return begin, task, steps, stream, None


def begun(name, mesh):
    return (classifier if name == "classifier" else language_model)(mesh, **CASES[name])


def walk(name, mesh):
    """Return the losses of four steps, the final arrays, the compiled step, and the largest change."""
    begin, task, optimizer, stream, _ = begun(name, mesh)
    state = begin()
    first = state.params
    places = mesh and (jax.tree.map(lambda a: a.sharding, state), replicated(mesh))
    step = partial(take_step, key=jax.random.key(3), loss_fn=task, optimizer=optimizer)
    step, losses = jax.jit(step, out_shardings=places), []
    for batches, count in feed(stream, 0, 4, mesh):
        for i in range(count):
            batch = jax.tree.map(lambda a, i=i: jnp.asarray(a[i]), batches)
            if mesh and not losses:  # on one device shapes vary with the words that differ
                with use_mesh(mesh):
                    step = step.lower(state, batch).compile()
            state, sums = step(state, batch)
            losses.append(float(sums["loss"]))
    moved = furthest(first, state.params)
    program = step.as_text() if mesh else ""
    return np.array(losses), jax.tree.map(np.asarray, (state.params, state.carry)), program, moved


def furthest(a, b):
    """Return the largest difference between the arrays of two pytrees."""
    gaps = jax.tree.map(lambda a, b: float(np.max(np.abs(np.asarray(a) - b))), a, b)
    return max(jax.tree.leaves(gaps))


def compared(one, name, model):
    """Return how far losses and final arrays on eight devices differ from those on one."""
    losses, left, program, moved = walk(name, make_mesh(ROWS, model))
    gap = max(abs(losses / one[0] - 1)), furthest(one[1], left)
    return {"gap": gap, "moved": moved, "program": program}


def in_child(path, slow):
    """Compute everything that needs eight devices."""
    os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    softmax._max_chunk_rows, softmax._ROW_MULTIPLE = lambda classes: CHUNK, 1
    tasks.ROW_SPARSE_ADAM_RATIO = 1  # makes Adam row-sparse
    runs = SLOW_RUNS if slow else RUNS
    ones = {name: walk(name, None) for name, _ in runs}
    found = {f"{name} {model}": compared(ones[name], name, model) for name, model in runs}
    found["resumed"] = resumed(path, slow)
    if slow:
        found["kernel"] = kernel_on_mesh()
    found["refused"] = []
    for batch, model in ((12, 1), (16, 3)):
        try:
            make_mesh(batch, model)
        except InputError as error:
            found["refused"].append(str(error))
    found["uneven"] = uneven_rows()
    params = Plan(lambda: jnp.zeros(1), make_mesh(ROWS))()
    lengths = jax.jit(lambda params, batch: batch.lengths)
    found["lengths"] = predict(lengths, params, BatchStream(texts(), ROWS)).tolist()
    (path / "found.json").write_text(json.dumps(found))


def uneven_rows():
    """Return how far loss and gradients differ for a number of rows that the devices do not divide."""
    model = BiLM(BiLMConfig(embedding=4, cells=4, layers=1, dropout=0.0), WORDS)
    batch = jax.tree.map(jnp.asarray, Batch.of([[5, 6, 7], [8], [9, 10]]))
    params, task = init_params(model, jax.random.key(0)), bilm_loss(model)
    step = jax.value_and_grad(lambda params: task(params, batch, jax.random.key(1))[0])
    want = jax.jit(step)(params)
    with use_mesh(make_mesh(ROWS)):
        return furthest(want, jax.jit(step)(params))


def kernel_on_mesh():
    """Return how far the persistent kernel differs from the scan, for even, uneven and split rows."""
    from lstm_cases import given  # importing it creates the devices, which must be eight by now

    mesh, apart = make_mesh(ROWS), {}

    def ours(state, gates, w):
        return run_persistent(state, gates, w, Clips())

    rows, everywhere = PartitionSpec(None, DATA), PartitionSpec()
    shared = jax.shard_map(
        ours, mesh=mesh, in_specs=(rows, rows, everywhere), out_specs=rows, check_vma=False
    )
    for name, run, count in (("whole", ours, ROWS), ("uneven", ours, 5), ("shared", shared, ROWS)):
        arguments, shown = given(count, 4, steps=2)

        def both(run, arguments=arguments, shown=shown):
            states, back = jax.vjp(run, *arguments)
            return states, back(shown)

        with use_mesh(mesh):
            got = jax.jit(both, static_argnums=0)(run)
        apart[name] = furthest(both(partial(fast_recurrence, clips=Clips())), got)
    return apart


def train(path, count, epochs):
    """Return the figures of a run on some number of devices."""
    begin, task, optimizer, stream, model = begun("adam", mesh_on(count))
    sums_fn = jax.jit(bilm_sums(model))

    def on_epoch(state, sums):
        held = evaluate(sums_fn, state.params, BatchStream(texts(), ROWS, bounds=(BOUND,)))
        return {"held_out": float(held["nll_forward"] / held["tokens"])}

    run = Run.create(path, {}, monitor="held_out", resume=True)
    _, records = fit(begin, task, optimizer, stream, run, epochs=epochs, seed=5, on_epoch=on_epoch)
    run.close()
    return [[record["loss"], record["held_out"]] for record in records]


def resumed(path, slow):
    """Return the figures of a run on one device, and of runs resumed on another number of devices."""
    found = {"complete": train(path / "complete", 1, 2)}
    train(path / "8", 8, 1)
    for count in (4, 1) if slow else (2,):
        shutil.copytree(path / "8", path / str(count))
        found[str(count)] = train(path / str(count), count, 2)
    if slow:
        with jax.default_device(jax.devices()[3]):
            train(path / "elsewhere", 1, 1)
            found["elsewhere"] = train(path / "elsewhere", 1, 2)
    return found


RUNS = [("full", 1), ("adam", 2)]
SLOW_RUNS = [("sampled", 1), ("adam", 1), ("windows", 1), ("characters", 1), ("classifier", 1), ("full", 2)]
ALL_RUNS = [*RUNS, *(pytest.param(*run, marks=pytest.mark.slow) for run in SLOW_RUNS)]


def call_child(tmp_path_factory, slow):
    path = tmp_path_factory.mktemp("mesh")
    process = PROCESSES.Process(target=in_child, args=(path, slow))
    process.start()
    process.join(600)
    assert finish(process) == 0
    return json.loads((path / "found.json").read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return call_child(tmp_path_factory, slow=False)


@pytest.fixture(scope="module")
def found_slow(tmp_path_factory):
    return call_child(tmp_path_factory, slow=True)


@pytest.fixture
def measured(request, name, model):
    fixture = "found_slow" if (name, model) in SLOW_RUNS else "found"
    return request.getfixturevalue(fixture)[f"{name} {model}"]


@pytest.mark.parametrize(("name", "model"), ALL_RUNS)
def test_eight_devices_equal_one(measured, name, model):
    loss, params = measured["gap"]
    most = 2e-6 if name == "adam" else 1e-6  # Adam amplifies the rounding of a gradient
    assert loss < 1e-6 and params < most < 1e-3 < measured["moved"]


def collectives(program):
    """Iterate over the collectives of a program: kind, shapes, and whether it is in a loop."""
    for line in program.splitlines():
        kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast"
        match = re.search(rf"= (\S.*?) ({kinds})(?:-start)?(?:\.\d+)?\(", line)
        if match:
            shapes = re.findall(r"\b([a-z]+\d+)\[([\d,]*)\]", match[1])
            sizes = [(dtype, [int(n) for n in dims.split(",") if n]) for dtype, dims in shapes]
            yield match[2], sizes, "while/body" in line


@pytest.mark.parametrize(("name", "model"), ALL_RUNS)
def test_devices_exchange_gradients_once_and_little_else(measured, name, model):
    program = measured["program"]
    assert "/while/body/" in program  # the recurrence and the chunks of the softmax
    exchanges = list(collectives(program))
    in_loops = [shape for _, shapes, inside in exchanges for shape in shapes if inside]
    if model == 1:
        assert not in_loops
    else:  # maximum, sum, target logit and gradient of the positions of a chunk
        assert all(int(np.prod(dims)) <= CHUNK * 4 for _, dims in in_loops)
    kinds = {"all-reduce", "all-gather"}
    assert {kind for kind, *_ in exchanges} <= kinds
    gathered = [shape for kind, shapes, _ in exchanges if kind == "all-gather" for shape in shapes]
    assert len(gathered) <= 1  # the words of all rows, for the row-sparse optimizer
    assert all(dtype == "s32" and int(np.prod(dims)) <= 2 * ROWS * BOUND for dtype, dims in gathered)
    tables = [[dims for _, dims in shapes if dims[:1] == [WORDS // model]] for _, shapes, _ in exchanges]
    # Only a dense optimizer exchanges the gradients of tables, all in one exchange.
    dense = name in ("full", "sampled", "characters")
    assert [bool(dims) for dims in tables].count(True) == dense


@pytest.mark.slow
def test_no_device_reads_the_characters_of_others(found_slow):
    mine, all_rows = (2 * rows * UNROLL for rows in (ROWS // 8, ROWS))
    program = found_slow["characters 1"]["program"]
    assert f"f32[{mine},8]" in program and f"f32[{all_rows},8]" not in program


@pytest.mark.parametrize("fixture", ["found", pytest.param("found_slow", marks=pytest.mark.slow)])
def test_run_resumes_on_another_number_of_devices(request, fixture):
    records = request.getfixturevalue(fixture)["resumed"]
    assert len(records["complete"]) == 2
    for resumed in records.values():
        np.testing.assert_allclose(resumed, records["complete"], rtol=1e-6)


@pytest.mark.slow
def test_persistent_kernel_runs_on_the_rows_of_each_device(found_slow):
    assert found_slow["kernel"].keys() == {"whole", "uneven", "shared"}
    assert max(found_slow["kernel"].values()) < 1e-5


def test_rows_that_devices_do_not_divide_are_not_split(found):
    assert found["uneven"] < 1e-6


def test_sizes_that_devices_do_not_divide_are_refused(found):
    assert found["refused"] == [
        "batch_size 12 is not a multiple of 8 devices; give a multiple",
        "model_parallel 3 does not divide 8 devices; give a divisor",
    ]


def test_predictions_are_in_the_order_of_the_documents(found):
    assert found["lengths"] == (texts().lengths + 2).tolist()


def test_some_rows_of_a_chunk_equal_those_of_the_complete_chunk():
    for stream in (
        BatchStream(texts(), ROWS, seed=1, steps_per_call=2),
        ContiguousStream(texts(), ROWS, UNROLL, seed=1, steps_per_call=2),
    ):
        whole = list(stream.chunks(0, 4))
        for part in (slice(0, 6), slice(6, 16)):
            for (all_rows, _), (rows, _) in zip(whole, stream.chunks(0, 4, part), strict=True):
                axis = 1 + rows.BATCH_AXIS
                all_rows = replace(all_rows, unique_words=None)  # found for complete batches only
                want = jax.tree.map(
                    lambda a, axis=axis, part=part: np.take(a, np.arange(ROWS)[part], axis), all_rows
                )
                jax.tree.map(np.testing.assert_array_equal, rows, want)
