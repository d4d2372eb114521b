"""Recipes: whole set-ups under one name."""

import optax

from hfjax import (
    backtracking,
    cg,
    damping,
    iterates,
    linesearch,
    preconditioners,
    stopping,
)
from hfjax._types import Number
from hfjax.objective import Objective
from hfjax.transform import hessian_free


def martens2010(
    objective: Objective, *, initial_damping: Number = 45.0, max_iterations: int = 250
) -> optax.GradientTransformationExtraArgs:
    """Set up Martens' published program, constant by constant.

    Every constant is written out below, whatever the defaults elsewhere are. In his
    program the gradient, the preconditioner, the choice of iterate and the line search
    are on all training data, the curvature and ρ on one quarter, taken in turn:

        value, grads = objective.value_and_grad(params, everything)
        tx.update(grads, state, params, batch=quarter, eval_batch=everything)

    Weight decay (2e-5 in his program, on biases too) belongs to the objective.

    Args:
      objective: f, with its weight decay.
      initial_damping: λ before the first update, on the scale of the mean curvature.
        45 is for losses summed over 784 outputs.
      max_iterations: of conjugate gradients in an update. 250 is for deep
        autoencoders from a random start.

    Returns:
      The transformation, as `hessian_free` returns it.

    References:
      Martens (2010); the program published with it, and its log on CURVES.
    """
    return hessian_free(
        objective,
        learning_rate=1.0,
        damping=damping.levenberg_marquardt(
            init=initial_damping,
            decrease=2 / 3,
            increase=3 / 2,
            lower=1 / 4,
            upper=3 / 4,
            minimum=0.0,
            ratio=damping.ReductionRatio(model="undamped", step="chosen", data="batch"),
        ),
        solver=cg.conjugate_gradient(
            max_iterations=max_iterations,
            min_iterations=1,
            stopping=stopping.martens2010(5e-4, fraction=0.1, minimum_window=10),
            keep=iterates.grid(first=5, growth=1.3),
            warm_start_decay=0.95,
            warm_start_from="last",
        ),
        preconditioner=preconditioners.diagonal(
            exponent=0.75, kappa=0.0, data="eval_batch"
        ),
        backtracking=backtracking.early_stop(),
        line_search=linesearch.armijo(
            sufficient_decrease=1e-2, shrink=0.8, max_tries=60
        ),
    )
