"""This library's side of the benchmark: each part as training and embedding run it.

Nouns: a *peer's* side of a case is its `Built`: something to check and something to time.
Axes: B batch, T time, D direction, K steps a dispatch, P width of states.

What of training's time the host costs: an epoch through `fit`, and the same dispatches bare.

Nouns: a *replay* calls the compiled steps of an epoch one after the other, all batches being
on the device; what `fit` takes longer is time outside compiled code.

Work that is the same for all that run in JAX: the machine's own rates, gradients, an optimiser's steps.
"""

import threading
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jax import Array

from elmo_jax.baselines.sgns import SGNSConfig, SpanStream, sgns_init, sgns_loss, sgns_optimizer
from elmo_jax.config import OptimizerConfig
from elmo_jax.data.batching import Batch, Documents, StepChunk, Window
from elmo_jax.data.characters import find_unique_words
from elmo_jax.models.bilm import zero_state
from elmo_jax.models.lstm import LSTM, Kernel
from elmo_jax.ops.lstm import Clips
from elmo_jax.ops.softmax import Negatives, full_nll, sampled_nll
from elmo_jax.parallel import Plan
from elmo_jax.training.loop import fit
from elmo_jax.training.objectives import bilm_loss, bilm_training, bilm_window_loss, init_params
from elmo_jax.training.step import LossFn, TrainState, compile_steps, compiler_options, runs_all_steps
from experiments.benchmark.cases import Case
from experiments.benchmark.inputs import model_of, stream_of, weights_of
from experiments.benchmark.runner import B1, RATE, Arrays, Built, pair_loss, sentences_of

_EPOCHS = 10**6  # more than are ever timed


class _Unsaved:
    """A run that keeps nothing: the disk is not what is timed."""

    monitor = "figure"

    def restore(self, template: Any) -> None:
        del template

    def save(self, state: Any, position: Any) -> None:
        del state, position

    def log(self, records: list[Any]) -> None:
        del records

    def wait(self) -> None:
        pass


def _training(case: Case, arrays: Arrays) -> tuple[Plan[TrainState], Any, Any]:
    """The state before the first step, the task of the default recipe, and the optimiser."""
    settings = OptimizerConfig(learning_rate=RATE, schedule="constant")
    task, optimizer = bilm_training(model_of(case, dropout=0.1), settings, 1, case.negatives)
    return Plan(lambda: TrainState.create(weights_of(arrays), optimizer)), task, optimizer


def build_fit(case: Case, arrays: Arrays) -> Built:
    """Epochs of `fit`, which waits in a thread of its own until the next is asked for."""
    begin, task, optimizer = _training(case, arrays)
    stream = stream_of(case, arrays)
    asked: SimpleQueue[None] = SimpleQueue()
    ended: SimpleQueue[Any] = SimpleQueue()

    def on_epoch(_: TrainState, sums: Any) -> dict[str, Any]:
        ended.put(sums["loss"] / sums["steps"])
        asked.get()
        return {"figure": 0.0}

    def train() -> None:
        asked.get()
        run: Any = _Unsaved()
        try:
            fit(begin, task, optimizer, stream, run, epochs=_EPOCHS, seed=0, on_epoch=on_epoch)
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

    return Built(lambda: {"loss": np.array(run(1))}, [(run, 1.0)])


def build_replay(case: Case, arrays: Arrays) -> Built:
    """The first epoch's dispatches again and again."""
    begin, task, optimizer = _training(case, arrays)
    stream = stream_of(case, arrays)
    dispatch, key = compile_steps(task, optimizer), jax.random.key(0)
    placed = [StepChunk(jax.device_put(d.batches), d.count) for d in stream.chunks(0, stream.steps_per_epoch)]
    held = [begin()]

    def run(n: int) -> float:
        loss = 0.0
        for _ in range(n):
            losses = []
            for batches, count in placed:
                held[0], sums = dispatch(held[0], batches, count, key)
                losses.append((sums["loss"], count))
            jax.block_until_ready(held)
            loss = sum(float(np.sum(each[:count])) for each, count in losses) / stream.steps_per_epoch
        return loss

    return Built(lambda: {"loss": np.array(run(1))}, [(run, 1.0)])


