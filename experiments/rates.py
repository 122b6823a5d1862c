"""The machine's own rates, of a product and of a copy, and how a compiled function is timed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cases import Case
from experiments.inputs import Arrays
from experiments.worker import Built


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
