"""This library's side of the benchmark: each part as training and embedding run it.

Nouns: a *peer's* side of a case is its `Built`: something to check and something to time.
Axes: B batch, T time, D direction, K steps a dispatch, P width of states.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from elmo_jax.bilm import zero_state
from elmo_jax.characters import distinct
from elmo_jax.contiguous import Window
from elmo_jax.data import Batch, Documents
from elmo_jax.dispatch import compiler_options, make_dispatch, takes_all
from elmo_jax.lstm import LSTM, Kernel
from elmo_jax.negatives import Negatives
from elmo_jax.recurrence import Clips
from elmo_jax.sgns import SGNSConfig, SpanStream, sgns_init, sgns_loss, sgns_optimizer
from elmo_jax.softmax import full_nll, sampled_nll
from elmo_jax.tasks import bilm_loss, bilm_training, bilm_window_loss, init_params
from elmo_jax.train import LossFn, OptimizerConfig, TrainState, make_optimizer
from experiments.cases import Case
from experiments.inputs import model_of, weights_of
from experiments.units import (
    build_copy,
    build_product,
    first_gradients,
    lstm_gradients,
    optimiser_steps,
    softmax_gradients,
)
from experiments.worker import RATE, Arrays, Built, pair_loss, sentences_of

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
        "optimiser": _optimiser,
        "step": _step,
        "recipe": _recipe,
        "fit": _fit,
        "official": _official,
        "embed": _embed,
        "sgns": _sgns,
    }[case.part]
    return make(case, arrays)


def _fit(case: Case, arrays: Arrays) -> Built:
    from experiments.host import build_fit  # and with it Orbax

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
    built = lstm_gradients(loss, case, arrays, compiler_options(large=False))

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

    return softmax_gradients(loss, arrays, compiler_options(large=draw is None))


def _settings(case: Case) -> OptimizerConfig:
    kind = "adagrad" if case.part == "official" else "adam"
    return OptimizerConfig(optimizer=kind, learning_rate=RATE, schedule="constant")


def _optimiser(case: Case, arrays: Arrays) -> Built:
    return optimiser_steps(make_optimizer(_settings(case), 1), arrays)


def training(
    loss_fn: LossFn,
    like: TrainState,
    begin: Callable[[], TrainState],
    batches: Any,
    optimizer: Any,
    check: Callable[[TrainState], dict[str, np.ndarray]] | None = None,
) -> Built:
    """Steps through `make_dispatch`, at most K at a time, compiled before there is a state, as `fit` does.

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
    dispatch = make_dispatch(loss_fn, optimizer, like, [batches])
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

    whole = most if takes_all() else 1  # steps that a dispatch takes however few are asked for
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
    dispatch, key = make_dispatch(task, optimizer), jax.random.key(0)
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
    window = Window(words, weight, chars, distinct(types, axes=3))

    def begin(params: Any) -> TrainState:
        carry = {"state": zero_state(model.config, case.batch)}
        return TrainState.create(params, optimizer, carry=carry)

    def check(state: TrainState) -> dict[str, np.ndarray]:
        rows = jax.tree.map(lambda a: a[:, :2], replace(window, distinct=None))
        carry = {"state": zero_state(model.config, 2)}
        loss = jax.jit(bilm_window_loss(model))({**state.params, **carry}, rows, jax.random.key(0))[0]
        return {"loss": np.array(loss)}

    like = jax.eval_shape(lambda: begin(init_params(model, jax.random.key(0))))
    return training(task, like, lambda: begin(weights_of(arrays)), _repeated(window), optimizer, check)


def _embed(case: Case, arrays: Arrays) -> Built:
    """`Elmo.embed` of a text whose words it meets for the first time, all at once or one by one."""
    from elmo_jax.elmo import Elmo  # and with it HDF5 and Orbax, which a step's memory is not to hold

    elmo = Elmo(model_of(case), weights_of(arrays), None)
    text = sentences_of(arrays)
    calls = [text] if case.together else [[sentence] for sentence in text]

    def run(n: int) -> list[np.ndarray]:
        out = []
        for _ in range(n):
            elmo._reader.words.forget()  # else a second pass would find every word's vector
            out = [layers for call in calls for layers in elmo.embed(call)]
        return out

    return Built(lambda: {"layers": np.concatenate(run(1), axis=1)}, [(run, 1.0)])


def _sgns(case: Case, arrays: Arrays) -> Built:
    """An epoch, the making of spans included; what is checked is what it ends with (see `pair_loss`)."""
    ids, config = arrays["ids"], SGNSConfig()
    documents = Documents(ids, np.arange(0, len(ids) + 1, 1000), np.zeros(len(ids) // 1000, np.int32))
    stream = SpanStream(documents, case.vocabulary, 4, config, seed=0)
    optimizer = sgns_optimizer(config, stream.window, stream.steps_per_epoch)
    dispatch = make_dispatch(sgns_loss(config), optimizer)

    def run(n: int) -> TrainState:
        state = None
        for _ in range(n):
            state = TrainState.create(sgns_init(case.vocabulary, case.width, jax.random.key(0)), optimizer)
            for part in stream.dispatches(0, stream.steps_per_epoch):
                state, _ = dispatch(state, part.batches, part.count, jax.random.key(0))
            jax.block_until_ready(state)
        assert state is not None
        return state

    def check() -> dict[str, np.ndarray]:
        tables = run(1).params
        return {"loss": pair_loss(ids, np.asarray(tables["centre"]), np.asarray(tables["context"]))}

    return Built(check, [(run, 1.0)])