def repeat(step: Any, *args: Any) -> Any:
    """What runs a compiled function n times, one after the other, and waits for all that it returns."""
    apart = jax.default_backend() == "cpu"  # which would run them side by side; others keep their order

    def run(n: int) -> None:
        out = None
        for _ in range(n):
            out = step(*args)
            if apart:
                jax.block_until_ready(out)
        jax.block_until_ready(out)

    return run


def compiled_once(step: Any, names: tuple[str, ...], *args: Any) -> Built:
    """A function without state: its outputs are checked by name, and it is timed."""

    def check() -> dict[str, np.ndarray]:
        leaves = jax.tree.leaves(jax.block_until_ready(step(*args)))
        return {name: np.asarray(leaf) for name, leaf in zip(names, leaves, strict=True)}

    return Built(check, [(repeat(step, *args), 1.0)])


def lstm_gradients(loss: Any, case: Case, arrays: Arrays, options: dict[str, Any] | None = None) -> Built:
    """Loss and gradients of an LSTM ``(weights, x) -> loss``, named alike for all peers."""
    weights = weights_of(arrays)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), compiler_options=options)
    # Leaves come in the order of their names.
    kinds = ("bias", "input_kernel", "recurrent_kernel")
    names = ("loss", *(f"d:lstm_{i}/{kind}" for i in range(case.layers) for kind in kinds), "d:x")
    return compiled_once(step, names, weights, jnp.asarray(arrays["x"]))


def softmax_gradients(loss: Any, arrays: Arrays, options: dict[str, Any] | None = None) -> Built:
    """Loss and gradients of a softmax ``(hidden, table, bias) -> loss``, named alike for all peers."""
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)), compiler_options=options)
    args = [jnp.asarray(arrays[name]) for name in ("hidden", "table", "bias")]
    return compiled_once(step, ("loss", "d:hidden", "d:table", "d:bias"), *args)


def first_gradients(opt_state: Any) -> dict[str, np.ndarray]:
    """What Adam was given in its one step so far, of the LSTM and the softmax's bias.

    Its first moments hold it, so that nothing is compiled or kept for the check alone.
    """
    moments: Any = flatten_dict(optax.tree.get(opt_state, "mu"), sep="/")
    checked = {n: m for n, m in moments.items() if n.startswith("lstm") or n == "softmax_bias"}
    return {f"d:{name}": np.array(moment) / (1 - B1) for name, moment in checked.items()}


def build_product(case: Case, arrays: Arrays) -> Built:
    """A square product, of which the machine's rate is taken."""
    dtype = jnp.bfloat16 if case.precision == "bfloat16" else jnp.float32
    x = jnp.asarray(arrays["x"], dtype)
    built = compiled_once(jax.jit(lambda x: x @ x), ("product",), x)
    # NumPy's files know no bfloat16.
    return built._replace(check=lambda: {"product": built.check()["product"].astype(np.float32)})


def build_copy(case: Case, arrays: Arrays) -> Built:
    """A copy too large for any cache, of which the machine's rate is taken."""
    del case
    step, held = (
        jax.jit(lambda x: -x, donate_argnums=0),
        [jnp.array(arrays["x"])],
    )  # memory at hand, as torch has

    def run(n: int) -> np.ndarray:
        for _ in range(n):
            held[0] = step(held[0])
        jax.block_until_ready(held)
        return np.array(held[0])[:8] if n == 1 else np.zeros(0)

    return Built(lambda: {"copy": run(1)}, [(run, 1.0)])


_K = 8  # steps a dispatch, as by default


def build_scan(case: Case, arrays: Arrays) -> Built:
    """This library's side of a case, run by its scan."""
    return {"lstm": _lstm, "step": _step}[case.part](case, arrays, "fast")


def build(case: Case, arrays: Arrays) -> Built:
    """This library's side of a case."""
    make = {
        "product": build_product,
        "copy": build_copy,
        "lstm": _lstm,
        "softmax": _softmax,
        "step": _step,
        "recipe": _recipe,
        "fit": _fit,
        "official": _official,
        "embed": _embed,
        "sgns": _sgns,
    }[case.part]
    return make(case, arrays)


def _fit(case: Case, arrays: Arrays) -> Built:
    pass  # and with it Orbax

    return build_fit(case, arrays)


