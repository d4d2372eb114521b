"""Check a set-up for common mistakes, and derivatives by finite differences.

Call `check` before a long run: it explains in plain sentences what is wrong with an
objective, an optimizer, a batch and a gradient. Call `products` for a new model, loss or
derivative rule: it compares Gauss-Newton vector products with finite differences. Both
compute in float64, whatever `jax_enable_x64` is, and evaluate the model many times from
Python: call them once, outside of `jit`, on one device.
"""

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
from hfjax.inspection._setup import Setup, flat, invalid, relative, rows, unlike, unrows
from hfjax.objectives.balance import number_of_scales
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import alone, check_objective, terms_of

MOST_PARAMETERS = 3000
"""Largest number of parameters for `products` without `columns`."""
MOST_OUTPUTS = 100
"""Largest number m of outputs per example for `products`, which takes m² differences."""


class ProductErrors(NamedTuple):
    """Relative errors ‖product − differences‖ / ‖differences‖ (absolute if that is 0).

    Attributes:
      jacobian: error of J v for a random v.
      loss_hessian: error of L″ u for one random u per example.
      transpose: error of Jᵀ w for a random w.
      ggn: largest error of a column G eⱼ, relative to the largest column.
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

    The reference values use only values of the model F and of the loss L:

        J v  ≈ (F(θ + ε v) − F(θ − ε v)) / 2ε
        L″ₐᵦ ≈ second differences of L by outputs a and b
        Jᵀ w from J eⱼ, and G eⱼ = Σᵢ wᵢ Jᵢᵀ L″ᵢ Jᵢ eⱼ / Σᵢ wᵢ + weight_decay eⱼ

    If F and L are smooth, the errors are about 1e-6 for ε = 1e-4. Use a toy version of
    the network (few units, about 4 time steps) and parameters of moderate size: in a
    linear or a saturated network wrong derivatives may agree, and rounding may hide an
    L″ near 0. Errors are expected for parameters behind `jax.lax.stop_gradient`, and
    for a non-convex loss whose L″ is repaired (`positive=`) or replaced (`gaussian`).

    Args:
      objective: provides the model, the loss and the weight decay.
      params: θ.
      batch: a few examples, `(inputs, targets)` or `(inputs, targets, weights)`.
      epsilon: ε > 0; v, u and w have norm 1.
      key: a random key, for v, u, w and the columns.
      columns: how many random columns and rows of G to compare; `None` is all.

    Returns:
      The errors, as Python floats.

    Raises:
      TypeError: if `objective` is not an `Objective`, or is a weighted sum.
      ValueError: if the network has too many outputs, or too many parameters to try all.

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
    check_objective(objective)
    if _is_sum(_at_start(objective), batch):
        msg = (
            "`objective` is a weighted sum: `products` tries its parts, one at a time."
        )
        raise TypeError(msg)
    setup = Setup.of(objective, params, batch).in_float64()
    f, params, batch = setup.objective, setup.params, setup.batch
    with setup.precision():
        inputs, targets, weights = batch
        # θ and z are flat vectors: a toy's derivatives fit in memory as dense arrays.
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
        # G = Σᵢ wᵢ Jᵢᵀ L″ᵢ Jᵢ / Σᵢ wᵢ + weight_decay I, from differences alone.
        share = weights / jnp.sum(weights)
        g = jnp.einsum("i,pia,iab,qib->pq", share, j, hessians, j)
        g += jnp.diag(jnp.asarray(setup.decay)[tried])

        _, tangent, transpose = linearized(forward, theta)
        transposed = transpose(w)
        curved = rows(f.loss.hessian(outputs, targets)(to_tree(u)))
        product = ggn(f, params, batch)

        def column(index: jax.Array) -> jax.Array:
            e = jnp.zeros_like(theta).at[index].set(1)
            return ravel_pytree(product(unravel(e)))[0][tried]

        slow = _finite_differences.along(forward, theta, v, epsilon)
        return ProductErrors(
            jacobian=_error(tangent(v), slow),
            loss_hessian=_error(curved, jnp.einsum("iab,ib->ia", hessians, u)),
            transpose=_error(transposed[tried], jnp.einsum("pia,ia->p", j, w)),
            ggn=_error(jax.lax.map(column, tried), g, axis=1),
        )


def check(
    objective: Objective,
    tx: Any,
    params: Params,
    batch: Batch,
    grads: Params,
) -> list[str]:
    """Explain what is wrong with a set-up, in one sentence per fault.

    It looks for, causes before their consequences:

    - NaN or infinity; invalid weights; targets outside the range of the loss; outputs or
      `grads` of the wrong shape;
    - a random model, or examples whose loss depends on other examples or on their place:
      batch normalisation in training mode, dropout without a key per example, a loss that
      mixes examples, a model or a loss for a fixed number of examples;
    - derivatives that contradict the values (a wrong `jax.custom_vjp` or `custom_jvp`, a
      straight-through estimator), or that `tx` needs but that do not exist;
    - a loss that is not convex in the outputs, or that couples so many outputs that
      preconditioners and diagonals are approximate;
    - `grads` with another reduction, sign, factor or weight decay than ∇f, or clipped;
    - rounding errors of more than 1% in the gradient or a product, or an f that is too
      coarse to resolve the first update;
    - a `tx` that is not Hessian-free, is built for another objective, or rejects its
      first update.

    An empty list is no proof: derivatives are tested along one fixed direction, leaves
    with zero gradient are taken to be frozen, and convexity is tested at θ for a few
    examples. The cost is about thirty evaluations of f, and one update.

    Args:
      objective: f; schedules are evaluated as in the first update.
      tx: the transformation of `hfjax.hessian_free`, or a chain with
        `scale_by_hessian_free`; `None`, or an `axis_name` of `objective`, skips it.
      params: θ.
      batch: `(inputs, targets)` or `(inputs, targets, weights)`.
      grads: what you pass to `tx.update`. If it is from a larger batch, pass that here.

    Returns:
      The sentences; an empty list if nothing is found.

    Raises:
      TypeError: if `objective` is not an `Objective`.
      ValueError: if `batch` is not valid: see `hfjax.Objective`.

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
        check_objective(objective)
        if fault := unlike(params, grads):
            return [fault]
        now = _at_start(objective)
        check = _check_sum if _is_sum(now, batch) else _check
        return check(now, tx, params, batch, grads)
    except ShapeError as error:
        return [str(error)]


