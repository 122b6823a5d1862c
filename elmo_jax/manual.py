"""Arrays inside `jax.shard_map`, where each either differs between devices or is the same on all."""

from typing import TypeVar

import jax

T = TypeVar("T")


def alike(tree: T) -> T:
    """Arrays that all differ between the same devices, as what a loop carries has to: it begins as it ends.

    The gradient of what was the same on all devices is summed over them, once. Nothing is
    done outside `jax.shard_map`.

    Args:
        tree: of arrays, which are computed with one another.

    Example:
        >>> alike((jax.numpy.ones(2), None))
        (Array([1., 1.], dtype=float32), None)
    """
    axes: frozenset[str] = frozenset().union(*map(_varying, jax.tree.leaves(tree)))

    def cast(a: jax.Array) -> jax.Array:
        missing = tuple(sorted(axes - _varying(a)))
        return jax.lax.pcast(a, missing, to="varying") if missing else a

    return jax.tree.map(cast, tree)


def _varying(a: jax.Array) -> frozenset[str]:
    """The mesh's axes along which an array differs; none where JAX does not keep account of that."""
    return getattr(getattr(jax.typeof(a), "mat", None), "varying", frozenset())
