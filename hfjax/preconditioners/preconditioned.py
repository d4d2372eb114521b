"""A preconditioner alone as an Optax transformation: P⁻¹∇f, without a solver.

For small batches drawn anew in each update, where products, conjugate gradients and
values of f follow the noise of the batch. An update costs little more than a gradient, and
momentum, learning rates, clipping and averages of weights are Optax's.
`hfjax.recipes.stochastic` is a complete set-up.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from hfjax._core import options, trees
from hfjax._core.arguments import as_params, as_product, check_gradient, missing
from hfjax._core.refusal import without_derivative
from hfjax._core.types import Batch, NumberOrSchedule, Params, Tree
from hfjax._tracing import compiled
from hfjax.objectives import masking
from hfjax.objectives.balance import number_of_scales
from hfjax.objectives.objective import Objective
from hfjax.objectives.plain import check_objective
from hfjax.preconditioners.rules import PreconditionerRule, kronecker


class ScaleByPreconditionerState(NamedTuple):
    """The state of `scale_by_preconditioner`.

    Attributes:
      count: number of updates so far, an int32 scalar.
      preconditioner: what the preconditioner keeps between updates, or `None`.
    """

    count: jax.Array
    preconditioner: Tree


def scale_by_preconditioner(
    objective: Objective,
    *,
    preconditioner: PreconditionerRule | None = None,
    damping: NumberOrSchedule = 0.1,
    bound: NumberOrSchedule | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Multiply gradients by P⁻¹, where P ≈ B + λI.

        u = min(1, b / √(gᵀP⁻¹g)) P⁻¹g        for the gradient g

    Like Optax's other `scale_by_…`, it keeps the sign of the gradient: chain it with
    momentum and `optax.scale_by_learning_rate`. Nothing is solved and f is not evaluated,
    so an update costs P⁻¹g and, at the preconditioner's `interval`, a build. There is no
    search for λ, no ρ and no rejection, but if any entry of u is not finite u is 0. B is the
    Gauss-Newton matrix G with the weight decay.

    `update(grads, state, params, batch=…)` takes the batch that P is built from, usually
    that of the gradient, and `all_params` as `hessian_free` does.

    Args:
      objective: f, with its weight decay, which is part of the gradient and of λ.
      preconditioner: from `hfjax.preconditioners`; `None` is `kronecker(decay=0.95,
        interval=20)`, an average over the batches of every twentieth update. A rule whose
        `data` is `"eval_batch"` gets the same batch.
      damping: λ, in units of the curvature of f; a number, or a schedule of the number of
        updates. It is read when P is built.
      bound: b, the longest u by the norm √(uᵀPu), in units of √f; a number, a schedule, or
        `None` for no bound. A step δ = −αu then has δᵀPδ ≤ α²b². If gᵀP⁻¹g < 0, u is 0.
      seed: of the random numbers of P.

    Returns:
      The transformation.

    Raises:
      TypeError: if an argument has the wrong type; in an update, if `params` or `batch` is
        missing.
      ValueError: if an option is out of range, the terms of `objective` are balanced, or
        the state is of another optimizer.

    Example:
      For a linear model, one output and λ = 0, P is G, and a step of length 1 is
      Newton's:

      >>> import hfjax
      >>> f = hfjax.Objective(lambda w, x: x @ w, hfjax.losses.squared_error())
      >>> tx = optax.chain(
      ...     hfjax.scale_by_preconditioner(f, damping=1e-9),
      ...     optax.scale_by_learning_rate(1.0),
      ... )
      >>> w, batch = jnp.zeros((2, 1)), (jnp.eye(2), jnp.array([[1.0], [-2.0]]))
      >>> value, grads = f.value_and_grad(w, batch)
      >>> updates, state = tx.update(grads, tx.init(w), w, batch=batch)
      >>> print(optax.apply_updates(w, updates).ravel().round(3))
      [ 1. -2.]

    References:
      Martens & Grosse (2015), for Kronecker factors. Ba, Grosse & Martens (2017),
      "Distributed second-order optimization using Kronecker-factored approximations",
      section 5, for the bound: their α√(gᵀP⁻¹g) ≤ √κ is `bound` = √κ / α.
    """
    check_objective(objective)
    if preconditioner is None:
        preconditioner = kronecker(decay=0.95, interval=20)
    if not isinstance(preconditioner, PreconditionerRule):
        msg = (
            "`preconditioner` must be a rule from `hfjax.preconditioners`, got "
            f"{type(preconditioner).__name__}."
        )
        raise TypeError(msg)
    options.check_range("damping", damping, low=0.0)
    if bound is not None:
        options.check_range("bound", bound, low=0.0, open_low=True)
    if number_of_scales(objective):
        msg = (
            "`scale_by_preconditioner` cannot balance the terms of `objective`: build it "
            "by `weighted_sum` without `balance`, or use `hessian_free`."
        )
        raise ValueError(msg)
    remembered = preconditioner.init or (lambda params: None)
    parts = _Parts(objective, preconditioner, damping, bound, seed)
    changed = compiled.once(functools.partial(_update, parts))

    def init(params: Params) -> Any:
        params = as_params(masking.ours(params))
        state = ScaleByPreconditionerState(
            count=jnp.zeros((), jnp.int32),
            preconditioner=remembered(params),
        )
        return masking.theirs(state)

    def update(
        updates: Params,
        state: Any,
        params: Params | None = None,
        *,
        batch: Batch | None = None,
        all_params: Params | None = None,
        **extra_args: Any,
    ) -> tuple[Params, Any]:
        del extra_args  # Optax's contract: ignore what is not needed.
        if params is None or batch is None:
            raise missing("params" if params is None else "batch")
        updates, state, params = masking.ours((updates, state, params))
        params, hidden = as_params(params), masking.hidden_of(params, all_params)
        check_gradient(updates, params)
        _check_state(state, jax.eval_shape(remembered, params))
        new = changed(updates, state, params, batch, hidden)
        return masking.theirs(without_derivative("An update", new))

    return optax.GradientTransformationExtraArgs(init, update)


