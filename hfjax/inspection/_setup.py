"""An objective with concrete parameters and data, in its own precision or in float64."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hfjax._core import trees
from hfjax._core.types import Batch, Params, Tree
from hfjax._tracing.programs import equations_of
from hfjax.objectives import decay
from hfjax.objectives.cases import as_cases
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import alone, terms_of
from hfjax.objectives.positions import without_padding

_DENSE = 64
"""Largest number of outputs per example for which L″ is formed as a matrix."""
_POWER_ITERATIONS = 30
"""Power iterations for each end of its spectrum otherwise."""
TINY = float(np.finfo(np.float64).tiny)
"""Replaces a norm of 0 in a denominator."""


class Setup(NamedTuple):
    """An objective with its parameters and batch.

    Attributes:
      objective: without schedules or a mapped axis.
      params: θ.
      batch: `(inputs, targets, weights)`.
      rounding: machine epsilon of the coarsest dtype that the losses are computed in.
      wide: whether to compute in float64, whatever `jax_enable_x64` is.
    """

    objective: Objective
    params: Params
    batch: Batch
    rounding: float = 0.0
    wide: bool = False

    @classmethod
    def of(cls, objective: Objective, params: Params, batch: Batch) -> "Setup":
        """Make a set-up from an objective as it is in the first update."""
        # Where positions have weights, this is the equal objective of examples that do.
        (term,) = terms_of(objective.at(0), batch)
        objective = dataclasses.replace(alone(term), axis_name=None)
        params, batch = jax.tree.map(jnp.asarray, (params, tuple(term.cases)))
        return cls(objective, params, batch)._with_rounding()

    def in_float64(self) -> "Setup":
        """Return the same in float64."""
        with jax.enable_x64(True):
            params, batch = in_float64((self.params, self.batch))
        return Setup(self.objective, params, batch, wide=True)._with_rounding()

    def in_float64_if_it_runs(self) -> "Setup":
        """Return the same in float64, or itself if the model requires its own dtype."""
        try:
            return self.in_float64()
        except TypeError:
            # For example, the carry of a `lax.scan` is created as float32.
            return self

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Compute in the precision of this set-up within the context."""
        if not self.wide:
            yield
            return
        # The model's own float32 constants meet float64 values. Strict promotion, if the
        # user has set it, would refuse them.
        with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
            yield

    @property
    def decay(self) -> np.ndarray:
        """The weight decay of each parameter, a flat vector."""
        with self.precision():
            zeros = jax.tree.map(jnp.zeros_like, trees.widen(self.params))
            return flat(decay.raised(self.objective.weight_decay, zeros))

    def outputs(self, params: Params, inputs: Tree) -> Tree:
        """Run the model, without hidden states."""
        return terms_of(self.objective, self.batch)[0].outputs(params, inputs)

    def value(self, params: Params) -> float:
        """Compute f."""
        with self.precision():
            return float(self.objective.value(params, self.batch))

    def gradient(self, params: Params) -> Params:
        """Compute ∇f."""
        with self.precision():
            return self.objective.value_and_grad(params, self.batch)[1]

    def data_gradient(self, params: Params) -> Params:
        """Compute ∇f without weight decay."""
        bare = dataclasses.replace(self.objective, weight_decay=0.0)
        return self._replace(objective=bare).gradient(params)

    def case_values(self, chosen: Any = slice(None)) -> np.ndarray:
        """Compute the losses of the chosen examples, evaluated without the others."""
        with self.precision():
            batch = jax.tree.map(lambda leaf: leaf[chosen], self.batch)
            return np.asarray(self.objective.case_values(self.params, batch))

    def rounded(self, rounding: float) -> Params:
        """Return θ with relative errors of up to `rounding`, always the same ones."""
        with self.precision():
            errors = jax.tree.map(jnp.multiply, self.params, waves(self.params, 1.0))
            return walk(self.params, errors, rounding)

    def _with_rounding(self) -> "Setup":
        # A model may compute in a coarser dtype than its parameters have, such as
        # bfloat16.
        with self.precision():
            jaxpr = jax.make_jaxpr(self.objective.case_values)(self.params, self.batch)
        results = [x.aval for run in equations_of(jaxpr) for x in run.outvars]
        dtypes = {x.dtype for x in (*results, *jax.tree.leaves(self.params))}
        floating = [d for d in dtypes if jnp.issubdtype(d, jnp.floating)]
        return self._replace(rounding=max(float(jnp.finfo(d).eps) for d in floating))


