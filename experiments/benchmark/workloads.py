"""elmo_jax's implementations of the benchmark cases, run as training and embedding run them."""

import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from elmo_jax.baselines.sgns import SGNSConfig, SpanStream, sgns_init, sgns_loss, sgns_optimizer
from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import Batch, Documents, Window
from elmo_jax.data.characters import GROUP_SIZE, find_unique_words
from elmo_jax.models.bilm import BiLM, BiLMConfig, zero_state
from elmo_jax.models.embedders import CharCNNConfig
from elmo_jax.models.lstm import LSTM, Kernel
from elmo_jax.ops.lstm import Clips
from elmo_jax.ops.softmax import Negatives, full_nll, sampled_nll
from elmo_jax.parallel import Plan
from elmo_jax.training import step as training
from elmo_jax.training.loop import fit
from elmo_jax.training.objectives import bilm_loss, bilm_training, bilm_window_loss, init_params
from elmo_jax.training.step import TrainState, compile_steps
from experiments.benchmark import cases
from experiments.benchmark.cases import STEPS_PER_CALL, Arrays, Case, Workload


def make_model(case: Case, kernel: Kernel = "auto", dropout: float = 0.0) -> BiLM:
    """Return the language model of a case, without a softmax where none is needed."""
    characters = CharCNNConfig(case.filters, case.characters, highway=1) if case.filters else CharCNNConfig()
    config = BiLMConfig(
        input="characters" if case.filters else "words",
        characters=characters,
        embedding=case.width,
        cells=case.cells,
        layers=case.layers,
        skip=case.skip,
        cell_clip=case.clip,
        projection_clip=case.clip,
        dropout=dropout,
        tie=case.tied,
        dtype="bfloat16" if case.precision == "bfloat16" else "float32",
    )
    return BiLM(config, 0 if case.part == "embed" else case.vocabulary, kernel)


def weight_shapes(case: Case) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of the case's model by its path."""
    params: Any = jax.eval_shape(lambda: init_params(make_model(case), jax.random.key(0)))
    leaves: Any = flatten_dict(params, sep="/")
    return {name: leaf.shape for name, leaf in leaves.items()}


def load_weights(arrays: Arrays) -> dict[str, Any]:
    """Return the parameters among the arrays as a pytree on the device, in buffers that may be donated."""
    weights = {n: jax.device_put(arrays[n], may_alias=False) for n in arrays if cases.is_weight(n)}
    return unflatten_dict(jax.block_until_ready(weights), sep="/")


def call_repeatedly(step: Callable[[], Any], n: int) -> Any:
    """Call `step` n times and wait; a CPU waits after each call, or it would run calls side by side."""
    out = None
    for _ in range(n):
        out = step()
        if jax.default_backend() == "cpu":
            jax.block_until_ready(out)
    return jax.block_until_ready(out)


def _time_gradients(loss: Any, names: list[str], args: list[Any], options: Any) -> Workload:
    """Time a loss and its gradients; check the first of these leaves, under their names."""
    step = jax.jit(jax.value_and_grad(loss, argnums=tuple(range(len(args)))), compiler_options=options)

    def check() -> dict[str, np.ndarray]:
        return dict(zip(names, map(np.asarray, jax.tree.leaves(step(*args))), strict=False))

    return Workload(check, [(lambda n: call_repeatedly(lambda: step(*args), n), 1.0)])


def time_lstm_gradients(loss: Any, case: Case, arrays: Arrays, x: Array, options: Any = None) -> Workload:
    """Time ``loss(weights, x)`` of an LSTM and its gradients, of which those of the weights are checked."""
    kinds = ("bias", "input_kernel", "recurrent_kernel")
    names = [f"d:lstm_{i}/{kind}" for i in range(case.layers) for kind in kinds]
    weights = {name: layer for name, layer in load_weights(arrays).items() if name.startswith("lstm")}
    return _time_gradients(loss, ["loss", *names], [weights, x], options)


def time_softmax_gradients(loss: Any, arrays: Arrays, options: Any = None) -> Workload:
    """Time ``loss(hidden, table, bias)`` of a softmax and its gradients."""
    args = [jnp.asarray(arrays[name]) for name in ("hidden", "table", "bias")]
    return _time_gradients(loss, ["loss", "d:hidden", "d:table", "d:bias"], args, options)