class _Parts(NamedTuple):
    """The options of a transformation."""

    objective: Objective
    rule: PreconditionerRule
    damping: NumberOrSchedule
    bound: NumberOrSchedule | None
    seed: int


def _check_state(state: Any, memory: Tree) -> None:
    if not isinstance(state, ScaleByPreconditionerState):
        msg = (
            "`state` must be a `ScaleByPreconditionerState`, as `tx.init(params)` makes, "
            f"got {type(state).__name__}."
        )
        raise TypeError(msg)
    came = jax.tree.map(jnp.shape, state.preconditioner)
    if came != jax.tree.map(jnp.shape, memory):
        msg = (
            "`state.preconditioner` is of another preconditioner, `decay` or `interval`, "
            "or of other parameters: start from `tx.init(params)`."
        )
        raise ValueError(msg)


def _update(
    parts: _Parts,
    grads: Params,
    state: ScaleByPreconditionerState,
    params: Params,
    batch: Batch,
    hidden: Tree | None,
) -> tuple[Params, ScaleByPreconditionerState]:
    """Build P, or take the last one, and apply its inverse."""
    count, memory = state
    objective, dtype = parts.objective.at(count), trees.scalar_dtype(params)
    if hidden is not None:
        objective = masking.of_visible(objective, params, hidden)
    key = jax.random.fold_in(jax.random.key(parts.seed), count)
    damping = options.read(parts.damping, count).astype(dtype)
    given = (objective, params, batch, damping, key)
    if memory is None:
        found = parts.rule.build(*given)
    else:
        found, memory = parts.rule.build(*given, memory, count)
    inverse = as_product("preconditioner", found, matrix="P⁻¹ v")
    gradient = trees.cast_like(grads, trees.widen(params))
    unit, size = trees.normalised(gradient)
    scaled = inverse(unit)
    if parts.bound is not None:
        # Of the unit, whose square neither overflows nor underflows. It is negative if P is
        # not positive definite, and then no length of the step is small.
        square = trees.dot(unit, scaled).astype(dtype)
        length = jnp.sqrt(jnp.maximum(square, jnp.finfo(dtype).tiny))
        bound = options.read(parts.bound, count).astype(dtype)
        size = jnp.where(square < 0, 0, jnp.minimum(size, bound / length))
    scaled = trees.scale(size, scaled)
    fine = trees.is_finite(scaled)
    scaled = jax.tree.map(lambda x: jnp.where(fine, x, 0), scaled)
    count = jnp.asarray(optax.safe_increment(count))
    return trees.cast_like(scaled, params), ScaleByPreconditionerState(count, memory)