def _check(
    objective: Objective, tx: Any, params: Params, batch: Batch, grads: Params
) -> list[str]:
    """Check one objective."""
    if fault := invalid(params, batch):
        return [fault]
    # In float64 if possible, so that rounding is not mistaken for another fault. Each of
    # these faults would make the tests after it fail too: report the first one only.
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
            fault = find(setup)
        if fault:
            return [fault]

    # These are independent of each other, so report all of them.
    found = [_faults.no_forward_derivative(given)]
    if found[0] is None:
        found = [_faults.not_convex(setup), _faults.noisy(given, setup)]
    elif _faults.does_without(tx, given, batch, grads):
        found = []
    found.append(_faults.unlike_gradient(given, setup, grads))
    if tx is not None and objective.axis_name is None:
        judge = not any(found)
        found.append(_faults.bad_transformation(tx, given, batch, grads, judge=judge))
    if not any(found):
        found = [_faults.coarse_root(given)]
    return [fault for fault in found if fault]


def _check_sum(
    objective: Objective, tx: Any, params: Params, batch: Batch, grads: Params
) -> list[str]:
    """Check each term with its own gradient, and then `grads` and `tx` for the sum."""
    given = Setup(objective, params, batch)
    # As for one objective, 1e-3 of each gradient. Relative to their sum this would be too
    # strict, as terms may cancel and leave mostly rounding.
    tolerance = 0.0
    for k, term in enumerate(terms_of(objective, batch)):
        plain = alone(term)
        try:
            gradient = plain.value_and_grad(params, term.cases)[1]
            tolerance += 1e-3 * float(term.weight) * np.linalg.norm(flat(gradient))
            faults = _check(plain, None, params, term.cases, gradient)
        except ShapeError as error:
            faults = [str(error)]
        # A missing J v of one term is no fault if the solver of `tx` does not need it.
        if faults == [NO_FORWARD] and _faults.does_without(tx, given, batch, grads):
            continue
        if faults:
            return [f"Of the sum's term {k}: {fault}" for fault in faults]
    exact, found = flat(given.gradient(params)), flat(grads)
    fault = None
    if not np.linalg.norm(found - exact) <= tolerance:
        error = relative(found, exact)
        fault = (
            f"`grads` is not the gradient of this sum (relative error {error:.2g}): pass "
            "`objective.value_and_grad(params, batch)[1]`."
        )
    elif tx is not None and objective.axis_name is None:
        fault = _faults.bad_transformation(tx, given, batch, grads, judge=True)
    return [fault] if fault else []


def _at_start(objective: Objective) -> Objective:
    scales = number_of_scales(objective)
    return objective.at(0, jnp.ones(scales) if scales else None)


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


def _error(exact: jax.Array, slow: jax.Array, axis: int | None = None) -> float:
    """Return ‖exact − slow‖ / ‖slow‖; for vectors along `axis`, the largest of each."""
    wrong = float(np.max(np.linalg.norm(exact - slow, axis=axis)))
    right = float(np.max(np.linalg.norm(slow, axis=axis)))
    return wrong / right if right else wrong