def build_machine(case: Case, arrays: Arrays) -> Workload:
    """Time a square matmul, or a copy that is too large for caches and donates its buffer."""
    is_copy = case.name == "copy"
    held = [jnp.array(arrays["x"], "bfloat16" if case.precision == "bfloat16" else "float32")]
    compiled = jax.jit(lambda x: -x if is_copy else x @ x, donate_argnums=(0,) if is_copy else ())

    def step() -> Array:
        out = compiled(held[0])
        if is_copy:
            held[0] = out
        return out

    check = lambda: {"rows": np.asarray(step()[:8].astype(jnp.float32))}  # noqa: E731
    return Workload(check, [(lambda n: call_repeatedly(step, n), 1.0)])


def build_lstm(case: Case, arrays: Arrays, kernel: Kernel = "auto") -> Workload:
    """Time forward and backward passes of the LSTM layers."""
    projection = case.width if case.width != case.cells else None
    dtype = "bfloat16" if case.precision == "bfloat16" else "float32"
    layer = LSTM(case.cells, projection, Clips(case.clip, case.clip), dtype, kernel)
    lengths = jnp.full(case.batch, case.steps, jnp.int32)
    x, cotangent = (jnp.asarray(_to_batch_major(arrays[name])) for name in ("x", "cotangent"))

    def loss(weights: Any, x: Array) -> Array:
        for i in range(case.layers):
            x = layer.apply({"params": weights[f"lstm_{i}"]}, x, lengths)[0]  # type: ignore[index]
        return jnp.sum(x.astype(jnp.float32) * cotangent)

    return time_lstm_gradients(loss, case, arrays, x, training.compiler_options(matmul_bound=False))


def _to_batch_major(a: np.ndarray) -> np.ndarray:
    """Turn ``[T, D, B, ...]`` of the inputs into elmo_jax's ``[D, B, T, ...]``."""
    return np.ascontiguousarray(np.moveaxis(a, 0, 2))


def build_softmax(case: Case, arrays: Arrays) -> Workload:
    """Time the loss and the gradients of a full or sampled softmax."""
    targets = jnp.asarray(arrays["targets"])
    weight = jnp.ones(len(targets), jnp.float32)
    negatives = None
    if case.negatives is not None:
        negatives = Negatives(jnp.asarray(arrays["negatives"]), jnp.asarray(arrays["log_expected"]))

    def loss(hidden: Array, table: Array, bias: Array) -> Array:
        if negatives is None:
            return full_nll(hidden, table, bias, targets, weight)[0]
        return sampled_nll(hidden, table, bias, targets, weight, negatives)[0]

    return time_softmax_gradients(loss, arrays, training.compiler_options(matmul_bound=negatives is None))


def first_gradients(opt_state: Any) -> dict[str, np.ndarray]:
    """Return the gradients of Adam's only step so far: those of the LSTM and of the softmax bias.

    They are read from the first moments, so that nothing is compiled or stored for the check alone.
    """
    moments: Any = flatten_dict(optax.tree.get(opt_state, "mu"), sep="/")
    checked = {n: m for n, m in moments.items() if n.startswith("lstm") or n == "softmax_bias"}
    return {f"d:{name}": np.array(moment) / (1 - cases.ADAM_B1) for name, moment in checked.items()}


def _make_objective(case: Case, kernel: Kernel = "auto") -> tuple[BiLM, Any, Any]:
    """Return the model, its loss function and the optimizer; the default recipe has dropout."""
    model, windows = make_model(case, kernel, dropout=0.1 if case.tied else 0.0), case.part == "official"
    name = "adagrad" if windows else "adam"
    settings = OptimizerConfig(optimizer=name, learning_rate=cases.LEARNING_RATE, schedule="constant")
    return model, *bilm_training(model, settings, 1, case.negatives, windows=windows)


def _make_batch(arrays: Arrays, end: str = "") -> Batch:
    lengths = arrays[f"lengths{end}"]
    return Batch(arrays[f"words{end}"], lengths, None, (lengths > 0).astype(np.float32))


