"""Checks of derivatives by finite differences, and of a user's set-up.

`products` compares every factor of the Gauss-Newton product, and the product, with
differences of values (report, section 7.2): for a new model, loss or derivative rule.
`check` says in plain sentences what is wrong with an objective, an optimizer, a batch
and a gradient, before hours are spent on them.

Both work in float64, whatever the setting, and call the model many times from Python:
call them once, outside of `jit`, on one device.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from hfjax._core.arguments import ShapeError, as_key
from hfjax._core.types import Batch, Params
from hfjax._tracing.linearize import NO_FORWARD, linearized
from hfjax.curvature import ggn
from hfjax.inspection import _faults, _finite_differences
from hfjax.inspection._setup import Setup, flat, rows, unlike, unrows, unusable
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import alone, terms_of

MOST_PARAMETERS = 3000
"""Most parameters that `products` tries one by one (heuristic)."""
MOST_OUTPUTS = 100
"""Most outputs of a case for `products`, which takes m² differences (heuristic)."""


class ProductErrors(NamedTuple):
    """Relative errors ‖exact − differences‖ / ‖differences‖; absolute where that is 0.

    Attributes:
      jacobian: of J v, one random v.
      loss_hessian: of L″ u, one random u a case.
      transpose: of Jᵀ w, one random w.
      ggn: of G eⱼ: the worst column, beside the largest.
    """

    jacobian: float
    loss_hessian: float
    transpose: float
    ggn: float


def products(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    epsilon: float = 1e-4,
    key: jax.Array,
    columns: int | None = None,
) -> ProductErrors:
    """Compare J v, L″ u, Jᵀ w and G eⱼ with central differences, in float64.

    The other side is made of values of the model and of the loss only:

        J v  ≈ (F(θ + ε v) − F(θ − ε v)) / 2ε
        L″ₐᵦ ≈ second differences of L by outputs a and b
        Jᵀ w from J eⱼ, and G eⱼ = Σᵢ wᵢ Jᵢᵀ L″ᵢ Jᵢ eⱼ / Σᵢ wᵢ + weight_decay eⱼ

    ε = 1e-4 gives errors of about 1e-6 (report, section 7.2), where F and L are smooth.
    Use a toy version of the network: few units, a sequence of 4 steps. θ should be of
    reasonable scale: too small, and the network is linear; too large, and its units
    saturate; wrong derivatives can agree in both, and an L″ of nearly 0 is lost in
    rounding. What differs by intent: a loss that is repaired (`positive=`), where it is
    not convex, and parameters behind a `jax.lax.stop_gradient`.

    Args:
      objective: whose model, loss, weights and weight decay are tried.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`; a few cases.
      epsilon: ε > 0 (1e-4: report, section 7.2), with v, u and w of unit length.
      key: for v, u, w and the choice of columns.
      columns: how many eⱼ to try, at random; `None` is all. G is then compared in these
        rows and columns alone.

    Returns:
      The errors, as Python floats.

    Raises:
      TypeError: if `objective` is no `Objective`, or a weighted sum.
      ValueError: if the network is no toy: too many parameters to try all, or outputs.

    Example:
      >>> import optax
      >>> objective = Objective(lambda p, x: jnp.tanh(x @ p), optax.l2_loss)
      >>> params, x = jnp.array([[0.5], [-0.3]]), jnp.array([[1.0, 2.0], [0.3, -1.0]])
      >>> errors = products(
      ...     objective, params, (x, jnp.ones((2, 1))), key=jax.random.key(0)
      ... )
      >>> max(errors) < 1e-6
      True

    References:
      Martens & Sutskever (2012), section 7.2.
    """
    _check_objective(objective)
    if _is_sum(objective.at(0), batch):
        msg = (
            "`objective` is a weighted sum: `products` tries its parts, one at a time."
        )
        raise TypeError(msg)
    setup = Setup.of(objective, params, batch).in_float64()
    f, params, batch = setup.objective, setup.params, setup.batch
    with setup.precision():
        inputs, targets, weights = batch
        theta, unravel = ravel_pytree(params)
        outputs = setup.outputs(params, inputs)
        z, to_tree = rows(outputs), unrows(outputs)
        _check_toy(theta.size, z.shape[1], columns)

        def forward(theta: jax.Array) -> jax.Array:
            return rows(setup.outputs(unravel(theta), inputs))

        def values(z: jax.Array) -> jax.Array:
            return f.loss.value(to_tree(z), targets)

        keys = jax.random.split(as_key("key", key), 4)
        v = _unit(jax.random.normal(keys[0], theta.shape))
        u, w = (_unit(jax.random.normal(key, z.shape)) for key in keys[1:3])
        tried = jax.random.permutation(keys[3], theta.size)[:columns]

        j = _finite_differences.columns(forward, theta, tried, epsilon)
        hessians = _finite_differences.hessians(values, z, epsilon)
        share = weights / jnp.sum(weights)
        g = jnp.einsum("i,pia,iab,qib->pq", share, j, hessians, j)
        g += setup.decay * jnp.eye(tried.size)

        _, tangent, transpose = linearized(forward, theta)
        transposed = transpose(w)
        curved = rows(f.loss.hessian(outputs, targets)(to_tree(u)))
        product = ggn(f, params, batch)

        def column(index: jax.Array) -> jax.Array:
            e = jnp.zeros_like(theta).at[index].set(1)
            return ravel_pytree(product(unravel(e)))[0][tried]

        slow = _finite_differences.along(forward, theta, v, epsilon)
        return ProductErrors(
            jacobian=_error([tangent(v)], [slow]),
            loss_hessian=_error([curved], [jnp.einsum("iab,ib->ia", hessians, u)]),
            transpose=_error([transposed[tried]], [jnp.einsum("pia,ia->p", j, w)]),
            ggn=_error(jax.lax.map(column, tried), g),
        )


def check(
    objective: Objective,
    tx: Any,
    params: Params,
    batch: Batch,
    grads: Params,
) -> list[str]:
    """Say what is wrong with a set-up, one sentence a fault; `[]` if nothing is found.

    What it looks for, deepest cause first:

    - `grads` unlike `params`; numbers that are not finite; weights that are negative
      or all zero; targets that the loss is not meant for;
    - outputs without a case axis, or broadcast against targets of another shape; a model
      or a loss that fails for one case, or for half the batch;
    - a model that gives other values when called again, or cases that depend on one
      another or on their place: batch normalisation in training mode, dropout without
      a key of each case, a loss that mixes cases;
    - a derivative that is not that of the values: a wrong `jax.custom_vjp` or
      `custom_jvp`, a straight-through estimator; a derivative that `tx` needs, and
      that the model or the loss does not have;
    - a loss that is not convex in the outputs, or couples so many of a case that
      preconditioners and diagonals are estimated only nearly;
    - `grads` that are not ∇f of this objective on this batch: another reduction, sign
      or factor, weight decay, clipping;
    - rounding: gradient or product in their own precision more than 1% from those in
      float64, or f too coarse to show what the first update gains;
    - a `tx` that is not Hessian-free, or of another objective, or rejects its first
      update.

    What follows from a fault that is reported is not reported too. Nothing found is no
    proof: derivatives are tried along one fixed direction, and leaves of zero gradient
    count as frozen; the loss's curvature is searched in a few cases, here at θ.
    Costs about thirty evaluations of f, and one update.

    Args:
      objective: f; where `weight_decay` is a schedule, as at the first update.
      tx: of `hfjax.hessian_free`, or a chain that holds `scale_by_hessian_free`; `None`
        leaves it out (so does an objective with `axis_name`).
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      grads: what you hand to `tx.update`. From a larger batch, check them on that.

    Returns:
      Sentences for people.

    Raises:
      TypeError: if `objective` is no `Objective`.
      ValueError: if `batch` is none: see `hfjax.Objective`.

    Example:
      >>> import hfjax
      >>> objective = hfjax.Objective(lambda p, x: x @ p, hfjax.losses.squared_error())
      >>> tx, params = hfjax.hessian_free(objective), jnp.zeros((2, 1))
      >>> batch = jnp.array([[1.0, 2.0], [3.0, 5.0]]), jnp.array([[1.0], [-1.0]])
      >>> grads = objective.value_and_grad(params, batch)[1]
      >>> check(objective, tx, params, batch, grads)
      []
      >>> for fault in check(objective, tx, params, batch, 2 * grads):
      ...     print(fault[:78])
      `grads` is 2 times the gradient of this objective: a sum over the cases, where
    """
    try:
        _check_objective(objective)
        fault = _first(unlike(params, grads))
        if fault:
            return [fault]
        check = _check_sum if _is_sum(objective.at(0), batch) else _check
        return check(objective.at(0), tx, params, batch, grads)
    except ShapeError as error:
        return [str(error)]


def _check(
    objective: Objective, tx: Any, params: Params, batch: Batch, grads: Params
) -> list[str]:
    """Check one objective."""
    fault = _first(unusable(params, batch))
    if fault:
        return [fault]
    given = Setup.of(objective, params, batch)
    setup = given.in_float64_if_it_runs()
    for find in (
        _faults.bad_targets,
        _faults.not_finite,
        _faults.random,
        _faults.bound_to_a_number,
        _faults.dependent,
        _faults.no_reverse_derivative,
        _faults.wrong_derivative,
    ):
        with setup.precision():
            fault = _first(find(setup))
        if fault:
            return [fault]

    faults = []
    lacking = _first(_faults.no_forward_derivative(given))
    if lacking is None:
        faults += [*_faults.not_convex(setup), *_faults.noisy(given, setup)]
    elif not _faults.does_without(tx, given, batch, grads):
        faults.append(lacking)
    faults += _faults.unlike_gradient(given, setup, grads)
    if tx is not None and objective.axis_name is None:
        faults += _faults.bad_transformation(tx, given, batch, grads, judge=not faults)
    return faults or [*_faults.coarse_root(given)]


def _check_sum(
    objective: Objective, tx: Any, params: Params, batch: Batch, grads: Params
) -> list[str]:
    """Check every term, with its own gradient; then the whole."""
    given = Setup(objective, params, batch, 0.0, False)
    # As of one objective; terms may cancel, and what is left is their rounding.
    tolerance = 0.0
    for k, term in enumerate(terms_of(objective, batch)):
        plain = alone(term)
        try:
            gradient = plain.value_and_grad(params, term.cases)[1]
            tolerance += 1e-3 * float(term.weight) * np.linalg.norm(flat(gradient))
            faults = _check(plain, None, params, term.cases, gradient)
        except ShapeError as error:
            faults = [str(error)]
        if faults == [NO_FORWARD] and _faults.does_without(tx, given, batch, grads):
            continue
        if faults:
            return [f"Of the sum's term {k}: {fault}" for fault in faults]
    exact, found = flat(given.gradient(params)), flat(grads)
    size = max(np.linalg.norm(exact), float(np.finfo(np.float64).tiny))
    error = float(np.linalg.norm(found - exact) / size)
    if not error * size <= tolerance:
        return [
            f"`grads` is not the gradient of this sum, but {error:.2g} of its length away: "
            "hand in `objective.value_and_grad(params, batch)[1]`."
        ]
    if tx is None or objective.axis_name is not None:
        return []
    return [*_faults.bad_transformation(tx, given, batch, grads, judge=True)]


def _first(faults: Iterator[str]) -> str | None:
    return next(faults, None)


def _check_objective(objective: object) -> None:
    if not isinstance(objective, Objective):
        came = type(objective).__name__
        msg = f"`objective` must be an `hfjax.Objective`, got {came}."
        raise TypeError(msg)


def _is_sum(objective: Objective, batch: Batch) -> bool:
    return terms_of(objective, batch)[0].weight is not None


def _check_toy(parameters: int, outputs: int, columns: int | None) -> None:
    if columns is None and parameters > MOST_PARAMETERS:
        msg = (
            f"The model has {parameters} parameters, more than {MOST_PARAMETERS}: use a "
            "toy version of it, or say how many to try, `columns=20`."
        )
        raise ValueError(msg)
    if outputs > MOST_OUTPUTS:
        msg = (
            f"A case has {outputs} outputs, more than {MOST_OUTPUTS}: use a toy version "
            "of the model, with fewer output units or time steps."
        )
        raise ValueError(msg)


def _unit(v: jax.Array) -> jax.Array:
    """Scale to unit length along the last axis."""
    return v / jnp.linalg.norm(v, axis=-1, keepdims=True)


def _error(exact: Iterable[jax.Array], slow: Iterable[jax.Array]) -> float:
    """Return the worst ‖exact − slow‖ of several arrays, beside the largest ‖slow‖."""
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(exact, slow, strict=True)]
    wrong = max(float(np.linalg.norm(x - y)) for x, y in pairs)
    right = max(float(np.linalg.norm(y)) for _, y in pairs)
    return wrong / right if right else wrong
