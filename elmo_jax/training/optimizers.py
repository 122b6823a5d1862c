"""Optimisers for large tables of which a batch names few rows: their gradients are of those rows alone.

Nouns: a *table* is a parameter whose first axis counts rows; its *path* is its name in the
parameters, with slashes. Axes: V rows of a table, R rows that a step touches, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

Rows = dict[str, Array]


@dataclass(frozen=True)
class RowSparseSGD:
    """Stochastic gradient descent on the rows of tables that a batch names, and on no others.

    The loss function is given those rows in place of the tables, so that neither its
    gradient nor the update is ever as large as a table.

    A step adds up the moves of all places that name a row, none of which sees what the others
    do. Of a row named very often that sum overshoots, and training diverges; it moves by the
    mean of its places, `most` times.

    Attributes:
        rate: the learning rate of a step.
        rows: the tables' names and, for each, the int32 indices ``[...]`` of the rows that a
            batch needs, any number of times; the loss function gets ``[..., F]``.
        most: places of a row whose moves are added up as they are.
    """

    rate: optax.Schedule
    rows: Callable[[Any, Array], Rows]
    most: float

    def init(self, params: dict[str, Any]) -> dict[str, Any]:
        """It remembers nothing."""
        return {}

    def given(self, params: dict[str, Any], rows: Rows) -> dict[str, Any]:
        """What the loss function gets in place of the parameters."""
        return {name: params[name][i] for name, i in rows.items()}

    def update(
        self, gradients: Any, state: Any, params: dict[str, Any], rows: Rows, step: Array, is_finite: Array
    ) -> tuple[Any, Any]:
        """Parameters and state after a step; as they were if it is not sound."""
        down = -jnp.asarray(self.rate(step))

        def move(table: Array, i: Array, g: Array) -> Array:
            places = jnp.zeros(len(table), g.dtype).at[i].add(1)[i]  # of the same row, for each place
            share = jnp.minimum(1, self.most / places)[..., None]
            return table.at[i].add(jnp.where(is_finite, down * share * g, 0))

        return {name: move(params[name], i, gradients[name]) for name, i in rows.items()}, state


@dataclass(frozen=True)
class RowSparse:
    """An Optax optimiser that is given, of some tables, the gradient of the named rows alone.

    Unless `dense`, only those rows move, and the optimiser's state for them. The others are as
    if the step had not been: with Adagrad and plain gradient descent that is what a gradient of
    zero does too, so the result is Optax's own. Adam's moments of such a row do not decay, nor
    does the row move on by them; TensorFlow calls that LazyAdam. If `dense`, the others take a
    step of a gradient of zero, and the result is Optax's own for any optimiser.

    Attributes:
        optimizer: may first clip gradients by their global norm; all after that must treat each
            element on its own, keep of a table what has its shape or none, and gather no
            gradients over steps, as `optax.MultiSteps` does, whose rows differ.
        rows: of a batch and the step's key, the paths of tables and, for each, the int32 rows
            ``[R]`` it names, each once and rising; V and above are places left over. The
            loss function gets ``[R, F]`` in place of the table.
        dense: whether the rows that are not named take a step too.

    Example:
        >>> params = {"table": jnp.ones((4, 2))}
        >>> optimizer = RowSparse(optax.sgd(0.5), lambda batch, key: {"table": batch})
        >>> rows = optimizer.rows(jnp.array([1, 3]), jax.random.key(0))
        >>> gradients = {"table": optimizer.given(params, rows)["table"] + 1}  # of [2, 2]
        >>> after, _ = optimizer.update(gradients, optimizer.init(params), params, rows, 0, True)
        >>> after["table"][:, 0].tolist()
        [1.0, 0.0, 1.0, 0.0]
    """

    optimizer: optax.GradientTransformation
    rows: Callable[[Any, Array], Rows] = lambda batch, key: {}
    dense: bool = False

    def init(self, params: dict[str, Any]) -> Any:
        """The state before the first step."""
        return self.optimizer.init(params)

    def given(self, params: dict[str, Any], rows: Rows) -> dict[str, Any]:
        """What the loss function gets in place of the parameters."""
        return jax.tree.map(_take, params, _like(params, rows))

    def update(
        self, gradients: Any, state: Any, params: dict[str, Any], rows: Rows, step: Array, is_finite: Array
    ) -> tuple[Any, Any]:
        """Parameters and state after a step; as they were if it is not sound."""
        named = _like(params, rows)
        masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731  # a part another optimiser has
        in_state = optax.tree.map_params(
            self.optimizer,
            lambda leaf, rows: leaf if masked(leaf) else rows,
            state,
            named,
            transform_non_params=lambda _: None,
            is_leaf=masked,
        )
        whole, where = (params, state), (named, in_state)
        new = self._step(gradients, jax.tree.map(_take, whole, where), is_finite)
        if self.dense:
            whole = self._step(jax.tree.map(jnp.zeros_like, params), whole, is_finite)
        return jax.tree.map(_put, whole, new, where)

    def _step(self, gradients: Any, old: tuple[Any, Any], is_finite: Array) -> tuple[Any, Any]:
        updates, after = self.optimizer.update(gradients, old[1], old[0])
        new = optax.apply_updates(old[0], updates), after
        return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, old)


def _like(params: dict[str, Any], rows: Rows) -> Any:
    """The rows in the structure of the parameters; None where a parameter is no named table."""
    left = dict(rows)
    where = jax.tree_util.tree_map_with_path(
        lambda path, _: left.pop(jax.tree_util.keystr(path, simple=True, separator="/"), None), params
    )
    if left:
        raise ValueError(f"no parameter is called {', '.join(left)}")
    return where


def _take(table: Array, rows: Array | None) -> Array:
    return table if rows is None else jnp.take(table, rows, axis=0, mode="clip")


def _put(table: Array, part: Array, rows: Array | None) -> Array:
    return part if rows is None else table.at[rows].set(part, mode="drop", indices_are_sorted=True)