def _start_training(
    case: Case, arrays: Arrays, kernel: Kernel = "auto", carry: Any = None, ahead: Any = ()
) -> tuple[list[TrainState], Callable[[Any], np.ndarray]]:
    """Return a list that holds the state, and a function that trains it on chunks and returns their losses.

    Programs for batches `ahead` are compiled before there is a state, as `fit` compiles them.
    """
    model, loss_fn, optimizer = _make_objective(case, kernel)
    key = jax.random.key(0)
    create = lambda params: TrainState.create(params, optimizer, carry=carry)  # noqa: E731
    like = jax.eval_shape(lambda: create(init_params(model, key)))
    call = compile_steps(loss_fn, optimizer, like, ahead)
    held = [create(load_weights(arrays))]

    def train(chunks: Any) -> np.ndarray:
        losses = []
        for batches, count in chunks:
            held[0], metrics = call(held[0], batches, count, key)
            losses.append((metrics["loss"], count))
        jax.block_until_ready(held)
        return np.concatenate([np.asarray(loss)[:count] for loss, count in losses])

    return held, train


def _time_steps(
    case: Case, arrays: Arrays, batch: Any, kernel: Kernel = "auto", carry: Any = None
) -> tuple[list[TrainState], Workload]:
    """Time training steps on one batch; check the first losses and gradients."""
    batches = jax.device_put(jax.tree.map(lambda a: np.stack([np.asarray(a)] * STEPS_PER_CALL), batch))
    held, train = _start_training(case, arrays, kernel=kernel, carry=carry, ahead=[batches])

    def run(n: int) -> np.ndarray:
        return train([(batches, min(STEPS_PER_CALL, n - i)) for i in range(0, n, STEPS_PER_CALL)])

    def check() -> dict[str, np.ndarray]:
        first = run(1)
        gradients = first_gradients(held[0].opt_state)
        return {"loss": np.concatenate([first, run(2)])} | gradients

    steps = STEPS_PER_CALL if training.runs_all_steps() else 1  # an accelerator runs all steps of every call
    return held, Workload(check, [(lambda n: run(n * steps), 1 / steps)])


def build_step(case: Case, arrays: Arrays, kernel: Kernel = "auto") -> Workload:
    """Time training steps with the full softmax and Adam."""
    return _time_steps(case, arrays, _make_batch(arrays), kernel)[1]


build_lstm_scan = partial(build_lstm, kernel="fast")
build_step_scan = partial(build_step, kernel="fast")


def build_official(case: Case, arrays: Arrays) -> Workload:
    """Time bilm-tf's recipe without dropout; check the full softmax of the window's first two rows."""
    data = {name: _to_batch_major(arrays[name]) for name in ("words", "weight", "chars", "types")}
    group = GROUP_SIZE if jax.default_backend() == "cpu" else 4 * GROUP_SIZE
    unique = find_unique_words(data["types"], axes=3, group_size=group)
    window = Window(data["words"], data["weight"], data["chars"], unique)
    model = make_model(case)
    zero = lambda rows: {"state": zero_state(model.config, rows)}  # noqa: E731
    held, workload = _time_steps(case, arrays, window, carry=zero(case.batch))

    def check() -> dict[str, np.ndarray]:
        rows = jax.tree.map(lambda a: a[:, :2], replace(window, unique_words=None))
        params = {**held[0].params, **zero(2)}
        return {"loss": np.array(jax.jit(bilm_window_loss(model))(params, rows, jax.random.key(0))[0])}

    return workload._replace(check=check)


def build_recipe(case: Case, arrays: Arrays) -> Workload:
    """Time the default recipe in full calls; check the full softmax without dropout."""
    held, train = _start_training(case, arrays)
    batches = [jax.device_put(_make_batch(arrays, f":{bound}")) for bound in arrays["bounds"].tolist()]

    def check() -> dict[str, np.ndarray]:
        first, key = jax.tree.map(lambda a: a[0], batches[0]), jax.random.key(0)
        return {"loss": np.array(jax.jit(bilm_loss(make_model(case)))(held[0].params, first, key)[0])}

    runs = [lambda n, batch=batch: train([(batch, STEPS_PER_CALL)] * n) for batch in batches]
    return Workload(check, list(zip(runs, (arrays["steps"] / STEPS_PER_CALL).tolist(), strict=True)))