def _lstm(case: Case, arrays: Arrays, kernel: Kernel = "auto") -> Built:
    projection = case.width if case.width != case.cells else None
    dtype = "bfloat16" if case.precision == "bfloat16" else "float32"
    layer = LSTM(case.cells, projection, Clips(case.clip, case.clip), dtype, kernel)
    lengths = jnp.full(case.batch, case.steps, jnp.int32)
    cotangent = jnp.asarray(_time_last(arrays["cotangent"]))

    def loss(weights: Any, x: Array) -> Array:
        for i in range(case.layers):
            x = layer.apply({"params": weights[f"lstm_{i}"]}, x, lengths)[0]  # type: ignore[index]
        return jnp.sum(x.astype(jnp.float32) * cotangent)

    arrays = {**arrays, "x": _time_last(arrays["x"])}
    built = lstm_gradients(loss, case, arrays, compiler_options(matmul_bound=False))

    def check() -> dict[str, np.ndarray]:
        found = built.check()
        return found | {"d:x": np.moveaxis(found["d:x"], 2, 0)}

    return built._replace(check=check)


def _time_last(a: np.ndarray) -> np.ndarray:
    """Peers read ``[T, D, B, ...]``, this library ``[D, B, T, ...]``."""
    return np.ascontiguousarray(np.moveaxis(a, 0, 2))


def _softmax(case: Case, arrays: Arrays) -> Built:
    targets = jnp.asarray(arrays["targets"])
    weight = jnp.ones(len(targets), jnp.float32)
    draw = None
    if case.negatives is not None:  # as given: another program may round the same draw to a neighbour
        draw = Negatives(jnp.asarray(arrays["drawn"]), jnp.asarray(arrays["log_expected"]))

    def loss(hidden: Array, table: Array, bias: Array) -> Array:
        if draw is None:
            return full_nll(hidden, table, bias, targets, weight)[0]
        return sampled_nll(hidden, table, bias, targets, weight, draw)[0]

    return softmax_gradients(loss, arrays, compiler_options(matmul_bound=draw is None))


def _settings(case: Case) -> OptimizerConfig:
    kind = "adagrad" if case.part == "official" else "adam"
    return OptimizerConfig(optimizer=kind, learning_rate=RATE, schedule="constant")


def training(
    loss_fn: LossFn,
    like: TrainState,
    begin: Callable[[], TrainState],
    batches: Any,
    optimizer: Any,
    check: Callable[[TrainState], dict[str, np.ndarray]] | None = None,
) -> Built:
    """Steps through `compile_steps`, at most K at a time, compiled before there is a state, as `fit` does.

    A CPU takes as many as are asked for: K large steps would take minutes.

    Args:
        loss_fn: the task.
        like: a state's shapes.
        begin: the state before the first step.
        batches: K of them, ``[K, ...]``.
        optimizer: as the state is made with.
        check: of the state before the first step; else the first losses and gradients are checked.
    """
    key, batches = jax.random.key(0), jax.device_put(batches)
    dispatch = compile_steps(loss_fn, optimizer, like, [batches])
    held = [begin()]
    most = jax.tree.leaves(batches)[0].shape[0]

    def run(n: int) -> dict[str, Array]:
        sums: dict[str, Array] = {}
        for start in range(0, n, most):
            held[0], sums = dispatch(held[0], batches, min(most, n - start), key)
        return jax.block_until_ready((held[0], sums))[1]

    def first_steps() -> dict[str, np.ndarray]:
        first = run(1)["loss"][:1]
        gradients = first_gradients(held[0].opt_state)
        return {"loss": np.concatenate([first, run(2)["loss"][:2]])} | gradients

    whole = most if runs_all_steps() else 1  # steps that a dispatch takes however few are asked for
    checked = first_steps if check is None else lambda: check(held[0])
    return Built(checked, [(lambda n: run(n * whole), 1 / whole)])


def _repeated(tree: Any) -> Any:
    return jax.tree.map(lambda a: np.stack([np.asarray(a)] * _K), tree)


def _batch(words: np.ndarray, lengths: np.ndarray) -> Batch:
    return Batch(words, lengths, None, (lengths > 0).astype(np.float32))


def _step(case: Case, arrays: Arrays, kernel: Kernel = "auto") -> Built:
    model = model_of(case, kernel=kernel)
    task, optimizer = bilm_training(model, _settings(case), 1, case.negatives)
    batch = _batch(arrays["words"], arrays["lengths"])
    like = jax.eval_shape(lambda: TrainState.create(init_params(model, jax.random.key(0)), optimizer))
    begin = lambda: TrainState.create(weights_of(arrays), optimizer)  # noqa: E731
    return training(task, like, begin, _repeated(batch), optimizer)