def unlike(params: Params, grads: Params) -> str | None:
    """Check that `grads` has the structure and shapes of `params`."""
    ours, theirs = jax.tree.structure(params), jax.tree.structure(grads)
    shapes, others = (
        {jax.tree_util.keystr(path): jnp.shape(x) for path, x in leaves}
        for leaves in map(jax.tree_util.tree_leaves_with_path, (params, grads))
    )
    if ours != theirs:
        alone = ", ".join(sorted(shapes.keys() ^ others.keys())[:3])
        which = f"leaves of one of them: {alone}" if alone else f"{theirs}, not {ours}"
        return f"`grads` has another structure than `params`: {which}."
    for at, shape in shapes.items():
        if others[at] != shape:
            return f"`grads{at}` has shape {others[at]}, `params{at}` has {shape}."
    return None


def invalid(params: Params, batch: Batch) -> str | None:
    """Check that parameters and data are finite, and weights valid."""
    inputs, targets, weights = without_padding(as_cases(batch))
    named = {"params": params, "inputs": inputs, "targets": targets, "weights": weights}
    for name, tree in named.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            floating = jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
            if floating and not np.all(np.isfinite(np.asarray(leaf, np.float64))):
                return f"`{name}{jax.tree_util.keystr(path)}` holds NaN or infinity."
    if np.any(np.asarray(weights) < 0):
        return (
            "A weight is negative: f is not a mean, and G need not be positive "
            "semi-definite."
        )
    if not np.any(np.asarray(weights)):
        return "All weights are 0: there is nothing to fit."
    return None


def in_float64(tree: Tree) -> Tree:
    """Cast floating leaves to float64; labels and keys stay as they are."""

    def leaf(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x)
        return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def rows(outputs: Tree) -> jax.Array:
    """Return outputs as `[cases, m]`."""
    # Outputs of several dtypes are joined in the widest of them.
    with jax.numpy_dtype_promotion("standard"):
        return jax.vmap(lambda case: ravel_pytree(case)[0])(outputs)


def unrows(outputs: Tree) -> Callable[[jax.Array], Tree]:
    """Return the inverse of `rows`, from `[cases, m]` to trees like `outputs`."""
    with jax.numpy_dtype_promotion("standard"):
        to_tree = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], outputs))[1]
    return jax.vmap(to_tree)


def extreme_curvature(
    product: Callable[[Tree], Tree], outputs: Tree
) -> tuple[np.ndarray, np.ndarray]:
    """Return the smallest eigenvalue of L″ and the largest absolute one, per example.

    For many outputs these are estimates; the smallest is never below the true one.
    """
    z = rows(outputs)
    to_tree = unrows(outputs)

    def by_rows(v: jax.Array) -> jax.Array:
        return rows(product(trees.cast_like(to_tree(v), outputs)))

    size = z.shape[1]
    if size <= _DENSE:
        basis = jnp.eye(size, dtype=z.dtype)[:, None]
        basis = jnp.broadcast_to(basis, (size, *z.shape))
        matrices = np.asarray(jnp.swapaxes(jax.lax.map(by_rows, basis), 0, 1))
        values = np.linalg.eigvalsh(matrices.astype(np.float64))
        return values[:, 0], np.max(np.abs(values), axis=1)

    def power(multiply: Callable[[jax.Array], jax.Array]) -> jax.Array:
        def step(_: int, v: jax.Array) -> jax.Array:
            v = multiply(v)
            length = jnp.linalg.norm(v, axis=1, keepdims=True)
            return v / jnp.where(length == 0, 1, length)

        start = jnp.broadcast_to(jnp.cos(jnp.arange(size, dtype=z.dtype)), z.shape)
        v = jax.lax.fori_loop(0, _POWER_ITERATIONS, step, start)
        # A Rayleigh quotient of L″ itself never lies outside of its spectrum.
        square = jnp.sum(v * v, axis=1)
        return jnp.sum(v * by_rows(v), axis=1) / jnp.where(square == 0, 1, square)

    largest = jnp.abs(power(by_rows))
    # 2 |λ|ₘₐₓ I − L″ has its largest eigenvalue where L″ has its smallest one.
    least = power(lambda v: 2 * largest[:, None] * v - by_rows(v))
    return np.asarray(least), np.asarray(largest)


def flat(tree: Tree) -> np.ndarray:
    """Concatenate a tree into one float64 NumPy vector."""
    leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
    return np.concatenate([np.zeros(0), *leaves])


def waves(tree: Tree, frequency: float) -> Tree:
    """Return a fixed, generic direction: cos(frequency · i) for entry i."""

    def leaf(x: jax.Array) -> jax.Array:
        return jnp.cos(frequency * jnp.arange(1.0, x.size + 1)).reshape(x.shape)

    return trees.cast_like(jax.tree.map(leaf, tree), tree)


def walk(params: Params, direction: Params, step: float) -> Params:
    """Return θ + step · direction."""
    return jax.tree.map(lambda x, v: x + step * v, params, direction)


def relative(x: np.ndarray, y: np.ndarray) -> float:
    """Return ‖x − y‖ / ‖y‖."""
    return float(np.linalg.norm(x - y) / max(np.linalg.norm(y), TINY))