class _NoRun:
    """A run that saves nothing, so that the disk is not timed."""

    monitor = "figure"

    def restore(self, template: Any) -> None: ...
    def save(self, state: Any, position: Any) -> None: ...
    def log(self, records: list[Any]) -> None: ...
    def wait(self) -> None: ...


def build_fit(case: Case, arrays: Arrays) -> Workload:
    """Time epochs of `fit`, which runs in a thread and waits after each epoch until the next is asked for."""
    _, loss_fn, optimizer = _make_objective(case)
    begin = Plan(lambda: TrainState.create(load_weights(arrays), optimizer))
    stream = cases.stream_documents(case, arrays)
    asked: SimpleQueue[None] = SimpleQueue()
    ended: SimpleQueue[Any] = SimpleQueue()

    def on_epoch(_: TrainState, metrics: Mapping[str, Any]) -> dict[str, Any]:
        ended.put(metrics["loss"] / metrics["steps"])
        asked.get()
        return {"figure": 0.0}

    def train() -> None:
        asked.get()
        no_run: Any = _NoRun()
        try:
            fit(begin, loss_fn, optimizer, stream, no_run, epochs=10**6, seed=0, on_epoch=on_epoch)
        except Exception as error:
            ended.put(error)

    threading.Thread(target=train, daemon=True).start()

    def run(n: int) -> float:
        loss: Any = None
        for _ in range(n):
            asked.put(None)
            loss = ended.get()
            if isinstance(loss, Exception):
                raise loss
        return loss

    return Workload(lambda: {"loss": np.array(run(1))}, [(run, 1.0)])


def build_replay(case: Case, arrays: Arrays) -> Workload:
    """Time the compiled calls of the first epoch of `fit` again and again, all batches on the device."""
    _, train = _start_training(case, arrays)
    stream = cases.stream_documents(case, arrays)
    chunks = stream.chunks(0, stream.steps_per_epoch)
    chunks = [(jax.device_put(chunk.batches), chunk.count) for chunk in chunks]
    epoch = lambda: train(chunks).mean()  # noqa: E731
    return Workload(lambda: {"loss": np.array(epoch())}, [(lambda n: [epoch() for _ in range(n)][-1], 1.0)])


def build_embed(case: Case, arrays: Arrays) -> Workload:
    """Time `Elmo.embed` on a text whose words are new to it."""
    from elmo_jax.elmo import Elmo  # imports HDF5 and Orbax, which a step's memory must not include

    elmo, text = Elmo(make_model(case), load_weights(arrays), None), cases.split_sentences(arrays)

    def run(n: int) -> list[np.ndarray]:
        out: list[np.ndarray] = []
        for _ in range(n):
            elmo._words.clear()  # cached word vectors of the pass before
            out = list(elmo.embed(text))
        return out

    return Workload(lambda: {"layers": np.concatenate(run(1), axis=1)}, [(run, 1.0)])


def build_sgns(case: Case, arrays: Arrays) -> Workload:
    """Time an epoch with the making of its spans; check the loss that it reaches."""
    ids, config = arrays["ids"], SGNSConfig()
    documents = Documents(ids, np.arange(0, len(ids) + 1, 1000), np.zeros(len(ids) // 1000, np.int32))
    stream = SpanStream(documents, case.vocabulary, 4, config, seed=0)
    optimizer = sgns_optimizer(config, stream.window, stream.steps_per_epoch)
    call, key = compile_steps(sgns_loss(config), optimizer), jax.random.key(0)

    def run(n: int) -> Any:
        params = None
        for _ in range(n):
            state = TrainState.create(sgns_init(case.vocabulary, case.width, key), optimizer)
            for chunk in stream.chunks(0, stream.steps_per_epoch):
                state, _ = call(state, chunk.batches, chunk.count, key)
            params = jax.block_until_ready(state.params)
        return params

    def check() -> dict[str, np.ndarray]:
        tables = run(1)
        return {
            "loss": cases.skip_gram_loss(ids, np.asarray(tables["centre"]), np.asarray(tables["context"]))
        }

    return Workload(check, [(run, 1.0)])