def _recipe(case: Case, arrays: Arrays) -> Built:
    """The default recipe, timed by whole dispatches, as training takes them.

    What is checked is the model, with the full softmax and no dropout.
    """
    task, optimizer = bilm_training(model_of(case, dropout=0.1), _settings(case), 1, case.negatives)
    runs, first = [], None
    dispatch, key = compile_steps(task, optimizer), jax.random.key(0)
    held = [TrainState.create(weights_of(arrays), optimizer)]
    for bound, steps in zip(arrays["bounds"].tolist(), arrays["steps"].tolist(), strict=True):
        batches = jax.device_put(_batch(arrays[f"words:{bound}"], arrays[f"lengths:{bound}"]))
        first = first or jax.tree.map(lambda a: a[0], batches)

        def run(n: int, batches: Any = batches) -> None:
            for _ in range(n):
                held[0], _ = dispatch(held[0], batches, _K, key)
            jax.block_until_ready(held)

        runs.append((run, float(steps) / _K))

    def check() -> dict[str, np.ndarray]:
        loss = jax.jit(bilm_loss(model_of(case)))(held[0].params, first, key)[0]
        return {"loss": np.array(loss)}

    return Built(check, runs)


def _official(case: Case, arrays: Arrays) -> Built:
    """bilm-tf's recipe but for dropout; what is checked is the full softmax of the first two rows."""
    model = model_of(case)
    task, optimizer = bilm_training(model, _settings(case), 1, case.negatives, windows=True)
    words, weight, chars, types = (_time_last(arrays[name]) for name in ("words", "weight", "chars", "types"))
    window = Window(words, weight, chars, find_unique_words(types, axes=3))

    def begin(params: Any) -> TrainState:
        carry = {"state": zero_state(model.config, case.batch)}
        return TrainState.create(params, optimizer, carry=carry)

    def check(state: TrainState) -> dict[str, np.ndarray]:
        rows = jax.tree.map(lambda a: a[:, :2], replace(window, unique_words=None))
        carry = {"state": zero_state(model.config, 2)}
        loss = jax.jit(bilm_window_loss(model))({**state.params, **carry}, rows, jax.random.key(0))[0]
        return {"loss": np.array(loss)}

    like = jax.eval_shape(lambda: begin(init_params(model, jax.random.key(0))))
    return training(task, like, lambda: begin(weights_of(arrays)), _repeated(window), optimizer, check)


def _embed(case: Case, arrays: Arrays) -> Built:
    """`Elmo.embed` of a text whose words it meets for the first time."""
    from elmo_jax.elmo import Elmo  # and with it HDF5 and Orbax, which a step's memory is not to hold

    elmo = Elmo(model_of(case), weights_of(arrays), None)
    text = sentences_of(arrays)

    def run(n: int) -> list[np.ndarray]:
        out = []
        for _ in range(n):
            elmo._words.clear()  # else a second pass would find every word's vector
            out = list(elmo.embed(text))
        return out

    return Built(lambda: {"layers": np.concatenate(run(1), axis=1)}, [(run, 1.0)])


def _sgns(case: Case, arrays: Arrays) -> Built:
    """An epoch, the making of spans included; what is checked is what it ends with (see `pair_loss`)."""
    ids, config = arrays["ids"], SGNSConfig()
    documents = Documents(ids, np.arange(0, len(ids) + 1, 1000), np.zeros(len(ids) // 1000, np.int32))
    stream = SpanStream(documents, case.vocabulary, 4, config, seed=0)
    optimizer = sgns_optimizer(config, stream.window, stream.steps_per_epoch)
    dispatch = compile_steps(sgns_loss(config), optimizer)

    def run(n: int) -> TrainState:
        state = None
        for _ in range(n):
            state = TrainState.create(sgns_init(case.vocabulary, case.width, jax.random.key(0)), optimizer)
            for part in stream.chunks(0, stream.steps_per_epoch):
                state, _ = dispatch(state, part.batches, part.count, jax.random.key(0))
            jax.block_until_ready(state)
        assert state is not None
        return state

    def check() -> dict[str, np.ndarray]:
        tables = run(1).params
        return {"loss": pair_loss(ids, np.asarray(tables["centre"]), np.asarray(tables["context"]))}

    return Built(check, [(run, 1.0)])
