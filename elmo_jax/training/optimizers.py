"""Optimizers: Adam and Adagrad with a schedule, and row-sparse optimizers for large tables.

A row-sparse optimizer gives the loss function only the table rows that a batch needs, so that neither the
gradient nor the update is as large as the table. Axes: V rows of a table, R rows of a step, F features.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

from elmo_jax.config import OptimizerConfig

Rows = dict[str, Array]


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Return the Optax optimizer for a run.

    Args:
        config: Optimizer, learning rate schedule and clipping.
        steps: Optimizer steps of the whole run, over which the schedule falls.

    Examples:
        >>> optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), steps=100)
        >>> isinstance(optimizer, optax.GradientTransformation)
        True
    """
    warmup = max(1, round(config.warmup * steps))
    decay = max(1, steps - warmup)
    peak = config.learning_rate
    after_warmup = {
        "cosine": optax.cosine_decay_schedule(peak, decay),
        "linear": optax.linear_schedule(peak, 0.0, decay),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    rate = optax.join_schedules(
        [optax.linear_schedule(peak / warmup, peak, warmup - 1), after_warmup], [warmup]
    )
    # The rate is kept in the state, where the message about a failed step reads it.
    if config.optimizer != "adagrad":
        step = optax.inject_hyperparams(optax.adam, static_args=("b1", "b2", "eps", "eps_root"))(rate)
    else:
        fixed = {"initial_accumulator_value": 1.0, "eps": 1e-7}
        step = optax.inject_hyperparams(optax.adagrad, static_args=tuple(fixed))(rate, **fixed)
    return optax.chain(optax.scale(config.gradient_scale), clip_by_global_norm(config.clip_norm), step)


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Return Optax's `clip_by_global_norm` computed with one factor.

    XLA:CPU turns Optax's choice between two quotients into one more array for every table.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        norm = optax.tree.norm(updates)
        factor = jnp.where(norm <= max_norm, 1, max_norm / norm)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class StepOptimizer(Protocol):
    """Interface through which `train_step` uses an optimizer, dense or row-sparse."""

    def init(self, params: dict[str, Any]) -> Any:
        """Return the state before the first step."""
        ...

    def rows(self, batch: Any, key: Array, /) -> Rows:
        """Return the indices of the table rows that a batch needs, by the path of the table."""
        ...

    def select(self, params: dict[str, Any], rows: Rows) -> dict[str, Any]:
        """Return the parameters that the loss function gets, with those rows in place of the tables."""
        ...

    def update(
        self, gradients: Any, state: Any, params: dict[str, Any], rows: Rows, step: Array, is_finite: Array
    ) -> tuple[Any, Any]:
        """Return parameters and state after a step, unchanged if `is_finite` is false.

        The gradients have the structure and the shapes of `select`.
        """
        ...


Optimizer = optax.GradientTransformation | StepOptimizer


def as_step_optimizer(optimizer: Optimizer) -> StepOptimizer:
    """Return an optimizer in the form that `train_step` uses."""
    if isinstance(optimizer, optax.GradientTransformation):
        return RowSparse(optimizer, lambda batch, key: {})
    return optimizer


@dataclass(frozen=True)
class RowSparseSGD:
    """Stochastic gradient descent on the table rows that a batch needs.

    The updates of all occurrences of a row are computed at the same parameters and added. For a row with
    very many occurrences the sum overshoots and training diverges, so that row moves by `max_occurrences`
    times their mean.

    Attributes:
        rate: Learning rate by step.
        rows: ``(batch, key) -> {name of a table: int32 indices [...]}``; an index may occur any number
            of times. The loss function gets ``[..., F]`` in place of the table.
        max_occurrences: Occurrences of a row up to which their updates are added unchanged.
    """

    rate: optax.Schedule
    rows: Callable[[Any, Array], Rows]
    max_occurrences: float

    def init(self, params: dict[str, Any]) -> dict[str, Any]:
        return {}

    def select(self, params: dict[str, Any], rows: Rows) -> dict[str, Any]:
        return {name: params[name][i] for name, i in rows.items()}

    def update(
        self, gradients: Any, state: Any, params: dict[str, Any], rows: Rows, step: Array, is_finite: Array
    ) -> tuple[Any, Any]:
        down = -jnp.asarray(self.rate(step))

        def move(table: Array, i: Array, g: Array) -> Array:
            occurrences = jnp.zeros(len(table), g.dtype).at[i].add(1)[i]
            scale = jnp.minimum(1, self.max_occurrences / occurrences)[..., None]
            return table.at[i].add(jnp.where(is_finite, down * scale * g, 0))

        return {name: move(params[name], i, gradients[name]) for name, i in rows.items()}, state


@dataclass(frozen=True)
class RowSparse:
    """An Optax optimizer that gets, for some tables, the gradient of the rows that a batch needs.

    With ``dense=False`` the other rows and their optimizer state do not change. For Adagrad and plain
    gradient descent a zero gradient has the same effect, so the result equals Optax's. For Adam the moments
    of the other rows do not decay and the rows do not move; TensorFlow calls this LazyAdam. With
    ``dense=True`` the other rows take a step with a gradient of zero, and the result equals Optax's for
    any optimizer.

    Attributes:
        optimizer: May first clip gradients by their global norm. Everything after that must treat each
            element on its own, keep state of a table's shape or of none, and not accumulate gradients
            over steps as `optax.MultiSteps` does.
        rows: ``(batch, key) -> {path of a table: int32 indices [R]}``, each index once and in rising
            order, filled up with V or more. The loss function gets ``[R, F]`` in place of the table.
        dense: Whether the other rows take a step too.

    Examples:
        >>> params = {"table": jnp.ones((4, 2))}
        >>> optimizer = RowSparse(optax.sgd(0.5), lambda batch, key: {"table": batch})
        >>> rows = optimizer.rows(jnp.array([1, 3]), jax.random.key(0))
        >>> gradients = {"table": optimizer.select(params, rows)["table"] + 1}  # twos, [2, 2]
        >>> after, _ = optimizer.update(gradients, optimizer.init(params), params, rows, 0, True)
        >>> after["table"][:, 0].tolist()
        [1.0, 0.0, 1.0, 0.0]
    """

    optimizer: optax.GradientTransformation
    rows: Callable[[Any, Array], Rows]
    dense: bool = False

    def init(self, params: dict[str, Any]) -> Any:
        return self.optimizer.init(params)

    def select(self, params: dict[str, Any], rows: Rows) -> dict[str, Any]:
        return jax.tree.map(_take_rows, params, _match_params(params, rows))

    def update(
        self, gradients: Any, state: Any, params: dict[str, Any], rows: Rows, step: Array, is_finite: Array
    ) -> tuple[Any, Any]:
        if not rows:
            return _apply(self.optimizer, gradients, params, state, is_finite)
        in_params = _match_params(params, rows)
        # A masked node stands for parameters that another part of the optimizer updates.
        is_masked = lambda leaf: isinstance(leaf, optax.MaskedNode)  # noqa: E731
        choose = lambda leaf, rows: leaf if is_masked(leaf) else rows  # noqa: E731
        options: Any = {"transform_non_params": lambda _: None, "is_leaf": is_masked}
        in_state = optax.tree.map_params(self.optimizer, choose, state, in_params, **options)
        tables, indices = (params, state), (in_params, in_state)
        own_params, own_state = jax.tree.map(_take_rows, tables, indices)
        new = _apply(self.optimizer, gradients, own_params, own_state, is_finite)
        if self.dense:
            zeros = jax.tree.map(jnp.zeros_like, params)
            tables = _apply(self.optimizer, zeros, params, state, is_finite)
        return jax.tree.map(_put_rows, tables, new, indices)


def _apply(
    optimizer: optax.GradientTransformation, gradients: Any, params: Any, state: Any, is_finite: Array
) -> tuple[Any, Any]:
    """Return parameters and state after an Optax step, unchanged if `is_finite` is false."""
    updates, after = optimizer.update(gradients, state, params)
    new = optax.apply_updates(params, updates), after
    return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, (params, state))


def _match_params(params: dict[str, Any], rows: Rows) -> Any:
    """Return the rows in the structure of the parameters, None for parameters without rows."""
    remaining = dict(rows)
    matched = jax.tree_util.tree_map_with_path(
        lambda path, _: remaining.pop(jax.tree_util.keystr(path, simple=True, separator="/"), None), params
    )
    if remaining:
        raise ValueError(f"no parameter is called {', '.join(remaining)}; check the paths of the tables")
    return matched


def _take_rows(table: Array, rows: Array | None) -> Array:
    return table if rows is None else jnp.take(table, rows, axis=0, mode="clip")


def _put_rows(table: Array, part: Array, rows: Array | None) -> Array:
    return part if rows is None else table.at[rows].set(part, mode="drop", indices_are_sorted=True)
