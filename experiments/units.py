"""Work that is the same for all that run in JAX: the machine's own rates, gradients, an optimiser's steps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from experiments.cases import Case
from experiments.inputs import weights_of
from experiments.worker import B1, Arrays, Built


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


def optimiser_steps(optimizer: Any, arrays: Arrays) -> Built:
    """Updates of an Optax optimiser, parameters and moments donated; a bias is checked."""
    gradients = weights_of({n.removeprefix("d:"): arrays[n] for n in arrays if n.startswith("d:")})

    def update(params: Any, opt_state: Any):
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    held: Any = weights_of(arrays)
    held = [held, optimizer.init(held)]
    step = jax.jit(update, donate_argnums=(0, 1))

    def run(n: int) -> None:
        for _ in range(n):
            held[:] = step(*held)
        jax.block_until_ready(held)

    def check() -> dict[str, np.ndarray]:
        run(1)
        return {"bias": np.array(held[0]["softmax_bias"])}

    return Built(check, [(run, 1.0)])


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
